"""The table of methods: P-ALIGN and the baselines it is compared with (section 4 of the paper).

A method is a rule from question, trace and answer to a training target. All else is shared, so that
a difference between two runs is the rule's. How traces are cut and continued is in kit/pipeline.
"""

import re
from dataclasses import dataclass

from kit.core.bundled import bundled
from kit.core.errors import nearest


@dataclass(frozen=True)
class Method:
    """One rule; kit/core/methods.yaml says what its words mean."""

    cut: str
    target: str  # what the student learns to write
    continued: bool = False  # whether the student writes on from the prefix


METHODS = {name: Method(**rule) for name, rule in bundled("core/methods").items()}
RATIO = re.compile(r"ratio-(0?\.\d*[1-9]\d*|1(\.0+)?)")


def known_method(name: str) -> str:
    """A value of the key `method`, unchanged; ValueError: there is none, with the nearest one."""
    names = METHODS.keys() - {"ratio"}
    if name in names or RATIO.fullmatch(name):
        return name
    raise ValueError(f"there is no method {name!r}; {nearest(name, names | {'ratio-0.5'})}")


def method_of(name: str) -> Method:
    """The method that the key `method` names."""
    return METHODS["ratio" if name.startswith("ratio-") else name]
