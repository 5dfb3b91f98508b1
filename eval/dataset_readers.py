"""How the files of the named sets are read: one function for each layout, which gives a `Source` in a fixed order.

torchvision's own classes are not used: several refuse every copy but the original by its MD5 (CIFAR, SVHN, CelebA, Omniglot),
two unpickle files (CIFAR, LSUN), and the others are lists of paths and labels, which are faster to hash as such. The tests read
the same files with torchvision too. CIFAR is in dataset_cifar.py.
"""

from __future__ import annotations

import gzip
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.data import open_source
from ..adapters.errors import DataError
from ..adapters.source_arrays import IMAGE_ENDINGS, ArraySource, FileSource
from ..adapters.source_base import Item, Source, digest, file_stamp
from .dataset_classes import CLASSES

TINY_IMAGENET = CLASSES["tiny-imagenet"]


def idx(path: Path, train: bool) -> Source:
    """MNIST's files: `...-images-idx3-ubyte` and `...-labels-idx1-ubyte`, gzipped or not."""
    images = _idx(path, 3)
    label = _idx(path.with_name(path.name.replace("images-idx3", "labels-idx1")), 1)
    return ArraySource(images, label.astype(np.int64))


def svhn(path: Path, train: bool) -> Source:
    """A .mat of `X` [32,32,3,N] and `y`, whose 10 is the digit 0."""
    from scipy.io import loadmat

    content = loadmat(path, variable_names=("X", "y"))
    return ArraySource(content["X"].transpose(3, 0, 1, 2), content["y"].ravel().astype(np.int64) % 10)


def tiny_folder(path: Path, train: bool) -> Source:
    """`train/WNID/images/` or `val/` with `val_annotations.txt`; labels follow the sorted WordNet ids."""
    if train:
        paths = [one for one in images_in(path) if one.parent.name == "images"]
        ids = [one.parent.parent.name for one in paths]
    else:
        lines = [line.split("\t") for line in (path / "val_annotations.txt").read_text().splitlines()]
        paths, ids = [path / "images" / line[0] for line in lines], [line[1] for line in lines]
    return _files(paths, _indices(ids, TINY_IMAGENET), path)


def tiny_parquet(path: Path, train: bool) -> Source:
    """A parquet file with `image` and `label`, whose class names are the 200 sorted WordNet ids."""
    source: Any = open_source(path)
    names = getattr(source.plain.features["label"], "names", None)
    if names is None or tuple(names) != TINY_IMAGENET:
        raise DataError(f"{path}: the class names of `label` are not Tiny ImageNet's 200 sorted WordNet ids")
    return source


def parquet(path: Path, train: bool) -> Source:
    """A parquet file with `image` and, where there are labels, `label`."""
    return open_source(path)


def omniglot_parquet(path: Path, train: bool) -> Source:
    """A parquet file with `image`, `label` and `split`: background_small1 to train, background_small2 to evaluate."""
    source: Any = open_source(path)
    rows = np.flatnonzero(source.column("split") == f"background_small{1 if train else 2}")
    return open_source(source.plain.select(rows))


def omniglot_folder(path: Path, train: bool) -> Source:
    """`ALPHABET/CHARACTER/*.png`: a label for each character, in sorted order."""
    paths = images_in(path)
    return _files(paths, np.unique([str(one.parent) for one in paths], return_inverse=True)[1], path)


def dtd(path: Path, train: bool) -> Source:
    """`labels/test1.txt` or `labels/train1.txt` (the first of ten partitions), `images/CATEGORY/`."""
    names = path.read_text().split()
    base = path.parent.parent / "images"
    label = np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]
    return _files([base / name for name in names], label, base)


def celeba(path: Path, train: bool) -> Source:
    """`list_eval_partition.txt` (0: train, 2: test), `img_align_celeba/`; labels are the numbers of the persons."""
    wanted = "0" if train else "2"
    names = [name for name, part in map(str.split, path.read_text().splitlines()) if part == wanted]
    label = None
    if (path.parent / "identity_CelebA.txt").is_file():
        person = dict(map(str.split, (path.parent / "identity_CelebA.txt").read_text().splitlines()))
        label = np.array([int(person[name]) for name in names])
    base = path.parent / "img_align_celeba"
    return _files([base / name for name in names], label, base)


def cars(path: Path, train: bool) -> Source:
    """Stanford Cars' annotations (.mat with `fname`, `class` from 1), and `cars_train/` or `cars_test/`."""
    from scipy.io import loadmat

    rows = np.atleast_1d(loadmat(path, squeeze_me=True)["annotations"])
    base = path.parent.parent / "cars_train" if train else path.parent / "cars_test"
    return _files([base / str(row["fname"]) for row in rows], np.array([int(row["class"]) - 1 for row in rows]), base)


def unlabelled(path: Path, train: bool) -> Source:
    """Every image in a folder and below, without labels."""
    return _files(images_in(path), None, path)


def letters(path: Path, train: bool) -> Source:
    """`A/` to `J/` of PNG files; the empty files that notMNIST is known to hold are left out, with a warning."""
    paths = images_in(path)
    whole = [one for one in paths if one.stat().st_size]
    if len(whole) < len(paths):
        warnings.warn(f"{len(paths) - len(whole)} empty file(s) of {path} were left out", UserWarning, stacklevel=2)
    return _files(whole, _indices([one.parent.name for one in whole], tuple("ABCDEFGHIJ")), path)


_ONE_READER = threading.Lock()  # LMDB refuses to open an environment twice in one process


class LmdbSource(Source):
    """Encoded images of LMDB folders, in the order of their keys; each folder is a class, if there are several.

    Opened for each image, since an open environment must not cross a fork into a loader's worker. Needs the package lmdb.
    """

    kind = "lmdb"

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.keys = [self._keys(folder) for folder in self.folders]
        self.ends = np.cumsum([len(keys) for keys in self.keys])
        self.length = int(self.ends[-1])

    def _keys(self, folder: Path) -> list[bytes]:
        with _ONE_READER, _lmdb(folder) as environment, environment.begin() as transaction:
            return list(transaction.cursor().iternext(keys=True, values=False))

    def item(self, row: int) -> Item:
        part = int(np.searchsorted(self.ends, row, side="right"))
        key = self.keys[part][row - int(self.ends[part])]
        with _ONE_READER, _lmdb(self.folders[part]) as environment, environment.begin() as transaction:
            return Item(bytes(transaction.get(key)), part if len(self.folders) > 1 else None)

    def _fingerprint(self, progress: bool) -> str:
        return digest("lmdb", [(folder.name, *file_stamp(folder / "data.mdb")) for folder in self.folders], self.keys)


def lsun(path: Path, train: bool) -> Source:
    """`test_lmdb`, without labels; to train every `*_train_lmdb` beside it, a class each."""
    return LmdbSource(sorted(path.parent.glob("*_train_lmdb")) if train else [path])


def images_in(folder: Path) -> list[Path]:
    """Every image file in a folder and below, sorted; hidden ones are left out."""
    return sorted(
        one for one in folder.rglob("*") if one.suffix.lower() in IMAGE_ENDINGS and not one.name.startswith(".")
    )


def _lmdb(folder: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise DataError(f"{folder} is an LMDB folder, which needs a package more: pip install lmdb") from None
    return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)


def _files(paths: Sequence[Path], label: np.ndarray | None, base: Path) -> FileSource:
    if not paths:
        raise DataError(f"there is no image in {base}")
    missing = [one for one in paths if not one.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} images are not there, first: {missing[0]}")
    return FileSource(paths, label, base=base)


def _indices(names: Iterable[str], classes: tuple[str, ...]) -> np.ndarray:
    place = {name: row for row, name in enumerate(classes)}
    unknown = sorted({name for name in names if name not in place})
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is no class of this set (one of {len(classes)}, {classes[0]} to {classes[-1]})"
        )
    return np.array([place[name] for name in names])


def _idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an idx file; raises DataError unless its header and length fit."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) < 4 + 4 * axes:
        raise DataError(f"{path} is no idx file of uint8 in {axes} dimension(s)")
    shape = np.frombuffer(raw, ">u4", axes, 4).astype(int)
    if len(raw) != 4 + 4 * axes + shape.prod():
        raise DataError(f"{path} is truncated or too long: its header says {list(shape)}, {len(raw)} bytes are there")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
