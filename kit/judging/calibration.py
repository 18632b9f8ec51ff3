"""A judge's threshold chosen from the data, and the signs of a judge that cannot tell one prefix from another.

The paper takes the student's word as it is; weak students then keep one sentence, or everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from kit.core.errors import KitError
from kit.core.records import PrefixRow

if TYPE_CHECKING:
    from kit.judging.judge import Judge


def share_threshold(judge: Judge, rows: Sequence[PrefixRow]) -> float:
    """The largest threshold under which `judge.share` of the whole traces are sufficient; one prefill a trace.

    Raises:
        KitError: the judge gives labels without margins, or no trace fits its context.
    """
    margins = []
    for row in rows if not judge.generates else ():
        probe, session = judge.probe(row, row.trace), judge.backend.session()
        if row.trace.strip() and len(probe.ids) <= judge.limit_tokens:
            margins.append(judge.margin(session.score([probe])[0]))
        session.close()
    if not margins:
        why = "its verdicts have no margins" if judge.generates else "no trace fits its context"
        raise KitError(
            f"judge.calibration=share has nothing to go by: {why}.", "Set judge.calibration=none."
        )
    return sorted(margins, reverse=True)[ceil(judge.keys.share * len(margins)) - 1]
