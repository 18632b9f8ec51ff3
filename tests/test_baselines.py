"""What each baseline keeps of a trace: exact sentences in their order, or a reason."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.methods import METHODS
from kit.core.progress import Progress
from kit.core.records import AlignedRow, PrefixRow, Problem, TraceRow
from kit.core.run import Run
from kit.core.storage import RowFile
from kit.data import read
from kit.grading.answers import Grader, Item
from kit.judging import baselines
from kit.judging.cut import cut_at_ratio, within_memory
from kit.judging.sentences import ends, split
from kit.pipeline.truncate import _depends_on, truncate
from kit.prompts import target
from kit.synthetic import generate, wander
from tests.make_run import make
from tests.test_align import sample
from tests.tiny_backend import tiny_backend

WANDERING = (
    "Okay, let me see.\n\n9 * 6 should be 55. Hmm, wait. 55 looks off.\n\n"
    "After the large gift: 9 * 6 = 54.\n\nLet me check that. 54 / 6 = 9, yes. So 54 again.\n\n"
    "Wait. What was asked? That is 54.\n\nI have gone over it. The answer is \\boxed{54}."
)


def whole(trace: str, answer: str = "54", question: str = "How many?", **fields: Any) -> PrefixRow:
    row = TraceRow(
        id="a", question=question, answer=answer, samples=(sample(text=trace),), kept=(0,), **fields
    )
    [prefix] = row.whole(ends)
    return prefix


@pytest.fixture(scope="module")
def grader() -> Any:
    with Grader() as opened:
        yield opened


def test_first_correct_ends_with_the_first_sentence_that_concludes(grader: Grader) -> None:
    row = baselines.first_correct(grader, whole(WANDERING))
    assert row.prefix == WANDERING[: row.end] and row.prefix.rstrip().endswith("9 * 6 = 54.")
    assert row.sentences == len(split(row.prefix)) < row.sentences_total


@pytest.mark.parametrize(
    ("sentence", "answer", "concludes"),
    [
        ("So it is 54. ", "54", True),
        ("The answer is \\boxed{\\frac{1}{2}}. ", "1/2", True),
        ("Hence $x = \\frac{1}{2}$. ", "\\frac{1}{2}", True),
        ("That leaves 9 of them. ", "9", True),
        ("There are 54 ducks and 3 geese. ", "54", False),
        ("So 154 is too much. ", "54", False),
        ("It should be 54 * 2 = 108. ", "54", False),
        ("We need \\boxed{}. ", "54", False),
        ("The answer is \\boxed{55}. ", "54", False),
        ("How many is 9 times 6 if the sum is 54? ", "54", False),  # the question's own words
    ],
)
def test_what_concludes_with_the_gold_answer(
    grader: Grader, sentence: str, answer: str, concludes: bool
) -> None:
    question = "Tell me. How many is 9 times 6 if the sum is 54? "
    trace = f"Okay, let me see. {sentence}Hmm, what now?"
    row = baselines.first_correct(grader, whole(trace, answer, question))
    if concludes:
        assert (row.rejected, row.sentences) == (None, 2)
    else:
        assert row.rejected == "no correct sentence" and "none of 3" in str(row.detail)


def test_no_verify_drops_checks_to_the_end_of_their_paragraph_and_nothing_else(
    grader: Grader,
) -> None:
    row = baselines.no_verify(grader, whole(WANDERING))
    dropped = "Let me check that. 54 / 6 = 9, yes. So 54 again.\n\n"
    assert row.prefix == WANDERING.replace(dropped, "")
    assert row.sentences == row.sentences_total - 3
    flat = "9 * 6 = 54. Let me check that. So it is 54."
    assert baselines.no_verify(grader, whole(flat)).prefix == "9 * 6 = 54. So it is 54."
    assert "boxed" in baselines.no_verify(grader, whole("Let me verify: \\boxed{54}.")).prefix
    nothing = baselines.no_verify(grader, whole("Let me check that. Let me double-check it."))
    assert nothing.rejected == "only verification"


def test_post_think_keeps_the_attempt_exactly_or_says_why_not(grader: Grader) -> None:
    attempt = "## Solution\n\n9 * 6 = 54, so \\boxed{54}."
    row = baselines.post_think(grader, whole(WANDERING, attempt=attempt))
    assert (row.prefix, row.sentences, row.rejected) == (attempt, 0, None)
    in_one = whole(f"<think>{WANDERING}</think>\n\n{attempt}")
    assert baselines.post_think(grader, in_one).prefix == attempt
    # thinking that speaks of the tag
    speaking = whole(f"<think>I close with </think> at last. {WANDERING}</think>\n\n{attempt}")
    assert baselines.post_think(grader, speaking).prefix == attempt
    empty = baselines.post_think(grader, whole("", attempt=attempt))
    assert (empty.prefix, empty.ratio, empty.rejected) == (attempt, 0.0, None)
    assert baselines.post_think(grader, whole(WANDERING)).rejected == "no attempt"
    wrong = baselines.post_think(grader, whole(WANDERING, attempt="So \\boxed{55}."))
    assert wrong.rejected == "wrong attempt" and "55" in str(wrong.detail)


def test_s1k_rows_have_their_attempt_and_one_without_it_has_a_reason(tmp_path: Path) -> None:
    lines = [
        '{"question": "9*6?", "solution": "54", "deepseek_thinking_trajectory": "Hm. So it is 54.",'
        ' "deepseek_attempt": "It is \\\\boxed{54}."}',
        '{"question": "9*7?", "solution": "63", "deepseek_thinking_trajectory": "Hm. So it is 63.",'
        ' "deepseek_attempt": ""}',
    ]
    file = tmp_path / "s1k.jsonl"
    file.write_text("\n".join(lines))
    problems = read(configs.DatasetConfig(path=str(file)), 0, traces=True).problems
    assert [problem.attempt for problem in problems] == ["It is \\boxed{54}.", None]
    rows = run_truncate(tmp_path / "run", problems, method="post-think")
    assert [row.rejected for row in rows] == [None, "no attempt"]


def run_truncate(folder: Path, problems: list[Problem], **keys: Any) -> list[PrefixRow]:
    """The stage, on the problems' own traces."""
    raw = {"out": str(folder), "student": {"backend": "scripted", "model": "none"}, **keys}
    with Run(configs.resolve(raw, "test"), Progress(quiet=True)) as run:
        if run.begin("teach", "input", lambda: ""):
            rows = []
            for problem in problems:
                fields = problem.model_dump(include={"id", "question", "answer", "attempt"})
                rows.append(TraceRow(**fields, samples=(sample(text=problem.trace),), kept=(0,)))
            RowFile(run.path("traces.jsonl"), TraceRow).write_all(rows)
            run.finish("teach", len(rows), len(rows))
        truncate(run)
        return run.rows("prefixes.jsonl", PrefixRow)


def test_mixing_makes_a_long_and_a_short_row_of_each_trace(tmp_path: Path) -> None:
    problems = [
        Problem(id="a", question="q", answer="54", trace=WANDERING),
        Problem(id="b", question="r", answer="54", trace=WANDERING, attempt="\\boxed{54}"),
        Problem(id="c", question="s", answer="7", trace="Hm. I do not know."),
    ]
    rows = {row.id: row for row in run_truncate(tmp_path, problems, method="mix-long-short")}
    assert list(rows) == ["a-long", "a-short", "b-long", "b-short", "c-long", "c-short"]
    assert rows["a-long"].prefix == rows["b-long"].prefix == WANDERING
    assert rows["a-short"].prefix.rstrip().endswith("= 54.")
    assert rows["b-short"].prefix == "\\boxed{54}"
    assert not rows["c-long"].rejected and rows["c-short"].rejected == "no correct sentence"


KEEPS_SENTENCES = ("first-correct", "no-verify", "mix-long-short")


@pytest.mark.parametrize("method", KEEPS_SENTENCES)
@pytest.mark.parametrize("derives", ["early", "late", "spread"])
def test_every_target_is_sentences_of_the_trace_in_order_and_ends_in_the_answer(
    grader: Grader, method: str, derives: str
) -> None:
    rule = {
        "first-correct": baselines.first_correct,
        "no-verify": baselines.no_verify,
        "mix-long-short": baselines.long_or_short,
    }[method]
    for problem in generate(12, 3):
        trace = whole(wander(problem, 1.0, 0, derives, 2), problem.answer, problem.question)
        row = rule(grader, trace)
        assert not row.rejected, row.detail
        check_target(grader, method, trace, row)


def check_target(grader: Grader, method: str, trace: PrefixRow, row: PrefixRow) -> None:
    split_like(trace.trace, row.prefix)
    aligned = AlignedRow(
        id="a", question="q", answer=row.answer, prefix=row.prefix, continuation=""
    )
    text = target(method, aligned, "")
    assert text.startswith(row.prefix.rstrip())
    assert grader.grade([Item(row.answer, text)])[0].verdict == "correct"


def split_like(trace: str, kept: str) -> list[str]:
    """Kept text as sentences of the trace in its order, with nothing left over."""
    found: dict[int, list[str]] = {0: []}  # sentences that make up so many characters of it
    for sentence in split(trace):
        for length, parts in list(found.items()):
            if kept.startswith(sentence, length):
                found.setdefault(length + len(sentence), [*parts, sentence])
    assert len(kept) in found, f"no sentence of the trace: {kept[max(found) :][:60]!r}"
    return found[len(kept)]


@pytest.mark.parametrize("method", ["first-correct", "no-verify"])
def test_real_traces_keep_whole_sentences_or_have_a_reason(
    grader: Grader, method: str, real_traces: list[dict[str, str]]
) -> None:
    rule = {"first-correct": baselines.first_correct, "no-verify": baselines.no_verify}[method]
    for item in real_traces[:20]:
        trace = whole(item["long_cot"], item["answer"], item["question"])
        row = rule(grader, trace)
        if row.rejected:
            assert method == "first-correct" and not row.kept_text
        else:
            check_target(grader, method, trace, row)


SENTENCE = st.sampled_from(
    ["Let me check that. ", "So it is 54. ", "Hm. ", "9 * 6 = 54.\n\n", "Wait, no.\n\n", "Ok! "]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCE, min_size=1, max_size=12))
def test_any_trace_keeps_its_own_sentences_in_order(grader: Grader, parts: list[str]) -> None:
    trace = whole("".join(parts))
    for rule in (baselines.first_correct, baselines.no_verify):
        row = rule(grader, trace)
        if not row.rejected:
            split_like(trace.trace, row.prefix)
            assert row.ratio == row.sentences / row.sentences_total


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba"])
@pytest.mark.parametrize("piece_tokens", [7, 64, 999])
def test_entropies_from_one_prefill_equal_those_taken_one_token_at_a_time(
    name: str, piece_tokens: int
) -> None:
    from kit.backends.hf_session import entropies

    backend = tiny_backend(name)
    ids = torch.randint(0, 200, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = []
    with torch.inference_mode():
        for end in range(1, len(ids) + 1):
            logits = backend.model(torch.tensor([ids[:end]]), use_cache=False).logits[0, -1]
            chances = logits.double().softmax(-1)
            wanted.append(float(-(chances * chances.log()).sum()))
    assert entropies(backend, ids, piece_tokens) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("drop_ratio", [0, 0.5, 0.8])
def test_step_entropy_drops_the_sentences_of_which_the_student_is_surest(drop_ratio: float) -> None:
    backend = tiny_backend("llama")
    raw = {"baseline": {"drop_ratio": drop_ratio, "skip_marker": ""}, "method": "step-entropy"}
    config = configs.resolve(raw, "test")
    trace = whole(WANDERING)
    row = baselines.step_entropy(config, backend, trace)
    kept = split_like(WANDERING, row.prefix)
    assert (
        row.sentences
        == len(kept)
        == trace.sentences_total - int(trace.sentences_total * drop_ratio)
    )

    # The obvious way: each sentence's bytes, one forward pass over the whole of it.
    ids, bounds = baselines._token_bounds(config, backend, trace)
    assert bytes(ids[bounds[0] :]).decode() == WANDERING
    with torch.inference_mode():
        chances = backend.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    entropy = -(chances * chances.log()).sum(-1)
    sums = []
    for (begin, end), sentence in zip(itertools.pairwise(bounds), split(WANDERING), strict=True):
        assert bytes(ids[begin:end]).decode() == sentence
        sums.append(float(entropy[begin - 1 : end - 1].sum()))
    surest = sorted(sums)[: len(sums) - len(kept)]
    assert row.prefix == "".join(
        sentence
        for sentence, sum_ in zip(split(WANDERING), sums, strict=True)
        if sum_ not in surest
    )


def test_one_marker_stands_for_neighbours_that_are_dropped() -> None:
    config = configs.resolve({"method": "step-entropy"}, "test")
    row = baselines.step_entropy(config, tiny_backend("llama"), whole(WANDERING))
    assert row.prefix.count("[SKIP] ") >= 1 and "[SKIP] [SKIP]" not in row.prefix
    split_like(WANDERING, row.prefix.replace("[SKIP] ", ""))
    short = tiny_backend("llama", context_tokens=100)
    assert baselines.step_entropy(config, short, whole(WANDERING)).rejected == (
        "trace over the context"
    )


def test_the_matched_share_is_of_equal_mean_length(tmp_path: Path) -> None:
    run = make(tmp_path / "palign", seed=1)
    rows = RowFile(run / "prefixes.jsonl", PrefixRow).read()
    config = configs.resolve(
        {"method": "fixed-prefix-matched", "baseline": {"matched_run": str(run)}}, "test"
    )
    ratio = baselines.matched_ratio(config)
    assert ratio
    wanted = sum(len(row.prefix) for row in rows)
    offsets = [ends(row.trace) for row in rows]

    def excess(share: float) -> int:
        return sum(cuts[max(1, round(len(cuts) * share)) - 1] for cuts in offsets) - wanted

    assert excess(ratio) == sum(cut_at_ratio(row, ratio).end for row in rows) - wanted
    # No other share comes nearer, and the length grows with it.
    assert abs(excess(ratio)) == min(abs(excess(step / 1000)) for step in range(1, 1001))
    assert excess(ratio - 0.1) < 0 < excess(ratio + 0.1)


def test_matching_needs_a_run_whose_traces_are_cut(tmp_path: Path) -> None:
    problems = [Problem(id="a", question="q", answer="54", trace=WANDERING)]
    with pytest.raises(KitError, match="matched_run=None holds no run") as error:
        run_truncate(tmp_path / "a", problems, method="fixed-prefix-matched")
    assert error.value.code == 2 and "folder of a P-ALIGN run" in error.value.hint
    baseline = {"matched_run": str(tmp_path / "nothing")}
    with pytest.raises(KitError, match="no run whose traces a judge has cut"):
        run_truncate(tmp_path / "b", problems, method="fixed-prefix-matched", baseline=baseline)


def test_a_run_without_a_judged_cut_cannot_be_matched(tmp_path: Path) -> None:
    problems = [Problem(id="a", question="q", answer="54", trace=WANDERING)]
    run_truncate(tmp_path / "ratio", problems, method="ratio-0.5")
    baseline = {"matched_run": str(tmp_path / "ratio")}
    with pytest.raises(KitError, match="no run whose traces a judge has cut"):
        run_truncate(tmp_path / "b", problems, method="fixed-prefix-matched", baseline=baseline)


def test_a_judge_models_content_is_part_of_the_cuts_it_grades() -> None:
    trace = whole(WANDERING).model_copy(update={"verifier": "judge"})
    for method, is_graded in (("first-correct", True), ("no-verify", False)):
        keys = _depends_on(configs.resolve({}, "test"), METHODS[method], [trace])
        assert any("answer_judge" in key for key in keys) == is_graded


def test_a_matched_run_that_changed_reruns_the_cut(tmp_path: Path, capsys: Any) -> None:
    problems = [Problem(id="a", question="q", answer="54", trace=WANDERING)]
    keys = {"method": "fixed-prefix-matched", "baseline": {"matched_run": str(tmp_path / "p")}}
    make(tmp_path / "p", seed=1)
    [first] = run_truncate(tmp_path / "run", problems, **keys)
    file = RowFile(tmp_path / "p" / "prefixes.jsonl", PrefixRow)
    file.write_all([row.model_copy(update={"end": len(row.trace)}) for row in file.read()])
    [second] = run_truncate(tmp_path / "run", problems, **keys)
    assert first.prefix != second.prefix == WANDERING


def test_every_rule_of_the_table_is_one_that_truncate_knows() -> None:
    known = {
        "judge",
        "ratio",
        "whole",
        "none",
        "binary-cut",
        "step-entropy",
        "fixed-prefix-matched",
    }
    known |= {"post-think", "first-correct", "no-verify", "mix-long-short"}
    assert {method.cut for method in METHODS.values()} == known


def test_keys_of_step_entropy_rerun_its_cut_and_no_other(tmp_path: Path) -> None:
    """The keys that a stage depends on, by method, as the manifest has them."""
    problems = [Problem(id="a", question="q", answer="54", trace=WANDERING)]
    for method, reruns in (("no-verify", False), ("step-entropy", True)):
        keys = []
        for drop_ratio in (0.5, 0.8):
            raw = {"method": method, "baseline": {"drop_ratio": drop_ratio}}
            config = configs.resolve(raw, "test")
            keys.append(_depends_on(config, METHODS[method], []))
        assert (keys[0] != keys[1]) == reruns, method
    rows = run_truncate(tmp_path, problems, method="no-verify", baseline={"drop_ratio": 0.5})
    again = run_truncate(tmp_path, problems, method="no-verify", baseline={"drop_ratio": 0.8})
    assert rows == again and not list(tmp_path.glob("stale/*prefixes*"))


def test_a_trace_that_does_not_fit_the_memory_is_rejected_by_name() -> None:
    def fail(row: PrefixRow) -> PrefixRow:
        raise MemoryError("no room")

    row = within_memory(fail, whole(WANDERING))
    assert (row.rejected, row.detail) == ("out of memory", "no room")
