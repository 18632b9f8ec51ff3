"""Statistics against closed forms and simulation."""

from __future__ import annotations

from itertools import combinations, product
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kit.grading.stats import (
    compare,
    interval,
    over_seeds,
    pass_at,
    posterior,
    seed_noise,
    sign_test,
)

EXPERIMENTS = 2000


def coverage(low, high, truth) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


def simulated(seed, problems, accuracy, samples, spread=None):
    """Ratios of correct samples (EXPERIMENTS, problems).

    Args:
        spread: concentration of the problems' difficulty (Beta); None: all are as hard.
    """
    generator = np.random.default_rng(seed)
    shape = (EXPERIMENTS, problems)
    ease = (
        generator.beta(accuracy * spread, (1 - accuracy) * spread, shape)
        if spread
        else np.full(shape, accuracy)
    )
    return generator.binomial(samples, ease) / samples


@pytest.mark.parametrize("right,samples", [(0, 4), (1, 4), (3, 4), (4, 4)])
def test_pass_at_is_the_mean_over_all_subsets(right, samples):
    marks = [1] * right + [0] * (samples - right)
    for k, ratio in pass_at([(right, samples)]).items():
        draws = list(combinations(marks, k))
        assert ratio == pytest.approx(sum(map(max, draws)) / len(draws))


def test_pass_at_over_problems():
    assert pass_at([(1, 3), (0, 3), (3, 3)]) == pytest.approx(
        {1: 4 / 9, 2: (2 / 3 + 0 + 1) / 3, 3: 2 / 3}
    )
    assert list(pass_at([(1, 3), (1, 2)])) == [1, 2]
    assert pass_at([]) == {}


@pytest.mark.parametrize(
    "problems,accuracy", [(30, 0.17), (30, 0.12), (30, 0.22), (83, 0.49), (500, 0.75), (500, 0.85)]
)
def test_interval_covers_with_one_sample(problems, accuracy):
    low, high = interval(simulated(1, problems, accuracy, 1))
    assert 0.93 <= coverage(low, high, accuracy) <= 0.97


@pytest.mark.parametrize("spread", [0.5, 1, 3])
@pytest.mark.parametrize("problems,accuracy", [(30, 0.17), (30, 0.4), (500, 0.75)])
def test_interval_covers_with_three_samples(problems, accuracy, spread):
    low, high = interval(simulated(2, problems, accuracy, 3, spread), samples=3)
    assert 0.93 <= coverage(low, high, accuracy) <= 0.97


def test_coverage_at_thirty_problems_in_closed_form():
    """The binomial's own probabilities, so that no seed is lucky: 95.1% at 30 problems, 0.17."""
    counts = np.arange(31)
    ends = [interval([1.0] * n + [0.0] * (30 - n)) for n in counts]
    inside = np.array([low <= 0.17 <= high for low, high in ends])
    assert scipy_stats.binom.pmf(counts, 30, 0.17)[inside].sum() == pytest.approx(0.951, abs=0.001)


def test_coverage_in_closed_form_for_other_accuracies():
    """Counts are discrete, so single accuracies vary; their mean is the level, none is far off."""
    counts = np.arange(31)
    grid = np.linspace(0.1, 0.9, 81)
    ends = np.array([interval([1.0] * n + [0.0] * (30 - n)) for n in counts])
    inside = (ends[:, :1] <= grid) & (grid <= ends[:, 1:])
    covered = (scipy_stats.binom.pmf(counts[:, None], 30, grid) * inside).sum(0)
    assert 0.945 < covered.mean() < 0.96 and covered.min() > 0.92 and covered.max() < 0.98


def test_percentile_bootstrap_does_not_cover():
    """Why the interval is not a bootstrap's: on the same experiments it misses the level."""
    means = simulated(2, 30, 0.17, 3, 0.5)
    picks = np.random.default_rng(3).integers(0, 30, (300, 30))
    resampled = np.stack([means[:, pick].mean(-1) for pick in picks])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    ours = coverage(*interval(means, samples=3), 0.17)
    assert coverage(low, high, 0.17) < 0.93 < ours


def test_interval_is_wilsons_with_one_sample():
    wilson = scipy_stats.binomtest(5, 30).proportion_ci(0.95, method="wilson")
    assert interval([1.0] * 5 + [0.0] * 25) == pytest.approx((wilson.low, wilson.high))


def test_interval_at_the_edges():
    low, high = interval([0.0] * 30)
    assert low == 0.0 and 0.05 < high < 0.15
    low, high = interval([1.0] * 30)
    assert high == pytest.approx(1.0) and 0.85 < low < 0.95
    assert interval([]) == (0.0, 1.0)
    assert 0 <= interval([1 / 3])[0] < 1 / 3 < interval([1 / 3], samples=3)[1] <= 1


def test_more_samples_narrow_the_interval_within_bounds():
    means = np.array([1 / 3] * 15 + [2 / 3] * 15)
    low, high = interval(means, samples=3)
    one, trials = interval([0.0, 1.0] * 15), interval([0.0, 1.0] * 45)
    assert trials[1] - trials[0] - 0.01 < high - low < one[1] - one[0]


def test_sign_test_is_mcnemars_exact():
    by_hand = 2 * sum(comb(12, k) for k in range(3)) / 2**12
    assert sign_test(2, 10) == sign_test(10, 2) == pytest.approx(by_hand)
    assert sign_test(0, 0) == 1.0


def test_single_samples_are_compared_by_mcnemars_test() -> None:
    a = [1.0] * 20 + [0.0] * 80
    b = [1.0] * 15 + [0.0] * 5 + [1.0] * 20 + [0.0] * 60
    test = compare(a, b)
    assert test.difference == pytest.approx(0.15)
    assert test.p_value == pytest.approx(sign_test(20, 5)) and "McNemar" in test.method
    assert 0 < test.ci_low < 0.15 < test.ci_high
    back = compare(b, a)
    assert back.difference == pytest.approx(-0.15)
    assert (back.ci_low, back.ci_high) == pytest.approx((-test.ci_high, -test.ci_low))


def test_equal_models_have_an_interval_and_not_a_point() -> None:
    test = compare([1.0, 0.0] * 15, [1.0, 0.0] * 15)
    assert test.difference == 0 and test.p_value == 1
    assert test.ci_low < -0.05 and test.ci_high > 0.05


def test_no_problems_cannot_be_compared() -> None:
    assert compare([], []) is None


def test_permutation_test_is_exact_on_few_problems() -> None:
    a = [0.0, 1 / 3, 1 / 3, 0.0, 2 / 3, 0.5]
    b = [1 / 3, 1.0, 1 / 3, 2 / 3, 1 / 3, 1.0]
    differences = np.subtract(b, a)
    flips = np.array(list(product((1, -1), repeat=len(a)))) @ differences
    by_hand = (np.abs(flips) >= abs(differences.sum()) - 1e-9).mean()
    test = compare(a, b)
    assert test.p_value == pytest.approx(by_hand) and "permutation" in test.method


def test_detectable_difference_is_found_in_about_80_percent() -> None:
    """One sample, 300 problems; a gets 0.4 of them, b the same ones and more: McNemar's power."""
    generator = np.random.default_rng(4)
    base = generator.random((400, 300)) < 0.4
    flip = generator.random((400, 300))
    detectable = []
    for a, draw in zip(base[:50], flip[:50], strict=True):
        detectable.append(compare(a, np.where(draw < 0.1, ~a, a)).min_detectable_difference)
    target = float(np.mean(detectable))
    assert 0 < target < 0.1
    # Of all problems the same 10% differ.
    gain = 0.05 + target / 2
    loss = 0.05 - target / 2
    better = np.where(base, flip >= loss / 0.4, flip < gain / 0.6)
    power = np.mean([compare(a, b).p_value < 0.05 for a, b in zip(base, better, strict=True)])
    assert 0.7 < power < 0.9


@pytest.mark.parametrize("problems,shift", [(30, 0.1), (200, 0.05)])
def test_compare_interval_covers(problems: int, shift: float) -> None:
    generator = np.random.default_rng(5)
    inside = 0
    for _ in range(500):
        ease = generator.beta(0.6, 1.4, problems) * (1 - shift / 0.7)
        a = generator.random(problems) < ease
        b = generator.random(problems) < ease + shift
        test = compare(a, b)
        inside += test.ci_low <= shift <= test.ci_high
    assert 0.92 <= inside / 500 <= 0.99


def test_a_posterior_of_one_answer_each_is_the_beta_distributions():
    """Known by construction: 7 of 10 right under a uniform prior is Beta(8, 4)."""
    mean, low, high = posterior([1.0] * 7 + [0.0] * 3)
    assert mean == pytest.approx(8 / 12)
    assert (low, high) == pytest.approx((0.390257, 0.890743), abs=1e-5)


def test_a_posterior_without_answers_is_the_prior_and_narrows_with_answers():
    assert posterior([]) == pytest.approx((0.5, 0.025, 0.975))
    widths = [high - low for _, low, high in (posterior([0.5] * n, samples=8) for n in (4, 16, 64))]
    assert widths == sorted(widths, reverse=True)


def test_several_samples_narrow_a_posterior_only_where_problems_agree():
    """Problems that are always or never solved are worth one answer each, whatever is drawn."""
    extreme = [1.0] * 6 + [0.0] * 6
    assert posterior(extreme, samples=32) == pytest.approx(posterior(extreme, samples=1))
    assert posterior([0.5] * 12, samples=32)[1] > posterior(extreme, samples=32)[1]


def test_one_problem_with_several_samples_says_nothing():
    test = compare([0.5], [1.0])
    assert test.p_value == 1.0 and test.ci_low < 0 < test.ci_high


def test_seed_noise_is_that_of_the_mean_difference():
    assert seed_noise([0.3], [0.4], is_paired=True) is None
    # by hand: differences 0.1, 0.2, 0.3
    variance, degrees = seed_noise([0.1, 0.3, 0.2], [0.2, 0.5, 0.5], is_paired=True)
    assert (variance, degrees) == (pytest.approx(0.01 / 3), 2)
    # unpaired: the pooled variance of Student's test
    a, b = [0.1, 0.3, 0.2], [0.2, 0.5]
    variance, degrees = seed_noise(a, b, is_paired=False)
    difference = np.mean(b) - np.mean(a)
    student = scipy_stats.ttest_ind(b, a)
    assert degrees == student.df == 3
    assert difference / variance**0.5 == pytest.approx(student.statistic)
    # one run tells nothing of itself, and takes the other's noise
    variance, degrees = seed_noise([0.1, 0.3], [0.2], is_paired=False)
    assert (variance, degrees) == (pytest.approx(0.02 * 1.5), 1)


def test_training_runs_that_differ_make_a_lead_uncertain():
    """Three seeds of two methods, as measured: ahead by 8.3 points, since one run got 8%."""
    generator = np.random.default_rng(0)
    runs = {}
    for name, accuracies in (("a", (0.26, 0.32, 0.325)), ("b", (0.26, 0.08, 0.315))):
        runs[name] = [generator.permutation(np.arange(200) < 200 * share) for share in accuracies]
    test = compare(np.mean(runs["a"], 0), np.mean(runs["b"], 0))
    assert test.ci_high < 0 and test.p_value < 0.01, "of these very models"
    noise = seed_noise(*([run.mean() for run in runs[name]] for name in "ab"), is_paired=True)
    wide = over_seeds(test, *noise)
    assert wide.ci_low < -0.2 and wide.ci_high > 0.1 and wide.p_value > 0.2
    assert (wide.difference, wide.n) == (test.difference, test.n)


@pytest.mark.parametrize("seed_spread", [0.0, 0.03, 0.1])
def test_an_interval_over_seeds_covers_the_methods_difference(seed_spread, monkeypatch):
    """Three runs a method on 200 problems; the problems alone miss what runs add."""
    # its p-value takes most of the time, and is not looked at
    monkeypatch.setattr(scipy_stats, "permutation_test", lambda *_, **__: SimpleNamespace(pvalue=1))
    generator = np.random.default_rng(5)
    difference = 0.1
    inside = {"problems": 0, "seeds": 0}
    for _ in range(400):
        ease = generator.beta(2, 3, 200)
        means = []
        for shift in (0.0, difference):
            runs = generator.normal(shift, seed_spread, (3, 1))
            means.append(generator.random((3, 200)) < np.clip(ease + runs, 0, 1))
        a, b = means
        test = compare(a.mean(0), b.mean(0))
        wide = over_seeds(test, *seed_noise(a.mean(1), b.mean(1), is_paired=True))
        # the true difference, where clipping takes some of the shift
        truth = np.clip(ease + difference, 0, 1).mean() - ease.mean()
        inside["problems"] += test.ci_low <= truth <= test.ci_high
        inside["seeds"] += wide.ci_low <= truth <= wide.ci_high
    assert inside["seeds"] >= 0.92 * 400, inside
    if seed_spread == 0.1:
        assert inside["problems"] < 0.75 * 400, inside
    if seed_spread == 0:
        assert inside["problems"] >= 0.92 * 400, inside
