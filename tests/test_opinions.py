"""kit.grading.opinions: free text graded by a judge model, asked in both orders."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from kit.backends.scripted import ByteTokenizer, ScriptedBackend, ScriptedSession
from kit.core.config import Config, ModelConfig, Prompts, resolve
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.run import Run
from kit.grading.answers import Grader, Item
from kit.grading.opinions import AnswerJudge, opinion
from kit.pipeline import evaluate

SCRIPTED = ModelConfig(backend="scripted", model="none")
QUESTION = "What kind of animal is a whale?"


class RuleSession(ScriptedSession):
    """Says Yes or No by a rule on the two answers, or nothing of both."""

    def __init__(self, rule: Any) -> None:
        super().__init__(0.0)
        self.rule = rule

    def score(self, requests: Any) -> Any:
        results = []
        for request in requests:
            text = ByteTokenizer().decode(request.ids)
            assert f"Question:\n{QUESTION}\n" in text
            first, second = text.split("One answer:\n")[1].split("\n\nThe other answer:\n")
            says = self.rule(first.strip(), second.strip())
            results.append([[says.get(chr(token), -9.0) for token in request.reads[0][1]]])
        return results


class RuleBackend(ScriptedBackend):
    def __init__(self, rule: Any, context_tokens: int | None = None) -> None:
        super().__init__(SCRIPTED.model_copy(update={"context_tokens": context_tokens}))
        self.rule = rule
        self.is_closed = False

    def session(self, uncached: bool = False) -> ScriptedSession:
        return RuleSession(self.rule)

    def close(self) -> None:
        self.is_closed = True


def says(label: str) -> dict[str, float]:
    return {label: -0.1}


def by_words(first: str, second: str) -> dict[str, float]:
    """A good judge: one answer holds the other's last word."""
    return says("Y" if first.split()[-1] in second or second.split()[-1] in first else "N")


def grader(rule: Any, context_tokens: int | None = None) -> Grader:
    judge = AnswerJudge(SCRIPTED, Prompts())
    vars(judge)["backend"] = RuleBackend(rule, context_tokens)
    return Grader(judge=judge)


def grade(rule: Any, answer: str, gold: str = "a mammal", **kwargs: Any) -> tuple[str, str]:
    with grader(rule, **kwargs) as ours:
        [result] = ours.grade([Item(gold, f"So \\boxed{{{answer}}}.", "judge", QUESTION)])
    assert result.answer == answer
    return result.verdict, result.how


def test_an_answer_in_other_words_is_correct_where_the_judge_says_so_in_both_orders() -> None:
    assert grade(by_words, "some mammal") == ("correct", "boxed:judge")
    assert grade(by_words, "a fish") == ("wrong", "boxed:judge")


def test_the_judges_word_counts_even_against_an_exact_match() -> None:
    """Its agreement with exact match is a finding, so exact match must not decide for it."""
    assert grade(lambda first, second: says("N"), "a mammal") == ("wrong", "boxed:judge")


def test_a_verdict_that_changes_with_the_order_is_none() -> None:
    def prefers_a_place(first: str, second: str) -> dict[str, float]:
        return says("Y" if first == "a mammal" else "N")

    assert grade(prefers_a_place, "a fish") == ("undecided", "boxed:flips")


@pytest.mark.parametrize("silence", [{}, {"Y": math.nan, "N": math.nan}, {"Y": -5.0, "N": -6.0}])
def test_a_judge_that_answers_neither_label_decides_nothing(silence: dict[str, float]) -> None:
    assert grade(lambda first, second: silence, "a mammal") == ("undecided", "boxed:silent")


@pytest.mark.parametrize("silence", [{}, {"Y": math.nan, "N": math.nan}])
@pytest.mark.parametrize("silent_first", ["a mammal", "a fish"])
def test_one_silent_order_is_enough_to_decide_nothing(
    silence: dict[str, float], silent_first: str
) -> None:
    def half(first: str, second: str) -> dict[str, float]:
        return silence if first == silent_first else says("Y")

    assert grade(half, "a fish") == ("undecided", "boxed:silent")


def test_a_pair_that_does_not_fit_is_named() -> None:
    assert grade(by_words, "x" * 500, context_tokens=600) == ("undecided", "boxed:too long")


def test_a_text_without_an_answer_is_unparsed_and_asks_nobody() -> None:
    def refuses(first: str, second: str) -> dict[str, float]:
        raise AssertionError("asked")

    with grader(refuses) as ours:
        [result] = ours.grade([Item("a mammal", "It swims.", "judge", QUESTION)])
    assert (result.verdict, result.how) == ("unparsed", "none")


def test_equal_answers_to_different_questions_are_asked_apart() -> None:
    asked = []

    class Backend(RuleBackend):
        def session(self, uncached: bool = False) -> Any:
            session = super().session()
            session.score = lambda requests: asked.append(requests) or [[[-0.1, -3.0]]]
            return session

    judge = AnswerJudge(SCRIPTED, Prompts())
    vars(judge)["backend"] = Backend(by_words)
    with Grader(judge=judge) as ours:
        items = [Item("a", "\\boxed{b}", "judge", question) for question in ("1?", "2?", "1?")]
        assert [result.verdict for result in ours.grade(items)] == ["correct"] * 3
    assert len(asked) == 4, "two questions in two orders each"


def test_the_model_opens_at_the_first_question_and_closes_with_the_grader() -> None:
    with Grader(judge=AnswerJudge(SCRIPTED, Prompts())) as unused:
        unused.grade([Item("1", "\\boxed{1}")])
        assert "backend" not in vars(unused._judge)
    ours = grader(by_words)
    with ours:
        backend = ours._judge.backend
    assert backend.is_closed


def test_several_threads_ask_one_after_the_other() -> None:
    inside = []

    def alone(first: str, second: str) -> dict[str, float]:
        inside.append(1)
        assert len(inside) == 1
        threading.Event().wait(0.005)
        inside.pop()
        return says("Y")

    failures = []

    def work(ours: Grader, number: int) -> None:
        item = Item("gold", f"\\boxed{{{number}}}", "judge", QUESTION)
        failures.extend(result.verdict for result in ours.grade([item]))

    with grader(alone) as ours:
        threads = [threading.Thread(target=work, args=(ours, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == ["correct"] * 6


def test_without_a_model_the_verifier_is_refused() -> None:
    with Grader() as ours, pytest.raises(KitError, match="asks a model"):
        ours.grade([Item("a", "\\boxed{a}", "judge", QUESTION)])


def test_the_probability_is_that_of_all_labels_in_each_order() -> None:
    def uneven(first: str, second: str) -> dict[str, float]:
        return {"Y": math.log(0.5), "N": math.log(0.25)} if first == "x" else says("Y")

    template = "Question:\n{question}\n\nOne answer:\n{first}\n\nThe other answer:\n{second}"
    result = opinion(RuleBackend(uneven), ("Yes", "No"), template, QUESTION, ("x", "y"))
    assert result.labels == ("Yes", "Yes") and len(result.margins) == 2
    assert result.probabilities == pytest.approx([0.75, math.exp(-0.1) + math.exp(-9)])


def config_of(tmp_path: Path, **keys: Any) -> Config:
    """A run on free text, scripted."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": f"Q{n}?", "answer": f"a{n}", "solution": f"\\boxed{{a{n}}}"} for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({row["question"]: row["answer"] for row in rows}))
    model = {"backend": "scripted", "model": str(answers)}
    return resolve(
        {
            "out": str(tmp_path / "run"),
            "method": "zero-shot",
            "data": {"train": {"limit": 2}, "eval": {"path": str(path), "verifier": "judge"}},
            "student": model,
            "answer_judge": {"backend": "scripted", "model": "none"},
            **keys,
        },
        "test",
    )


def run_eval(config: Config) -> dict[str, Any]:
    with Run(config, Progress(quiet=True)) as run:
        evaluate.evaluate(run)
        return run.manifest["stages"]["eval"]


def test_an_evaluation_says_how_often_its_judge_agrees_with_exact_match(tmp_path: Path) -> None:
    entry = run_eval(config_of(tmp_path))
    [score] = entry["summary"]["scores"]
    agreement = score["judge_agreement"]
    unread = score["verdicts"].get("unparsed", 0)
    assert agreement["of"] + agreement["undecided"] + unread == score["samples"] == 6
    assert 0 <= agreement["agree"] <= agreement["of"]


def test_another_judge_or_other_words_evaluate_again(tmp_path: Path) -> None:
    log = tmp_path / "run" / "run.log"
    run_eval(config_of(tmp_path))
    run_eval(config_of(tmp_path))
    assert log.read_text().count("eval: already done, skipped") == 1
    words = "{question} {first} {second} Yes or No?"
    for change in (
        {"answer_judge": {"backend": "scripted", "model": "other"}},
        {"prompts": {"grade": words}},
    ):
        run_eval(config_of(tmp_path))
        before = log.read_text().count("rerunning eval")
        run_eval(config_of(tmp_path, **change))
        assert log.read_text().count("rerunning eval") == before + 1
