"""Scores with their uncertainty: pass@k, an interval over problems, paired comparisons (section 4).

The problems stand for all problems of their kind, so uncertainty is over problems; several samples
of one problem only make its own mean more certain. Where a method was trained with several seeds,
a comparison is uncertain over training runs too. Nothing here reads rows or knows their grades.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, sqrt

import numpy as np
from scipy import stats

Z_95 = stats.norm.ppf(0.975)  # quantile of a two-sided 95% interval
Z_POWER = stats.norm.ppf(0.8)  # for an experiment that finds a difference four times in five


@dataclass(frozen=True)
class PairedTest:
    """Model b against model a on the same problems; ratios are in [-1, 1]."""

    n: int  # problems
    better: int  # problems on which b has the higher accuracy
    worse: int
    difference: float  # accuracy of b minus accuracy of a
    ci_low: float  # 95% interval of the difference
    ci_high: float
    min_detectable_difference: float  # what 80% of such experiments would find
    p_value: float
    method: str  # of the p-value


def pass_at(counts: Sequence[tuple[int, int]]) -> dict[int, float]:
    """The unbiased pass@k (arXiv 2107.03374) for every k up to the smallest number of samples.

    Args:
        counts: (correct, samples) of each problem.
    """
    ratios = {}
    fewest = min((n for _, n in counts), default=0)
    for k in range(1, fewest + 1):
        ratios[k] = sum(1 - comb(n - c, k) / comb(n, k) for c, n in counts) / len(counts)
    return ratios


def interval(means: np.ndarray | Sequence[float], samples: float = 1) -> tuple[float, float]:
    """Wilson's 95% interval for the mean over problems, at the effective number of trials.

    The percentile bootstrap misses its level on few problems, Wilson's score interval holds it.
    Several samples of a problem count for more than one trial and for fewer than their number: the
    variance between problems gives the count, and as it is estimated, Student's t replaces the
    normal quantile.

    Args:
        means: accuracy of each problem, (..., N); leading axes are experiments, for simulations.
        samples: samples per problem (their mean, where it varies).

    Returns:
        (low, high), each (...); (0, 1) without problems.
    """
    means = np.asarray(means, dtype=float)
    count = means.shape[-1]
    if count == 0:
        return 0.0, 1.0
    mean = means.mean(-1)
    spread = mean * (1 - mean)
    trials = effective_trials(means, samples)
    quantile = Z_95
    if samples > 1 and count > 1:
        quantile = stats.t(count - 1).ppf(0.975)

    # Wilson's interval with that many trials.
    square = quantile**2 / trials
    center = mean + square / 2
    half = np.sqrt(square * (spread + square / 4))
    low, high = np.clip(np.stack([center - half, center + half]) / (1 + square), 0, 1)
    return low, high


def effective_trials(means: np.ndarray, samples: float) -> np.ndarray:
    """Independent answers that those of all problems are worth, see `interval`; (...) of (..., N).

    Between one and `samples` per problem, by the variance between problems.
    """
    count = means.shape[-1]
    mean = means.mean(-1)
    trials = mean * (1 - mean) * count / np.maximum(means.var(-1), 1e-12)
    return np.clip(trials, count, count * max(samples, 1))


def posterior(means: Sequence[float], samples: float = 1) -> tuple[float, float, float]:
    """Posterior mean of the accuracy under a uniform prior, and its 95% credible interval.

    It ranks models more stably than pass@k where answers are few (arXiv 2510.04265). Here the
    prior is on the accuracy over all problems, and answers count as in `interval`.

    Args:
        means: accuracy of each problem (N,).
        samples: samples per problem (their mean, where it varies).
    """
    correct = wrong = 0.0
    if len(means):
        trials = float(effective_trials(np.asarray(means, dtype=float), samples))
        correct = trials * float(np.mean(means))
        wrong = trials - correct
    belief = stats.beta(1 + correct, 1 + wrong)
    low, high = belief.interval(0.95)
    return float(belief.mean()), float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of a fair coin; on the pairs that differ it is McNemar's test."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses).pvalue)


def compare(a: Sequence[float], b: Sequence[float]) -> PairedTest | None:
    """Compare the accuracies (N,) of two models on the same problems; None without problems.

    One sample each: McNemar's exact p-value. Several: the differences' signs are flipped (exact up
    to 13 problems, else 9,999 random flips). The 95% interval is Agresti and Min's (2005), applied
    to accuracies: it does not shrink to a point where all problems agree.
    """
    if len(a) == 0:
        return None
    differences = np.subtract(b, a, dtype=float)
    better = int(np.sum(differences > 0))
    worse = int(np.sum(differences < 0))
    method = "paired permutation test"
    if np.isin([a, b], (0.0, 1.0)).all():
        method = "McNemar's exact test"
        p_value = sign_test(better, worse)
    elif len(a) == 1:
        p_value = 1.0  # one problem's sign says nothing
    else:
        rng = np.random.default_rng(0)
        flips = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=9999, rng=rng
        )
        p_value = float(flips.pvalue)

    # Agresti and Min add half a problem to each of the four cells of the table.
    count = len(differences) + 2
    mean = differences.sum() / count
    mean_square = (np.square(differences).sum() + 1) / count
    half = Z_95 * sqrt((mean_square - mean**2) / count)
    detectable = (Z_95 + Z_POWER) * sqrt(mean_square / len(differences))
    return PairedTest(
        n=len(differences),
        better=better,
        worse=worse,
        difference=round(float(differences.mean()), 4),
        ci_low=round(max(mean - half, -1.0), 4),
        ci_high=round(min(mean + half, 1.0), 4),
        min_detectable_difference=round(min(detectable, 1.0), 4),
        p_value=p_value,
        method=method,
    )


def seed_noise(a: Sequence[float], b: Sequence[float], is_paired: bool) -> tuple[float, int] | None:
    """How much the difference of two methods' mean accuracies varies with their training runs.

    Args:
        a: accuracies of one method's runs (K,).
        b: those of the other (L,).
        is_paired: K = L, and runs at one place have one seed, so what they share cancels.

    Returns:
        (variance of the difference of the means, its degrees of freedom); None: one run each, which
        says nothing of others.
    """
    if is_paired and len(a) > 1:
        differences = np.subtract(b, a)
        return float(differences.var(ddof=1)) / len(a), len(a) - 1
    degrees = len(a) + len(b) - 2
    if degrees < 1:
        return None
    pooled = (np.var(a) * len(a) + np.var(b) * len(b)) / degrees
    return float(pooled) * (1 / len(a) + 1 / len(b)), degrees


def over_seeds(test: PairedTest, variance: float, degrees: int) -> PairedTest:
    """A test of two methods instead of these very models: other training runs may differ as well.

    The variances over problems and over runs are added, with Satterthwaite's degrees of freedom for
    Student's t. What runs and problems do together is in both, so the interval errs wide.

    Args:
        test: of the means over runs, problem by problem.
        variance: see `seed_noise`, with its `degrees` of freedom.
    """
    center = (test.ci_low + test.ci_high) / 2
    over_problems = ((test.ci_high - test.ci_low) / 2 / Z_95) ** 2
    total = over_problems + variance
    shares = over_problems**2 / max(test.n - 1, 1) + variance**2 / degrees
    student = stats.t(total**2 / shares)
    error = sqrt(total)
    half = float(student.ppf(0.975)) * error
    detectable = float(student.ppf(0.975) + student.ppf(0.8)) * error
    return replace(
        test,
        ci_low=round(max(center - half, -1.0), 4),
        ci_high=round(min(center + half, 1.0), 4),
        min_detectable_difference=round(min(detectable, 1.0), 4),
        p_value=float(2 * student.sf(abs(test.difference) / error)),
        method="Student's t over problems and training runs",
    )


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive's score is above a negative's; a tie counts half.

    Args:
        scores: (N,).
        labels: (N,) truth values.

    Returns:
        0.5 too where all labels are equal: there is nothing to tell apart.
    """
    above = scores[labels][:, None] - scores[~labels]
    return float(np.sign(above).mean() + 1) / 2 if above.size else 0.5
