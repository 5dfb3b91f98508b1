"""What every source of images has in common: items, labels, content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import numbers
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_BLOCK = 1 << 24  # bytes hashed at a time, so that a memory-mapped array is never read whole


class Item(NamedTuple):
    """One image as its source holds it (path, encoded bytes, PIL, array or tensor) and its label, None without one."""

    image: Any
    label: int | np.ndarray | None = None


class Source(ABC):
    """One way to look at any data the user has: rows in a fixed order, never shuffled.

    `length` is None for a stream. `item` is what loader workers call (a stream has only `stream`).
    """

    kind: str = ""
    name: str = ""
    split: str | None = None
    length: int | None = None
    collate: Callable[[list], Any] | None = None  # the user's own, from a DataLoader; applied to one item at a time
    num_workers: int | None = None  # from a DataLoader
    _hash: str | None = None

    @abstractmethod
    def item(self, row: int) -> Item:
        """The image and label of `row`; decoding is left to the caller where it can be."""

    def stream(self) -> Iterator[Item]:
        """All items in order, from the first."""
        for row in range(self.length or 0):
            yield self.item(row)

    def fingerprint(self, progress: bool = False) -> str:
        """SHA-256 (hex) of the content, labels included: other images, labels or order give another fingerprint."""
        if self._hash is None:
            self._hash = self._fingerprint(progress)
        return self._hash

    @abstractmethod
    def _fingerprint(self, progress: bool) -> str: ...

    def describe(self) -> dict[str, Any]:
        """JSON-able summary: kind, name, rows (None for a stream) and split; no folder above the last is named."""
        return {"kind": self.kind, "name": self.name, "rows": self.length, "split": self.split}

    def column(self, name: str) -> np.ndarray:
        """One value per row, without decoding images where the source allows it; raises DataError if unknown."""
        if name in LABEL_COLUMNS:
            return np.asarray([item.label for item in self.stream()])
        raise DataError(f"this {self.kind} has no column {name!r}; it has images and labels only")

    def names(self) -> list[str] | None:
        """The file path of every row, None where images are not files."""
        return None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"this {self.kind} is a stream: its length is unknown")
        return self.length


def as_label(value: Any) -> int | np.ndarray | None:
    """A class index as int, class probabilities [C] as float32 array; anything else is a DataError."""
    if value is None or isinstance(value, numbers.Integral):
        return None if value is None else int(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "iub":
        return int(array)
    if array.ndim == 1 and array.dtype.kind in "fiub" and len(array) > 1:
        return array.astype(np.float32)
    raise DataError(
        f"a label must be a class index (int) or class probabilities (1-D float), got {value!r} of type "
        f"{type(value).__name__}. Map names to indices first; a regression target is not a class."
    )


def as_item(value: Any) -> Item:
    """The item in what a data set returns: (image, label, ...), a mapping with image and label columns, or an image."""
    if isinstance(value, Mapping):
        image = find_column(list(value), IMAGE_COLUMNS)
        label = next((name for name in LABEL_COLUMNS if name in value), None)
        return Item(value[image], None if label is None else as_label(value[label]))
    if isinstance(value, tuple | list):
        if not value:
            raise DataError("the data set returned an empty tuple; expected (image, label)")
        return Item(value[0], as_label(value[1]) if len(value) > 1 else None)
    return Item(value)


def find_column(columns: Sequence[str], wanted: tuple[str, ...] = IMAGE_COLUMNS) -> str:
    """The first of the `wanted` names among the columns, else a DataError that lists what is there."""
    for name in wanted:
        if name in columns:
            return name
    raise DataError(
        f"no column named {' or '.join(map(repr, wanted))}; the columns are {', '.join(map(repr, columns))}. "
        f"Rename the right one to {wanted[0]!r}."
    )


def check_labels(labels: Any, rows: int | None = None, numbers: Sequence[int] | None = None) -> np.ndarray | None:
    """Labels as int64 [N] or float32 [N, C], checked; None when there are none.

    Raises DataError for a wrong length, labels on some rows only, negative or fractional class indices, and soft
    labels that are not finite, negative, or do not sum to 1; the message names the first such row (by `numbers`, the
    rows' places in the whole, if given).
    """
    if labels is None:
        return None
    array = _label_array(labels)
    if array is None:
        return None
    if rows is not None and len(array) != rows:
        raise DataError(f"{len(array)} labels for {rows} images; give one label per image")
    if array.ndim == 1 and array.dtype.kind in "iub":
        bad, why = array < 0, "is negative; class indices start at 0 (leave labels out where there are none)"
        array = array.astype(np.int64)
    elif array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "fiub":
        array = array.astype(np.float32)
        with np.errstate(invalid="ignore"):
            bad = ~(np.isfinite(array).all(1) & (array >= 0).all(1) & (np.abs(array.sum(1) - 1) < 1e-2))
        why = "is not a distribution over classes; divide vote counts by their row's sum"
    else:
        raise DataError(
            f"labels must be int [N] (class indices) or float [N, C] (class probabilities), got {array.dtype} "
            f"{list(array.shape)}"
        )
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"the label of row {numbers[row] if numbers else row}, {array[row].tolist()}, {why}")
    return array


def _label_array(labels: Any) -> np.ndarray | None:
    if isinstance(labels, torch.Tensor):
        return labels.detach().cpu().numpy()
    if not isinstance(labels, np.ndarray):
        labels = list(labels)
        missing = sum(label is None for label in labels)
        if missing and missing == len(labels):
            return None
        if missing:
            raise DataError(f"{missing} of {len(labels)} images have no label; label all of them or none")
    try:
        return np.asarray(labels)
    except ValueError:
        raise DataError("the labels have different lengths; give int [N] or float [N, C]") from None


def digest(*parts: Any) -> str:
    """SHA-256 (hex) of values in a canonical encoding: arrays by dtype, shape and bytes, PIL images by their pixels.

    Raises DataError for a type whose content is not known (give the data set a `fingerprint` attribute instead).
    """
    state = hashlib.sha256()
    for part in parts:
        _update(state, part)
    return state.hexdigest()


def _update(state: Any, value: Any) -> None:
    def tag(*words: Any) -> None:
        state.update(("\0".join(map(str, words)) + "\1").encode("utf-8", "surrogateescape"))

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind != "O":
        array = np.asarray(value)
        tag("array", array.dtype.str, array.shape)
        step = max(1, _BLOCK // max(1, array[:1].nbytes)) if array.ndim else 1
        for start in range(0, len(array) if array.ndim else 1, step):
            state.update(np.ascontiguousarray(array[start : start + step] if array.ndim else array).data)
    elif isinstance(value, Image.Image):
        tag("image", value.mode, value.size, value.getpalette() if value.mode == "P" else "")
        state.update(value.tobytes())
    elif isinstance(value, bytes | bytearray | memoryview):
        tag("bytes", len(value))
        state.update(value)
    elif value is None or isinstance(value, str | bool | int | float | Path | numbers.Number):
        tag(type(value).__name__, len(str(value)), value)
    elif isinstance(value, Mapping):
        tag("map", len(value))
        for key in sorted(value, key=str):
            _update(state, key)
            _update(state, value[key])
    elif isinstance(value, list | tuple | range):
        tag("list", len(value))
        for part in value:
            _update(state, part)
    else:
        raise DataError(
            f"the content of a {type(value).__name__} cannot be hashed, so its stored features could not be told from "
            "others'. Give the data set a `fingerprint` attribute (a string that changes whenever the data does)."
        )


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and modification time (ns) of a file; (-1, -1) if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def image_stamp(image: Any) -> Any:
    """What identifies the content of an item's image to `digest`: a path stands for its file's size and time."""
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        image = image["path"]
    return (str(image), *file_stamp(Path(image))) if isinstance(image, str | Path) else image


@contextlib.contextmanager
def forked_rng() -> Iterator[Callable[[int, int, int], None]]:
    """Gives `reseed(seed, row, view)` for python, numpy and torch (CPU), and puts all three back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def reseed(seed: int, row: int, view: int) -> None:
        number = int.from_bytes(hashlib.sha256(f"{seed}/{row}/{view}".encode()).digest()[:8], "little")
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(number % 2**63)  # not torch.manual_seed: no accelerator's state is ours

    try:
        yield reseed
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def item_digest(source: Source, row: int) -> bytes:
    """Digest of one item, its randomness fixed; one that cannot be read hashes as its kind of error."""
    try:
        with forked_rng() as reseed:
            reseed(0, row, 0)
            item = source.item(row)
        return bytes.fromhex(digest(image_stamp(item.image), item.label))
    except DataError:
        raise
    except Exception as error:
        return bytes.fromhex(digest("unreadable", type(error).__name__))


def canonical(value: Any) -> str:
    """JSON with sorted keys, the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def join(digests: Iterable[bytes]) -> str:
    """One digest (hex) of many, in order."""
    state = hashlib.sha256()
    for part in digests:
        state.update(part)
    return state.hexdigest()
