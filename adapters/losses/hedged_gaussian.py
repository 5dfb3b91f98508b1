"""Hedged instance embeddings with Gaussian posteriors: the chance of a match, kept honest by a divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from ..errors import OptionError
from ..vmf import standard_normal
from .sampled import check_positive


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
        normalized: whether samples are first put on the unit sphere. With `squared` and "mean-log" this is the version
            Warburg et al. compare with, whose code subtracts a divergence that is none (unbounded below as the variance
            shrinks: -57.9 where KL is 26.7).
        reading: "log-mean" or "mean-log".
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
    ) -> None:
        super().__init__()
        check_positive("HedgedGaussian", scale=scale, n_samples=n_samples)
        if not math.isfinite(shift) or not 0 <= kl_weight < math.inf:
            raise OptionError(
                f"HedgedGaussian(shift={shift}, kl_weight={kl_weight}): both must be finite, and the weight >= 0"
            )
        if reading not in ("mean-log", "log-mean"):
            raise OptionError(f"HedgedGaussian(reading={reading!r}): expected 'mean-log' or 'log-mean'")
        self.n_samples, self.kl_weight, self.reading = n_samples, kl_weight, reading
        self.squared, self.normalized = squared, normalized
        self.fixed_scale, self.fixed_shift = float(scale), float(shift)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learnable else None
        self.learnt_shift = nn.Parameter(torch.tensor(float(shift))) if learnable else None

    @property
    def scale(self) -> Tensor | float:
        return self.fixed_scale if self.log_scale is None else self.log_scale.exp()

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
            mean, std = _moments(positive)
            far = Normal(mean.roll(1, 0)[:, None], std.roll(1, 0)[:, None]) if negatives is None else negatives
            z, close, other = (self._samples(p, generator) for p in (anchor, positive, far))
            loss = -self._log_chance(z, close, 1.0) - self._log_chance(z, other, -1.0)
            return loss + self.kl_weight * (standard_divergence(anchor).mean() + standard_divergence(positive).mean())

    def _samples(self, posterior: Normal, generator: torch.Generator | None) -> Tensor:
        """Samples [B, ..., K, D]."""
        mean, std = _moments(posterior)
        noise = standard_normal((*mean.shape[:-1], self.n_samples, mean.shape[-1]), mean, generator)
        return mean.unsqueeze(-2) + std.unsqueeze(-2) * noise

    def _log_chance(self, z: Tensor, other: Tensor, sign: float) -> Tensor:
        """Mean of L(p) (sign 1) or L(1 - p) (sign -1) over rows and columns: samples [B, K, D] and [B, ..., K, D]."""
        if self.normalized:
            z, other = functional.normalize(z, dim=-1), functional.normalize(other, dim=-1)
        rows, samples, dim = z.shape
        apart = torch.cdist(z, other.reshape(rows, -1, dim), compute_mode="donot_use_mm_for_euclid_dist")
        if self.squared:
            apart = apart.square()
        log = functional.logsigmoid(sign * (self.shift - self.scale * apart))
        if self.reading == "mean-log":
            return log.mean()
        pairs = log.reshape(rows, samples, -1, other.shape[-2]).transpose(1, 2).flatten(2)
        return (pairs.logsumexp(-1) - math.log(pairs.shape[-1])).mean()


def standard_divergence(posterior: Normal) -> Tensor:
    """KL(N(mean, std^2) || N(0, I)), summed over the last dimension: [...] for a batch shape [..., D]."""
    mean, std = _moments(posterior)
    return 0.5 * (mean.square() + std.square() - 1.0).sum(-1) - std.log().sum(-1)


def _moments(posterior: Normal) -> tuple[Tensor, Tensor]:
    mean, std = posterior.mean, posterior.stddev
    return (mean, std) if mean.dtype == torch.float64 else (mean.float(), std.float())


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
