"""Hedged instance embeddings with Gaussian posteriors: the chance of a match, kept honest by a divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from ..errors import OptionError
from ..numerics import block_rows, first_order, full
from ..vmf import standard_normal
from .common import check_counts, check_positive, log_parameter, number

CHUNK, CHUNK_GPU = 1 << 16, 1 << 22  # numbers of a block's samples, or of their distances
FLOOR = 1e-6  # of the code of Warburg et al.


class HedgedGaussian(nn.Module):
    """Logistic loss on whether two images match, p(z, z') = sigmoid(shift - scale |z - z'|), over Gaussian samples.

    loss = mean_i [ -L(p(z_i, z_i+)) - mean_m L(1 - p(z_i, z_m-)) ] + kl_weight * (mean KL(N_i || N(0, I)) over the
    anchors, and the same over the positives). L averages over all n_samples^2 pairs of samples: "log-mean" is the
    logarithm of the mean probability (the paper), "mean-log" the mean of the logarithms.

    Args:
        scale, shift: a > 0 and b.
        n_samples: for each posterior.
        kl_weight: of the divergence, >= 0.
        learnable: whether scale (through its logarithm) and shift are parameters.
        squared: whether |z - z'|^2 stands for |z - z'|.
        normalized: whether samples are first put on the unit sphere.
        reading: "log-mean" or "mean-log".
        reference: as the code of Warburg et al., whose own are the last three: True, True, "mean-log". 1e-6 is added to
            each probability (NaN once a negative's rounds to 1), and the divergence, a sum over the anchors and
            positives, is none: -57.9 where KL is 26.7, and unbounded below as the variance shrinks. Its scale starts at
            softplus(1) = 1.313.
    Source: Oh et al., ICLR 2019, arXiv 1810.00319; Zhang et al., arXiv 2110.04403; Warburg et al., arXiv 2302.01332.
    """

    def __init__(
        self,
        scale: float = 1.0,
        shift: float = 0.0,
        n_samples: int = 8,
        kl_weight: float = 1e-4,
        learnable: bool = True,
        *,
        squared: bool = False,
        normalized: bool = False,
        reading: str = "log-mean",
        reference: bool = False,
    ) -> None:
        super().__init__()
        check_positive("HedgedGaussian", scale=scale)
        check_counts("HedgedGaussian", n_samples=n_samples)
        if not math.isfinite(shift) or not 0 <= kl_weight < math.inf:
            raise OptionError(
                f"HedgedGaussian(shift={shift}, kl_weight={kl_weight}): both must be finite, and the weight >= 0"
            )
        if reading not in ("mean-log", "log-mean"):
            raise OptionError(f"HedgedGaussian(reading={reading!r}): expected 'mean-log' or 'log-mean'")
        self.n_samples, self.kl_weight, self.reference = n_samples, kl_weight, reference
        self.squared, self.normalized = squared or reference, normalized or reference
        self.reading = "mean-log" if reference else reading
        self.fixed_scale, self.fixed_shift = float(scale), float(shift)
        self.log_scale = log_parameter(scale, learnable)
        self.learnt_shift = nn.Parameter(torch.tensor(float(shift))) if learnable else None

    @property
    def scale(self) -> Tensor | float:
        return number(self.log_scale, self.fixed_scale)

    @property
    def shift(self) -> Tensor | float:
        return self.fixed_shift if self.learnt_shift is None else self.learnt_shift

    def forward(
        self,
        anchor: Normal,
        positive: Normal,
        negatives: Normal | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scalar loss.

        Args:
            anchor, positive: `torch.distributions.Normal` of batch shape [B, D], D the embedding's dimensions.
            negatives: [B, M, D]; None: the positives rolled by one row, sampled afresh.
        Raises: OptionError if the shapes do not fit, or B = 1 without negatives.
        """
        _check(anchor, positive, negatives)
        with torch.autocast(anchor.mean.device.type, enabled=False):
            near, close = _moments(anchor), _moments(positive)
            far = [x.roll(1, 0)[:, None] for x in close] if negatives is None else _moments(negatives)
            scalars = [torch.as_tensor(x, dtype=near[0].dtype, device=near[0].device) for x in (self.scale, self.shift)]
            loss = _Blocks.apply(self, generator, torch.is_grad_enabled(), *scalars, *near, *close, *far)
            if self.reference:
                return loss + self.kl_weight * (_papers_divergence(*near).sum() + _papers_divergence(*close).sum())
            return loss + self.kl_weight * (_divergence(*near).mean() + _divergence(*close).mean())

    def _log_chance(self, z: Tensor, other: Tensor, sign: float, scale: Tensor, shift: Tensor) -> Tensor:
        """Sum over rows of the mean over columns of L(p) (sign 1) or L(1 - p) (sign -1).

        Samples [R, K, D] and [R, ..., K, D].
        """
        if self.normalized:
            z, other = functional.normalize(z, dim=-1), functional.normalize(other, dim=-1)
        rows, samples, dim = z.shape
        apart = torch.cdist(z, other.reshape(rows, -1, dim), compute_mode="donot_use_mm_for_euclid_dist")
        odds = shift - scale * (apart.square() if self.squared else apart)
        if self.reference:
            chance = torch.sigmoid(odds) + FLOOR
            return (chance if sign > 0 else 1.0 - chance).log().mean() * rows
        log = functional.logsigmoid(sign * odds)
        if self.reading == "mean-log":
            return log.mean() * rows
        pairs = log.reshape(rows, samples, -1, other.shape[-2]).transpose(1, 2).flatten(2)
        return (pairs.logsumexp(-1) - math.log(pairs.shape[-1])).mean() * rows


class _Blocks(torch.autograd.Function):
    """The mean over rows, value and gradients block by block, each with samples of its own: nothing is kept.

    Inputs: scale, shift, and the posteriors' means and standard deviations, anchor, positive, negatives.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: HedgedGaussian, generator: torch.Generator | None, recorded: bool, *inputs: Tensor
    ) -> Tensor:
        mean = inputs[-1]
        count, columns, dim = mean.shape
        samples = loss.n_samples
        block = block_rows(mean, (columns + 2) * samples * max(samples, dim), CHUNK, CHUNK_GPU)
        trained = [recorded and x for x in ctx.needs_input_grad[3:]]
        grads = [torch.zeros_like(x) if t else None for x, t in zip(inputs, trained, strict=True)]
        total = mean.new_zeros(())
        for start in range(0, count, block):
            part = [x.detach() if x.ndim == 0 else x.detach()[start : start + block] for x in inputs]
            with torch.set_grad_enabled(any(trained)):
                leaves = [x.requires_grad_() for x, t in zip(part, trained, strict=True) if t]
                value = _of_rows(loss, generator, *part)
            total += value.detach()
            by_part = iter(torch.autograd.grad(value, leaves) if leaves else ())
            for grad in (g for g in grads if g is not None):
                (grad if grad.ndim == 0 else grad[start : start + block]).add_(next(by_part))
        ctx.save_for_backward(*(g if g is None else g.div_(count) for g in grads))
        return total / count

    @staticmethod
    @first_order("HedgedGaussian")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if g is None else grads[0] * g for g in ctx.saved_tensors)


def _of_rows(
    loss: HedgedGaussian, generator: torch.Generator | None, scale: Tensor, shift: Tensor, *moments: Tensor
) -> Tensor:
    """The sum of the rows' losses, without the divergence."""
    z, close, far = (
        mean.unsqueeze(-2) + std.unsqueeze(-2) * standard_normal(_sampled(mean, loss.n_samples), mean, generator)
        for mean, std in zip(moments[::2], moments[1::2], strict=True)
    )
    return -loss._log_chance(z, close, 1.0, scale, shift) - loss._log_chance(z, far, -1.0, scale, shift)


def _sampled(mean: Tensor, samples: int) -> tuple[int, ...]:
    return (*mean.shape[:-1], samples, mean.shape[-1])


def standard_divergence(posterior: Normal) -> Tensor:
    """KL(N(mean, std^2) || N(0, I)), summed over the last dimension: [...] for a batch shape [..., D]."""
    return _divergence(*_moments(posterior))


def _divergence(mean: Tensor, std: Tensor) -> Tensor:
    return 0.5 * (mean.square() + std.square() - 1.0).sum(-1) - std.log().sum(-1)


def _papers_divergence(mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((std + FLOOR).log() + (1.0 + mean.square()) / (std.square() + FLOOR)).sum(-1)


def _moments(posterior: Normal) -> tuple[Tensor, Tensor]:
    return full(posterior.mean), full(posterior.stddev)


def _check(anchor: Normal, positive: Normal, negatives: Normal | None) -> None:
    shapes = [tuple(x.batch_shape) for x in (anchor, positive, negatives) if x is not None]
    fits = len(shapes[0]) == 2 and shapes[1] == shapes[0] and shapes[0][0] > (negatives is None)
    if negatives is not None:
        fits = fits and len(shapes[2]) == 3 and shapes[2][::2] == shapes[0] and shapes[2][1] > 0
    if not fits:
        raise OptionError(
            "HedgedGaussian expects Normal distributions of batch shapes [B, D], [B, D] and [B, M, D] (without "
            f"negatives, B > 1); given {shapes}"
        )
