"""TaU: temperature as uncertainty in contrastive learning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError

FLOOR = math.log(1e-6)  # added to each denominator, as the paper's code does; keeps it positive


def temperature(raw: Tensor, base_temperature: float | Tensor) -> Tensor:
    """The temperature t / sigmoid(raw) in (t, inf) of a raw output, any shape: higher = less certain; always finite."""
    return base_temperature * (1.0 + torch.exp(-raw.clamp(min=-80.0)))


class TaU(nn.Module):
    """SimCLR's loss with a temperature for each anchor, t / sigmoid(r): it scales the anchor's whole row of cosines.

    loss = -mean_i log(P_i / D_i) over the 2N anchors, P_i = exp(sigmoid(r_i) c_i+ / t) and D_i the sum of the same over
    the negatives. Without the positive in D_i (the paper's setting) the loss has no lower bound, and easy pairs drive
    their temperature down without end.

    Args:
        base_temperature: t > 0, the lowest temperature.
        include_positive: whether the positive is in the denominator, as in SimCLR.
        reference: as the paper's code, in which the numerators of view-2 anchors use the temperature of view 1.
    Source: Zhang et al., arXiv 2110.04403, equation of TaU-SimCLR.
    """

    def __init__(self, base_temperature: float = 0.1, include_positive: bool = False, reference: bool = False) -> None:
        super().__init__()
        if not 0 < base_temperature < math.inf:
            raise OptionError(f"TaU: base_temperature={base_temperature} was given; expected a positive number")
        self.base_temperature = base_temperature
        self.include_positive = include_positive
        self.reference = reference

    def forward(self, z1: Tensor, z2: Tensor, r1: Tensor, r2: Tensor, *, exclude: Tensor | None = None) -> Tensor:
        """Scalar loss.

        Args:
            z1, z2: embeddings of the two views [N, D], N >= 2, of any length.
            r1, r2: raw outputs [N]; `temperature` makes temperatures of them.
            exclude: bool [2N, 2N] over the rows of (z1, z2), True where a column must not count as a negative of a row
                (same label). Rows left without any negative are left out of the mean.
        Raises: OptionError if the shapes do not fit.
        """
        n = len(z1)
        if z1.ndim != 2 or n < 2 or z2.shape != z1.shape or r1.shape != (n,) or r2.shape != (n,):
            shapes = ", ".join(str(tuple(x.shape)) for x in (z1, z2, r1, r2))
            raise OptionError(f"TaU expects [N, D], [N, D], [N], [N] with N >= 2; the shapes given are {shapes}")
        with torch.autocast(z1.device.type, enabled=False):
            z = functional.normalize(_full(torch.cat([z1, z2])), dim=-1)
            return self._loss(z, torch.sigmoid(_full(torch.cat([r1, r2]))) / self.base_temperature, exclude)

    def _loss(self, z: Tensor, scale: Tensor, exclude: Tensor | None) -> Tensor:
        """From both views' directions [2N, D] and inverse temperatures [2N]."""
        n = len(z) // 2
        cosine = (z[:n] * z[n:]).sum(-1).repeat(2)
        close = cosine * (scale[:n].repeat(2) if self.reference else scale)
        far = (z * scale[:, None]) @ z.T
        barred = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)  # each row's own column and its positive
        if exclude is not None:
            barred = barred | exclude
        with torch.no_grad():  # a softmax of 0 has no gradient, so autograd needs no record of this
            far.masked_fill_(barred, -1e30)  # finite: a row of nothing else must not make a NaN
        negatives = torch.logaddexp(far.logsumexp(1), far.new_tensor(FLOOR))
        if self.include_positive:
            negatives = torch.logaddexp(negatives, cosine * scale)
        used = (~barred).any(1)
        return torch.where(used, negatives - close, 0.0).sum() / used.sum().clamp(min=1)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
