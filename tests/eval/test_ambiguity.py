"""Ambiguity: entropy of votes, rank correlations against SciPy, crops resampled with their image, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.stats import entropy, spearmanr
from torch import nn
from torchvision import transforms

import posthoc
from posthoc import PosthocError
from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.errors import DataError
from posthoc.adapters.perturbations import center_crop
from posthoc.cli import main
from posthoc.eval.ambiguity import ambiguity_table, crop_scores, read_votes, vote_entropy
from posthoc.eval.baselines import entropy as softmax_entropy

FEW = ["--resamples", "20"]


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=st.integers(0, 60)))
def test_vote_entropy_is_scipys_for_counts_and_shares(votes):
    votes[:, 0] += 1
    found = vote_entropy(votes)
    np.testing.assert_allclose(found, entropy(votes, axis=1), atol=1e-12)
    np.testing.assert_allclose(found, vote_entropy(votes / votes.sum(1, keepdims=True)), atol=1e-12)
    assert found.min() >= 0
    assert found.max() <= np.log(votes.shape[1]) + 1e-12


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (np.ones(4), r"shape \(4,\)"),
        (np.ones((4, 1)), "at least 2 classes"),
        (np.array([[1, 2], [0, 0], [3, 1]]), r"1 of 3 images have no vote \(first: row 1\)"),
        (np.array([[1.0, 2.0], [2.0, -1.0]]), "row 1 has -1"),
        (np.array([[1.0, np.nan]]), "not finite in 1 of 1 rows"),
    ],
)
def test_votes_that_are_none_are_one_clear_error(votes, message):
    with pytest.raises(PosthocError, match=message):
        vote_entropy(votes)


def test_columns_are_scipys_correlations_and_the_plain_share():
    rng = np.random.default_rng(0)
    votes, fractions = rng.integers(0, 9, (60, 4)) + 1, (0.8, 0.5, 0.25)
    base = rng.normal(size=(60, 1))
    scores = {"max-softmax": base + rng.normal(size=(60, 4)), "head": base + np.array([0, 0.3, 0.8, 1.4]) + 0 * base}
    table = ambiguity_table(scores, votes=votes, fractions=fractions, resamples=40)
    assert table.metrics == ("human_spearman", "crop_spearman", "crop_less_certain")
    cut = np.tile([0, 0.2, 0.5, 0.75], (60, 1))
    for name, u in scores.items():
        row = {metric: cell.value.value for metric, cell in table.cells[name].items()}
        assert row["human_spearman"] == pytest.approx(spearmanr(u[:, 0], entropy(votes, axis=1)).statistic)
        assert row["crop_spearman"] == pytest.approx(spearmanr(u.ravel(), cut.ravel()).statistic)
        assert row["crop_less_certain"] == pytest.approx((u[:, 1:] > u[:, :1]).mean())
        each = [one["value"] for one in table.about["less_certain_by_fraction"][name]]
        np.testing.assert_allclose(each, (u[:, 1:] > u[:, :1]).mean(0))
    head = table.cells["head"]["crop_less_certain"]
    assert head.value.value == 1
    assert head.better
    assert head.minus.value == pytest.approx(1 - table.cells["max-softmax"]["crop_less_certain"].value.value)
    json.dumps(table.as_dict(), allow_nan=False)


def test_a_tie_is_no_rise():
    u = np.array([[0.0, 0.0, 1.0], [1.0, 0.5, 1.0], [2.0, 2.0, 2.5]])
    table = ambiguity_table({"u": u}, fractions=(0.5, 0.2), resamples=10)
    assert table.cells["u"]["crop_less_certain"].value.value == pytest.approx(2 / 6)


def test_crops_are_resampled_with_their_image():
    """Four equal crops of an image tell no more than one: the interval must not become narrower."""
    rng = np.random.default_rng(0)
    whole, crop = rng.normal(size=(2, 80, 1))
    one = ambiguity_table({"u": np.hstack([whole, crop])}, fractions=(0.5,), resamples=200)
    four = ambiguity_table({"u": np.hstack([whole] + [crop] * 4)}, fractions=(0.5,) * 4, resamples=200)
    a, b = (t.cells["u"]["crop_less_certain"].value for t in (one, four))
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert a.high - a.low > 0.15


def test_tables_without_anything_to_compare_with_are_refused():
    u = np.arange(6.0)
    with pytest.raises(PosthocError, match="neither votes nor crop fractions"):
        ambiguity_table({"u": u})
    with pytest.raises(PosthocError, match=r"expected \[N, 3\]"):
        ambiguity_table({"u": u}, fractions=(0.5, 0.2))
    with pytest.raises(PosthocError, match="'u' is constant"):
        ambiguity_table({"u": np.ones(6)}, votes=np.eye(6))
    with pytest.raises(PosthocError, match="y is constant"):
        ambiguity_table({"u": u}, votes=np.ones((6, 2)))
    with pytest.raises(PosthocError, match="same shape"):
        ambiguity_table({"u": u}, votes=np.arange(10).reshape(5, 2))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_votes_are_shares_or_counts(tmp_path, kind):
    counts = np.random.default_rng(0).integers(0, 30, (50, 10)) + np.eye(10, dtype=int)[0]
    table = counts if kind is np.int64 else counts / counts.sum(1, keepdims=True)
    np.save(tmp_path / "votes.npy", table.astype(kind))
    for classes in (None, 10):
        read = read_votes(tmp_path / "votes.npy", 50, classes)
        assert read.dtype == np.float64
        np.testing.assert_allclose(read, counts / counts.sum(1, keepdims=True), rtol=1e-6)


def _spoilt(number):
    """Votes of 50 images, of which row 31 and a later one have a number that is none of votes."""
    votes = np.full((50, 10), 0.1)
    votes[[31, 40], [4, 2]] = number
    return votes


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (np.ones((49, 10)) / 10, r"49 rows, expected 50: expected a .npy array of votes \[50, 10\]"),
        (np.ones((50, 3)) / 3, r"3 columns, expected 10"),
        (np.ones(50), r"holds float64 \[50\]; expected a .npy array of votes \[50, 10\]"),
        (np.full((50, 10), "many"), r"holds <U4 \[50, 10\]"),
        (np.full((50, 10), None), r"no .npy file of plain numbers; expected a .npy array of votes \[50, 10\]"),
        (np.full((50, 10), 0.11), r"50 rows do not sum to 1 \(first: row 0, 1.1\)"),
        (np.zeros((50, 10), int), "at least one for each image"),
        (_spoilt(-0.1), r"row 31 has -0.1 in column 4, the first of 2 such numbers; .*not negative"),
        (_spoilt(np.nan), r"row 31 has nan in column 4.*finite"),
        (_spoilt(np.inf), r"row 31 has inf in column 4.*finite"),
    ],
)
def test_a_wrong_file_of_votes_is_refused(tmp_path, votes, message):
    np.save(tmp_path / "votes.npy", votes)
    with pytest.raises(DataError, match=message) as refused:
        read_votes(tmp_path / "votes.npy", 50, 10)
    assert "allow_pickle" not in str(refused.value)


def test_without_their_number_any_classes_are_read(tmp_path):
    np.save(tmp_path / "votes.npy", np.ones((4, 3)))
    np.testing.assert_array_equal(read_votes(tmp_path / "votes.npy", 4), np.full((4, 3), 1 / 3))
    with pytest.raises(DataError, match=r"4 rows, expected 5: expected a .npy array of votes \[5, C\]"):
        read_votes(tmp_path / "votes.npy", 5)


def test_what_is_no_file_of_votes_is_refused(tmp_path):
    path = tmp_path / "votes.npy"
    with pytest.raises(DataError, match=r"there is no file .*votes.npy; expected a .npy array of votes \[50, C\]"):
        read_votes(path, 50)
    for content in (b"0.1, 0.9", b"", b"PK\x03\x04 torn"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no .npy file of plain numbers") as refused:
            read_votes(path, 50)
        assert "allow_pickle" not in str(refused.value)
    np.savez(tmp_path / "votes.npz", votes=np.eye(10))
    with pytest.raises(DataError, match="an archive of arrays"):
        read_votes(tmp_path / "votes.npz", 10)
    with pytest.raises(DataError, match="cannot read votes from"):
        read_votes(tmp_path, 10)


@pytest.fixture(scope="module")
def model():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    backbone = build_backbone(network, transform=transforms.Compose([transforms.Resize(28), transforms.ToTensor()]))
    images, label = pictures(90, 1)
    return posthoc.wrap(backbone, "loss").fit((images, label), epochs=2, validation=0.3)


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (n, 28, 28, 3))
    images[np.arange(n), :, :, np.arange(n) % 3] += rng.integers(0, 120, n)[:, None, None]
    return images.astype(np.uint8), np.arange(n) % 3


def test_crop_scores_are_those_of_center_crops(model):
    images, label = pictures(20)
    one, scores, notes = crop_scores(model, (images, label), (0.5, 0.25))
    assert set(scores) >= {"loss", "max-softmax", "1/feature-norm"}
    assert any("no --train" in note for note in notes)
    np.testing.assert_array_equal(one.label, label)
    for v, fraction in enumerate((1.0, 0.5, 0.25)):
        crops = np.stack([np.asarray(center_crop(Image.fromarray(x), fraction)) for x in images])
        said = model.predict(crops)
        np.testing.assert_allclose(scores["loss"][:, v], said.uncertainty.numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(scores["entropy"][:, v], softmax_entropy(said.logits), rtol=1e-4)
    with pytest.raises(PosthocError, match="crop fraction 1 "):
        crop_scores(model, images, (1.0,))


def test_the_command_on_a_score_file_and_on_some_rows_of_images(tmp_path, capsys, model, monkeypatch):
    rng = np.random.default_rng(0)
    votes = rng.integers(0, 9, (30, 3)) + 1
    np.save(tmp_path / "votes.npy", votes)
    np.savez(tmp_path / "scores.npz", mine=entropy(votes, axis=1), logits=rng.normal(size=(30, 3)))
    command = ["eval", "ambiguity", "--votes", str(tmp_path / "votes.npy"), "--format", "json", *FEW]
    main([*command, "--data", str(tmp_path / "scores.npz")])
    (table,) = json.loads(capsys.readouterr().out)
    assert table["scores"]["mine"]["human_spearman"]["value"] == pytest.approx(1)
    assert "max-softmax" in table["scores"]
    images, _ = pictures(30)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02}.png")
    monkeypatch.setattr("posthoc.eval.ambiguity.open_model", lambda *_: model)
    photos = ["--data", str(tmp_path / "photos"), "--model", "adapter"]
    main([*command, *photos, "--rows", "12", "--fractions", "0.5"])
    (table,) = json.loads(capsys.readouterr().out)
    rows = np.sort(np.random.default_rng(0).permutation(30)[:12])
    u = model.predict(images[rows]).uncertainty.numpy()
    found = table["scores"]["loss"]
    assert found["human_spearman"]["value"] == pytest.approx(spearmanr(u, entropy(votes[rows], axis=1)).statistic)
    assert set(found) == {"human_spearman", "crop_spearman", "crop_less_certain"}
    for arguments, message in (
        (["--data", str(tmp_path / "scores.npz"), "--rows", "3"], "--rows chooses among images"),
        ([*photos, "--votes", str(tmp_path / "scores.npz")], "is an archive of arrays"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_resnet_20_follows_cifar_10h_as_far_as_its_readme_says(shared: Path):
    stored = np.load(shared / "data/cifar10_resnet20_features.npz")
    logits = stored["test"].astype(np.float32) @ stored["head_weight"].T.astype(np.float32) + stored["head_bias"]
    votes = read_votes(shared / "data/cifar10h-counts.npy", 10_000)
    table = ambiguity_table({"entropy": softmax_entropy(logits)}, votes=votes, resamples=20)
    assert table.cells["entropy"]["human_spearman"].value.value == pytest.approx(0.359, abs=0.001)
