"""Any data the user has, as a `Source` of images and labels in a fixed order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, default_collate

from .errors import DataError
from .source_arrays import ArraySource, FileSource, ListSource, open_folder
from .source_base import Item, Source, check_labels
from .source_datasets import HFSource, StreamSource, TorchSource, is_hf

__all__ = ["Item", "Source", "check_labels", "open_source"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_source(data: Any, split: str = "train") -> Source:
    """A source for whatever holds images, with labels or without.

    Args:
        data: a torch data set of (image, label), mappings or bare images; a DataLoader (its data set, collate and
            workers; read in order, a `SubsetRandomSampler`'s rows only); a `datasets.Dataset`, `IterableDataset` or
            `DatasetDict`; a folder of images (class subfolders give labels); an image file; a parquet file; the id of
            a data set on the hub; uint8 images [N,H,W,3], [N,H,W] or [N,3,H,W]; float [N,3,H,W], taken as
            preprocessed; a list of paths or PIL images; a pair (images, labels) of such; a source.
        split: which part of a hub data set, a `DatasetDict` or a folder of splits.

    Labels are class indices (int [N]) or class probabilities (float [N,C]). Raises DataError for anything else.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | Path):
        return _open_path(data, split)
    if is_hf(data, "DatasetDict") or is_hf(data, "IterableDatasetDict"):
        if split not in data:
            raise DataError(f"no split {split!r}; the data has {', '.join(map(repr, data))}. Give data[SPLIT]")
        data = data[split]
    if is_hf(data):
        return HFSource(data)
    if isinstance(data, DataLoader):
        return _open_loader(data)
    if isinstance(data, IterableDataset) or is_hf(data, "IterableDataset"):
        return StreamSource(data)
    if isinstance(data, np.ndarray | torch.Tensor):
        return ArraySource(data)
    if isinstance(data, Image.Image):
        return ListSource([data])
    if isinstance(data, tuple) and len(data) == 2 and _are_labels(data[1]) and not _are_grey(data):
        images, labels = data
        return (
            ArraySource(images, labels) if isinstance(images, np.ndarray | torch.Tensor) else _open_list(images, labels)
        )
    if isinstance(data, list | tuple):
        return _open_list(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, dict | bytes):
        return TorchSource(data)
    raise DataError(
        f"cannot read images from a {type(data).__name__}; expected a data set, DataLoader, folder, list of paths or "
        "PIL images, uint8 array [N,H,W,3], a pair (images, labels), or the id of a data set on the hub"
    )


def _are_labels(value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim in (1, 2)
    return isinstance(value, list | tuple) and not any(isinstance(v, str | Path | Image.Image) for v in value[:1])


def _are_grey(pair: tuple[Any, Any]) -> bool:
    """Whether both are an image [H,W] rather than images and their labels."""
    return all(getattr(part, "ndim", 0) == 2 and str(part.dtype) in ("uint8", "torch.uint8") for part in pair)


def _open_list(images: Any, labels: Any = None) -> Source:
    images = list(images)
    if not images:
        raise DataError("the list of images is empty")
    if all(isinstance(image, str | Path) for image in images):
        return FileSource(images, labels)
    if all(isinstance(image, Image.Image | np.ndarray | torch.Tensor) for image in images):
        return ListSource(images, labels)
    kinds = sorted({type(image).__name__ for image in images})
    raise DataError(f"expected a list of paths or of images, got a list of {', '.join(kinds)}")


def _open_loader(loader: DataLoader) -> Source:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or is_hf(dataset, "IterableDataset"):
        return StreamSource(dataset)
    collate = None if loader.collate_fn is default_collate or loader.batch_size is None else loader.collate_fn
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, list(sampler.indices))
    if is_hf(dataset) and collate is None:
        source: Source = HFSource(dataset)
        source.num_workers = loader.num_workers
        return source
    return TorchSource(dataset, collate, loader.num_workers)


def _open_path(data: str | Path, split: str) -> Source:
    path = Path(data).expanduser()
    if path.is_dir():
        return open_folder(path, split)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return HFSource(_load("parquet", split="train", data_files=str(path)), name=path.name)
    if path.is_file():
        return FileSource([path], base=path.parent, name=path.name)
    if isinstance(data, str) and _HUB_ID.fullmatch(data):
        return HFSource(_load(data, split=split), name=data)
    raise DataError(f"{str(data)!r} is neither an existing folder or file nor the id of a data set on the hub")


def _load(name: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, **options)
    except Exception as error:  # offline, unknown, gated, unknown split: all named in the text of the error
        raise DataError(
            f"{name!r} is no existing path, and as a data set it could not be loaded "
            f"({type(error).__name__}: {error}). Check the spelling and the connection, or give a folder."
        ) from error
