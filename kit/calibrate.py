"""A judge's threshold chosen from the data, and the signs of a judge that cannot tell one prefix from another.

The paper takes the student's word as it is; weak students then keep one sentence, or everything. Nothing
here asks for a single trace's cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kit.errors import KitError
from kit.records import PrefixRow

if TYPE_CHECKING:
    from kit.judge import Judge

NEARLY_ALL = 0.9
FEW = 4  # traces below which nothing is said of a judge


def share_threshold(judge: Judge, rows: Sequence[PrefixRow], share: float) -> float:
    """The largest threshold under which this share of whole traces is sufficient; one prefill a trace.

    Raises:
        KitError: the judge gives labels without margins, or no trace fits its context.
    """
    margins = []
    for row in rows if not judge.generates else ():
        session = judge.backend.session()
        probe = judge.probe(row, row.trace)
        if row.trace.strip() and len(probe.ids) <= judge.limit_tokens:
            margins.append(judge.margin(session.read([probe])[0]))
        session.close()
    if not margins:
        why = "its verdicts have no margins" if judge.generates else "no trace fits its context"
        raise KitError(f"judge.calibration=share has nothing to go by: {why}.", "Set judge.calibration=none.")
    margins.sort(reverse=True)
    return margins[max(0, -int(-share * len(margins) // 1) - 1)]


def degenerate(rows: Sequence[PrefixRow]) -> str | None:
    """Whether a judge is degenerate, in words with the evidence and what to try; None: no sign of it."""
    judged = [row for row in rows if row.verdicts and row.sentences_total >= 4]
    if len(judged) < FEW:
        return None
    labels = Counter(verdict.label for row in judged for verdict in row.verdicts)
    label, most = labels.most_common(1)[0]
    signs = []
    for count, what in (
        (sum(row.sentences == 1 for row in judged), "were cut to one sentence"),
        (sum(row.sentences == row.sentences_total for row in judged), "were kept whole"),
    ):
        if count >= NEARLY_ALL * len(judged):
            signs.append(f"{count} of {len(judged)} traces {what}")
    if most >= NEARLY_ALL * labels.total() and signs:
        signs.append(f"{most} of {labels.total()} verdicts are {label}")
    margins = sorted(v.margin for row in judged for v in row.verdicts if v.margin is not None)
    if not signs:
        return None
    between = f", margins from {margins[0]:+.2f} to {margins[-1]:+.2f}" if margins else ""
    return (
        f"The judge hardly tells one prefix from another: {'; '.join(signs)}{between}. "
        "Try judge.kind=answer, judge.calibration=content-free or share, or a stronger student."
    )
