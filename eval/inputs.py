"""What the commands evaluate: score files, stored features, images by name or folder through a model; all as one `Scored`.

A score file is .npz or .csv. One-dimensional numbers under any name are scores, higher = less certain, except `label` (class
indices), `correct` (0/1), `content` (any key that equal images share) and `concentration` (of a von Mises-Fisher posterior round
the embedding, higher = more certain). An .npz may also hold `logits` [N, C], `embedding` [N, D] and `penultimate` [N, P]. A
.csv is what `posthoc predict` writes; `path`, `percentile` and `abstain` are not scores.
"""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.errors import DataError, OptionError
from ..adapters.features import Features
from ..adapters.store import MANIFEST
from .arrays import Array, as_numpy, finite, first_few, truth
from .dataset_notes import pixel_keys, registered_name
from .datasets import KIND, check_there, is_named, open_named

KNOWN = ("label", "correct", "concentration", "content")
TABLES = ("logits", "embedding", "penultimate")
NOT_SCORES = ("path", "percentile", "abstain")
KEYS = ("content", "pixels", "embedding", "logits")
"""What equal images are told by, the surest first."""


@dataclass
class Scored:
    """The images of one set, [N] rows everywhere: scores by name, and what more is known.

    `label` becomes int64 [N] class indices, or is float [N, C] of soft labels. Raises DataError where nothing is given, rows are
    few or many in one of the arrays (naming the lengths), values are not finite or labels no classes (naming the rows).
    """

    name: str
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    label: np.ndarray | None = None
    correct: np.ndarray | None = None
    logits: np.ndarray | None = None
    embedding: np.ndarray | None = None
    penultimate: np.ndarray | None = None
    concentration: np.ndarray | None = None
    content: Sequence[Any] | None = None
    model: Any = None
    features: Features | None = None
    dataset: str | None = None
    """The set's registered name (`datasets.SETS`), where its images are known to be that set's, with its labels."""

    def __post_init__(self) -> None:
        parts = {f"score {name!r}": values for name, values in self.scores.items()}
        parts |= {key: getattr(self, key) for key in (*KNOWN, *TABLES)}
        flat = [key for key, values in parts.items() if not getattr(values, "ndim", 1)]
        if flat:
            raise DataError(f"{self.name}: {', '.join(flat)} has no dimension; one row for each image is expected")
        lengths = {key: len(values) for key, values in parts.items() if values is not None}
        if not lengths or not max(lengths.values()):
            raise DataError(f"{self.name} is empty: no scores, features or images")
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} {rows}" for key, rows in lengths.items())
            raise DataError(f"{self.name}: one row for each image is expected, and the lengths differ: {told}")
        self.rows = next(iter(lengths.values()))
        for name, values in self.scores.items():
            finite(f"{self.name}: score {name!r}", values)
        for key in TABLES:
            if getattr(self, key) is not None:
                finite(f"{self.name}: {key}", getattr(self, key), 2)
        if self.label is not None:
            self.label = _checked_label(f"{self.name}: label", self.label)
        if isinstance(self.content, np.ndarray) and self.content.ndim > 1:
            raise DataError(f"{self.name}: content has shape {self.content.shape}; one key for each image is expected")
        if self.correct is not None:
            self.correct = truth(f"{self.name}: correct", self.correct)
        elif self.label is not None and self.logits is not None and self.label.ndim == 1:
            self.correct = np.asarray(self.logits).argmax(1) == self.label

    def need(self, *what: str) -> None:
        """Raises DataError unless it has all of `what` ("label", "logits", "correct", ...)."""
        for key in what:
            if getattr(self, key) is None:
                more = " (or labels and logits, from which it follows)" if key == "correct" else ""
                raise DataError(f"{self.name} has no {key}{more}: this evaluation needs it")

    def keys(self, kind: str) -> list[Any] | None:
        """Something equal for equal images, by the `KEYS` kind asked for; None where that is not known.

        "content": what a score file gives. "pixels": `pixel_keys`. "embedding", "logits": their bytes, which tell only images
        that went through the network in batches of one size.
        """
        if kind == "content":
            return None if self.content is None else list(self.content)
        if kind == "pixels":
            keys = None if self.features is None else pixel_keys(self.features)
            return None if keys is None else keys.tolist()
        table = getattr(self, kind)
        return None if table is None else [np.ascontiguousarray(row).tobytes() for row in table]


def not_constant(scores: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Raises DataError for a score, given as its values in every set, that is one and the same number in all of them."""
    for name, parts in scores.items():
        if min(part.min() for part in parts) == max(part.max() for part in parts):
            raise DataError(f"score {name!r} is constant ({parts[0][0]:g} for every image): it ranks nothing")


def same_network(sets: Sequence[Scored | None]) -> None:
    """Raises DataError where two of the sets are known to come from different networks; None, a set not given, is skipped.

    They do where one of `TABLES` has another width, or where both know the fingerprint of their backbone and these differ.
    """
    first: dict[str, tuple[Any, Scored]] = {}
    for one in sets:
        if one is None:
            continue
        known = {key: np.shape(getattr(one, key))[1] for key in TABLES if getattr(one, key) is not None}
        made_by = None if one.features is None else one.features.backbone_fingerprint
        for key, mine in {**known, "backbone": made_by}.items():
            if mine is None:
                continue
            theirs, other = first.setdefault(key, (mine, one))
            if mine != theirs:
                told = (
                    f"the backbones' fingerprints are {theirs[:12]}... and {mine[:12]}..."
                    if key == "backbone"
                    else f"{key} [N, {theirs}] and [N, {mine}]"
                )
                raise DataError(
                    f"{other.name} and {one.name} come from different networks ({told}), so their scores cannot be compared: "
                    "extract both with one network"
                )


def overlap(a: Scored, b: Scored) -> tuple[list[int], list[int]]:
    """Rows of a whose image is also in b, and rows of b whose image is also in a, by the first of `KEYS` that both have."""
    for kind in KEYS:
        mine, theirs = a.keys(kind), b.keys(kind)
        if mine is not None and theirs is not None:
            first, second = set(mine), set(theirs)
            return [i for i, key in enumerate(mine) if key in second], [
                i for i, key in enumerate(theirs) if key in first
            ]
    return [], []


def read(place: str | Path, model: Any = None, split: str = "test") -> Scored:
    """One set from a score file, a folder of stored features, or images for `model` (see `open_model`).

    Images: a folder or file, the name of a set (`datasets.SETS`), or a data set on the hub; a folder wins over a name, a name
    over the hub. Raises DataError for what cannot be read, OptionError where images are given without a model.
    """
    path = Path(place).expanduser()
    name = path.stem if path.suffix in (".npz", ".csv") else path.name or str(place)
    if path.suffix in (".npz", ".csv"):
        if not path.is_file():
            raise DataError(f"there is no file {place}")
        return (_from_npz if path.suffix == ".npz" else _from_csv)(path, name)
    if (path / MANIFEST).is_file():
        features = Features.load(path)
        told = registered_name(features) if len(name) == 64 else None  # the store's own name of a folder is a hash
        return from_features(told or name, features, model)
    check_there(place, split)
    if model is None:
        raise OptionError(f"{place} is neither a score file (.npz, .csv) nor stored features; for images give --model")
    from ..adapters.data import open_source

    backbone = getattr(model, "backbone", model)
    source = open_named(str(place), split) if is_named(place) else open_source(str(place), split)
    return from_features(name, backbone.extract(source), model)


def open_model(name: str | None, checkpoint: Path | None = None, device: str | None = None) -> Any:
    """An adapter's `UncertainModel` where `name` is its folder, else the backbone of that timm name; None for None.

    `checkpoint`: local weights of the backbone (.safetensors or .pth). Raises OptionError for a checkpoint without a name.
    """
    if name is None:
        if checkpoint is not None:
            raise OptionError("--checkpoint was given without --model: whose weights are these?")
        return None
    from ..adapters.backbone import build_backbone
    from ..adapters.files import CONFIG_NAME, read_config

    if not (Path(name) / CONFIG_NAME).is_file():
        return build_backbone(name, checkpoint=checkpoint, device=device)
    from ..adapters.model import load

    own = None if checkpoint is None else build_backbone(read_config(Path(name)).backbone.name, checkpoint=checkpoint)
    return load(name, None, own, device=device)


def from_features(name: str, features: Features, model: Any = None) -> Scored:
    """Features (views: their mean) and, where `model` is fitted, the scores of its heads."""
    tables: dict[str, Any] = {key: _one_view(getattr(features, key)) for key in TABLES}
    scores = head_scores(model, features) if hasattr(model, "heads") else {}
    dataset = (
        features.source.name
        if features.source is not None and features.source.kind == KIND
        else registered_name(features)
    )
    return Scored(name, scores, features.label, None, model=model, features=features, dataset=dataset, **tables)


def head_scores(model: Any, features: Features) -> dict[str, np.ndarray]:
    """The uncertainty of every head on stored features without views, float32 [N], by the head's name."""
    import torch

    from ..adapters.scoring import feature_batches

    parts: dict[str, list[np.ndarray]] = {name: [] for name in model.heads}
    for _, batch in feature_batches(features, np.arange(len(features)), model.device):
        with torch.no_grad():
            prediction = model.answer(batch)
        for name in model.heads:
            parts[name].append(prediction[name].uncertainty.cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def from_arrays(name: str, arrays: Mapping[str, Array]) -> Scored:
    """A set from arrays by name, as in an .npz score file."""
    given = {key: as_numpy(values) for key, values in arrays.items()}
    known: dict[str, Any] = {key: given.pop(key) for key in (*KNOWN, *TABLES) if key in given}
    scores = {key: values for key, values in given.items() if key not in NOT_SCORES and values.dtype.kind in "fiub"}
    for key, values in scores.items():
        if values.ndim != 1:
            raise DataError(f"{name}: score {key!r} has shape {values.shape}; one number for each image is expected")
    return Scored(name, scores, **known)


def _from_npz(path: Path, name: str) -> Scored:
    try:
        with path.open("rb") as raw:
            whole = zipfile.is_zipfile(raw)  # else NumPy takes it for one array or a pickle, whatever its name
            raw.seek(0)
            if whole:
                with np.load(raw, allow_pickle=False) as file:
                    arrays = {key: file[key] for key in file.files}
    except _UNREADABLE as error:
        raise DataError(f"cannot read {path}: {error or type(error).__name__}; write it with numpy.savez") from error
    if not whole:
        raise DataError(f"{path} is no .npz file, or not all of one; write it with numpy.savez")
    return from_arrays(name, arrays)


_UNREADABLE = (OSError, ValueError, EOFError, KeyError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What `zipfile` and NumPy raise for damaged files and for those with objects in them."""


def _from_csv(path: Path, name: str) -> Scored:
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}: line {reader.line_num} has another number of cells than the first line")
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; a comma-separated table in UTF-8 is expected") from error
    columns: dict[str, np.ndarray] = {}
    for key in rows[0] if rows else ():
        words = [row[key] for row in rows]
        if key in NOT_SCORES or not any(words):
            continue
        columns[key] = np.array(words) if key == "content" else _numbers(path, key, words)
    return from_arrays(name, columns)


def _numbers(path: Path, key: str, words: list[str]) -> np.ndarray:
    """A column of a .csv, float64 [N], empty cells as NaN; labels that are words become the place of theirs among all."""
    if key in ("label", "correct"):
        words = [{"true": "1", "false": "0"}.get(word.lower(), word) for word in words]
    try:
        return np.array([float(word) if word else np.nan for word in words])
    except ValueError:
        if key != "label":
            raise DataError(f"{path}: column {key!r} holds words; scores are numbers") from None
    place = np.unique(words, return_inverse=True)[1].astype(np.float64)
    return np.where(np.array(words) == "", np.nan, place)


def _checked_label(name: str, label: Array) -> np.ndarray:
    """Class indices as int64 [N], from whole numbers of any dtype, or soft labels [N, C] as they are."""
    array = as_numpy(label)
    wanted = "whole numbers [N] (class indices) or [N, C], C > 1 (class probabilities), are expected"
    if array.dtype.kind not in "fiub" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] < 2):
        kind = "text" if array.dtype.kind in "US" else str(array.dtype)
        raise DataError(f"{name} is {kind} {list(array.shape)}; {wanted}")
    if array.dtype.kind == "f":
        values = finite(name, array, (1, 2))
        whole = (values == np.round(values)) & (np.abs(values) < 2**53)
        bad = np.flatnonzero(~whole if array.ndim == 1 else (values < 0).any(1))
        if len(bad):
            rows = first_few(bad)
            what = "no whole number" if array.ndim == 1 else "negative"
            raise DataError(f"{name} is {what} in {len(bad)} of {len(array)} rows (rows {rows}); {wanted}")
    return array if array.ndim == 2 else array.astype(np.int64, copy=False)


def _one_view(table: np.ndarray | None) -> np.ndarray | None:
    return table if table is None or table.ndim == 2 else table.mean(1)
