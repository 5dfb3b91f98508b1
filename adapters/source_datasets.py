"""torch data sets, Hugging Face data sets, and streams, seen as sources."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from .errors import DataError
from .source_base import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Item,
    Source,
    as_item,
    digest,
    file_stamp,
    find_column,
    image_stamp,
    item_digest,
    join,
)

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


class TorchSource(Source):
    """A map-style torch data set of (image, label), mappings with image and label columns, or bare images.

    A DataLoader's own collate function is applied to one item at a time, so that it sees no other row.
    """

    kind = "torch data set"

    def __init__(self, dataset: Any, collate: Any = None, num_workers: int | None = None) -> None:
        if not hasattr(dataset, "__len__"):
            raise DataError(f"a map-style data set needs __len__; {type(dataset).__name__} has none")
        self.dataset, self.length, self.name = dataset, len(dataset), type(dataset).__name__
        self.collate, self.num_workers = collate, num_workers
        self.split = getattr(dataset, "split", None) if isinstance(getattr(dataset, "split", None), str) else None

    def item(self, row: int) -> Item:
        value = self.dataset[row]
        if self.collate is None:
            return as_item(value)
        return as_item(_first(self.collate([value])))

    def column(self, name: str) -> np.ndarray:
        """The data set's attribute of that name if it has one entry per row, else the items' value (decodes images)."""
        values = getattr(self.dataset, name, None)
        if values is not None and hasattr(values, "__len__") and len(values) == self.length:
            return np.asarray(values)
        if name in LABEL_COLUMNS:
            return super().column(name)
        first = self.dataset[0]
        if not isinstance(first, dict) or name not in first:
            raise DataError(f"{self.name} has neither an attribute nor an item column {name!r} with one entry per row")
        return np.asarray([self.dataset[row][name] for row in range(self.length or 0)])

    def names(self) -> list[str] | None:
        samples = getattr(self.dataset, "samples", None)
        if _of_torchvision(self.dataset) and isinstance(samples, list):
            return [str(path) for path, _ in samples]
        return None

    def _fingerprint(self, progress: bool) -> str:
        known = None if self.collate else _known_content(self.dataset)
        return known if known is not None else self._hash_items(progress)

    def _hash_items(self, progress: bool) -> str:
        rows = _ItemDigests(self)
        loader = DataLoader(rows, batch_size=None, num_workers=self.num_workers or 0, generator=torch.Generator())
        return join(tqdm(loader, "fingerprint", unit="image", disable=not progress))


class _ItemDigests(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.length or 0

    def __getitem__(self, row: int) -> bytes:
        return item_digest(self.source, row)


def _first(batch: Any) -> Any:
    """The one item of a collated batch of one."""
    if isinstance(batch, dict):
        return {key: value[0] if hasattr(value, "__getitem__") else value for key, value in batch.items()}
    if hasattr(batch, "data") and hasattr(batch, "keys"):  # transformers' BatchFeature
        return _first(dict(batch))
    if isinstance(batch, tuple | list):
        return tuple(part[0] for part in batch)
    return batch[0]


def _of_torchvision(dataset: Any) -> bool:
    return type(dataset).__module__.startswith("torchvision.datasets")


def _known_content(dataset: Any) -> str | None:
    """A hash of the whole content of data sets whose content is in plain sight, None for all others.

    Of torchvision's own classes the data, targets and the transforms' text are hashed, with four items as they come
    out, since a transform's text need not tell all its options. A text with a memory address tells nothing.
    """
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return digest("own", type(dataset).__qualname__, own)
    if type(dataset) is TensorDataset:
        return digest("tensors", dataset.tensors)
    if type(dataset) is Subset:
        inner = _inner(dataset.dataset)
        return None if inner is None else digest("subset", inner, np.asarray(dataset.indices, dtype=np.int64))
    if type(dataset) is ConcatDataset:
        parts = [_inner(part) for part in dataset.datasets]
        return None if None in parts else digest("concat", parts)
    if not _of_torchvision(dataset):
        return None
    transforms = [repr(getattr(dataset, key, None)) for key in ("transforms", "transform", "target_transform")]
    if any(_ADDRESS.search(text) for text in transforms):
        return None
    if hasattr(dataset, "samples") and hasattr(dataset, "root"):
        stamps = [(str(Path(path).relative_to(dataset.root)), label) for path, label in dataset.samples]
        content: Any = (stamps, np.array([file_stamp(Path(path)) for path, _ in dataset.samples]))
    elif hasattr(dataset, "data") and (hasattr(dataset, "targets") or hasattr(dataset, "labels")):
        targets = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        content = (dataset.data, np.asarray(targets))
    else:
        return None
    probes = sorted({len(dataset) * part // 4 for part in range(4)}) if len(dataset) else []
    source = TorchSource(dataset)
    return digest(
        "torchvision", type(dataset).__qualname__, transforms, content, [item_digest(source, r) for r in probes]
    )


def _inner(dataset: Any) -> str | None:
    if is_hf(dataset):
        return HFSource(dataset).fingerprint()
    return _known_content(dataset)


def is_hf(data: Any, kind: str = "Dataset") -> bool:
    """Whether data is the `datasets` class of that name; never imports `datasets` (seconds) just to say no."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, getattr(module, kind))


class HFSource(Source):
    """A `datasets.Dataset`; images stay encoded until a worker decodes them, unless it has a transform of its own.

    Its fingerprint is the one `datasets` keeps: content and every processing step.
    """

    kind = "datasets.Dataset"

    def __init__(self, dataset: Any, name: str | None = None) -> None:
        self.length = len(dataset)
        self.split = str(dataset.split) if dataset.split is not None else None
        self.name = name or dataset.info.dataset_name or "dataset"
        self.dataset_fingerprint = dataset._fingerprint
        if dataset.format["type"] == "custom":  # with_transform: the user's function makes the items
            self.dataset = self.plain = dataset
        else:
            self.plain = dataset.with_format(None)
            find_column(self.plain.column_names)
            self.dataset = _undecoded(self.plain)

    def item(self, row: int) -> Item:
        return as_item(self.dataset[row])

    def column(self, name: str) -> np.ndarray:
        plain = self.plain.with_format(None)
        find_column(plain.column_names, (name,))
        return np.asarray(plain.select_columns([name])[:][name])

    def names(self) -> list[str] | None:
        import pyarrow

        dataset = _undecoded(self.plain.with_format(None))
        image = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
        storage = dataset.data.column(image).type if image else None
        if not isinstance(storage, pyarrow.StructType) or storage.get_field_index("path") < 0:
            return None
        paths = f"{image}.path"  # selected before anything is read: the bytes beside them may be many
        found = list(dataset.select_columns([image]).flatten().select_columns([paths])[:][paths])
        return None if None in found else found

    def _fingerprint(self, progress: bool) -> str:
        return digest("hf", self.dataset_fingerprint)


def _undecoded(dataset: Any) -> Any:
    """The data set with its image column left as bytes and path."""
    import datasets

    name = next((name for name in IMAGE_COLUMNS if name in (dataset.features or {})), None)
    if name is None or not isinstance(dataset.features[name], datasets.Image):
        return dataset
    return dataset.cast_column(name, datasets.Image(decode=False))


class StreamSource(Source):
    """A `datasets.IterableDataset` or an iterable torch data set: read from the first row each time, length unknown.

    Fingerprint: where every underlying file is named (local files by size and time, hub files by the revision in
    their address) or is a `datasets.Dataset`, a hash of those and of all steps on them. Otherwise the content cannot
    be known from outside, and the whole stream is read once to hash it, images undecoded; a `fingerprint` attribute
    (a string that changes whenever the data does) spares that.
    """

    kind = "stream"

    def __init__(self, dataset: Any, name: str | None = None) -> None:
        self.original = dataset
        self.hf = is_hf(dataset, "IterableDataset")
        self.dataset = _undecoded(dataset) if self.hf else dataset
        info_name = dataset.info.dataset_name if self.hf else type(dataset).__name__
        self.name = name or info_name or "stream"
        self.split = str(dataset.split) if self.hf and dataset.split is not None else None
        if self.hf and dataset.features:
            find_column(list(dataset.features))

    def item(self, row: int) -> Item:
        raise DataError("a stream has no random access: use a map-style data set for what needs single rows again")

    def stream(self) -> Iterator[Item]:
        row = 0
        try:
            for value in self.dataset:
                yield as_item(value)
                row += 1
        except (DataError, GeneratorExit):
            raise
        except Exception as error:
            raise DataError(f"the stream {self.name!r} broke at row {row}: {error!r}") from error

    def column(self, name: str) -> np.ndarray:
        dataset = self.original
        if self.hf and dataset.features:
            find_column(list(dataset.features), (name,))
            dataset = dataset.select_columns([name])
        return np.asarray([value[name] for value in dataset])

    def _fingerprint(self, progress: bool) -> str:
        own = getattr(self.original, "fingerprint", None)
        if isinstance(own, str):
            return digest("own", type(self.original).__qualname__, own)
        identity = _stream_identity(self.original) if self.hf else None
        if identity is not None:
            return identity
        items = tqdm(self.stream(), "fingerprint of the stream", unit="image", disable=not progress)
        return join(bytes.fromhex(digest(image_stamp(item.image), item.label)) for item in items)


def _stream_identity(dataset: Any) -> str | None:
    """A hash of a stream's roots and steps; None when anything about them is not in plain sight."""
    from datasets.fingerprint import Hasher

    # `datasets` has no public name for the steps of a stream; whatever is missing here, the content is hashed instead.
    try:
        if dataset._starting_state_dict is not None:  # goes on in the middle
            return None
        steps = copy.deepcopy(dataset._ex_iterable)
        steps._init_state_dict()  # else a stream that has been read would hash as another one
        stamps = _leaf_stamps(steps)
        return None if stamps is None else digest("hf stream", Hasher.hash(steps), dataset.epoch, stamps)
    except Exception:
        return None


def _leaf_stamps(steps: Any) -> list[Any] | None:
    """What tells the content at the roots of a stream, None if a root is anything but named files or data sets."""
    inner = getattr(steps, "ex_iterables", None) or [part for part in [getattr(steps, "ex_iterable", None)] if part]
    if inner:
        parts = [_leaf_stamps(part) for part in inner]
        return None if any(part is None for part in parts) else [stamp for part in parts if part for stamp in part]
    kwargs = getattr(steps, "kwargs", {})
    shards, files = kwargs.get("shards"), kwargs.get("files")
    if isinstance(shards, list) and shards and all(is_hf(shard) for shard in shards):
        return [shard._fingerprint for shard in shards]
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        return None
    stamps: list[Any] = []
    for file in files:
        if "://" not in file:
            stamps.append((file, *file_stamp(Path(file))))
        elif re.search(r"hf://.+@[0-9a-f]{40}/", file):
            stamps.append(file)
        else:
            return None
    return stamps
