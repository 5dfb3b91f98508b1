"""`posthoc features`: what a frozen backbone says about images, in the feature store and in one file for a recipe's `--prior`."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from ..adapters.errors import DataError, OptionError

if TYPE_CHECKING:
    from ..adapters.backbone import Backbone
    from ..adapters.features import Features
    from ..adapters.source_base import Source


@dataclass
class FeatureFile:
    """Compute a backbone's features of images once, into the store, and write them where a recipe's --prior reads them."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """timm name, or hf-hub: id"""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """set by name (such as cifar10), image folder, parquet file, or hub data set id"""
    npz: Path | None = None
    """write `prior` float32 [N, D], `labels` [N] and what tells the images, in their order, to this .npz"""
    features: Literal["embedding", "penultimate", "logits"] = "embedding"
    """what is written"""
    split: str = "train"
    """of a named or hub data set, or of a folder of splits"""
    data_dir: Path | None = None
    """folder of the sets by name; default: $POSTHOC_DATA"""
    checkpoint: Path | None = None
    """local weights, .safetensors or .pth"""
    pretrained: bool = True
    """with the model's pretrained weights"""
    batch_size: int = 64
    """images in one pass"""
    device: str | None = None
    """where the network runs, such as cuda; without it: the CPU"""
    cache_dir: Path | None = None
    """feature store; default: $POSTHOC_CACHE or ~/.cache/posthoc/features"""

    def run(self) -> None:
        from ..adapters.backbone import build_backbone
        from ..adapters.data import open_source
        from ..adapters.distributed import check_launch
        from .datasets import check_there, is_named, open_named

        if self.npz is not None:
            check_writable(self.npz)
        if is_named(self.data):
            source = open_named(self.data, self.split, self.data_dir)
        else:
            check_there(self.data)
            source = open_source(self.data, self.split)
        if self.npz is not None:
            check_labelled(source)
        backbone = build_backbone(
            self.model, pretrained=self.pretrained, checkpoint=self.checkpoint, device=self.device
        )
        check_has(backbone, self.features)
        found = backbone.extract(source, cache_dir=self.cache_dir, batch_size=self.batch_size)
        launch = check_launch()
        told = f"{len(found)} images, embedding of {found.embedding.shape[1]} dimensions, in {found.folder}"
        if self.npz is not None:
            untrained = not self.pretrained and self.checkpoint is None
            seen = False if untrained else True if backbone.num_classes else None
            arrays = prior_arrays(found, self.features, source, seen)
            launch.on_main(lambda: write_npz(self.npz, arrays))
            told += f"; {self.features} {list(arrays['prior'].shape)} written to {self.npz}"
        if launch.is_main:
            print(told)


def check_writable(path: Path) -> None:
    """Makes the folder of the file. Raises OptionError for a name without .npz, DataError where it cannot be written."""
    if path.suffix != ".npz":
        raise OptionError(f"--npz {path} was given; expected a file that ends in .npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder")


def check_labelled(source: Source) -> None:
    """Raises DataError for images without labels, by which a reader tells that the rows are in its order."""
    first = next(iter(source.stream()), None)
    if first is not None and first.label is None:
        raise DataError("these images have no labels; the file holds them, so that its rows' order can be checked")


def check_has(backbone: Backbone, table: str) -> None:
    """Raises DataError for a network that has no such features; one that is not read before its first batch passes."""
    if not backbone.is_read:
        return
    size = {"penultimate": backbone.penultimate_dim, "logits": backbone.num_classes}
    if not size.get(table, backbone.embedding_dim):
        raise DataError(f"--features {table}: {backbone.name} has none; take embedding")


def prior_arrays(found: Features, table: str, source: Source, seen_labels: bool | None) -> dict[str, np.ndarray]:
    """The arrays of the file: `prior` float32 [N, D], `labels`, those of `order_of`, and `seen_labels` where it is known
    whether the network was trained with labels.

    Raises DataError for features that there are none of.
    """
    values = getattr(found, table)
    if values is None:
        raise DataError(f"--features {table}: this network has none; take embedding")
    known = {} if seen_labels is None else {"seen_labels": np.array(seen_labels)}
    arrays: dict[str, Any] = {"prior": np.array(values, np.float32), "labels": np.array(found.label)}
    return {**arrays, **order_of(source), **known}


def order_of(source: Source) -> dict[str, np.ndarray]:
    """What tells which image each row is: `names` [N], the files' paths in their folder; of an array of images the `fingerprint`
    of its content; {} where a source has neither."""
    from ..adapters.source_arrays import ArraySource

    if isinstance(source, ArraySource):
        return {"fingerprint": np.array(source.fingerprint())}
    names, base = source.names(), getattr(source, "base", None)
    if names is None:
        return {}
    return {"names": np.array([Path(name).relative_to(base).as_posix() if base else name for name in names])}


def write_npz(path: Path | None, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all. Raises DataError where it cannot be written."""
    from ..adapters.files import replace_file

    assert path is not None
    content = BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez(content, **named)
    try:
        replace_file(path, content.getvalue())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
