"""A judge's threshold, chosen from the data (extends section 3.2 of the paper).

Paper: the student's verdict is taken as is. Here: the threshold may be moved, because weak students
otherwise keep one sentence, or the whole trace: to a share of sufficient traces, or to what a
validation measured (validate.py). The third calibration, content-free, is an offset per trace in
`judge.TraceJudge`. Signs of a degenerate judge are in kit/reporting/metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from math import ceil
from typing import TYPE_CHECKING

from kit.core.config import Calibration
from kit.core.errors import KitError
from kit.core.records import PrefixRow
from kit.models import fingerprints
from kit.prompts import template_hash, text_of

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


def setup_of(judge: Judge) -> dict[str, str]:
    """What margins depend on besides the trace: the model by content, the prompts, the template."""
    student = judge.config.student
    prompts = judge.config.prompts
    template = template_hash(judge.backend.tokenizer, prompts, student.system, student.thinking)
    return {
        "student.model": student.model,
        "student.dtype": student.dtype,
        "prompts.judge": text_of(prompts, "judge"),
        "prompts.answer_cue": text_of(prompts, "answer_cue"),
        "judge.labels": " ".join(judge.settings.labels),
        "chat template, prompts.instruction, student.system or student.thinking": template,
        **fingerprints("student", student),
    }


def calibrated_threshold(judge: Judge, calibration: Calibration) -> float:
    """The threshold that a calibration has for a judge.

    Raises:
        KitError: (exit 2) it was measured with another setup, or has no threshold for this judge.
    """
    setup = setup_of(judge)
    names = sorted({*setup, *calibration.setup})
    differing = [name for name in names if setup.get(name) != calibration.setup.get(name)]
    threshold = calibration.thresholds.get(judge.settings.kind)
    if judge.generates_verdicts or threshold is None:
        differing.append("judge: it has no threshold for judge.kind as it is here")
    if differing or threshold is None:
        raise KitError(
            f"The file of judge.calibration is for another {', another '.join(differing)}.",
            "Make one with this config (judge FILE --config CONFIG --validate), or set "
            "judge.calibration=none.",
            2,
        )
    return threshold
