"""A judge's threshold, as a validation measured it (extends section 3.2 of the paper).

Paper: the student's verdict is taken as is. Here: the threshold may be moved to where continuations
do succeed (kit/reporting/validate.py), because weak students otherwise keep one sentence, or the
whole trace. The other calibration, content-free, is an offset per trace in `trace.TraceJudge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.core.config import Calibration
from kit.core.errors import KitError
from kit.models import fingerprints
from kit.prompts import template_hash, text_of

if TYPE_CHECKING:
    from kit.judging.judge import Judge


def setup_of(judge: Judge) -> dict[str, str]:
    """What margins depend on besides the trace: the model by content, the prompts, the template."""
    student = judge.config.student
    prompts = judge.config.prompts
    template = template_hash(judge.backend.tokenizer, prompts, student)
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
    # names with another value here and there, or in one of the two only
    differing = sorted(dict(setup_of(judge).items() ^ calibration.setup.items()))
    threshold = calibration.thresholds.get(judge.settings.kind)
    hint = (
        "Make one with this config (judge FILE --config CONFIG --validate), or set "
        "judge.calibration=none."
    )
    if differing:
        message = f"was measured with a different {', '.join(differing)}."
    elif judge.generates_verdicts:
        message = "has no threshold for generated verdicts, which have no margin."
        hint = "Set judge.calibration=none, or let verdicts be scored."
    elif threshold is None:
        message = f"has no threshold for kind {judge.settings.kind}."
    else:
        return threshold
    raise KitError(f"The file of judge.calibration {message}", hint, 2)
