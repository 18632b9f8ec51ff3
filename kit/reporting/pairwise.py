"""Reasoning quality: a judge model compares two runs' reasoning on the same questions (section 4).

Paper: a GLM judge. Here: any backend. Each pair is shown in both orders, and only a preference that
stays when the order changes is a win. Verdicts are read from the labels' log-probabilities; whether
an answer is correct is not judged.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from kit.backends.base import Backend
from kit.core.config import Prompts
from kit.core.records import EvalRow
from kit.grading.opinions import opinion
from kit.grading.stats import sign_test
from kit.prompts import text_of

LABELS = "ABT"  # the first shown is better, the second, neither
# By the labels of both orders; else ties.
WINNERS: dict[tuple[str, ...], str] = {
    ("A", "B"): "first",
    ("B", "A"): "second",
    ("A", "A"): "flips",
    ("B", "B"): "flips",
}


@dataclass(frozen=True)
class JudgedPair:
    """One problem's two answers, judged in both orders."""

    id: str
    winner: str  # first, second, ties or flips (the winner changed with the order)
    verdicts: tuple[str, ...]  # a label for each order
    margins: list[float]  # nats between the best label and the next


@dataclass(frozen=True)
class ReasoningTest:
    """Two runs' reasoning, compared pair by pair."""

    judge: str
    pairs: int  # judged
    first: int  # pairs that the first run wins in both orders
    second: int
    ties: int
    flips: int
    first_shown_ratio: float  # of the preferences; 0.5: no position bias
    position_p_value: float
    p_value: float  # exact sign test of the wins
    too_long: list[str]  # ids of pairs that do not fit into the judge's context
    rows: list[JudgedPair]


def compare_reasoning(
    backend: Backend, prompts: Prompts, first: Sequence[EvalRow], second: Sequence[EvalRow]
) -> ReasoningTest:
    """Judge the first samples of two runs' eval rows on the problems that both answered.

    Raises:
        KitError: the judge's tokenizer begins several labels with the same token.
    """
    # Ask about every problem that both runs answered, in both orders.
    others = {(row.id, row.question): row.samples[0].text for row in second if row.samples}
    template = text_of(prompts, "compare")
    rows = []
    too_long = []
    for row in first:
        theirs = others.get((row.id, row.question))
        if not row.samples or theirs is None:
            continue
        pair = (row.samples[0].text, theirs)
        result = opinion(backend, LABELS, template, row.question, pair)
        if result is None:
            too_long.append(row.id)
            continue
        winner = WINNERS.get(result.labels, "ties")
        rows.append(JudgedPair(row.id, winner, result.labels, result.margins))

    # A judge without a position bias prefers the first shown in half of its preferences.
    winners = Counter(row.winner for row in rows)
    shown = Counter(chain.from_iterable(row.verdicts for row in rows))  # labels of both orders
    preferences = shown["A"] + shown["B"]
    return ReasoningTest(
        judge=backend.name,
        pairs=len(rows),
        first=winners["first"],
        second=winners["second"],
        ties=winners["ties"],
        flips=winners["flips"],
        first_shown_ratio=shown["A"] / preferences if preferences else 0.5,
        position_p_value=sign_test(shown["A"], shown["B"]),
        p_value=sign_test(winners["first"], winners["second"]),
        too_long=too_long,
        rows=rows,
    )
