"""What graded rows say of a model: accuracy over problems with its interval, pass@k, limits hit, loops.

Every problem weighs the same, however many samples it has.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from kit.backends.base import looping
from kit.core.records import EvalRow, Sample
from kit.grading import stats


def accuracy_by_problem(rows: Iterable[EvalRow]) -> dict[tuple[str, str], float]:
    """Share of right samples of each problem (id, question), over its rows; 0 where it has no samples."""
    found = defaultdict(list)
    for row in rows:
        found[row.id, row.question].append(
            sum(s.verdict == "correct" for s in row.samples) / max(len(row.samples), 1)
        )
    return {problem: mean(values) for problem, values in found.items()}


def accuracy(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """{n (problems), accuracy, ci_low, ci_high}: every problem weighs the same, however many rows and samples it has."""
    means = list(accuracy_by_problem(rows).values())
    samples = sum(len(row.samples) or 1 for row in rows) / max(len(means), 1)
    low, high = (round(float(end), 4) for end in stats.interval(means, samples))
    return {"n": len(means), "accuracy": _mean(means), "ci_low": low, "ci_high": high}


def score(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """What rows say about a model.

    Returns:
        n, accuracy, ci_low and ci_high; samples, rejected (problems without samples), pass_at {k: ratio}, verdicts
        {verdict: samples}; of the samples: truncated_ratio, loop_ratio, mean_tokens, and accuracy_completed of those that
        ended by themselves (None: none did); by_level and by_subject {name: {n, accuracy, ci_low, ci_high}}.
    """
    samples = [sample for row in rows for sample in row.samples]
    completed = [
        sample.verdict == "correct" for sample in samples if sample.finish_reason == "stop"
    ]
    most = max((len(row.samples) for row in rows), default=0)
    counts = [
        (sum(s.verdict == "correct" for s in row.samples), len(row.samples) or most) for row in rows
    ]
    found = accuracy(rows) | {
        "samples": len(samples),
        "rejected": sum(not row.samples for row in rows),
        "pass_at": {str(k): round(ratio, 4) for k, ratio in stats.pass_at(counts).items()},
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
        "truncated_ratio": _mean([sample.finish_reason == "length" for sample in samples]),
        "loop_ratio": _mean([loops(sample) for sample in samples]),
        "mean_tokens": _mean([sample.tokens for sample in samples]),
        "accuracy_completed": _mean(completed) if completed else None,
    }
    for field in ("level", "subject"):
        groups = defaultdict(list)
        for row in rows:
            groups[getattr(row, field)].append(row)
        found[f"by_{field}"] = {name: accuracy(groups[name]) for name in sorted({*groups} - {None})}
    return found


def compare_rows(a: Iterable[EvalRow], b: Iterable[EvalRow]) -> dict[str, Any]:
    """b against a on the problems that both answered: `stats.compare`, or {n: 0} without any."""
    first, second = accuracy_by_problem(a), accuracy_by_problem(b)
    both = sorted(first.keys() & second.keys())
    return stats.compare(
        [first[problem] for problem in both], [second[problem] for problem in both]
    )


def loops(sample: Sample) -> bool:
    """Whether a sample was ended as a loop, or ran to the limit repeating itself."""
    words = (
        re.findall(r"\w+|[^\w\s]", sample.text[-20000:])[:-1]
        if sample.finish_reason == "length"
        else []
    )
    return sample.finish_reason == "loop" or looping(words)  # type: ignore[arg-type]  # any tokens that compare do


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
