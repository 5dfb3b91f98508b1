"""Probabilistic face embeddings: the mutual likelihood score of two Gaussian embeddings, and its loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..numerics import full


def mutual_likelihood_score(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """log of the integral of N(z; mean1, variance1) N(z; mean2, variance2), the chance that both mean one point.

    Args:
        mean1, mean2: [..., D]; batch shapes broadcast.
        log_variance1, log_variance2: of each dimension [..., D], or one for all [..., 1].
    Returns: [...], higher = more alike.
    Source: Shi and Jain, ICCV 2019, arXiv 1904.09658, equation 3.
    """
    each = _terms(mean1, log_variance1, mean2, log_variance2)
    return -0.5 * (each.sum(-1) + each.shape[-1] * math.log(2.0 * math.pi))


class MutualLikelihood(nn.Module):
    """Variances that make pairs likely: the mean over positive pairs and dimensions of (difference)^2 / v + log v.

    v is the sum of both variances. Up to a factor and a constant the negative mean `mutual_likelihood_score`. It has no
    negatives: with means that may move it is least where they collapse, so train the variances on fixed means.

    Source: Shi and Jain, ICCV 2019, arXiv 1904.09658; the form of Warburg et al., arXiv 2302.01332.
    """

    def forward(self, mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
        """Scalar loss for positive pairs: means [B, D], log variances [B, D] or [B, 1].

        Raises: OptionError if the shapes do not fit.
        """
        shapes = [tuple(x.shape) for x in (mean1, log_variance1, mean2, log_variance2)]
        wide = shapes[0]
        if len(wide) != 2 or wide[0] < 1 or shapes[2] != wide or not {shapes[1], shapes[3]} <= {wide, (wide[0], 1)}:
            raise OptionError(
                f"MutualLikelihood expects [B, D], [B, D] or [B, 1], twice; the shapes given are {shapes}"
            )
        return _terms(mean1, log_variance1, mean2, log_variance2).mean()


def _terms(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    with torch.autocast(mean1.device.type, enabled=False):
        mean1, log_variance1, mean2, log_variance2 = map(full, (mean1, log_variance1, mean2, log_variance2))
        log = torch.logaddexp(log_variance1, log_variance2)
        # the root first: exp(-log) itself is infinite from variances of e^-89 on, and 0 times it no number
        return ((mean1 - mean2) * (-0.5 * log).exp()).square() + log
