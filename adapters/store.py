"""Feature folders on disk: written in chunks, completed by a rename, read as memory maps, locked by the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

FORMAT = 1
MANIFEST = "manifest.json"


def default_cache_dir() -> Path:
    """`$POSTHOC_CACHE`, else `~/.cache/posthoc/features`."""
    return Path(os.environ.get("POSTHOC_CACHE") or Path.home() / ".cache" / "posthoc" / "features")


class Store:
    """One key's folder under `root`: `KEY/` when complete, `KEY.partial/` while chunks are written.

    A chunk, and the complete folder, appear under their names only by a rename of what is fully written, so a killed
    process leaves either a whole thing or nothing. Chunks carry a CRC; a damaged one counts as missing.
    """

    def __init__(self, root: str | Path, key: str) -> None:
        self.root, self.key = Path(root).expanduser(), key
        self.folder = self.root / key
        self.partial = self.root / f"{key}.partial"

    def lock(self) -> FileLock:
        """The key's lock, free again when its process dies; its empty file stays, since removing it would race."""
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.key}.lock", thread_local=False)

    def acquire(self, tell: bool = True) -> FileLock:
        """Takes the lock; says so on stderr if it has to wait for another run."""
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if tell:
                print(f"waiting: another process extracts the same features ({self.key[:12]})", file=sys.stderr)
            lock.acquire()
        return lock

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the complete folder, None unless it and every array are as they were written."""
        return read_manifest(self.folder)

    def begin(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Makes the partial folder and returns the plan in force: an earlier run's, if its chunks are still there."""
        path = self.partial / "plan.json"
        self.partial.mkdir(parents=True, exist_ok=True)
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            _write_json(path, plan)
            return plan

    def chunk_path(self, index: int) -> Path:
        return self.partial / f"chunk-{index:06d}.npz"

    def chunks(self) -> list[int]:
        """The numbers of the chunks that are there, damaged ones included."""
        return sorted(int(path.stem.removeprefix("chunk-")) for path in self.partial.glob("chunk-*.npz"))

    def write_chunk(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes one chunk, whole or not at all."""
        with _renamed(self.chunk_path(index)) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def read_chunk(self, index: int, only: tuple[str, ...] | None = None) -> dict[str, np.ndarray] | None:
        """The arrays of a chunk (all, or those named), None if it is missing or what is read of it is damaged."""
        try:
            with np.load(self.chunk_path(index), allow_pickle=False) as chunk:
                return {name: chunk[name] for name in only or chunk.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def complete(self, arrays: dict[str, tuple[tuple[int, ...], str]], chunks: Iterator[dict[str, np.ndarray]]) -> Path:
        """Streams the rows of all chunks into one .npy file for each of `arrays` (name: shape and dtype).

        Returns the folder they are in; `publish` makes it the complete one.
        """
        folder = self.partial / "store"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in arrays}
            for name, (shape, dtype) in arrays.items():
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)
            for chunk in chunks:
                for name, file in files.items():
                    if name in chunk:
                        file.write(np.ascontiguousarray(chunk[name], dtype=arrays[name][1]).data)
            for file in files.values():
                _sync(file)
        return folder

    def publish(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Writes the manifest into the folder of `complete`, last, and puts the folder in its place."""
        files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.npy"))}
        _write_json(folder / MANIFEST, {"format": FORMAT, "key": self.key, "files": files, **manifest})
        shutil.rmtree(self.folder, ignore_errors=True)  # an earlier one that was damaged
        os.rename(folder, self.folder)
        shutil.rmtree(self.partial, ignore_errors=True)

    def discard(self, complete: bool = True, partial: bool = True) -> None:
        """Removes the folders of this key."""
        for folder in [self.folder] * complete + [self.partial] * partial:
            shutil.rmtree(folder, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A complete folder's manifest, None if it is missing or damaged, of another format, or a file's size differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        arrays = {name: np.load(folder / name, mmap_mode="r") for name in manifest["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if manifest.get("format") != FORMAT or sizes != manifest["files"] or "embedding.npy" not in sizes:
        return None
    if "row.npy" not in sizes or any(len(array) != len(arrays["row.npy"]) for array in arrays.values()):
        return None
    return manifest


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well. The pid keeps orphans of a killed launch apart."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    with _renamed(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class StoreInfo:
    """What one key of the store holds: rows (None while partial), bytes, times (seconds since 1970)."""

    key: str
    complete: bool
    rows: int | None
    bytes: int
    created: float
    last_used: float
    backbone: str
    data: str


def list_stores(cache_dir: str | Path | None = None) -> list[StoreInfo]:
    """Every complete and partial folder of the store, the most recently used first."""
    root = Path(cache_dir or default_cache_dir()).expanduser()
    found = [_info(folder) for folder in root.iterdir() if not folder.name.startswith(".")] if root.is_dir() else []
    return sorted((info for info in found if info is not None), key=lambda info: -info.last_used)


def _info(folder: Path) -> StoreInfo | None:
    complete = not folder.name.endswith(".partial")
    path = folder / (MANIFEST if complete else "plan.json")
    try:
        said = json.loads(path.read_text())
        used = path.stat().st_mtime if complete else folder.stat().st_mtime
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except (OSError, ValueError):
        return None  # not ours, or being written or removed this moment
    return StoreInfo(
        key=folder.name.removesuffix(".partial"),
        complete=complete,
        rows=said.get("rows") if complete else None,
        bytes=size,
        created=said.get("created", used),
        last_used=used,
        backbone=str(said.get("backbone", {}).get("name", "?")),
        data=str(said.get("data", {}).get("name", "?")),
    )


def prune(
    cache_dir: str | Path | None = None,
    older_than_days: float | None = None,
    keys: list[str] | None = None,
    partial_only: bool = False,
) -> int:
    """Removes folders of the store and returns the bytes freed; one that a run holds locked is left alone.

    Args:
        older_than_days: only those not used for that long.
        keys: only those whose key starts with one of these.
        partial_only: only unfinished ones.
    """
    root = Path(cache_dir or default_cache_dir()).expanduser()
    freed = 0
    for info in list_stores(root):
        recent = older_than_days is not None and info.last_used > time.time() - older_than_days * 86400
        unnamed = keys is not None and not any(info.key.startswith(key) for key in keys)
        if recent or unnamed or (partial_only and info.complete):
            continue
        store = Store(root, info.key)
        with contextlib.suppress(Timeout), store.lock().acquire(timeout=0):
            store.discard(complete=info.complete, partial=not info.complete)
            freed += info.bytes
    return freed
