"""Losses of sampled cosines, value and gradients in one pass over blocks of rows; MCInfoNCE and HedgedInstance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import OptionError
from ..vmf import VonMisesFisher
from .cosines import sample_cosines
from .draws import Draws, SobolDraws
from .paper_sampler import paper_cosines
from .posteriors import check_posteriors, columns

CHUNK, CHUNK_GPU = 1 << 18, 1 << 22  # elements of a block of rows: what a cache holds, what fills a GPU

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


def check_positive(name: str, **values: float) -> None:
    """Refuses values that are not positive and finite."""
    if not all(0 < value < math.inf for value in values.values()):
        given = ", ".join(f"{option}={value}" for option, value in values.items())
        raise OptionError(f"{name}({given}): {'both' if len(values) == 2 else 'all'} must be positive and finite")


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
        inputs = (anchor_mu, anchor_kappa, mu, kappa)
        needed = recorded and any(ctx.needs_input_grad)
        grads = [torch.empty_like(x) for x in inputs] if needed else []
        by_parameters = [torch.zeros_like(p) for p in parameters]
        total = mu.new_zeros(())
        count, others, dim = mu.shape
        limit = CHUNK if mu.device.type == "cpu" else CHUNK_GPU
        block = max(1, limit // max(others * sampling.samples, others * dim))
        draws = (
            SobolDraws(mu, sampling.samples, others, generator)
            if sampling.sobol
            else Draws(mu, sampling.samples, sampling.antithetic, generator)
        )
        for start in range(0, count, block):
            part = slice(start, start + block)
            draws.restart()
            sampled = sample_cosines(inputs[0][part], inputs[1][part], inputs[2][part], inputs[3][part], draws)
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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(grads[0] * g for g in ctx.saved_tensors)


class _GivenLoss(torch.autograd.Function):
    """The same loss for cosines [B, J, S] that were sampled elsewhere."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, rows: Rows, *parameters: Tensor) -> Tensor:
        value, *grads = (x / len(cosine) for x in rows(cosine, *parameters))
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, *parameters = (grads[0] * g for g in ctx.saved_tensors)
        return cosine, None, *parameters
