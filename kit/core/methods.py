"""The table of methods: P-ALIGN and the baselines it is compared with (section 4 of the paper).

A method is a rule from question, trace and answer to a training target. All else is shared, so that
a difference between two runs is the rule's. How traces are cut and continued is in kit/pipeline.
"""

import re
from dataclasses import dataclass

from kit.core.errors import nearest


@dataclass(frozen=True)
class Method:
    """One rule.

    In a target stand for:
        {boxed}: the gold answer in a box
        {tagged}: the prefix in its tags
        {trace}: the prefix, and {boxed} after it if it has no box
        {concluded}: the prefix, and {boxed} after it if it has not this very box
        {continuation}: what the student wrote after the prefix
    """

    # judge: where the student judges; ratio: at a share of the sentences; whole: not at all;
    # none: there are no training rows; the others are named after their method, see
    # kit/judging/baselines.py
    cut: str
    target: str  # of a training row
    learns: str  # what the student learns to write, in words

    @property
    def continued(self) -> bool:
        """Whether the student writes on from the prefix."""
        return "{continuation}" in self.target

    @property
    def is_judged(self) -> bool:
        """Whether the student gives verdicts on prefixes."""
        return self.cut in ("judge", "binary-cut")

    @property
    def is_graded(self) -> bool:
        """Whether the cut is found by grading sentences or attempts."""
        return self.cut in ("post-think", "first-correct", "mix-long-short")


# Here: prefix-only and label-only end in the boxed gold answer, and so does a long trace without a
# box of its own, so that a difference to P-ALIGN is one of reasoning and not of format.
METHODS = {
    "palign": Method(
        "judge",
        "{tagged}\n{continuation}",
        "the prefix that the student judged enough, and its own continuation",
    ),
    "zero-shot": Method("none", "", "nothing"),
    "label-only": Method("whole", "{boxed}", "the answer alone"),
    "long-trace": Method("whole", "{trace}", "the teacher's whole trace"),
    "prefix-only": Method(
        "judge",
        "{tagged}\n{boxed}",
        "the prefix that the student judged enough, and the answer; none of its own words",
    ),
    "continuation-only": Method(
        "judge",
        "{continuation}",
        "only the student's own continuation of the prefix that it judged enough",
    ),
    "no-search": Method(
        "ratio",
        "{tagged}\n{continuation}",
        "the whole trace, and the student's own continuation",
    ),
    "post-think": Method(
        "post-think", "{concluded}", "only what the teacher writes after its thinking"
    ),
    "first-correct": Method(
        "first-correct",
        "{concluded}",
        "the trace up to the first sentence that concludes with the right answer",
    ),
    "binary-cut": Method(
        "binary-cut",
        "{concluded}",
        "the shortest beginning from which the student's forced answer is right, and the answer",
    ),
    "step-entropy": Method(
        "step-entropy",
        "{concluded}",
        "the sentences about which the student is least certain; marks stand for the others",
    ),
    "no-verify": Method(
        "no-verify",
        "{concluded}",
        "the trace without the sentences that check what is known already",
    ),
    "mix-long-short": Method(
        "mix-long-short",
        "{concluded}",
        "two rows of each trace: the whole, and a short one (what the teacher writes after its "
        "thinking, else up to the first right conclusion)",
    ),
    "fixed-prefix-matched": Method(
        "fixed-prefix-matched",
        "{tagged}\n{continuation}",
        "a fixed share of the trace, on average as long as P-ALIGN's prefixes, and the student's "
        "own continuation",
    ),
    # ratio-0.25 keeps this share of the sentences
    "ratio": Method(
        "ratio",
        "{tagged}\n{continuation}",
        "the first {share} of the trace's sentences, and the student's own continuation",
    ),
}
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


def learns(name: str) -> str:
    """What the student learns to write under a method, in words, e.g. `the answer alone`."""
    words = method_of(name).learns
    if name.startswith("ratio-"):
        words = words.replace("{share}", f"{100 * float(name.removeprefix('ratio-')):.3g}%")
    return words
