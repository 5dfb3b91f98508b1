"""Selective prediction against its definitions, orders of ties taken one by one; coverage of the intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

from posthoc import PosthocError
from posthoc.eval import metrics
from posthoc.eval.bootstrap import bootstrap
from posthoc.eval.selective_statistics import AccuracyAtCoverage, Augrc, ExcessAurc, FailureAuroc
from posthoc.eval.statistics import Aurc

few = settings(max_examples=50, deadline=None)
flags = st.integers(1, 40).flatmap(lambda n: hnp.arrays(bool, n))


@few
@given(st.data(), flags)
def test_augrc_is_its_closed_form_in_auroc_and_accuracy(data, wrong):
    u = data.draw(hnp.arrays(np.int64, len(wrong), elements=st.integers(0, 5)))
    error = wrong.mean()
    area = roc_auc_score(wrong, u) if 0 < error < 1 else 0.0
    wanted = (1 - area) * error * (1 - error) + error**2 / 2
    assert Augrc(u, wrong).value() == pytest.approx(wanted, abs=1e-12)
    failure = float(FailureAuroc(u, wrong).value())
    assert failure == pytest.approx(area, abs=1e-12) if 0 < error < 1 else np.isnan(failure)


def test_augrc_is_the_trapezoid_of_the_generalised_risk():
    rng = np.random.default_rng(0)
    u, wrong = rng.permutation(60), rng.random(60) < 0.3
    risk = np.r_[0, wrong[np.argsort(u)].cumsum()] / 60
    assert metrics.augrc(u, wrong) == pytest.approx(trapezoid(risk, dx=1 / 60))


@few
@given(flags)
def test_the_best_order_has_no_excess(wrong):
    assert ExcessAurc(wrong, wrong).value() <= Aurc(wrong, wrong).value() + 1e-12
    in_order = np.argsort(np.argsort(wrong, kind="stable"))
    assert ExcessAurc(in_order, wrong).value() == pytest.approx(0, abs=1e-12)
    assert ExcessAurc(-in_order, wrong).value() >= -1e-12


@few
@given(st.integers(1, 6), st.data())
def test_excess_is_against_the_best_of_all_orders(n, data):
    u, wrong = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 3))), data.draw(hnp.arrays(bool, n))
    best = min(Aurc(order, wrong).value() for order in itertools.permutations(range(n)))
    assert ExcessAurc(u, wrong).value() == pytest.approx(Aurc(u, wrong).value() - best, abs=1e-12)


def test_accuracy_at_coverage_is_that_of_the_most_certain():
    rng = np.random.default_rng(1)
    u, correct = rng.permutation(50), rng.random(50) < 0.7
    ordered = correct[np.argsort(u)]
    wanted = [ordered[:k].mean() for k in (5, 25, 40, 50)]
    assert metrics.accuracy_at_coverage(u, correct, [0.1, 0.5, 0.8, 1.0]) == pytest.approx(wanted)


@pytest.mark.parametrize("make", [ExcessAurc, Augrc, FailureAuroc, lambda a, b: AccuracyAtCoverage(a, b, 0.6)])
def test_counting_a_row_twice_is_giving_it_twice(make):
    rng = np.random.default_rng(2)
    u, wrong = rng.integers(0, 8, 40) / 8, rng.random(40) < 0.4
    drawn = rng.integers(0, 40, (5, 40))
    counts = np.stack([np.bincount(d, minlength=40) for d in drawn]).astype(float)
    wanted = np.stack([make(u[d], wrong[d]).value() for d in drawn])
    assert make(u, wrong)([counts]) == pytest.approx(wanted, abs=1e-12)


def test_golden_retrieval_errors(shared):
    golden = np.load(shared / "golden/mcinfonce/metrics_retrieval.npz")
    hit = golden["nn_correct"].astype(bool)
    u = 1 / golden["confidence"].astype(np.float64)
    assert FailureAuroc(u, ~hit).value() == pytest.approx(float(golden["r_auroc"]), abs=1e-6)
    kept = (80 - np.arange(80)) / 80  # the golden curve drops the least certain one by one
    assert metrics.accuracy_at_coverage(u, hit, kept) == pytest.approx(golden["erc_recall_at_1"], abs=1e-6)
    assert metrics.spearman(golden["confidence"], golden["neg_entropy"]) == pytest.approx(
        float(golden["rcorr_entropy"]), abs=1e-6
    )


COVERAGE = {  # u uniform and wrong with chance u: risk c/2 at coverage c, half the images are wrong
    "excess AURC": (ExcessAurc, 0.25 - (1 - np.log(2)) / 2),
    "AUGRC": (Augrc, 1 / 6),
    "failure AUROC": (FailureAuroc, 5 / 6),
    "accuracy at 50 %": (lambda u, wrong: AccuracyAtCoverage(u, ~wrong, 0.5), 0.75),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    make, truth = COVERAGE[name]
    generator, held = np.random.default_rng(5), []
    for i in range(200):
        u = generator.random(150)
        interval = bootstrap(make(u, generator.random(150) < u), resamples=200, seed=i)
        held.append(interval.low <= truth <= interval.high)
    assert 0.90 <= np.mean(held) <= 0.985


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Augrc([1.0, np.nan], [0, 1]), r"rows 1"),
        (lambda: ExcessAurc([1.0], [0, 1]), "lengths differ"),
        (lambda: AccuracyAtCoverage([1.0], [1], [0.0]), "above 0"),
        (lambda: AccuracyAtCoverage([1.0], [1], [1.5]), "not above 1"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(PosthocError, match=message):
        call()
