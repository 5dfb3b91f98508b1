"""The recipe tau: methods and scores by hand, whole runs on scikit-learn's digits, which stand for FashionMNIST."""

from __future__ import annotations

import copy
import json
import os
import runpy
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.distributions import Normal

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import BackboneError, DataError, OptionError
from posthoc.adapters.heads import temperature as temperature_head
from posthoc.adapters.losses import HedgedGaussian, NTXent, TaU, TaUMoCo
from posthoc.adapters.losses.tau import temperature
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.splits import row_uniform
from posthoc.adapters.training_loop import step_generator
from posthoc.adapters.weights import read_checkpoint
from posthoc.eval.ood import Ood
from posthoc.recipes import tau, tau_options
from posthoc.recipes.augmentations import Augmentation
from posthoc.recipes.masked_dropout import MaskedDropout, draw_masks, dropouts, dropping
from posthoc.recipes.networks import StridedConvNet
from posthoc.recipes.options import parse
from posthoc.recipes.pretraining import own_view_found
from posthoc.recipes.pretraining_evaluation import encode
from posthoc.recipes.pretraining_networks import PretrainingNetwork
from posthoc.recipes.small_image_networks import small_image_network
from posthoc.recipes.tau import make_network, settle, watched
from posthoc.recipes.tau_methods import (
    SAMPLES,
    Batches,
    Hedged,
    Queue,
    make_method,
    posterior,
    with_dropout,
)
from posthoc.recipes.tau_options import TauConfig
from posthoc.recipes.tau_posthoc import encoder_weights, frozen_backbone, open_set
from posthoc.recipes.tau_scores import own_scores, papers_neighbours, spread, uncertainties
from posthoc.recipes.view_batches import BLOCK, Images, ViewBatches

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two
from .recipe_data import write_digits, write_idx

CPU, ALONE = torch.device("cpu"), Launch(0, 1)
TINY = "--dataset fashion-mnist --data-dir data --width 8 --hidden 32 --dim 16 --batch-size 64"
SMALL = [*TINY.split(), "--probe-images", "300", "--ood-images", "50", "--throughput-steps", "0"]
SHORT = [*SMALL, "--train-images", "300", "--epochs", "3", "--output"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,400 digits of 16 x 16 px, 397 others to test, and 100 of noise in MNIST's place."""
    place = tmp_path_factory.mktemp("tau")
    write_digits(place / "data")
    noise = np.random.default_rng(1).integers(0, 256, (100, 16, 16), dtype=np.uint8)
    write_idx(place / "data" / "MNIST" / "raw", "t10k", noise, np.arange(100) % 10)
    return place


def some_images(count: int, size: int = 8) -> Images:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    return Images(pixels, np.arange(count) % 5)


def small(**options: Any) -> TauConfig:
    return TauConfig(**{"width": 8, "hidden": 16, "dim": 6, "batch_size": 32, **options})


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


FROZEN = "--backbone resnet20 --random-weights --dataset fashion-mnist --data-dir data --cache-dir store --views 2"


def test_two_processes_fit_a_head_as_one(folder: Path) -> None:
    options = "--train-images 130 --test-images 60 --ood-images 40 --epochs 2 --batch-size 64 --reference --output"
    one = results("tau", [*FROZEN.split(), *options.split(), "head-of-1"], folder)
    two = results_of_two("tau", [*FROZEN.split(), *options.split(), "head-of-2"], folder)
    for name in ("train_loss", "held_out_loss"):
        assert two["fit"][name] == pytest.approx(one["fit"][name], rel=1e-4)
    tau_of_two, tau_of_one = (found["ood"]["mnist"]["scores"]["tau"]["auroc"]["value"] for found in (two, one))
    assert tau_of_two == pytest.approx(tau_of_one, abs=2e-3)


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


def test_the_losses_are_the_librarys(generator: torch.Generator) -> None:
    views = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2)]
    images = some_images(64)
    for options, loss in (
        ({"method": "tau"}, TaU(0.1)),
        ({"method": "tau", "reference": True}, TaU(0.1, reference=True)),
        ({"method": "tau", "include_positive": True, "temperature": 0.3}, TaU(0.3, include_positive=True)),
        ({"method": "simclr"}, NTXent(0.1)),
    ):
        config = small(**options)
        method = make_method(make_network(config, images), config)
        one, other = (method.network(view)[1] for view in views)
        if config.method == "tau":
            theirs = loss(one[:, :6], other[:, :6], one[:, 6], other[:, 6])
        else:
            theirs = loss(one, other)
        torch.testing.assert_close(method(*views, 0, None), theirs)
    config = small(method="hib")
    method = make_method(make_network(config, images), config)
    assert isinstance(method, Hedged)
    one, other = (posterior(method.network(view)[1]) for view in views)
    theirs = HedgedGaussian(0.5, 0.0, 4, 1e-4)(one, other, generator=step_generator(0, SAMPLES, 7, 0))
    torch.testing.assert_close(method(*views, 7, None), theirs)
    assert isinstance(one, Normal)
    assert (one.stddev[:, :1] == one.stddev).all()


def test_mocos_keys_come_from_a_network_that_trails(generator: torch.Generator) -> None:
    config = small(method="tau-moco", queue=80, momentum=0.75)
    method = make_method(make_network(config, some_images(64)), config)
    assert isinstance(method, Queue)
    first, second = (torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2))
    queue = method.moco.queue.clone()
    query, key = method.network(first)[1], method.network(second)[1][:, :6].detach()
    theirs = TaUMoCo(0.1)(query[:, :6], key, queue, query[:, 6])
    torch.testing.assert_close(method(first, second, 0, None), theirs)
    torch.testing.assert_close(method.moco.queue[:32], nn.functional.normalize(key, dim=1))
    assert torch.equal(method.moco.queue[32:], queue[32:])
    old = {name: value.clone() for name, value in method.network.state_dict().items()}
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(1.0)
    method(first, second, 1, None)
    for name, value in method.moco.encoder.state_dict().items():
        torch.testing.assert_close(value, old[name] + 0.25)  # a quarter of the way


def test_dropout_drops_whole_channels_by_masks() -> None:
    layers = nn.Sequential(MaskedDropout(0.25, 50), MaskedDropout(0.5, 50))
    x = torch.ones(2 * BLOCK, 50, 3, 3)
    assert torch.equal(layers(x), x)
    kept = draw_masks(layers, BLOCK, [torch.Generator().manual_seed(k) for k in (0, 1)])
    assert kept.shape == (2 * BLOCK, 100)
    with dropping(layers, kept):
        first = layers[0](x)
        both = layers(x)
    assert torch.equal(layers(x), x)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (first == first[:, :, :1, :1]).all()
    assert (first == 0).double().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(both, x * (kept[:, :50] / 0.75 * kept[:, 50:] / 0.5)[..., None, None])
    assert (both == 0).double().mean() == pytest.approx(1 - 0.75 * 0.5, abs=0.03)
    assert torch.equal(draw_masks(layers, BLOCK, [torch.Generator().manual_seed(1)]), kept[BLOCK:])  # a block's own


def test_dropout_stands_behind_the_first_activation_of_each_block(generator: torch.Generator) -> None:
    network = StridedConvNet(3, 8)
    with_dropout(network, 0.5)
    assert [layer.channels for layer in dropouts(network)] == [8, 16, 32, 64]
    resnet = small_image_network("resnet18", 0)
    with_dropout(resnet, 0.5)
    assert [name for name, part in resnet.named_modules() if isinstance(part, MaskedDropout)] == [
        f"layer{stage}.{block}.act1.1" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    x = torch.rand(3, 3, 8, 8, generator=generator)
    whole = torch.ones(3, 2 * (64 + 128 + 256 + 512), dtype=torch.bool)
    for part in resnet.modules():
        if isinstance(part, nn.BatchNorm2d):  # timm's blocks begin as the identity
            nn.init.ones_(part.weight)
    with dropping(resnet.eval(), whole):
        nothing_dropped = resnet(x)  # the masks fit the channels of every layer
    assert nothing_dropped.shape == (3, 512)
    assert not torch.allclose(nothing_dropped, resnet(x))  # what stays counts twice
    with pytest.raises(BackboneError, match="no blocks of timm's ResNets"):
        with_dropout(nn.Sequential(nn.Linear(2, 2)), 0.5)


def test_a_queue_drops_other_channels_of_each_view(generator: torch.Generator) -> None:
    config = small(method="moco", queue=80, dropout=0.5)
    method = make_method(make_network(config, some_images(64)), config)
    first, second = (torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2))
    kept = draw_masks(method.network, 64, [generator])
    with dropping(method.network, kept[:32]):
        query = method.network(first)[1]
    with dropping(method.network, kept[32:]):
        key = method.network(second)[1].detach()
    assert isinstance(method, Queue)
    flat = torch.full((32,), torch.inf)
    theirs = TaUMoCo(0.1)(query, key, method.moco.queue.clone(), flat)
    torch.testing.assert_close(method(first, second, 0, kept), theirs)


def test_rows_are_gathered_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr("posthoc.recipes.tau_methods.gather_rows", lambda rows: (seen.append(rows.dtype), rows)[1])
    config = small(method="simclr")
    method = make_method(make_network(config, some_images(64)), config)
    with torch.autocast("cpu", torch.bfloat16):
        assert method.network(torch.rand(2, 3, 8, 8))[1].dtype == torch.bfloat16
        method(torch.rand(32, 3, 8, 8), torch.rand(32, 3, 8, 8), 0, None)
    assert seen == [torch.float32]


def test_processes_contrast_their_own_images_only_where_it_is_asked_for(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2)]

    def twice(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows + 0.1])

    monkeypatch.setattr("posthoc.recipes.tau_methods.gather_rows", twice)
    for gather in (True, False):
        config = small(method="simclr", gather=gather)
        method = make_method(make_network(config, some_images(64)), config)
        both = torch.stack([method.network(view)[1] for view in views], 1)
        rows = twice(both) if gather else both
        torch.testing.assert_close(method(*views, 0, None), NTXent(0.1)(rows[:, 0], rows[:, 1]))


def test_processes_that_contrast_their_own_images_draw_their_own_samples(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2)]
    monkeypatch.setattr("posthoc.recipes.tau_methods.gather_rows", lambda rows: rows)
    for gather in (True, False):
        config, losses = small(method="hib", gather=gather), []
        for rank in (0, 1):
            monkeypatch.setattr("posthoc.recipes.tau_methods.check_launch", lambda rank=rank: Launch(rank, 2))
            losses.append(make_method(make_network(config, some_images(64)), config)(*views, 0, None).item())
        assert (losses[0] == losses[1]) == gather


def test_batches_hold_what_a_method_takes() -> None:
    images = some_images(70)
    network = nn.Sequential(MaskedDropout(0.5, 3), MaskedDropout(0.5, 4))
    views = ViewBatches(images, Augmentation(), BLOCK, 0, ALONE, CPU, 1)
    (view, label, kept) = Batches(views, images, True, network)(0)
    assert view.shape == (BLOCK, 3, 8, 8)
    assert label.tolist() == (views.rows(0) % 5).tolist()
    assert kept.shape == (BLOCK, 7)
    whole, *shares = (
        ViewBatches(images, Augmentation(), 2 * BLOCK, 0, launch, CPU) for launch in (ALONE, Launch(0, 2), Launch(1, 2))
    )
    (step, kept), *others = (Batches(one, images, False, network)(3)[2:] for one in (whole, *shares))
    assert step == 3
    assert kept.shape == (4 * BLOCK, 7)
    for view in (0, 1):  # two processes' masks are one's
        together = torch.cat([other[view * BLOCK : (view + 1) * BLOCK] for _, other in others])
        assert torch.equal(together, kept[2 * BLOCK * view : 2 * BLOCK * (view + 1)])
    assert not torch.equal(kept[: 2 * BLOCK], kept[2 * BLOCK :])
    assert Batches(whole, images, False, nn.Sequential(MaskedDropout(0.0, 3)))(3)[2:] == (3, None)


def test_members_that_differ_by_a_rotation_agree(generator: torch.Generator) -> None:
    images, config = some_images(50), small(method="simclr")
    network = make_network(config, images)
    turned = copy.deepcopy(network)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    last: Any = turned.projection
    with torch.no_grad():
        last[-1].weight.copy_(turn @ last[-1].weight)
    both = [network, turned]
    known = [encode(one, images, CPU) for one in both]
    found = uncertainties(both, known, images, config, CPU)
    assert found["ensemble"].max() < 1e-5
    assert found["ensemble, not aligned, as released"].min() > 0.05


def test_scores_by_hand() -> None:
    images, config = some_images(50), small()
    network = make_network(config, images)
    assert isinstance(network, PretrainingNetwork)
    known = encode(network, images, CPU)
    raw = torch.from_numpy(known.projection[:, 6])
    found = uncertainties([network], [known], images, config, CPU)
    np.testing.assert_allclose(found["tau"], 0.1 / torch.sigmoid(raw).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["-r^2, as released"], -(raw.numpy() ** 2), rtol=1e-5)
    np.testing.assert_allclose(found["1/feature-norm"], 1 / np.linalg.norm(known.feature, axis=1), rtol=1e-5)
    unit = known.projection[:, :6] / np.linalg.norm(known.projection[:, :6], axis=1, keepdims=True)
    tenth = np.sort(1 - unit @ unit.T, 1)[:, 9]
    np.testing.assert_allclose(found["kNN"], tenth, atol=1e-5)
    apart = np.sort(np.linalg.norm(unit[:, None] - unit, axis=2), 1)
    np.testing.assert_allclose(
        papers_neighbours(known.projection[:, :6], unit, True), apart[:, 1:11].mean(1), atol=1e-3
    )
    np.testing.assert_allclose(papers_neighbours(3 * unit, unit, False), apart[:, :10].mean(1), atol=1e-3)
    np.testing.assert_allclose(spread([np.zeros((3, 2)), np.array([[0, 1], [2, 2], [0, 0]])]), [0.5**1.5, 2**0.5, 0])
    pair = (images.pixels / 255, images.pixels / 255)
    seen = watched(network.eval(), config, pair, images)
    own = torch.from_numpy(known.projection[:, :6])
    assert seen["own_view_found"] == own_view_found(own, own) > 0.5
    assert seen["tau_50"] == pytest.approx(float(temperature(raw, 0.1).quantile(0.5)), rel=1e-5)


def test_temperatures_that_come_near_t_still_rank() -> None:
    raw = torch.linspace(14, 30, 200)
    found = own_scores(torch.cat([torch.zeros(200, 6), raw[:, None]], 1).numpy(), small())
    assert (np.diff(found["tau"]) < 0).all()
    assert (temperature(raw, 0.1) == 0.1).any()  # as they do not in float32


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


def test_a_head_on_a_frozen_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "data", folder / "sorted")
    train = open_set(TauConfig(dataset="fashion-mnist", data_dir=folder / "data"), "train")
    order = np.argsort(train.column("label"), kind="stable")  # as folders are
    images = np.stack([np.asarray(train.item(int(row)).image) for row in order])
    write_idx(folder / "sorted" / "FashionMNIST" / "raw", "train", images, train.column("label")[order])
    words = "--backbone resnet20 --random-weights --train-images 130 --test-images 60 --ood-images 40 --dataset fashion-mnist"
    more = [*words.split(), "--data-dir", "sorted", "--cache-dir", "store", "--views", "2"]
    more += ["--epochs", "3", "--batch-size", "64", "--lr", "0.01"]
    found = results("tau", [*more, "--reference", "--output", "views"], folder)
    assert found["positives"] == "views"
    assert found["backbone"]["embedding_dim"] == 64
    assert found["fit"]["base_temperature"] == 0.1
    scores = found["ood"]["mnist"]["scores"]
    assert list(scores)[:4] == ["kNN", "1/feature-norm", "tau", "-r^2, as released"]
    assert (folder / "views" / "adapter" / "adapter.safetensors").is_file()
    assert (folder / "views" / "certainty.png").is_file()
    (fitted,) = metrics(folder / "views").values()
    assert len(fitted.splitlines()) == 3  # one for each epoch
    # the first 130 are of one class, of which no pairs by labels are made
    trained: list[tuple[Any, torch.Tensor]] = []

    def train(step: Any, rows: np.ndarray, *others: Any, **options: Any) -> Any:
        trained.append((step, torch.from_numpy(rows)))
        return real(step, rows, *others, **options)

    real = temperature_head.train
    monkeypatch.setattr(temperature_head, "train", train)
    by_labels = results("tau", [*more, "--reference", "--positives", "labels", "--output", "labels"], folder)
    ((step, rows),) = trained
    batch = step.source.draw(rows, torch.Generator().manual_seed(3))
    assert batch.negative.sum() < len(rows) * (len(rows) - 1)  # which are negatives all the same
    cosines = [nn.functional.normalize(one, dim=1) for one in (batch.anchor, batch.positive)]
    theirs = TaU(0.1, reference=True)(*cosines, *(step.head.raw(one) for one in (batch.anchor, batch.positive)))
    torch.testing.assert_close(step(rows, torch.Generator().manual_seed(3)), theirs)
    assert by_labels["ood"]["mnist"]["scores"]["tau"] != scores["tau"]
    assert by_labels["ood"]["mnist"]["scores"]["kNN"] == scores["kNN"]  # the same features


def test_a_heads_training_is_the_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def fit(self: UncertainModel, data: Any, **options: Any) -> None:
        raise Stop([len(data), options["epochs"], options["lr"], options["batch_size"], options["views"]])

    monkeypatch.setattr(UncertainModel, "fit", fit)
    words = (
        "--backbone resnet20 --random-weights --train-images 90 --ood-images 5 --dataset fashion-mnist --data-dir data"
    )
    options = "--epochs 7 --lr 0.25 --batch-size 48 --views 3 --output stopped"
    with pytest.raises(Stop, match=r"\[90, 7, 0\.25, 48, 3\]"):
        results("tau", [*words.split(), *options.split()], folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "mean", "crop"),
    [
        ("resnet50", 2048, 0.485, 0.875),
        ("simclr", 2048, 0.485, 0.875),
        ("byol", 2048, 0.485, 0.875),
        ("clip", 512, 0.48145466, 0.9),
    ],
)
def test_every_frozen_network_has_its_own_preprocessing_and_embedding(
    name: str, size: int, mean: float, crop: float, tmp_path: Path
) -> None:
    backbone = frozen_backbone(TauConfig(backbone=name, random_weights=True))
    assert backbone.embedding_dim == size
    assert backbone.preprocessing["mean"][0] == pytest.approx(mean)
    assert backbone.preprocessing["input_size"][-2:] in ([224, 224], (224, 224))
    assert backbone.preprocessing["crop_pct"] == crop
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    features = backbone.extract((images, np.array([0, 1])), cache_dir=tmp_path, progress=False)
    assert features.embedding.shape == (2, size)
    assert (features.logits is not None) == (name == "resnet50")
    assert np.abs(features.embedding[0] - features.embedding[1]).max() > 0
    if name == "clip":  # what its encode_image answers with
        network: Any = backbone.module
        with torch.no_grad():
            theirs = network(backbone.prepare(images))
        np.testing.assert_allclose(features.embedding, theirs.numpy(), rtol=1e-3, atol=1e-4)


def test_weights_that_no_package_fetches_are_asked_for() -> None:
    with pytest.raises(BackboneError, match="byol: no package fetches its weights"):
        frozen_backbone(TauConfig(backbone="byol", data_dir=Path("nowhere")))


def test_byols_weights_are_read_as_they_are_distributed(tmp_path: Path, generator: torch.Generator) -> None:
    """Its file holds the backbone beside other things, as an nn.Sequential of the network's children without the last."""
    network = timm.create_model("resnet10t", num_classes=0)  # small; a ResNet-50 has the same parts
    network.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    children = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
    children.extend([network.layer1, network.layer2, network.layer3, network.layer4, network.global_pool])
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator))
    file = tmp_path / "resnet50_byol_imagenet2012.pth.tar"
    torch.save({"online_backbone": children.state_dict(), "target_backbone": {}, "epoch": 3}, file)
    own = network.state_dict()
    state = read_checkpoint(file)
    assert "0.weight" in state
    for prefix in ("", "online_network.encoder."):
        found = encoder_weights({prefix + name: value for name, value in state.items()}, network, file)
        assert found.keys() == {name for name in own if "tracked" not in name}
        assert all(torch.equal(found[name], own[name]) for name in found)
    with pytest.raises(BackboneError, match=r"It holds stem\.weight, \.\.\.: convert the names to conv1\.weight"):
        encoder_weights({"stem.weight": state["0.weight"]}, network, file)


def test_a_frozen_networks_images_may_lie_in_a_folder(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in "ab":
            place = folder / "photos" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((5, 6, 3), 10 * number, np.uint8)).save(place / f"{number}.png")
    config = TauConfig(dataset=str(folder / "photos"), backbone="resnet20")
    assert len(open_set(config, "train")) == 6
    assert open_set(config, "test").column("label").tolist() == [0, 0, 1, 1]
    named = TauConfig(dataset="fashion-mnist", data_dir=folder / "data")
    assert len(open_set(named, "test")) == 397


def test_the_networks_own_weights_are_found_in_a_pretrainings(generator: torch.Generator) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    own = {name: torch.rand(value.shape, generator=generator) for name, value in network.state_dict().items()}
    trailing = {f"target_network.encoder.{name}": value + 1 for name, value in own.items()}
    trained = {f"online_network.encoder.{name}": value for name, value in own.items()}
    found = encoder_weights({**trailing, **trained, "projection.weight": torch.ones(2)}, network, Path("x"))
    assert found.keys() == {name for name in own if "tracked" not in name}
    assert all(torch.equal(found[name], own[name]) for name in found)
    with pytest.raises(BackboneError, match=r"prefixes that have them: 'a\.', 'b\.'"):
        encoder_weights({f"{k}.{name}": value for k in "ab" for name, value in own.items()}, network, Path("x"))
    with pytest.raises(BackboneError, match="none"):
        encoder_weights({"0.weight": own["0.weight"]}, network, Path("x"))


@pytest.mark.parametrize("preset", tau.PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    options = tau.PRESETS[preset]
    size = "default" if set(options) & set(tau_options.OF_A_HEAD) else "paper"
    config = parse("tau", TauConfig, tau.PRESETS, None, ["--preset", size, preset, "--seed", "1337"])
    assert config.seed == 1337
    assert {key: getattr(config, key) for key in options} == options
    if preset != "labels":  # which is a head's, and names no network
        tau.check_part(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--members 3 --papers-probe", "--members 3, --papers-probe: options of a pretraining"),
        ("--method simclr", r"--method simclr: options of a pretraining: a head .* \(--backbone resnet20\)"),
        ("--dropout 0.5", "--dropout 0.5"),
        ("--check", "--check: options"),
        ("--width 16", "--width 16"),
        ("--tracker wandb", "--tracker"),
        ("--temperature 0.05", r"--temperature 0\.05 was given; a head chooses its own t by blur"),
    ],
)  # fmt: skip
def test_a_head_refuses_what_it_would_not_read(words: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, ["--preset", "resnet20", *words.split()]))


@pytest.mark.parametrize("words", ["--positives labels", "--views 3", "--test-images 5", "--cache-dir x"])
def test_a_pretraining_refuses_what_it_would_not_read(words: str) -> None:
    with pytest.raises(OptionError, match=f"{words}: options of a head on a frozen network"):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, words.split()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method simclr --include-positive", "--include-positive: only read with --method tau"),
        ("--method simclr --queue 7 --momentum 0.5", "--queue 7, --momentum 0.5: only read with --method moco"),
        ("--method moco --no-gather", "--no-gather: only read with --method tau, simclr or hib"),
        ("--samples 3", "--samples 3: only read with --method hib"),
        ("--method supervised --temperature .5", "--temperature 0.5: only read with a contrast"),
        ("--method supervised --dim 16", "--dim 16: only read with a projection"),
        ("--method simclr --passes 4", "--passes 4: only read with --dropout"),
        ("--network resnet18 --width 5", "--width 5: only read with --network small"),
        ("--stem own", "--stem own: only read with a timm network"),
        ("--network resnet20 --stem own", "--stem own: only read with a timm network"),
    ],
)  # fmt: skip
def test_options_that_nothing_reads_are_refused(words: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, words.split()))


def test_what_a_size_sets_is_no_mistake() -> None:
    for words in ("paper supervised", "smoke supervised", "smoke tau-moco", "smoke --network resnet18", "paper hib"):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, ["--preset", *words.split()]))


def test_options_that_both_read_are_no_refusals() -> None:
    words = "--reference --no-gather --temperature 0.05 --epochs 3 --lr 0.1 --batch-size 64 --train-images 9 --seed 4"
    config = parse("tau", TauConfig, tau.PRESETS, None, ["--preset", "clip", *words.split()])
    tau.check_part(config)
    assert (config.temperature, config.batch_size) == (0.05, 64)
    tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, ["--preset", "labels", "--backbone", "resnet20"]))
    names = {one.name for one in fields(TauConfig)}
    assert names >= {*tau_options.OF_A_HEAD, *tau_options.OF_BOTH}


@pytest.mark.parametrize(
    ("words", "count", "processes"),
    [
        ("methods --mixed-precision bf16", 13, 1),
        ("methods --preset gpu --only TaU", 1, 1),
        ("methods --paper", 13, 1),
        ("frozen", 20, 1),
        ("gather", 4, 2),
        ("frozen -- --train-images 900", 20, 1),
    ],
)
def test_the_benchmarks_runs_are_configs(
    words: str, count: int, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every variant's options are those of a run, and no two variants' are the same."""
    place = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(place))
    benchmark = runpy.run_path(str(place / "tau.py"))
    seen: list[TauConfig] = []
    measured = {"worth": {"linear": 0.5}, "random_features": {"linear": 0.4}, "throughput": {}, "ood": {}}

    def carried_out(
        recipe: str, options: list[str], folder: Path, threads: int | None, processes: int
    ) -> dict[str, Any]:
        seen.append(parse(recipe, TauConfig, tau.PRESETS, None, options))
        tau.check_part(seen[-1])
        ran.append(processes)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return {**measured, "made": {"seconds": 60.0}}

    ran: list[int] = []
    benchmark["main"].__globals__["carried_out"] = carried_out
    part, *rest = words.split()
    monkeypatch.setattr("sys.argv", ["tau.py", part, "--data", "data", "--output", "o", "--seeds", "3", *rest])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    benchmark["main"]()
    assert len({repr(config) for config in seen}) == len(seen) == count
    assert set(ran) == {processes}
    assert {config.seed for config in seen} == {3}
    assert {config.train_images for config in seen} <= ({900} if "900" in words else {None, 4000})
    assert (tmp_path / f"o/cifar10-{part}.md").read_text().startswith("cifar10, seeds 3, 1.0 ")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("bf16" if "bf16" in words else "no")
    if "gpu" in words:
        assert (seen[0].network, seen[0].compile) == ("resnet18", True)
    if "paper" in words:
        plain = [config for config in seen if config.method in ("simclr", "moco") and config.dropout == 0]
        assert len(plain) == 5
        assert {config.lr for config in plain} == {1e-3}
        assert {config.lr for config in seen if config not in plain} == {1e-4}
    if words == "gather":
        assert sorted(config.gather for config in seen) == [False, False, True, True]


def test_what_cannot_work_is_said_before_it_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for wrong, said in (
        ({"temperature": 0.0}, r"--temperature 0\.0"),
        ({"passes": 1}, "--passes 1"),
        ({"dropout": 1.0}, r"--dropout 1\.0"),
        ({"dim": 1}, "--dim 1"),
        ({"probe_images": 9}, "--probe-images 9"),
        ({"include_positive": True, "reference": True}, "--include-positive and --reference"),
    ):
        options: Any = wrong
        with pytest.raises(OptionError, match=said):
            TauConfig(**options)

    def refused(*words: str, common: list[str] = SMALL) -> str:
        with pytest.raises(SystemExit) as exit:
            tau.main([*common, *words])
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert "--checkpoint x: options of a head on a frozen network" in refused("--checkpoint", "x", "--output", "b")
    assert "of a pretraining" in refused("--backbone", "resnet20", "--random-weights", "--output", "b")
    assert not (folder / "b").exists()
    assert "fewer than a batch of 64" in refused("--train-images", "70", "--output", "a")
    seed = next(seed for seed in range(99) if (row_uniform(np.arange(10), seed) > 0.2).all())
    with monkeypatch.context() as patch:
        patch.setattr(tau, "train_member", None)
        ten = ["10" if word == "300" else word for word in SMALL]
        few = refused("--seed", str(seed), "--output", "d", common=ten)
    assert "0 of 10 images that are probed are held out" in few
    images = some_images(64)
    tau.check_probed(small(), images, images)
    with pytest.raises(DataError, match="of one class: give more --probe-images"):
        tau.check_probed(small(), Images(images.pixels, np.zeros(64, np.int64)), images)
    worse = refused("--train-images", "100", "--epochs", "1", "--lr", "1e-9", "--check", "--output", "c")
    assert "beside that of random features; expected +0.010 or more" in worse
