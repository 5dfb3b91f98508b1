"""Exact nearest neighbours by dot product: chunks of a matrix product, the best of each merged with the best so far.

Memory is the answer and one chunk of the product, whatever the gallery's size; a memory map is read once. 10,000 queries
among 1,000,000 rows of 128 numbers: `docs/speed.md`.

>>> neighbours([[1.0, 0.0]], [[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]], k=2).tolist()
[[2, 1]]
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.errors import DataError, OptionError
from .arrays import Array, as_numpy, first_few
from .extras import require

BACKENDS = ("torch", "faiss")
QUERIES = {"cpu": 256}  # rows of one product; the measured best on a CPU, see benchmarks/retrieval.py
QUERIES_ELSEWHERE = 2048
COLUMNS, NUMBERS = 1 << 16, 1 << 23  # gallery rows of one product: so many, or fewer where rows are long
COPIED = 1 << 14  # queries that are held at once where they have to be copied
BLOCK = 64  # columns whose largest similarity stands for them all


def neighbours(
    query: Array,
    gallery: Array | None = None,
    k: int = 1,
    *,
    own: Array | None = None,
    device: torch.device | str = "cpu",
    backend: str = "torch",
) -> np.ndarray:
    """Gallery rows with the largest dot product with each query, best first: int64 [Q, k].

    Equal similarities come in no fixed order. float64 is compared in float64, all else in float32.

    Args:
        query: unit vectors [Q, D] (of others long rows win). gallery: [G, D], memory maps welcome; None: the queries
            themselves, each of which never finds itself (it is left out by its index, so equal images do find each other).
        own: int [Q], the gallery row that is the query itself, left out of its neighbours; None: no row is (without a
            gallery: each its own).
        device: where the products are taken.
        backend: "torch", or "faiss" (extra `faiss`; flat inner product on the CPU, float32).

    Raises DataError when shapes do not fit, a gallery is empty, there are fewer than k rows to find, or numbers are not
    finite (naming the rows); OptionError for an unknown backend.
    """
    rows = as_numpy(query)
    columns = rows if gallery is None else as_numpy(gallery)
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} was given; expected one of {', '.join(map(repr, BACKENDS))}")
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise DataError(
            f"queries [Q, D] and a gallery [G, D] are expected; these are of shape {rows.shape} and {columns.shape}"
        )
    if not len(columns):
        raise DataError("the gallery is empty: there is nothing to find")
    itself = np.arange(len(rows)) if gallery is None else None if own is None else as_numpy(own)
    if itself is not None and (itself.shape != (len(rows),) or (len(rows) and not _inside(itself, len(columns)))):
        raise DataError(f"own must name one gallery row, 0 to {len(columns) - 1}, for each query [Q]")
    available = len(columns) - (itself is not None)
    if not 1 <= k <= available:
        raise DataError(f"k={k} was given; expected 1 <= k <= {available}, the number of rows that can be found")
    if not len(rows):
        return np.empty((0, k), dtype=np.int64)
    if backend == "faiss":
        return _faiss(rows, columns, k, itself, torch.device(device))
    return _torch(rows, columns, k, itself, torch.device(device))[1]


def kth_cosine(query: np.ndarray, gallery: np.ndarray, k: int, own: np.ndarray | None = None) -> np.ndarray:
    """Cosine of each query [Q, D] to the k-th nearest gallery row [G, D], [Q]; rows of any length, memory maps welcome.

    own: int [Q], a gallery row that is left out; -1: none. Raises DataError for numbers that are not finite.
    """
    parts = []
    for start in range(0, len(query), COPIED):
        rows = slice(start, start + COPIED)
        itself = None if own is None else own[rows]
        parts.append(_torch(query[rows], gallery, k, itself, torch.device("cpu"), unit=True)[0][:, -1])
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def as_unit(embedding: Array | Tensor) -> np.ndarray:
    """Rows divided by their lengths, in their dtype; a row of zeros stays."""
    rows = as_numpy(embedding)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(rows.dtype).tiny)


def directions(name: str, embedding: Array) -> np.ndarray:
    """Rows [N, D] of length 1, float64 where they were, else float32.

    Raises DataError for another shape, no rows, numbers that are not finite, and rows that have no direction because they
    are 0; rows are named.
    """
    rows = as_numpy(embedding)
    if rows.ndim != 2 or not rows.size:
        raise DataError(
            f"{name}: embeddings [N, D] with at least one row are expected; these are of shape {rows.shape}"
        )
    rows = rows.astype(_dtype(rows), copy=False)
    _all_finite(name, rows, 0)
    largest = np.abs(rows).max(1, keepdims=True)
    if len(zero := np.flatnonzero(largest == 0)):
        raise DataError(f"{name}: {len(zero)} of {len(rows)} rows are 0 and have no direction (rows {first_few(zero)})")
    return as_unit(rows / largest)  # squares neither overflow nor vanish


def _torch(
    rows: np.ndarray,
    columns: np.ndarray,
    k: int,
    own: np.ndarray | None,
    device: torch.device,
    unit: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest products and their columns, [Q, k] twice; `unit`: of rows divided by their lengths."""
    dtype = np.dtype(np.result_type(_dtype(rows), _dtype(columns)))
    query = _tensor("the queries", rows, dtype, 0).to(device)
    query = functional.normalize(query, dim=1) if unit else query
    best = query.new_full((len(rows), k), -torch.inf)
    found = torch.full((len(rows), k), -1, dtype=torch.int64, device=device)
    height, width = QUERIES.get(device.type, QUERIES_ELSEWHERE), max(BLOCK, min(COLUMNS, NUMBERS // rows.shape[1]))
    for first in range(0, len(columns), width):
        part = _tensor("the gallery", columns[first : first + width], dtype, first).to(device)
        part = functional.normalize(part, dim=1) if unit else part
        for start in range(0, len(rows), height):
            chosen = slice(start, start + height)
            similar = query[chosen] @ part.T
            if own is not None:
                at = torch.from_numpy(own[chosen]).to(device) - first
                inside = ((at >= 0) & (at < len(part))).nonzero()[:, 0]
                similar[inside, at[inside]] = -torch.inf
            values, places = _largest(similar, min(k, len(part)))
            values, places = torch.cat([best[chosen], values], 1), torch.cat([found[chosen], places + first], 1)
            best[chosen], kept = values.topk(k, dim=1)
            found[chosen] = places.gather(1, kept)
    return best.cpu().numpy(), found.cpu().numpy()


def _largest(similar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns.

    They lie in the k blocks with the largest maxima: if one did not, k blocks would each hold something at least as large.
    """
    rows, width = similar.shape
    whole = width // BLOCK * BLOCK
    if whole < 4 * k * BLOCK:
        return similar.topk(k, dim=1)
    blocks = similar[:, :whole].reshape(rows, -1, BLOCK).amax(2).topk(k, dim=1).indices
    every = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=similar.device)).reshape(rows, -1)
    rest = torch.arange(whole, width, device=similar.device).expand(rows, -1)
    every = torch.cat([every, rest], 1)
    values, kept = similar.gather(1, every).topk(k, dim=1)
    return values, every.gather(1, kept)


def _faiss(rows: np.ndarray, columns: np.ndarray, k: int, own: np.ndarray | None, device: torch.device) -> np.ndarray:
    if device.type != "cpu":
        raise OptionError(f"backend='faiss' searches on the CPU; device={str(device)!r} was given")
    index = require("faiss", "faiss-cpu", "faiss").IndexFlatIP(columns.shape[1])
    for first in range(0, len(columns), COLUMNS):
        part = np.ascontiguousarray(columns[first : first + COLUMNS], dtype=np.float32)
        _all_finite("the gallery", part, first)
        index.add(part)
    query = np.ascontiguousarray(rows, dtype=np.float32)
    _all_finite("the queries", query, 0)
    found = index.search(query, k + (own is not None))[1]
    if own is None:
        return found
    # without the query itself; where it was not among the k + 1 (equal images before it), without the last
    others = found != own[:, None]
    others[others.all(1), -1] = False
    return found[others].reshape(len(rows), k)


def _inside(places: np.ndarray, count: int) -> bool:
    return places.dtype.kind in "iu" and bool(places.min() >= 0 and places.max() < count)


def _dtype(rows: np.ndarray) -> type:
    return np.float64 if rows.dtype == np.float64 else np.float32


def _tensor(name: str, rows: np.ndarray, dtype: np.dtype, first: int) -> Tensor:
    """The rows as they lie where that can be, else a copy; checked."""
    usable = rows.dtype == dtype and rows.flags.writeable and rows.flags.c_contiguous
    given = rows if usable else np.array(rows, dtype=dtype, order="C")
    _all_finite(name, given, first)
    return torch.from_numpy(given)


def _all_finite(name: str, rows: np.ndarray, first: int) -> None:
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(1)) + first
        raise DataError(f"{name}: {len(bad)} rows hold NaN or infinite numbers (rows {first_few(bad)})")
