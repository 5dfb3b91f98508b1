"""Where the samples of a loss get their random numbers: independent, in opposite pairs, or from Sobol points."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..vmf import standard_normal


class Draws:
    """Random numbers from a generator, whatever its device; `antithetic` pairs samples of opposite directions."""

    def __init__(self, like: Tensor, samples: int, antithetic: bool, generator: torch.Generator | None) -> None:
        self.like, self.samples, self.antithetic, self.generator = like, samples, antithetic, generator

    def restart(self) -> None:
        """To be called before each block of rows."""

    def normal(self, *shape: int) -> Tensor:
        return standard_normal(shape, self.like, self.generator)

    def uniform(self, *shape: int) -> Tensor:
        device = self.like.device if self.generator is None else self.generator.device
        return torch.rand(shape, dtype=self.like.dtype, device=device, generator=self.generator).to(self.like.device)

    def paired(self, draw: Callable[[int], Tensor]) -> Tensor:
        """What `draw` gives for a number of samples, the second half of them the first's negatives if antithetic."""
        if not self.antithetic:
            return draw(self.samples)
        half = draw((self.samples + 1) // 2)
        return torch.cat([half, -half], -1)[..., : self.samples]


class SobolDraws(Draws):
    """Sobol points, shifted at random for each row: each sample alone is as random as ever, together they are even.

    Args:
        columns: how many the loss compares with an anchor; with the dimension they say how many numbers a sample takes.
    """

    def __init__(self, like: Tensor, samples: int, columns: int, generator: torch.Generator | None) -> None:
        super().__init__(like, samples, False, generator)
        self.numbers = min(1 + like.shape[-1] + 3 * columns, SobolEngine.MAXDIM)
        self.used = 0

    def restart(self) -> None:
        self.used = 0

    def normal(self, *shape: int) -> Tensor:
        edge = torch.finfo(self.like.dtype).eps
        return torch.special.ndtri(self.uniform(*shape).clamp_(edge, 1.0 - edge))

    def uniform(self, *shape: int) -> Tensor:
        """Numbers of shape [rows, ..., samples]; independent ones where more are asked for than Sobol points have."""
        each = math.prod(shape[1:-1])
        first, self.used = self.used, self.used + each
        if self.used > self.numbers:
            return super().uniform(*shape)
        shift = super().uniform(shape[0], each, 1)
        points = _sobol_points(self.numbers, shape[-1])[first : self.used].to(shift)
        return torch.add(shift, points).frac_().reshape(shape)


@lru_cache(maxsize=8)
def _sobol_points(numbers: int, samples: int) -> Tensor:
    """Scrambled Sobol points [numbers, samples] in float64."""
    with torch.inference_mode(False):
        return SobolEngine(numbers, scramble=True, seed=0).draw(samples, dtype=torch.float64).T.contiguous()
