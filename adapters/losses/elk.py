"""Expected likelihood kernel: how much of two posteriors' mass falls on the same points, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import OptionError
from ..numerics import block_rows
from ..vmf import VonMisesFisher, log_normalizer
from .common import check_positive, log_parameter, number
from .posteriors import check_posteriors, columns

LARGEST = 1e15  # stands for larger concentrations, and for infinity
NEVER = 1e-300  # a probability of 0
LARGE = 1e10  # from here on the normaliser's expansion at infinity is exact to 1e-6 at d = 4096
CHUNK, CHUNK_GPU = 1 << 17, 1 << 22  # pairs, or numbers of their directions, held at a time

# Slopes of the authors' fit log C_d(kappa) = const + p kappa + q kappa^1.1, by dimension; the constant cancels.
PAPER_FIT = {
    4: (-0.354357, -0.383723),
    8: (0.36841, -0.80936),
    10: (0.67365, -0.98726),
    16: (1.39146, -1.39819),
    32: (2.28954, -1.86925),
    64: (2.34269, -1.77425),
}


class ExpectedLikelihoodKernel(nn.Module):
    """Softmax over expected likelihood kernels: the positive's posterior overlaps the anchor's more than others do.

    With K(i, j) the integral of vMF_i(z) vMF_j(z) over the sphere,
    loss = -mean_i log K(i, i+)^tau / (K(i, i+)^tau + sum_m K(i, m-)^tau),
    log K = log C(k_i) + log C(k_j) - log C(|k_i mu_i + k_j mu_j|). No samples: exact, and so are its gradients.
    Two points (kappa = infinity both) overlap only where they are one: their kernels are those of kappa = 1e15.

    Args:
        concentration: tau > 0, the power of the kernel; 1 takes it as the likelihood it is, the authors use 20.
        learnable: whether tau is a parameter (through its logarithm).
        reference: as the authors' code: log C by its fit (dimensions 4, 8, 10, 16, 32, 64 only; off by up to 7 to 23
            nats between kappa 4 and 200), and without negatives a row's negative is the *kernel* of the row before with
            its own positive, which is no pair of this row's.
    Source: Jebara et al., JMLR 2004; for von Mises-Fisher posteriors Kirchhof et al., arXiv 2302.02865.
    """

    def __init__(self, concentration: float = 20.0, learnable: bool = False, *, reference: bool = False) -> None:
        super().__init__()
        check_positive("ExpectedLikelihoodKernel", concentration=concentration)
        self.reference = reference
        self.log_concentration = log_parameter(concentration, learnable)
        self.fixed_concentration = float(concentration)

    @property
    def concentration(self) -> Tensor | float:
        return number(self.log_concentration, self.fixed_concentration)

    def forward(
        self, anchor: VonMisesFisher, positive: VonMisesFisher, negatives: VonMisesFisher | None = None
    ) -> Tensor:
        """Scalar loss; batch shapes [B], [B] and [B, M] (None: the positives rolled by one row)."""
        check_posteriors("ExpectedLikelihoodKernel", anchor, positive, negatives)
        mu, kappa = columns(positive, negatives)
        if self.reference and negatives is None:
            mu, kappa = mu[:, :1], kappa[:, :1]
        with torch.autocast(mu.device.type, enabled=False):
            log_c = _paper_log_c if self.reference else _log_c
            of_rows = partial(_kernel_of_rows, log_c=log_c)
            kernel = torch.cat(
                _by_blocks(of_rows, anchor.mean_direction.to(mu), anchor.concentration[:, None], mu, kappa)
            )
            if self.reference and negatives is None:
                kernel = torch.cat([kernel, kernel.roll(1, 0)], 1)
            tau = torch.as_tensor(self.concentration, device=mu.device).double()
            loss = (tau * (kernel - kernel[:, :1])).logsumexp(1).mean()
        return loss.to(mu.dtype)

    def all_pairs(self, posterior: VonMisesFisher, same: Tensor) -> Tensor:
        """The loss of every pair of a batch, for labels that say how likely two rows are of one class.

        Row j is the positive of row i with the weight same_ij, and each other row k is a negative that counts 1 - same_ik
        times; a row is neither to itself. It is what drawing pairs by these probabilities estimates, without their noise.

        Args:
            posterior: batch shape [B]. same: [B, B] from 0 to 1; <p_i, p_j> of class probabilities p [B, C].
        Returns: scalar; 0 where no two rows can be of one class.
        Raises: OptionError for other shapes, or with reference=True, which knows no such loss.
        """
        check_posteriors("ExpectedLikelihoodKernel", posterior, posterior, None)
        mu, kappa = posterior.mean_direction, posterior.concentration
        rows = len(kappa)
        if same.shape != (rows, rows) or self.reference:
            raise OptionError(
                f"ExpectedLikelihoodKernel(reference={self.reference}).all_pairs: same has the shape {list(same.shape)}; "
                f"expected [{rows}, {rows}] for posteriors of the batch shape {list(kappa.shape)}, and reference=False"
            )
        with torch.autocast(mu.device.type, enabled=False):
            tau = torch.as_tensor(self.concentration, device=mu.device).double()
            of_rows = partial(_all_pairs_of_rows, columns_mu=mu, columns_kappa=kappa, tau=tau)
            sums = _by_blocks(of_rows, torch.arange(rows, device=mu.device), mu, kappa[:, None], same)
            loss, weight = torch.stack(sums).sum(0)
            return (loss / weight.clamp(min=NEVER)).to(mu.dtype)


def log_expected_likelihood(one: VonMisesFisher, other: VonMisesFisher) -> Tensor:
    """log of the integral of the product of two densities with respect to surface measure; batch shapes broadcast.

    Raises: OptionError if the dimensions differ.
    """
    if one.dim != other.dim:
        raise OptionError(f"one space is needed; the distributions given live in dimensions {one.dim} and {other.dim}")
    chord = (one.mean_direction - other.mean_direction).double().square().sum(-1)
    value = _log_kernel(one.concentration, other.concentration, chord, one.dim, _log_c)
    return value.to(torch.promote_types(one.concentration.dtype, other.concentration.dtype))


def _by_blocks(of_rows: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """`of_rows` of blocks of the inputs' rows, of which the last input [B, J] has one number for each pair.

    What the way back needs of a block of rows, some 30 numbers for each pair, is computed anew there.
    """
    pairs = inputs[-1]
    block = block_rows(pairs, pairs.shape[1], CHUNK, CHUNK_GPU)
    if block >= len(pairs):
        return [of_rows(*inputs)]
    parts = zip(*(x.split(block) for x in inputs), strict=True)
    again = partial(checkpoint, of_rows, use_reentrant=False, preserve_rng_state=False)
    return [again(*part) for part in parts]


def _kernel_of_rows(anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, *, log_c: Any) -> Tensor:
    """log K [B, J] from mu [B, d], kappa [B, 1], and mu [B, J, d], kappa [B, J] or mu [J, d], kappa [J]."""
    return _log_kernel(anchor_kappa, kappa, _SquaredChord.apply(anchor_mu, mu), mu.shape[-1], log_c)


def _all_pairs_of_rows(
    place: Tensor, mu: Tensor, kappa: Tensor, same: Tensor, *, columns_mu: Tensor, columns_kappa: Tensor, tau: Tensor
) -> Tensor:
    """Weighted sum of the losses of rows `place` [R] with all rows, and the sum of the weights."""
    kernel = tau * _kernel_of_rows(mu, kappa, columns_mu, columns_kappa, log_c=_log_c)
    itself = place[:, None] == torch.arange(len(columns_mu), device=place.device)
    weight = same.to(kernel).masked_fill(itself, 0.0)
    # logarithms of 0 as numbers that no kernel reaches, for gradients without NaN
    negative = (1.0 - weight).clamp(min=NEVER).log().masked_fill(itself, math.log(NEVER))
    others = (kernel + negative).logsumexp(1, keepdim=True)
    # all of them but j: j's own share is taken from the positive's, which counts once
    loss = torch.logaddexp(kernel + weight.clamp(min=NEVER).log(), others) - kernel
    return torch.stack([(weight * loss).sum(), weight.sum()])


def _log_kernel(k1: Tensor, k2: Tensor, chord: Tensor, dim: int, log_c: Any) -> Tensor:
    """log K in float64, from concentrations and squared chords between the mean directions.

    k1 + k2 - k3 = k1 k2 chord / (k1 + k2 + k3) is the part that grows with kappa; the rest are logarithms.
    """
    k1, k2 = k1.double().clamp(max=LARGEST), k2.double().clamp(max=LARGEST)
    both = k1 + k2
    # where k3 is 0 its gradient is 0, in all arguments; the floor says so to autograd
    k3 = (both * both - k1 * k2 * chord).clamp(min=1e-24).sqrt()
    apart = k1 * k2 * chord / (both + k3).clamp(min=1e-30)
    return log_c(k1, dim) + log_c(k2, dim) - log_c(k3, dim) - apart


def _log_c(kappa: Tensor, dim: int) -> Tensor:
    """log C_d(kappa) + kappa in float64, which grows with log kappa only."""
    n = dim - 1.0
    large = kappa.clamp(min=LARGE)
    expansion = 0.5 * n * (large / (2.0 * math.pi)).log() + n * (n - 2.0) / (8.0 * large)
    near = kappa.clamp(max=LARGE)
    return torch.where(kappa > LARGE, expansion, log_normalizer(near, dim) + near)


def _paper_log_c(kappa: Tensor, dim: int) -> Tensor:
    if dim not in PAPER_FIT:
        raise OptionError(
            f"ExpectedLikelihoodKernel(reference=True): the authors' fit of log C exists for dimensions "
            f"{sorted(PAPER_FIT)}; {dim} was given. Use reference=False"
        )
    p, q = PAPER_FIT[dim]
    return (p + 1.0) * kappa + q * kappa.clamp(min=1e-12).pow(1.1)


class _SquaredChord(torch.autograd.Function):
    """|mu_i - mu_j|^2 in float64 [B, J] for anchors [B, d] and columns [B, J, d], or [J, d] for all anchors.

    The differences are not kept. Differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, mu: Tensor) -> Tensor:
        ctx.save_for_backward(anchor, mu)
        chord = torch.empty(len(anchor), mu.shape[-2], dtype=torch.float64, device=mu.device)
        block = block_rows(mu, mu.shape[-2] * mu.shape[-1], CHUNK, CHUNK_GPU)
        for start in range(0, len(anchor), block):
            part = slice(start, start + block)
            chord[part] = (anchor[part, None] - (mu if mu.ndim == 2 else mu[part])).double().square_().sum(-1)
        return chord

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        anchor, mu = ctx.saved_tensors
        grad = 2.0 * grads[0].to(mu)
        if mu.ndim == 2:
            return anchor * grad.sum(1, keepdim=True) - grad @ mu, mu * grad.sum(0)[:, None] - grad.T @ anchor
        by_anchor = anchor * grad.sum(1, keepdim=True) - torch.bmm(grad[:, None], mu)[:, 0]
        return by_anchor, grad[..., None] * (mu - anchor[:, None])
