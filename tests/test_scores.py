"""What graded rows say about a model: `score`, `compare_rows`, and which samples are loops."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from kit.core.records import EvalRow, Sample
from kit.grading.scores import accuracy, accuracy_by_problem, compare_rows, loops, score


def row_of(
    id: str,
    verdicts: list[str],
    finish_reason: str = "stop",
    tokens: int = 10,
    **fields: Any,
) -> EvalRow:
    samples = []
    for verdict in verdicts:
        sample = Sample(text="x", verdict=verdict, finish_reason=finish_reason, tokens=tokens)
        samples.append(sample)
    return EvalRow(id=id, question="q", answer="1", samples=tuple(samples), **fields)


def test_every_part_of_a_score_is_what_the_rows_say() -> None:
    rows = [
        row_of("a", ["correct", "wrong"], level="1", subject="x"),
        row_of("b", ["correct", "correct"], level="1", tokens=30),
        row_of("c", ["unparsed", "timeout"], finish_reason="length", level="2"),
        row_of("d", [], rejected="generation failed"),
    ]
    result = score(rows)
    assert (result.n, result.samples, result.rejected) == (4, 6, 1)
    assert result.accuracy == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert result.pass_at == {"1": 0.375, "2": 0.5}
    assert result.verdicts == {"correct": 3, "wrong": 1, "unparsed": 1, "timeout": 1}
    assert result.truncated_ratio == pytest.approx(1 / 3, abs=1e-4) and result.loop_ratio == 0
    assert result.mean_tokens == pytest.approx(100 / 6, abs=1e-3)
    assert result.accuracy_completed == 0.75 and result.truncated_correct_ratio == 0
    by_level = {name: group.accuracy for name, group in result.by_level.items()}
    assert by_level == {"1": 0.75, "2": 0.0}
    assert list(result.by_subject) == ["x"] and result.by_subject["x"].n == 1
    assert json.loads(json.dumps(asdict(result))) == asdict(result)


def test_a_score_of_no_rows_has_no_problems_and_the_widest_interval() -> None:
    result = score([])
    assert (result.n, result.ci_low, result.ci_high) == (0, 0.0, 1.0)
    assert result.accuracy_completed is None


def test_every_problem_weighs_the_same_however_many_rows_it_has() -> None:
    rows = [row_of("a", ["correct"]), row_of("a", ["wrong"]), row_of("b", ["correct"])]
    assert accuracy_by_problem(rows) == {("a", "q"): 0.5, ("b", "q"): 1.0}
    assert accuracy(rows).accuracy == 0.75


def test_samples_longer_than_the_budget_count_as_not_correct() -> None:
    rows = [row_of("a", ["correct", "wrong"], tokens=10), row_of("b", ["correct"], tokens=40)]
    assert accuracy_by_problem(rows, max_tokens=9) == {("a", "q"): 0, ("b", "q"): 0}
    assert accuracy_by_problem(rows, max_tokens=10) == {("a", "q"): 0.5, ("b", "q"): 0}


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [
        ("so 3/24" + "=3/24" * 40, "length", True),  # no spaces to split at
        ("so 3/24" + "=3/24" * 40, "stop", False),
        (" ".join(map(str, range(500))), "length", False),
        ("x", "loop", True),
    ],
)
def test_a_loop_is_a_sample_that_was_stopped_while_it_repeated_itself(
    text: str, finish_reason: str, expected: bool
) -> None:
    assert loops(Sample(text=text, verdict="unparsed", finish_reason=finish_reason)) is expected


def test_models_are_compared_on_shared_problems_only() -> None:
    a = [row_of("1", ["correct"]), row_of("2", ["wrong"]), row_of("3", ["wrong"])]
    b = [row_of("3", ["correct"]), row_of("2", ["correct"]), row_of("9", ["correct"])]
    test = compare_rows(a, b)
    assert test is not None and test.difference == 1.0 and test.n == 2
    assert compare_rows(a, [row_of("7", ["correct"])]) is None


def test_the_papers_grader_is_a_second_figure_and_changes_no_verdict() -> None:
    rows = [
        row_of("a", ["correct", "unparsed"], published=(True, True)),
        row_of("b", ["wrong", "unparsed"], published=(False, True)),
    ]
    result = score(rows)
    assert result.accuracy == 0.25
    assert result.as_published == {"accuracy": 0.75, "pass_at": {"1": 0.75, "2": 1.0}}
    assert score([row_of("a", ["correct"])]).as_published is None


def test_a_judges_verdicts_are_held_against_exact_match() -> None:
    assert score([row_of("a", ["correct"])]).judge_agreement is None
    rows = []
    # the gold answer is "1": agree, agree, called wrong, called correct, not decided, not found
    for number, (answer, verdict) in enumerate(
        [
            (" 1 ", "correct"),
            ("2", "wrong"),
            ("1", "wrong"),
            ("one", "correct"),
            ("1", "undecided"),
            (None, "unparsed"),
        ]
    ):
        sample = Sample(text="x", verdict=verdict, answer=answer)
        rows.append(
            EvalRow(id=str(number), question="q", answer="1", verifier="judge", samples=(sample,))
        )
    result = score([*rows, row_of("exact", ["wrong"])])
    assert result.judge_agreement == {"agree": 2, "of": 4, "undecided": 1}
    # what nobody decided is not correct
    assert result.accuracy == pytest.approx(2 / 7, abs=1e-4)
