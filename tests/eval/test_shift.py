"""Shift: views made while they are read, tables against plain metrics, one image's views resampled together, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.special import log_softmax
from torch import nn
from torchvision import transforms

import posthoc
from posthoc import PosthocError
from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.data import open_source
from posthoc.cli import main
from posthoc.eval import corruptions, metrics
from posthoc.eval.baselines import fit_temperature
from posthoc.eval.bootstrap import resampled_counts
from posthoc.eval.corruptions import corrupt
from posthoc.eval.inputs import Scored
from posthoc.eval.shift import Shifted, shift_tables, shifted
from posthoc.eval.shift_statistics import AveragedEce, Joined, Means
from posthoc.eval.statistics import Aurc, Ece, Mean
from posthoc.eval.table import Table
from posthoc.eval.views import AlteredSource, corrupted, open_rows

KINDS, LEVELS = ("contrast", "gaussian_noise"), (2, 5)


def pictures(n=40, seed=0):
    """Uint8 [n, 28, 28, 3] of three classes told by their colour, and labels."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 3
    images = rng.integers(0, 90, (n, 28, 28, 3))
    images[np.arange(n), :, :, label] += rng.integers(0, 120, n)[:, None, None]
    return images.clip(0, 255).astype(np.uint8), label


@pytest.fixture(scope="module")
def model():
    """A linear classifier of mean colours with two heads."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        network[2].weight.copy_(torch.eye(3).repeat_interleave(4, 1) * 6)
        network[2].bias.zero_()
    backbone = build_backbone(network, transform=transforms.Compose([transforms.Resize(28), transforms.ToTensor()]))
    return posthoc.wrap(backbone, ["loss", "laplace"]).fit(pictures(120, 1), epochs=2, validation=0.3)


@pytest.fixture(scope="module")
def one(model):
    return shifted(model, pictures(), kinds=KINDS, severities=LEVELS, progress=False)


def test_scores_and_probabilities_are_those_of_the_corrupted_images(model, one):
    images, label = pictures()
    views = [images] + [np.stack([corrupt(x, k, s) for x in images]) for k in KINDS for s in LEVELS]
    assert set(one.scores) >= {"loss", "laplace", "ensemble of heads", "max-softmax", "energy", "1/feature-norm"}
    assert one.heads == ("loss", "laplace")
    for v, view in enumerate(views):
        said = model.predict(view, fields=("uncertainty", "logits", "probabilities"))
        logits = said.logits.numpy()
        for name in one.heads:
            np.testing.assert_allclose(one.scores[name][:, v], said[name].uncertainty.numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(one.correct["softmax"][:, v], logits.argmax(1) == label)
        probability = {
            "softmax": torch.softmax(said.logits, 1).numpy(),
            "laplace": said["laplace"].probabilities.numpy(),
        }
        for name, p in probability.items():
            np.testing.assert_allclose(
                one.nll[name][:, v], -np.log(p[np.arange(len(label)), label]), rtol=1e-3, atol=1e-5
            )
            np.testing.assert_allclose(one.confidence[name][:, v], p.max(1), rtol=1e-4)


def test_a_temperature_fitted_on_held_out_images_scales_every_view(model):
    images, label = pictures(20)
    kept = model.backbone.extract(pictures(60, 2), progress=False)
    held_out = Scored("kept", label=kept.label, logits=kept.logits)
    one = shifted(model.backbone, (images, label), kinds=["fog"], severities=[3], held_out=held_out, progress=False)
    t = fit_temperature(kept.logits, kept.label)
    view = np.stack([corrupt(x, "fog", 3) for x in images])
    logits = np.stack([model.predict(v).logits.numpy() for v in (images, view)], 1)
    scaled = log_softmax(logits.astype(float) / t, axis=2)
    expected = -scaled[np.arange(20), :, label]
    np.testing.assert_allclose(one.nll["temperature scaling"], expected, rtol=1e-3, atol=1e-4)
    assert "temperature-scaled softmax" in one.scores
    tables = shift_tables(one, resamples=20)
    assert list(tables[0].cells) == ["softmax", "temperature scaling"]


def test_tables_hold_the_means_over_kinds_of_the_plain_metrics(one):
    tables = {table.about["metric"]: table for table in shift_tables(one, resamples=50)}
    assert list(tables) == ["accuracy", "NLL", "ECE", "AURC", "mean uncertainty", "share whose uncertainty rises"]
    columns = {"severity 0": [0], "severity 2": [1, 3], "severity 5": [2, 4], "mean of all": [1, 2, 3, 4]}
    wrong = ~one.correct["softmax"]

    def shown(metric: str, name: str, column: str) -> float:
        return tables[metric].cells[name][column].value.value

    for column, views in columns.items():
        for name in ("softmax", "laplace"):
            assert shown("accuracy", name, column) == pytest.approx(one.correct[name][:, views].mean())
            assert shown("NLL", name, column) == pytest.approx(one.nll[name][:, views].mean())
            errors = [metrics.ece(one.confidence[name][:, v], one.correct[name][:, v]) for v in views]
            assert shown("ECE", name, column) == pytest.approx(np.mean(errors))
        for name, u in one.scores.items():
            areas = [metrics.aurc(u[:, v], wrong[:, v]) for v in views]
            assert shown("AURC", name, column) == pytest.approx(np.mean(areas))
            if column == "severity 0":
                assert column not in tables["mean uncertainty"].cells[name]
                continue
            rises = (u[:, views] > u[:, :1]).mean()
            assert shown("share whose uncertainty rises", name, column) == pytest.approx(rises)
            moved = (u[:, views].mean() - u[:, 0].mean()) / u[:, 0].std()
            assert shown("mean uncertainty", name, column) == pytest.approx(moved, rel=1e-5, abs=1e-5)
    by_kind = tables["AURC"].about["by_kind"]["loss"]
    assert set(by_kind) == set(KINDS)
    assert by_kind["gaussian_noise"]["2"]["value"] == pytest.approx(metrics.aurc(one.scores["loss"][:, 3], wrong[:, 3]))
    by_kind = tables["ECE"].about["by_kind"]["softmax"]["contrast"]["5"]
    assert by_kind["value"] == pytest.approx(metrics.ece(one.confidence["softmax"][:, 2], one.correct["softmax"][:, 2]))
    clean = tables["mean uncertainty"].about["clean"]["loss"]
    assert clean["mean"] == pytest.approx(one.scores["loss"][:, 0].mean())
    json.dumps([table.as_dict() for table in tables.values()], allow_nan=False)


def test_an_image_is_resampled_with_all_its_views(one):
    """Against resampling rows by hand; views resampled one by one would give other, narrower intervals."""
    table = next(t for t in shift_tables(one, resamples=60, seed=3) if t.about["metric"] == "AURC")
    (counts,) = (np.concatenate(part) for part in zip(*resampled_counts((40,), 60, 3), strict=True))
    wrong, drawn = ~one.correct["softmax"], {"loss": [], "max-softmax": []}
    for count in counts.astype(int):
        rows = np.repeat(np.arange(40), count)
        for name, values in drawn.items():
            values.append(np.mean([metrics.aurc(one.scores[name][rows, v], wrong[rows, v]) for v in (1, 3)]))
    found = table.cells["loss"]["severity 2"]
    np.testing.assert_allclose([found.value.low, found.value.high], np.quantile(drawn["loss"], [0.025, 0.975]))
    gap = np.quantile(np.subtract(drawn["loss"], drawn["max-softmax"]), [0.025, 0.975])
    np.testing.assert_allclose([found.minus.low, found.minus.high], gap, atol=1e-12)


def test_equal_views_give_the_interval_of_one_view():
    rng = np.random.default_rng(0)
    clean, changed = rng.normal(size=(2, 50, 1))
    few, many = (Shifted("s", KINDS[:k], (1,), {"u": np.concatenate([clean] + [changed] * k, axis=1)}) for k in (1, 2))
    for a, b in zip(shift_tables(few, resamples=80), shift_tables(many, resamples=80), strict=True):
        assert a.cells["u"]["severity 1"] == b.cells["u"]["severity 1"]


def test_statistics_of_views_are_those_of_each_view():
    rng = np.random.default_rng(0)
    values, confidence, right = rng.normal(size=(30, 4)), rng.random((30, 4)), rng.random((30, 4)) < 0.5
    counts = [rng.multinomial(30, np.full(30, 1 / 30), size=5).astype(float)]
    each = [Mean(v) for v in values.T]
    np.testing.assert_allclose(Means(values)(counts), np.stack([m(counts) for m in each], 1))
    np.testing.assert_allclose(Joined(each)(counts), Means(values)(counts))
    parts = [Ece(c, r) for c, r in zip(confidence.T, right.T, strict=True)]
    np.testing.assert_allclose(AveragedEce(parts)(counts), np.mean([p(counts) for p in parts], 0))
    np.testing.assert_allclose(AveragedEce(parts).noise(counts), np.mean([p.noise(counts) for p in parts], 0))
    with pytest.raises(PosthocError, match="same rows"):
        Joined([Mean([1.0, 2.0]), Mean([1.0])])
    assert Joined([Aurc([1.0, 2.0], [0, 1])]).value().shape == (1,)


def test_views_are_made_when_they_are_read_and_seen_once(model, tmp_path, monkeypatch):
    images, label = pictures(9)
    made = []
    monkeypatch.setattr(corruptions, "_corrupted", lambda x, *rest: made.append(rest) or x[::-1])
    source = corrupted(open_source((images, label)), "fog", 2)
    source.fingerprint()
    assert made == []
    features = model.backbone.extract(source, cache_dir=tmp_path, progress=False)
    assert len(made) == 9
    np.testing.assert_array_equal(features.label, label)
    again = model.backbone.extract(
        corrupted(open_source((images, label)), "fog", 2), cache_dir=tmp_path, progress=False
    )
    assert len(made) == 9
    assert again.folder == features.folder
    others = [
        corrupted(source.inner, "fog", 3),
        corrupted(source.inner, "frost", 2),
        corrupted(source.inner, "fog", 2, 1),
    ]
    assert len({one.fingerprint() for one in (source, *others, source.inner)}) == 5


def test_rows_are_drawn_by_the_seed_and_keep_their_order(tmp_path):
    images, label = pictures(20)
    few = open_rows((images, label), 6, seed=1)
    rows = few.rows
    assert len(set(rows)) == 6
    assert list(rows) == sorted(rows)
    np.testing.assert_array_equal(few.column("label"), label[rows])
    np.testing.assert_array_equal(few.item(2).image, images[rows[2]])
    assert list(open_rows((images, label), 6, seed=1).rows) == list(rows)
    assert list(open_rows((images, label), 6, seed=2).rows) != list(rows)
    assert open_rows((images, label), 20).fingerprint() == open_source((images, label)).fingerprint()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    assert [Path(name).name for name in open_rows(tmp_path, 6, seed=1).names()] == [f"{i:02}.png" for i in rows]
    with pytest.raises(PosthocError, match="rows=0"):
        open_rows((images, label), 0)


def test_what_cannot_be_altered_is_refused(model):
    images, _ = pictures(4)
    ready = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with pytest.raises(PosthocError, match="cannot be altered"):
        shifted(model, ready, kinds=["fog"], severities=[1], progress=False)
    stream = open_source(iter_set(images))
    with pytest.raises(PosthocError, match="is a stream"):
        AlteredSource(stream)
    for options in ({"kinds": []}, {"severities": [0]}, {"kinds": ["foog"]}, {"severities": [7]}):
        with pytest.raises(PosthocError, match=r"expected|unknown"):
            shifted(model, images, **options)
    with pytest.raises(PosthocError, match=r"expected \[N, 3\]"):
        Shifted("s", KINDS, (1,), {"u": np.zeros((4, 2))})
    with pytest.raises(PosthocError, match="no score"):
        Shifted("s", KINDS, (1,), {})
    with pytest.raises(PosthocError, match="'u' is constant"):
        shift_tables(Shifted("s", KINDS, (1,), {"u": np.ones((4, 3))}))


def iter_set(images):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images)

    return Stream()


def test_without_usable_labels_their_tables_are_left_out_and_said_so(model):
    images, label = pictures(12)
    options = {"kinds": ["fog"], "severities": [3], "progress": False}
    for data, why in ((images, "no labels"), ((images, label + 3), "12 of 12 labels of")):
        tables = shift_tables(shifted(model, data, **options), resamples=20)
        assert [t.about["metric"] for t in tables] == ["mean uncertainty", "share whose uncertainty rises"]
        assert any(why in note for note in tables[0].notes)
    bare = shifted(model.backbone, (images, label), **options)
    assert bare.heads == ()
    assert "loss" not in bare.scores
    assert "max-softmax" in bare.scores


def test_the_command_writes_tables_and_a_picture(tmp_path, capsys):
    images, label = pictures(12)
    for i, image in enumerate(images):
        for name, pixels in (("photos", image), ("training", 255 - image)):
            at = tmp_path / name / f"class{label[i]}"
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(at / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    photos, out = str(tmp_path / "photos"), tmp_path / "made" / "shift.json"
    shift = ["eval", "shift", "--data", photos, "--model", "test_vit", "--checkpoint", str(tmp_path / "w.safetensors")]
    few = ["--kinds", "fog", "pixelate", "--severities", "1", "4", "--resamples", "20", "--rows", "8"]
    main([*shift, *few, "--train", str(tmp_path / "training"), "--format", "markdown", "--output", str(out)])
    told = capsys.readouterr().out
    assert "mean uncertainty" in told
    tables = json.loads(out.read_text())
    assert {"max-softmax", "kNN (k=12)"} <= set(tables[-1]["scores"])
    assert set(tables[-1]["by_kind"]["entropy"]) == {"fog", "pixelate"}
    assert tables[-1]["rows"] == 8
    with Image.open(out.with_suffix(".png")) as picture:
        assert min(picture.size) > 300
    assert sorted(path.name for path in out.parent.iterdir()) == ["shift.json", "shift.png"]
    with pytest.raises(SystemExit) as stopped:
        main([*shift, "--kinds", "foog"])
    assert stopped.value.code == 2
    assert "'foog' is unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*shift, *few, "--train", photos])
    assert "8 of 8 images of photos" in capsys.readouterr().err


def test_a_head_better_than_the_reference_is_marked_where_lower_is_better():
    rng = np.random.default_rng(0)
    right = rng.random((200, 3)) < 0.7
    good, poor = ~right + rng.random((200, 3)), rng.random((200, 3))
    p = np.full((200, 3), 0.7)
    one = Shifted(
        "s",
        ("fog",),
        (1, 2),
        {"good": good, "max-softmax": poor},
        {"softmax": right},
        {"softmax": p},
        {"softmax": -np.log(p)},
    )
    table: Table = next(t for t in shift_tables(one, resamples=50) if t.about["metric"] == "AURC")
    assert all(cell.better for cell in table.cells["good"].values())
    assert not any(cell.better for cell in table.cells["max-softmax"].values())
