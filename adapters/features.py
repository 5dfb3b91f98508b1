"""Features: what a backbone says about a data set, computed once, stored, and read as memory maps."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import Source, check_labels, open_source
from .errors import DataError, OptionError
from .store import MANIFEST, read_manifest

if TYPE_CHECKING:
    from .backbone import Backbone


@dataclass(eq=False)
class Features:
    """The features of N images: arrays or memory maps, in the order of the source.

    Attributes:
        embedding: [N, D], or [N, V, D] with V augmented views of every image.
        penultimate: [N, P] or [N, V, P], the input of the one last linear layer; None without one.
        logits: [N, C] or [N, V, C]; None without a classifier.
        label: int64 [N] class indices or float32 [N, C] class probabilities; None without labels.
        row: int64 [N], each image's index in the source (broken images may have been skipped).
        views: V; 1 means plain images, without a view axis.
        backbone_fingerprint: of the backbone that made them, classifier included; None if unknown.
        folder: where they are stored; None for arrays.
        source: where the images can be read again; in memory only, so None after `load`.
        skipped: how many images of the source could not be read and are not here.
    """

    embedding: np.ndarray
    penultimate: np.ndarray | None
    logits: np.ndarray | None
    label: np.ndarray | None
    row: np.ndarray
    views: int = 1
    backbone_fingerprint: str | None = None
    folder: Path | None = None
    source: Source | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> Features:
        """The features of a slice, an index array or a boolean mask [N], with their `row` and the source kept."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "biu"):
                raise DataError(f"index features with a slice, row numbers or a mask, got {rows.dtype} {rows.shape}")
            rows = rows if len(rows) else rows.astype(np.int64)

        def take(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        embedding = self.embedding[rows]
        return Features(
            embedding,
            embedding if self.penultimate is self.embedding else take(self.penultimate),
            take(self.logits),
            take(self.label),
            self.row[rows],
            self.views,
            self.backbone_fingerprint,
            self.folder,
            self.source,
            self.skipped,
        )

    @property
    def num_classes(self) -> int:
        """Classes of the labels (highest index + 1, or columns of soft labels); 0 without labels."""
        if self.label is None or len(self.label) == 0:
            return 0
        return int(self.label.shape[1]) if self.label.ndim == 2 else int(self.label.max()) + 1

    @classmethod
    def from_arrays(cls, embedding: Any, *, penultimate: Any = None, logits: Any = None, label: Any = None) -> Features:
        """Features from arrays the user has: embedding [N,D] (or [N,V,D]), the others with the same leading axes.

        Raises DataError, naming the first row, for shapes that do not fit, non-finite values and unusable labels.
        """
        arrays = {"embedding": embedding, "penultimate": penultimate, "logits": logits}
        checked = {name: None if value is None else _matrix(name, value) for name, value in arrays.items()}
        first = checked["embedding"]
        if first is None:
            raise DataError("features need an embedding [N,D]")
        for name, array in checked.items():
            if array is not None and array.shape[:-1] != first.shape[:-1]:
                raise DataError(
                    f"{name} is {list(array.shape)} and the embedding {list(first.shape)}; all axes but the last must "
                    "be the same"
                )
        return cls(
            first,
            first if penultimate is embedding else checked["penultimate"],
            checked["logits"],
            check_labels(label, len(first)),
            np.arange(len(first)),
            views=first.shape[1] if first.ndim == 3 else 1,
        )

    @classmethod
    def load(cls, folder: str | Path) -> Features:
        """Stored features as memory maps. Raises DataError when the folder is not a complete, undamaged store."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError(
                f"{folder} is not a complete feature store (manifest or arrays are missing, damaged or of another "
                "version). Extract the features again."
            )
        arrays = {name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r") for name in manifest["files"]}
        with contextlib.suppress(OSError):  # a store that others own
            os.utime(folder / MANIFEST)  # its time says when the store was last used
        return cls(
            arrays["embedding"],
            arrays["embedding"] if manifest["penultimate_is_embedding"] else arrays.get("penultimate"),
            arrays.get("logits"),
            arrays.get("label"),
            arrays["row"],
            manifest["views"],
            manifest["backbone"]["fingerprint"],
            folder,
            None,
            len(manifest["skipped"]),
        )


def _matrix(name: str, value: Any) -> np.ndarray:
    array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    if array.ndim not in (2, 3) or array.dtype.kind != "f" or 0 in array.shape:
        raise DataError(f"{name} must be float [N,D] (or [N,V,D] with views), got {array.dtype} {list(array.shape)}")
    step = max(1, (1 << 22) // max(1, array[0].size))
    for start in range(0, len(array), step):
        bad = ~np.isfinite(array[start : start + step]).reshape(min(step, len(array) - start), -1).all(1)
        if bad.any():
            raise DataError(f"{name} is not finite in row {start + int(np.argmax(bad))}")
    return array


def extract(
    backbone: Backbone,
    data: Any,
    *,
    cache_dir: str | Path | None = None,
    views: int = 1,
    dtype: str = "float32",
    batch_size: int = 64,
    num_workers: int | None = None,
    on_error: str = "raise",
    seed: int = 0,
    progress: bool = True,
) -> Features:
    """Runs the backbone once over the data and stores what it says; a second call reads the store instead.

    Args:
        data: whatever `open_source` takes, or `Features` (returned, if they are this backbone's).
        cache_dir: the store; `$POSTHOC_CACHE` or `~/.cache/posthoc/features` by default. With several nodes it must be
            on a file system that all of them see.
        views: V > 1 stores V randomly augmented views (SimCLR's augmentation) of every image instead of the image.
        dtype: "float32" or "float16", of the stored embedding, penultimate input and logits.
        batch_size: images (views counted) in one pass of the backbone.
        num_workers: loader processes; None: the DataLoader's own, else none on CPU and up to 8 with an accelerator.
        on_error: "raise", or "skip" to leave out images that cannot be read, counted in `Features.skipped`.
        seed: of the augmentations, which depend on (seed, row, view) alone.
        progress: a bar with images/s.

    The store is keyed by the backbone's weights, the preprocessing, the data's content, views, dtype and seed; it is
    written in chunks, so that a killed run goes on where it was. In a launch of several processes each extracts its
    share, and every process must make the call. Raises DataError for unreadable images, outputs that are not finite
    and unusable labels, each with its row; OptionError for unknown options.
    """
    from .extraction import Extraction

    if isinstance(data, Features):
        return _own(data, backbone, views)
    if dtype not in ("float32", "float16"):
        raise OptionError(f"dtype {dtype!r} is unknown; expected 'float32' or 'float16'")
    if on_error not in ("raise", "skip"):
        raise OptionError(f"on_error {on_error!r} is unknown; expected 'raise' or 'skip'")
    if views < 1 or batch_size < 1:
        raise OptionError(f"views and batch_size must be at least 1, got {views} and {batch_size}")
    source = open_source(data)
    job = Extraction(backbone, source, views, dtype, batch_size, num_workers, on_error, seed, progress)
    folder = job.run(cache_dir)
    features = Features.load(folder)
    features.source = source
    if features.skipped:
        broken = json.loads((folder / MANIFEST).read_text())["skipped"]
        named = "; ".join(f"{name}: {why}" for _, name, why in broken[:3])
        warnings.warn(f"skipped {len(broken)} image(s) that could not be read: {named}", UserWarning, stacklevel=3)
    return features


def _own(features: Features, backbone: Backbone, views: int) -> Features:
    """Features given instead of images, checked as far as can be told."""
    made_by = features.backbone_fingerprint
    if made_by is not None and made_by != backbone.fingerprint("logits"):
        raise DataError(
            f"these features were made by another backbone ({made_by[:16]}...) than this one "
            f"({backbone.fingerprint('logits')[:16]}...); extract them again with this one"
        )
    if made_by is None and features.embedding.shape[-1] != backbone.embedding_dim:
        raise DataError(
            f"these features have {features.embedding.shape[-1]} dimensions, this backbone's {backbone.embedding_dim}"
        )
    if features.views != views:
        raise DataError(f"these features hold {features.views} view(s) of each image, asked for {views}")
    return features
