"""Reasoning quality: a judge model compares two runs' reasoning on the same questions (section 4, last experiment).

Paper: a GLM judge, its prompt in the released code. Here: any backend, our own words. Each pair is shown in both
orders, and only a preference that survives the exchange is a win; how often the place decided is reported.
The verdict is read from the labels' probabilities, so it costs no generation. Right or wrong is not judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kit.backends import Backend, Probe
from kit.config import Prompts
from kit.errors import KitError
from kit.prompts import fill, render, text_of
from kit.records import EvalRow
from kit.stats import sign_test

LABELS = ("A", "B", "T")  # the first shown, the second shown, neither


@dataclass(frozen=True)
class Pair:
    """Two runs' reasoning on one question."""

    id: str
    question: str
    first: str
    second: str


def pairs_of(first: Sequence[EvalRow], second: Sequence[EvalRow]) -> list[Pair]:
    """The first samples of two runs' eval rows on the problems that both answered."""
    others = {row.id: row.samples[0].text for row in second if row.samples}
    return [Pair(r.id, r.question, r.samples[0].text, others[r.id]) for r in first if r.samples and r.id in others]


def compare_reasoning(backend: Backend, prompts: Prompts, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Judge pairs in both orders.

    Returns:
        pairs (judged), first and second (wins in both orders), ties, flips (pairs whose winner changed with the
        order), too_long (set aside), first_shown_ratio: how often the one shown first was preferred among preferences
        (0.5: no position bias) with position_p_value, p_value of first against second (exact sign test), and rows
        [{id, winner, verdicts: [label in the given order, label in the exchanged one], margins}], margins in nats
        between the label and the next likely one.

    Raises:
        KitError: the model's tokenizer does not tell the labels apart.
    """
    tokens = [backend.tokenizer.encode(label, special=False)[0] for label in LABELS]
    if len(set(tokens)) < len(LABELS):
        raise KitError(f"{backend.name} writes {', '.join(LABELS)} with the same first token.", "Use another judge.")
    rows, too_long = [], []
    for pair in pairs:
        orders = [(pair.first, pair.second), (pair.second, pair.first)]
        shown = [_prompt(backend, prompts, pair.question, *order) for order in orders]
        if max(map(len, shown)) >= backend.context_tokens:
            too_long.append(pair.id)
            continue
        session = backend.session()
        try:
            reads = [session.read([Probe(ids, ((len(ids) - 1, tuple(tokens)),))])[0][0] for ids in shown]
        finally:
            session.close()
        verdicts = [LABELS[scores.index(max(scores))] for scores in reads]
        margins = [round(a - b, 4) for a, b in (sorted(scores, reverse=True)[:2] for scores in reads)]
        rows.append({"id": pair.id, "winner": _winner(*verdicts), "verdicts": verdicts, "margins": margins})
    count = {name: sum(row["winner"] == name for row in rows) for name in ("first", "second", "tie", "flip")}
    shown_first, shown_second = (sum(row["verdicts"].count(label) for row in rows) for label in "AB")
    return {
        "judge": backend.name,
        "pairs": len(rows),
        "first": count["first"],
        "second": count["second"],
        "ties": count["tie"],
        "flips": count["flip"],
        "too_long": too_long,
        "first_shown_ratio": shown_first / (shown_first + shown_second) if shown_first + shown_second else 0.5,
        "position_p_value": sign_test(shown_first, shown_second),
        "p_value": sign_test(count["first"], count["second"]),
        "rows": rows,
    }


def _prompt(backend: Backend, prompts: Prompts, question: str, first: str, second: str) -> tuple[int, ...]:
    text = fill(text_of(prompts, "compare"), question=question, first=first, second=second)
    return render(backend.tokenizer, text)


def _winner(given: str, exchanged: str) -> str:
    """The run that both orders prefer; flip: the place decided; tie: a tie in either order."""
    if "T" in (given, exchanged):
        return "tie"
    return "flip" if given == exchanged else "first" if given == "A" else "second"
