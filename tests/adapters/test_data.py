"""Sources: whatever the user has, the same images and labels; a fingerprint that follows the content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from posthoc.adapters.data import open_source
from posthoc.adapters.errors import DataError
from posthoc.adapters.source_loader import load_image, workers_for

ROWS = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 20, 16, 3), dtype=np.uint8)
LABELS = np.repeat(np.arange(3), 4)


class Pairs(Dataset):
    """A user's own data set: (image, label), a mapping, or a bare image."""

    def __init__(self, form: str = "tuple", images: np.ndarray = IMAGES) -> None:
        self.form, self.images, self.reads = form, images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        image = Image.fromarray(self.images[row])
        if self.form == "bare":
            return image
        label = torch.tensor(LABELS[row % ROWS])
        return (image, label) if self.form == "tuple" else {"img": image, "fine_label": label, "person": row % 5}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return ((image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True))


def hf_dataset() -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(3), "person": datasets.Value("int64")}
    )
    rows = {"image": [Image.fromarray(i) for i in IMAGES], "label": LABELS.tolist(), "person": list(range(ROWS))}
    return datasets.Dataset.from_dict(rows, features=features)


def write_folder(folder: Path, classes: bool = True) -> Path:
    for row in range(ROWS):
        path = folder / ("abc"[LABELS[row]] if classes else "") / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[row]).save(path)
    return folder


def halves(batch: list[Any]) -> dict[str, torch.Tensor]:
    """A user's collate function."""
    return {
        "image": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in batch]),
        "label": torch.stack([label for _, label in batch]),
    }


def any_data(kind: str, folder: Path) -> Any:
    pil = [Image.fromarray(image) for image in IMAGES]
    match kind:
        case "arrays":
            return IMAGES, LABELS
        case "channels first":
            return IMAGES.transpose(0, 3, 1, 2), LABELS.astype(np.uint8)
        case "tensors":
            return torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
        case "PIL images":
            return pil, LABELS.tolist()
        case "folder":
            return write_folder(folder)
        case "folder as text":
            return str(write_folder(folder))
        case "folder of splits":
            write_folder(folder / "val")
            return write_folder(folder / "train").parent
        case "paths":
            return sorted(write_folder(folder, classes=False).iterdir()), LABELS
        case "torch (image, label)":
            return Pairs()
        case "torch mapping":
            return Pairs("mapping")
        case "TensorDataset":
            return TensorDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), torch.from_numpy(LABELS))
        case "Subset and ConcatDataset":
            return ConcatDataset([Subset(hf_dataset(), range(5)), Subset(Pairs(), range(5, ROWS))])
        case "ImageFolder":
            return torchvision.datasets.ImageFolder(write_folder(folder))
        case "DataLoader":
            return DataLoader(Pairs(), batch_size=5, shuffle=True, num_workers=2)
        case "DataLoader with its own collate":
            return DataLoader(Pairs(), batch_size=5, collate_fn=halves)
        case "datasets.Dataset":
            return hf_dataset()
        case "datasets.Dataset as torch":
            return hf_dataset().with_format("torch")
        case "datasets.Dataset with a transform":
            return hf_dataset().with_transform(lambda rows: {"image": rows["image"], "label": rows["label"]})
        case "DatasetDict":
            return datasets.DatasetDict(train=hf_dataset())
        case "parquet":
            folder.mkdir()
            hf_dataset().to_parquet(str(folder / "x.parquet"))
            return folder / "x.parquet"
        case "datasets stream":
            return hf_dataset().to_iterable_dataset(num_shards=2)
        case "torch stream":
            return Stream()
    raise AssertionError(kind)


KINDS = """arrays; channels first; tensors; PIL images; folder; folder as text; folder of splits; paths;
torch (image, label); torch mapping; TensorDataset; Subset and ConcatDataset; ImageFolder; DataLoader;
DataLoader with its own collate; datasets.Dataset; datasets.Dataset as torch; datasets.Dataset with a transform;
DatasetDict; parquet; datasets stream; torch stream"""


@pytest.fixture(autouse=True)
def _quiet_private_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("kind", [kind.strip() for kind in KINDS.split(";")])
def test_every_kind_of_data_gives_the_same_images_and_labels(kind: str, tmp_path: Path) -> None:
    data = any_data(kind, tmp_path / "data")
    source = open_source(data)
    untouched = open_source(data).fingerprint()
    items = list(source.stream())
    for item, image, label in zip(items, IMAGES, LABELS, strict=True):
        np.testing.assert_array_equal(np.asarray(load_image(item.image)), image)
        assert item.label == label
        assert type(item.label) is int
    said = source.describe()
    assert said["rows"] == (None if "stream" in kind else ROWS)
    assert str(tmp_path) not in str(said), "a published adapter must not tell where its data were"
    if "stream" not in kind:
        assert len(source) == ROWS
        assert source.item(7).label == LABELS[7]
    assert source.fingerprint() == untouched, "reading the data must not change its fingerprint"


def test_images_without_labels(tmp_path: Path) -> None:
    flat = write_folder(tmp_path / "flat", classes=False)
    for data in (IMAGES, flat, [Image.fromarray(i) for i in IMAGES], Pairs("bare"), flat / "003.png"):
        assert open_source(data).item(0).label is None


def test_soft_labels_stay_rows_of_probabilities() -> None:
    soft = np.random.default_rng(0).dirichlet(np.ones(4), ROWS)
    label = open_source((IMAGES, soft)).item(3).label
    assert isinstance(label, np.ndarray)
    np.testing.assert_allclose(label, soft[3], rtol=1e-6)
    assert label.dtype == np.float32


def test_float_arrays_are_taken_as_preprocessed() -> None:
    ready = np.random.default_rng(0).normal(size=(3, 3, 8, 8))
    image = load_image(open_source(ready).item(1).image)
    assert isinstance(image, torch.Tensor)
    torch.testing.assert_close(image, torch.from_numpy(ready[1]).float())


def test_a_pair_of_grey_images_is_not_images_and_labels() -> None:
    grey = IMAGES[0, :, :, 0], IMAGES[1, :, :, 0]
    for pair in (grey, tuple(torch.from_numpy(image) for image in grey)):
        assert open_source(pair).length == 2


def test_a_loaders_subset_of_rows_is_kept_and_its_shuffling_is_not() -> None:
    loader = DataLoader(Pairs(), sampler=SubsetRandomSampler([8, 1, 5]), num_workers=1)
    source = open_source(loader)
    assert source.num_workers == 1
    assert [item.label for item in source.stream()] == [LABELS[8], LABELS[1], LABELS[5]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS - 1, "row 0, -1, is negative"),
        (LABELS[:5], "5 labels for 12 images"),
        (np.linspace(0, 1, ROWS), "class indices"),
        (LABELS[:, None], "class indices"),
        (np.ones((ROWS, 3)), "not a distribution.*divide vote counts"),
        ([None, *LABELS.tolist()[1:]], "1 of 12 images have no label"),
    ],
)
def test_unusable_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source((IMAGES, labels))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("/no/such/folder", "neither an existing folder"),
        (3, "cannot read images from a int"),
        ([], "empty"),
        (IMAGES[0], "leading axis"),
        (IMAGES.astype(np.float32), "already preprocessed"),
        ((np.ones((ROWS, 64), np.float32), LABELS), r"float32 \[12, 64\]"),
        (["a.png", 3], "list of int, str"),
        (datasets.Dataset.from_dict({"photo": [1], "kind": [0]}), "columns are 'photo', 'kind'"),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"image": [1]})), "no split 'train'.*'test'"),
    ],
)
def test_what_is_not_images_gets_one_clear_message(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(data)


def test_a_hub_data_set_that_cannot_be_reached_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'nobody/nothing' is no existing path.*could not be loaded.*give a folder"):
        open_source("nobody/nothing")


def test_a_folder_that_is_neither_flat_nor_classes_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "mixed")
    write_folder(tmp_path / "mixed", classes=False)
    with pytest.raises(DataError, match="both beside its subfolders and inside"):
        open_source(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in"):
        open_source(tmp_path / "empty")
    write_folder(tmp_path / "splits" / "val")
    with pytest.raises(DataError, match="splits val, not 'train'"):
        open_source(tmp_path / "splits")
    assert open_source(tmp_path / "splits", split="val").length == ROWS


def test_columns_are_read_without_decoding_images() -> None:
    source = open_source(hf_dataset())
    np.testing.assert_array_equal(source.column("person"), np.arange(ROWS))
    np.testing.assert_array_equal(source.column("label"), LABELS)
    with pytest.raises(DataError, match="no column named 'age'"):
        source.column("age")
    np.testing.assert_array_equal(open_source(hf_dataset().to_iterable_dataset()).column("person"), np.arange(ROWS))
    np.testing.assert_array_equal(open_source(Pairs("mapping")).column("person"), np.arange(ROWS) % 5)
    np.testing.assert_array_equal(open_source((IMAGES, LABELS)).column("label"), LABELS)


def test_files_have_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f")
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    by_path = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    for data in (folder, paths, by_path, torchvision.datasets.ImageFolder(folder)):
        assert open_source(data).names() == paths
    assert open_source(IMAGES).names() is None
    assert open_source(hf_dataset()).names() is None  # images without a file


def changed(row: int) -> np.ndarray:
    images = IMAGES.copy()
    images[row, 0, 0, 0] ^= 1
    return images


def test_one_changed_bit_anywhere_changes_the_fingerprint() -> None:
    for wrap in (
        lambda images: (images, LABELS),
        lambda images: [Image.fromarray(image) for image in images],
        lambda images: Pairs(images=images),
        lambda images: Subset(Pairs(images=images), range(3, ROWS)),
        lambda images: TensorDataset(torch.from_numpy(images)),
        lambda images: DataLoader(Pairs(images=images), collate_fn=halves),
    ):
        prints = {open_source(wrap(images)).fingerprint() for images in (IMAGES, changed(5), changed(ROWS - 1))}
        assert len(prints) == 3
    other = LABELS.copy()
    other[-1] = 0
    assert open_source((IMAGES, LABELS)).fingerprint() != open_source((IMAGES, other)).fingerprint()
    assert open_source((IMAGES[::-1], LABELS)).fingerprint() != open_source((IMAGES, LABELS)).fingerprint()


def test_a_changed_file_changes_the_fingerprint_and_a_moved_folder_does_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f")
    before = open_source(folder).fingerprint()
    folder = folder.rename(tmp_path / "moved")
    assert open_source(folder).fingerprint() == before
    dataset = torchvision.datasets.ImageFolder(folder)
    as_dataset = open_source(dataset).fingerprint()
    os.utime(folder / "b" / "005.png", ns=(0, 12345))
    assert open_source(folder).fingerprint() != before
    assert open_source(dataset).fingerprint() != as_dataset


class FakeMNIST(torchvision.datasets.MNIST):
    """torchvision's MNIST on arrays of ours, so that nothing is downloaded."""

    def __init__(self, transform: Any = None) -> None:
        self.data, self.targets = torch.from_numpy(IMAGES[..., 0]), torch.from_numpy(LABELS)
        self.transform, self.target_transform = transform, None


def test_torchvisions_transform_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = torchvision.transforms
    monkeypatch.setattr(FakeMNIST, "__module__", "torchvision.datasets.mnist")
    resized = [transforms.Resize(size) for size in (8, 9)]
    random = transforms.RandomCrop(8)
    by_lambda = [lambda image: image.rotate(90), lambda image: image.rotate(180)]
    prints = [open_source(FakeMNIST(t)).fingerprint() for t in (None, *resized, random, *by_lambda)]
    assert len(set(prints)) == 6
    again = [open_source(FakeMNIST(t)).fingerprint() for t in (None, *resized, random, *by_lambda)]
    assert [a == b for a, b in zip(prints, again, strict=True)] == [True] * 6


def test_workers_share_the_cores_of_their_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    source, gpu = open_source(IMAGES), torch.device("cuda")
    assert workers_for(source, gpu, 4) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two of the four processes run here
    assert workers_for(source, gpu, 4) == 6
    assert workers_for(source, torch.device("cpu"), 4) == 0


def test_a_data_sets_own_fingerprint_is_used_and_no_item_is_read() -> None:
    data = Pairs()
    data.fingerprint = "version 1"  # type: ignore[attr-defined]
    first = open_source(data).fingerprint()
    data.fingerprint = "version 2"  # type: ignore[attr-defined]
    assert open_source(data).fingerprint() != first
    assert data.reads == 0


def test_a_streams_own_fingerprint_is_used_and_no_item_is_read() -> None:
    class Endless(IterableDataset):
        def __init__(self, version: str) -> None:
            self.fingerprint = version

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("read")

    prints = [open_source(Endless(version)).fingerprint() for version in ("1", "1", "2")]
    assert prints[0] == prints[1] != prints[2]


def test_a_streams_identity_follows_its_file_and_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    hf_dataset().to_parquet(str(path))

    def stream() -> datasets.IterableDataset:
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)

    steps = [stream(), stream().take(5), stream().skip(2), stream().shuffle(seed=1), stream().shuffle(seed=2)]
    prints = [open_source(step).fingerprint() for step in steps]
    assert len(set(prints)) == 5
    assert open_source(stream()).fingerprint() == prints[0]
    hf_dataset().select(range(1, ROWS)).to_parquet(str(path))
    os.utime(path, ns=(0, 12345))
    assert open_source(stream()).fingerprint() != prints[0]


def test_a_stream_of_unknown_origin_is_hashed_by_its_content() -> None:
    def make(images: np.ndarray) -> datasets.IterableDataset:
        def rows() -> Iterator[dict[str, Any]]:
            for image, label in zip(images, LABELS, strict=True):
                yield {"image": Image.fromarray(image), "label": int(label)}

        return datasets.IterableDataset.from_generator(rows)

    before = open_source(make(IMAGES)).fingerprint()
    assert open_source(make(IMAGES)).fingerprint() == before
    assert open_source(make(changed(ROWS - 1))).fingerprint() != before
