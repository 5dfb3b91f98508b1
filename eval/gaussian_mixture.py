"""One Gaussian a class with a covariance of its own: pytorch-ood's GMM, from the directions that training rows span.

pytorch-ood 0.4 multiplies every row with a [D, D] precision for every class, 2.6 GB for 200 classes of a 1280-dimensional
layer. A class of n rows varies in min(n, D) directions and by `regularizer` alone in all others, so the projections on those
directions and the distance to the mean are all it takes: `benchmarks/eval.py` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NUMBERS = 1 << 24


def gaussian_mixture(features: Tensor, label: Tensor, regularizer: float) -> Callable[[Tensor], Tensor]:
    """Minus the log density of features [N, D] under a mixture of a Gaussian a class, float64 [N], higher = OOD.

    Args:
        features: of training rows, [M, D].
        label: int [M]; a class weighs as its share of the rows.
        regularizer: is added to the diagonal of every covariance, > 0.
    """
    middle = features.double().mean(0)  # distances are differences of large numbers where features are far from 0
    z = features.double() - middle
    classes, place, count = label.unique(return_inverse=True, return_counts=True)
    rows, dim = z.shape
    mean = torch.zeros(len(classes), dim, dtype=z.dtype).index_add_(0, place, z) / count[:, None]
    parts = [torch.linalg.svd(z[place == c] - mean[c], full_matrices=False)[1:] for c in range(len(classes))]
    directions = torch.cat([v for _, v in parts])
    variance = torch.cat([s.square() / n for (s, _), n in zip(parts, count, strict=True)]) + regularizer
    rank = torch.tensor([len(s) for s, _ in parts])
    owner = torch.repeat_interleave(torch.arange(len(classes)), rank)
    centre = (directions * mean[owner]).sum(1)
    log_det = torch.zeros(len(classes), dtype=z.dtype).index_add_(0, owner, variance.log())
    log_det += (dim - rank) * math.log(regularizer)
    level = (count.double() / rows).log() - 0.5 * (log_det + dim * math.log(2 * math.pi))
    excess = 1 / variance - 1 / regularizer

    def score(x: Tensor) -> Tensor:
        x = x.double() - middle
        within = (x @ directions.T - centre).square_().mul_(excess)
        distance = torch.cdist(x, mean, compute_mode="donot_use_mm_for_euclid_dist").square_() / regularizer
        distance.index_add_(1, owner, within)
        return -torch.logsumexp(level - 0.5 * distance, dim=1)

    step = max(1, NUMBERS // len(directions))
    return lambda x: torch.cat([score(part) for part in x.split(step)])
