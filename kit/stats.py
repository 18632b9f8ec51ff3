"""Scores with their uncertainty: pass@k, an interval over problems, paired comparisons (section 4).

The problems are taken for a sample from all problems of their kind, so intervals are over problems; samples of one
problem only make its own mean surer. Nothing here reads rows or knows what was graded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
from scipy import stats

POWER = 0.8  # of the test behind `Comparison.detectable`
FLIPS = 9999  # sign flips of the permutation test


@dataclass(frozen=True)
class Comparison:
    """b against a on the same problems; `difference` is b's mean minus a's, in [-1, 1].

    `detectable` is the smallest true difference that this many such problems show at the same level in 80% of
    experiments; a smaller difference seen here, or none, says little.
    """

    difference: float
    low: float
    high: float
    p_value: float
    method: str
    detectable: float


def pass_at(counts: Sequence[tuple[int, int]]) -> dict[int, float]:
    """pass@k for every k up to the smallest number of samples.

    Args:
        counts: (right, samples) of each problem.

    Returns:
        {k: mean over problems of 1 - C(samples - right, k) / C(samples, k)}, the unbiased estimator of Chen et al.
        2021 (arXiv 2107.03374); empty without samples.
    """
    most = min((samples for _, samples in counts), default=0)
    return {
        k: sum(1 - comb(n - right, k) / comb(n, k) for right, n in counts) / len(counts) for k in range(1, most + 1)
    }


def interval(means: np.ndarray | Sequence[float], samples: float = 1, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the mean over problems, at the effective number of trials.

    The percentile bootstrap is too narrow on few problems (92% instead of 95% at 30 problems of accuracy 0.17 and
    three samples). Wilson's interval inverts the score test and keeps its level there. Several samples of a problem
    count for more than one trial and less than as many: the variance seen between problems says for how many, and
    as it is estimated, Student's t replaces the normal quantile. With one sample each it is Wilson's interval itself.

    Args:
        means: share of right samples of each problem, (..., N); leading axes are independent experiments.
        samples: samples a problem (their average, where it varies).
        confidence: in (0, 1).

    Returns:
        (low, high), each of shape (...); (0, 1) without problems.
    """
    means = np.asarray(means, dtype=float)
    count = means.shape[-1]
    if count == 0:
        return 0.0, 1.0
    mean, variance = means.mean(-1), means.var(-1)
    spread = mean * (1 - mean)
    trials = np.where(variance > 1e-12, count * spread / np.maximum(variance, 1e-12), count)
    trials = np.clip(trials, count, count * max(samples, 1))
    law = stats.t(count - 1) if samples > 1 and count > 1 else stats.norm
    square = law.ppf(0.5 + confidence / 2) ** 2
    center = (mean + square / trials / 2) / (1 + square / trials)
    half = np.sqrt(square * (spread / trials + square / trials**2 / 4)) / (1 + square / trials)
    low, high = np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)
    return (float(low), float(high)) if means.ndim == 1 else (low, high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of a fair coin; 1 without throws. On discordant pairs this is McNemar's exact test."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def compare(a: Sequence[float], b: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two models on the same problems.

    With one sample each the p-value is McNemar's exact one; with several it comes from flipping the signs of the
    differences (exact up to 13 problems, else 9,999 random flips). The interval is Agresti and Min's (2005) adjusted
    Wald interval, half a problem added to each cell of the table, taken over to shares: it does not shrink to a
    point when all problems agree.

    Args:
        a, b: share of right samples of each problem, in the same order, (N,), N > 0.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    difference = second - first
    count = len(difference)
    if np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        method = "McNemar's exact test"
        p_value = sign_test(int((difference > 0).sum()), int((difference < 0).sum()))
    else:
        method = "paired permutation test"
        p_value = _flip_test(first, second, seed)
    mean = difference.sum() / (count + 2)
    error = sqrt(((np.square(difference).sum() + 1) / (count + 2) - mean**2) / (count + 2))
    quantile = stats.norm.ppf(0.5 + confidence / 2)
    low, high = max(mean - quantile * error, -1.0), min(mean + quantile * error, 1.0)
    under_null = sqrt((np.square(difference).sum() + 1) / (count + 2) / count)
    detectable = min(float((quantile + stats.norm.ppf(POWER)) * under_null), 1.0)
    return Comparison(float(difference.mean()), float(low), float(high), p_value, method, detectable)


def _flip_test(first: np.ndarray, second: np.ndarray, seed: int) -> float:
    if not (first != second).any():
        return 1.0
    result = stats.permutation_test(
        (first, second),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
