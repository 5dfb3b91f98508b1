"""What the CIFAR-10H recipe measures: figures against golden numbers, scales of folds, credible sets of true posteriors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from posthoc.adapters.training_loop import History
from posthoc.adapters.vmf import VonMisesFisher
from posthoc.eval.ambiguity import vote_entropy
from posthoc.eval.bootstrap import bootstrap_difference
from posthoc.eval.credible import SetReport
from posthoc.eval.statistics import Spearman
from posthoc.recipes.cifar10h_data import CifarH
from posthoc.recipes.cifar10h_report import (
    Fold,
    Judged,
    all_scores,
    ambiguity,
    comparable,
    credible_rows,
    credible_sets,
    retrieval,
    set_figures,
)
from posthoc.recipes.cifar10h_training import Answer


def _answer(embedding: np.ndarray, kappa: np.ndarray) -> Answer:
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    return Answer(unit.astype(np.float32), 1 / kappa, kappa)


def _judged(embedding: np.ndarray, kappa: np.ndarray, votes: np.ndarray, validation: int = 0) -> Judged:
    known = _answer(embedding, kappa)
    rows = np.arange(len(votes))
    part = [
        Answer(known.embedding[r], known.uncertainty[r], known.kappa[r]) for r in (rows[:validation], rows[validation:])
    ]
    whole = part[1] if validation else known
    history = History([{"step": 1, "train_loss": 0.0}], 0)
    fold = Fold(rows[:validation], rows[validation:], {}, history, 0.0, part[0] if validation else known, whole, whole)
    fractions = np.linspace(0.25, 1, len(rows))
    return Judged(
        CifarH(np.zeros((len(rows), 32, 32, 3), np.uint8), votes.astype(np.float32)), fractions, [fold], None, "1/kappa"
    )


def test_figures_are_the_references(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/metrics_retrieval.npz")
    votes = golden["soft_labels"]
    judged = _judged(golden["embeddings"], golden["confidence"].astype(float), votes)
    table = ambiguity(judged, all_scores(judged), 20, 0)
    assert table.cells["1/kappa"]["human_spearman"].value.value == pytest.approx(
        float(golden["rcorr_entropy"]), abs=1e-6
    )
    by_label = np.eye(int(golden["labels"].max()) + 1)[golden["labels"]]
    found, hit = retrieval(_judged(golden["embeddings"], golden["confidence"].astype(float), by_label), 20, 0)
    assert found.cells["embedding"]["recall_at_1"].value.value == pytest.approx(float(golden["recall_at_1"]), abs=1e-6)
    assert found.cells["embedding"]["map_at_r"].value.value == pytest.approx(float(golden["mapr"]), abs=1e-6)
    np.testing.assert_array_equal(hit, golden["nn_correct"].astype(bool))


def test_a_score_is_compared_with_the_entropy_of_as_many_views() -> None:
    rng = np.random.default_rng(0)
    votes = rng.dirichlet(np.full(3, 0.5), 200)
    judged = _judged(rng.normal(size=(200, 4)), np.ones(200), votes)
    doubt = vote_entropy(judged.data.votes)
    names = ("1/kappa", "entropy", "1/feature-norm")
    scores = {name: doubt[:, None] + rng.normal(0, 0.5, (200, 2)) for name in names}
    scores |= {f"{name}, two views": doubt[:, None] + rng.normal(0, 0.4, (200, 1)) for name in names[:2]}
    table = ambiguity(judged, scores, 50, 3)
    for own, reference in (("1/kappa", "entropy"), ("1/kappa, two views", "entropy, two views")):
        one, other = (Spearman(scores[name][:, 0], doubt) for name in (own, reference))
        cell = table.cells[own]["human_spearman"]
        assert cell.minus == bootstrap_difference(one, other, resamples=50, seed=3)
        assert table.cells[reference]["human_spearman"].minus is None
    assert set(table.cells["1/kappa, two views"]) == {"human_spearman"}
    assert "crop_spearman" in table.markdown()


def test_coverage_has_an_interval_over_the_queries_that_have_a_true_neighbour() -> None:
    rng = np.random.default_rng(1)
    missed = rng.beta(1, 8, 400)
    missed[:40] = np.nan
    report = SetReport(missed, (missed == 1).astype(float), np.full(400, 7), 20)
    found = set_figures(report, 500, 0)
    covered = 1 - missed[40:]
    assert found["coverage"] == pytest.approx(covered.mean())
    half = 1.96 * covered.std() / np.sqrt(360)
    assert found["coverage_low"] == pytest.approx(covered.mean() - half, abs=0.2 * half)
    assert found["coverage_high"] == pytest.approx(covered.mean() + half, abs=0.2 * half)


def test_scores_of_folds_share_a_scale() -> None:
    """A fold whose kappas are a power of another's says the same, and entropies are left alone."""
    kappa = np.exp(np.random.default_rng(0).normal(3, 1, 300))
    embedding = np.ones((300, 3))
    one = comparable([_answer(embedding, kappa)], [_answer(embedding, kappa)])
    other = comparable([_answer(embedding, 7 * kappa**1.7)] * 2, [_answer(embedding, 7 * kappa**1.7)] * 2)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    assert (np.argsort(one) == np.argsort(1 / kappa)).all()
    plain = Answer(embedding, kappa, logits=embedding)
    np.testing.assert_array_equal(comparable([plain, plain], [plain, plain]), kappa)


def test_credible_sets_of_true_posteriors_have_their_coverage() -> None:
    """Validation and test images are points round ten centres; a query's posterior is the true one of its neighbours."""
    rng = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(10, 8, generator=rng), dim=1)
    label = np.arange(3000) % 10
    kappa = np.where(label < 5, 20.0, 200.0)
    drawn = VonMisesFisher(centres[label], torch.from_numpy(kappa).float()).rsample((), rng).numpy()
    drawn[2000:] = centres[label[2000:]].numpy() + 1e-6
    judged = _judged(drawn, kappa, np.eye(10)[label], validation=2000)
    found = credible_sets(judged)
    assert found is not None
    assert 1 - float(found.nominal.missed.mean()) == pytest.approx(0.95, abs=0.02)
    rows = credible_rows(found)
    assert rows[0]["kappa"] < rows[-1]["kappa"]
    assert rows[0]["nominal_share"] > 1.15 * rows[-1]["nominal_share"]


def test_a_classifier_has_no_posterior() -> None:
    judged = _judged(np.random.default_rng(0).normal(size=(60, 4)), np.ones(60), np.eye(3)[np.arange(60) % 3], 30)
    fold = judged.folds[0]
    logits = Answer(fold.on_test.embedding, fold.on_test.uncertainty, logits=np.zeros((30, 3)))
    plain = replace(fold, on_validation=logits, on_test=logits, on_crops=logits)
    other = replace(judged, folds=[plain])
    assert credible_sets(other) is None
