"""Zero-shot transfer: R-AUROC against the golden numbers and scikit-learn, a fixed gallery, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import entropy, spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision import transforms

import posthoc
from posthoc import PosthocError
from posthoc.adapters.backbone import build_backbone
from posthoc.cli import main
from posthoc.eval.bootstrap import bootstrap, resampled_counts
from posthoc.eval.retrieval import retrieve, score_table
from posthoc.eval.search import directions
from posthoc.eval.statistics import Mean
from posthoc.eval.transfer import nearest_hits, transfer_table


def some(n=120, classes=12, seed=0):
    """Embeddings that half tell their class, labels, and a score that half tells the misses."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % classes
    embedding = (rng.normal(size=(n, 8)) + 1.5 * rng.normal(size=(classes, 8))[label]) * rng.random((n, 1))
    hits, _ = nearest_hits(embedding, label)
    return embedding, label, {"max-softmax": rng.normal(size=n), "head": rng.normal(size=n) - hits}


def test_golden_r_auroc_and_recall(shared: Path):
    golden = np.load(shared / "golden/mcinfonce/metrics_retrieval.npz")
    hits, known = nearest_hits(golden["embeddings"], golden["labels"])
    np.testing.assert_array_equal(hits, golden["nn_correct"].astype(bool))
    assert known.all()
    score = {"1/confidence": 1 / golden["confidence"]}
    table = transfer_table(
        score, golden["embeddings"], golden["labels"], votes=golden["soft_labels"], reference=None, resamples=20
    )
    row = table.cells["1/confidence"]
    assert row["r_auroc"].value.value == pytest.approx(float(golden["r_auroc"]), abs=1e-6)
    assert table.about["recall_at_1"]["value"] == pytest.approx(float(golden["r_at_1"]))
    # golden: confidence with minus the entropy; two signs cancel
    assert row["human_spearman"].value.value == pytest.approx(float(golden["rcorr_entropy"]), abs=1e-6)


def test_r_auroc_is_scikit_learns_and_queries_are_resampled_with_the_gallery_fixed():
    embedding, label, scores = some()
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    hits = label[cosine.argmax(1)] == label
    table = transfer_table(scores, embedding, label, resamples=50, seed=2)
    for name, u in scores.items():
        assert table.cells[name]["r_auroc"].value.value == pytest.approx(roc_auc_score(hits, -u))
    assert table.cells["head"]["r_auroc"].better
    drawn = []
    for (counts,) in resampled_counts((120,), 50, 2):
        for count in counts.astype(int):
            rows = np.repeat(np.arange(120), count)
            drawn.append(roc_auc_score(hits[rows], -scores["head"][rows]))
    found = table.cells["head"]["r_auroc"].value
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]))
    recall = bootstrap(Mean(hits), resamples=50, seed=2)
    assert table.about["recall_at_1"] == vars(recall)
    assert f"recall@1 of the embedding {recall}" in table.notes[1]


def test_recall_of_noise_stays_that_of_noise():
    """Resampling the gallery as well would let drawn doubles find each other: recall@1 of about .6 instead of .02."""
    rng = np.random.default_rng(0)
    label = np.arange(400) % 50
    table = transfer_table({"u": rng.random(400)}, rng.normal(size=(400, 16)), label, resamples=100)
    assert table.about["recall_at_1"]["high"] < 0.06


def test_the_random_score_is_seeded_and_has_crops_of_its_own():
    embedding, label, scores = some()
    crops = {name: np.stack([u, u + 1, u - 1], 1) for name, u in scores.items()}
    tables = [
        transfer_table(
            crops,
            embedding,
            label,
            fractions=(0.5, 0.2),
            votes=np.eye(12)[label] + 0.01 * label[:, None],
            resamples=20,
            seed=s,
        )
        for s in (0, 0, 1)
    ]
    first, again, other = (t.cells["random"] for t in tables)
    assert first == again
    assert first["r_auroc"] != other["r_auroc"]
    assert first["crop_less_certain"].value.value == pytest.approx(0.5, abs=0.1)
    assert tables[0].metrics == ("r_auroc", "crop_spearman", "crop_less_certain", "human_spearman")
    assert tables[0].cells["head"]["crop_less_certain"].value.value == pytest.approx(0.5)
    assert list(tables[0].cells) == ["max-softmax", "head", "random"]


def test_images_alone_in_their_class_take_no_part_as_in_retrieval():
    embedding, label, scores = some()
    label = label.copy()
    label[:7] = np.arange(99, 106)
    hits, known = nearest_hits(embedding, label)
    assert np.array_equal(np.flatnonzero(~known), np.arange(7))
    assert not hits[:7].any()
    table = transfer_table(scores, embedding, label, resamples=10)
    assert "7 images alone in their class are left out of it and of r_auroc" in table.notes[1]
    found = retrieve(directions("embedding", embedding), label)
    theirs = score_table(scores, found, reference="max-softmax", resamples=10)
    for name, u in scores.items():
        value = table.cells[name]["r_auroc"].value.value
        assert value == pytest.approx(roc_auc_score(hits[7:], -u[7:]))
        assert value == theirs.cells[name]["r_auroc"].value.value
    assert table.about["recall_at_1"]["value"] == pytest.approx(hits[7:].mean())
    soft = np.eye(106)[label]
    np.testing.assert_array_equal(nearest_hits(embedding, soft), (hits, known))


def test_what_tells_nothing_is_refused():
    embedding, label, scores = some()
    with pytest.raises(PosthocError, match="every image's nearest"):
        nearest_hits(embedding, np.zeros(120, int))
    with pytest.raises(PosthocError, match="no image's nearest"):
        nearest_hits(embedding, np.arange(120))
    with pytest.raises(PosthocError, match="lengths differ"):
        nearest_hits(embedding, label[:-1])
    with pytest.raises(PosthocError, match="neither labels nor votes nor crops"):
        transfer_table(scores, embedding, None)
    with pytest.raises(PosthocError, match="'head' is constant"):
        transfer_table({**scores, "head": np.zeros(120)}, embedding, label)


def test_the_command_on_images_and_stored_features(tmp_path, capsys, monkeypatch):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    backbone = build_backbone(network, transform=transforms.Compose([transforms.Resize(28), transforms.ToTensor()]))
    rng = np.random.default_rng(0)

    def pictures(n: int) -> tuple[np.ndarray, np.ndarray]:
        images = rng.integers(0, 90, (n, 28, 28, 3))
        images[np.arange(n), :, :, np.arange(n) % 3] += rng.integers(0, 30, n)[:, None, None]
        return images.astype(np.uint8), np.arange(n) % 3

    training = pictures(60)
    seen = backbone.extract(training, cache_dir=tmp_path / "store", progress=False)
    model = posthoc.wrap(backbone, "loss").fit(training, epochs=2, validation=0.3)
    images, label = pictures(30)
    for i, image in enumerate(images):
        at = tmp_path / "photos" / f"class{label[i]}"
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(at / f"{i:02}.png")
    stored = backbone.extract((images, label), cache_dir=tmp_path / "store", progress=False)
    votes = rng.integers(0, 9, (30, 3)) + 1
    np.save(tmp_path / "votes.npy", votes)
    monkeypatch.setattr("posthoc.eval.transfer.open_model", lambda *_: model)
    transfer = ["eval", "transfer", "--model", "adapter", "--resamples", "20", "--format", "json"]
    data = ["--data", str(tmp_path / "photos"), str(stored.folder), "--fractions", "0.5"]
    main([*transfer, *data, "--votes", f"photos={tmp_path / 'votes.npy'}"])
    photos, features = json.loads(capsys.readouterr().out)
    assert set(photos["scores"]["loss"]) == {"r_auroc", "crop_spearman", "crop_less_certain", "human_spearman"}
    assert set(features["scores"]["loss"]) == {"r_auroc"}
    assert any("no crops" in note for note in features["notes"])
    assert {"loss", "max-softmax", "1/feature-norm", "random"} <= set(photos["scores"])
    order = np.argsort(label, kind="stable")  # a folder is read class by class
    u = model.predict(images[order]).uncertainty.numpy()
    hits, _ = nearest_hits(np.asarray(stored.embedding)[order], label[order])
    assert photos["scores"]["loss"]["r_auroc"]["value"] == pytest.approx(roc_auc_score(~hits, u))
    assert features["scores"]["loss"]["r_auroc"]["value"] == pytest.approx(roc_auc_score(~hits, u))
    human = spearmanr(u, entropy(votes, axis=1)).statistic
    assert photos["scores"]["loss"]["human_spearman"]["value"] == pytest.approx(human)
    monkeypatch.setattr("posthoc.eval.transfer.score_all", None)
    monkeypatch.setattr("posthoc.eval.transfer.crop_scores", None)
    for more, message in (
        (["--votes", f"foto={tmp_path / 'votes.npy'}"], "--votes names foto; the data sets are photos"),
        (["--votes", "votes.npy"], "expected NAME=FILE"),
        (["--data", str(seen.folder)], "the heads of adapter were fitted on"),
        (["--data", "fashion-mnits"], "did you mean 'fashion-mnist'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*transfer, *data, *more])  # refused before anything is scored
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
