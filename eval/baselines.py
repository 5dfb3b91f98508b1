"""Scores that need no training, from stored logits and features: what every fitted head has to beat.

All take NumPy arrays (memory maps too) or tensors, work through them in chunks of rows and give float32 NumPy arrays
where higher means less certain. None is an uncertainty with a unit; they rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..adapters.errors import DataError
from .arrays import Array, as_numpy, check_labels
from .search import kth_cosine

ROWS = 4096


def max_softmax(logits: Array) -> np.ndarray:
    """One minus the largest softmax probability (Hendrycks & Gimpel 2017). `logits` [N, C] -> [N], 0 to 1 - 1/C."""

    def others(x: Tensor) -> Tensor:
        # 1 - p_max from the sum s of the other exponentials, as s / (1 + s): it keeps its digits where p_max rounds to 1
        best = x.argmax(1, keepdim=True)
        rest = (x - x.gather(1, best)).exp().scatter(1, best, 0.0).sum(1)
        return rest / (1 + rest)

    return _by_rows(logits, others)


def entropy(logits: Array) -> np.ndarray:
    """Entropy of the softmax in nats. `logits` [N, C] -> [N], 0 to log C."""
    return _by_rows(logits, lambda x: torch.special.entr(x.softmax(1)).sum(1))


def energy(logits: Array) -> np.ndarray:
    """Free energy, -log sum exp of the logits (Liu et al. 2020, temperature 1). `logits` [N, C] -> [N]."""
    return _by_rows(logits, lambda x: -x.logsumexp(1))


def max_logit(logits: Array) -> np.ndarray:
    """Minus the largest logit (Hendrycks et al. 2022). `logits` [N, C] -> [N]."""
    return _by_rows(logits, lambda x: -x.amax(1))


def inverse_norm(features: Array) -> np.ndarray:
    """One over the Euclidean norm of the feature. `features` [N, D] -> [N]; for a zero feature the largest float32."""
    largest = torch.finfo(torch.float32).max
    return _by_rows(features, lambda x: (1 / x.norm(dim=1)).clamp(max=largest))


def knn(features: Array, training: Array, *, k: int = 50, own: Array | None = None) -> np.ndarray:
    """One minus the cosine to the k-th nearest training feature (Sun et al. 2022), exact.

    Args:
        features: [N, D] to score.
        training: [M, D], features of the images the head or probe was fitted on.
        k: which neighbour counts.
        own: int [N], the row of `training` that is the image itself, left out of its neighbours; -1: none. For scoring
            training images without their own company.

    Returns float32 [N], 0 to 2. Raises DataError for widths that differ, rows out of range, or fewer than k neighbours.
    """
    queries, bank = as_numpy(features), as_numpy(training)
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise DataError(f"features [N, D] and training [M, D] are expected; these are {queries.shape}, {bank.shape}")
    itself = None if own is None else as_numpy(own)
    available = len(bank) - (itself is not None)
    if not 1 <= k <= available:
        raise DataError(f"k={k} was given; {available} training rows can be neighbours, so k must be 1 to {available}")
    if itself is not None and (itself.shape != (len(queries),) or itself.min() < -1 or itself.max() >= len(bank)):
        raise DataError(f"own must hold one row of training (0 to {len(bank) - 1}, or -1) for each of the features")
    return (1 - kth_cosine(queries, bank, k, itself)).clip(0, 2).astype(np.float32)


def fit_temperature(logits: Array, label: Array) -> float:
    """The one temperature T > 0 that makes softmax(logits / T) likeliest on labelled rows (Guo et al. 2017).

    The likelihood is convex in 1/T; T is searched in 0.01 to 100. Fit it on rows the classifier was not fitted on, and
    not on the rows that are scored. Scores and metrics then take `logits / T`.
    """
    from scipy.optimize import minimize_scalar

    z, target = as_numpy(logits), as_numpy(label)
    check_labels(z, target)
    labels = torch.from_numpy(np.array(target, dtype=np.int64))

    def loss(log_temperature: float) -> float:
        total = 0.0
        for start in range(0, len(z), ROWS):
            x = _rows(z[start : start + ROWS]).double() / math.exp(log_temperature)
            total += float(torch.nn.functional.cross_entropy(x, labels[start : start + ROWS], reduction="sum"))
        return total / len(z)

    bound = math.log(100)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}).x)


LOGIT_SCORES: dict[str, Callable[[Array], np.ndarray]] = {
    "max-softmax": max_softmax,
    "entropy": entropy,
    "energy": energy,
    "max-logit": max_logit,
}
"""The scores that take logits alone, by the name tables print."""


def free_scores(
    logits: Array, features: Array, training: Array, *, k: int = 50, own: Array | None = None
) -> dict[str, np.ndarray]:
    """Every training-free score of the same images by the name tables print; arguments as in the single functions."""
    scores = {name: score(logits) for name, score in LOGIT_SCORES.items()}
    return {**scores, "1/feature-norm": inverse_norm(features), "kNN": knn(features, training, k=k, own=own)}


def _by_rows(array: Array, score: Callable[[Tensor], Tensor]) -> np.ndarray:
    values = as_numpy(array)
    if values.ndim != 2 or not values.shape[1]:
        raise DataError(f"an array [N, C] of logits or features is expected; this one has shape {values.shape}")
    scores = np.empty(len(values), np.float32)
    for start in range(0, len(values), ROWS):
        scores[start : start + ROWS] = score(_rows(values[start : start + ROWS])).numpy()
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise DataError(f"{len(bad)} of {len(scores)} rows give no finite score (first: row {bad[0]}): check for NaN")
    return scores


def _rows(chunk: np.ndarray) -> Tensor:
    """A copy in float32 (float64 stays): memory maps are read here and may not be written."""
    return torch.from_numpy(np.array(chunk, dtype=np.float64 if chunk.dtype == np.float64 else np.float32))
