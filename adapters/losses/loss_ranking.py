"""Loss prediction: an uncertainty that ranks, or equals, the loss a task model makes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from ..numerics import full


class LossRanking(nn.Module):
    """Hinge on the order of uncertainties within the pairs of rows (0, 1), (2, 3), ...: the larger loss, the larger u.

    loss = mean over pairs of max(0, margin - s (u_2i - u_2i+1)), s = +1 where row 2i has the larger target and -1
    otherwise (ties too, as in the authors' code). Only the order of the targets matters.

    Args:
        margin: by which the uncertainties should differ.
        leeway: targets that differ by less ask for no order (s = 0).
    Source: Kirchhof et al., arXiv 2402.16569.
    """

    def __init__(self, margin: float = 0.1, leeway: float = 0.0) -> None:
        super().__init__()
        if not 0 <= margin < math.inf or not 0 <= leeway < math.inf:
            raise OptionError(f"LossRanking(margin={margin}, leeway={leeway}): both must be >= 0 and finite")
        self.margin, self.leeway = margin, leeway

    def forward(self, u: Tensor, target_loss: Tensor) -> Tensor:
        """Scalar loss for uncertainties [B] and the losses [B] they should rank; the targets get no gradient.

        An odd last row has no partner and is left out. Raises: OptionError if the shapes differ or B < 2.
        """
        if u.ndim != 1 or u.shape != target_loss.shape or len(u) < 2:
            raise OptionError(f"LossRanking expects two [B] with B >= 2; given {_shapes(u, target_loss)}")
        pairs = len(u) // 2
        target = full(target_loss.detach())[: 2 * pairs].reshape(pairs, 2)
        gap = target[:, 0] - target[:, 1]
        order = torch.where(gap > 0, 1.0, torch.where(gap <= 0, -1.0, gap))  # what is no number stays none
        order = order.masked_fill(gap.abs() < self.leeway, 0.0)
        value = full(u)[: 2 * pairs].reshape(pairs, 2)
        return functional.relu(self.margin - order * (value[:, 0] - value[:, 1])).mean()


class LossMSE(nn.Module):
    """Mean squared error between the uncertainty and the task loss: u keeps the loss's size, and its outliers.

    Source: Yoo and Kweon, CVPR 2019; the variant Kirchhof et al., arXiv 2307.03810, call loss prediction.
    """

    def forward(self, u: Tensor, target_loss: Tensor) -> Tensor:
        """Scalar loss for uncertainties [B] and losses [B]; the targets get no gradient.

        Raises: OptionError if the shapes differ or there are none.
        """
        if u.shape != target_loss.shape or u.numel() == 0:
            raise OptionError(
                f"LossMSE expects two tensors of one shape with at least one number; given {_shapes(u, target_loss)}"
            )
        return (full(u) - full(target_loss.detach())).square().mean()


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
