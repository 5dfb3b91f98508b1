"""Retrieval metrics: LAM's golden numbers, formulas one query at a time, and the edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc.adapters.errors import DataError
from posthoc.eval import metrics, retrieval_statistics, search
from posthoc.eval.bootstrap import bootstrap


@pytest.mark.parametrize("name", ["retrieval_a", "retrieval_b"])
def test_ranks_precision_and_recall_match_golden(shared: Path, name: str) -> None:
    golden = np.load(shared / f"golden/lam/{name}.npz")
    nearest = search.neighbours(golden["z"], k=20)
    np.testing.assert_array_equal(nearest, golden["ranks"])
    hits, positives = retrieval_statistics.label_hits(nearest, golden["labels"])
    for k, value in zip((5, 10, 20), golden["map_at_5_10_20"], strict=True):
        assert retrieval_statistics.lam_map_at(hits, positives, k) == pytest.approx(float(value), abs=1e-9)
    for k, value in zip((1, 5, 10, 20), golden["recall_at_1_5_10_20"], strict=True):
        assert retrieval_statistics.recall_at(hits, k) == pytest.approx(float(value), abs=1e-9)


@pytest.mark.parametrize("name", ["retrieval_a", "retrieval_b"])
def test_votes_and_their_calibration_match_golden(shared: Path, name: str) -> None:
    golden = np.load(shared / f"golden/lam/{name}.npz")
    predicted, confidence = retrieval_statistics.vote_confidence(
        retrieval_statistics.votes(golden["z_samples"].transpose(1, 0, 2), golden["labels"])
    )
    np.testing.assert_array_equal(predicted, golden["predicted"])
    np.testing.assert_allclose(confidence, golden["confidence"], rtol=1e-6)
    correct = predicted == golden["labels"]
    stored = golden["confidence"].astype(np.float64)  # float32: its shares lie a hair off the bins' edges
    for reference, key in ((True, "ece_ref"), (False, "ece_last_bin_inclusive")):
        assert retrieval_statistics.vote_ece(stored, correct, reference=reference) == pytest.approx(
            float(golden[key]), abs=1e-7
        )
    sizes, accuracy, mean = retrieval_statistics.vote_bins(stored, correct, reference=True)
    np.testing.assert_array_equal(sizes, golden["bin_sizes"])
    np.testing.assert_allclose(accuracy, golden["bin_acc"], atol=1e-7)
    np.testing.assert_allclose(mean, golden["bin_conf"], atol=1e-7)


def test_places_match_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/place_a.npz")
    nearest = search.neighbours(golden["zq"], golden["zd"], k=20)
    apart = np.linalg.norm(golden["utm_q"][:, None] - golden["utm_d"][None], axis=-1)
    near = apart < float(golden["pos_radius"])
    np.testing.assert_array_equal(near.sum(1), golden["n_pos"])
    hits = np.take_along_axis(near, nearest, 1)
    for k, value in zip((5, 10, 20), golden["map_at_5_10_20"], strict=True):
        assert retrieval_statistics.lam_map_at(hits, golden["n_pos"], k) == pytest.approx(float(value), abs=1e-9)
    for k, value in zip((1, 5, 10, 20), golden["recall_at_1_5_10_20"], strict=True):
        assert retrieval_statistics.recall_at(hits, k) == pytest.approx(float(value), abs=1e-9)
    if (golden["n_pos"] == 0).any():
        assert retrieval_statistics.map_at(hits, golden["n_pos"], 5) < retrieval_statistics.lam_map_at(
            hits, golden["n_pos"], 5
        )


def test_rejection_and_detection_match_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/predictive_a.npz")
    score, target = golden["ood_score"], golden["ood_target"].astype(bool)
    inside, outside = score[~target], score[target]
    np.testing.assert_allclose(np.r_[golden["z_sigma"].sum(1), golden["z_sigma_ood"].sum(1)], score, rtol=1e-8)
    assert metrics.auroc(inside, outside) == pytest.approx(float(golden["auroc"]), abs=1e-9)
    # the golden area sorts the curve by recall once more, equal recalls in no defined order: it is off by .0024
    found = retrieval_statistics.lam_aupr(inside, outside)
    assert found == pytest.approx(float(golden["auprc_trapz"]), abs=0.003)
    assert abs(metrics.aupr_out(inside, outside) - float(golden["auprc_trapz"])) > 0.003, "steps are another number"
    nearest = search.neighbours(golden["z_mu"])
    hits, _ = retrieval_statistics.label_hits(nearest, golden["labels"])
    both = retrieval_statistics.retrieval_uncertainty(golden["z_sigma"].mean(1), nearest)
    curve = retrieval_statistics.sparsification(both, hits[:, 0])
    np.testing.assert_allclose(curve, golden["sparsification_acc"], atol=1e-6)
    assert retrieval_statistics.ausc(both, hits[:, 0], reference=True) == pytest.approx(float(golden["ausc"]), abs=1e-6)


def test_the_papers_area_under_precision_and_recall_by_hand() -> None:
    found = retrieval_statistics.lam_aupr(np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    assert found == pytest.approx(0.5 * 1.0 + 0.5 * (1 / 2 + 2 / 3) / 2)
    tied = retrieval_statistics.lam_aupr(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    assert tied == pytest.approx(0.5 * 1.0 + 0.5 * (1 + 2 / 3) / 2)
    assert retrieval_statistics.lam_aupr(np.zeros(3), np.ones(2)) == 1.0


def test_average_precision_by_hand() -> None:
    hits = np.array([[True, False, True], [False, False, True], [False, False, False], [True, True, True]])
    positives = np.array([2, 5, 0, 3])
    found = retrieval_statistics.average_precision_at(hits, positives, 3)
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, (1 / 3) / 3, np.nan, 1.0])
    assert retrieval_statistics.map_at(hits, positives, 3) == pytest.approx((5 / 6 + 1 / 9 + 1) / 3)
    assert retrieval_statistics.lam_map_at(hits, positives, 3) == pytest.approx((5 / 6 + 1 / 9 + 1 + 1) / 4)
    with pytest.raises(DataError, match="no query has a positive"):
        retrieval_statistics.map_at(hits, np.zeros(4, dtype=int), 3)


def test_positives_are_counted_without_the_query() -> None:
    label = np.array([0, 0, 1, 2])
    hits, positives = retrieval_statistics.label_hits(np.array([[1], [0], [0], [0]]), label)
    assert positives.tolist() == [1, 1, 0, 0]
    assert hits.ravel().tolist() == [True, True, False, False]
    hits, positives = retrieval_statistics.label_hits(np.array([[1], [0], [2], [0]]), label, np.array([0, 1, 1, 7]))
    assert positives.tolist() == [1, 1, 2, 0]
    assert hits.ravel().tolist() == [False, True, True, False]


def test_calibration_keeps_certainty_unless_told_not_to() -> None:
    confidence, correct = np.array([1.0, 1.0, 0.5, 0.5]), np.array([True, False, True, False])
    assert retrieval_statistics.vote_ece(confidence, correct) == pytest.approx(0.25)
    assert retrieval_statistics.vote_ece(confidence, correct, reference=True) == 0.0
    with pytest.raises(DataError, match="no confidence falls"):
        retrieval_statistics.vote_ece(np.ones(3), np.ones(3, bool), reference=True)
    with pytest.raises(DataError, match=r"0\.\.1"):
        retrieval_statistics.vote_ece(np.array([1.2]), np.array([True]))


def test_votes_by_hand() -> None:
    cast = np.array([[3, 1], [3, 2], [5, 2], [5, 1]])
    predicted, confidence = retrieval_statistics.vote_confidence(cast)
    assert predicted.tolist() == [3, 1]  # of equal ones the smallest
    assert confidence.tolist() == [0.5, 0.5]
    gallery = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    query = np.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert retrieval_statistics.votes(query, np.array([9]), gallery, np.array([4, 6])).tolist() == [[4], [6]]


def test_a_perfect_model_scores_one() -> None:
    uncertainty = np.random.default_rng(0).random(200)
    assert retrieval_statistics.ausc(uncertainty, np.ones(200, bool)) == pytest.approx(1.0)
    assert retrieval_statistics.ausc(uncertainty, np.ones(200, bool), reference=True) == pytest.approx(98 / 99)
    wrong_last = uncertainty < 0.8
    assert (
        retrieval_statistics.ausc(uncertainty, wrong_last) > 0.95 > retrieval_statistics.ausc(-uncertainty, wrong_last)
    )
    assert retrieval_statistics.sparsification(np.array([1.0, 2.0]), np.array([True, False])).tolist()[-1] == 1.0


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(DataError, match="k=2"):
        retrieval_statistics.recall_at(np.ones((3, 1), bool), 2)
    with pytest.raises(DataError, match=r"one label for each row .*\(3,\) and \(0,\)"):
        retrieval_statistics.label_hits(np.zeros((3, 1), int), np.arange(3), np.arange(0))
    with pytest.raises(DataError, match="not defined"):
        retrieval_statistics.map_at_r(np.ones((3, 1), bool), np.zeros(3, int))


def test_classes_and_their_rejection_match_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/metrics_retrieval.npz")
    z, label, u = search.directions("z", golden["embeddings"]), golden["labels"], -golden["confidence"]
    hits, positives = retrieval_statistics.label_hits(search.neighbours(z, k=79), label)
    np.testing.assert_array_equal(hits[:, 0], golden["nn_correct"])
    for k in (1, 5):
        assert retrieval_statistics.recall_at(hits, k) == pytest.approx(float(golden[f"recall_at_{k}"]), abs=1e-6)
    assert retrieval_statistics.map_at_r(hits, positives) == pytest.approx(float(golden["mapr"]), abs=1e-6)
    precision = retrieval_statistics.average_precision_at_r(hits, positives)
    curve = retrieval_statistics.sparsification(u, precision, np.arange(80) / 80)
    assert 1 - curve.mean() == pytest.approx(float(golden["erc_mapr"]), abs=1e-6)
    curve = retrieval_statistics.sparsification(u, hits[:, 0], np.arange(80) / 80)
    np.testing.assert_allclose(curve, golden["erc_recall_at_1"], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 5))
def test_average_precision_one_query_at_a_time(seed: int, rows: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    z, label = search.as_unit(rng.normal(size=(rows, 3))), rng.integers(0, classes, rows)
    hits, positives = retrieval_statistics.label_hits(search.neighbours(z, k=rows - 1), label)
    found = retrieval_statistics.average_precision_at_r(hits, positives)
    for q in range(rows):
        others = [j for j in np.argsort(-(z @ z[q]), kind="stable") if j != q]
        right = [label[j] == label[q] for j in others]
        r = sum(right)
        assert positives[q] == r
        if r:
            wanted = sum(sum(right[: i + 1]) / (i + 1) for i in range(r) if right[i]) / r
            assert found[q] == pytest.approx(wanted)
        else:
            assert np.isnan(found[q])


def test_ties_are_left_out_in_proportion_and_means_are_of_the_queries_that_have_them() -> None:
    correct = np.arange(1000) % 2 == 0
    assert retrieval_statistics.ausc(np.ones(1000), correct) == pytest.approx(0.5)
    order = np.argsort(~correct, kind="stable")
    assert retrieval_statistics.ausc(np.ones(1000), correct[order]) == pytest.approx(0.5)  # whatever the rows' order
    values = np.array([[1.0, np.nan], [0.0, 4.0], [0.5, np.nan]])
    means = retrieval_statistics.KnownMeans(values)
    assert means.value().tolist() == [0.5, 4.0]
    counts = [np.array([[2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])]
    np.testing.assert_allclose(means(counts), [[2 / 3, 4.0], [2 / 3, np.nan]])


def test_shares_of_votes_have_an_interval() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.integers(1, 11, 400) / 10
    correct = rng.random(400) < confidence
    statistic = retrieval_statistics.VoteEce(confidence, correct)
    assert statistic.value() == pytest.approx(retrieval_statistics.vote_ece(confidence, correct))
    interval = bootstrap(statistic, resamples=200)
    assert interval.low == 0.0 < interval.high  # calibrated: no larger than noise
    assert bootstrap(retrieval_statistics.VoteEce(confidence, ~correct), resamples=200).low > 0.3
