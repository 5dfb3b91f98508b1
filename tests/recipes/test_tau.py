"""Whole runs of the recipe tau on scikit-learn's digits, which stand for FashionMNIST."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posthoc.eval.ood import Ood
from posthoc.recipes import tau
from posthoc.recipes.tau import make_network, settle

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two
from .recipe_data import write_idx
from .tau_runs import FROZEN, SHORT, SMALL, make_folder, small, some_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tau"))


def test_it_learns_and_says_what_it_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL, "--epochs", "8", "--every", "4", "--lr", "3e-3", "--check", "--reference", "--output", "learns"]
    words[words.index("--throughput-steps") + 1] = "1"
    found = results("tau", words, folder)
    assert found["worth"]["linear"] > found["random_features"]["linear"] + 0.01
    assert found["worth"]["nearest_projection"] > found["random_features"]["nearest_projection"] + 0.1
    seen = records(folder / "learns")
    assert [record["step"] for record in seen] == [4 * 19, 8 * 19]
    assert found["held_out"]["after"] == seen[-1]
    assert seen[-1]["own_view_found"] > 1.3 * found["held_out"]["before"]["own_view_found"]
    assert 0.1 < seen[-1]["tau_5"] < seen[-1]["tau_50"] < seen[-1]["tau_95"]
    assert list(found["ood"]) == ["mnist"]
    scores = found["ood"]["mnist"]["scores"]
    assert list(scores) == ["kNN", "1/feature-norm", "kNN, as released", "tau", "-r^2, as released"]
    assert scores["kNN"]["auroc"]["value"] > 0.6  # of noise
    assert found["scores"]["tau"][0] >= 0.1
    speed = found["throughput"]
    ratio = speed["training_images_per_second"] / speed["random_tensors_images_per_second"]
    assert speed["share"] == pytest.approx(ratio, rel=0.02)
    table = Ood(id="learns/scores/fashion-mnist.npz", ood=("learns/scores/mnist.npz",), resamples=100)
    monkeypatch.chdir(folder)
    (again,) = table.tables()
    assert again.as_dict()["scores"]["tau"]["auroc"]["value"] == pytest.approx(scores["tau"]["auroc"]["value"])
    for name in ("training.png", "ood.png", "certainty.png", "config.json"):
        assert (folder / "learns" / name).is_file()


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    """What a short run found that nothing disturbed; it is in the folder `whole`."""
    return results("tau", [*SHORT, "whole", "--method", "tau-moco", "--queue", "96", "--dropout", "0.1"], folder)


def test_a_killed_run_goes_on_to_the_same_result(folder: Path, unbroken: dict[str, Any]) -> None:
    more = ["--method", "tau-moco", "--queue", "96", "--dropout", "0.1"]
    killed = kill_at_checkpoint("tau", [*SHORT, "killed", *more], folder, "train/checkpoint.pt")
    assert killed != metrics(folder / "whole")
    resumed = results("tau", [*SHORT, "killed", *more, "--resume"], folder)
    assert metrics(folder / "killed") == metrics(folder / "whole")
    for name in ("worth", "random_features", "ood", "scores"):
        assert resumed[name] == unbroken[name]


def test_two_processes_are_one(folder: Path) -> None:
    one = results("tau", [*SHORT, "of-1", "--dropout", "0.1"], folder)
    timed = [*SHORT, "of-2", "--dropout", "0.1"]
    timed[timed.index("--throughput-steps") + 1] = "1"
    two = results_of_two("tau", timed, folder)
    for a, b in zip(records(folder / "of-1"), records(folder / "of-2"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert two["scores"]["tau"] == pytest.approx(one["scores"]["tau"], rel=1e-3)
    assert two["random_features"] == one["random_features"]
    assert one["throughput"] == {}
    assert two["throughput"]["share"] > 0


def test_a_run_stands_on_all_that_it_is_judged_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*given: Any) -> None:
        raise Stop

    monkeypatch.setattr(tau, "train_member", stop)
    monkeypatch.setattr("posthoc.recipes.tau_posthoc.fitted", stop)
    shutil.copytree(folder / "data", tmp_path / "data")
    found: list[str] = []
    for number in (0, 1):
        write_idx(tmp_path / "data/MNIST/raw", "t10k", np.full((100, 16, 16), number, np.uint8), np.arange(100) % 10)
        for words in ([*SHORT, f"trained-{number}"], [*FROZEN.split(), "--output", f"head-{number}"]):
            with pytest.raises(Stop):
                results("tau", words, tmp_path)
            found.append(json.loads((tmp_path / words[-1] / "config.json").read_text())["content"])
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("--method simclr --members 2", ["ensemble", "ensemble, not aligned, as released"]),
        ("--method hib", ["std"]),
        ("--method moco --queue 64 --papers-probe", []),
        ("--method supervised --dropout 0.5 --passes 3",
         ["max-softmax", "entropy", "energy", "max-logit", "MC dropout", "ODIN"]),
    ],
)  # fmt: skip
def test_every_baseline_has_its_score(folder: Path, words: str, own: list[str]) -> None:
    name = words.replace(" ", "").lstrip("-")
    short = [*SMALL, "--train-images", "150", "--epochs", "1", *words.split(), "--output", name]
    if "supervised" in words:  # which has no projection
        short = " ".join(short).replace("--hidden 32 --dim 16", "").split()
    found = results("tau", short, folder)
    papers = {"linear_papers_sgd_unaugmented", "nearest_papers_two_views", "nearest_papers_one_view"}
    assert (papers <= set(found["worth"])) == (papers <= set(found["random_features"])) == ("papers" in words)
    scores = found["ood"]["mnist"]["scores"]
    assert list(scores) == ["kNN", "1/feature-norm", *own]
    assert len(found["seconds_of_training"]) == (2 if "members" in words else 1)
    for row in found["scores"].values():
        assert row == sorted(row)
        assert row[0] < row[-1]


def test_random_features_get_batchnorms_statistics() -> None:
    images, config = some_images(100), small(network="resnet18", norm="batch", method="simclr")
    network = make_network(config, images)
    settle(network, images, CPU)
    assert not any(part.training for part in network.modules())
    inner: Any = network.encoder.network
    x = network.encoder.normalised(images.pixels / 255)
    with torch.no_grad():
        first = inner.conv1(x)
    torch.testing.assert_close(inner.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(inner.bn1.running_var, first.var((0, 2, 3)), rtol=1e-3, atol=1e-4)
    norms = [part for part in network.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert all(norm.running_mean is not None and norm.running_mean.abs().max() > 0 for norm in norms)
    grouped = make_network(small(), images)
    before = copy.deepcopy(grouped.state_dict())
    settle(grouped, images, CPU)
    assert all(torch.equal(value, before[name]) for name, value in grouped.state_dict().items())


def test_networks_are_compiled_where_it_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    short = [*SMALL, "--train-images", "100", "--epochs", "1", "--compile", "--output", "compiled"]
    results("tau", short, folder)
    assert [type(one).__name__ for one in compiled] == ["Encoder"]
