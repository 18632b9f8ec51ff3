"""A judge's threshold, chosen from the data (extends section 3.2 of the paper).

Paper: the student's verdict is taken as is. Here: the threshold may be moved, because weak students
otherwise keep one sentence, or the whole trace. The other calibration, content-free, is an offset
per trace in `judge.TraceJudge`. Signs of a degenerate judge are in kit/reporting/metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from math import ceil
from typing import TYPE_CHECKING

from kit.core.errors import KitError
from kit.core.records import PrefixRow

if TYPE_CHECKING:
    from kit.judging.judge import Judge


def share_threshold(judge: Judge, rows: Sequence[PrefixRow]) -> float:
    """Find the largest threshold under which a share of the whole traces are sufficient.

    Each trace costs one prefill.

    Args:
        judge: `judge.share` of its config is the share, in (0, 1]; it is not changed.
        rows: whole traces; empty ones and those longer than the judge reads do not count.

    Returns:
        The threshold, in the unit of the judge's margins.

    Raises:
        KitError: the judge's verdicts have no margins, or no trace fits its context.
    """
    margins = []
    for row in rows:
        request = judge.request(row, row.trace)
        # a generated verdict has nothing to read, and so no margin
        if request.reads and row.trace.strip() and len(request.ids) <= judge.limit_tokens:
            with closing(judge.backend.session()) as session:
                [logprobs] = session.score([request])
            margins.append(judge.margin(logprobs))
    if not margins:
        raise KitError(
            "judge.calibration=share cannot choose a threshold: the verdicts have no margins, "
            "or no trace fits the judge's context.",
            "Set judge.calibration=none.",
        )
    margins.sort(reverse=True)
    return margins[ceil(judge.settings.share * len(margins)) - 1]
