"""Retrieval: neighbours, recall, average precision, and how far its uncertainty can be trusted.

Embeddings are unit vectors compared by dot product, in chunks of queries: no query x gallery matrix is ever whole. Where
LAM (Warburg et al., NeurIPS 2023, arXiv 2302.01332) defines a number differently, its variant is named apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..adapters.errors import DataError
from .arrays import Array, as_numpy, finite, same_rows

CHUNK_NUMBERS = 1 << 22
DROPPED = np.arange(99) / 100
"""Shares dropped along a sparsification curve: 0 to 98 percent."""


def neighbours(query: Array, gallery: Array | None = None, k: int = 1) -> np.ndarray:
    """Gallery rows nearest to each query, best first: int64 [Q, k].

    Args:
        query: unit vectors [Q, D]. gallery: [G, D]; None: the queries themselves, each of which never finds itself (it is
            left out by its index, so equal images do find each other).
    Raises: DataError when shapes do not fit or there are fewer than k rows to find.
    """
    rows = torch.from_numpy(np.ascontiguousarray(as_numpy(query)))
    columns = rows if gallery is None else torch.from_numpy(np.ascontiguousarray(as_numpy(gallery)))
    available = len(columns) - (gallery is None)
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1] or not 1 <= k <= available:
        raise DataError(
            f"expected queries [Q, D], a gallery [G, D] and 1 <= k <= {available}; given {tuple(rows.shape)}, "
            f"{tuple(columns.shape)} and k={k}"
        )
    found = []
    for start in range(0, len(rows), chunk := max(1, CHUNK_NUMBERS // len(columns))):
        similar = rows[start : start + chunk] @ columns.T
        if gallery is None:
            own = torch.arange(len(similar))
            similar[own, own + start] = -torch.inf
        found.append(similar.topk(k, dim=1).indices)
    return torch.cat(found).numpy() if found else np.empty((0, k), dtype=np.int64)


def label_hits(nearest: np.ndarray, label: Array, gallery_label: Array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which neighbours [Q, k] share the query's label, bool [Q, k], and how many gallery rows do, int64 [Q].

    gallery_label: None: the queries are the gallery, and a query is not counted as its own positive.
    """
    own = as_numpy(label)
    others = own if gallery_label is None else as_numpy(gallery_label)
    classes, counts = np.unique(others, return_counts=True)
    at = np.searchsorted(classes, own).clip(max=len(classes) - 1)
    positives = np.where(classes[at] == own, counts[at], 0) - (gallery_label is None)
    return others[nearest] == own[:, None], positives


def recall_at(hits: np.ndarray, k: int) -> float:
    """Share of queries with a positive among the first k neighbours; hits bool [Q, K >= k]. Without positives: a miss."""
    return float(_first(hits, k).any(1).mean())


def average_precision_at(hits: np.ndarray, positives: np.ndarray, k: int) -> np.ndarray:
    """AP@k of each query, float64 [Q]: sum over its hits i <= k of the precision there, divided by min(positives, k).

    NaN for a query without positives.
    """
    first = _first(hits, k)
    precision = first.cumsum(1) / np.arange(1, k + 1)
    most = np.minimum(positives, k)
    return np.where(most > 0, (precision * first).sum(1) / np.maximum(most, 1), np.nan)


def map_at(hits: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Mean of `average_precision_at` over the queries that have positives. DataError when none has."""
    if not (positives > 0).any():
        raise DataError("no query has a positive in the gallery: mean average precision is not defined")
    return float(np.nanmean(average_precision_at(hits, positives, k)))


def lam_map_at(hits: np.ndarray, positives: np.ndarray, k: int) -> float:
    """LAM's mAP@k: as `map_at`, but queries without positives score 1."""
    return float(np.nan_to_num(average_precision_at(hits, positives, k), nan=1.0).mean())


def _first(hits: np.ndarray, k: int) -> np.ndarray:
    if hits.ndim != 2 or not 1 <= k <= hits.shape[1]:
        raise DataError(f"expected hits [Q, K] of at least k={k} neighbours; given {hits.shape}")
    return hits[:, :k]


def votes(samples: Array, label: Array, gallery: Array | None = None, gallery_label: Array | None = None) -> np.ndarray:
    """The label each query takes from its nearest neighbour under each draw of the weights: int [S, Q].

    samples: unit vectors [S, Q, D]; gallery: [S, G, D] under the same draws, None: the queries, each without itself.
    """
    drawn = as_numpy(samples)
    columns = None if gallery is None else as_numpy(gallery)
    labels = as_numpy(label if gallery_label is None else gallery_label)
    each = (None if columns is None else columns[s] for s in range(len(drawn)))
    return np.stack([labels[neighbours(one, other)[:, 0]] for one, other in zip(drawn, each, strict=True)])


def vote_confidence(cast: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label with most votes [Q] (of equal ones the smallest) and its share of them, float64 [Q]; votes int [S, Q]."""
    classes, place = np.unique(cast, return_inverse=True)
    dense = torch.from_numpy(place.reshape(cast.shape))
    mode = dense.mode(0).values  # the smallest of equally frequent values
    return classes[mode.numpy()], (dense == mode).double().mean(0).numpy()


def vote_ece(confidence: Array, correct: Array, bins: int = 10, reference: bool = False) -> float:
    """Expected calibration error of votes: mean over queries of |accuracy - confidence| of their bin, 0 to 1.

    Bins are [0, .1), [.1, .2), ..., [.9, 1]. `reference`: LAM's code leaves confidences of exactly 1 in no bin and
    divides by the rest. Raises DataError for no rows, or with `reference` when all are 1.
    """
    sizes, accuracy, mean = vote_bins(confidence, correct, bins, reference)
    if not sizes.sum():
        raise DataError("no confidence falls in a bin")
    return float((sizes * np.abs(accuracy - mean)).sum() / sizes.sum())


def vote_bins(
    confidence: Array, correct: Array, bins: int = 10, reference: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in each bin of `vote_ece`, their accuracy and their mean confidence, [bins] each; 0 where a bin is empty."""
    share, right = finite("the confidence", confidence), as_numpy(correct)
    same_rows(confidence=share, correct=right)
    if share.min() < 0 or share.max() > 1:
        raise DataError(f"confidences lie in 0..1; these go from {share.min():g} to {share.max():g}")
    if reference:
        share, right = share[share < 1], right[share < 1]
    place = np.minimum(np.floor(share * bins + 1e-6).astype(np.int64), bins - 1)  # .7 in float32 is in [.7, .8)
    sizes = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=w.astype(np.float64), minlength=bins) for w in (right, share)]
    return sizes, sums[0] / np.maximum(sizes, 1), sums[1] / np.maximum(sizes, 1)


def retrieval_uncertainty(
    uncertainty: Array, nearest: np.ndarray, gallery_uncertainty: Array | None = None
) -> np.ndarray:
    """Of a query and its first neighbour together, [Q]: the sum of both; nearest int [Q, k]."""
    own = as_numpy(uncertainty)
    others = own if gallery_uncertainty is None else as_numpy(gallery_uncertainty)
    return own + others[nearest[:, 0]]


def sparsification(uncertainty: Array, correct: Array, dropped: Array = DROPPED) -> np.ndarray:
    """Accuracy of what is left, float64 [K], when the share `dropped` [K] with the highest uncertainty is left out."""
    scores, right = finite("the uncertainty", uncertainty), as_numpy(correct)
    same_rows(uncertainty=scores, correct=right)
    kept = right[np.argsort(-scores, kind="stable")].astype(np.float64)
    tail = np.append(kept[::-1].cumsum()[::-1], 0.0)  # sums of what is left from each place on
    start = np.floor(as_numpy(dropped) * len(kept) + 1e-9).astype(np.int64).clip(max=len(kept) - 1)
    return tail[start] / (len(kept) - start)


def ausc(uncertainty: Array, correct: Array, reference: bool = False) -> float:
    """Area under the `sparsification` curve over 0 to 98 percent, divided by its width: 1 for a model without errors.

    `reference`: LAM's, 98/99 of it, so that a perfect model scores .98990.
    """
    curve = sparsification(uncertainty, correct)
    area = float((curve[1:] + curve[:-1]).sum() / (2 * (len(curve) - 1)))
    return area * (len(curve) - 1) / len(curve) if reference else area


def as_unit(embedding: Array | Tensor) -> np.ndarray:
    """Rows divided by their lengths, in their dtype."""
    rows = as_numpy(embedding)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(rows.dtype).tiny)
