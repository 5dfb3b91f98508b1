"""CIFAR-10 and CIFAR-100 from their own archives ("python version", "binary version") or an .npz.

Nothing is unpickled: of the pickled batches the tokens are read (`pickletools`); no object is made and nothing of them runs.
torchvision unpickles them, and refuses batches that were written anew by their MD5.
"""

from __future__ import annotations

import pickletools
from pathlib import Path

import numpy as np

from ..adapters.errors import DataError
from ..adapters.source_arrays import ArraySource
from ..adapters.source_base import Source
from .dataset_classes import CLASSES

CIFAR10, CIFAR100 = CLASSES["cifar10"], CLASSES["cifar100"]
_PIXELS = 3 * 32 * 32
_WHOLE = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
_KEYS = {b"data", b"labels", b"fine_labels", b"coarse_labels", b"filenames", b"batch_label"}


def npz(path: Path, train: bool) -> Source:
    """`x_train` [N,32,32,3] and `y_train`, `x_test` and `y_test` of one .npz."""
    part = "train" if train else "test"
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        images, label = file[f"x_{part}"], file[f"y_{part}"]
    return _cifar(images, label, CIFAR10)


def tokens(path: Path, train: bool) -> Source:
    """The batches of the "python version": `test_batch` or every `data_batch_*` beside it; of CIFAR-100 `test`, `train`."""
    parts = [_batch(one) for one in _batches(path)]
    classes = CIFAR10 if "batch" in path.name else CIFAR100
    return _cifar(np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), classes)


def binary(path: Path, train: bool) -> Source:
    """The batches of the "binary version": rows of a label (CIFAR-100: coarse, fine) and 3072 bytes, colours first."""
    classes = CIFAR10 if "batch" in path.name else CIFAR100
    head = 1 if classes is CIFAR10 else 2
    rows = []
    for one in _batches(path):
        content = np.fromfile(one, np.uint8)
        if not len(content) or len(content) % (head + _PIXELS):
            raise DataError(f"{one} has {len(content)} bytes, no multiple of {head + _PIXELS}")
        rows.append(content.reshape(-1, head + _PIXELS))
    table = np.concatenate(rows)
    return _cifar(table[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), table[:, head - 1], classes)


def _batches(path: Path) -> list[Path]:
    """The file itself, or all five of CIFAR-10's training batches."""
    if "data_batch_1" not in path.name:
        return [path]
    return [path.with_name(path.name.replace("_1", f"_{number}")) for number in range(1, 6)]


def _cifar(images: np.ndarray, label: np.ndarray, classes: tuple[str, ...]) -> ArraySource:
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise DataError(f"uint8 images [N,32,32,3] are expected, got {images.dtype} {list(images.shape)}")
    if len(label) and label.max() >= len(classes):
        raise DataError(f"label {label.max()} is there; the set has {len(classes)} classes, 0 to {len(classes) - 1}")
    return ArraySource(np.ascontiguousarray(images), label.astype(np.int64))


def _batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,32,32,3] and labels of a pickled batch, from the tokens of the pickle.

    Under "data" the one long string is the array's bytes (a pickle of Python 3 may write them as latin-1 text), and
    under "labels" or "fine_labels" the whole numbers are the labels.
    """
    key, pixels, label, flag, fortran = b"", b"", [], False, False
    for token, value, _ in pickletools.genops(path.read_bytes()):
        if token.name in _WHOLE and key in (b"labels", b"fine_labels"):
            label.append(value)
        elif token.name in ("NEWTRUE", "NEWFALSE"):
            flag = token.name == "NEWTRUE"
        elif isinstance(value, str | bytes | bytearray):
            text = value.encode("latin-1", "replace") if isinstance(value, str) else bytes(value)
            if text in _KEYS:
                key, flag = text, False
            elif key == b"data" and len(text) >= _PIXELS:
                pixels, fortran = text, flag  # the last truth value before the bytes: is their order Fortran's?
            elif key == b"data" and text == b"F":  # the same, as the newest pickles say it
                fortran = True
    if fortran:
        raise DataError(f"{path}: the array is in Fortran's order; the official batches are in C's")
    if not pixels or len(pixels) != len(label) * _PIXELS:
        raise DataError(
            f"{path} holds {len(label)} labels and {len(pixels)} bytes of pixels; 3072 a label are expected"
        )
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(label)
