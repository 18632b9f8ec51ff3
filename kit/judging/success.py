"""Sufficiency by behaviour: do continuations of a prefix reach the gold answer often enough?

Paper: the student is asked for its opinion (section 3.2). Here, `judge.kind: success`: its success
rate from a prefix has a uniform prior, and the prefix is enough when the posterior probability of
`judge.success_rate` or more reaches `judge.confidence`. Nothing is drawn or graded here.
"""

from math import comb

from kit.core.config import Judge


def success_probability(correct: int, drawn: int, rate: float) -> float:
    """P(success rate >= rate) under Beta(1 + correct, 1 + drawn - correct).

    It equals the probability of at most `correct` successes in drawn + 1 trials of that rate.
    """
    n = drawn + 1
    return sum(comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(correct + 1))


def missing_draws(correct: int, drawn: int, settings: Judge) -> int:
    """The fewest further draws after which a prefix can be decided; 0: it is.

    No draw is wasted: before so many, neither verdict is possible.
    """
    missing = 0
    while True:
        best = _decided(correct + missing, drawn + missing, settings)
        worst = _decided(correct, drawn + missing, settings)
        if best or worst:
            return missing
        missing += 1


def _decided(correct: int, drawn: int, settings: Judge) -> bool:
    """Whether the posterior is sure of enough or of not enough, or can no longer become it."""
    rate = settings.success_rate
    probability = success_probability(correct, drawn, rate)
    all_correct = correct + settings.samples - drawn
    highest = success_probability(all_correct, settings.samples, rate)
    sure = max(probability, 1 - probability) >= settings.confidence
    return sure or highest < settings.confidence
