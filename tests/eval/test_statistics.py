"""Every metric against its definition by brute force and against other libraries, on random input with many ties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from posthoc import PosthocError
from posthoc.eval.statistics import Aurc, Auroc, Ece, Mean, Pairs, SelectiveAccuracy, Spearman

few = settings(max_examples=60, deadline=None)


def levels(n, m=6):
    """Scores on a few levels, so that ties are the rule."""
    return hnp.arrays(np.int64, n, elements=st.integers(0, m)).map(lambda a: a / 4)


def rows(rng, n, r=5):
    """Counts [r, n] of resamples, and the row numbers they stand for."""
    drawn = rng.integers(0, n, (r, n))
    return np.stack([np.bincount(d, minlength=n) for d in drawn]).astype(float), drawn


@few
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_auroc_is_scikit_learns_and_the_share_of_pairs(n, m, data):
    inside, outside = data.draw(levels(n)), data.draw(levels(m))
    value = Auroc(inside, outside).value()
    truth = np.r_[np.zeros(n), np.ones(m)]
    assert value == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]), abs=1e-12)
    pairs = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    assert value == pytest.approx(pairs.mean(), abs=1e-12)


def test_pairs_are_counted_as_often_as_their_rows_and_without_any_there_is_no_share():
    low, high = np.array([1.0, 3.0]), np.array([2.0, 3.0])
    counts = np.array([[1.0, 1.0], [2.0, 0.0], [1.0, 3.0], [0.0, 0.0]]), np.array([[1.0, 1.0]] * 3 + [[1.0, 0.0]])
    np.testing.assert_array_equal(Pairs(low, high)(*counts), [2.5 / 4, 1.0, 3.5 / 8, np.nan])
    np.testing.assert_array_equal(Pairs(low, high[:0])(counts[0], np.empty((4, 0))), [np.nan] * 4)
    np.testing.assert_array_equal(Pairs(low[:0], high)(np.empty((4, 0)), counts[1]), [np.nan] * 4)


@few
@given(st.integers(3, 40), st.data())
def test_spearman_is_scipys(n, data):
    x, y = data.draw(levels(n)), data.draw(levels(n))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        with pytest.raises(PosthocError, match="constant"):
            Spearman(x, y)
        return
    assert Spearman(x, y).value() == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_pools_the_pairs_of_an_image():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)).round(1), rng.normal(size=(20, 3)).round(1)
    assert Spearman(x, y).value() == pytest.approx(spearmanr(x.ravel(), y.ravel()).statistic)
    counts, drawn = rows(rng, 20)
    wanted = [spearmanr(x[d].ravel(), y[d].ravel()).statistic for d in drawn]
    assert Spearman(x, y)([counts]) == pytest.approx(wanted)


@few
@given(st.integers(1, 7), st.data())
def test_aurc_is_the_mean_over_all_orders_of_ties(n, data):
    u, wrong = data.draw(levels(n, 3)), data.draw(hnp.arrays(bool, n))
    areas = []
    for order in itertools.permutations(range(n)):
        if np.all(np.diff(u[list(order)]) >= 0):
            errors = wrong[list(order)].cumsum()
            areas.append(np.mean(errors / np.arange(1, n + 1)))
    assert Aurc(u, wrong).value() == pytest.approx(np.mean(areas), abs=1e-12)


def test_selective_accuracy_is_the_accuracy_of_the_most_certain():
    rng = np.random.default_rng(1)
    u, correct = rng.permutation(50).astype(float), rng.random(50) < 0.7
    rejected = np.arange(0, 50) / 50
    ordered = correct[np.argsort(u)]
    wanted = [ordered[: 50 - k].mean() for k in range(50)]
    assert SelectiveAccuracy(u, correct, rejected).value() == pytest.approx(wanted)


def test_ties_are_kept_in_proportion():
    curve = SelectiveAccuracy(np.zeros(10), np.r_[np.ones(7), np.zeros(3)], [0.0, 0.5, 0.8]).value()
    assert curve == pytest.approx([0.7, 0.7, 0.7])


def test_ece_by_hand_and_by_torchmetrics():
    from torch import tensor
    from torchmetrics.functional.classification import binary_calibration_error

    assert Ece([0.95, 0.95, 0.55, 1.0], [1, 0, 1, 1], bins=10).value() == pytest.approx(
        (2 * abs(1.95 - 2) / 2 * 0 + abs(0.95 + 0.95 + 1.0 - 2) + abs(0.55 - 1)) / 4
    )
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(0.01, 0.99, 400), rng.random(400) < 0.6
    theirs = binary_calibration_error(tensor(confidence), tensor(correct).int(), n_bins=15)
    assert Ece(confidence, correct).value() == pytest.approx(float(theirs), abs=1e-9)


def test_ece_bins_are_closed_above():
    # 0.5 belongs to (0, 0.5] of two bins: alone there, its gap does not cancel against 0.6's
    assert Ece([0.5, 0.6], [1, 0], bins=2).value() == pytest.approx((0.5 + 0.6) / 2)
    assert Ece([0.0], [0], bins=2).value() == 0


def test_mean_weighs_rows():
    assert Mean([1.0, 2.0, 6.0])([np.array([[1.0, 1, 1], [0, 3, 0]])]) == pytest.approx([3, 2])


@pytest.mark.parametrize("seed", range(5))
def test_counting_a_row_twice_is_giving_it_twice(seed):
    rng = np.random.default_rng(seed)
    u, flag = rng.integers(0, 8, 40) / 8, rng.random(40) < 0.6
    counts, drawn = rows(rng, 40)
    for make in (Aurc, Ece, lambda a, b: SelectiveAccuracy(a, b, [0, 0.3, 0.77]), lambda a, b: Mean(a * b)):
        wanted = np.stack([make(u[d], flag[d]).value() for d in drawn])
        assert make(u, flag)([counts]) == pytest.approx(wanted, abs=1e-12)
    other, other_drawn = rows(rng, 30)
    v = rng.integers(2, 10, 30) / 8
    wanted = [Auroc(u[d], v[e]).value() for d, e in zip(drawn, other_drawn, strict=True)]
    assert Auroc(u, v)([counts, other]) == pytest.approx(wanted)


def test_higher_uncertainty_is_the_positive_side_everywhere():
    assert Auroc([0, 1], [2, 3]).value() == 1
    assert Auroc([2, 3], [0, 1]).value() == 0  # and nothing turns it round
    assert Aurc([0, 1], [0, 1]).value() < Aurc([1, 0], [0, 1]).value()
    assert SelectiveAccuracy([0, 1], [1, 0], [0.5]).value() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Auroc([], [1.0]), "ID uncertainty has shape"),
        (lambda: Auroc([0.0, np.nan, 1.0], [1.0]), r"not finite in 1 of 3 rows \(rows 1\)"),
        (lambda: Spearman([1.0, 2.0], [1.0, 2.0, 3.0]), "same shape"),
        (lambda: Aurc([1.0, 2.0], [0, 1, 1]), "lengths differ"),
        (lambda: Aurc([1.0, 2.0], [0, 2]), "booleans"),
        (lambda: Ece([0.5, 1.2], [0, 1]), "0..1"),
        (lambda: Ece([0.5], [1], bins=0), "bins=0"),
        (lambda: SelectiveAccuracy([1.0], [1], [1.0]), "below 1"),
    ],
)
def test_bad_input_is_one_clear_error(make, message):
    with pytest.raises(PosthocError, match=message):
        make()
