"""AnInfoNCE: InfoNCE with a learned precision for each dimension of the embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from .contrast import Terms, contrast, unit_views

LOG_2 = math.log(2.0)  # softplus(0), the middle of the paper's random start


class AnInfoNCE(nn.Module):
    """NT-Xent whose similarity of unit vectors is -1/2 sum_k Lambda_k (u_k - v_k)^2 with a learned diagonal Lambda > 0.

    Dimensions in which positives differ much get a low precision, instead of being dropped from the embedding. With
    Lambda = 1/t in every dimension the loss is NT-Xent at temperature t, exactly. Lambda is on the scale of a Gaussian's
    inverse variance: positives drawn with density exp(-1/2 (v-u)' Lambda (v-u)) have this Lambda.

    Args:
        dim: D of the embeddings.
        initial_precision: Lambda at the start, a number or [dim].
        hard_negatives: beta >= 0. The sum over the negatives of row i becomes (2N - 2) sum_j w_ij exp(s_ij) with w_ij in
            proportion to exp(beta s_ij); the weights get no gradient. 0 is the plain loss. Negatives are then as if drawn
            with density exp(beta s), so the precision learned is the true one over 1 + beta.
        reference: as the paper's code, whose rows of view 2 have exp s(z1_i, z2_j) among their negatives where
            exp s(z2_i, z1_j) is right: up to 0.8 % of the loss and 9 % of its gradient in the golden cases, and NT-Xent
            is no longer the special case. It holds several matrices [N, N], where the plain loss holds one [2N, 2N].
    Attributes: precision, Lambda [dim].
    Source: Rusak et al., arXiv 2407.00143; the paper names hard negatives and ensembles, its code has neither.
    """

    def __init__(
        self,
        dim: int,
        initial_precision: float | Tensor = LOG_2,
        hard_negatives: float = 0.0,
        reference: bool = False,
    ) -> None:
        super().__init__()
        start = torch.as_tensor(initial_precision, dtype=torch.float64)
        if dim < 1 or start.shape not in ((), (dim,)) or not ((start > 0) & (start < math.inf)).all():
            raise OptionError(
                f"AnInfoNCE(dim={dim}, initial_precision={initial_precision}): expected dim >= 1 and one positive number "
                "or [dim] of them"
            )
        if not 0 <= hard_negatives < math.inf or (reference and hard_negatives):
            raise OptionError(
                f"AnInfoNCE: hard_negatives={hard_negatives} was given; expected a number >= 0, and 0 with reference"
            )
        raw = start + torch.log(-torch.expm1(-start))  # softplus(raw) = start
        self.raw_precision = nn.Parameter(raw.expand(dim).to(torch.get_default_dtype(), copy=True))
        self.terms = Terms(distance=True, hardness=float(hard_negatives))
        self.reference = reference

    @property
    def precision(self) -> Tensor:
        return functional.softplus(self.raw_precision)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Scalar loss, at least float32, of two views' embeddings [N, dim], N >= 2, of any length.

        Raises: OptionError if the shapes do not fit.
        """
        dim, n = len(self.raw_precision), len(z1)
        if z1.ndim != 2 or z1.shape[1] != dim:
            raise OptionError(
                f"AnInfoNCE(dim={dim}) expects embeddings [N, {dim}]; the shape given is {tuple(z1.shape)}"
            )
        with torch.autocast(z1.device.type, enabled=False):
            u1, u2 = unit_views("AnInfoNCE", z1, z2)
            # the root has no slope at 0, where softplus underflows
            root = self.precision.to(u1.dtype).clamp(min=torch.finfo(u1.dtype).tiny).sqrt()
            x1, x2 = u1 * root, u2 * root
            close = (x1 - x2).square().sum(-1) / -2
            if self.reference:
                return _rows_as_published(x1, x2, close).mean()
            return contrast(torch.cat([x1, x2]), u1.new_ones(2 * n), close.repeat(2), self.terms)


class AnInfoNCEEnsemble(nn.Module):
    """One AnInfoNCE for each family of augmentations, on one shared encoder: the sum of their losses.

    Each family tells the encoder's dimensions apart by its own precision; together they tell apart what any of them does.

    Args:
        dim: D of the embeddings. families: K >= 1. Others: of `AnInfoNCE`, for all.
    Attributes: precision, [families, dim].
    Source: named in arXiv 2407.00143; the formula is worked out from its description.
    """

    def __init__(
        self, dim: int, families: int, initial_precision: float | Tensor = LOG_2, hard_negatives: float = 0.0
    ) -> None:
        super().__init__()
        if families < 1:
            raise OptionError(f"AnInfoNCEEnsemble: families={families} was given; expected at least 1")
        self.losses = nn.ModuleList(AnInfoNCE(dim, initial_precision, hard_negatives) for _ in range(families))

    @property
    def precision(self) -> Tensor:
        return functional.softplus(torch.stack([*self.losses.parameters()]))

    def forward(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Scalar loss of two views [N, dim] for each family, in the order of `precision`; N may differ.

        Raises: OptionError if the number of pairs is not that of the families.
        """
        if len(pairs) != len(self.losses):
            raise OptionError(
                f"AnInfoNCEEnsemble of {len(self.losses)} families was given {len(pairs)} pairs of views; expected one "
                "(z1, z2) for each"
            )
        return torch.stack([loss(z1, z2) for loss, (z1, z2) in zip(self.losses, pairs, strict=True)]).sum()


def _rows_as_published(a: Tensor, b: Tensor, close: Tensor) -> Tensor:
    """The losses [2N] of the paper's code from both views times the root of the precision, [N, D]."""
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    within_a, within_b, across = (_similarity(u, v).masked_fill(own, -math.inf) for u, v in ((a, a), (b, b), (a, b)))
    rows = [torch.cat([close[:, None], within, across], 1).logsumexp(1) - close for within in (within_a, within_b)]
    return torch.cat(rows)


def _similarity(u: Tensor, v: Tensor) -> Tensor:
    return u @ v.T - u.square().sum(-1)[:, None] / 2 - v.square().sum(-1) / 2
