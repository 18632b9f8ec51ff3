"""Reasoning quality: a judge model compares two runs' reasoning on the same questions (section 4, last experiment).

Paper: a GLM judge. Here: any backend. Each pair is shown in both orders, and only a preference that survives the
exchange is a win. Verdicts are read from the labels' probabilities; whether an answer is right is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from kit.backends.base import Backend, ScoreRequest
from kit.core.config import Prompts
from kit.core.errors import KitError
from kit.core.records import EvalRow
from kit.grading.stats import sign_test
from kit.prompts import fill, render, text_of

LABELS = "ABT"  # the first shown is better, the second, neither
WINNERS = {
    "AB": "first",
    "BA": "second",
    "AA": "flips",
    "BB": "flips",
}  # by both orders' verdicts; else a tie


def compare_reasoning(
    backend: Backend, prompts: Prompts, first: Sequence[EvalRow], second: Sequence[EvalRow]
) -> dict[str, Any]:
    """Judge the first samples of two runs' eval rows on the problems that both answered, in both orders.

    Returns:
        judge, pairs (judged), first and second (wins in both orders) with p_value (exact sign test), ties, flips (the
        winner changed with the order), first_shown_ratio (of the preferences; 0.5: no bias) with position_p_value,
        too_long (ids set aside), rows [{id, winner, verdicts: of both orders, margins: nats}].

    Raises:
        KitError: the judge's tokenizer does not tell the labels apart.
    """
    tokens = tuple(backend.tokenizer.encode(label, special=False)[0] for label in LABELS)
    if len(set(tokens)) < len(LABELS):
        raise KitError(
            f"{backend.name} begins {', '.join(LABELS)} with the same first token.",
            "Use another judge.",
        )
    template, rows, too_long = text_of(prompts, "compare"), [], []
    others = {(row.id, row.question): row.samples[0].text for row in second if row.samples}
    for row in first:
        if not row.samples or (other := others.get((row.id, row.question))) is None:
            continue
        orders = (row.samples[0].text, other), (other, row.samples[0].text)
        texts = [
            fill(template, question=row.question, first=one, second=two) for one, two in orders
        ]
        shown = [render(backend.tokenizer, text) for text in texts]
        if max(map(len, shown)) >= backend.context_tokens:
            too_long.append(row.id)
            continue
        with closing(backend.session()) as session:
            reads = [
                session.score([ScoreRequest(ids, ((len(ids) - 1, tokens),))])[0][0] for ids in shown
            ]
        verdicts = "".join(LABELS[scores.index(max(scores))] for scores in reads)
        margins = [round(best - next, 4) for next, best in (sorted(scores)[1:] for scores in reads)]
        winner = WINNERS.get(verdicts, "ties")
        rows.append({"id": row.id, "winner": winner, "verdicts": [*verdicts], "margins": margins})
    wins = {
        name: sum(row["winner"] == name for row in rows)
        for name in ("first", "second", "ties", "flips")
    }
    ahead, behind = (sum(row["verdicts"].count(label) for row in rows) for label in "AB")
    found = {"first_shown_ratio": ahead / (ahead + behind) if ahead + behind else 0.5}
    found |= {
        "position_p_value": sign_test(ahead, behind),
        "p_value": sign_test(wins["first"], wins["second"]),
    }
    return {
        "judge": backend.name,
        "pairs": len(rows),
        **wins,
        **found,
        "too_long": too_long,
        "rows": rows,
    }
