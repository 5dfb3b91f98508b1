"""Where the outputs of a long prediction are collected: in memory, or in .npy files; in the order of the source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from .distributed import Launch
from .errors import PosthocError

Fields = dict[str, Tensor]
Part = tuple[np.ndarray, dict[str, Any]]  # rows of one process, and its arrays (memory) or their shapes (disk)


class Sink(Protocol):
    """Takes batches on every process; every process of the launch must call `finish`, and gets all rows."""

    def append(self, rows: np.ndarray, fields: Fields) -> None: ...

    def finish(self) -> dict[str, np.ndarray]: ...


def open_sink(folder: str | Path | None, launch: Launch) -> Sink:
    return MemorySink(launch) if folder is None else DiskSink(Path(folder), launch)


class MemorySink:
    """Keeps float32 arrays in memory."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rows: list[np.ndarray] = []
        self.parts: list[dict[str, np.ndarray]] = []

    def append(self, rows: np.ndarray, fields: Fields) -> None:
        self.rows.append(rows)
        self.parts.append({name: value.cpu().numpy() for name, value in fields.items()})

    def finish(self) -> dict[str, np.ndarray]:
        names = self.parts[0] if self.parts else {}
        mine = {name: np.concatenate([part[name] for part in self.parts]) for name in names}
        return _placed(_gather((_joined(self.rows), mine), self.launch))


class DiskSink:
    """Appends each process's outputs to files, then lays them out as `NAME.npy` in the folder, row by row.

    With several nodes the folder must be on a file system that all of them see.
    """

    chunk = 65536

    def __init__(self, folder: Path, launch: Launch) -> None:
        self.folder, self.launch = folder, launch
        self.rows: list[np.ndarray] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts = folder / ".parts"
        launch.on_main(self._make)

    def _make(self) -> None:
        try:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True)
        except OSError as error:
            raise PosthocError(f"cannot write predictions to {self.folder}: {error}") from error

    def _part(self, name: str, rank: int) -> Path:
        return self.parts / f"{name}.{rank}"

    def append(self, rows: np.ndarray, fields: Fields) -> None:
        self.rows.append(rows)
        for name, value in fields.items():
            self.shapes[name] = tuple(value.shape[1:])
            with open(self._part(name, self.launch.rank), "ab") as file:
                file.write(np.ascontiguousarray(value.cpu().numpy()).data)

    def finish(self) -> dict[str, np.ndarray]:
        parts = _gather((_joined(self.rows), self.shapes), self.launch)
        shapes = next((shapes for _, shapes in parts if shapes), {})
        self.launch.on_main(lambda: self._merge(parts, shapes))
        # copy on write: torch wants arrays it could write to, and the files stay as they are
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="c") for name in shapes}

    def _merge(self, parts: list[Part], shapes: dict[str, tuple[int, ...]]) -> None:
        total = sum(len(rows) for rows, _ in parts)
        for name, shape in shapes.items():
            path = self.parts / f"{name}.npy"
            whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(total, *shape))
            for rank, (rows, _) in enumerate(parts):
                if len(rows) == 0:
                    continue
                part = np.memmap(self._part(name, rank), dtype=np.float32, mode="r", shape=(len(rows), *shape))
                for start in range(0, len(rows), self.chunk):
                    whole[rows[start : start + self.chunk]] = part[start : start + self.chunk]
            whole.flush()
            path.replace(self.folder / f"{name}.npy")
        shutil.rmtree(self.parts, ignore_errors=True)


def _joined(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)


def _gather(part: Part, launch: Launch) -> list[Part]:
    if launch.world == 1:
        return [part]
    from accelerate.utils import gather_object

    return gather_object([part])


def _placed(parts: list[Part]) -> dict[str, np.ndarray]:
    """The arrays of all processes, each row in its place."""
    parts = [part for part in parts if len(part[0])]
    if len(parts) == 1 and np.array_equal(parts[0][0], np.arange(len(parts[0][0]))):
        return parts[0][1]
    total = sum(len(rows) for rows, _ in parts)
    placed: dict[str, np.ndarray] = {}
    for rows, arrays in parts:
        for name, array in arrays.items():
            whole = placed.setdefault(name, np.empty((total, *array.shape[1:]), dtype=array.dtype))
            whole[rows] = array
    return placed
