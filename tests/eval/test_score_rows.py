"""The rows of tables: temperature, views, ensemble, seeds, settings tuned without an OOD row."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision import transforms

import posthoc
from posthoc import PosthocError
from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.features import Features
from posthoc.cli import main
from posthoc.eval import augmentation, baselines, score_rows
from posthoc.eval.inputs import Scored, from_features
from posthoc.eval.score_rows import score_all, seen_by_heads, trained_rows
from posthoc.eval.table import Table, cell, over_seeds
from posthoc.eval.tuning import KNN, choose, methods
from posthoc.eval.views import cropped, open_rows

FEW = ["--resamples", "20", "--format", "json"]


def world(n=200, seed=0, shift=0.0, name="test"):
    """A noisy classifier of four classes; `shift` moves features away from all of them."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 4
    f = np.abs(rng.normal(size=(n, 6)))
    f[np.arange(n), label] += 1.5 * (1 - shift)
    weight = np.eye(4, 6) * 3
    f = f.astype(np.float32)
    return Scored(name, {}, label, logits=(f @ weight.T).astype(np.float32), embedding=f, penultimate=f)


TEST, TRAIN, HELD, FAR = (
    world(), world(seed=1, name="train"), world(seed=2, name="held"), world(seed=3, shift=1, name="far"),
)  # fmt: skip


def test_the_temperature_is_that_of_the_held_out_rows_alone():
    (inside, outside), notes = score_all([TEST, FAR], held_out=HELD)
    z, y = HELD.logits.astype(np.float64), HELD.label
    loss = lambda t: -log_softmax(z / t, axis=1)[np.arange(len(z)), y].mean()  # noqa: E731
    t = minimize_scalar(loss, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-8}).x
    assert inside["temperature-scaled softmax"] == pytest.approx(1 - softmax(TEST.logits / t, axis=1).max(1), abs=1e-4)
    assert outside["temperature-scaled softmax"] == pytest.approx(1 - softmax(FAR.logits / t, axis=1).max(1), abs=1e-4)
    assert f"temperature {t:.3g}, fitted on 200 labelled ID images of held" in notes
    scores, notes = score_all([TEST])
    assert "temperature-scaled softmax" not in scores[0]
    assert "no --held-out: no temperature-scaled softmax" in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": TEST}, "200 images of --held-out test are also in test.*scored"),
        ({"held_out": TRAIN, "train": TRAIN}, "trained on"),
        ({"train": TEST}, r"200 of 200 images of test are among the training images of test \(first: row 0 of test\)"),
        ({"train": FAR}, "200 of 200 images of far are among the training images of far.*that are not scored"),
        ({"tuned": True}, "--tune needs --held-out"),
        ({"held_out": Scored("x", {"u": np.arange(3.0)})}, "x has no label"),
        ({"held_out": world(20, 7, 0.0, "sure"), "tuned": True}, None),
    ],
)
def test_held_out_rows_are_neither_scored_nor_trained_on(options, message):
    if message is None:  # a classifier without a mistake there cannot be tuned on
        sure = options["held_out"]
        options["held_out"] = Scored("sure", {}, sure.logits.argmax(1), logits=sure.logits)
        message = "no mistake on sure"
    with pytest.raises(PosthocError, match=message):
        score_all([TEST, FAR], **options)


def with_content(one: Scored, content: list[str]) -> Scored:
    return replace(one, content=np.array(content))


def test_what_tells_that_a_scored_image_was_trained_on():
    some = replace(FAR, embedding=np.r_[FAR.embedding[:197], TRAIN.embedding[:3]])
    with pytest.raises(PosthocError, match=r"3 of 200 images of far .* of train \(first: row 197 of far\)"):
        score_all([TEST, some], TRAIN)
    names = [f"{i}.png" for i in range(400)]
    apart = [with_content(some, names[:200]), with_content(TRAIN, names[200:])]
    score_all(apart[:1], apart[1])  # different files that the network tells nothing apart of
    with pytest.raises(PosthocError, match="1 of 200 images of far"):
        score_all(apart[:1], with_content(TRAIN, names[199:399]))
    # a dead layer gives every image the same row, and logits may be equal by chance
    dead = [np.zeros_like(one.embedding) for one in (TEST, TRAIN)]
    assert trained_rows(replace(TEST, embedding=dead[0]), replace(TRAIN, embedding=dead[1])) == []
    assert trained_rows(replace(TEST, embedding=None), replace(TEST, embedding=None)) == []


def test_heads_on_the_images_they_were_fitted_on_are_told(tmp_path):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    backbone = build_backbone(network, transform=transforms.Compose([transforms.Resize(8), transforms.ToTensor()]))
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), dtype=np.uint8)
    images[np.arange(60), :, :, np.arange(60) % 3] //= 3
    every = backbone.extract((images, np.arange(60) % 3), cache_dir=tmp_path, progress=False)
    half = np.arange(60) < 30
    told = "the heads were fitted on these very images of it: their scores are too good"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few images teach little, and the fit says so
        model = posthoc.wrap(backbone, "loss").fit(every, epochs=1)
        other = posthoc.wrap(backbone, "loss").fit(every[half], epochs=1)
    for features in (every, Features.load(every.folder), every[half]):
        assert told in score_all([from_features("it", features, model)])[1]
    assert told in score_all([from_features("it", every, other)])[1]  # more than the half it did not see
    assert told not in score_all([from_features("it", every[~half], other)])[1]
    fresh = backbone.extract((255 - images, np.arange(60) % 3), cache_dir=tmp_path, progress=False)
    assert told not in score_all([from_features("it", fresh, model)])[1]
    rows = open_rows((images, np.arange(60) % 3), 20)
    assert seen_by_heads(model, rows)
    assert not seen_by_heads(model, cropped(rows, 0.5))
    assert not seen_by_heads(backbone, every)


def test_retrieval_fits_the_detectors_once_for_queries_and_gallery(tmp_path, capsys, monkeypatch):
    fits = []
    fit = score_rows.fit_detectors
    monkeypatch.setattr(score_rows, "fit_detectors", lambda training: fits.append(1) or fit(training))
    for one in (TEST, TRAIN, HELD):
        tables = {"logits": one.logits, "embedding": one.embedding, "penultimate": one.penultimate}
        np.savez(tmp_path / f"{one.name}.npz", label=one.label, **tables)
    places = {name: str(tmp_path / f"{name}.npz") for name in ("test", "train", "held")}
    for gallery in ("held", "train"):
        words = ["--data", places["test"], "--gallery", places[gallery], "--train", places["train"]]
        main(["eval", "retrieval", *words, *FEW])
        _, table = json.loads(capsys.readouterr().out)
        both = {name for name, row in table["scores"].items() if "lam_ausc" in row}
        assert ("ViM" in both) == (gallery == "held")  # what is fitted on the gallery does not score it
        assert "max-softmax" in both
        assert "r_auroc" in table["scores"]["ViM"]
    assert len(fits) == 2


def test_settings_are_the_best_of_their_grid_on_the_mistakes_and_no_scored_row_matters():
    (inside, _), notes = score_all([TEST, FAR], TRAIN, held_out=HELD, tuned=True)
    wrong = HELD.logits.argmax(1) != HELD.label
    auroc = {k: roc_auc_score(wrong, baselines.knn(HELD.embedding, TRAIN.embedding, k=k)) for k in KNN.grid}
    k = max(auroc, key=auroc.get)
    assert inside[f"kNN (tuned, k={k})"] == pytest.approx(baselines.knn(TEST.embedding, TRAIN.embedding, k=k))
    assert "kNN (k=50)" in inside
    bases = {name.partition(" (")[0] for name in inside if "tuned" in name}
    shaping = {"ReAct", "ASH-S", "ASH-B", "SCALE", "VRA", "LTS"}
    assert bases == {"kNN", "energy", "GMM", "ViM", "DICE", "NNGuide", "NCI", "GEN", "OpenMax"} | shaping
    assert bases - {"kNN"} <= set(inside)  # the default beside it
    (note,) = [one for one in notes if one.startswith("tuned on")]
    assert f"200 labelled ID images of held, {wrong.sum()} of them mistakes" in note
    assert "5 values for each of energy, kNN, GMM, ViM" in note
    (again, _), _ = score_all([TEST, world(50, 11, 0.5)], TRAIN, held_out=HELD, tuned=True)
    assert list(again) == list(inside)
    assert np.array_equal(again[f"kNN (tuned, k={k})"], inside[f"kNN (tuned, k={k})"])


def test_of_equal_values_the_default_is_kept_and_what_cannot_be_is_none():
    flat = methods(None, None)["energy"]
    one = Scored("one class", {}, np.array([0, 0, 1]), logits=np.array([[2.0, -500], [1.0, -500], [0.5, -500]]))
    assert choose(flat, one, np.array([False, False, True])) == 1  # every temperature ranks them alike
    assert choose(flat, Scored("x", {"u": np.arange(3.0)}), np.array([True, False, True])) is None


def test_stored_views_give_augmented_rows():
    rng = np.random.default_rng(0)
    sets = [
        from_features(name, Features.from_arrays(rng.normal(size=(20, 3, 5)), logits=rng.normal(size=(20, 3, 4))))
        for name in "ab"
    ]
    found, _ = score_all(sets)
    for scores, one in zip(found, sets, strict=True):
        views = one.features
        assert np.array_equal(scores["entropy, augmented"], augmentation.entropy_of_mean(views.logits))
        assert np.array_equal(scores["mutual information, augmented"], augmentation.mutual_information(views.logits))
        assert np.array_equal(scores["embedding spread, augmented"], augmentation.embedding_spread(views.embedding))
    plain = Features.from_arrays(rng.normal(size=(20, 5)), logits=rng.normal(size=(20, 4)))
    (alone, _), _ = score_all([sets[0], from_features("plain", plain)])
    assert "entropy, augmented" not in alone


def test_over_seeds_is_the_mean_and_the_standard_deviation():
    from posthoc.eval.bootstrap import Interval

    rng = np.random.default_rng(0)
    values, ends = rng.random(3), rng.random((3, 2)) * 0.1
    rows = [cell(Interval(v, v - a, v + b), Interval(v - 0.5, v - 0.6, v - 0.4), False)
            for v, (a, b) in zip(values, ends, strict=True)]  # fmt: skip
    table = over_seeds([Table("t", ("m",), {"s": {"m": one}}) for one in rows])
    found = table.cells["s"]["m"]
    assert found.value.value == pytest.approx(values.mean())
    assert found.spread == pytest.approx(values.std(ddof=1))
    assert found.value.low == pytest.approx(np.mean(values - ends[:, 0]))
    assert found.minus.high == pytest.approx(np.mean(values - 0.4))
    assert table.about["seeds"] == 3
    assert f"± {values.std(ddof=1):.3f}" in table.text()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of images, weights, and adapters: seeds 0 and 1 of two heads, another fit, another backbone."""
    at = tmp_path_factory.mktemp("adapters")
    rng = np.random.default_rng(0)
    for name, level in (("train", 60), ("seen", 60), ("unseen", 150)):
        for i in range(24):
            folder = at / name / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 55, (40, 40, 3)) + level - 20 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    for seed, name in enumerate(("w", "other")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            save_file(timm.create_model("test_vit").state_dict(), at / f"{name}.safetensors")
    for name, weights, seed, epochs in (
        ("a", "w", 0, 1),
        ("b", "w", 1, 1),
        ("longer", "w", 2, 2),
        ("else", "other", 3, 1),
    ):
        backbone = build_backbone("test_vit", checkpoint=at / f"{weights}.safetensors")
        model = posthoc.wrap(backbone, ["kappa", "temperature"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # noise teaches the temperature nothing, and the fit says so
            model.fit(
                str(at / "train"), epochs=epochs, seed=seed, validation=0.4, cache_dir=at / "store", batch_size=16
            )
        model.save_pretrained(at / name)
    return at


def run(at: Path, capsys, *more, models=("a",)):
    paths = [str(at / name) for name in models]
    common = ["--checkpoint", str(at / "w.safetensors"), "--model", *paths, *more, *FEW]
    main(["eval", "ood", "--id", str(at / "seen"), "--ood", str(at / "unseen"), *common])
    (table,) = json.loads(capsys.readouterr().out)
    return table


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POSTHOC_CACHE", str(tmp_path_factory.getbasetemp() / "rows-store"))


def test_views_heads_and_the_live_network_from_the_command(adapters, capsys):
    table = run(adapters, capsys, "--train", str(adapters / "train"), "--views", "3", "--live", "odin", "rankfeat")
    wanted = {
        "kappa",
        "temperature",
        "ensemble of heads",
        "ODIN",
        "ReAct",
        "entropy, augmented",
        "embedding spread, augmented",
    }
    assert wanted <= set(table["scores"])
    assert any(note.startswith("left out RankFeat: it needs maps") for note in table["notes"])
    model = posthoc.load(adapters / "a", None, build_backbone("test_vit", checkpoint=adapters / "w.safetensors"))
    sets = [model.backbone.extract(str(adapters / name), progress=False) for name in ("seen", "unseen")]
    percentiles = []
    for features in sets:
        scores = from_features("x", features, model).scores
        percentiles.append(np.mean([model.held_out[n].percentile(torch.from_numpy(scores[n])) for n in scores], axis=0))
    auroc = roc_auc_score(np.repeat([0, 1], 24), np.concatenate(percentiles))
    assert table["scores"]["ensemble of heads"]["auroc"]["value"] == pytest.approx(auroc, abs=0.01)
    plain, views = sets[0], model.backbone.extract(str(adapters / "seen"), views=3, progress=False)
    assert np.array_equal(plain.row, views.row)


def test_seeds_are_averaged_and_what_is_no_seed_is_refused(adapters, capsys):
    one, other = (run(adapters, capsys, models=[name])["scores"] for name in "ab")
    table = run(adapters, capsys, models=["a", "b"])
    for name in ("kappa", "temperature", "ensemble of heads", "max-softmax"):
        values = [each[name]["auroc"]["value"] for each in (one, other)]
        assert table["scores"][name]["auroc"]["value"] == pytest.approx(np.mean(values))
        assert table["scores"][name]["auroc"]["spread"] == pytest.approx(np.std(values, ddof=1))
    assert table["scores"]["max-softmax"]["auroc"]["spread"] == 0
    assert any("seeds 0, 1" in note for note in table["notes"])
    for models, message in (
        (["a", "a"], "must have different seeds"),
        (["a", "longer"], "differ in more than their seed, in epochs: 2 and 1"),
        (["a", "else"], "is not on the backbone of"),
        (["test_vit", "a"], "must be folders of adapters"),
    ):
        with pytest.raises(SystemExit):
            run(adapters, capsys, models=models)
        assert message in capsys.readouterr().err


def test_live_and_views_need_images(adapters, tmp_path, capsys):
    path = str(tmp_path / "x.npz")
    np.savez(path, logits=TEST.logits)
    other = str(tmp_path / "y.npz")
    np.savez(other, logits=FAR.logits)
    for more, message in (
        (["--views", "2"], "--views augments images"),
        (["--live", "odin"], "give images and --model"),
        (["--live", "react"], "ReAct needs no --live"),
        (["--views", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", "ood", "--id", path, "--ood", other, *more, *FEW])
        assert message in capsys.readouterr().err
