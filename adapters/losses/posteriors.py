"""What the losses of three posteriors share: which arguments fit, and which columns an anchor is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError
from ..vmf import VonMisesFisher


def check_posteriors(
    name: str, anchor: VonMisesFisher, positive: VonMisesFisher, negatives: VonMisesFisher | None
) -> None:
    """Refuses anything but batch shapes [B], [B] and [B, M] (or no negatives, and B > 1) in one dimension."""
    if not all(isinstance(x, VonMisesFisher) for x in (anchor, positive, negatives) if x is not None):
        given = [type(x).__name__ for x in (anchor, positive, negatives)]
        raise OptionError(f"{name} expects posteriors, VonMisesFisher(mean_direction, concentration); given {given}")
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
            f"{name} expects distributions of batch shapes [B], [B] and [B, M] in one dimension (without negatives, "
            f"B > 1); given {shapes} in dimensions {sorted(dims)}"
        )


def columns(positive: VonMisesFisher, negatives: VonMisesFisher | None, positives: int = 1) -> tuple[Tensor, Tensor]:
    """Directions [B, J, d] and concentrations [B, J]: the positive (`positives` times), then the negatives.

    Without negatives the positives rolled by one row stand in for them.
    """
    mu = positive.mean_direction[:, None]
    kappa = positive.concentration[:, None]
    close = [(mu, kappa)] * positives
    if negatives is None:
        far = (mu.roll(1, 0), kappa.roll(1, 0))
    else:
        far = (negatives.mean_direction, negatives.concentration)
    directions, concentrations = zip(*close, far, strict=True)
    return torch.cat(directions, 1), torch.cat(concentrations, 1)
