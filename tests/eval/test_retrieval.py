"""Retrieval metrics: LAM's golden numbers, formulas one query at a time, and the edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posthoc.adapters.errors import DataError
from posthoc.eval import metrics, retrieval


@pytest.mark.parametrize("name", ["retrieval_a", "retrieval_b"])
def test_ranks_precision_and_recall_match_golden(shared: Path, name: str) -> None:
    golden = np.load(shared / f"golden/lam/{name}.npz")
    nearest = retrieval.neighbours(golden["z"], k=20)
    np.testing.assert_array_equal(nearest, golden["ranks"])
    hits, positives = retrieval.label_hits(nearest, golden["labels"])
    for k, value in zip((5, 10, 20), golden["map_at_5_10_20"], strict=True):
        assert retrieval.lam_map_at(hits, positives, k) == pytest.approx(float(value), abs=1e-9)
    for k, value in zip((1, 5, 10, 20), golden["recall_at_1_5_10_20"], strict=True):
        assert retrieval.recall_at(hits, k) == pytest.approx(float(value), abs=1e-9)


@pytest.mark.parametrize("name", ["retrieval_a", "retrieval_b"])
def test_votes_and_their_calibration_match_golden(shared: Path, name: str) -> None:
    golden = np.load(shared / f"golden/lam/{name}.npz")
    predicted, confidence = retrieval.vote_confidence(
        retrieval.votes(golden["z_samples"].transpose(1, 0, 2), golden["labels"])
    )
    np.testing.assert_array_equal(predicted, golden["predicted"])
    np.testing.assert_allclose(confidence, golden["confidence"], rtol=1e-6)
    correct = predicted == golden["labels"]
    stored = golden["confidence"].astype(np.float64)  # float32: its shares lie a hair off the bins' edges
    for reference, key in ((True, "ece_ref"), (False, "ece_last_bin_inclusive")):
        assert retrieval.vote_ece(stored, correct, reference=reference) == pytest.approx(float(golden[key]), abs=1e-7)
    sizes, accuracy, mean = retrieval.vote_bins(stored, correct, reference=True)
    np.testing.assert_array_equal(sizes, golden["bin_sizes"])
    np.testing.assert_allclose(accuracy, golden["bin_acc"], atol=1e-7)
    np.testing.assert_allclose(mean, golden["bin_conf"], atol=1e-7)


def test_places_match_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/place_a.npz")
    nearest = retrieval.neighbours(golden["zq"], golden["zd"], k=20)
    apart = np.linalg.norm(golden["utm_q"][:, None] - golden["utm_d"][None], axis=-1)
    near = apart < float(golden["pos_radius"])
    np.testing.assert_array_equal(near.sum(1), golden["n_pos"])
    hits = np.take_along_axis(near, nearest, 1)
    for k, value in zip((5, 10, 20), golden["map_at_5_10_20"], strict=True):
        assert retrieval.lam_map_at(hits, golden["n_pos"], k) == pytest.approx(float(value), abs=1e-9)
    for k, value in zip((1, 5, 10, 20), golden["recall_at_1_5_10_20"], strict=True):
        assert retrieval.recall_at(hits, k) == pytest.approx(float(value), abs=1e-9)
    if (golden["n_pos"] == 0).any():
        assert retrieval.map_at(hits, golden["n_pos"], 5) < retrieval.lam_map_at(hits, golden["n_pos"], 5)


def test_rejection_and_detection_match_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/predictive_a.npz")
    precision_recall_curve = pytest.importorskip("sklearn.metrics").precision_recall_curve
    score, target = golden["ood_score"], golden["ood_target"].astype(bool)
    inside, outside = score[~target], score[target]
    np.testing.assert_allclose(np.r_[golden["z_sigma"].sum(1), golden["z_sigma_ood"].sum(1)], score, rtol=1e-8)
    assert metrics.auroc(inside, outside) == pytest.approx(float(golden["auroc"]), abs=1e-9)
    precision, recall, _ = precision_recall_curve(target, score)
    # the golden area sorts the curve by recall once more, equal recalls in no defined order: it is off by .0024
    assert -np.diff(recall) @ (precision[1:] + precision[:-1]) / 2 == pytest.approx(
        float(golden["auprc_trapz"]), abs=0.003
    )
    nearest = retrieval.neighbours(golden["z_mu"])
    hits, _ = retrieval.label_hits(nearest, golden["labels"])
    both = retrieval.retrieval_uncertainty(golden["z_sigma"].mean(1), nearest)
    curve = retrieval.sparsification(both, hits[:, 0])
    np.testing.assert_allclose(curve, golden["sparsification_acc"], atol=1e-6)
    assert retrieval.ausc(both, hits[:, 0], reference=True) == pytest.approx(float(golden["ausc"]), abs=1e-6)


def test_equal_images_find_each_other_but_never_themselves() -> None:
    z = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert retrieval.neighbours(z).ravel().tolist() == [1, 0, 3, 2]
    assert retrieval.neighbours(z[:2]).ravel().tolist() == [1, 0]


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    z = retrieval.as_unit(rng.normal(size=(40, 5)))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1.0)
    whole = retrieval.neighbours(z, k=7), retrieval.neighbours(z[:9], z, k=7)
    monkeypatch.setattr(retrieval, "CHUNK_NUMBERS", 120)
    for before, after in zip(whole, (retrieval.neighbours(z, k=7), retrieval.neighbours(z[:9], z, k=7)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_average_precision_by_hand() -> None:
    hits = np.array([[True, False, True], [False, False, True], [False, False, False], [True, True, True]])
    positives = np.array([2, 5, 0, 3])
    found = retrieval.average_precision_at(hits, positives, 3)
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, (1 / 3) / 3, np.nan, 1.0])
    assert retrieval.map_at(hits, positives, 3) == pytest.approx((5 / 6 + 1 / 9 + 1) / 3)
    assert retrieval.lam_map_at(hits, positives, 3) == pytest.approx((5 / 6 + 1 / 9 + 1 + 1) / 4)
    with pytest.raises(DataError, match="no query has a positive"):
        retrieval.map_at(hits, np.zeros(4, dtype=int), 3)


def test_positives_are_counted_without_the_query() -> None:
    label = np.array([0, 0, 1, 2])
    hits, positives = retrieval.label_hits(np.array([[1], [0], [0], [0]]), label)
    assert positives.tolist() == [1, 1, 0, 0]
    assert hits.ravel().tolist() == [True, True, False, False]
    hits, positives = retrieval.label_hits(np.array([[1], [0], [2], [0]]), label, np.array([0, 1, 1, 7]))
    assert positives.tolist() == [1, 1, 2, 0]
    assert hits.ravel().tolist() == [False, True, True, False]


def test_calibration_keeps_certainty_unless_told_not_to() -> None:
    confidence, correct = np.array([1.0, 1.0, 0.5, 0.5]), np.array([True, False, True, False])
    assert retrieval.vote_ece(confidence, correct) == pytest.approx(0.25)
    assert retrieval.vote_ece(confidence, correct, reference=True) == 0.0
    with pytest.raises(DataError, match="no confidence falls"):
        retrieval.vote_ece(np.ones(3), np.ones(3, bool), reference=True)
    with pytest.raises(DataError, match=r"0\.\.1"):
        retrieval.vote_ece(np.array([1.2]), np.array([True]))


def test_votes_by_hand() -> None:
    cast = np.array([[3, 1], [3, 2], [5, 2], [5, 1]])
    predicted, confidence = retrieval.vote_confidence(cast)
    assert predicted.tolist() == [3, 1]  # of equal ones the smallest
    assert confidence.tolist() == [0.5, 0.5]
    gallery = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    query = np.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert retrieval.votes(query, np.array([9]), gallery, np.array([4, 6])).tolist() == [[4], [6]]


def test_a_perfect_model_scores_one() -> None:
    uncertainty = np.random.default_rng(0).random(200)
    assert retrieval.ausc(uncertainty, np.ones(200, bool)) == pytest.approx(1.0)
    assert retrieval.ausc(uncertainty, np.ones(200, bool), reference=True) == pytest.approx(98 / 99)
    wrong_last = uncertainty < 0.8
    assert retrieval.ausc(uncertainty, wrong_last) > 0.95 > retrieval.ausc(-uncertainty, wrong_last)
    assert retrieval.sparsification(np.array([1.0, 2.0]), np.array([True, False])).tolist()[-1] == 1.0


def test_wrong_shapes_are_named() -> None:
    z = np.eye(3)
    with pytest.raises(DataError, match="k <= 2"):
        retrieval.neighbours(z, k=3)
    with pytest.raises(DataError, match=r"\(3, 3\), \(3, 2\)"):
        retrieval.neighbours(z, z[:, :2])
    with pytest.raises(DataError, match="k=2"):
        retrieval.recall_at(np.ones((3, 1), bool), 2)
