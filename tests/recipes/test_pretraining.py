"""What recipes that pretrain share: networks, batches of views, throughput, and the evaluation's parts."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as reference

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import BackboneError, DataError, OptionError
from posthoc.adapters.source_arrays import ArraySource, ListSource
from posthoc.adapters.training_loop import run_plan, step_generator
from posthoc.eval.dataset_classes import CLASSES
from posthoc.eval.dataset_readers import TINY_IMAGENET
from posthoc.eval.plots import gallery
from posthoc.eval.probe_protocols import TAU, sgd_probe
from posthoc.eval.probes import linear_probe
from posthoc.recipes.augmentations import Augmentation
from posthoc.recipes.image_sets import Chosen, bright, other_sets, other_sources, shaped, spread_over
from posthoc.recipes.networks import SmallConvNet
from posthoc.recipes.pretraining import Ahead, PretrainingConfig, in_memory, open_images, own_view_found, throughput
from posthoc.recipes.pretraining_evaluation import PROBE, Encoded, auroc, certainty_grid, ood_tables, scores_in, worth
from posthoc.recipes.pretraining_networks import (
    PretrainingNetwork,
    image_encoder,
    projection_head,
    synchronised,
    whole_network,
)
from posthoc.recipes.tau_report import draw_ood, ood_lines
from posthoc.recipes.view_batches import BLOCK, Augmented, Images, ViewBatches, fixed_views

from .recipe_data import write_idx

CPU, ALONE = torch.device("cpu"), Launch(0, 1)


def some_images(count: int, channels: int = 3, size: int = 8) -> Images:
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()
    return Images(pixels, np.arange(count))


@pytest.mark.parametrize(
    ("name", "channels", "pixels", "size"),
    [("small", 1, 28, 64), ("resnet20", 1, 28, 64), ("resnet18", 3, 32, 512), ("vit_tiny_patch16_224", 1, 28, 192)],
)
def test_networks_take_small_images_of_any_colours(
    name: str, channels: int, pixels: int, size: int, generator: torch.Generator
) -> None:
    encoder = image_encoder(name, channels, pixels, width=8)
    assert encoder.size == size
    images = torch.rand(3, channels, pixels, pixels, generator=generator)
    network = PretrainingNetwork(encoder, projection_head(size, 16, 5)).train()
    feature, projected = network(images)
    assert feature.shape == (3, size)
    assert projected.shape == (3, 5)
    alone, _ = network(images[1:2])  # GroupNorm: no statistics of the batch
    torch.testing.assert_close(alone, feature[1:2], atol=1e-5, rtol=1e-4)
    assert not [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "conv1"), ("resnet10t", None), ("seresnet18", "conv1"),
                        ("mobilenetv3_small_050", "conv_stem"), ("regnetx_002", None)],
)  # fmt: skip
def test_a_stem_becomes_cifars_or_the_network_is_refused(name: str, layer: str | None) -> None:
    if layer is None:
        with pytest.raises(BackboneError, match=rf"{name!r} has no stem that becomes CIFAR's .* --stem own"):
            image_encoder(name, 3, 32)
        assert image_encoder(name, 3, 32, stem="own").size > 0
        return
    network: Any = image_encoder(name, 3, 32).network
    first = getattr(network, layer)
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    assert isinstance(getattr(network, "maxpool", nn.Identity()), nn.Identity)
    maps = network.forward_features(torch.zeros(1, 3, 32, 32))
    own: Any = image_encoder(name, 3, 32, stem="own").network
    assert getattr(own, layer).stride == (2, 2)
    factor = 4 if layer == "conv1" else 2
    assert maps.shape[-1] == factor * own.forward_features(torch.zeros(1, 3, 32, 32)).shape[-1]


def test_a_network_that_is_built_for_a_size_is_told_it() -> None:
    assert image_encoder("deit_tiny_patch16_224", 3, 32, stem="own").size == 192
    with pytest.raises(BackboneError, match="'crossvit_tiny_240' takes no images of 32 px"):
        image_encoder("crossvit_tiny_240", 3, 32, stem="own")
    drawn = []
    for make in (lambda: whole_network("resnet10t", 3, 32), lambda: timm.create_model("resnet10t", num_classes=0)):
        torch.manual_seed(0)
        drawn.append([*make().state_dict().values(), torch.rand(1)])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True)), "asking draws no random number"


@pytest.mark.parametrize("width", [7, 12, 20, 32])
def test_networks_may_have_any_width(width: int) -> None:
    encoder = image_encoder("small", 3, 16, width=width)
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, 8 * width)
    plain = SmallConvNet(3, 5, width)
    assert plain(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    groups = {7: [1, 2, 4, 8], 12: [4, 8, 8, 8], 20: [4, 8, 8, 8], 32: [8] * 4}[width]
    for network, count in ((encoder, 4), (plain, 3)):
        found = [part.num_groups for part in network.modules() if isinstance(part, nn.GroupNorm)]
        assert found == groups[:count]


def test_batchnorm_is_synchronised_on_gpus_only() -> None:
    head = projection_head(4, 8, 2, "batch")
    assert isinstance(head[1], nn.BatchNorm1d)
    assert synchronised(head, Launch(0, 2), CPU) is head
    found = synchronised(head, Launch(0, 2), torch.device("cuda"))
    assert [type(part) for part in found.modules() if "Norm" in type(part).__name__] == [nn.SyncBatchNorm]
    with pytest.raises(BackboneError, match="did you mean 'small'"):
        image_encoder("smal", 3, 32)


def test_three_views_of_the_same_rows_in_one_process_and_two() -> None:
    images, how = some_images(200), Augmentation(blur=0.5)
    whole = ViewBatches(images, how, 4 * BLOCK, 5, ALONE, CPU, views=3)
    shares = [ViewBatches(images, how, 4 * BLOCK, 5, Launch(rank, 2), CPU, views=3) for rank in (0, 1)]
    assert whole.rows.each == 1
    for step in (0, 3):
        views = whole(step)
        assert len(views) == 3
        assert not torch.equal(views[1], views[2])
        for k in range(3):
            assert torch.equal(torch.cat([share(step)[k] for share in shares]), views[k])
        assert torch.equal(torch.cat([share.rows(step) for share in shares]), whole.rows(step))
        assert len(whole.rows(step).unique()) == 4 * BLOCK
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)
    (view,) = ViewBatches(images, still, BLOCK, 5, ALONE, CPU, views=1)(2)
    rows = ViewBatches(images, still, BLOCK, 5, ALONE, CPU, views=1).rows(2)
    torch.testing.assert_close(view, images.pixels[rows] / 255)


def test_fixed_views_depend_on_the_seed_alone() -> None:
    images = some_images(40)
    first, second = fixed_views(images, Augmentation(), 3, CPU)
    again, _ = fixed_views(images, Augmentation(), 3, CPU)
    other, _ = fixed_views(images, Augmentation(), 4, CPU)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_batches_that_are_made_ahead_are_the_same() -> None:
    made: list[int] = []

    def batch(step: int) -> tuple[int]:
        if step == 9:
            raise OptionError("no such batch")
        made.append(step)
        return (10 * step,)

    with Ahead(batch) as batches:
        assert [batches(step) for step in (3, 4, 5, 0, 1)] == [(30,), (40,), (50,), (0,), (10,)]
    assert sorted(made) == [0, 1, 2, 3, 4, 5, 6]
    with Ahead(batch) as batches:
        assert batches(8) == (80,)
        with pytest.raises(OptionError, match="no such batch"):
            batches(9)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        self.seen.append((x, rows))
        return self.norm(self.linear(x)).square().mean()


def test_throughput_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Tiny()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    config = PretrainingConfig(throughput_steps=2, batch_size=32)
    run: Any = SimpleNamespace(config=config, device=CPU)
    found = throughput(run, module, lambda step: (torch.full((32, 4), 2.0 + step), torch.arange(32)))
    assert found["share"] == pytest.approx(
        found["training_images_per_second"] / found["random_tensors_images_per_second"], rel=0.02
    )
    assert found["device"] == "cpu"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    random = [x for x, _ in module.seen if x.max() < 1]
    assert len(random) == 7  # three rounds of two steps, and one to begin with
    assert len(module.seen) == 13
    assert all(torch.equal(x, random[0]) for x in random)
    assert all(torch.equal(rows, torch.arange(32)) for _, rows in module.seen)
    config.throughput_steps = 0
    assert throughput(run, module, lambda step: ()) == {}


def test_throughput_is_of_batches_that_are_made_meanwhile_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threading.Event()
    disturbed: list[bool] = []
    made: list[int] = []
    at_start: list[int] = []

    def batch(step: int) -> tuple[Tensor, Tensor]:
        busy.set()
        time.sleep(0.02)
        made.append(step)
        busy.clear()
        return torch.full((32, 4), 2.0 + step), torch.arange(32)

    class Watched(Tiny):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            if x.max() < 1:
                disturbed.append(busy.is_set())
            return super().forward(x, rows)

    def counted(*arguments: Any) -> Any:
        at_start.append(len(made))
        return run_plan(*arguments)

    monkeypatch.setattr("posthoc.recipes.pretraining.run_plan", counted)
    run: Any = SimpleNamespace(config=PretrainingConfig(throughput_steps=2, batch_size=32), device=CPU)
    found = throughput(run, Watched(), batch)
    # one batch for its shape; then in each round the first is there before the clock starts, and three are made in all
    assert at_start == [1, 2, 4, 5, 7, 8, 10]
    assert disturbed == [False] * 7
    assert found["training_images_per_second"] <= 32 / 0.02  # as fast as batches are made, and no faster


def test_the_share_of_views_that_are_found() -> None:
    first = torch.eye(4)
    second = torch.eye(4)[[0, 1, 3, 2]] * torch.tensor([[1.0], [5.0], [2.0], [3.0]])
    assert own_view_found(first, second) == 0.5


def test_images_of_other_sets_get_the_sets_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 40, 3), (30, 51, 3), (9, 5, 3))]
    source = ListSource([Image.fromarray(one) for one in arrays], [5, 6, 7], name="others")
    found = shaped(source, 3, 16)
    for row, one in enumerate(arrays):
        size = [max(16, round(16 * side / min(one.shape[:2]))) for side in one.shape[:2]]
        resized = reference.resize(torch.from_numpy(one).permute(2, 0, 1), size, antialias=True)
        theirs = reference.center_crop(resized, [16, 16])
        assert (found[row].int() - theirs.int()).abs().max() <= 1
    assert shaped(source, 1, 8).shape == (3, 1, 8, 8)
    part = Chosen(source, np.array([2, 0]))
    assert torch.equal(shaped(part, 3, 16), found[[2, 0]])
    for channels, many in (
        (3, rng.integers(0, 256, (4, 8, 8, 3), np.uint8)),
        (1, rng.integers(0, 256, (4, 8, 8), np.uint8)),
    ):
        one_by_one = ListSource([Image.fromarray(one) for one in many], None, name="list")
        array = Chosen(ArraySource(many), np.array([3, 1]))
        assert torch.equal(shaped(array, channels, 8), shaped(one_by_one, channels, 8)[[3, 1]]), (
            "an array is taken as it is"
        )
    write_idx(tmp_path / "MNIST/raw", "t10k", rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5))
    others, _ = other_sets("cifar10", tmp_path, 3, some_images(1, 3, 16))
    assert {name: images.size for name, images in others.items()} == {"mnist": (3, 16, 16)}
    assert len(others["mnist"]) == 3
    dark = torch.full((1, 1, 2, 2), 250, dtype=torch.uint8)
    assert (bright("omniglot", dark) == 5).all()
    assert bright("mnist", dark) is dark
    assert [part.item(row).label for row in range(len(part))] == [7, 5]
    assert part.fingerprint() != Chosen(source, np.array([0, 2])).fingerprint()
    assert spread_over(np.arange(10, 20), 4).tolist() == [10, 13, 16, 19]
    assert spread_over(np.arange(10, 20), 3).tolist() == [10, 14, 19]
    assert spread_over(np.arange(3), 4).tolist() == [0, 1, 2]
    assert spread_over(np.arange(0), 4).tolist() == []


def test_images_of_classes_that_both_sets_have_are_left_out(tmp_path: Path) -> None:
    shared = CLASSES["cifar100"].index("pickup_truck")
    rows = np.zeros((6, 3074), np.uint8)
    rows[:, 1] = [0, shared, 3, shared, 4, 5]
    rows[:, 2:] = np.arange(6)[:, None]
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(rows.tobytes())
    (tmp_path / "test_32x32.mat").write_bytes(b"damaged")
    found, notes = other_sources("cifar10", tmp_path, 3)
    assert list(found) == ["cifar100"]
    assert [found["cifar100"].item(row).label for row in range(3)] == [0, 4, 5]
    assert "without 2 images of classes that cifar10 has too" in notes["cifar100"]
    assert "svhn cannot be read" in notes["svhn"]
    assert "cifar100" not in other_sources("cifar100", tmp_path, 3)[0]


def test_tiny_imagenet_is_read_from_its_files(tmp_path: Path) -> None:
    """Which are sorted by class: training, held-out and probed images are not."""
    base = tmp_path / "tiny-imagenet-200"
    lines = []
    for label, name in enumerate(TINY_IMAGENET[:2]):
        (base / "train" / name / "images").mkdir(parents=True)
        for number in range(50):
            flat = Image.new("RGB", (64, 64), (100 * label, 2 * number, 0))
            flat.save(base / "train" / name / "images" / f"{name}_{number}.JPEG", quality=95)
    (base / "val" / "images").mkdir(parents=True)
    for number, label in enumerate((1, 0, 1)):
        Image.new("L", (64, 64), 80 * number).save(base / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{TINY_IMAGENET[label]}\t0\t0\t62\t62\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    config = PretrainingConfig(dataset="tiny-imagenet", data_dir=tmp_path, batch_size=32, train_images=60)
    train, held_out, test = open_images(config)
    assert (len(train), len(held_out)) == (54, 6)
    assert train.size == test.size == (3, 64, 64)
    shades = []
    for images in (train, held_out):
        assert set(images.label) == {0, 1}
        colour = images.pixels.double().mean((2, 3)).numpy()
        np.testing.assert_allclose(colour[:, 0], 100 * images.label, atol=4)
        shades += [
            (int(label), round(float(value) / 2)) for label, value in zip(images.label, colour[:, 1], strict=True)
        ]
    assert len(set(shades)) > 50, "no image is there twice"
    assert test.label.tolist() == [1, 0, 1], "scores are in the set's order"
    np.testing.assert_allclose(test.pixels.double().mean((1, 2, 3)).numpy(), [0, 80, 160], atol=2)
    again, *_ = open_images(config)
    assert torch.equal(again.pixels, train.pixels)
    for size, label in (((9, 5), [0]), ((65, 65), [0]), ((8, 8), None)):
        with pytest.raises(DataError, match="expected labelled square images of up to 64 px"):
            in_memory(ListSource([Image.new("RGB", size)], label, name="list"), np.arange(1))


def test_a_constant_score_is_left_out_and_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    still = np.full(30, 0.1)
    inside = {"kNN": rng.random(30), "tau": still}
    outside = {"a": {"kNN": rng.random(20), "tau": still[:20]}, "b": {"kNN": rng.random(20), "tau": rng.random(20)}}
    tables = ood_tables(inside, outside, 0, {"a": "a note"})
    why = "score 'tau' is constant (0.1 for every image): it ranks nothing"
    assert [table["left_out"] for table in tables.values()] == [{"tau": why}, {}]
    assert list(tables["a"]["scores"]) == ["kNN"]
    assert "a note" in tables["a"]["notes"]
    assert scores_in(tables) == ["kNN", "tau"]
    assert np.isnan(auroc(tables, "a", "tau"))
    assert auroc(tables, "b", "tau") == pytest.approx((outside["b"]["tau"] > 0.1).mean())
    lines = ood_lines(tables)
    assert lines[3] == f"| tau | - | {auroc(tables, 'b', 'tau'):.3f} |"
    assert lines[4:] == ["", f"a: {why}"]
    draw_ood(tmp_path, tables)
    assert (tmp_path / "ood.png").is_file()
    nothing = ood_tables({"tau": still}, {"a": {"tau": still}}, 0, {"a": "a note"})
    assert (nothing["a"]["scores"], nothing["a"]["notes"]) == ({}, ["a note"])
    assert ood_lines(nothing)[-1] == f"a: {why}"
    draw_ood(tmp_path, nothing)


def test_what_features_are_worth(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(rows: int) -> Encoded:
        label = torch.randint(3, (rows,), generator=generator)
        known = torch.eye(3)[label] + 0.05 * torch.randn(rows, 3, generator=generator)
        noise = torch.randn(rows, 4, generator=generator)
        return Encoded(known.numpy(), noise.numpy(), label.numpy())

    train, test = encoded(300), encoded(200)
    known, other = (np.pad(one.feature, ((0, 0), (0, 1))) for one in (train, test))
    views = [known, np.roll(known, 1, axis=1)]
    found = worth(train, Encoded(test.feature, other, test.label), 0, views)
    assert found["linear"] == found["nearest_feature"] == found["nearest_papers_one_view"] == 1.0
    assert found["nearest_projection"] < 0.6
    both = sum(one / np.linalg.norm(one, axis=1, keepdims=True) for one in views)
    near = (other @ both.T).argmax(1)
    assert found["nearest_papers_two_views"] == pytest.approx((train.label[near] == test.label).mean(), abs=1e-9)
    assert found["nearest_papers_two_views"] < 0.9
    logits = sgd_probe(train.feature, train.label, test.feature, TAU, step_generator(0, PROBE))
    assert found["linear_papers_sgd_unaugmented"] == (logits.argmax(1) == test.label).mean()
    assert set(worth(train, test, 0)) == {"linear", "nearest_feature", "nearest_projection"}
    seen = train.label < train.label.max()  # probed images may lack the last class
    fewer = Encoded(train.feature[seen], train.projection[seen], train.label[seen])
    assert worth(fewer, test, 0)["linear"] <= (test.label < train.label.max()).mean()
    placed: list[Any] = []
    for name, probe in (("linear_probe", linear_probe), ("sgd_probe", sgd_probe)):
        monkeypatch.setattr(
            f"posthoc.recipes.pretraining_evaluation.{name}",
            lambda *given, probe=probe, device=None, **more: (
                placed.append(device or given[-1]),
                probe(*given, **more),
            )[1],
        )
    worth(train, Encoded(test.feature, other, test.label), 0, views, torch.device("cpu", 0))
    assert placed == [torch.device("cpu", 0)] * 2, "classifiers are fitted where the caller says"


def test_the_grid_shows_both_ends_of_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(
        "posthoc.recipes.pretraining_evaluation.gallery",
        lambda figure, rows, title: (figures.append(figure), gallery(figure, rows, title)),
    )
    score, label = np.arange(30.0), np.arange(30) % 2
    scores = {"up": score, "down": -score}
    certainty_grid(tmp_path / "ends.png", lambda row: np.full((4, 8), row), label, scores, ["cat", "dog"])
    assert (tmp_path / "ends.png").stat().st_size
    ((axis,),) = (figure.axes for figure in figures)
    low, high = list(range(12)), list(range(29, 17, -1))
    assert [int(image.get_array()[0, 0]) for image in axis.images] == [*low, *high, *high, *low]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["up", "down"]
    words = [text.get_text() for text in axis.texts]
    assert words == [*(["cat", "dog"][row % 2] for row in (*low, *high, *high, *low)), "most certain", "least certain"]
    boxes = np.array([image.get_extent() for image in axis.images])
    assert np.allclose(boxes[:, 1] - boxes[:, 0], 2 * (boxes[:, 2] - boxes[:, 3])), "images keep their shape"
    for line in boxes.reshape(2, 24, 4):
        assert (line[1:, 0] > line[:-1, 1]).all(), "none lies on another"
    assert boxes[24:, 3].min() > boxes[:24, 2].max()


def test_a_view_of_every_image_is_one_of_the_fixed_views() -> None:
    images = some_images(40)
    pair = fixed_views(images, Augmentation(), 3, CPU)
    for view in (0, 1):
        one = Augmented(images, Augmentation(), 3, view)
        assert torch.equal(torch.cat(list(one.chunks(CPU))), pair[view])
        assert one.label is images.label


def test_options_that_cannot_work() -> None:
    for wrong, said in (
        ({"epochs": 0}, "--epochs 0"),
        ({"lr": 0.0}, r"--lr 0\.0"),
        ({"warmup": 1.0}, r"--warmup 1\.0"),
        ({"blur": 2.0}, r"blur=2\.0"),
        ({"smallest_crop": 0.0}, r"scale=0\.0"),
        ({"throughput_steps": -1}, "--throughput-steps -1"),
        ({"probe_images": 0}, "--probe-images 0"),
    ):
        options: Any = wrong
        with pytest.raises(OptionError, match=said):
            PretrainingConfig(**options)
    source = ArraySource(np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(Exception, match="holds tensors; expected images"):
        shaped(source, 3, 8)
