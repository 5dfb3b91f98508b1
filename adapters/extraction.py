"""One extraction: which store, which chunks are missing, the pass of the backbone, and the merge."""

from __future__ import annotations

import json
import math
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from .chunks import Chunk, Jobs, read_chunks, read_meta, survey
from .distributed import check_launch
from .errors import DataError
from .images import Transform, augmented_transform
from .reading import same_tensor
from .source_base import Source, canonical, digest, forked_rng
from .source_loader import Batch, Broken, read_batches, workers_for
from .store import FORMAT, Store, default_cache_dir

if TYPE_CHECKING:
    from .backbone import Backbone

_CHUNK_IMAGES = 512  # a killed run loses at most one chunk per process; smaller ones cost more files


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
                jobs = Jobs(self.source, chunk_rows, max(1, self.batch_size // self.views), kept, launch)
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
        backbone = self.backbone
        # The weights do not tell how the network is read, nor its parts without weights: pooling, activations.
        reading = [repr(backbone.module), backbone.feature_layer, backbone.classifier_layer, backbone.preprocessing]
        return digest(
            backbone.fingerprint("logits"),
            re.sub(r"0x[0-9a-f]+", "", canonical(reading)),
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
        broken = read_meta(arrays)["broken"]
        if broken and self.on_error == "raise":
            return False  # read again: the file may have been mended, and if not the error names it
        length = self.source.length
        expected = chunk_rows if length is None else min(chunk_rows, length - chunk * chunk_rows)
        found = len(arrays["row"]) + len(broken)
        return found == expected or (length is None and found > 0)

    def _extract(self, store: Store, jobs: Jobs) -> None:
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

            def write(chunk: Chunk) -> None:
                nonlocal writing
                arrays = chunk.arrays(self.views, getattr(torch, self.dtype))
                if writing is not None:
                    writing.result()
                writing = writer.submit(store.write_chunk, chunk.index, arrays)

            chunk: Chunk | None = None
            for batch in batches:
                index = (batch.row[0] if batch.row else batch.broken[0].row) // jobs.chunk_rows
                if chunk is None or chunk.index != index:
                    if chunk is not None:
                        write(chunk)
                    chunk = Chunk(index)
                self._collect(chunk, batch)
                bar.update((len(batch.row) + len(batch.broken)) * self.views)
            if chunk is not None:
                write(chunk)
            if writing is not None:
                writing.result()

    def _collect(self, chunk: Chunk, batch: Batch) -> None:
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
        chunk.shared = same_tensor(penultimate, embedding)
        outputs = {"embedding": embedding, "penultimate": None if chunk.shared else penultimate, "logits": logits}
        chunk.outputs.append({name: output for name, output in outputs.items() if output is not None})
        chunk.row += batch.row
        chunk.label += batch.label

    def _unreadable(self, broken: list[Broken]) -> DataError:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return DataError(
            f"an image could not be read: {broken[0].name}: {broken[0].why}{more}. Mend or remove it, or leave such "
            "images out: backbone.extract(data, on_error='skip') gives features that fit and predict take."
        )

    def _merge(self, store: Store, chunks: int) -> None:
        """Streams the chunks into the complete store; memory holds one chunk."""
        shapes, skipped, shared = survey(store, chunks)
        folder = store.complete(shapes, read_chunks(store, chunks))
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
