"""Intervals: exact cases, coverage by simulation, and what is refused."""

import math
import tracemalloc

import numpy as np
import pytest

from mmicl_kernels.evaluation import bootstrap_interval, gap, paired_bootstrap, wilson_interval
from mmicl_kernels.evaluation.metrics import auroc


def test_wilson_interval():
    # Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263 and 15 of 148, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


def test_bootstrap_of_two_samples():
    """Means of resamples of 0 and 1 are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4."""
    wide, narrow = (bootstrap_interval([0, 1], level=level) for level in (0.55, 0.45))
    assert (wide.value, wide.low, wide.high) == (0.5, 0, 1)
    assert (narrow.value, narrow.low, narrow.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("count, right", [(40, 20), (40, 4), (300, 200)])
def test_bootstrap_of_shares_is_binomial(count, right):
    """Of resamples of a share p the hits are binomial; their quantiles are known."""
    found = bootstrap_interval([1] * right + [0] * (count - right), resamples=20_000)
    p = right / count
    terms = [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]
    cumulative = np.cumsum(terms)
    # Four standard errors of a frequency near 0.025 among 20,000 resamples.
    slack = 4 * math.sqrt(0.025 * 0.975 / 20_000)
    for bound, quantile in ((found.low, 0.025), (found.high, 0.975)):
        low, high = (np.searchsorted(cumulative, quantile + x) for x in (-slack, slack))
        assert low <= round(bound * count) <= high
        assert bound * count == pytest.approx(round(bound * count))


def normal_coverage(count: int, z: float = 1.959964) -> float:
    """P(|t| <= z sqrt((N - 1) / N)) of Student's t with N - 1 degrees of freedom, by the trapezoid rule."""
    freedom, bound = count - 1, z * math.sqrt((count - 1) / count)
    t = np.linspace(-bound, bound, 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(t * t / freedom))
    return float(((density[1:] + density[:-1]) / 2).sum() * (t[1] - t[0]))


def test_documented_coverage():
    assert [round(normal_coverage(n), 3) for n in (10, 30, 100)] == [0.904, 0.936, 0.946]


@pytest.mark.parametrize("count", [10, 30, 100])
def test_coverage_of_a_mean(count):
    """Of 2,000 data sets with mean 0 as many intervals hold 0 as documented, to four standard errors."""
    generator, trials = np.random.default_rng(count), 2_000
    hits = 0
    for trial in range(trials):
        found = bootstrap_interval(generator.normal(size=count), resamples=400, seed=trial)
        hits += found.low <= 0 <= found.high
    expected = normal_coverage(count)
    # The quantile of 400 resamples adds about (0.025 / 400) ** 0.5 / 2 to the normal theory.
    slack = 4 * math.sqrt(expected * (1 - expected) / trials) + math.sqrt(0.025 / 400) / 2
    assert abs(hits / trials - expected) < slack


def test_coverage_of_a_paired_difference():
    """Systems that are equal on average differ in 5 % of the trials, though each is noisy in the same way."""
    generator, trials, count = np.random.default_rng(0), 1_000, 100
    hits = 0
    for trial in range(trials):
        hard = 10 * generator.normal(size=count)
        a, b = (hard + generator.normal(size=count) for _ in range(2))
        found = paired_bootstrap(a, b, resamples=400, seed=trial)
        hits += not found.excludes_zero
        assert found.high - found.low < 2  # unpaired: about 5.5
    expected = normal_coverage(count)
    slack = 4 * math.sqrt(expected * (1 - expected) / trials) + math.sqrt(0.025 / 400) / 2
    assert abs(hits / trials - expected) < slack


def test_coverage_of_auroc():
    """True value: normal scores one deviation apart, Phi(1 / sqrt(2))."""
    generator, trials = np.random.default_rng(0), 300
    truth, hits = (1 + math.erf(0.5)) / 2, 0
    labels = np.arange(80) % 2
    for trial in range(trials):
        score = auroc(generator.normal(size=80) + labels, labels)
        found = bootstrap_interval(score.resampled, count=80, resamples=200, seed=trial)
        hits += found.low <= truth <= found.high
    # Percentile intervals of AUROC at N = 80: 0.90 to 0.97; four standard errors around that.
    slack = 4 * math.sqrt(0.95 * 0.05 / trials)
    assert 0.90 - slack < hits / trials < min(1, 0.97 + slack)


def test_paired_is_the_interval_of_the_differences():
    generator = np.random.default_rng(0)
    a, b = generator.random(50), generator.random(50)
    assert paired_bootstrap(a, b, seed=3) == bootstrap_interval(a - b, seed=3)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    ab, ba = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low), abs=1e-15)


def test_functions_of_indices_give_what_numbers_give():
    generator = np.random.default_rng(0)
    a, b = generator.random(50), generator.random(50)
    by_function = bootstrap_interval(lambda i: a[i].mean(), count=50, resamples=500)
    by_numbers = bootstrap_interval(a, resamples=500)
    assert (by_function.low, by_function.high) == pytest.approx((by_numbers.low, by_numbers.high), rel=1e-14)
    difference = paired_bootstrap(lambda i: a[i].mean(), lambda i: b[i].mean(), count=50, resamples=500)
    expected = paired_bootstrap(a, b, resamples=500)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), abs=1e-14)


def test_the_draws_are_one_stream():
    """However many are drawn at a time: 2 ** 20 indices are 100 resamples of 10,000 samples."""
    scores = np.random.default_rng(0).random(10_000)
    draws = np.random.default_rng(5)
    means = [scores[draws.integers(10_000, size=10_000)].mean() for _ in range(250)]
    found = bootstrap_interval(scores, resamples=250, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-14)


def test_memory_stays_small():
    """10,000 samples and 1,000 resamples: 80 MB of indices, drawn 8 MiB at a time."""
    scores = np.random.default_rng(0).random(10_000)
    tracemalloc.start()
    paired_bootstrap(scores, scores[::-1], resamples=1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * 2**20


def test_equal_samples_have_no_width():
    found = bootstrap_interval([1.0] * 5)
    assert (found.low, found.high) == (1, 1)


def test_gap():
    zero, better = np.tile([0, 0, 1, 0, 1], 10), np.tile([1, 0, 1, 1, 1], 10)
    closed = gap(zero, zero)
    assert not closed.exists and str(closed).startswith("no gap to close: what demonstrations add, 0.0000")
    open_gap = gap(zero, better)
    assert open_gap.exists and open_gap.difference.value == pytest.approx(0.4)
    assert str(open_gap).startswith("a gap to close: demonstrations add 0.4000 (95% interval 0.")
    worse = gap(better, zero)
    assert not worse.exists and "make it worse by 0.4000 (95%" in str(worse)
    assert worse.difference.excludes_zero and not closed.difference.excludes_zero
    # One sample more in fifty is no evidence.
    assert not gap(zero, np.r_[1, zero[1:]]).exists


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bootstrap_interval([1.0]), "scores must have at least two samples, got 1"),
        (lambda: bootstrap_interval([]), "at least two samples, got 0"),
        (lambda: bootstrap_interval([1, float("nan")]), "scores must be finite"),
        (lambda: bootstrap_interval([[1, 2]]), r"in one dimension, got shape \(1, 2\)"),
        (lambda: bootstrap_interval([1, 2], level=95), "level must be between 0 and 1, got 95"),
        (lambda: bootstrap_interval([1, 2], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: bootstrap_interval([1, 2], count=2), "count is for functions"),
        (lambda: bootstrap_interval(lambda i: 0.0), "count must be its number of samples"),
        (
            lambda: bootstrap_interval(lambda i: float("nan"), count=3),
            "10000 of 10000 resamples have no value",
        ),
        (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "the same samples, got 2 and 3"),
        (lambda: paired_bootstrap([1, 2], lambda i: 0.0), "both be numbers or both be functions"),
        (lambda: gap([1, 2], [1, 2, 3]), "the same samples"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
