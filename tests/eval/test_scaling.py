"""Recalibration recovers what was done to the logits, helps on other rows, and refuses what it cannot take."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from posthoc import PosthocError
from posthoc.eval import metrics, plots
from posthoc.eval.reliability import diagram, reliability, wilson
from posthoc.eval.scaling import IsotonicScaling, TemperatureScaling, VectorScaling, fit_scaling

SCALE, SHIFT = np.array([2.0, 0.5, 1.5, 1.0]), np.array([0.0, 1.0, -1.0, 0.5])


def drawn(n=4000, seed=0):
    """Calibrated logits and labels drawn from them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 4)) * 2
    return z, np.minimum((softmax(z, axis=1).cumsum(1) < rng.random((n, 1))).sum(1), 3)


def test_each_undoes_what_it_can_undo():
    z, label = drawn()
    one = fit_scaling("temperature", z * 3, label)
    assert isinstance(one, TemperatureScaling)
    assert one.temperature == pytest.approx(3, rel=0.05)
    bent = (z - SHIFT) / SCALE
    several = fit_scaling("vector", bent, label)
    assert isinstance(several, VectorScaling)
    assert several.scale == pytest.approx(SCALE, rel=0.15)
    assert several.shift - several.shift[0] == pytest.approx(SHIFT, abs=0.25)
    test, truth = drawn(seed=1)
    best = metrics.nll(test, truth)
    assert metrics.nll(several.log_probability((test - SHIFT) / SCALE), truth) == pytest.approx(best, abs=0.01)
    assert metrics.nll(one.log_probability(test * 3), truth) == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("kind", ["temperature", "vector", "isotonic"])
def test_all_mend_overconfidence_on_other_rows(kind):
    z, label = drawn()
    test, truth = drawn(seed=2)
    scaled = fit_scaling(kind, z * 3, label).log_probability(test * 3)
    assert scaled.shape == test.shape
    assert np.exp(scaled).sum(1) == pytest.approx(np.ones(len(test)))
    before, after = (metrics.ece(*metrics.confidence_and_correct(p, truth)) for p in (test * 3, scaled))
    assert after < 0.04 < before
    assert metrics.nll(scaled, truth) < metrics.nll(test * 3, truth)


def test_vector_scaling_is_at_least_as_likely_as_temperature_on_its_own_rows():
    z, label = drawn(300)
    one, several = (
        metrics.nll(fit_scaling(k, z * 2, label).log_probability(z * 2), label) for k in ("temperature", "vector")
    )
    assert several <= one + 1e-9


def test_isotonic_is_scikit_learns_and_never_infinitely_sure():
    from sklearn.isotonic import IsotonicRegression

    z, label = drawn(200)
    scaling = fit_scaling("isotonic", z, label)
    assert isinstance(scaling, IsotonicScaling)
    p = softmax(z, axis=1)
    curves = [IsotonicRegression(out_of_bounds="clip").fit(p[:, k], label == k).predict(p[:, k]) for k in range(4)]
    wanted = np.maximum(np.stack(curves, 1), 1 / 202)
    assert np.exp(scaling.log_probability(z)) == pytest.approx(wanted / wanted.sum(1, keepdims=True))
    assert np.isfinite(scaling.log_probability(z * 50)).all()


def test_rows_that_lack_a_class_or_are_separable_stay_finite():
    z = np.eye(3)[[0, 1] * 20] * 4
    label = np.array([0, 1] * 20)
    for kind in ("temperature", "vector", "isotonic"):
        assert np.isfinite(fit_scaling(kind, z, label).log_probability(z)).all()


def test_the_bins_of_a_diagram_sum_to_the_ece():
    rng = np.random.default_rng(0)
    c = rng.uniform(0.3, 1, 500)
    right = rng.random(500) < c - 0.1
    found = reliability(c, right)
    gap = np.abs(found.confidence - [a.value for a in found.accuracy])
    assert (gap * found.rows).sum() / 500 == pytest.approx(metrics.ece(c, right))
    assert all(0 <= a.low <= a.value <= a.high <= 1 for a in found.accuracy)
    assert found.rows.sum() == 500
    assert len(reliability([0.95, 0.96], [1, 1]).rows) == 1


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    low, high = wilson(np.array([0, 3, 10]), np.array([10, 10, 10]))
    for k, lo, hi in zip((0, 3, 10), low, high, strict=True):
        wanted = binomtest(k, 10).proportion_ci(method="wilson")
        assert (lo, hi) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_the_diagram_is_drawn(tmp_path):
    z, label = drawn(500)
    lines = {name: reliability(*metrics.confidence_and_correct(p, label)) for name, p in (("raw", z * 3), ("T", z))}
    with plots.page(tmp_path / "reliability.png", 4, 4) as figure:
        axis = figure.subplots()
        diagram(axis, lines, plots.looks(["T"], ["raw"]), title="Reliability")
        assert len(axis.containers) == 2
        assert [text.get_text() for text in axis.get_xticklabels()]
    assert (tmp_path / "reliability.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_scaling("vectors", np.zeros((2, 3)), [0, 1]), "vector"),
        (lambda: fit_scaling("vector", np.zeros((2, 3)), [0, 3]), "from 0 to 2"),
        (lambda: fit_scaling("isotonic", np.array([[0.0, np.nan]]), [0]), "rows 0"),
        (lambda: fit_scaling("vector", *drawn(20)).log_probability(np.zeros((2, 3))), "3 classes; .* fitted on 4"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(PosthocError, match=message):
        call()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.isotonic", None)
    with pytest.raises(PosthocError, match=r"posthoc\[eval\]"):
        fit_scaling("isotonic", *drawn(20))


def test_log_probabilities_are_as_good_as_logits():
    z, label = drawn(300)
    scaling = fit_scaling("temperature", z, label)
    assert scaling.log_probability(log_softmax(z, axis=1)) == pytest.approx(scaling.log_probability(z))
