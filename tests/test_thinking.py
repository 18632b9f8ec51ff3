"""kit.core.thinking: where a model's thinking ends, in the marks of many models."""

from __future__ import annotations

import time

import pytest

from kit.core.records import Sample, TraceRow
from kit.core.thinking import after_thinking, is_left_open, without_opening
from kit.grading.answers import find
from kit.judging.sentences import ends

# begin, end; of harmony with its special tokens and without them, which has no begin of its own
MARKS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("", "[BEGIN FINAL RESPONSE]"),
    ("analysis", "assistantfinal"),
]


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_only_what_follows_the_thinking_holds_the_answer(begin: str, end: str) -> None:
    thinking = f"{begin}Is it \\boxed{{12}}? The answer is 12, #### 12. No."
    text = f"{thinking}{end}\n\nThe final answer is 7."
    assert after_thinking(text) == "\n\nThe final answer is 7."
    assert find(text) == ("7", "phrase")
    # thinking may speak of its own end
    assert find(f"{thinking}{end} {text}") == ("7", "phrase")
    # an answer in the thinking alone is none
    assert find(f"{thinking}{end} I stop here.") == (None, "none")
    assert after_thinking(thinking) is None
    if begin.strip() and begin != "analysis":
        assert without_opening(text) == text[len(begin) :].lstrip()
        assert is_left_open(f"<|im_start|>assistant\n{begin}\n") and not is_left_open(text)


@pytest.mark.parametrize(
    "text",
    ["I think it is 7.", "<b>7</b>", "[thinking aloud] 7", "the assistant finally", "x</thin", ""],
)
def test_words_about_thinking_are_no_marks(text: str) -> None:
    assert after_thinking(text) is None and without_opening(text) == text


def test_a_trace_begins_without_the_mark_and_its_attempt_follows_the_thinking() -> None:
    text = "<think>\nTom has 3. He buys 4. That is 7.\n</think>\n\nIt is \\boxed{7}."
    sample = Sample(text=text, verdict="correct")
    row = TraceRow(id="a", question="q", answer="7", samples=(sample,), kept=(0,))
    [whole] = row.whole(ends)
    assert whole.trace == text.removeprefix("<think>\n") and whole.attempt == "It is \\boxed{7}."
    assert whole.end == len(whole.trace) and whole.sentences_total == len(ends(whole.trace))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7</s>", "7"),
        ("The final answer is 7<|im_end|>\n", "7"),
        ("The answer is 7<｜end▁of▁sentence｜>", "7"),
        ("So \\boxed{7}<|eot_id|><|end_of_text|> ", "7"),
        ("<|begin_of_box|>7<|end_of_box|>", "7"),
        ("The answer is <b>.", None),
    ],
)
def test_special_tokens_at_the_end_are_no_part_of_an_answer(text: str, answer: str | None) -> None:
    assert find(text)[0] == answer


@pytest.mark.parametrize("unit", [" ", "</s>", "<|", "<think>", "<｜"])
def test_a_hundred_thousand_marks_take_no_time(unit: str) -> None:
    begun = time.perf_counter()
    find("a" + unit * (100_000 // len(unit)))
    assert time.perf_counter() - begun < 5
