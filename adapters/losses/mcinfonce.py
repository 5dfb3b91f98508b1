"""MCInfoNCE: InfoNCE averaged over samples of probabilistic embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..errors import OptionError
from ..vmf import VonMisesFisher
from .cosines import Draws, sample_cosines

CHUNK, CHUNK_GPU = 1 << 18, 1 << 22  # elements of a block of rows: what a cache holds, what fills a GPU


class MCInfoNCE(nn.Module):
    """Negative log-likelihood that the positive matches the anchor, averaged over posterior samples.

    With z ~ vMF(mu, kappa) drawn n_samples times for every image,
    loss = -mean_i log mean_s exp(a) / (exp(a) + mean_m exp(c_m)), a = tau z_i.z_i+ and c_m = tau z_i.z_m-.
    The logarithm of a mean biases it upward by O(1/n_samples).

    Args:
        concentration: tau > 0, the inverse temperature; another quantity than the posteriors' kappa.
        n_samples: Monte-Carlo samples for each posterior.
        learnable: whether tau is a parameter (through its logarithm).
        antithetic: whether samples come in pairs of opposite directions. This lowers the variance of loss and gradients
            (by 1.1 to 3 times), and the bias in n_samples with it, so at few samples the mean is not the paper's.
    Source: Kirchhof et al., ICML 2023, arXiv 2302.02865.
    """

    def __init__(
        self, concentration: float = 16.0, n_samples: int = 16, learnable: bool = False, antithetic: bool = True
    ) -> None:
        super().__init__()
        if not 0 < concentration < math.inf or n_samples < 1:
            raise OptionError(
                f"MCInfoNCE(concentration={concentration}, n_samples={n_samples}): both must be positive and finite"
            )
        self.n_samples, self.antithetic = n_samples, antithetic
        log = torch.tensor(float(concentration)).log()
        self.log_concentration = nn.Parameter(log) if learnable else None
        self.fixed_concentration = float(concentration)

    @property
    def concentration(self) -> Tensor | float:
        return self.fixed_concentration if self.log_concentration is None else self.log_concentration.exp()

    def forward(
        self,
        anchor: VonMisesFisher,
        positive: VonMisesFisher,
        negatives: VonMisesFisher | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scalar loss; batch shapes [B], [B] and [B, M] (None: the positives rolled by one row)."""
        _check(anchor, positive, negatives)
        mu = positive.mean_direction[:, None]
        kappa = positive.concentration[:, None]
        if negatives is None:
            mu, kappa = torch.cat([mu, mu.roll(1, 0)], 1), torch.cat([kappa, kappa.roll(1, 0)], 1)
        else:
            mu = torch.cat([mu, negatives.mean_direction], 1)
            kappa = torch.cat([kappa, negatives.concentration], 1)
        tau = torch.as_tensor(self.concentration, dtype=mu.dtype, device=mu.device)
        inputs = (anchor.mean_direction.to(mu), anchor.concentration.to(kappa), mu, kappa, tau)
        with torch.autocast(mu.device.type, enabled=False):
            return _SampledLoss.apply(*inputs, self.n_samples, self.antithetic, generator, torch.is_grad_enabled())


class _SampledLoss(torch.autograd.Function):
    """The loss and its gradients in one pass over blocks of rows, each with all its samples: nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor_mu: Tensor,
        anchor_kappa: Tensor,
        mu: Tensor,
        kappa: Tensor,
        tau: Tensor,
        samples: int,
        antithetic: bool,
        generator: torch.Generator | None,
        recorded: bool,
    ) -> Tensor:
        inputs = (anchor_mu, anchor_kappa, mu, kappa)
        needed = recorded and any(ctx.needs_input_grad)
        grads = [torch.empty_like(x) for x in inputs] if needed else []
        by_tau, total = torch.zeros_like(tau), torch.zeros_like(tau)
        rows, columns, dim = mu.shape
        limit = CHUNK if mu.device.type == "cpu" else CHUNK_GPU
        block = max(1, limit // max(columns * samples, columns * dim))
        draws = Draws(mu, samples, antithetic, generator)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            sampled = sample_cosines(inputs[0][part], inputs[1][part], inputs[2][part], inputs[3][part], draws)
            value, grad, slope = _rows(sampled.cosine, tau)
            total += value
            if needed:
                by_tau += slope
                for out, g in zip(grads, sampled.pull_back(grad), strict=True):
                    out[part] = g
        ctx.save_for_backward(*(g / rows for g in grads), by_tau / rows)
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(grads[0] * g for g in ctx.saved_tensors), None, None, None, None


def _rows(cosine: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of the rows of sampled cosines [R, J, S], and its gradients for the cosines and for tau.

    Column 0 is the positive. A row's loss is -log mean_s exp(l), l = logsigmoid(tau c_0 - log mean_m exp(tau c_m)).
    """
    close, far = cosine[:, 0], cosine[:, 1:]
    grad = torch.empty_like(cosine)
    share = torch.mul(far, tau, out=grad[:, 1:])
    top = share.amax(1, keepdim=True)
    mass = share.sub_(top).exp_().sum(1, keepdim=True)
    share.div_(mass)
    odds = close * tau - (top + mass.log()).squeeze(1) + math.log(far.shape[1])
    log = functional.logsigmoid(odds)
    loss = math.log(cosine.shape[2]) - log.logsumexp(-1)
    weight = torch.softmax(log, -1) * torch.sigmoid(-odds)
    by_tau = (weight * ((share * far).sum(1) - close)).sum()
    torch.mul(weight, -tau, out=grad[:, 0])
    share.mul_((weight * tau)[:, None])
    return loss.sum(), grad, by_tau


def _check(anchor: VonMisesFisher, positive: VonMisesFisher, negatives: VonMisesFisher | None) -> None:
    shapes = [tuple(x.batch_shape) for x in (anchor, positive, negatives) if x is not None]
    dims = {x.dim for x in (anchor, positive, negatives) if x is not None}
    rows = shapes[0][0] if len(shapes[0]) == 1 else 0
    fits = shapes[1] == (rows,) and len(dims) == 1
    if negatives is None:
        fits = fits and rows > 1
    else:
        fits = fits and rows > 0 and len(shapes[2]) == 2 and shapes[2][0] == rows and shapes[2][1] > 0
    if not fits:
        raise OptionError(
            "MCInfoNCE expects distributions of batch shapes [B], [B] and [B, M] in one dimension (without negatives, "
            f"B > 1); given {shapes} in dimensions {sorted(dims)}"
        )
