"""Calibration errors and the Brier score against torchmetrics, scikit-learn and plain sums; coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import binary_calibration_error

from posthoc import PosthocError
from posthoc.eval import metrics
from posthoc.eval.bootstrap import bootstrap, bootstrap_curve
from posthoc.eval.calibration_statistics import (
    AdaptiveEce,
    Brier,
    BrierParts,
    BrierReliability,
    ClasswiseEce,
    SmoothEce,
    brier_per_image,
    probabilities,
)
from posthoc.eval.statistics import Ece, Mean

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10_000)


def classifier(rng, n, classes=4, sharpness=2.0, over=1.0):
    """Logits [n, classes] and labels drawn from them; `over` sharpens the logits afterwards."""
    z = rng.normal(size=(n, classes)) * sharpness
    p = torch.from_numpy(z).softmax(1).numpy()
    label = np.minimum((p.cumsum(1) < rng.random((n, 1))).sum(1), classes - 1)
    return z * over, label


@few
@given(seeds, st.integers(2, 60))
def test_adaptive_ece_sums_over_bins_of_equal_mass(seed, n):
    rng = np.random.default_rng(seed)
    c, right = rng.permutation(np.linspace(0.1, 0.9, n)), rng.random(n) < 0.6
    order = np.argsort(c)
    parts = [part for part in np.split(order, np.ceil(n * np.arange(1, 5) / 5).astype(int)) if len(part)]
    wanted = sum(abs((right[part] - c[part]).sum()) for part in parts) / n
    assert AdaptiveEce(c, right, bins=5).value() == pytest.approx(wanted, abs=1e-12)


def test_equal_confidences_share_a_bin_in_any_order():
    c, right = np.array([0.5] * 6 + [0.9] * 2), np.array([1, 1, 0, 0, 0, 0, 1, 0])
    shuffle = np.random.default_rng(0).permutation(8)
    wanted = (abs(2 - 3) + abs(1 - 1.8)) / 8
    assert metrics.adaptive_ece(c, right, bins=4) == pytest.approx(wanted)
    assert metrics.adaptive_ece(c[shuffle], right[shuffle], bins=4) == pytest.approx(wanted)


def smooth_by_images(c, right):
    """smECE with a Gaussian for every image and its mirror images, and a bisection."""
    t = (np.arange(1000) + 0.5) / 1000
    mirrored = np.concatenate([c + 2 * k for k in range(-6, 7)] + [2 * k - c for k in range(-6, 7)])
    gap = np.tile(right - c, 26)

    def error(width):
        kernel = np.exp(-((t[:, None] - mirrored) ** 2) / (2 * width**2)) / (width * np.sqrt(2 * np.pi))
        return np.abs(kernel @ gap).mean() / len(c)

    low, high = 1e-4, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return low


@settings(max_examples=4, deadline=None)
@given(seeds, st.integers(2, 40))
def test_smooth_ece_is_its_fixed_point(seed, n):
    rng = np.random.default_rng(seed)
    c = rng.random(n)
    right = rng.random(n) < c**2
    assert metrics.smooth_ece(c, right) == pytest.approx(smooth_by_images(c, right), abs=3e-4)


def test_smooth_ece_where_it_is_known():
    assert metrics.smooth_ece([0.5], [1]) == pytest.approx(0.5)
    assert metrics.smooth_ece([1.0, 0.0], [1, 0]) == pytest.approx(0, abs=1e-12)
    assert metrics.smooth_ece([0.7, 0.6], [1, 1]) == pytest.approx(0.35)  # one sign everywhere: nothing cancels


@few
@given(seeds)
def test_classwise_ece_is_torchmetrics_averaged_over_classes(seed):
    z, label = classifier(np.random.default_rng(seed), 60)
    p = torch.from_numpy(z).softmax(1).T.contiguous()
    theirs = [binary_calibration_error(p[k], torch.from_numpy(label == k).int(), n_bins=10) for k in range(4)]
    assert metrics.classwise_ece(z, label, bins=10) == pytest.approx(float(torch.stack(theirs).mean()), abs=1e-6)


@few
@given(seeds)
def test_brier_is_its_formula_and_nll_scikit_learns(seed):
    z, label = classifier(np.random.default_rng(seed), 40, over=2.0)
    p = torch.from_numpy(z).softmax(1).numpy()
    assert metrics.brier(z, label) == pytest.approx(np.square(p - np.eye(4)[label]).sum(1).mean(), abs=1e-12)
    assert metrics.nll(z, label) == pytest.approx(log_loss(label, p, labels=range(4)), abs=1e-12)


@few
@given(seeds)
def test_the_parts_of_the_brier_score_add_up_and_are_what_they_say(seed):
    rng = np.random.default_rng(seed)
    # forecasts that are equal within a bin, so that nothing is left within
    p = rng.choice([0.1, 0.3, 0.7, 0.9], 80)
    label = (rng.random(80) < p).astype(int)
    parts = metrics.brier_decomposition(np.log(np.stack([1 - p, p], 1)), label, bins=10)
    rate = label.mean()
    bins = [(label[p == v].mean(), v, (p == v).mean()) for v in np.unique(p)]
    reliability = 2 * sum(share * (found - v) ** 2 for found, v, share in bins)
    resolution = 2 * sum(share * (found - rate) ** 2 for found, v, share in bins)
    wanted = [2 * ((p - label) ** 2).mean(), reliability, resolution, 2 * rate * (1 - rate), 0]
    assert list(parts.values()) == pytest.approx(wanted, abs=1e-12)
    assert list(parts) == list(BrierParts.NAMES)


def test_a_probability_of_zero_is_no_error():
    z = np.array([[0.0, -np.inf], [-np.inf, 0.0]])
    assert brier_per_image(z, [0, 0]) == pytest.approx([0, 2])
    assert probabilities(z, [0, 0])[0].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("make", [ClasswiseEce, Brier, BrierReliability, BrierParts])
def test_counting_an_image_twice_is_giving_it_twice(make):
    rng = np.random.default_rng(1)
    z, label = classifier(rng, 40)
    drawn = rng.integers(0, 40, (4, 40))
    counts = np.stack([np.bincount(d, minlength=40) for d in drawn]).astype(float)
    wanted = np.stack([make(z[d], label[d]).value() for d in drawn])
    assert make(z, label)([counts]) == pytest.approx(wanted, abs=1e-9)


def test_counting_a_confidence_twice_is_giving_it_twice():
    rng = np.random.default_rng(2)
    c, right = rng.integers(0, 9, 40) / 8, rng.random(40) < 0.6
    drawn = rng.integers(0, 40, (4, 40))
    counts = np.stack([np.bincount(d, minlength=40) for d in drawn]).astype(float)
    wanted = [SmoothEce(c[d], right[d]).value() for d in drawn]
    assert SmoothEce(c, right)([counts]) == pytest.approx(np.stack(wanted), abs=1e-6)
    same = np.zeros((1, 40))
    same[0, 7] = 40
    assert AdaptiveEce(c, right)([same]) == pytest.approx(abs(right[7] - c[7]))


def top(rng, over):
    c = rng.uniform(0.4, 1, 1000)
    return c, rng.random(1000) < c - over


COVERAGE = {
    "adaptive ECE, calibrated": (lambda g: AdaptiveEce(*top(g, 0.0)), 0.0),
    "adaptive ECE, overconfident": (lambda g: AdaptiveEce(*top(g, 0.06)), 0.06),
    "smooth ECE, calibrated": (lambda g: SmoothEce(*top(g, 0.0), grid=128), 0.0),
    "smooth ECE, overconfident": (lambda g: SmoothEce(*top(g, 0.06), grid=128), 0.06),
    "adaptive ECE, half off": (lambda g: AdaptiveEce(*_half_off(g)), 0.03),
    "smooth ECE, half off": (lambda g: SmoothEce(*_half_off(g), grid=128), 0.03),
    "classwise ECE, too sharp": (lambda g: ClasswiseEce(*classifier(g, 1000, 10, over=1.5)), 0.0271),  # of 600,000 rows
    "classwise ECE, half too sharp": (lambda g: ClasswiseEce(*_half_sharp(g)), 0.0136),  # the same
    "classwise ECE, calibrated": (lambda g: ClasswiseEce(*classifier(g, 500), bins=10), 0.0),
    "Brier reliability, calibrated": (lambda g: BrierReliability(*_two(g, 0.0), bins=10), 0.0),
    "Brier reliability, overconfident": (lambda g: BrierReliability(*_two(g, 0.1), bins=10), 0.02),
    "Brier": (lambda g: Brier(*_two(g, 0.0)), 2 * (0.25 + 0.09 + 0.21) / 3),
}


def _half_off(rng):
    """Confidences below .55 that are right, and above that are .06 too high: every bin and width has an error of .03."""
    c = rng.uniform(0.1, 1, 1000)
    return c, rng.random(1000) < c - 0.06 * (c > 0.55)


def _half_sharp(rng):
    z, label = classifier(rng, 1000, 10)
    return z * np.where(np.arange(1000) % 2, 1.5, 1.0)[:, None], label


def _two(rng, over):
    """Two classes, three probabilities of class 1 (.5, .9, .7), each too high by `over`."""
    p = rng.choice([0.5, 0.7, 0.9], 500)
    return np.log(np.stack([1 - p, p], 1)), (rng.random(500) < p - over).astype(int)


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    make, truth = COVERAGE[name]
    generator = np.random.default_rng(6)
    intervals = [bootstrap(make(generator), resamples=100, seed=i) for i in range(60 if "class" in name else 120)]
    coverage = np.mean([one.low - 1e-12 <= truth <= one.high for one in intervals])
    assert 0.90 <= coverage <= (1.0 if "ECE" in name or truth == 0 else 0.992), coverage
    assert all(one.low <= one.value <= one.high for one in intervals)


def test_a_gap_that_is_there_is_not_called_noise():
    rng = np.random.default_rng(0)
    c, right = top(rng, 0.15)
    z, label = classifier(rng, 500, over=3.0)
    for one in (AdaptiveEce(c, right), SmoothEce(c, right), ClasswiseEce(z, label), BrierReliability(z, label)):
        assert bootstrap(one, resamples=200).low > 0


def test_the_parts_have_intervals_too():
    z, label = classifier(np.random.default_rng(1), 300)
    curve = bootstrap_curve(BrierParts(z, label), resamples=100)
    assert curve[0].value == pytest.approx(float(Brier(z, label).value()))
    assert curve[0].low < curve[0].value < curve[0].high
    assert bootstrap(Mean(metrics.nll_per_image(z, label)), resamples=100).value == pytest.approx(metrics.nll(z, label))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveEce([0.5, 1.2], [0, 1]), "0..1"),
        (lambda: SmoothEce([0.5, -0.2], [0, 1]), "0..1"),
        (lambda: SmoothEce([0.5], [1], grid=1), "grid=1"),
        (lambda: ClasswiseEce(np.zeros((2, 3)), [0, 3]), "from 0 to 2"),
        (lambda: BrierParts(np.zeros((2, 3)), [0, 1], bins=0), "bins=0"),
        (lambda: Brier(np.array([[0.0, np.nan], [0.0, 0.0]]), [0, 1]), r"rows 0"),
        (lambda: Ece([0.5], [1], bins=0), "bins=0"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(PosthocError, match=message):
        call()
