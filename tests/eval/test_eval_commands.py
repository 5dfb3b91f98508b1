"""`posthoc eval ood|calibration|selective` on score files, stored features and images; refusals before any work."""

from __future__ import annotations

import csv
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from posthoc import PosthocError
from posthoc.adapters.store import default_cache_dir
from posthoc.cli import main
from posthoc.eval import baselines, metrics
from posthoc.eval.command import check_writable
from posthoc.eval.inputs import Scored, from_arrays, overlap, read
from posthoc.eval.ood import ood_table
from posthoc.eval.score_rows import score_all
from posthoc.eval.selective import selective_table
from posthoc.eval.table import Table

FEW = ["--resamples", "40"]


def arrays(n=120, shift=0.0, seed=0):
    """A labelled score file: a network of four classes whose features shrink with `shift`."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 4
    f = np.abs(rng.normal(size=(n, 6)))
    f[np.arange(n), label] += 3 * (1 - shift)
    weight = np.eye(4, 6) * 2
    return {
        "label": label,
        "logits": (f @ weight.T).astype(np.float32),
        "embedding": f.astype(np.float32),
        "penultimate": f.astype(np.float32),
        "mine": -f.max(1) + rng.normal(size=n) * 0.1,
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Paths of sets: test, train, two OOD sets."""
    made = {
        "test": arrays(),
        "train": arrays(seed=1),
        "far": arrays(shift=1.0, seed=2),
        "near": arrays(80, 0.5, seed=3),
    }
    for name, one in made.items():
        np.savez(tmp_path / f"{name}.npz", **one)
    return {name: str(tmp_path / f"{name}.npz") for name in made}


def test_every_score_stands_in_one_table(files, tmp_path, capsys):
    out = tmp_path / "ood.json"
    ood = ["eval", "ood", "--id", files["test"], "--ood", files["far"], files["near"], "--train", files["train"]]
    main([*ood, "--near", "near", "--far", "far", "--format", "markdown", "--output", str(out), *FEW])
    told = capsys.readouterr().out
    assert "### far (far OOD)" in told
    assert "### near (near OOD)" in told
    first, second = json.loads(out.read_text())
    wanted = {"mine", *baselines.LOGIT_SCORES, "1/feature-norm", "kNN (k=50)", "Mahalanobis", "ViM", "GEN"}
    assert wanted <= set(first["scores"])
    assert first["ood_share"] == 0.5
    assert second["ood_share"] == pytest.approx(0.4)
    mine = first["scores"]["mine"]
    test, far = np.load(files["test"]), np.load(files["far"])
    assert mine["auroc"]["value"] == pytest.approx(metrics.auroc(test["mine"], far["mine"]))
    wrong = test["logits"].argmax(1) != test["label"]
    assert mine["scod_aurc"]["value"] == pytest.approx(metrics.scod_aurc(test["mine"], wrong, far["mine"]))
    reference = first["scores"]["max-softmax"]["auroc"]["value"]
    assert mine["auroc"]["minus_reference"]["value"] == pytest.approx(mine["auroc"]["value"] - reference)
    assert "minus_reference" not in first["scores"]["max-softmax"]["auroc"]


def test_only_a_difference_beyond_its_interval_is_marked():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=200), rng.normal(size=200) + 1
    jitter = lambda: rng.normal(size=200) * 0.05  # noqa: E731
    scores = [
        {"max-softmax": u, "same": u + jitter(), "good": u + 3 * k, "bad": -u} for k, u in enumerate((inside, outside))
    ]
    table = ood_table(*scores, resamples=100)
    rows = table.markdown().splitlines()
    marked = {row.split(" | ")[0].strip("| "): row.count("**") for row in rows if row.startswith("| ")}
    assert marked == {"score": 0, "---": 0, "max-softmax": 0, "same": 0, "good": 10, "bad": 0}
    assert table.cells["bad"]["auroc"].value.value < 0.5  # and stays so
    assert "* " not in table.text().splitlines()[1]


def test_near_and_far_are_told_and_lower_is_better_where_it_is():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    table = ood_table({"max-softmax": a, "x": a}, {"max-softmax": b, "x": b + 4}, kind="near", resamples=50)
    assert table.title == "OOD (near OOD)"
    assert table.cells["x"]["fpr95"].better
    assert table.cells["x"]["fpr95"].minus.high < 0


def test_csv_files_of_predict_are_scores(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, shift in (("a", 0), ("b", 1)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "uncertainty", "percentile", "abstain"])
            writer.writerows([f"{i}.png", "cat", u, 50, "False"] for i, u in enumerate(rng.normal(size=40) + shift))
    found = read(tmp_path / "a.csv")
    assert list(found.scores) == ["uncertainty"]
    main(["eval", "ood", "--id", str(tmp_path / "a.csv"), "--ood", str(tmp_path / "b.csv"), "--format", "json", *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    wanted = roc_auc_score(
        np.repeat([0, 1], 40), np.r_[found.scores["uncertainty"], read(tmp_path / "b.csv").scores["uncertainty"]]
    )
    assert table["scores"]["uncertainty"]["auroc"]["value"] == pytest.approx(wanted)


def test_calibration_with_scalings_on_held_out_rows(files, capsys):
    main(["eval", "calibration", "--data", files["test"], "--held-out", files["train"], "--format", "json", *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    assert list(table["scores"]) == ["softmax", "temperature", "vector", "isotonic"]
    test = np.load(files["test"])
    row = table["scores"]["softmax"]
    assert row["nll"]["value"] == pytest.approx(metrics.nll(test["logits"], test["label"]))
    assert row["smooth_ece"]["value"] == pytest.approx(
        metrics.smooth_ece(*metrics.confidence_and_correct(test["logits"], test["label"]))
    )
    with pytest.raises(SystemExit):
        main(["eval", "calibration", "--data", files["test"], "--held-out", files["test"], *FEW])
    assert "120 images of test are also in test" in capsys.readouterr().err


def test_selective(files, capsys):
    main(["eval", "selective", "--data", files["near"], "--format", "json", *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    one = np.load(files["near"])
    wrong = one["logits"].argmax(1) != one["label"]
    row = table["scores"]["mine"]
    assert row["augrc"]["value"] == pytest.approx(metrics.augrc(one["mine"], wrong))
    assert row["accuracy_at_80%"]["value"] == pytest.approx(metrics.accuracy_at_coverage(one["mine"], ~wrong, [0.8])[0])
    assert row["error_auroc"]["value"] == pytest.approx(roc_auc_score(wrong, one["mine"]))


def test_a_module_is_a_command_too(files, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ood", "--id", files["test"], "--ood", files["far"], *FEW])
    monkeypatch.delitem(sys.modules, "posthoc.eval.ood")
    runpy.run_module("posthoc.eval.ood", run_name="__main__", alter_sys=True)
    assert "max-softmax" in capsys.readouterr().out


def test_images_through_an_adapter_a_bare_backbone_and_the_store(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POSTHOC_CACHE", str(tmp_path / "cache"))  # what other tests store is not seen
    rng = np.random.default_rng(0)
    for name, level in (("seen", 60), ("training", 60), ("unseen", 180)):
        for i in range(24):
            at = tmp_path / name / f"class{i % 2}"
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.integers(0, 55, (32, 32, 3)) + level - 20 * (i % 2)).astype(np.uint8)).save(
                at / f"{i}.png"
            )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    seen, training, unseen, adapter, weights = (
        str(tmp_path / n) for n in ("seen", "training", "unseen", "adapter", "w.safetensors")
    )
    main(
        [
            "fit",
            "test_vit",
            training,
            "--checkpoint",
            weights,
            "--output",
            adapter,
            "--epochs",
            "1",
            "--batch-size",
            "16",
            "--validation",
            "0.4",
        ]
    )
    ood = [
        "eval",
        "ood",
        "--id",
        seen,
        "--ood",
        unseen,
        "--checkpoint",
        weights,
        "--train",
        training,
        *FEW,
        "--format",
        "json",
    ]
    capsys.readouterr()
    main([*ood, "--model", adapter])
    (table,) = json.loads(capsys.readouterr().out)
    assert {"kappa", "max-softmax", "1/feature-norm", "kNN (k=24)", "ReAct", "GEN", "entropy"} <= set(table["scores"])
    assert any(note.startswith("no scod") for note in table["notes"])  # labels 0 and 1 are not the network's classes
    main([*ood, "--model", "test_vit"])
    (bare,) = json.loads(capsys.readouterr().out)
    assert set(bare["scores"]) == set(table["scores"]) - {"kappa"}
    stored = [str(path.parent) for path in default_cache_dir().glob("*/manifest.json")]
    assert [read(one).rows for one in stored] == [24] * len(stored)
    assert len(stored) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mine": np.r_[np.zeros(3), np.nan]}, r"score 'mine' is not finite in 1 of 4 rows \(rows 3\)"),
        ({"mine": np.arange(3.0)}, "lengths differ: score 'mine' 3, label 4"),
        ({"mine": np.ones((4, 2))}, "one number for each image"),
        ({"mine": np.zeros(0), "label": np.zeros(0)}, "is empty"),
    ],
)
def test_a_bad_score_file_is_one_clear_error(change, message):
    with pytest.raises(PosthocError, match=message):
        from_arrays("scores.npz", {"label": np.arange(4), **change})


def test_a_score_that_is_the_same_everywhere_ranks_nothing():
    flat, rising = np.ones(4), np.arange(4.0)
    assert ood_table({"u": flat}, {"u": flat + 1}, resamples=5).cells["u"]["auroc"].value.value == 1
    with pytest.raises(PosthocError, match="'u' is constant"):
        ood_table({"u": flat}, {"u": flat})
    with pytest.raises(PosthocError, match="'u' is constant"):
        selective_table({"u": flat}, rising > 2)
    with pytest.raises(PosthocError, match="always right"):
        selective_table({"u": rising}, rising > 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ood", "--id", "{test}", "--ood", "{test}"], "is the set of --id"),
        (["ood", "--id", "{test}", "--ood", "{copy}"], "every image of copy is also in test"),
        (["ood", "--id", "{plain}", "--ood", "{again}"], "every image of again is also in plain"),
        (["ood", "--id", "{test}", "--ood", "{far}", "{far}"], "far.npz twice; give each OOD set once"),
        (["ood", "--id", "{test}", "--ood", "{far}", "{folder}/./far.npz"], "far.npz twice; give each OOD set once"),
        (["ood", "--id", "{test}", "--ood", "{far}", "{folder}/b/far.npz"], "two OOD sets are called far"),
        (["ood", "--id", "{test}", "--ood", "{far}", "--near", "far", "--far", "far"], "far cannot be both"),
        (["ood", "--id", "{test}", "--ood", "{narrow}"], "come from different networks (logits [N, 4] and [N, 2])"),
        (["ood", "--id", "{test}", "--ood", "{far}", "--reference", "kapa"], "'kapa' is none of the scores; Known: "),
        (["ood", "--id", "{test}", "--ood", "{far}", "--reference", "mien"], "did you mean 'mine'?"),
        (["selective", "--data", "{test}", "--reference", "mien"], "did you mean 'mine'?"),
        (["report", "--id", "{test}", "--output", "{folder}/r", "--reference", "mien"], "did you mean 'mine'?"),
        (["calibration", "--data", "{test}", "--bins", "0"], "expected 1 to 1000"),
        (["calibration", "--data", "{test}", "--bins", "1001"], "expected 1 to 1000"),
        (["calibration", "--data", "nowhere.npz", "--seed", "-1"], "--seed -1 was given"),
        (["calibration", "--data", "nowhere.npz", "--seed", str(2**63)], "2^63 - 1"),
        (["calibration", "--data", "nowhere.npz", "--output", "{folder}"], "is a folder; expected the name of a file"),
        (["calibration", "--data", "nowhere.npz", "--output", "."], "is a folder; expected the name of a file"),
        (["calibration", "--data", "nowhere.npz", "--output", "{test}/x/y.json"], "test.npz is a file, not a folder"),
        (["calibration", "--data", "nowhere.npz", "--output", "{folder}/" + "x" * 5000], "cannot be written"),
        (["calibration", "--data", "nowhere.npz", "--device", "gpu"], "--device gpu cannot be used"),
        (["calibration", "--data", "nowhere.npz", "--device", "meta"], "--device meta cannot be used"),
        (["shift", "--data", "nowhere", "--model", "x", "--output", "x.png"], "is where the plot would go"),
        (["shift", "--data", "nowhere", "--model", "x", "--output", "x.PNG"], "is where the plot would go"),
        (["ood", "--id", "{test}", "--ood", "nowhere.npz"], "there is no file nowhere.npz"),
        (["ood", "--id", "{test}", "--ood", "photos"], "give --model"),
        (["ood", "--id", "{test}", "--ood", "{far}", "--near", "fra"], "names 'fra'; the OOD sets are far"),
        (["ood", "--id", "{test}", "--ood", "{far}", "--checkpoint", "w.pth"], "without --model"),
        (["selective", "--data", "{plain}"], "has no correct"),
        (["calibration", "--data", "{plain}"], "has no label"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(files, tmp_path, arguments, message, capsys):
    for name in ("plain", "again"):
        np.savez(tmp_path / f"{name}.npz", score=np.arange(5.0))
    np.savez(tmp_path / "copy.npz", **arrays())
    np.savez(tmp_path / "narrow.npz", **{**arrays(seed=5), "logits": np.ones((120, 2), np.float32)})
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "far.npz", **arrays(seed=6))
    places = {name: str(tmp_path / f"{name}.npz") for name in ("plain", "again", "copy", "narrow")}
    places |= {**files, "folder": str(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *[word.format(**places) for word in arguments], *FEW])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("posthoc: ")
    assert message in told


def test_images_in_both_sets_are_reported(tmp_path, capsys):
    inside, outside = arrays(), arrays(shift=1.0, seed=2)
    for key in outside:
        outside[key][:7] = inside[key][:7]
    np.savez(tmp_path / "in.npz", **inside)
    np.savez(tmp_path / "out.npz", **outside)
    main(["eval", "ood", "--id", str(tmp_path / "in.npz"), "--ood", str(tmp_path / "out.npz"), *FEW])
    assert "7 of 120 images of out are also in in (rows 0, 1, 2, 3, 4, ...)" in capsys.readouterr().out
    a = Scored("a", {"u": np.arange(3.0)}, content=["x", "y", "z"])
    assert overlap(a, Scored("b", {"u": np.arange(2.0)}, content=["z", "x"])) == ([0, 2], [0, 1])
    assert overlap(a, Scored("b", {"u": np.arange(2.0)})) == ([], [])


def test_a_score_only_one_set_has_is_left_out_and_said_so():
    sets = [Scored("a", {"u": np.arange(3.0), "v": np.arange(3.0)}), Scored("b", {"u": np.arange(2.0)})]
    scores, notes = score_all(sets)
    assert [list(one) for one in scores] == [["u"], ["u"]]
    assert "left out v: not every set has it" in notes
    with pytest.raises(PosthocError, match="only one of them has v"):
        ood_table({"u": np.arange(3.0), "v": np.arange(3.0)}, {"u": np.arange(2.0)})


def test_a_default_reference_that_is_not_there_is_no_error(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("a", "b")):
        np.savez(tmp_path / f"{name}.npz", u=rng.normal(size=30) + k, v=rng.normal(size=30) + k)
    ood = ["eval", "ood", "--id", str(tmp_path / "a.npz"), "--ood", str(tmp_path / "b.npz"), "--format", "json", *FEW]
    main(ood)
    (table,) = json.loads(capsys.readouterr().out)
    assert "minus_reference" not in table["scores"]["u"]["auroc"]
    with pytest.raises(SystemExit):
        main([*ood, "--reference", "distance"])  # the default of another command
    assert "'distance' is none of the scores; Known: u, v." in capsys.readouterr().err
    main([*ood, "--reference", "v"])
    (table,) = json.loads(capsys.readouterr().out)
    assert "minus_reference" in table["scores"]["u"]["auroc"]


def test_notes_stay_with_the_set_they_are_of(tmp_path, capsys):
    """A name within another's name or with the words of a note in it takes no other set's note."""
    inside = arrays()
    np.savez(tmp_path / "in.npz", **inside)
    names = ["b", "bb", "3 of 9 images of b are good"]
    for k, name in enumerate(names):
        one = arrays(shift=1.0, seed=2 + k)
        for key in one:
            one[key][: k + 1] = inside[key][: k + 1]
        np.savez(tmp_path / f"{name}.npz", **one)
    places = [str(tmp_path / f"{name}.npz") for name in names]
    main(["eval", "ood", "--id", str(tmp_path / "in.npz"), "--ood", *places, "--format", "json", *FEW])
    for k, table in enumerate(json.loads(capsys.readouterr().out)):
        shared = [note for note in table["notes"] if "are also in in" in note]
        assert len(shared) == 1
        assert shared[0].startswith(f"{k + 1} of 120 images of {names[k]} are also in in")


def test_nothing_is_made_before_the_output_is_known_to_be_writable(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder" / "x.json")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PosthocError, match="nothing may be written to"):
        check_writable(tmp_path / "new" / "x.json")


def test_a_table_takes_notes_after_its_own():
    table = Table("t", ("m",), {}, ("one",), {"rows": 3})
    assert table.noted("two", "three") == Table("t", ("m",), {}, ("one", "two", "three"), {"rows": 3})
    assert table.notes == ("one",)
