"""Class probabilities and uncertainties of a classifier whose logits are Gaussian.

The covariance of the logits comes as a structure's spread (`curvature`), so that no [B, C, C] array is formed where the
structure does not need one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import OptionError

CHUNK_BYTES = 32 * 2**20
PROBIT = math.pi / 8.0  # sigmoid(x) is close to Phi(x sqrt(pi / 8))


def probit(logits: Tensor, variance: Tensor) -> Tensor:
    """softmax(f / sqrt(1 + pi/8 v)): [B, C] predictive probabilities for logits of mean f and variance v, each [B, C].

    Source: MacKay 1992; Daxberger et al. 2021, appendix B.
    """
    return torch.softmax(logits / torch.sqrt(1.0 + PROBIT * variance), dim=-1)


def mean_field(logits: Tensor, variance: Tensor) -> Tensor:
    """p_k in proportion to 1 / sum_i exp(-(f_k - f_i) / sqrt(1 + pi/8 (v_k + v_i))): [B, C] probabilities.

    Every pair of classes is compared under the variance of both: C^2 numbers for an image, in chunks of rows.
    Source: Lu, Ie and Sha, Mean-field approximation to Gaussian-softmax integral, arXiv 2006.07584 (its MF1).
    """
    rows = max(1, CHUNK_BYTES // (logits.element_size() * logits.shape[1] ** 2))
    if not torch.compiler.is_compiling() and len(logits) > rows:
        parts = zip(logits.split(rows), variance.split(rows), strict=True)
        return torch.cat([mean_field(f, v) for f, v in parts])
    apart = logits.unsqueeze(1) - logits.unsqueeze(2)  # [b, k, i]: f_i - f_k
    apart = apart / torch.sqrt(1.0 + PROBIT * (variance.unsqueeze(1) + variance.unsqueeze(2)))
    return torch.softmax(-torch.logsumexp(apart, 2), dim=-1)


def laplace_bridge(logits: Tensor, variance: Tensor, sums: Tensor, normalised: bool = False) -> Tensor:
    """Mean [B, C] of the Dirichlet distribution that a Gaussian over logits maps to.

    A class counts in proportion to 1 / its variance, so where variances differ much between classes the mean is far from
    the predictive that sampling gives (by .65 on five classes with variances of .02 to .2): a fast Dirichlet for other
    uses, no default.

    Args:
        logits, variance: [B, C].
        sums: [B, C] covariance of each logit with the sum of all: logits are first put where they sum to 0.
        normalised: whether logits and variances are scaled to a mean variance of sqrt(C / 2), which keeps the map sane
            where variances are large (laplace-torch's "bridge_norm").
    Source: Hobbhahn et al., Fast predictive uncertainty for classification, UAI 2022, arXiv 2003.01227.
    """
    tiny = torch.finfo(logits.dtype).tiny
    classes, total = logits.shape[1], sums.sum(1, keepdim=True).clamp(min=tiny)
    mean = logits - sums * logits.sum(1, keepdim=True) / total
    variance = (variance - sums.square() / total).clamp(min=tiny)
    if normalised:
        scale = variance.mean(1, keepdim=True) / math.sqrt(classes / 2.0)
        mean, variance = mean / scale.sqrt(), variance / scale
    # alpha_k = (1 - 2/C + exp(f_k) sum_i exp(-f_i) / C^2) / v_k, as a logarithm
    spread = mean + torch.logsumexp(-mean, 1, keepdim=True) - 2.0 * math.log(classes)
    flat = spread.new_tensor(1.0 - 2.0 / classes).log()
    return torch.softmax(torch.logaddexp(flat, spread) - variance.log(), dim=-1)


def entropy(probabilities: Tensor) -> Tensor:
    """[B] entropy in nats of [B, C] probabilities; zeros count as zero, with a finite gradient."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=tiny).log()).sum(-1)


def normal_draws(classes: int, n_samples: int | None = None, seed: int = 0) -> Tensor:
    """[S, C] standard normal numbers, the same for the same seed: scrambled Sobol points and their mirror images.

    Mirrored, and scaled to unit variance in each coordinate, so that mean and variance of each are exact. The global
    random state is left alone. `n_samples` is even; by default 16384 / C, between 32 and 256: on CIFAR-10 features 256
    give the mutual information to 3 % (median) and 32 to 16 %. S draws cannot show more than log S nats.
    """
    n_samples = min(256, max(32, 8192 // classes * 2)) if n_samples is None else n_samples
    if n_samples < 2 or n_samples % 2:
        raise OptionError(f"n_samples={n_samples} was given; expected an even number (draws come in mirrored pairs)")
    engine = torch.quasirandom.SobolEngine(classes, scramble=True, seed=seed)
    points = engine.draw(n_samples // 2, dtype=torch.float64).clamp(1e-9, 1.0 - 1e-9)
    half = torch.special.ndtri(points)
    half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])


class MonteCarlo(NamedTuple):
    """Mean class probabilities [B, C], and the mutual information [B] of label and parameters in nats."""

    probabilities: Tensor
    mutual_information: Tensor


def monte_carlo(
    logits: Tensor, spread: Tensor, deviations: Callable[[Tensor, Tensor], Tensor], draws: Tensor
) -> MonteCarlo:
    """What fixed draws of C-dimensional logits say; weights are never drawn.

    Args:
        logits: [B, C] means.
        spread: of the logits, [B, ...], which `deviations(spread, draws)` turns into [B, S, C].
        draws: [S, C] standard normal numbers. Rows are taken in chunks, so that memory does not grow with B S C.

    The mutual information is the mean over draws of KL(p_s || mean of p), in a form that cannot be negative.
    """
    rows = max(1, CHUNK_BYTES // (draws.numel() * draws.element_size()))
    if not torch.compiler.is_compiling() and len(logits) > rows:  # an exported graph keeps its batch in one piece
        parts = zip(logits.split(rows), spread.split(rows), strict=True)
        found = [monte_carlo(f, v, deviations, draws) for f, v in parts]
        return MonteCarlo(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]))
    log_p = torch.log_softmax(logits.unsqueeze(1) + deviations(spread, draws), dim=-1)
    log_mean = torch.logsumexp(log_p, dim=1, keepdim=True) - math.log(len(draws))
    ratio = log_p - log_mean
    # sum_c (p_s - mean) is 0, so adding it changes nothing but makes every term p_s log r - p_s + mean >= 0
    terms = log_p.exp() * ratio - log_mean.exp() * torch.expm1(ratio)
    return MonteCarlo(log_mean.squeeze(1).exp(), terms.sum(-1).mean(1).clamp(min=0.0))
