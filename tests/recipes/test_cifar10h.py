"""The CIFAR-10H recipe as a program: runs killed and shared, what they write, options that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from posthoc.recipes import cifar10h
from posthoc.recipes.cifar10h import PRESETS, Cifar10HConfig, check_width, command
from posthoc.recipes.cifar10h_networks import PosteriorNetwork
from posthoc.recipes.cifar10h_training import make_loss
from posthoc.recipes.networks import CifarResNet
from posthoc.recipes.running import seeded

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two

ROWS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 coloured noise images, votes that go by the colour, and weights of a ResNet-20 that knows nothing."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    colours = rng.integers(60, 200, (10, 3))
    votes = rng.dirichlet(np.full(10, 0.1), ROWS)
    images = votes @ colours + rng.normal(0, 10, (32, 32, ROWS, 1))
    pixels = images.clip(0, 255).astype(np.uint8).transpose(2, 0, 1, 3)
    label = votes.argmax(1)
    np.savez(folder / "cifar10.npz", x_test=pixels, y_test=label, x_train=pixels, y_train=label)
    np.save(folder / "cifar10h-probs.npy", votes)
    with seeded(0):
        save_file(CifarResNet(20).state_dict(), folder / "cifar10_resnet20.safetensors")
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    tiny = "--folds 0 --head-steps 6 --steps 6 --every 2 --resamples 20 --samples 8 --batch-size 32 --block 16"
    return ["--data-dir", str(folder), "--output", output, "--cache-dir", str(folder / "cache"), *tiny.split(), *more]


TWO_FOLDS = ["--preset", "mcinfonce", "--crops", "0.2", "--folds", "0", "1"]


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    """What a run found that nothing disturbed; it is in the folder `unbroken`."""
    return results("cifar10h", words(folder, "unbroken", *TWO_FOLDS), folder)


def test_a_run_writes_what_it_found(folder: Path, unbroken: dict[str, Any]) -> None:
    names = [table["title"] for table in unbroken["tables"]]
    assert names[:2] == ["cifar10h: ambiguity", "cifar10h: retrieval"]
    assert set(unbroken["tables"][0]["scores"]) == {
        "1/kappa", "1/kappa, two views", "entropy", "energy", "1/feature-norm", "entropy, two views",
    }  # fmt: skip
    nominal = unbroken["credible_sets"]["nominal"]
    assert nominal["queries"] + nominal["queries_without_truth"] == 2 * ROWS // 5
    assert nominal["coverage_low"] <= nominal["coverage"] <= nominal["coverage_high"]
    for name in ("cifar10h.png", "results.md", "scores.npz", "config.json"):
        assert (folder / "unbroken" / name).stat().st_size
    assert [record["step"] for record in records(folder / "unbroken", "fold1")] == [2, 4, 6]


def test_a_run_killed_twice_resumes_to_the_bits_of_an_unbroken_one(folder: Path, unbroken: dict[str, Any]) -> None:
    line, whole = words(folder, "broken", *TWO_FOLDS), metrics(folder / "unbroken")
    killed = kill_at_checkpoint("cifar10h", line, folder, "fold0/checkpoint.pt")
    assert killed["fold0"] != whole["fold0"]
    killed = kill_at_checkpoint("cifar10h", [*line, "--resume"], folder, "fold1-head/checkpoint.pt")
    assert killed.get("fold1") != whole["fold1"]
    again = results("cifar10h", [*line, "--resume"], folder)
    assert metrics(folder / "broken") == whole
    for fold in [*again["folds"], *unbroken["folds"]]:
        fold.pop("seconds")
    for name in ("tables", "folds", "credible_sets"):
        assert again[name] == unbroken[name]


def test_trained_folds_are_evaluated_again_with_other_resamples(folder: Path, unbroken: dict[str, Any]) -> None:
    shutil.copytree(folder / "unbroken", folder / "again")
    (folder / "again" / "results.json").unlink()
    trained = folder / "again" / "fold1" / "checkpoint.pt"
    before = trained.stat().st_mtime_ns
    again = results("cifar10h", words(folder, "again", *TWO_FOLDS, "--resamples", "50", "--resume"), folder)
    assert trained.stat().st_mtime_ns == before
    name = "human_spearman"
    one, other = (found["tables"][0]["scores"]["1/kappa"][name] for found in (unbroken, again))
    assert one["value"] == other["value"]
    assert (one["low"], one["high"]) != (other["low"], other["high"])


def test_a_run_is_not_continued_with_other_training_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10h, "one_fold", killed)
    line = [*words(folder, str(tmp_path / "run")), "--scratch", "--train-on", "train-hard"]
    for more in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            command([*line, *more])
    arrays = dict(np.load(folder / "cifar10.npz"))
    for name in ("x_train", "y_train"):
        other = tmp_path / name
        other.mkdir()
        np.savez(other / "cifar10.npz", **{**arrays, name: np.roll(arrays[name], 1, 0)})
        shutil.copy(folder / "cifar10h-probs.npy", other)
        with pytest.raises(SystemExit):
            command([*line, "--data-dir", str(other), "--resume"])
        assert "made from other data or weights" in capsys.readouterr().err


def test_two_processes_agree_with_one(folder: Path, unbroken: dict[str, Any]) -> None:
    results_of_two("cifar10h", words(folder, "two", *TWO_FOLDS, "--folds", "0"), folder)
    for name in ("fold0-head", "fold0"):
        for one, other in zip(records(folder / "unbroken", name), records(folder / "two", name), strict=True):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
            assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)


FREE = {"entropy", "energy", "1/feature-norm"}


@pytest.mark.parametrize(
    ("more", "trainings", "scores"),
    [
        ([], {"fold0-head", "fold0"}, {"1/kappa", *FREE}),  # all pairs
        (["--preset", "posthoc"], {"fold0"}, {"1/kappa", *FREE}),
        (["--preset", "soft-cross-entropy"], {"fold0"}, {"fine-tuned entropy", *FREE}),
        (["--scratch", "--train-on", "train-hard"], {"fold0"}, {"1/kappa"}),
    ],
    ids=["all-pairs", "posthoc", "soft-cross-entropy", "scratch"],
)
def test_variants_run(folder: Path, more: list[str], trainings: set[str], scores: set[str], tmp_path: Path) -> None:
    found = results("cifar10h", words(folder, "run", *more, "--head-steps", "2", "--steps", "2"), tmp_path)
    assert set(metrics(tmp_path / "run")) == trainings
    assert {name for name in found["tables"][0]["scores"] if "two views" not in name} == scores
    assert ("credible_sets" in found) == ("1/kappa" in scores)
    assert found["folds"][0]["best"]["step"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--folds", "5"], "different numbers of 0 to 4"),
        (["--head-lr", "-1"], "--head-lr -1.0 was given; expected a number above 0"),
        (["--clip", "-1"], "--clip -1.0 was given; expected a number above 0"),
        (["--warmup", "3"], "--warmup 3.0 was given; expected a number from 0 to below 1"),
        (["--weight-decay", "-1"], "--weight-decay -1.0 was given; expected 0 or more"),
        (["--head-steps", "-1"], "--head-steps -1 was given; expected 0 or more"),
        (["--resamples", "1"], "--resamples 1 was given; expected 2 or more"),
        (["--rows", "-20"], "--rows -20 was given; expected 100 or more"),
        (["--batch-size", "-64"], "--batch-size -64 was given; expected 1 or more"),
        (["--batch-size", "40", "--block", "16"], "multiple of --block 16"),
        (["--backbone", "resnet56"], "cifar10_resnet56.safetensors is not there"),
        (["--backbone", "resnet18"], "--checkpoint FILE"),
        (["--backbone", "resnet19"], "'resnet18'"),
        (["--batch-size", "512", "--block", "512"], "fewer than a batch"),
        (["--labels", "none.npy"], "--labels none.npy was given, and there is no such file"),
        (["--variant", "posthoc", "--scratch"], "neither --scratch"),
        (["--kappa", "1e9"], "expected"),
        (["--loss", "hib"], "give --preset hib, which draws them and has the loss's numbers, or --pairs drawn"),
        (["--loss", "mcinfonce"], "give --preset mcinfonce, "),
        (["--phases", "1"], "paper's switches: give --pairs drawn"),
        (["--preset", "posthoc", "--dim", "100", "--kappa", "40"], "resnet20 has 64 features, at whose principal"),
        (["--dim", "65", "--parametrization", "norm"], "give --dim 64 or less, or --no-centred"),
        (["--pairs", "drawn", "--reference", "--dim", "12"], "fitted for 4, 8, 10, 16, 32, 64 dimensions"),
    ],
)
def test_bad_options_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command([*words(folder, str(tmp_path / "bad")), *more])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("posthoc: ")
    assert message in shown


def test_more_dimensions_than_features_need_no_principal_directions() -> None:
    check_width(Cifar10HConfig(loss="soft-cross-entropy", dim=65), 64)  # has no projection
    check_width(Cifar10HConfig(centred=False, dim=65), 64)
    network = PosteriorNetwork(nn.Identity(), 64, 65, centred=False)
    features = torch.randn(90, 64)
    network.start(features)
    assert network(features).mean_direction.shape == (90, 65)


def test_the_papers_scripts_are_the_presets() -> None:
    """spec/mcinfonce.md section 6: e_dim_z, t, kappa, n_neg, n_phases."""
    known = {
        "paper": (8, 16, 16, 32, 1),
        "paper-elk": (8, 32, 32, 1, 0),
        "paper-hib": (8, None, 32, 0, 1),
        "paper-hard": (16, 16, 16, 0, 0),
        "paper-train-hard": (8, 64, 64, 0, 1),
    }
    for name, (dim, t, kappa, negatives, phases) in known.items():
        config = Cifar10HConfig(**PRESETS[name])
        assert (config.dim, config.kappa, config.negatives, config.phases) == (dim, kappa, negatives, phases)
        assert t is None or config.concentration == t
        assert (config.parametrization, config.centred, config.lr, config.steps) == ("norm", False, 1e-4, 100_000)
        assert (config.batch_size, config.samples, config.every, config.weight_decay) == (128, 128, 500, 0.01)
        assert (config.pairs, config.keep, config.schedule, config.clip) == ("drawn", "crop", "halved", None)
        assert (config.augment, config.crops, config.symmetric, config.head_steps) == (False, 0.0, False, 0)
        loss: Any = make_loss(config)
        assert loss.reference  # its sampler, or its fitted normaliser
        assert not getattr(loss, "antithetic", False)
    hib = Cifar10HConfig(**PRESETS["paper-hib"])
    assert (hib.hib_scale, hib.hib_shift) == (2.0, 1.0)
