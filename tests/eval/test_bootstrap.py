"""Intervals against a plain loop, their coverage on simulated data, pairing, seeds, speed."""

import time

import numpy as np
import pytest

from posthoc import PosthocError
from posthoc.eval.bootstrap import Interval, bootstrap, bootstrap_curve, bootstrap_difference, resampled_counts
from posthoc.eval.statistics import Aurc, Auroc, Ece, Mean, SelectiveAccuracy, Spearman


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_interval_is_that_of_a_plain_loop(rng):
    inside, outside = rng.normal(size=60), rng.normal(size=40) + 0.8
    counts = [c for chunk in resampled_counts((60, 40), 200, 5) for c in zip(*chunk, strict=True)]
    values = [Auroc(np.repeat(inside, a.astype(int)), np.repeat(outside, b.astype(int))).value() for a, b in counts]
    interval = bootstrap(Auroc(inside, outside), resamples=200, seed=5)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert interval.value == pytest.approx(float(Auroc(inside, outside).value()))


def test_strata_keep_their_sizes_and_rows_are_drawn_evenly():
    chunks = list(resampled_counts((200_000, 7), 4, 0))
    assert len(chunks) > 1  # memory is bounded by chunks
    first = np.concatenate([c[0] for c in chunks])
    second = np.concatenate([c[1] for c in chunks])
    assert first.shape == (4, 200_000)
    assert np.all(first.sum(1) == 200_000)
    assert np.all(second.sum(1) == 7)
    assert first.var() == pytest.approx(1.0, abs=0.02)  # Poisson-like counts, as drawing with replacement gives


def test_seeds_repeat_and_differ(rng):
    x = Mean(rng.normal(size=100))
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3)
    assert bootstrap(x, seed=3) != bootstrap(x, seed=4)


def test_a_curve_has_one_interval_for_each_point(rng):
    u, correct = rng.normal(size=80), rng.random(80) < 0.8
    curve = bootstrap_curve(SelectiveAccuracy(u, correct, [0.0, 0.2, 0.4]), resamples=100)
    assert len(curve) == 3
    assert curve[0].value == pytest.approx(correct.mean())
    assert curve[0] == bootstrap(SelectiveAccuracy(u, correct, [0.0]), resamples=100)


def test_pairing_uses_the_same_rows(rng):
    easy = rng.normal(size=300)
    a, b = Mean(easy + 0.1), Mean(easy)
    paired = bootstrap_difference(a, b)
    assert paired.low == pytest.approx(0.1)  # the common part cancels in every resample
    assert paired.high == pytest.approx(0.1)
    same = Auroc(easy[:150], easy[150:])
    assert bootstrap_difference(same, same) == Interval(0, 0, 0)


COVERAGE = {
    "mean": (lambda g: Mean(g.random(80) < 0.8), 0.8),
    "auroc": (lambda g: Auroc(g.normal(size=60), g.normal(size=80) + 1), 0.760250),  # Phi(1/sqrt 2)
    "spearman": (lambda g: Spearman(*g.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 120).T), 0.482583),
    "aurc": (lambda g: _selective(g), 0.25),
    "ece, calibrated": (lambda g: _confidence(g, 0.0), 0.0),
    "ece, overconfident": (lambda g: _confidence(g, 0.05), 0.05),
}  # 6/pi asin(rho/2) is the normal Spearman; P(wrong | u) = u, so the risk below a coverage c is c/2


def _selective(g):
    u = g.random(150)
    return Aurc(u, g.random(150) < u)


def _confidence(g, over):
    c = g.uniform(0.4, 1, 600)
    return Ece(c, g.random(600) < c - over)


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    make, truth = COVERAGE[name]
    generator = np.random.default_rng(7)
    intervals = [bootstrap(make(generator), resamples=300, seed=i) for i in range(250)]
    coverage = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.90 <= coverage <= 0.985
    assert all(i.low <= i.value <= i.high for i in intervals)


def test_differences_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(8)
    hits = {"auroc": [], "ece": []}
    for i in range(150):
        inside, outside = generator.normal(size=80), generator.normal(size=80) + 1
        noisy = Auroc(inside + generator.normal(size=80), outside + generator.normal(size=80))
        d = bootstrap_difference(Auroc(inside, outside), noisy, resamples=300, seed=i)
        hits["auroc"].append(d.low <= 0.760250 - 0.691462 <= d.high)  # Phi(1/sqrt 2) - Phi(1/2)
        c = generator.uniform(0.4, 0.9, 600)
        right = generator.random(600) < c
        d = bootstrap_difference(Ece(c, right), Ece(c + 0.05, right), resamples=300, seed=i)
        hits["ece"].append(d.low <= -0.05 <= d.high)
    assert 0.90 <= np.mean(hits["auroc"]) <= 0.99
    assert np.mean(hits["ece"]) >= 0.90  # the ends of two intervals subtracted: never too narrow, often too wide


def test_ten_thousand_rows_each_take_seconds(rng):
    inside, outside = rng.normal(size=10_000), rng.normal(size=10_000) + 1
    start = time.perf_counter()
    interval = bootstrap(Auroc(inside, outside))
    assert time.perf_counter() - start < 30  # about 1 s on a free core
    assert interval.high - interval.low == pytest.approx(4 * 0.00335, rel=0.1)  # Hanley & McNeil's standard error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_difference(Mean([1.0, 2.0]), Mean([1.0])), "same rows"),
        (lambda: bootstrap(Mean([1.0]), resamples=1), "resamples=1"),
        (lambda: bootstrap(Mean([1.0, 2.0]), level=95), "level=95"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(PosthocError, match=message):
        call()


def test_an_interval_reads_well():
    assert repr(Interval(0.9031, 0.89, 0.9149)) == "0.903 [0.890, 0.915]"
