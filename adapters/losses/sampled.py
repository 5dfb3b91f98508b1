"""Losses of sampled cosines, value and gradients in one pass over blocks of rows; MCInfoNCE and HedgedInstance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import block_rows, first_order
from ..vmf import VonMisesFisher
from .cosines import prepare
from .draws import Draws, SobolDraws
from .paper_sampler import paper_cosines
from .posteriors import check_posteriors, columns

# Elements of a block of rows: what a cache holds and a call of an operation is worth, and what fills a GPU. On the CPU
# larger blocks, 1 MB a tensor, are returned to the system and fetched again each time.
CHUNK, CHUNK_GPU = 1 << 17, 1 << 22
PREPARED = 1 << 11  # columns of at most 128 dimensions whose tables and frames are looked up at once

# Rows take cosines [R, J, S] (the positives first) and parameters (scalars), and give the summed loss of the rows, its
# gradient for the cosines, and those for the parameters.
Rows = Callable[..., tuple[Tensor, ...]]


class Sampling(NamedTuple):
    """How a loss draws samples: their number, whether in opposite pairs, or by Sobol points, or as the paper's code."""

    samples: int
    antithetic: bool = True
    sobol: bool = False
    positives: int = 1
    reference: bool = False


def sampled_loss(
    name: str,
    rows: Rows,
    parameters: tuple[Tensor | float, ...],
    posteriors: tuple[VonMisesFisher, VonMisesFisher, VonMisesFisher | None],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean over the rows of a loss of sampled cosines, for posteriors of batch shapes [B], [B], [B, M] or None."""
    check_posteriors(name, *posteriors)
    anchor, positive, negatives = posteriors
    mu, kappa = columns(positive, negatives, sampling.positives)
    scalars = [torch.as_tensor(p, dtype=mu.dtype, device=mu.device) for p in parameters]
    with torch.autocast(mu.device.type, enabled=False):
        if sampling.reference:
            return _GivenLoss.apply(paper_cosines(*posteriors, sampling.samples, generator), rows, *scalars)
        inputs = (anchor.mean_direction.to(mu), anchor.concentration.to(kappa), mu, kappa, *scalars)
        return _SampledLoss.apply(rows, sampling, generator, torch.is_grad_enabled(), *inputs)


class _SampledLoss(torch.autograd.Function):
    """The loss and its gradients in one pass over blocks of rows, each with all its samples: nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        sampling: Sampling,
        generator: torch.Generator | None,
        recorded: bool,
        anchor_mu: Tensor,
        anchor_kappa: Tensor,
        mu: Tensor,
        kappa: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        needed = recorded and any(ctx.needs_input_grad)
        grads = [torch.empty_like(x) for x in (anchor_mu, anchor_kappa, mu, kappa)] if needed else []
        by_parameters = [torch.zeros_like(p) for p in parameters]
        total = mu.new_zeros(())
        count, others = mu.shape[:2]
        draws = (
            SobolDraws(mu, sampling.samples, others, generator)
            if sampling.sobol
            else Draws(mu, sampling.samples, sampling.antithetic, generator)
        )
        group, block = _sizes(mu, sampling.samples)
        for start in range(0, count, block):
            if start % group == 0:
                ready = slice(start, start + group)
                columns = prepare(anchor_mu[ready], anchor_kappa[ready], mu[ready], kappa[ready], draws)
            draws.restart()
            part, first = slice(start, start + block), start % group
            sampled = columns.sample(slice(first, first + block))
            value, grad, *slopes = rows(sampled.cosine, *parameters)
            total += value
            if needed:
                for sum_, slope in zip(by_parameters, slopes, strict=True):
                    sum_ += slope
                for out, g in zip(grads, sampled.pull_back(grad), strict=True):
                    out[part] = g
        ctx.save_for_backward(*(g / count for g in [*grads, *by_parameters]))
        return total / count

    @staticmethod
    @first_order("a loss of sampled cosines (MCInfoNCE, HedgedInstance)")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(grads[0] * g for g in ctx.saved_tensors)


def _sizes(mu: Tensor, samples: int) -> tuple[int, int]:
    """Rows that are prepared at once, and rows of a block, for columns [B, J, d]."""
    _, others, dim = mu.shape
    block = block_rows(mu, others * max(samples, dim), CHUNK, CHUNK_GPU)
    prepared = PREPARED * 128 // (others * max(dim, 128))
    return max(1, prepared // block) * block, block


class _GivenLoss(torch.autograd.Function):
    """The same loss for cosines [B, J, S] that were sampled elsewhere."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, rows: Rows, *parameters: Tensor) -> Tensor:
        value, *grads = (x / len(cosine) for x in rows(cosine, *parameters))
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @first_order("a loss of sampled cosines (MCInfoNCE, HedgedInstance)")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, *parameters = (grads[0] * g for g in ctx.saved_tensors)
        return cosine, None, *parameters
