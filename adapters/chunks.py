"""The chunks of an extraction: who reads which rows, what a chunk holds, and what all of them amount to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distributed import Launch
from .errors import DataError, PosthocError
from .source_base import Source, check_labels
from .source_loader import Broken
from .store import Store


class Jobs:
    """The rows this process reads, a list for each batch; batches never cross the border of a chunk.

    The j-th missing chunk belongs to process j % world, so that a resumed run is balanced too. Of a stream every
    process reads all, and decodes its own rows.
    """

    def __init__(self, source: Source, chunk_rows: int, batch_rows: int, kept: set[int], launch: Launch) -> None:
        self.source, self.chunk_rows, self.batch_rows = source, chunk_rows, batch_rows
        self.kept, self.launch = kept, launch
        self.seen = source.length or 0  # of a stream: how many items have come so far

    def mine(self) -> list[int]:
        """This process's chunks of a source of known length."""
        chunks = math.ceil((self.source.length or 0) / self.chunk_rows)
        missing = [chunk for chunk in range(chunks) if chunk not in self.kept]
        return missing[self.launch.rank :: self.launch.world]

    def rows(self, chunk: int) -> range:
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.source.length or 0))

    def __iter__(self) -> Iterator[list[Any]]:
        if self.source.length is None:
            yield from self._stream()
            return
        for chunk in self.mine():
            rows = self.rows(chunk)
            for start in range(0, len(rows), self.batch_rows):
                yield list(rows[start : start + self.batch_rows])

    def _stream(self) -> Iterator[list[Any]]:
        jobs: list[Any] = []
        missing = -1
        for row, item in enumerate(self.source.stream()):
            self.seen = row + 1
            chunk, place = divmod(row, self.chunk_rows)
            missing += place == 0 and chunk not in self.kept
            if jobs and (place == 0 or len(jobs) == self.batch_rows):
                yield jobs
                jobs = []
            if chunk not in self.kept and missing % self.launch.world == self.launch.rank:
                jobs.append((row, item))
        if jobs:
            yield jobs


@dataclass
class Chunk:
    """The rows of one chunk while they are collected; outputs stay on the device until the chunk is full."""

    index: int
    row: list[int] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    label: list[Any] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    shared: bool = False  # the penultimate input is the very embedding

    def arrays(self, views: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """What is written: outputs [B,...] or [B,V,...], labels, rows; broken rows and all shapes as JSON bytes."""
        arrays = {"row": np.asarray(self.row, dtype=np.int64)}
        for name in self.outputs[0] if self.outputs else ():
            whole = torch.cat([output[name] for output in self.outputs])
            whole = whole.reshape(len(self.row), views, -1) if views > 1 else whole.reshape(len(self.row), -1)
            arrays[name] = self._finite(name, whole, dtype).cpu().numpy()
        labels = check_labels(self.label, numbers=self.row) if self.row else None
        if labels is not None:
            arrays["label"] = labels
        shapes = {name: [array.shape[1:], array.dtype.str] for name, array in arrays.items()}
        meta = {"broken": self.broken, "shared": self.shared, "rows": len(self.row), "shapes": shapes}
        return {**arrays, "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)}

    def _finite(self, name: str, whole: Tensor, dtype: torch.dtype) -> Tensor:
        stored = whole.to(dtype)
        good = torch.isfinite(stored).flatten(1).all(1)
        if bool(good.all()):
            return stored
        rows = [self.row[i] for i in torch.nonzero(~good).flatten().tolist()]
        named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        if bool(torch.isfinite(whole).all()):
            raise DataError(f"the {name} of row(s) {named} does not fit float16 (largest 65504); use dtype='float32'")
        raise DataError(
            f"the backbone's {name} is not finite in {len(rows)} row(s) of chunk {self.index}: {named}. Check these "
            "images, the backbone's weights, and its precision."
        )


def read_chunks(store: Store, chunks: int, only: tuple[str, ...] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Every chunk in order, one at a time; `only` reads just these arrays. Raises PosthocError if one is not there."""
    for index in range(chunks):
        arrays = store.read_chunk(index, only)
        if arrays is None:
            raise PosthocError(
                f"chunk {index} of {chunks} is missing or damaged in {store.partial}. Run again to redo it; with "
                "several nodes cache_dir must be on a file system that all of them see."
            )
        yield arrays


def read_meta(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a chunk says of itself: broken rows, rows, shapes, whether the penultimate input is the embedding."""
    return json.loads(arrays["meta"].tobytes())


def survey(store: Store, chunks: int) -> tuple[dict[str, tuple[tuple[int, ...], str]], list[Broken], bool]:
    """Shapes and dtypes of the whole arrays, the broken rows, and whether the penultimate is the embedding."""
    rows, skipped, shared = 0, [], False
    found: dict[str, Any] | None = None
    for arrays in read_chunks(store, chunks, only=("meta",)):
        meta = read_meta(arrays)
        skipped += [Broken(*broken) for broken in meta["broken"]]
        if not meta["rows"]:
            continue
        if found is not None and meta["shapes"] != found:
            row = rows + len(skipped)
            raise DataError(f"outputs or labels differ between rows: {found} before row {row}, {meta['shapes']} there")
        rows, shared, found = rows + meta["rows"], meta["shared"], meta["shapes"]
    if found is None:
        if skipped:
            raise DataError(f"none of {len(skipped)} images could be read, first: {skipped[0].name}: {skipped[0].why}")
        raise DataError("there are no images")
    return {name: ((rows, *shape), dtype) for name, (shape, dtype) in found.items()}, skipped, shared
