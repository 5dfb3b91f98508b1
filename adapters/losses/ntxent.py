"""NT-Xent: SimCLR's contrastive loss with one temperature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import check_positive, log_parameter, number
from .contrast import Terms, contrast, unit_views


class NTXent(nn.Module):
    """Cross-entropy of finding an image's other view among all other rows of the batch, by cosine over a temperature.

    loss = mean_i -log exp(c_i+ / t) / D_i over the 2N rows of both views; D_i sums exp(c_ij / t) over the 2N - 2
    negatives and, as in SimCLR, over the positive too. Swapping the views changes nothing.

    Args:
        temperature: t > 0; with `learnable`, at the start.
        include_positive: whether D_i has the positive's term. Without it (decoupled contrastive learning) easy pairs no
            longer weaken the negatives' gradient, and the loss may be below 0.
        reference: as TaU's code for SimCLR, which adds 1e-6 to D_i.
        learnable: whether t is a parameter (through its logarithm).
    Source: Chen et al., arXiv 2002.05709; without the positive, Yeh et al., arXiv 2110.06848.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        include_positive: bool = True,
        reference: bool = False,
        *,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        check_positive("NTXent", temperature=temperature)
        self.log_temperature = log_parameter(temperature, learnable)
        self.fixed_temperature = float(temperature)
        self.terms = Terms(include_positive=include_positive, floor=1e-6 if reference else 0.0)

    @property
    def temperature(self) -> Tensor | float:
        return number(self.log_temperature, self.fixed_temperature)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Scalar loss, at least float32, of two views' embeddings [N, D], N >= 2, of any length.

        Raises: OptionError if the shapes do not fit.
        """
        with torch.autocast(z1.device.type, enabled=False):
            u1, u2 = unit_views("NTXent", z1, z2)
            inverse = torch.as_tensor(1.0 / self.temperature, dtype=u1.dtype, device=u1.device)
            scale = inverse.expand(2 * len(u1))
            close = (u1 * u2).sum(-1) * inverse
            return contrast(torch.cat([u1, u2]), scale, close.repeat(2), self.terms)
