"""Features: every kind of data, one pass, a store that is read and never trusted blindly."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.data import open_source
from posthoc.adapters.errors import BackboneError, DataError, OptionError
from posthoc.adapters.features import Features, extract
from posthoc.adapters.store import Store, list_stores, prune

ROWS = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 20, 16, 3), dtype=np.uint8)
LABELS = np.arange(ROWS) % 3
TRANSFORM = transforms.Compose(
    [transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
)


class Small(nn.Module):
    """A classifier that counts its passes."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, classes)
        self.passes: list[int] = []  # a list, since a backbone runs a shallow copy that shares it

    def forward(self, images: Tensor) -> Tensor:
        self.passes.append(len(images))
        return self.head(self.conv(images).relu().mean((2, 3)))


class Deep(Small):
    """The embedding is not the last linear layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        self.passes.append(len(images))
        return self.head(self.hidden(self.conv(images).relu().mean((2, 3))).tanh())


def small(make: Callable[[], nn.Module] = Small, seed: int = 0, **options: Any) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
    return build_backbone(module, transform=TRANSFORM, **options)


def passes(backbone: Backbone) -> int:
    assert isinstance(backbone.module, Small)
    return len(backbone.module.passes)


@pytest.fixture
def backbone() -> Backbone:
    return small()


@pytest.fixture
def run(backbone: Backbone, tmp_path: Path) -> Callable[..., Features]:
    """extract with this test's backbone and store, quietly."""

    def call(data: Any, **options: Any) -> Features:
        quiet = {"cache_dir": tmp_path / "store", "progress": False, "batch_size": 5}
        return backbone.extract(data, **{**quiet, **options})

    return call


class Ready(Dataset):
    """Preprocessed tensors, made on the fly; the fingerprint spares hashing them."""

    def __init__(self, rows: int) -> None:
        self.rows, self.fingerprint = rows, f"ready {rows}"

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Tensor:
        return torch.full((3, 8, 8), row % 7 - 3.0)


def direct(backbone: Backbone) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and logits without any of our reading code."""
    batch = torch.stack([TRANSFORM(Image.fromarray(image)) for image in IMAGES])
    with torch.no_grad():
        output = backbone(batch)
    return output.embedding.numpy(), output.logits.numpy()


def save_images(folder: Path, ending: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{row:03d}.{ending}")
    return folder


def hf() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    return datasets.Dataset.from_dict({"image": list(map(Image.fromarray, IMAGES)), "label": LABELS.tolist()}, features)


def test_every_kind_of_data_gives_the_embedding_of_a_direct_pass(
    run: Callable[..., Features], backbone: Backbone, tmp_path: Path
) -> None:
    ready = torch.stack([TRANSFORM(Image.fromarray(image)) for image in IMAGES])
    embedding, logits = direct(backbone)
    labelled = {
        "arrays": (IMAGES, LABELS),
        "PIL": ([Image.fromarray(image) for image in IMAGES], LABELS),
        "preprocessed": TensorDataset(ready, torch.from_numpy(LABELS)),
        "loader": DataLoader(TensorDataset(ready, torch.from_numpy(LABELS)), batch_size=4, shuffle=True),
        "datasets": hf(),
        "stream": hf().to_iterable_dataset(),
        "paths": (sorted(save_images(tmp_path / "flat").iterdir()), LABELS),
    }
    for kind, data in labelled.items():
        features = run(data)
        np.testing.assert_allclose(features.embedding, embedding, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(features.logits, logits, atol=1e-6, err_msg=kind)
        np.testing.assert_array_equal(features.label, LABELS)
        np.testing.assert_array_equal(features.row, np.arange(ROWS))
        assert features.label is not None
        assert features.label.dtype == features.row.dtype == np.int64
        assert features.num_classes == 3
    assert run(tmp_path / "flat").label is None


def test_the_second_call_reads_and_does_not_run(run: Callable[..., Features], backbone: Backbone) -> None:
    first = run((IMAGES, LABELS))
    count = passes(backbone)
    second = run((IMAGES.copy(), LABELS.tolist()))
    assert passes(backbone) == count
    np.testing.assert_array_equal(first.embedding, second.embedding)
    assert isinstance(second.embedding, np.memmap)
    assert second.source is not None
    assert second.folder == first.folder


@pytest.mark.parametrize(
    "other",
    [
        {"data": (IMAGES[::-1], LABELS)},
        {"data": (IMAGES, (LABELS + 1) % 3)},
        {"dtype": "float16"},
        {"views": 2},
        {"backbone": {"seed": 1}},
        {"backbone": {"feature_layer": "conv"}},
    ],
)
def test_other_data_options_or_backbone_do_not_share_a_store(
    other: dict[str, Any], run: Callable[..., Features], tmp_path: Path
) -> None:
    first = run((IMAGES, LABELS))
    backbone = small(**other.pop("backbone", {}))
    data = other.pop("data", (IMAGES, LABELS))
    second = extract(backbone, data, cache_dir=tmp_path / "store", progress=False, **other)
    assert passes(backbone) > 1
    assert second.folder != first.folder


def test_a_penultimate_input_that_is_the_embedding_is_stored_once(run: Callable[..., Features], tmp_path: Path) -> None:
    features = run(IMAGES)
    assert features.penultimate is features.embedding
    assert features.folder is not None
    arrays = sorted(path.name for path in features.folder.glob("*.npy"))
    assert arrays == ["embedding.npy", "logits.npy", "row.npy"]
    assert features[2:4].penultimate is not None
    deep = small(Deep, feature_layer="hidden")
    other = extract(deep, IMAGES, cache_dir=tmp_path / "store", progress=False)
    assert other.penultimate is not None
    with torch.no_grad():
        logits = deep.classifier()(torch.from_numpy(np.array(other.penultimate)))
    np.testing.assert_allclose(other.logits, logits, atol=1e-6)
    assert np.abs(other.penultimate - other.embedding).max() > 1e-3


def test_soft_labels_are_kept(run: Callable[..., Features]) -> None:
    soft = np.random.default_rng(0).dirichlet(np.ones(5), ROWS)
    features = run((IMAGES, soft))
    np.testing.assert_allclose(features.label, soft, rtol=1e-6)
    assert features.num_classes == 5


def test_float16_is_half_the_size_and_near(run: Callable[..., Features]) -> None:
    whole, half = run(IMAGES), run(IMAGES, dtype="float16")
    assert half.embedding.dtype == np.float16
    np.testing.assert_allclose(half.embedding, whole.embedding, rtol=2e-3, atol=1e-3)


def test_views_depend_on_seed_row_and_view_only(run: Callable[..., Features], tmp_path: Path) -> None:
    first = run((IMAGES, LABELS), views=3)
    assert first.embedding.shape == (ROWS, 3, 6)
    assert first.logits is not None
    assert first.logits.shape == (ROWS, 3, 4)
    assert first.views == 3
    assert np.abs(first.embedding[:, 0] - first.embedding[:, 1]).min(1).max() > 1e-4
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    again = run((IMAGES, LABELS), views=3, batch_size=64, num_workers=2, cache_dir=tmp_path / "other")
    np.testing.assert_allclose(again.embedding, first.embedding, atol=1e-6)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]  # noqa: NPY002
    torch.testing.assert_close(torch.get_rng_state(), states[2])
    streamed = run(hf().to_iterable_dataset(), views=3)
    np.testing.assert_allclose(streamed.embedding, first.embedding, atol=1e-6)
    other = run((IMAGES, LABELS), views=3, seed=1)
    assert np.abs(other.embedding - first.embedding).max() > 1e-3


def test_views_of_preprocessed_tensors_are_refused(run: Callable[..., Features]) -> None:
    with pytest.raises(DataError, match=r"row 0: views=2 needs images to augment.*views=1"):
        run(torch.zeros(3, 3, 8, 8), views=2)


def break_files(folder: Path) -> dict[int, str]:
    """Truncates, empties and overwrites three files: row and name of each."""
    whole = (folder / "003.jpg").read_bytes()
    (folder / "003.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "007.jpg").write_bytes(b"")
    (folder / "011.jpg").write_text("a letter, not an image")
    return {row: f"{row:03d}.jpg" for row in (3, 7, 11)}


@pytest.mark.parametrize("kind", ["folder", "datasets", "stream"])
def test_a_broken_image_is_named_or_skipped_and_counted(
    kind: str, run: Callable[..., Features], tmp_path: Path
) -> None:
    folder = save_images(tmp_path / "photos", "jpg")
    plain = run(folder)
    broken = break_files(folder)
    paths = [str(path) for path in sorted(folder.iterdir())]
    by_path = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    data = {"folder": folder, "datasets": by_path, "stream": by_path.to_iterable_dataset()}[kind]
    with pytest.raises(DataError, match=r"003\.jpg.*on_error='skip'"):
        run(data)
    with pytest.warns(UserWarning, match=r"skipped 3 image.*003\.jpg"):
        features = run(data, on_error="skip")
    assert features.skipped == 3
    good = np.setdiff1d(np.arange(ROWS), list(broken))
    np.testing.assert_array_equal(features.row, good)
    np.testing.assert_allclose(features.embedding, plain.embedding[good], atol=1e-6)
    with pytest.raises(DataError, match=r"003\.jpg"):
        run(data)  # the store of the skipping run is not good enough for one that does not skip


def test_nothing_readable_is_an_error_even_when_skipping(run: Callable[..., Features], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 images could be read.*x\.png"):
        run(tmp_path / "x.png", on_error="skip")


def test_a_mended_file_is_read_again(run: Callable[..., Features], tmp_path: Path) -> None:
    folder = save_images(tmp_path / "photos", "jpg")
    plain = run(folder)
    whole = (folder / "003.jpg").read_bytes()
    (folder / "003.jpg").write_bytes(whole[:100])
    with pytest.warns(UserWarning, match="skipped 1"):
        assert len(run(folder, on_error="skip")) == ROWS - 1
    (folder / "003.jpg").write_bytes(whole)
    mended = run(folder)
    np.testing.assert_array_equal(mended.embedding, plain.embedding)


def test_outputs_that_are_not_finite_are_named(run: Callable[..., Features], backbone: Backbone) -> None:
    ready = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ready[[6, 20]] *= 1e30
    with pytest.raises(DataError, match=r"embedding of row\(s\) 6, 20 does not fit float16.*float32"):
        run(ready, dtype="float16")
    with torch.no_grad():
        backbone.module.conv.bias[0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(DataError, match=r"embedding is not finite in 23 row\(s\).*0, 1, 2"):
        run(ready)


def test_a_missing_normalisation_warns(run: Callable[..., Features]) -> None:
    with pytest.warns(UserWarning, match="normalisation seems to be missing"):
        run(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"on_error": "ignore"}, {"views": 0}, {"batch_size": 0}])
def test_unknown_options_are_refused(options: dict[str, Any], run: Callable[..., Features]) -> None:
    with pytest.raises(OptionError):
        run(IMAGES, **options)


def test_images_need_a_transform_and_preprocessed_tensors_do_not(tmp_path: Path) -> None:
    bare = build_backbone(Small())
    with pytest.raises(BackboneError, match=r"row 0: the backbone has no preprocessing.*transform="):
        extract(bare, IMAGES, cache_dir=tmp_path, progress=False)
    assert extract(bare, torch.randn(3, 3, 8, 8), cache_dir=tmp_path, progress=False).embedding.shape == (3, 6)


# The store


def truncate(folder: Path) -> None:
    content = (folder / "embedding.npy").read_bytes()
    (folder / "embedding.npy").write_bytes(content[:-40])


def lengthen(folder: Path) -> None:
    with open(folder / "logits.npy", "ab") as file:
        file.write(b"more")


def other_rows(folder: Path) -> None:
    np.save(folder / "row.npy", np.arange(ROWS - 1))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["row.npy"] = (folder / "row.npy").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lengthen,
        other_rows,
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1'),
        lambda folder: (folder / "logits.npy").unlink(),
    ],
)
def test_a_damaged_store_is_not_read_but_redone(
    damage: Callable[[Path], Any], run: Callable[..., Features], backbone: Backbone
) -> None:
    first = run((IMAGES, LABELS))
    embedding = np.array(first.embedding)
    assert first.folder is not None
    damage(first.folder)
    with pytest.raises(DataError, match="not a complete feature store"):
        Features.load(first.folder)
    count = passes(backbone)
    again = run((IMAGES, LABELS))
    assert passes(backbone) > count
    np.testing.assert_array_equal(again.embedding, embedding)
    assert again.num_classes == 3


def test_an_interrupted_run_goes_on_and_redoes_a_damaged_chunk(
    run: Callable[..., Features], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posthoc.adapters.extraction._CHUNK_IMAGES", 5)
    whole = run(IMAGES, cache_dir=tmp_path / "whole")
    total, start = 5, passes(backbone)

    class Stopped(Exception):
        pass

    forward = type(backbone.module).forward

    def until_third(module: Small, images: Tensor) -> Tensor:
        if len(module.passes) >= start + 3:
            raise Stopped
        return forward(module, images)

    with monkeypatch.context() as patched:
        patched.setattr(Small, "forward", until_third)
        with pytest.raises(Stopped):
            run(IMAGES)
    store = Store(tmp_path / "store", whole.folder.name if whole.folder else "")
    assert store.chunks() == [0, 1, 2]
    assert [info.complete for info in list_stores(tmp_path / "store")] == [False]
    content = bytearray(store.chunk_path(1).read_bytes())
    content[200] ^= 1
    store.chunk_path(1).write_bytes(content)
    before = passes(backbone)
    resumed = run(IMAGES)
    assert passes(backbone) - before == total - 2, "only the damaged and the missing chunks are computed"
    np.testing.assert_array_equal(resumed.embedding, whole.embedding)
    np.testing.assert_array_equal(resumed.logits, whole.logits)
    assert not store.partial.exists()


def test_list_and_prune_the_store(run: Callable[..., Features], tmp_path: Path) -> None:
    root = tmp_path / "store"
    assert list_stores(root) == []
    features = run((IMAGES, LABELS))
    run(IMAGES)
    infos = list_stores(root)
    assert {(info.rows, info.complete, info.backbone, info.data) for info in infos} == {(ROWS, True, "Small", "array")}
    assert infos[0].last_used >= infos[1].last_used
    assert features.folder is not None
    size = sum(path.stat().st_size for path in features.folder.iterdir())
    assert prune(root, older_than_days=1) == 0
    assert prune(root, partial_only=True) == 0
    store = Store(root, features.folder.name)
    with store.lock():
        assert prune(root, keys=[store.key[:8]]) == 0, "one that a run holds is left alone"
    assert prune(root, keys=[store.key[:8]]) == size
    assert len(list_stores(root)) == 1
    assert prune(root) > 0
    assert list_stores(root) == []


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("reads the peak memory from /proc, which this system has not")

    def peak(rows: int) -> float:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        features = extract(backbone, Ready(rows), cache_dir=tmp_path, progress=False)
        assert features.embedding.nbytes == rows * 4096 * 4
        return int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1]) / 1024

    wide = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4096))
    backbone = build_backbone(wide, classifier_layer=False)
    peak(600)  # first use of the allocator, the loader and the compiler's tables
    small_peak = peak(601)
    assert peak(12_000) - small_peak < 40, "187 MiB of features must not pass through memory as a whole"


# Features


def test_rows_of_features() -> None:
    embedding = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    features = Features.from_arrays(embedding, penultimate=embedding, logits=embedding[:, :2], label=[0, 1, 0, 1, 2])
    for rows in (slice(1, 4), np.array([3, 0]), [4, 4], np.array([True, False, True, False, True]), []):
        part = features[rows]  # type: ignore[index]
        expected = np.arange(5)[rows]  # type: ignore[index]
        np.testing.assert_array_equal(part.row, expected)
        np.testing.assert_array_equal(part.embedding, embedding[part.row])
        np.testing.assert_array_equal(part.label, np.array([0, 1, 0, 1, 2])[part.row])
        assert part.penultimate is part.embedding
        assert len(part) == len(part.row)
    np.testing.assert_array_equal(features[2:][1:].row, [3, 4])
    with pytest.raises(DataError, match="slice, row numbers or a mask"):
        features["embedding"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"embedding": np.zeros((3, 2, 2, 2))}, "must be float"),
        ({"embedding": np.zeros((3, 2), dtype=int)}, "must be float"),
        ({"embedding": np.zeros((0, 2))}, "must be float"),
        ({"embedding": np.array([[0.0, 1], [np.nan, 1]])}, "not finite in row 1"),
        ({"embedding": np.zeros((3, 2)), "logits": np.zeros((2, 2))}, r"logits is \[2, 2\]"),
        ({"embedding": np.zeros((3, 2)), "logits": np.full((3, 2), np.inf)}, "logits is not finite in row 0"),
        ({"embedding": np.zeros((3, 2)), "label": [0, 1]}, "2 labels for 3"),
        ({"embedding": np.zeros((3, 2)), "label": [0, -1, 1]}, "row 1, -1, is negative"),
    ],
)
def test_unusable_arrays_are_refused(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Features.from_arrays(arrays.pop("embedding"), **arrays)


def test_features_are_their_own_extraction(run: Callable[..., Features], backbone: Backbone, tmp_path: Path) -> None:
    features = run((IMAGES, LABELS))
    assert run(features) is features
    assert features.folder is not None
    loaded = Features.load(features.folder)
    assert loaded.backbone_fingerprint == backbone.fingerprint("logits")
    np.testing.assert_array_equal(run(loaded).embedding, features.embedding)
    with pytest.raises(DataError, match="made by another backbone"):
        extract(small(seed=1), loaded)
    with pytest.raises(DataError, match="3 dimensions, this backbone's 6"):
        run(Features.from_arrays(np.zeros((4, 3), dtype=np.float32)))
    with pytest.raises(DataError, match=r"1 view.*asked for 2"):
        run(features, views=2)


def test_a_source_is_kept_to_read_images_again(run: Callable[..., Features]) -> None:
    features = run(open_source((IMAGES, LABELS)))[np.array([5, 2])]
    assert features.source is not None
    np.testing.assert_array_equal(features.source.item(int(features.row[0])).image, IMAGES[5])
