"""Calibrated radii keep their promise over many splits, and losses are those of one query at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from posthoc.adapters.errors import DataError, OptionError
from posthoc.eval.risk_control import LOSSES, TrueRadii, calibrated_radius, hoeffding_bentkus


def population(queries: int, seed: int = 0, empty: int = 0) -> TrueRadii:
    """One to six true answers a query, hard and easy queries; the last `empty` have none."""
    rng = np.random.default_rng(seed)
    counts = np.r_[rng.integers(1, 7, queries - empty), np.zeros(empty, int)]
    query = np.repeat(np.arange(queries), counts)
    radius = rng.gamma(2.0, size=len(query)) * rng.uniform(0.2, 3.0, queries)[query]
    order = rng.permutation(len(query))
    return TrueRadii(radius[order], query[order], queries)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 20), st.sampled_from([0.0, 0.5, 1.0, 2.5, np.inf]), st.randoms())
def test_losses_and_steps_by_brute_force(queries, pairs, radius, random) -> None:
    query = np.array([random.randrange(queries) for _ in range(pairs)], dtype=np.int64)
    values = np.array([random.choice([0.0, 0.5, 1.0, 2.0, np.inf]) for _ in range(pairs)])
    truth = TrueRadii(values, query, queries)
    for loss in LOSSES:
        wanted = []
        for q in range(queries):
            own = values[query == q]
            value = sum(own > radius) / max(len(own), 1) if loss == "missed" else float(all(own > radius))
            wanted.append(value if len(own) else np.nan)
        np.testing.assert_allclose(truth.losses(radius, loss), wanted, atol=1e-12)
        if pairs:
            steps, risk = truth.risk_steps(loss)
            assert (np.diff(steps) > 0).all()
            assert (np.diff(risk) <= 1e-12).all()
            np.testing.assert_allclose(risk, [np.nanmean(truth.losses(s, loss)) for s in steps], atol=1e-12)
            assert risk[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ["conformal", "pac"])
def test_promises_hold_over_600_splits(loss: str, mode: str) -> None:
    truth, rng, alpha, delta = population(2500, empty=100), np.random.default_rng(1), 0.1, 0.1
    risks = []
    for _ in range(600):
        order = rng.permutation(2500)
        radius = calibrated_radius(truth.take(order[:500]), alpha=alpha, delta=delta, mode=mode, loss=loss)
        risks.append(np.nanmean(truth.take(order[500:]).losses(radius, loss)))
    mean, error = np.mean(risks), np.std(risks) / 600**0.5
    assert mean <= alpha + 3 * error
    above = np.mean(np.array(risks) > alpha)
    if mode == "pac":
        assert above <= delta
        assert mean > 0.6 * alpha  # and is not bought by a set of everything
    else:
        assert mean > alpha - 2 / 500 - 3 * error
        assert above > delta  # an expectation is a weaker promise


def test_the_conformal_radius_is_the_smallest_allowed() -> None:
    truth = TrueRadii(np.arange(1.0, 20.0), np.arange(19), 19)  # n = 19, one answer each
    # (misses + 1) / 20 <= .1: one miss is allowed, so the 18th radius
    assert calibrated_radius(truth, alpha=0.1) == 18.0
    assert calibrated_radius(truth, alpha=0.05) == 19.0
    assert calibrated_radius(truth, alpha=0.04) == np.inf  # 19 queries cannot show so little


def test_queries_without_a_true_answer_take_no_part() -> None:
    with_some, without = population(300, empty=150), population(150)
    kept = with_some.take(np.arange(150))
    assert calibrated_radius(with_some) == calibrated_radius(kept)
    assert np.isnan(with_some.losses(1.0)).sum() == 150
    assert not np.isnan(without.losses(1.0)).any()


def test_the_bound_is_its_formula_and_never_too_sure() -> None:
    n, alpha = 80, 0.15
    misses = np.arange(n + 1)
    p = hoeffding_bentkus(misses / n, n, alpha)
    for k in (0, 3, 9, 12):
        r = k / n
        kl = (r * np.log(r / alpha) if r else 0.0) + (1 - r) * np.log((1 - r) / (1 - alpha))
        assert p[k] == pytest.approx(min(np.exp(-n * kl), np.e * binom.cdf(k, n, alpha), 1.0))
    assert (np.diff(p) >= 0).all()
    assert p[12:].tolist() == [1.0] * len(p[12:])  # 12 / 80 = alpha
    weight = binom.pmf(misses, n, alpha)  # when the risk is alpha: P(p <= delta) <= delta
    for delta in (0.01, 0.05, 0.1, 0.3):
        assert weight[p <= delta].sum() <= delta


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: calibrated_radius(population(9), alpha=0.0), OptionError, "alpha=0"),
        (lambda: calibrated_radius(population(9), delta=2.0), OptionError, "delta=2"),
        (lambda: calibrated_radius(population(9), mode="sure"), OptionError, "'conformal', 'pac'"),
        (lambda: calibrated_radius(population(9), loss="all"), OptionError, "'missed', 'none'"),
        (lambda: calibrated_radius(population(4, empty=4)), DataError, "none of the 4"),
        (lambda: TrueRadii(np.array([1.0, np.nan]), np.array([0, 0]), 1), DataError, "row 1"),
        (lambda: TrueRadii(np.array([1.0]), np.array([1]), 1), DataError, "1 queries"),
        (lambda: TrueRadii(np.array([1.0]), np.array([0, 1]), 2), DataError, "are expected"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
