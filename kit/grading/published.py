r"""The paper's own grader, as a second opinion and never as the filter.

It gives a whole output to math-verify, whose fallback takes the last expression where nothing is
boxed: its labels on the 90 published AIME24 outputs are reproduced exactly. It accepts texts that
name no answer. Runs in the grading worker.
"""

from __future__ import annotations

import math_verify


def accepts(gold: str, output: str) -> bool:
    """Whether math-verify finds the gold answer in a whole output, with its defaults."""
    right = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    given = math_verify.parse(output, parsing_timeout=None)
    return bool(math_verify.verify(right, given, timeout_seconds=None))
