"""Where the samples of a loss get their random numbers: independent, in opposite pairs, or from Sobol points."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..vmf import standard_normal
from ..vmf_table import both_signs


class Pairs(NamedTuple):
    """How many samples there are, and whether in pairs of opposite random numbers, of which half are then drawn."""

    samples: int
    antithetic: bool

    def directions(self, drawn: Tensor) -> Tensor:
        """Those of all samples [..., S], from those drawn."""
        if not self.antithetic:
            return drawn
        return both_signs(drawn.unflatten(-1, (2, -1))).flatten(-3)[..., : self.samples]


class Draws:
    """Random numbers from a generator, whatever its device, for samples that may come in opposite pairs.

    Where `antithetic`, half as many are drawn as there are samples, in two quarters (a, b). Scores of quantiles stand for
    samples (a, b, -a, -b), directions for (a, -a, b, -b): no two samples are opposite in both, so that what is even in
    one of them still averages out. Each sample alone is as random as ever.
    """

    def __init__(self, like: Tensor, samples: int, antithetic: bool, generator: torch.Generator | None) -> None:
        self.like, self.generator, self.pairs = like, generator, Pairs(samples, antithetic)
        self.drawn = 2 * math.ceil(samples / 4) if antithetic else samples

    def restart(self) -> None:
        """To be called before each block of rows."""

    def normal(self, *shape: int) -> Tensor:
        """Normal scores [*shape, drawn]."""
        return standard_normal((*shape, self.drawn), self.like, self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return _standard_uniform((*shape, self.drawn), self.like, self.generator)


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
        each = math.prod(shape[1:])
        first, self.used = self.used, self.used + each
        if self.used > self.numbers:
            return super().uniform(*shape)
        points = _sobol_points(self.numbers, self.pairs.samples)[first : self.used].to(self.like)
        shift = _standard_uniform((shape[0], each, 1), self.like, self.generator)
        return torch.add(shift, points).frac_().reshape(*shape, self.pairs.samples)


@lru_cache(maxsize=8)
def _sobol_points(numbers: int, samples: int) -> Tensor:
    """Scrambled Sobol points [numbers, samples] in float64."""
    with torch.inference_mode(False):
        return SobolEngine(numbers, scramble=True, seed=0).draw(samples, dtype=torch.float64).T.contiguous()


def _standard_uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
