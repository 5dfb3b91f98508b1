"""Hedged instance embeddings on the sphere: the probability that two images match, averaged over samples."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from ..vmf import VonMisesFisher
from .common import check_counts, check_positive, log_parameter, number
from .sampled import Sampling, sampled_loss


class HedgedInstance(nn.Module):
    """Logistic loss on whether two images match, p(z, z') = sigmoid(scale z.z' + shift), over posterior samples.

    loss = mean_i [ -L(p(z_i, z_i+)) - weight mean_m L(1 - p(z_i, z_m-)) ]. L averages over samples, in one of two
    readings: "mean-log" is mean_s log p_s (the code of Kirchhof et al.: a bound, without bias in the samples), and
    "log-mean" is log mean_s p_s (hedged instance embeddings proper: the chance of a match under the posteriors).

    Args:
        scale: a > 0. The p of a match can only come near 1 if scale + shift is well above 0.
        shift: b, any number.
        n_samples: Monte-Carlo samples for each posterior.
        learnable: whether scale (through its logarithm) and shift are parameters.
        reading: "mean-log" or "log-mean".
        negative_weight: of the negatives' mean; None is 1 / M, as in the authors' code, in which more negatives so
            count for less. 1 weighs positive and negatives alike.
        antithetic, sobol, compiled: as in `MCInfoNCE`.
        reference: as the authors' code: its sampler, which misses its concentration above kappa = 10 unless kappa >> d.
    Source: Oh et al., ICLR 2019, arXiv 1810.00319; on the sphere Kirchhof et al., ICML 2023, arXiv 2302.02865.
    """

    def __init__(
        self,
        scale: float = 1.0,
        shift: float = 0.0,
        n_samples: int = 16,
        learnable: bool = False,
        *,
        reading: str = "mean-log",
        negative_weight: float | None = None,
        antithetic: bool = True,
        sobol: bool = False,
        reference: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        check_positive("HedgedInstance", scale=scale)
        check_counts("HedgedInstance", n_samples=n_samples)
        if not math.isfinite(shift) or not (negative_weight is None or 0 < negative_weight < math.inf):
            raise OptionError(
                f"HedgedInstance(shift={shift}, negative_weight={negative_weight}): both must be finite, and the "
                "weight positive (or None)"
            )
        if reading not in ("mean-log", "log-mean"):
            raise OptionError(f"HedgedInstance(reading={reading!r}): expected 'mean-log' or 'log-mean'")
        if reference and (sobol or compiled):
            raise OptionError(
                f"HedgedInstance(sobol={sobol}, compiled={compiled}, reference=True): the authors' code has no Sobol points, "
                "and is not compiled; leave both at False"
            )
        self.n_samples, self.reading, self.negative_weight = n_samples, reading, negative_weight
        self.antithetic, self.sobol, self.reference, self.compiled = antithetic, sobol, reference, compiled
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
        anchor: VonMisesFisher,
        positive: VonMisesFisher,
        negatives: VonMisesFisher | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scalar loss; batch shapes [B], [B] and [B, M] (None: the positives rolled by one row)."""
        sampling = Sampling(self.n_samples, self.antithetic, self.sobol, reference=self.reference)
        rows = partial(_rows, weight=self.negative_weight, reading=self.reading)
        posteriors = (anchor, positive, negatives)
        parameters = (self.scale, self.shift)
        return sampled_loss("HedgedInstance", rows, parameters, posteriors, sampling, generator, self.compiled)


def _rows(
    cosine: Tensor, scale: Tensor, shift: Tensor, weight: float | None = None, reading: str = "mean-log"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss of the rows of sampled cosines [R, J, S], and its gradients for the cosines, scale and shift.

    Column 0 is the positive. 1 - sigmoid(x) = sigmoid(-x), so all columns are logarithms of sigmoids, never of 1 - p.
    """
    _, count, samples = cosine.shape
    sign = cosine.new_full((1, count, 1), -1.0)
    sign[:, 0] = 1.0
    share = cosine.new_full((1, count, 1), (1.0 / (count - 1) if weight is None else weight) / (count - 1))
    share[:, 0] = 1.0
    odds = torch.addcmul(shift, cosine, scale).mul_(sign)
    log = functional.logsigmoid(odds)
    slope = torch.sigmoid(odds.neg_()).mul_(share)
    if reading == "mean-log":
        loss = -(log.sum((0, 2)) * share.flatten()).sum() / samples
        slope.div_(samples)
    else:
        loss = -((log.logsumexp(2) - math.log(samples)).sum(0) * share.flatten()).sum()
        slope.mul_(torch.softmax(log, 2))
    slope.mul_(-sign)
    return loss, slope * scale, (slope * cosine).sum(-1).sum(), slope.sum(-1).sum()
