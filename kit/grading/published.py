r"""The paper's own grader, as a second opinion and never as the filter.

It gives a whole output to math-verify, whose fallback takes the last expression where nothing is
boxed: its labels on the 90 published AIME24 outputs are reproduced exactly. It accepts texts that
name no answer. Runs in the grading worker.
"""

import math_verify


def accepts(gold: str, output: str) -> bool:
    """Whether math-verify finds the gold answer in a whole output, with its defaults."""
    expected = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    answer = math_verify.parse(output, parsing_timeout=None)
    return bool(math_verify.verify(expected, answer, timeout_seconds=None))
