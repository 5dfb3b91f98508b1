"""Test-time augmentation: scores from stored augmented views of every image (`backbone.extract(data, views=V)`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapters.errors import DataError
from ..adapters.features import Features
from .arrays import Array, as_numpy

NUMBERS = 1 << 22


def entropy_of_mean(views: Array) -> np.ndarray:
    """Entropy in nats of the views' mean softmax, 0 to log C. `views`: logits [N, V, C] -> float32 [N]."""
    return _by_images(views, lambda x: torch.special.entr(x.softmax(2).mean(1)).sum(1))


def mutual_information(views: Array) -> np.ndarray:
    """Entropy of the views' mean softmax less their mean entropy, in nats: how far the views' answers part.

    `views`: logits [N, V, C] -> float32 [N], 0 to log V.
    """

    def score(x: Tensor) -> Tensor:
        p = x.softmax(2)
        return torch.special.entr(p.mean(1)).sum(1) - torch.special.entr(p).sum(2).mean(1)

    return _by_images(views, score).clip(min=0)


def embedding_spread(views: Array) -> np.ndarray:
    """Standard deviation (unbiased) over views of the unit embedding, mean over its dimensions.

    `views`: [N, V, D], at least two views -> float32 [N]. TaU's disagreement score, with views for ensemble members
    (Zhang et al., arXiv 2110.04403).
    """
    if as_numpy(views).ndim == 3 and as_numpy(views).shape[1] < 2:
        raise DataError("a spread over views needs at least two of them (extract with views=V)")
    return _by_images(views, lambda x: torch.nn.functional.normalize(x, dim=2).std(1).mean(1))


def augmented_scores(sets: Sequence[Features]) -> list[dict[str, np.ndarray]]:
    """All scores of stored views by name, float32 [N] each, for every set; those of logits only where all sets have them."""
    classified = all(one.logits is not None for one in sets)
    found = []
    for one in sets:
        of_logits = {
            "entropy, augmented": entropy_of_mean(one.logits),
            "mutual information, augmented": mutual_information(one.logits),
        } if classified else {}  # fmt: skip
        found.append({**of_logits, "embedding spread, augmented": embedding_spread(one.embedding)})
    return found


def _by_images(views: Array, score: Callable[[Tensor], Tensor]) -> np.ndarray:
    array = as_numpy(views)
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(f"views [N, V, C] are expected (extract with views=V); these have shape {array.shape}")
    step = max(1, NUMBERS // array[0].size)
    parts = [
        score(torch.from_numpy(np.array(array[start : start + step], dtype=np.float64))).numpy()
        for start in range(0, len(array), step)
    ]
    return np.concatenate(parts).astype(np.float32)
