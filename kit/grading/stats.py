"""Scores with their uncertainty: pass@k, an interval over problems, paired comparisons (section 4).

The problems stand for all problems of their kind, so uncertainty is over problems; several samples of one problem
only make its own mean surer. Nothing here reads rows or knows what was graded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import Any

import numpy as np
from scipy import stats


def pass_at(counts: Sequence[tuple[int, int]]) -> dict[int, float]:
    """The unbiased pass@k (arXiv 2107.03374) for every k up to the smallest number of samples.

    Args:
        counts: (right, samples) of each problem.
    """
    most = min((n for _, n in counts), default=0)
    return {
        k: sum(1 - comb(n - c, k) / comb(n, k) for c, n in counts) / len(counts)
        for k in range(1, most + 1)
    }


def interval(means: np.ndarray | Sequence[float], samples: float = 1) -> tuple[float, float]:
    """Wilson's 95% interval for the mean over problems, at the effective number of trials.

    The percentile bootstrap misses its level on few problems, Wilson's score interval holds it. Several samples of a
    problem count for more than one trial and less than as many: the variance between problems says for how many, and
    as it is estimated, Student's t replaces the normal quantile.

    Args:
        means: share of right samples of each problem, (..., N); leading axes are experiments, for simulations.
        samples: samples a problem (their mean, where it varies).

    Returns:
        (low, high), each (...); (0, 1) without problems.
    """
    means = np.asarray(means, dtype=float)
    count = means.shape[-1]
    if count == 0:
        return 0.0, 1.0
    mean, variance = means.mean(-1), means.var(-1)
    spread = mean * (1 - mean)
    trials = np.clip(spread * count / np.maximum(variance, 1e-12), count, count * max(samples, 1))
    law = stats.t(count - 1) if samples > 1 and count > 1 else stats.norm
    square = law.ppf(0.975) ** 2 / trials
    center, half = mean + square / 2, np.sqrt(square * (spread + square / 4))
    return tuple(np.clip(end / (1 + square), 0, 1) for end in (center - half, center + half))  # type: ignore[return-value]


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of a fair coin; on the pairs that differ it is McNemar's exact test."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def compare(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Compare the shares of right samples (N,) of two models on the same problems.

    One sample each: McNemar's exact p-value; several: that of flipping the differences' signs (exact up to 13
    problems, else 9,999 random flips). The 95% interval is Agresti and Min's (2005), half a problem added to each cell
    of the table, taken over to shares: it does not shrink to a point where all problems agree.

    Returns:
        n, better and worse (problems on which b has the higher and the lower share), difference (b's mean minus a's)
        with ci_low and ci_high, p_value and its method, and min_detectable_difference: the smallest true difference that as many such
        problems show at this level in 80% of experiments; {n: 0} for none.
    """
    if not len(a):
        return {"n": 0}
    difference = np.subtract(b, a, dtype=float)
    better, worse = int(sum(difference > 0)), int(sum(difference < 0))
    if np.isin([*a, *b], (0.0, 1.0)).all():
        method, p_value = "McNemar's exact test", sign_test(better, worse)
    else:
        flips = {
            "permutation_type": "samples",
            "n_resamples": 9999,
            "rng": np.random.default_rng(0),
        }
        law = stats.permutation_test((b, a), lambda x, y, axis: (x - y).mean(axis=axis), **flips)
        method, p_value = "paired permutation test", float(law.pvalue)
    count = len(difference) + 2
    square, middle = (np.square(difference).sum() + 1) / count, difference.sum() / count
    quantile = stats.norm.ppf(0.975)
    half, power = quantile * sqrt((square - middle**2) / count), quantile + stats.norm.ppf(0.8)
    found = {
        "difference": difference.mean(),
        "ci_low": max(middle - half, -1.0),
        "ci_high": min(middle + half, 1.0),
    }
    found["min_detectable_difference"] = min(power * sqrt(square / len(difference)), 1.0)
    rounded = {name: round(float(value), 4) for name, value in found.items()}
    return {
        "n": len(difference),
        "better": better,
        "worse": worse,
        **rounded,
        "p_value": p_value,
        "method": method,
    }
