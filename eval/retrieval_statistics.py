"""Retrieval metrics: recall, average precision, and how far a retrieval's uncertainty can be trusted.

Neighbours come from `search.neighbours`. Where LAM (Warburg et al., NeurIPS 2023, arXiv 2302.01332) defines a number
differently, its variant is named apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..adapters.errors import DataError
from .arrays import Array, as_numpy, finite, same_rows
from .ood_statistics import AveragePrecision
from .search import neighbours
from .statistics import Ece, SelectiveAccuracy, Statistic, confidences

DROPPED = np.arange(99) / 100
"""Shares dropped along a sparsification curve: 0 to 98 percent."""


class KnownMeans(Statistic):
    """Means of K numbers of each query over those queries that have them: values [N, K], NaN where one has not -> [K]."""

    def __init__(self, values: Array) -> None:
        given = as_numpy(values).astype(np.float64)
        self.known = ~np.isnan(given)
        self.values = np.where(self.known, given, 0.0)
        self.sizes = (len(given),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        rows = counts[0] @ self.known
        return np.divide(counts[0] @ self.values, rows, out=np.full_like(rows, np.nan), where=rows > 0)


class Ausc(SelectiveAccuracy):
    """Area under the sparsification curve: mean accuracy as the 0 to 98 percent least certain are left out, 0 to 1.

    `uncertainty` [N], `correct` [N] bool. LAM's with its slips mended: divided by the curve's width, so that a model
    without errors scores 1 (theirs .98990), and ties are left out in proportion, not in the order of the rows.
    """

    def __init__(self, uncertainty: Array, correct: Array) -> None:
        super().__init__(uncertainty, correct, DROPPED)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        curve = super().__call__(counts)
        return (curve[:, 1:] + curve[:, :-1]).mean(1) / 2


class VoteEce(Ece):
    """Calibration error of shares of votes, 0 to 1: bins [0, .1), [.1, .2), ..., [.9, 1], as in `vote_ece`.

    `confidence` [N] in 0..1, `correct` [N] bool.
    """

    def __init__(self, confidence: Array, correct: Array, bins: int = 10) -> None:
        super().__init__(confidence, correct, bins)

    @staticmethod
    def places(confidence: np.ndarray, bins: int) -> np.ndarray:
        return np.minimum(np.floor(confidence * bins + 1e-6).astype(np.int64), bins - 1)  # .7 in float32 is in [.7, .8)


def label_hits(nearest: np.ndarray, label: Array, gallery_label: Array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which neighbours [Q, k] share the query's label, bool [Q, k], and how many gallery rows do, int64 [Q].

    gallery_label: None: the queries are the gallery, and a query is not counted as its own positive.
    """
    own = as_numpy(label)
    others = own if gallery_label is None else as_numpy(gallery_label)
    if own.ndim != 1 or others.ndim != 1 or not len(others):
        raise DataError(f"one label for each row is expected, [Q] and [G > 0]; given {own.shape} and {others.shape}")
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


def average_precision_at_r(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """AP@R of each query, float64 [Q] (Musgrave et al., ECCV 2020): AP@k with k = R, its number of positives.

    hits: bool [Q, K] with K at least the largest R. NaN for a query without positives.
    """
    _first(hits, max(1, int(positives.max(initial=0))))
    inside = hits & (np.arange(hits.shape[1]) < positives[:, None])
    precision = inside.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    return np.where(positives > 0, (precision * inside).sum(1) / np.maximum(positives, 1), np.nan)


def map_at(hits: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Mean of `average_precision_at` over the queries that have positives. DataError when none has."""
    if not (positives > 0).any():
        raise DataError("no query has a positive in the gallery: mean average precision is not defined")
    return float(np.nanmean(average_precision_at(hits, positives, k)))


def map_at_r(hits: np.ndarray, positives: np.ndarray) -> float:
    """Mean of `average_precision_at_r` over the queries that have positives. DataError when none has."""
    if not (positives > 0).any():
        raise DataError("no query has a positive in the gallery: MAP@R is not defined")
    return float(np.nanmean(average_precision_at_r(hits, positives)))


def lam_map_at(hits: np.ndarray, positives: np.ndarray, k: int) -> float:
    """LAM's mAP@k: as `map_at`, but queries without positives score 1."""
    return float(np.nan_to_num(average_precision_at(hits, positives, k), nan=1.0).mean())


def lam_aupr(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """LAM's area under the precision-recall curve, OOD positive, 0 to 1: trapezoids, where `metrics.aupr_out` takes steps.

    ID uncertainty [N], OOD uncertainty [M]. The curve begins with a precision of 1 at recall 0, and equal scores are one
    point of it. LAM's code sorts the points by recall once more, equal recalls in no defined order: .0024 off in a golden case.
    """
    curve = AveragePrecision(id_uncertainty, ood_uncertainty)
    inside, outside = (one[0, ::-1] for one in curve.groups([np.ones((1, n)) for n in curve.sizes]))
    hits = outside.cumsum()
    precision = np.r_[1.0, hits / (hits + inside.cumsum())]
    return float(outside @ (precision[1:] + precision[:-1]) / (2 * hits[-1]))


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
    share, right = confidences(confidence, correct)
    if reference:
        share, right = share[share < 1], right[share < 1]
    place = VoteEce.places(share, bins)
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
    """Area under the sparsification curve over 0 to 98 percent, 0 to 1; see `Ausc`.

    `reference`: LAM's, 98/99 of the area under `sparsification`, so that a perfect model scores .98990.
    """
    if not reference:
        return float(Ausc(uncertainty, correct).value())
    curve = sparsification(uncertainty, correct)
    return float((curve[1:] + curve[:-1]).sum() / (2 * len(curve)))
