"""OOD metrics against scikit-learn and plain loops on scores full of ties; counts; coverage of their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from posthoc import PosthocError
from posthoc.eval import metrics
from posthoc.eval.bootstrap import bootstrap, bootstrap_curve
from posthoc.eval.ood_statistics import (
    AveragePrecision,
    Fpr95,
    OodAcceptedAt95Id,
    OodMetrics,
    ScodAurc,
    ScodAuroc,
)
from posthoc.eval.statistics import Aurc, Auroc

few = settings(max_examples=60, deadline=None)
levels = st.integers(1, 45).flatmap(lambda n: hnp.arrays(np.int64, n, elements=st.integers(0, 12))).map(lambda a: a / 4)


def shares(inside, outside):
    """fpr95 and ood_accepted_at_95_id by trying every threshold."""
    thresholds = np.unique(np.r_[inside, outside])
    flagged = [(inside >= t).mean() for t in thresholds if (outside >= t).sum() >= 0.95 * len(outside) - 1e-9]
    accepted = [(outside <= t).mean() for t in thresholds if (inside <= t).sum() >= 0.95 * len(inside) - 1e-9]
    return min(flagged), min(accepted)


@few
@given(levels, levels)
def test_every_metric_is_its_definition(inside, outside):
    ood = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    scores = np.r_[inside, outside]
    wanted = [
        roc_auc_score(ood, scores),
        average_precision_score(ood, scores),
        average_precision_score(1 - ood, -scores),
        *shares(inside, outside),
    ]
    assert OodMetrics(inside, outside).value() == pytest.approx(wanted, abs=1e-12)
    apart = [
        Auroc(inside, outside),
        AveragePrecision(inside, outside),
        AveragePrecision(inside, outside, "id"),
        Fpr95(inside, outside),
        OodAcceptedAt95Id(inside, outside),
    ]
    assert [float(one.value()) for one in apart] == pytest.approx(wanted, abs=1e-12)


def test_fpr95_is_read_off_scikit_learns_curve():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=500), rng.normal(size=300) + 1
    false, true, _ = roc_curve(np.repeat([0, 1], [500, 300]), np.r_[inside, outside], drop_intermediate=False)
    assert metrics.fpr95(inside, outside) == pytest.approx(false[(true >= 0.95).argmax()])
    assert metrics.fpr95(-outside, -inside) == pytest.approx(metrics.ood_accepted_at_95_id(inside, outside))


@few
@given(levels, levels, st.data())
def test_scod_puts_mistakes_and_unseen_images_together(inside, outside, data):
    wrong = data.draw(hnp.arrays(bool, len(inside)))
    together, bad = np.r_[inside, outside], np.r_[wrong, np.ones(len(outside), bool)]
    value = ScodAuroc(inside, wrong, outside).value()
    if wrong.all():
        assert np.isnan(value)
    else:
        assert value == pytest.approx(roc_auc_score(bad, together), abs=1e-12)
    assert ScodAurc(inside, wrong, outside).value() == pytest.approx(Aurc(together, bad).value(), abs=1e-12)


def test_the_class_ratio_is_told():
    assert AveragePrecision([0, 1, 2], [3.0]).ratio == 0.25
    assert AveragePrecision([0, 1, 2], [3.0], "id").ratio == 0.75
    assert AveragePrecision(np.zeros(30), np.zeros(10)).value() == pytest.approx(0.25)  # chance is the ratio
    assert ScodAuroc([0, 1, 2], [0, 1, 1], [3.0, 4.0]).ratio == 0.5
    assert ScodAurc([0, 1, 2], [0, 1, 1], [3.0]).ratio == 0.25


def test_nothing_is_turned_round():
    for one in (metrics.aupr_out, metrics.aupr_in):
        assert one([0, 1], [2, 3]) == 1
        assert one([2, 3], [0, 1]) < 0.6
    assert metrics.fpr95([0, 1], [2, 3]) == 0
    assert metrics.fpr95([2, 3], [0, 1]) == 1
    assert metrics.ood_accepted_at_95_id([2, 3], [0, 1]) == 1
    assert metrics.scod_auroc([0, 1], [0, 1], [2]) == 1
    assert metrics.scod_aurc([0, 1], [0, 1], [2]) < metrics.scod_aurc([1, 0], [0, 1], [2])


@pytest.mark.parametrize("seed", range(3))
def test_counting_a_row_twice_is_giving_it_twice(seed):
    rng = np.random.default_rng(seed)
    inside, outside, wrong = rng.integers(0, 8, 40) / 8, rng.integers(3, 11, 25) / 8, rng.random(40) < 0.3
    drawn = [(rng.integers(0, 40, 40), rng.integers(0, 25, 25)) for _ in range(4)]
    counts = [
        np.stack([np.bincount(pair[k], minlength=n) for pair in drawn]).astype(float) for k, n in enumerate((40, 25))
    ]
    wanted = [OodMetrics(inside[a], outside[b]).value() for a, b in drawn]
    assert OodMetrics(inside, outside)(counts) == pytest.approx(np.stack(wanted), abs=1e-12)
    for make in (ScodAuroc, ScodAurc):
        wanted = [make(inside[a], wrong[a], outside[b]).value() for a, b in drawn]
        assert make(inside, wrong, outside)(counts) == pytest.approx(np.stack(wanted), abs=1e-12)


def test_golden_raw_temperatures(shared):
    golden = np.load(shared / "golden/tau/auroc_in80_out60_s180.npz")
    # the golden score grows with confidence and counts ID as positive: the same number, for tau = t / sigmoid(raw)
    tau_in, tau_out = (1 + np.exp(-golden[key].astype(np.float64)) for key in ("raw_in", "raw_out"))
    assert metrics.auroc(tau_in, tau_out) == pytest.approx(float(golden["auroc_sigmoid"]), abs=1e-6)
    squared = [-(golden[key].astype(np.float64) ** 2) for key in ("raw_in", "raw_out")]
    assert metrics.auroc(*squared) == pytest.approx(float(golden["auroc_reference"]), abs=1e-6)


@pytest.mark.parametrize("name", ["in60_out40_d8_k10_average_s170", "in40_out50_d6_k5_max_s171"])
def test_golden_knn_scores(shared, name):
    golden = np.load(shared / f"golden/tau/knn_ood_{name}.npz")
    found = float(OodMetrics(golden["score_in"], golden["score_out"]).value()[0])
    assert found == pytest.approx(float(golden["auroc"]), abs=1e-6)


# normal(0, 1) against normal(1, 1): d' = 1. At 95 % of either set, Phi(1.6449 - 1) of the other.
SHARE = 0.740489
TRUTH = {"auroc": 0.760250, "fpr95": SHARE, "ood_accepted_at_95_id": SHARE}


def _limits():
    """Average precision of both directions for equal numbers, by a sum over a fine grid."""
    from scipy.stats import norm

    t = np.linspace(-9, 10, 200_001)
    step = t[1] - t[0]
    out = norm.pdf(t - 1) * norm.sf(t - 1) / (norm.sf(t - 1) + norm.sf(t) + 1e-300)
    within = norm.pdf(t) * norm.cdf(t) / (norm.cdf(t) + norm.cdf(t - 1) + 1e-300)
    return {"aupr_out": out.sum() * step, "aupr_in": within.sum() * step}


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator, truth = np.random.default_rng(3), TRUTH | _limits()
    held = []
    for i in range(200):
        inside, outside = generator.normal(size=250), generator.normal(size=250) + 1
        curve = bootstrap_curve(OodMetrics(inside, outside), resamples=200, seed=i)
        held.append([c.low <= truth[name] <= c.high for name, c in zip(OodMetrics.NAMES, curve, strict=True)])
    coverage = dict(zip(OodMetrics.NAMES, np.mean(held, axis=0), strict=True))
    assert all(0.90 <= share <= 0.985 for share in coverage.values()), coverage


def test_scod_intervals_hold_the_truth_as_often_as_they_say():
    # u uniform and wrong with chance u for ID, u = 1 for OOD, equal numbers. Densities: right 2(1-u), mistakes 2u; two OOD
    # images for each mistake. Risk at a coverage c of all: c up to 1/2, then (1/4 + c - 1/2) / c.
    truth = (5 / 6 + 2) / 3, 5 / 8 - np.log(2) / 4
    generator, held = np.random.default_rng(4), []
    for i in range(200):
        u = generator.random(120)
        wrong = generator.random(120) < u
        both = [bootstrap(make(u, wrong, np.ones(120)), resamples=200, seed=i) for make in (ScodAuroc, ScodAurc)]
        held.append([one.low <= true <= one.high for one, true in zip(both, truth, strict=True)])
    assert all(0.90 <= share <= 0.985 for share in np.mean(held, axis=0)), np.mean(held, axis=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OodMetrics([], [1.0]), "ID uncertainty has shape"),
        (lambda: OodMetrics([0.0], [np.nan, 1.0]), r"OOD uncertainty is not finite in 1 of 2 rows \(rows 0\)"),
        (lambda: AveragePrecision([0.0], [1.0], "both"), "'ood' or 'id'"),
        (lambda: ScodAuroc([0.0, 1.0], [0], [1.0]), "lengths differ"),
        (lambda: ScodAurc([0.0, 1.0], [0, 2], [1.0]), "booleans"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(PosthocError, match=message):
        call()
