"""One extraction: which store, which chunks are missing, the pass of the backbone, and the merge."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .distributed import Launch, check_launch
from .errors import DataError, PosthocError
from .images import Transform, augmented_transform
from .source_base import Source, canonical, check_labels, digest
from .source_loader import Batch, Broken, forked_rng, read_batches, workers_for
from .store import FORMAT, Store, default_cache_dir

if TYPE_CHECKING:
    from .backbone import Backbone

_CHUNK_IMAGES = 512  # a killed run loses at most one chunk per process; smaller ones cost more files


class _Jobs:
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
class _Chunk:
    """The rows of one chunk while they are collected; outputs stay on the device until the chunk is full."""

    index: int
    row: list[int] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    label: list[Any] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    shared: bool = False  # the penultimate input is the very embedding

    def arrays(self, views: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """What is written: the outputs [B,...] or [B,V,...], labels, rows, and the broken rows as JSON bytes."""
        meta = {"broken": self.broken, "shared": self.shared}
        arrays: dict[str, np.ndarray] = {
            "row": np.asarray(self.row, dtype=np.int64),
            "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        }
        for name in self.outputs[0] if self.outputs else ():
            whole = torch.cat([output[name] for output in self.outputs])
            whole = whole.reshape(len(self.row), views, -1) if views > 1 else whole.reshape(len(self.row), -1)
            arrays[name] = self._finite(name, whole, dtype).cpu().numpy()
        labels = check_labels(self.label, numbers=self.row) if self.row else None
        if labels is not None:
            arrays["label"] = labels
        return arrays

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


@dataclass
class Extraction:
    """The options of `features.extract`, checked, and the steps that carry it out."""

    backbone: Backbone
    source: Source
    views: int
    dtype: str
    batch_size: int
    num_workers: int | None
    on_error: str
    seed: int
    progress: bool
    transform: Transform | None = None
    _lock: FileLock | None = None

    def run(self, cache_dir: str | Path | None) -> Path:
        """The complete store's folder; every process of the launch returns after it is there."""
        launch = check_launch()  # before anything is written
        if self.source.length == 0:
            raise DataError(f"the {self.source.kind} {self.source.name!r} has no images")
        self.transform = self.backbone.transform if self.views == 1 else augmented_transform(self.backbone)
        store = Store(Path(cache_dir or default_cache_dir()), launch.on_main(self._key))
        try:
            launch.on_main(lambda: self._acquire(store))
            begun = launch.on_main(lambda: self._begin(store, launch.world))
            if begun is not None:
                chunk_rows, kept = begun
                jobs = _Jobs(self.source, chunk_rows, max(1, self.batch_size // self.views), kept, launch)
                self._extract(store, jobs)
                launch.barrier()
                launch.on_main(lambda: self._merge(store, math.ceil(jobs.seen / chunk_rows)))
        finally:
            if self._lock is not None:
                self._lock.release()
        return store.folder

    def _key(self) -> str:
        """SHA-256 over all that the stored numbers depend on."""
        options = {"format": FORMAT, "views": self.views, "dtype": self.dtype}
        if self.views > 1:
            options["seed"] = self.seed
        return digest(
            self.backbone.fingerprint("logits"),
            re.sub(r"0x[0-9a-f]+", "", canonical(self.backbone.preprocessing)),
            _probe(self.transform),
            self.source.fingerprint(self.progress),
            canonical(options),
        )

    def _acquire(self, store: Store) -> None:
        self._lock = store.acquire(self.progress)

    def _begin(self, store: Store, world: int) -> tuple[int, set[int]] | None:
        """None if the store is complete; else the rows of a chunk and the chunks an earlier run has left."""
        manifest = store.manifest()
        if manifest is not None:
            if manifest["skipped"] and self.on_error == "raise":
                raise self._unreadable([Broken(*broken) for broken in manifest["skipped"]])
            store.discard(complete=False)
            return None
        batch_rows = max(1, self.batch_size // self.views)
        rows = max(1, _CHUNK_IMAGES // self.views)
        if self.source.length is not None:
            rows = min(rows, math.ceil(self.source.length / world))
        plan = {"chunk_rows": math.ceil(rows / batch_rows) * batch_rows, "created": time.time()}
        plan = store.begin({**plan, "backbone": {"name": self.backbone.name}, "data": self.source.describe()})
        chunk_rows = int(plan["chunk_rows"])
        return chunk_rows, {
            chunk for chunk in store.chunks() if self._usable(store.read_chunk(chunk), chunk, chunk_rows)
        }

    def _usable(self, arrays: dict[str, np.ndarray] | None, chunk: int, chunk_rows: int) -> bool:
        if arrays is None:
            return False
        broken = _meta(arrays)["broken"]
        if broken and self.on_error == "raise":
            return False  # read again: the file may have been mended, and if not the error names it
        length = self.source.length
        expected = chunk_rows if length is None else min(chunk_rows, length - chunk * chunk_rows)
        found = len(arrays["row"]) + len(broken)
        return found == expected or (length is None and found > 0)

    def _extract(self, store: Store, jobs: _Jobs) -> None:
        """Runs the backbone over this process's missing chunks; a thread writes one while the next is computed."""
        device, launch = self.backbone.device, jobs.launch
        workers = workers_for(self.source, device, launch.world) if self.num_workers is None else self.num_workers
        batches = read_batches(
            self.source,
            jobs,
            self.transform,
            views=self.views,
            seed=self.seed,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        total = sum(len(jobs.rows(chunk)) for chunk in jobs.mine()) if self.source.length is not None else None
        name = "extract" if launch.world == 1 else f"extract ({launch.rank + 1} of {launch.world})"
        bar = tqdm(
            total=total and total * self.views, desc=name, unit="image", disable=not (self.progress and launch.is_main)
        )
        writing: Future[None] | None = None
        with bar, ThreadPoolExecutor(1) as writer:

            def write(chunk: _Chunk) -> None:
                nonlocal writing
                arrays = chunk.arrays(self.views, getattr(torch, self.dtype))
                if writing is not None:
                    writing.result()
                writing = writer.submit(store.write_chunk, chunk.index, arrays)

            chunk: _Chunk | None = None
            for batch in batches:
                index = (batch.row[0] if batch.row else batch.broken[0].row) // jobs.chunk_rows
                if chunk is None or chunk.index != index:
                    if chunk is not None:
                        write(chunk)
                    chunk = _Chunk(index)
                self._collect(chunk, batch)
                bar.update(len(batch.row) * self.views)
            if chunk is not None:
                write(chunk)
            if writing is not None:
                writing.result()

    def _collect(self, chunk: _Chunk, batch: Batch) -> None:
        if batch.broken and self.on_error == "raise":
            raise self._unreadable(batch.broken)
        chunk.broken += batch.broken
        if batch.images is None:
            return
        images = batch.images
        if batch.ready:
            images = self.backbone.prepare(images)  # checks what was not made by our own transform
        with torch.inference_mode():
            images = images.to(self.backbone.device, self.backbone.dtype, non_blocking=True)
            embedding, penultimate, logits = self.backbone(images)
        chunk.shared = penultimate is not None and _same(penultimate, embedding)
        outputs = {"embedding": embedding, "penultimate": None if chunk.shared else penultimate, "logits": logits}
        chunk.outputs.append({name: output for name, output in outputs.items() if output is not None})
        chunk.row += batch.row
        chunk.label += batch.label

    def _unreadable(self, broken: list[Broken]) -> DataError:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return DataError(
            f"an image could not be read: {broken[0].name}: {broken[0].why}{more}. Mend or remove it, or leave such "
            "images out with on_error='skip'."
        )

    def _merge(self, store: Store, chunks: int) -> None:
        """Streams the chunks into the complete store; memory holds one chunk."""
        shapes, skipped, shared = self._survey(store, chunks)
        folder = store.complete(shapes, _chunks(store, chunks))
        store.publish(
            folder,
            {
                "rows": shapes["row"][0][0],
                "created": time.time(),
                "backbone": {
                    "name": self.backbone.name,
                    "source": self.backbone.source,
                    "revision": self.backbone.revision,
                    "fingerprint": self.backbone.fingerprint("logits"),
                    "preprocessing": json.loads(canonical(self.backbone.preprocessing)),
                },
                "data": {**self.source.describe(), "fingerprint": self.source.fingerprint()},
                "views": self.views,
                "dtype": self.dtype,
                "seed": self.seed,
                "penultimate_is_embedding": shared,
                "skipped": skipped,
            },
        )

    def _survey(self, store: Store, chunks: int) -> tuple[dict[str, tuple[tuple[int, ...], str]], list[Broken], bool]:
        """Shapes and dtypes of the whole arrays, the broken rows, and whether the penultimate is the embedding."""
        rows, skipped, shared = 0, [], False
        found: dict[str, tuple[tuple[int, ...], str]] | None = None
        for arrays in _chunks(store, chunks):
            meta = _meta(arrays)
            skipped += [Broken(*broken) for broken in meta["broken"]]
            if not len(arrays["row"]):
                continue
            rows, shared = rows + len(arrays["row"]), meta["shared"]
            shapes = {name: (array.shape[1:], array.dtype.str) for name, array in arrays.items() if name != "meta"}
            if found is not None and shapes != found:
                raise DataError(
                    f"outputs or labels differ between rows: {found} before row {arrays['row'][0]}, {shapes} there"
                )
            found = shapes
        if found is None:
            if skipped:
                raise DataError(
                    f"none of {len(skipped)} images could be read, first: {skipped[0].name}: {skipped[0].why}"
                )
            raise DataError(f"the {self.source.kind} {self.source.name!r} has no images")
        return {name: ((rows, *shape), dtype) for name, (shape, dtype) in found.items()}, skipped, shared


def _chunks(store: Store, chunks: int) -> Iterator[dict[str, np.ndarray]]:
    for index in range(chunks):
        arrays = store.read_chunk(index)
        if arrays is None:
            raise PosthocError(
                f"chunk {index} of {chunks} is missing or damaged in {store.partial}. Run again to redo it; with "
                "several nodes cache_dir must be on a file system that all of them see."
            )
        yield arrays


def _meta(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return json.loads(arrays["meta"].tobytes())


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride())


def _probe(transform: Transform | None) -> list[Any]:
    """What the transform makes of a fixed image: tells transforms apart whose text says too little, or an address.

    Rounded, since the last bit may differ between processors.
    """
    if transform is None:
        return []
    pixels = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    try:
        with forked_rng() as reseed:
            reseed(0, 0, 0)
            return [torch.as_tensor(transform(Image.fromarray(pixels))).float().mul(1024).round()]
    except Exception as error:  # a transform for other images than this one: its text has to do
        return [type(error).__name__]
