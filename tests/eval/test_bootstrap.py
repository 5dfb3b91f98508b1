"""Intervals against a plain loop, their coverage on simulated data, pairing, seeds, speed."""

import time

import numpy as np
import pytest

from posthoc import PosthocError
from posthoc.eval.bootstrap import Interval, bootstrap, bootstrap_curve, bootstrap_difference, resampled_counts
from posthoc.eval.retrieval_statistics import Ausc, KnownMeans, VoteEce
from posthoc.eval.shift_statistics import AveragedEce, Means
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
    "ece, half off": (lambda g: Ece(*_half_off(g, 0.06)), 0.03),
    "ece, half far off": (lambda g: Ece(*_half_off(g, 0.1)), 0.05),
    "vote ece, half off": (lambda g: VoteEce(*_half_off(g, 0.1)), 0.05),
    "mean of ece over kinds": (lambda g: AveragedEce([Ece(*_half_off(g, 0.1)) for _ in range(3)]), 0.05),
    "means of views": (lambda g: Means(g.exponential(size=(100, 1))), 1.0),
    "recall and average precision": (lambda g: _queries(g), 0.6),
    "ausc": (lambda g: _selective(g, ausc=True), 1 - (1 - 0.98 / 2) / 2),
}  # 6/pi asin(rho/2) is the normal Spearman; P(wrong | u) = u, so the risk below a coverage c is c/2


def _selective(g, ausc=False):
    u = g.random(150)
    wrong = g.random(150) < u
    return Ausc(u, ~wrong) if ausc else Aurc(u, wrong)


def _queries(g):
    """recall@1 or AP of queries, 0 and 1 or between, and NaN for those without a positive; a mean of .6 over the others."""
    return KnownMeans(np.where(g.random(120) < 0.2, np.nan, g.beta(0.6, 0.4, 120))[:, None])


def _half_off(g, off):
    """Confidences below .55 that are right, and above that are too high by `off`: no error has the other sign."""
    c = g.uniform(0.1, 1, 1000)
    return c, g.random(1000) < c - off * (c > 0.55)


def _confidence(g, over):
    c = g.uniform(0.4, 1, 600)
    return Ece(c, g.random(600) < c - over)


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    make, truth = COVERAGE[name]
    generator = np.random.default_rng(7)
    intervals = [bootstrap(make(generator), resamples=200, seed=i) for i in range(200)]
    coverage = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.90 <= coverage <= (1.0 if "ece" in name else 0.985), coverage  # the corrected ones are conservative
    assert all(i.low <= i.value <= i.high for i in intervals)


def test_differences_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(8)
    hits: dict[str, list[bool]] = {"auroc": [], "ece": [], "ece, half off": []}
    for i in range(120):
        inside, outside = generator.normal(size=80), generator.normal(size=80) + 1
        noisy = Auroc(inside + generator.normal(size=80), outside + generator.normal(size=80))
        d = bootstrap_difference(Auroc(inside, outside), noisy, resamples=300, seed=i)
        hits["auroc"].append(d.low <= 0.760250 - 0.691462 <= d.high)  # Phi(1/sqrt 2) - Phi(1/2)
        c = generator.uniform(0.4, 0.9, 600)
        right = generator.random(600) < c
        d = bootstrap_difference(Ece(c, right), Ece(c + 0.05, right), resamples=300, seed=i)
        hits["ece"].append(d.low <= -0.05 <= d.high)
        c, right = _half_off(generator, 0.06)
        d = bootstrap_difference(Ece(c, right), Ece(np.where(c > 0.55, c - 0.06, c), right), resamples=100, seed=i)
        hits["ece, half off"].append(d.low <= 0.03 <= d.high)
    assert 0.90 <= np.mean(hits["auroc"]) <= 0.99
    assert (
        min(np.mean(hits["ece"]), np.mean(hits["ece, half off"])) >= 0.90
    )  # the ends of two intervals subtracted: never too narrow, often too wide


def test_a_bias_that_is_not_there_is_not_taken_off():
    generator = np.random.default_rng(9)
    error = Ece(*_half_off(generator, 0.0))
    assert bootstrap(error, resamples=200).low == 0.0
    c = generator.uniform(0.4, 1, 6000)
    far = Ece(c, generator.random(6000) < c - 0.2)
    found, (plain,) = bootstrap(far, resamples=200), bootstrap_curve(far, resamples=200)
    assert found.low == pytest.approx(plain.low, abs=0.005)  # each gap is ten times its error
    assert found.high == pytest.approx(plain.high, abs=0.005)
    assert bootstrap(Ece(*_half_off(generator, 0.3)), resamples=200).low > 0.08  # of .15, half of the bins calibrated


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
