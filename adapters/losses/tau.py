"""TaU: temperature as uncertainty in contrastive learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..numerics import full
from .common import check_positive
from .contrast import Terms, contrast, unit_views

FLOOR = 1e-6  # added to each denominator, as in the paper's code


def temperature(raw: Tensor, base_temperature: float | Tensor) -> Tensor:
    """The temperature t / sigmoid(raw) in (t, inf) of a raw output, any shape: higher = less certain; always finite.

    At least float32, whose range it needs.
    """
    return base_temperature * (1.0 + torch.exp(-full(raw).clamp(min=-80.0)))


class TaU(nn.Module):
    """SimCLR's loss with a temperature for each anchor, t / sigmoid(r): it scales the anchor's whole row of cosines.

    loss = mean_i log(D_i / P_i) over the 2N anchors of both views, P_i = exp(sigmoid(r_i) c_i+ / t), D_i = 1e-6 + the sum
    of the same over the negatives. Each anchor uses its own temperature, so swapping the views changes nothing.

    Args:
        base_temperature: t > 0, the lowest temperature.
        include_positive: whether D_i has P_i too, as SimCLR's. Without it (the paper's setting) the loss has no lower
            bound, and easy pairs drive their temperature down to t.
        reference: as the paper's code, in which the numerators P of view-2 anchors use the temperature of view 1.
    Source: Zhang et al., arXiv 2110.04403, equation of TaU-SimCLR.
    """

    def __init__(self, base_temperature: float = 0.1, include_positive: bool = False, reference: bool = False) -> None:
        super().__init__()
        check_positive("TaU", base_temperature=base_temperature)
        self.base_temperature = base_temperature
        self.terms = Terms(include_positive=include_positive, floor=FLOOR)
        self.reference = reference

    def forward(self, z1: Tensor, z2: Tensor, r1: Tensor, r2: Tensor, *, exclude: Tensor | None = None) -> Tensor:
        """Scalar loss.

        Args:
            z1, z2: embeddings of the two views [N, D], N >= 2, of any length.
            r1, r2: raw outputs [N]; `temperature` makes temperatures of them.
            exclude: bool [2N, 2N] over the rows of (z1, z2), True where a column must not count as a negative of a row
                (same label). Rows left without any negative are left out of the mean.
        Raises: OptionError if the shapes do not fit, or `exclude` is given to the reference form, which has no such thing.
        """
        n = len(z1)
        if z1.ndim != 2 or n < 2 or z2.shape != z1.shape or r1.shape != (n,) or r2.shape != (n,):
            shapes = ", ".join(str(tuple(x.shape)) for x in (z1, z2, r1, r2))
            raise OptionError(f"TaU expects [N, D], [N, D], [N], [N] with N >= 2; the shapes given are {shapes}")
        fits = exclude is None or (exclude.shape == (2 * n, 2 * n) and exclude.dtype == torch.bool)
        if exclude is not None and (self.reference or not fits):
            raise OptionError(
                f"TaU: exclude {tuple(exclude.shape)} {exclude.dtype} was given; expected bool [2N, 2N] for N = {n}, "
                "and none with reference=True"
            )
        with torch.autocast(z1.device.type, enabled=False):
            u1, u2 = unit_views("TaU", z1, z2)
            scale = torch.sigmoid(full(torch.cat([r1, r2]))) / self.base_temperature
            cosine = (u1 * u2).sum(-1).repeat(2)
            loss = contrast(torch.cat([u1, u2]), scale, cosine * scale, self.terms, exclude)
            if self.reference:
                loss = loss + (cosine[n:] * (scale[n:] - scale[:n])).sum() / (2 * n)
            return loss
