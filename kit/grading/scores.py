"""What graded rows say about a model: accuracy with its interval, pass@k, truncated answers, loops.

Every problem weighs the same, however many samples it has. Nothing is graded here (section 4).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

import numpy as np

from kit import Json
from kit.backends.base import looping
from kit.core.records import EvalRow, Sample
from kit.grading import stats
from kit.grading.answers import gold_of, same_words

LOOP_CHARACTERS = 20000  # the end of a text in which a loop is looked for


@dataclass(frozen=True)
class Accuracy:
    """Mean over problems of each one's ratio of correct samples, with its 95% interval."""

    n: int  # problems
    accuracy: float
    ci_low: float
    ci_high: float
    posterior_mean: float  # under a uniform prior, with its 95% credible interval
    posterior_low: float
    posterior_high: float


@dataclass(frozen=True)
class Score(Accuracy):
    """What a model's rows on one dataset show; ratios are of the samples."""

    samples: int
    rejected: int  # problems without samples
    pass_at: dict[str, float]  # by k
    verdicts: dict[str, int]  # samples by verdict
    truncated_ratio: float  # cut off at the limit of tokens
    truncated_correct_ratio: float  # cut off, and correct all the same
    loop_ratio: float
    mean_tokens: float
    completed: int  # samples that ended by themselves
    accuracy_completed: float | None  # of these; None: there are none
    as_published: Json | None  # accuracy and pass_at by the paper's grader, if asked
    # {agree, of, undecided}: verdicts of a judge model beside exact match; None: it was not asked
    judge_agreement: dict[str, int] | None
    by_level: dict[str, Accuracy]
    by_subject: dict[str, Accuracy]


def accuracy_by_problem(
    rows: Iterable[EvalRow], max_tokens: float = inf
) -> dict[tuple[str, str], float]:
    """Each problem's (id, question) ratio of correct samples over its rows; 0 without samples.

    Args:
        max_tokens: longer samples count as not correct.
    """
    ratios = defaultdict(list)
    for row in rows:
        short = [sample for sample in row.samples if sample.tokens <= max_tokens]
        ratios[row.id, row.question].append(_correct(short) / max(len(row.samples), 1))
    return {problem: fmean(values) for problem, values in ratios.items()}


def accuracy(rows: Sequence[EvalRow]) -> Accuracy:
    """The accuracy over all problems of `rows`, and its interval."""
    ratios = list(accuracy_by_problem(rows).values())
    samples = sum(len(row.samples) or 1 for row in rows) / max(len(ratios), 1)
    bounds = [*stats.interval(ratios, samples), *stats.posterior(ratios, samples)]
    return Accuracy(len(ratios), _mean(ratios), *np.round(bounds, 4).tolist())


def score(rows: Sequence[EvalRow]) -> Score:
    """Everything that is reported about a model's rows on one dataset."""
    samples = [sample for row in rows for sample in row.samples]
    completed = [sample for sample in samples if sample.finish_reason == "stop"]
    return Score(
        **vars(accuracy(rows)),
        samples=len(samples),
        rejected=sum(not row.samples for row in rows),
        pass_at=_pass_at(rows),
        verdicts=dict(Counter(sample.verdict for sample in samples)),
        truncated_ratio=_mean(sample.finish_reason == "length" for sample in samples),
        truncated_correct_ratio=_mean(
            sample.finish_reason == "length" and sample.verdict == "correct" for sample in samples
        ),
        loop_ratio=_mean(map(loops, samples)),
        mean_tokens=_mean(sample.tokens for sample in samples),
        completed=len(completed),
        accuracy_completed=round(_correct(completed) / len(completed), 4) if completed else None,
        as_published=_as_published(rows),
        judge_agreement=_judge_agreement(rows),
        by_level=_accuracy_by(rows, "level"),
        by_subject=_accuracy_by(rows, "subject"),
    )


def compare_rows(
    a: Iterable[EvalRow], b: Iterable[EvalRow], max_tokens: float = inf
) -> stats.PairedTest | None:
    """b against a on the problems that both answered; None without any.

    Args:
        max_tokens: longer samples count as not correct.
    """
    first = accuracy_by_problem(a, max_tokens)
    second = accuracy_by_problem(b, max_tokens)
    shared = sorted(first.keys() & second.keys())
    return stats.compare([first[key] for key in shared], [second[key] for key in shared])


def loops(sample: Sample) -> bool:
    """Whether a sample was stopped as a loop, or ran to the limit repeating itself."""
    if sample.finish_reason == "loop":
        return True
    # Words and signs, so that text without spaces repeats too.
    words = re.findall(r"\w+|[^\w\s]", sample.text[-LOOP_CHARACTERS:])
    # The last word may be cut off in its middle, and would hide the loop.
    return sample.finish_reason == "length" and looping(words[:-1])


def _accuracy_by(rows: Sequence[EvalRow], field: str) -> dict[str, Accuracy]:
    """Accuracy of each level or subject; rows without one are left out."""
    groups = defaultdict(list)
    for row in rows:
        name = getattr(row, field)
        if name is not None:
            groups[name].append(row)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def _pass_at(rows: Sequence[EvalRow]) -> dict[str, float]:
    """pass@k by k; a problem without samples counts as one whose samples are all wrong."""
    # A rejected problem has as many wrong samples as the others have samples.
    most = max((len(row.samples) for row in rows), default=0)
    counts = [(_correct(row.samples), len(row.samples) or most) for row in rows]
    return {str(k): round(ratio, 4) for k, ratio in stats.pass_at(counts).items()}


def _judge_agreement(rows: Sequence[EvalRow]) -> dict[str, int] | None:
    """How often a judge model's verdict is that of exact match, of those that it decided."""
    judged = [row for row in rows if row.verifier == "judge"]
    if not judged:
        return None
    counts = {"agree": 0, "of": 0, "undecided": 0}
    for row in judged:
        for sample in row.samples:
            if sample.verdict == "undecided":
                counts["undecided"] += 1
            elif sample.answer:
                is_same = same_words(gold_of(row.answer), sample.answer)
                counts["agree"] += is_same == (sample.verdict == "correct")
                counts["of"] += 1
    return counts


def _as_published(rows: Sequence[EvalRow]) -> Json | None:
    """The same answers by the paper's grader; None where it was not asked."""
    if not any(row.published for row in rows):
        return None
    regraded = []
    for row in rows:
        samples = []
        for sample, accepted in zip(row.samples, row.published, strict=True):
            verdict = "correct" if accepted else "wrong"
            samples.append(sample.model_copy(update={"verdict": verdict}))
        regraded.append(row.model_copy(update={"samples": tuple(samples)}))
    return {"accuracy": accuracy(regraded).accuracy, "pass_at": _pass_at(regraded)}


def _correct(samples: Sequence[Sample]) -> int:
    return sum(sample.verdict == "correct" for sample in samples)


def _mean(values: Iterable[float]) -> float:
    return round(fmean([*values] or [0]), 4)
