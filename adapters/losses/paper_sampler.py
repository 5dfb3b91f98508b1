"""The von Mises-Fisher sampler of the papers' code, kept for comparisons: where kappa > 10 it misses its concentration.

It rejects from an envelope whose constant b is replaced above kappa = 10 by an expansion, (d - 1) / (4 kappa), that does
not hold unless kappa >> d: at d = 64 and kappa = 16 samples have a mean cosine of 0.009 instead of 0.236. Gradients for
kappa leave the rejection out, and are biased at any kappa (d = 3 apart, where the code inverts the distribution).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..vmf import VonMisesFisher, standard_normal


def paper_cosines(
    anchor: VonMisesFisher,
    positive: VonMisesFisher,
    negatives: VonMisesFisher | None,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Cosines [B, J, S] of full vectors; without negatives the positives' samples serve the next row once more."""
    z = paper_rsample(anchor, samples, generator)
    close = paper_rsample(positive, samples, generator)[:, :, None]
    far = close.roll(1, 1) if negatives is None else paper_rsample(negatives, samples, generator)
    return (z[:, :, None] * torch.cat([close, far], 2)).sum(-1).permute(1, 2, 0)


def paper_rsample(posterior: VonMisesFisher, samples: int, generator: torch.Generator | None) -> Tensor:
    """Samples [S, *batch, d] as the papers' code draws them."""
    if posterior.dim == 3:
        return posterior.rsample((samples,), generator)
    mu = posterior.mean_direction
    w = _paper_cosine(posterior.concentration.expand(samples, *posterior.batch_shape), posterior.dim, generator)
    w = w.to(mu)[..., None]
    noise = standard_normal((*w.shape[:-1], posterior.dim), mu, generator)
    fixed = mu.detach()
    tangent = functional.normalize(noise - (noise * fixed).sum(-1, keepdim=True) * fixed, dim=-1)
    tangent = tangent - (tangent * mu).sum(-1, keepdim=True) * mu
    return w * mu + torch.sqrt((1.0 - w * w).clamp(min=1e-14)) * tangent


def _paper_cosine(kappa: Tensor, dim: int, generator: torch.Generator | None) -> Tensor:
    """Cosines mu.z in float64, one for each kappa, with a gradient through the envelope alone."""
    point = torch.isinf(kappa)
    k, n = torch.where(point, 1.0, kappa).double(), dim - 1.0
    root = torch.sqrt(4.0 * k * k + n * n)
    blend = (k - 10.0).clamp(0.0, 1.0)
    b = blend * n / (4.0 * k.clamp(min=1.0)) + (1.0 - blend) * (root - 2.0 * k) / n
    a = 0.25 * (n + 2.0 * k + root)
    with torch.no_grad():
        top = 4.0 * a * b / (1.0 + b) - n * math.log(n)
        accepted = torch.full_like(k, 0.5)
        left = ~torch.isnan(k)  # of which no proposal would ever be accepted
        while left.any():
            g = standard_normal((int(left.sum()), dim), k, generator)
            share = 0.5 * (1.0 + g[:, 0] / g.norm(dim=-1))  # Beta((d - 1) / 2, (d - 1) / 2)
            here_a, here_b = a[left], b[left]
            q = 2.0 * here_a * here_b / (1.0 - (1.0 - here_b) * share)
            uniform = torch.special.ndtr(standard_normal(q.shape, k, generator)).clamp(min=1e-300)
            accept = n * q.log() - q + top[left] > uniform.log()
            place = left.nonzero(as_tuple=True)
            accepted[tuple(index[accept] for index in place)] = share[accept]
            left[tuple(index[accept] for index in place)] = False
    w = (1.0 - (1.0 + b) * accepted) / (1.0 - (1.0 - b) * accepted)
    return torch.where(point, 1.0, torch.where(torch.isnan(k), k, w))
