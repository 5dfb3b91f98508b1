"""Every layout of every named set, as small real files: the same images and labels as torchvision reads or as were written."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat

from posthoc.adapters.errors import DataError
from posthoc.adapters.source_loader import load_image, read_batches
from posthoc.eval.dataset_classes import CLASSES
from posthoc.eval.dataset_notes import hash_pixels
from posthoc.eval.dataset_readers import LmdbSource
from posthoc.eval.datasets import open_named

ROWS = {"train": 10, "test": 6}
TINY = CLASSES["tiny-imagenet"]


def pixels(rows: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), dtype=np.uint8)


def encode(image: np.ndarray, kind: str = "png") -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, kind)
        return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_image(path: Path, seed: int) -> np.ndarray:
    """Writes an image of the path's ending; returns what it decodes to, RGB."""
    put(path, encode(pixels(1, 9, 8, 3, seed=seed)[0], "png" if path.suffix == ".png" else "jpeg"))
    return np.asarray(Image.open(path).convert("RGB"))


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes strings and bytes by the opcodes that Python 2 wrote, as in the original CIFAR batches."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: Any) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python2(value: Any) -> bytes:
    with io.BytesIO() as file:
        Python2(file, protocol=2).dump(value)
        return file.getvalue()


def python3(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def newest(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)


def cifar_pickles(root: Path, dump: Callable[[Any], bytes], classes: int) -> dict[str, tuple]:
    """Batches with everything that the original ones hold; images and labels by split."""
    made: dict[str, tuple] = {}
    for split, rows in ROWS.items():
        x, y = pixels(rows, 3, 32, 32, seed=rows), np.random.default_rng(rows).integers(0, classes, rows)
        made[split] = x.transpose(0, 2, 3, 1), y
        parts = (
            [(f"data_batch_{i + 1}", slice(2 * i, 2 * i + 2)) for i in range(5)]
            if split == "train"
            else [("test_batch", slice(None))]
        )
        for name, part in [(split, slice(None))] if classes == 100 else parts:
            names = {"filenames": [f"a_s_{i}.png" for i in range(len(y[part]))], "batch_label": "testing batch 1 of 1"}
            entry = {"data": x[part].reshape(-1, 3072), **names}
            labels = [int(i) for i in y[part]]
            entry |= (
                {"fine_labels": labels, "coarse_labels": [i % 20 for i in labels]}
                if classes == 100
                else {"labels": labels}
            )
            put(root / ("cifar-100-python" if classes == 100 else "cifar-10-batches-py") / name, dump(entry))
    meta = {"fine_label_names" if classes == 100 else "label_names": list(CLASSES[f"cifar{classes}"])}
    put(root / ("cifar-100-python/meta" if classes == 100 else "cifar-10-batches-py/batches.meta"), dump(meta))
    return made


def same(source: Any, images: Any, labels: Any) -> None:
    """The source has exactly these RGB images and labels (None: none)."""
    assert len(source) == len(images) > 0
    for row, image in enumerate(images):
        item = source.item(row)
        np.testing.assert_array_equal(
            np.asarray(load_image(item.image)), np.asarray(Image.fromarray(image).convert("RGB"))
        )
        assert item.label == (None if labels is None else int(labels[row]))


def of_torchvision(dataset: Any) -> tuple[list[np.ndarray], list[int]]:
    pairs = [dataset[row] for row in range(len(dataset))]
    return [np.asarray(image.convert("RGB")) for image, _ in pairs], [int(label) for _, label in pairs]


@pytest.mark.parametrize("dump", [python2, python3, newest])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_pickles_are_read_without_unpickling(tmp_path, monkeypatch, dump, classes):
    made = cifar_pickles(tmp_path, dump, classes)
    name = f"cifar{classes}"
    with monkeypatch.context() as patch:
        for loader in ("load", "loads", "Unpickler"):
            patch.delattr(pickle, loader)
        for split, (x, y) in made.items():
            same(open_named(name, split, tmp_path), x, y)
    monkeypatch.setattr(tv.cifar, "check_integrity", lambda *_: True)
    for split, train in (("train", True), ("test", False)):
        same(
            open_named(name, split, tmp_path),
            *of_torchvision((tv.CIFAR10 if classes == 10 else tv.CIFAR100)(str(tmp_path), train)),
        )


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_harmful_batch_runs_nothing(tmp_path):
    cifar_pickles(tmp_path, python3, 10)
    harm = Harmful(tmp_path / "harm")
    put(tmp_path / "cifar-10-batches-py/test_batch", python3({"data": harm, "labels": [1, 2]}))
    with pytest.raises(DataError, match="2 labels and 0 bytes of pixels"):
        open_named("cifar10", "test", tmp_path)
    entry = {"harm": harm, "data": pixels(2, 3072), "labels": [1, 2]}
    put(tmp_path / "cifar-10-batches-py/test_batch", python3(entry))
    assert open_named("cifar10", "test", tmp_path).labels.tolist() == [1, 2]  # read beside it
    assert not harm.path.exists()
    pickle.loads((tmp_path / "cifar-10-batches-py/test_batch").read_bytes())
    assert harm.path.exists()  # it was harmful indeed


def test_cifar_of_other_order_or_labels_is_refused(tmp_path):
    batch = tmp_path / "cifar-10-batches-py/test_batch"
    for dump in (python2, python3, newest):
        put(batch, dump({"data": np.asfortranarray(pixels(4, 3072)), "labels": [0, 1, 2, 3]}))
        with pytest.raises(DataError, match="Fortran"):
            open_named("cifar10", "test", tmp_path)
    put(batch, python3({"data": pixels(2, 3072), "labels": [3, 10]}))
    with pytest.raises(DataError, match="label 10 is there; the set has 10 classes"):
        open_named("cifar10", "test", tmp_path)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary(tmp_path, classes):
    for split, rows in ROWS.items():
        x, y = (
            pixels(rows, 3, 32, 32, seed=rows),
            np.random.default_rng(rows).integers(0, classes, rows).astype(np.uint8),
        )
        head = [y[:, None]] if classes == 10 else [(y % 20)[:, None], y[:, None]]
        table = np.concatenate([*head, x.reshape(rows, -1)], 1)
        if classes == 100:
            put(tmp_path / f"cifar-100-binary/{split}.bin", table.tobytes())
        elif split == "test":
            put(tmp_path / "cifar-10-batches-bin/test_batch.bin", table.tobytes())
        else:
            for i in range(5):
                put(tmp_path / f"cifar-10-batches-bin/data_batch_{i + 1}.bin", table[2 * i : 2 * i + 2].tobytes())
        same(open_named(f"cifar{classes}", split, tmp_path), x.transpose(0, 2, 3, 1), y)


def test_cifar_npz(tmp_path):
    x, y = pixels(5, 32, 32, 3), np.arange(5, dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    same(open_named("cifar10", "train", tmp_path), x, y)
    same(open_named("cifar10", "test", tmp_path), x[:2], y[:2])
    np.savez(tmp_path / "cifar10.npz", x_test=x.transpose(0, 3, 1, 2), y_test=y)
    with pytest.raises(DataError, match=r"uint8 images \[N,32,32,3\] are expected"):
        open_named("cifar10", "test", tmp_path)


def test_svhn(tmp_path, monkeypatch):
    monkeypatch.setattr(tv.SVHN, "_check_integrity", lambda _: True)
    for split, rows in ROWS.items():
        y = np.r_[10, 1 + np.arange(rows - 1) % 10][:, None].astype(np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, rows), "y": y}, do_compression=True)
        source = open_named("svhn", split, tmp_path)
        same(source, *of_torchvision(tv.SVHN(str(tmp_path), split)))
        assert source.item(0).label == 0


def put_idx(folder: Path, prefix: str, rows: int, pack: Callable[[bytes], bytes], end: str) -> tuple:
    x, y = pixels(rows, 28, 28, seed=rows), (np.arange(rows) * 3 % 10).astype(np.uint8)
    put(
        folder / f"{prefix}-images-idx3-ubyte{end}",
        pack(struct.pack(">BBBB3I", 0, 0, 8, 3, rows, 28, 28) + x.tobytes()),
    )
    put(folder / f"{prefix}-labels-idx1-ubyte{end}", pack(struct.pack(">BBBBI", 0, 0, 8, 1, rows) + y.tobytes()))
    return x, y


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_and_fashion_mnist(tmp_path, name, end):
    make = {"mnist": tv.MNIST, "fashion-mnist": tv.FashionMNIST}[name]
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x, y = put_idx(tmp_path / make.__name__ / "raw", prefix, ROWS[split], gzip.compress if end else bytes, end)
        same(open_named(name, split, tmp_path), x, y)
    if not end:
        for split in ROWS:
            same(open_named(name, split, tmp_path), *of_torchvision(make(str(tmp_path), split == "train")))


def test_notmnist_in_mnists_format_and_as_letters(tmp_path):
    x, y = put_idx(tmp_path, "notmnist-t10k", 6, gzip.compress, ".gz")
    same(open_named("notmnist", "test", tmp_path), x, y)
    with pytest.raises(DataError, match="training images of notmnist are not in"):
        open_named("notmnist", "train", tmp_path)
    letters = tmp_path / "letters"
    images = [put_image(letters / f"notMNIST_small/{letter}/{i}.png", i) for letter in "ABJ" for i in (1, 2)]
    same(open_named("notmnist", "test", letters), images, [0, 0, 1, 1, 9, 9])
    put(letters / "notMNIST_small/B/empty.png", b"")
    with pytest.warns(UserWarning, match="1 empty file"):
        same(open_named("notmnist", "test", letters), images, [0, 0, 1, 1, 9, 9])
    put_image(letters / "notMNIST_small/K/1.png", 0)
    with pytest.warns(UserWarning, match="1 empty"), pytest.raises(DataError, match="'K' is no class of this set"):
        open_named("notmnist", "test", letters)


def test_tiny_imagenet_as_unpacked(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    lines, images = [], []
    for i, wnid in enumerate((TINY[7], TINY[0], TINY[199])):
        images.append(put_image(base / f"val/images/val_{i}.JPEG", i))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    put(base / "val/val_annotations.txt", "".join(lines))
    same(open_named("tiny-imagenet", "test", tmp_path), images, [7, 0, 199])
    train = {label: put_image(base / f"train/{TINY[label]}/images/{TINY[label]}_0.JPEG", label) for label in (4, 90)}
    put(base / f"train/{TINY[4]}/{TINY[4]}_boxes.txt", "no image")
    same(open_named("tiny-imagenet", "train", tmp_path), list(train.values()), list(train))
    put_image(base / "train/n99999999/images/1.JPEG", 0)
    with pytest.raises(DataError, match="'n99999999' is no class of this set"):
        open_named("tiny-imagenet", "train", tmp_path)
    (base / "val/images/val_1.JPEG").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not there, first: .*val_1.JPEG"):
        open_named("tiny-imagenet", "test", tmp_path)


def put_parquet(path: Path, images: list[np.ndarray], names: list[str] | None = None, **columns: list) -> None:
    import datasets

    features = datasets.Dataset.from_dict(columns).features
    if names is not None:
        features["label"] = datasets.ClassLabel(names=names)
    rows = {"image": [{"bytes": encode(image), "path": None} for image in images], **columns}
    table = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), **features}))
    table.to_parquet(str(path))


def test_parquet_files_of_tiny_imagenet_dtd_and_omniglot(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    images = list(pixels(4, 16, 16, 3))
    put_parquet(tmp_path / "tiny_imagenet_val.parquet", images, list(TINY), label=[5, 0, 199, 5], name=list("abcd"))
    same(open_named("tiny-imagenet", "test", tmp_path), images, [5, 0, 199, 5])
    put_parquet(tmp_path / "dtd_textures_600_256px.parquet", images, ["banded", "blotchy"], label=[0, 1, 1, 0])
    same(open_named("dtd", "test", tmp_path), images, [0, 1, 1, 0])
    split = [f"background_small{i}" for i in (1, 2, 2, 1)]
    put_parquet(tmp_path / "omniglot_8_alphabets.parquet", images, label=[3, 8, 9, 4], split=split)
    same(open_named("omniglot", "test", tmp_path), [images[1], images[2]], [8, 9])
    same(open_named("omniglot", "train", tmp_path), [images[0], images[3]], [3, 4])
    other = tmp_path / "other"
    other.mkdir()
    put_parquet(other / "tiny_imagenet_val.parquet", images, ["n01", "n02"], label=[0, 1, 0, 1])
    with pytest.raises(DataError, match="not Tiny ImageNet's 200 sorted WordNet ids"):
        open_named("tiny-imagenet", "test", other)


def test_omniglot_as_torchvision_lays_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tv.Omniglot, "_check_integrity", lambda _: True)
    for seed, place in enumerate(("images_background/Greek/character01", "images_background/Greek/character02",
                                  "images_background/Latin/character01", "images_evaluation/Tagalog/character01")):  # fmt: skip
        for drawer in (1, 2):
            put_image(tmp_path / f"omniglot-py/{place}/0{seed}_0{drawer}.png", 2 * seed + drawer)
    for split, background in (("train", True), ("test", False)):
        ours, theirs = open_named("omniglot", split, tmp_path), tv.Omniglot(str(tmp_path), background)
        order = sorted(theirs._characters)  # torchvision takes the characters in any order
        wanted = {(f"{theirs._characters[at]}/{name}", order.index(theirs._characters[at]))
                  for name, at in theirs._flat_character_images}  # fmt: skip
        items = [ours.item(row) for row in range(len(ours))]
        assert {(str(Path(one.image).relative_to(theirs.target_folder)), one.label) for one in items} == wanted
        assert len(ours) == len(theirs) == len(wanted)


def test_dtd_cars_and_celeba_as_torchvision_lays_them(tmp_path, monkeypatch):
    for split, at in (("train", 0), ("test", 3)):
        names = [f"{kind}/{kind}_{at + i:04}.jpg" for i, kind in enumerate(("dotted", "banded", "zigzagged"))]
        for i, name in enumerate(names):
            put_image(tmp_path / "dtd/dtd/images" / name, at + i)
        put(tmp_path / f"dtd/dtd/labels/{split}1.txt", "\n".join(names) + "\n")
        same(open_named("dtd", split, tmp_path), *of_torchvision(tv.DTD(str(tmp_path), split)))

    base = tmp_path / "stanford_cars"
    put(base / "devkit/readme.txt", "")
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["a car", "b car"], dtype=object)})
    for split, rows in (("train", 3), ("test", 1)):  # one row: loadmat squeezes it to no axis at all
        for i in range(rows):
            put_image(base / f"cars_{split}/{i:05}.jpg", i)
        annotations = np.array(
            [(f"{i:05}.jpg", i % 2 + 1) for i in range(rows)], dtype=[("fname", object), ("class", object)]
        )
        place = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(base / place, {"annotations": annotations})
        ours = open_named("cars196", split, tmp_path)
        assert [ours.item(i).label for i in range(rows)] == [i % 2 for i in range(rows)]
        if split == "train":
            same(ours, *of_torchvision(tv.StanfordCars(str(tmp_path), split)))

    base, names = tmp_path / "celeba", [f"{i:06}.jpg" for i in range(1, 6)]
    for i, name in enumerate(names):
        put_image(base / "img_align_celeba" / name, i)
    put(base / "list_eval_partition.txt", "".join(f"{n} {p}\n" for n, p in zip(names, (0, 2, 1, 0, 2), strict=True)))
    put(base / "identity_CelebA.txt", "".join(f"{n} {7 * i + 1}\n" for i, n in enumerate(names)))
    for file, width in (("list_attr_celeba", 40), ("list_bbox_celeba", 4), ("list_landmarks_align_celeba", 10)):
        rows = "".join(f"{name} {' '.join(['1'] * width)}\n" for name in names)
        put(base / f"{file}.txt", f"5\n{' '.join(map(str, range(width)))}\n{rows}")
    monkeypatch.setattr(tv.CelebA, "_check_integrity", lambda _: True)
    for split in ROWS:
        theirs = tv.CelebA(str(tmp_path), split, target_type="identity")
        same(open_named("celeba", split, tmp_path), *of_torchvision(theirs))
    (base / "identity_CelebA.txt").unlink()
    assert open_named("celeba", "test", tmp_path).item(0).label is None


def test_coco_is_a_folder_without_labels(tmp_path):
    images = [put_image(tmp_path / f"coco/val2017/{i:012}.jpg", i) for i in range(3)]
    put(tmp_path / "coco/val2017/.hidden.jpg", b"")
    same(open_named("coco", "test", tmp_path), images, None)


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.float32))


def test_lsun_as_lmdb_and_as_a_folder(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    for seed, name in enumerate(("test", "bedroom_train", "tower_train")):
        with (
            lmdb.open(str(tmp_path / f"{name}_lmdb"), map_size=1 << 20) as environment,
            environment.begin(write=True) as t,
        ):
            for i in range(3):
                t.put(f"{i:08x}".encode(), encode(pixels(1, 8, 8, 3, seed=10 * seed + i)[0], "webp"))
    test, train = open_named("lsun", "test", tmp_path), open_named("lsun", "train", tmp_path)
    monkeypatch.chdir(tmp_path)  # torchvision leaves a pickle of the keys where it runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        images, _ = of_torchvision(tv.LSUN(str(tmp_path), "test"))
    same(test, images, None)
    assert [train.item(row).label for row in range(len(train))] == [0, 0, 0, 1, 1, 1]
    again = pickle.loads(pickle.dumps(train))  # as a loader's worker gets it
    assert again.item(4).image == train.item(4).image != train.item(1).image
    assert again.fingerprint() == train.fingerprint() != test.fingerprint()
    assert len(set(hash_pixels(train, np.arange(6)))) == 6  # by several threads
    for workers in (0, 2):
        batches = read_batches(test, [[0, 1], [2]], to_tensor, num_workers=workers)
        np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), [to_tensor(i) for i in images])
    folder = tmp_path / "elsewhere"
    images = [put_image(folder / f"lsun/test/{i}.jpg", i) for i in range(2)]
    same(open_named("lsun", "test", folder), images, None)


def test_lsun_says_which_package_it_needs(tmp_path, monkeypatch):
    (tmp_path / "test_lmdb").mkdir()
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(DataError, match="pip install lmdb"):
        LmdbSource([tmp_path / "test_lmdb"])


def halves(root: Path) -> dict[str, tuple[str, Path]]:
    """One whole file of each kind: the name of its set and its path."""
    cifar_pickles(root / "a", python2, 10)
    table = np.concatenate([np.ones((3, 1), np.uint8), pixels(3, 3072)], 1)
    put(root / "b/cifar-10-batches-bin/test_batch.bin", table.tobytes())
    (root / "c").mkdir()
    np.savez(root / "c/cifar10.npz", x_test=pixels(9, 32, 32, 3), y_test=np.zeros(9, np.uint8))
    (root / "d").mkdir()
    savemat(root / "d/test_32x32.mat", {"X": pixels(32, 32, 3, 4), "y": np.ones((4, 1))}, do_compression=True)
    put_idx(root / "e/MNIST/raw", "t10k", 5, bytes, "")
    put_idx(root / "f/MNIST/raw", "t10k", 5, gzip.compress, ".gz")
    (root / "g").mkdir()
    put_parquet(root / "g/dtd_textures_600_256px.parquet", list(pixels(3, 16, 16, 3)), label=[0, 1, 2])
    return {
        "pickle": ("cifar10", root / "a/cifar-10-batches-py/test_batch"),
        "binary": ("cifar10", root / "b/cifar-10-batches-bin/test_batch.bin"),
        "npz": ("cifar10", root / "c/cifar10.npz"),
        "mat": ("svhn", root / "d/test_32x32.mat"),
        "idx": ("mnist", root / "e/MNIST/raw/t10k-images-idx3-ubyte"),
        "idx.gz": ("mnist", root / "f/MNIST/raw/t10k-images-idx3-ubyte.gz"),
        "parquet": ("dtd", root / "g/dtd_textures_600_256px.parquet"),
    }


@pytest.mark.parametrize("content", ["half", "words", "nothing"])
def test_truncated_and_wrong_files_are_one_clear_error(tmp_path, monkeypatch, content):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    for kind, (name, path) in halves(tmp_path).items():
        root = next(parent for parent in path.parents if parent.parent == tmp_path)
        assert len(open_named(name, "test", root)) > 0
        raw = path.read_bytes()
        path.write_bytes(
            {"half": raw[: len(raw) // 2 + 1], "words": b"<html>not found</html>", "nothing": b""}[content]
        )
        with pytest.raises(DataError, match=f"{name} cannot be read from .*Fetch it again") as told:
            open_named(name, "test", root)
        assert str(path) in str(told.value), kind
        assert "\n" not in str(told.value).split("(")[0]
