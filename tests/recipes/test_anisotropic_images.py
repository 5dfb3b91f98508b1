"""AnInfoNCE on images: scikit-learn's digits stand for FashionMNIST, and a random network for the frozen one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from safetensors.torch import save_file

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import OptionError
from posthoc.eval.plots import COLOURS, GREYS
from posthoc.recipes import anisotropic_images
from posthoc.recipes.anisotropic_images import ImagesConfig
from posthoc.recipes.anisotropic_readout import Judged, bars, readout, table
from posthoc.recipes.anisotropic_views import feature_batches, image_part
from posthoc.recipes.augmentations import Augmentation, augment, draw
from posthoc.recipes.networks import CifarResNet, StridedConvNet
from posthoc.recipes.running import seeded
from posthoc.recipes.view_batches import BLOCK, CHUNK, Images, ViewBatches, load_images

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two
from .recipe_data import write_digits

CPU, ALONE = torch.device("cpu"), Launch(0, 1)
TINY = "--dataset fashion-mnist --data-dir data --width 8 --read-images 360 --batch-size 64 --dim 16"
SMALL = [*TINY.split(), "--temperature", "0.2", "--smallest-crop", "0.3"]
SHORT = [*SMALL, "--read-images", "200", "--steps", "8", "--every", "2", "--output"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,400 digits of 16 x 16 px and 397 others, in the layout of FashionMNIST."""
    place = tmp_path_factory.mktemp("images")
    write_digits(place / "data")
    return place


def test_it_learns_what_untrained_networks_do_not_know(folder: Path) -> None:
    words = [*SMALL, "--steps", "400", "--every", "100", "--lr", "5e-3", "--output", "learns", "--check"]
    found = results("anisotropic", ["--preset", "images", *words], folder)  # by way of the other recipe
    read = found["readouts"]
    assert list(read) == ["untrained backbone", "untrained projection", "backbone", "projection"]
    assert read["backbone"]["class"] > read["untrained backbone"]["class"] + 3
    assert read["projection"]["class"] > read["untrained projection"]["class"] + 10
    parameters = {"x", "y", "scale", "ratio", "flip", "brightness", "contrast"}  # of grey images
    for row in read.values():
        assert set(row) == {"class", "augmentation", *parameters}
        assert row["augmentation"] == pytest.approx(np.mean([row[name] for name in parameters]))
    seen = records(folder / "learns")
    assert [record["step"] for record in seen] == [100, 200, 300, 400]
    assert found["held_out_loss"] == seen[-1]["held_out_loss"] < seen[0]["held_out_loss"]
    assert found["share_of_collapse"] == pytest.approx(found["held_out_loss"] / math.log(1999))
    assert found["precision"] == sorted(found["precision"])
    assert found["precision"][-1] > found["precision"][0] > 0
    assert {path.name for path in (folder / "learns").iterdir()} >= {"readouts.png", "training.png", "config.json"}


def test_infonce_learns_one_precision(folder: Path) -> None:
    found = results("anisotropic_images", [*SHORT, "infonce", "--preset", "infonce", "--learn-temperature"], folder)
    assert len(set(found["precision"])) == 1
    assert found["precision"][0] != pytest.approx(5.0, abs=0.1)


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    """What a short run found that nothing disturbed; it is in the folder `whole`."""
    return results("anisotropic_images", [*SHORT, "whole"], folder)


def test_a_killed_run_goes_on_to_the_same_result(folder: Path, unbroken: dict[str, Any]) -> None:
    killed = kill_at_checkpoint("anisotropic_images", [*SHORT, "killed"], folder, "train/checkpoint.pt")
    assert killed != metrics(folder / "whole")
    resumed = results("anisotropic_images", [*SHORT, "killed", "--resume"], folder)
    assert metrics(folder / "killed") == metrics(folder / "whole")
    for name in ("readouts", "precision", "held_out_loss"):
        assert resumed[name] == unbroken[name]


def test_two_processes_are_one(folder: Path, unbroken: dict[str, Any]) -> None:
    two = results_of_two("anisotropic_images", [*SHORT, "of-2"], folder)
    for a, b in zip(records(folder / "whole"), records(folder / "of-2"), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    assert two["precision"] == pytest.approx(unbroken["precision"], rel=1e-4)
    assert two["readouts"]["backbone"] == pytest.approx(unbroken["readouts"]["backbone"], abs=1.0)


def test_a_frozen_network_sees_every_view_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"x_{k}": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for k, n in (("train", 290), ("test", 90))}
    labels = {f"y_{k}": (np.arange(n) % 10).astype(np.uint8) for k, n in (("train", 290), ("test", 90))}
    for k in ("train", "test"):  # a class is a brightness, so that it can be read
        arrays[f"x_{k}"] //= (1 + labels[f"y_{k}"] % 5)[:, None, None, None]
    np.savez(folder / "data" / "cifar10.npz", **arrays, **labels)
    with seeded(0):
        save_file(CifarResNet(20).state_dict(), folder / "data" / "cifar10_resnet20.safetensors")
    monkeypatch.setattr(anisotropic_images, "HELD_OUT", 150)
    passes: list[int] = []
    forward = CifarResNet.forward
    monkeypatch.setattr(CifarResNet, "forward", lambda self, x: (passes.append(len(x)), forward(self, x))[1])
    tiny = "--train-images 290 --read-images 100 --batch-size 32 --views 2 --dim 8 --steps 6 --every 3"
    words = ["--preset", "post-hoc", "--data-dir", "data", "--cache-dir", "store", *tiny.split(), "--output"]
    found = results("anisotropic_images", [*words, "frozen"], folder)
    assert list(found["readouts"]) == ["untrained projection", "backbone", "projection"]
    seen = sum(passes)
    once = 2 * 150 + 2 * 140 + 2 * 100 + 2 * 90  # two views of each image, or one and the image as it is
    assert once <= seen < once + 20
    passes.clear()
    other = results("anisotropic_images", [*words, "other", "--loss", "infonce", "--seed", "3"], folder)
    assert sum(passes) < 20  # those that look at the network's shape
    assert other["precision"] == pytest.approx([2.0] * 8)  # of InfoNCE: one over a temperature that is not learned
    assert other["readouts"]["backbone"]["augmentation"] == found["readouts"]["backbone"]["augmentation"]


def test_batches_are_those_of_the_global_rows() -> None:
    pixels = torch.randint(0, 256, (200, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    images, how = Images(pixels, np.zeros(200, np.int64)), Augmentation()
    whole = ViewBatches(images, how, 4 * BLOCK, 5, ALONE, CPU)
    shares = [ViewBatches(images, how, 4 * BLOCK, 5, Launch(rank, 2), CPU) for rank in (0, 1)]
    features = torch.arange(200 * 3).float().view(200, 3, 1)
    stored = feature_batches(features, 4 * BLOCK, 5, ALONE)
    for step in (0, 1, 7):
        first, second = whole(step)
        assert not torch.equal(first, second)
        parts = [share(step) for share in shares]
        assert torch.equal(torch.cat([part[0] for part in parts]), first)
        assert torch.equal(torch.cat([part[1] for part in parts]), second)
        a, b = (x[:, 0].long() for x in stored(step))
        assert torch.equal(a // 3, b // 3)  # the same images
        assert (a != b).all()  # by two of their views
        assert len((a // 3).unique()) == 4 * BLOCK
    assert not torch.equal(whole(0)[0], whole(1)[0])
    with pytest.raises(OptionError, match="100 rows in blocks of 32"):
        ViewBatches(images, how, 100, 0, ALONE, CPU)
    with pytest.raises(OptionError, match="a batch of 256 rows was asked for and there are 200 images"):
        ViewBatches(images, how, 256, 0, ALONE, CPU)


def test_mixed_precision_leaves_views_as_they_are() -> None:
    pixels = torch.randint(0, 256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    images, how = Images(pixels, np.zeros(64, np.int64)), Augmentation()

    def seen() -> tuple[torch.Tensor, ...]:
        fixed = torch.cat(list(image_part(images, how, 3, 1, CPU).view()))
        return *ViewBatches(images, how, 2 * BLOCK, 5, ALONE, CPU)(0), fixed

    expected = seen()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = seen()
    for one, other in zip(mixed, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_part_knows_what_was_done_to_its_views(folder: Path) -> None:
    images = load_images("fashion-mnist", "train", folder / "data").first(CHUNK + 60)
    part = image_part(images, Augmentation(), 3, 1, CPU)
    views, again = (torch.cat(list(part.view())) for _ in range(2))
    assert torch.equal(views, again)
    assert torch.equal(torch.cat(list(part.plain())), images.pixels / 255)
    flipped = part.parameters["flip"].bool()
    assert 0.4 < flipped.double().mean() < 0.6
    assert all(len(column) == CHUNK + 60 for column in part.parameters.values())
    other = image_part(images, Augmentation(), 3, 2, CPU)
    assert not torch.equal(other.parameters["x"], part.parameters["x"])
    # a view of a bright image by its own parameters: the first chunk's come first
    white = Images(torch.full_like(images.pixels, 100), images.label)
    shown = torch.cat(list(image_part(white, Augmentation(), 3, 1, CPU).view()))
    factor = part.parameters["brightness"].float()
    torch.testing.assert_close(shown.mean((1, 2, 3)), (factor * 100 / 255).clamp(max=1.0), atol=1e-4, rtol=0)


def test_readouts_by_hand() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for rows in (600, 400):
        label, x, noise = rng.integers(0, 3, rows), rng.normal(size=rows), rng.normal(size=(rows, 2))
        plain = np.c_[np.eye(3)[label], noise].astype(np.float32)
        view = np.c_[2 * x, rng.normal(size=(rows, 4))].astype(np.float32)
        parameters = {"x": torch.from_numpy(x), "y": torch.from_numpy(rng.normal(size=rows))}
        parts.append(Judged(plain, view, label, parameters))
    found = readout(*parts, seed=0)
    assert found["class"] == 100
    assert found["x"] == pytest.approx(100)
    assert -10 < found["y"] < 2
    assert found["augmentation"] == pytest.approx((found["x"] + found["y"]) / 2)
    assert table({"a": found}).splitlines()[0] == "| representation | class | augmentation | x | y |"
    assert table({"a": found}).splitlines()[2].startswith("| a | 100.0 | ")


def test_bars_have_the_spread_over_seeds_and_a_grey_reference() -> None:
    axis = Figure().subplots()
    rows = {"backbone": [1.0, 2.0], "a": [3.0, 4.0], "b": [5.0, 6.0]}
    errors = {name: [0.1 * value for value in values] for name, values in rows.items()}
    bars(axis, rows, ["x", "y"], errors, "backbone")
    assert [[bar.get_height() for bar in one.patches] for one in axis.containers[1::2]] == [*rows.values()]
    assert [to_hex(one.patches[0].get_facecolor()).upper() for one in axis.containers[1::2]] == [
        GREYS[-1], *COLOURS[:2],
    ]  # fmt: skip
    for one, values in zip(axis.containers[::2], errors.values(), strict=True):
        (_, _, (lines,)) = one.lines
        assert [np.ptp(line[:, 1]) / 2 for line in lines.get_segments()] == pytest.approx(values)


def test_the_strided_network(generator: torch.Generator) -> None:
    network = StridedConvNet(1, 8)
    images = torch.rand(3, 1, 28, 28, generator=generator)
    assert network(images).shape == (3, network.size) == (3, 64)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))  # no statistics of the batch
    with torch.no_grad():
        colours = draw(Augmentation(), 3, (1, 28, 28), generator)
        assert torch.isfinite(network(augment(images, colours))).all()


def test_what_cannot_work_is_said_before_it_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for wrong, said in (
        ({"steps": 0}, "--steps 0"),
        ({"train_images": -3}, "--train-images -3 was given; expected 1 or more"),
        ({"temperature": 0.0}, r"--temperature 0\.0"),
        ({"encoder": "frozen", "dataset": "fashion-mnist"}, "expected cifar10"),
        ({"encoder": "frozen", "views": 1}, "two views or more"),
    ):
        with pytest.raises(OptionError, match=said):
            ImagesConfig(**wrong)

    def refused(words: list[str]) -> str:
        with pytest.raises(SystemExit) as exit:
            anisotropic_images.main(words)
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert "the training images of cifar10 are not in nowhere" in refused(["--data-dir", "nowhere", "--output", "a"])
    few = refused([*SMALL, "--train-images", "1100", "--output", "b"])
    assert "1100 training images are there; expected 1000 to hold out and 360 more" in few
    worse = [*SMALL, "--steps", "1", "--every", "1", "--check", "--output", "c"]
    assert "the held-out loss is" in refused(worse)
