"""The recipe tau on frozen networks: heads, preprocessing, weights as they are distributed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from posthoc.adapters.errors import BackboneError
from posthoc.adapters.heads import temperature as temperature_head
from posthoc.adapters.losses import TaU
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.weights import read_checkpoint
from posthoc.recipes.cifar10h_networks import cifar_backbone
from posthoc.recipes.tau_options import TauConfig
from posthoc.recipes.tau_posthoc import encoder_weights, frozen_backbone, open_set

from .recipe_children import metrics, results, results_of_two
from .recipe_data import write_idx
from .tau_runs import FROZEN, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tau"))


def test_two_processes_fit_a_head_as_one(folder: Path) -> None:
    options = "--train-images 130 --test-images 60 --ood-images 40 --epochs 2 --batch-size 64 --reference --output"
    one = results("tau", [*FROZEN.split(), *options.split(), "head-of-1"], folder)
    two = results_of_two("tau", [*FROZEN.split(), *options.split(), "head-of-2"], folder)
    for name in ("train_loss", "held_out_loss"):
        assert two["fit"][name] == pytest.approx(one["fit"][name], rel=1e-4)
    tau_of_two, tau_of_one = (found["ood"]["mnist"]["scores"]["tau"]["auroc"]["value"] for found in (two, one))
    assert tau_of_two == pytest.approx(tau_of_one, abs=2e-3)


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


def test_a_cifar_networks_images_are_brought_to_its_size() -> None:
    transform: Any = frozen_backbone(TauConfig(backbone="resnet20", random_weights=True)).transform
    small_one = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for shape in ((256, 320, 3), (28, 28, 3)):
        assert transform(Image.fromarray(np.zeros(shape, np.uint8))).shape == (3, 32, 32)
    plain: Any = cifar_backbone("resnet20", scratch=True).transform
    assert torch.equal(transform(Image.fromarray(small_one)), plain(Image.fromarray(small_one)))


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
