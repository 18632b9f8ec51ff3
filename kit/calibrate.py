"""A judge's threshold chosen from the data, and the signs of a judge that cannot tell one prefix from another.

The paper takes the student's word as it is; weak students then keep one sentence, or everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from kit.errors import KitError
from kit.records import PrefixRow

if TYPE_CHECKING:
    from kit.judge import Judge

NEARLY_ALL, FEW = 0.9, 4  # a share, and traces (or sentences of one) below which nothing is said of a judge


def share_threshold(judge: Judge, rows: Sequence[PrefixRow]) -> float:
    """The largest threshold under which `judge.share` of the whole traces are sufficient; one prefill a trace.

    Raises:
        KitError: the judge gives labels without margins, or no trace fits its context.
    """
    margins = []
    for row in rows if not judge.generates else ():
        probe, session = judge.probe(row, row.trace), judge.backend.session()
        if row.trace.strip() and len(probe.ids) <= judge.limit_tokens:
            margins.append(judge.margin(session.read([probe])[0]))
        session.close()
    if not margins:
        why = "its verdicts have no margins" if judge.generates else "no trace fits its context"
        raise KitError(f"judge.calibration=share has nothing to go by: {why}.", "Set judge.calibration=none.")
    return sorted(margins, reverse=True)[ceil(judge.keys.share * len(margins)) - 1]


def degenerate(rows: Sequence[PrefixRow]) -> str | None:
    """Whether a judge is degenerate, in words with the evidence and what to try; None: no sign of it."""
    judged = [row for row in rows if row.verdicts and row.sentences_total >= FEW]
    short = sum(row.sentences == 1 for row in judged)
    long = sum(row.sentences == row.sentences_total for row in judged)
    if len(judged) < FEW or max(short, long) < NEARLY_ALL * len(judged):
        return None
    labels = Counter(verdict.label for row in judged for verdict in row.verdicts)
    margins = [v.margin for row in judged for v in row.verdicts if v.margin is not None]
    [(label, most)] = labels.most_common(1)
    between = f", margins from {min(margins):+.2f} to {max(margins):+.2f}" if margins else ""
    return (
        f"The judge hardly tells one prefix from another: {max(short, long)} of {len(judged)} traces were "
        f"{'cut to one sentence' if short >= long else 'kept whole'}, {most} of {labels.total()} verdicts are {label}"
        f"{between}. Try judge.kind=answer, judge.calibration=content-free or share, or a stronger student."
    )
