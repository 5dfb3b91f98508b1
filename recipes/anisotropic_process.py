"""The process that makes the data of AnInfoNCE's controlled experiment: latents on a sphere, positives, and the mixing.

z is uniform on the sphere S^(n-1); its positive y has the density exp(-1/2 (y-z)' Lambda (y-z)) on the same sphere, with a
diagonal Lambda; the encoder sees g(z) and g(y), g an invertible network.

Source: Rusak et al., arXiv 2407.00143, and its code.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.distributed import Launch
from ..adapters.errors import OptionError
from ..adapters.training_loop import step_generator
from .encoders import mlp
from .running import row_blocks

Sampler = Literal["exact", "shell"]
Layout = Literal["bimodal", "linear"]
POOL = 25_000
"""Random matrices among which the best condition number sets the bar for those of the mixing."""
ATTEMPTS = 100
"""Pools that are searched for a matrix below the bar: on average one holds one."""
BLOCKS = 8
"""Parts of a batch, each of its own random numbers: 1, 2, 4 or 8 processes see the same batch."""
AHEAD = 32
"""Steps whose pairs are drawn at once, which takes a fourth of the time of drawing each on its own."""
TYPICAL = 0.7
"""Of n - 1, added to the precision: acceptance 0.62 to 0.85 in 2 to 50 dimensions at precisions 5 to 25."""


def precisions(layout: Layout, dim: int, lowest: float, highest: float, families: int = 1) -> Tensor:
    """The diagonals Lambda, float64 [families, dim], of the families of positives.

    "bimodal": `highest` in the first half of the dimensions and `lowest` in the others; a second family halves each half
    again, a third each quarter, so that ceil(log2 dim) families tell all dimensions apart. "linear": evenly spaced from
    `lowest` to `highest`, one family only. Raises OptionError for a range, a dimension or families that do not fit.
    """
    if dim < 2 or not 0 < lowest <= highest < math.inf:
        raise OptionError(
            f"{dim} dimensions with precisions {lowest} to {highest}: expected 2 or more, and a range above 0"
        )
    most = 1 if layout == "linear" else math.ceil(math.log2(dim))
    if not 1 <= families <= most:
        raise OptionError(f"families={families}: {layout} precisions in {dim} dimensions have from 1 to {most}")
    if layout == "linear":
        return torch.linspace(lowest, highest, dim, dtype=torch.float64)[None]
    leaf = torch.arange(dim) * 2**families // dim
    bit = torch.stack([leaf >> families - 1 - k & 1 for k in range(families)])
    return torch.where(bit == 0, highest, lowest).double()


def uniform_directions(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Points uniform on the sphere S^(dim-1), float64 [rows, dim]."""
    return functional.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=-1)


class Conditional:
    """Positives of anchors on the sphere: m ~ N(c, P^-1) is proposed, and y = m / |m| kept by chance.

    "exact": y has the density f(y) = exp(-1/2 (y-z)' Lambda (y-z)). A constant t added to Lambda changes nothing on the
    sphere, so P = Lambda + t and c = P^-1 Lambda z propose f(y) I(y), where I integrates r^(n-1) exp(-a (r^2 - 1) / 2 + b
    (r - 1)) over the radius r, a = y' P y, b = y' Lambda z. y is kept with probability L / I(y), L the least I. That is
    known: log I is convex in (a, b), and where b minimises it the mean of r is 1, so that of r^2 is above 1 and the minimum
    falls with a: L is the minimum over b at the largest a. t makes 1 a typical radius, where I changes least.

    "shell": as the paper's code. P = Lambda, c = z, and m is kept if | |m| - 1 | < `threshold`; the density is f(y) times
    the part of I(y) in that shell, and tends to f as the shell gets thin.

    Args:
        precision: the diagonal of Lambda, [n], n >= 2, > 0.
    Attributes: proposed, kept: rows so far; acceptance is their ratio.
    Source of "exact": worked out here; of "shell": arXiv 2407.00143 (code).
    """

    def __init__(self, precision: Tensor, sampler: Sampler = "exact", threshold: float = 0.1) -> None:
        self.precision, self.sampler, self.threshold = precision.double(), sampler, threshold
        self.radial: RadialIntegral | None = None
        self.proposed = self.kept = 0
        shift = 0.0
        if sampler == "exact":
            shift = TYPICAL * (len(precision) - 1)
            self.radial = RadialIntegral(len(precision), float(precision.max()) + shift)
        elif not 0 < threshold <= 1:
            raise OptionError(f"threshold={threshold} was given; the shell's half width is above 0, and at most 1")
        self.tight = self.precision + shift

    @property
    def acceptance(self) -> float:
        return self.kept / max(self.proposed, 1)

    def sample(self, anchor: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A positive, float64 [N, n], for each anchor [N, n] of unit length; only rows still missing are drawn again."""
        pull = anchor.double() * self.precision
        center, spread = pull / self.tight, self.tight.rsqrt()
        found = torch.empty_like(pull)
        missing = torch.arange(len(pull))
        while len(missing):
            noise = torch.randn(len(missing), pull.shape[1], dtype=pull.dtype, generator=generator)
            m = center[missing] + spread * noise
            length = m.norm(dim=-1)
            y = m / length[:, None]
            if self.radial is None:
                keep = (length - 1).abs() < self.threshold
            else:
                chance = torch.rand(len(missing), dtype=pull.dtype, generator=generator)
                a, b = (y.square() * self.tight).sum(-1), (y * pull[missing]).sum(-1)
                keep = chance.log() < self.radial.least - torch.from_numpy(self.radial(a.numpy(), b.numpy()))
            found[missing[keep]] = y[keep]
            self.proposed += len(missing)
            self.kept += int(keep.sum())
            missing = missing[~keep]
        return found

    def log_density(self, y: Tensor, anchor: Tensor) -> Tensor:
        """log f, [N], of points [N, n] given anchors [N, n], without its constant."""
        return -((y - anchor).square() * self.precision).sum(-1) / 2


class RadialIntegral:
    """log of the integral of r^(n-1) exp(-a (r^2 - 1) / 2 + b (r - 1)) over r > 0, to 1e-9.

    0 < a <= `largest` and b^2 <= a `largest`, both float64 of any shape; n >= 2 is `dim`.
    It is a function of one variable, for which there is a Chebyshev series: with s = r sqrt(a) and x = b / sqrt(a), it is
    log K(x) - n/2 log a + a/2 - b, K(x) the integral of s^(n-1) exp(-s^2/2 + x s).

    Attributes: least, a bound below all values: the minimum over b at a = `largest`. Integrating the derivative of
        r^n exp(...) gives b = a E r^2 - n where E r = 1, so the minimum lies between a - n and a.
    """

    def __init__(self, dim: int, largest: float) -> None:
        self.dim = dim
        edge = max(largest, dim - largest) / math.sqrt(largest)
        reach = edge + math.sqrt(dim) + 10  # beyond it lies less than e^-50
        node, weight = np.polynomial.legendre.leggauss(64 + 8 * math.ceil(reach))  # the integrand's width is about 1
        s = (node + 1) / 2 * reach
        fixed = np.log(weight * reach / 2) + (dim - 1) * np.log(s) - s * s / 2
        self.log_k = np.polynomial.Chebyshev.interpolate(
            lambda x: logsumexp(fixed + np.multiply.outer(x, s), axis=-1), 40 + 4 * int(edge), [-edge, edge]
        )
        a = np.array(largest)
        bounds = (largest - dim, largest)
        least = minimize_scalar(lambda b: float(self(a, np.array(b))), bounds=bounds, method="bounded")
        self.least = float(least.fun) - 1e-9

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(self.log_k(b / np.sqrt(a)) - self.dim / 2 * np.log(a) + a / 2 - b)


def mixing(dim: int, layers: int, generator: torch.Generator, pool: int = POOL) -> nn.Sequential:
    """The invertible network from latents to what the encoder sees: [N, dim] -> [N, dim], frozen.

    Linear layers without bias, leaky ReLU of slope 0.2 between them. Weights are uniform on [-1, 1] with columns of unit
    length, and their condition numbers at most the least one of `pool` such matrices. Raises OptionError for layers < 1.
    """
    if layers < 1 or pool < 1:
        raise OptionError(
            f"a mixing of {layers} layers from a pool of {pool} was asked for; expected 1 or more of both"
        )
    network = mlp([dim] * (layers + 1), slope=0.2, bias=False).requires_grad_(False)
    bar = float(_candidates(dim, pool, generator)[1].min())
    found: list[Tensor] = []
    for _ in range(ATTEMPTS * layers):
        matrix, condition = _candidates(dim, pool, generator)
        found += [*matrix[condition <= bar]]
        if len(found) >= layers:
            break
    else:
        raise OptionError(
            f"no {layers} matrices of condition {bar:.3f} were found: give another seed or a smaller pool"
        )
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer, weight in zip(linear, found[:layers], strict=True):
        layer.weight.copy_(weight)
    return network


class Pairs:
    """What the encoder sees at a step, counted from 0: inputs of anchors and of positives, float32 [N, families, n] each.

    Args:
        precision: [families, n]. network: the mixing. batch_size: rows of all processes; N are this one's.
        position: seed and stream of the random numbers.
    Attributes: acceptance: of proposals of positives so far.
    Raises: OptionError if the launch cannot share the batch.
    """

    def __init__(
        self,
        precision: Tensor,
        network: nn.Module,
        batch_size: int,
        launch: Launch,
        position: tuple[int, ...],
        sampler: Sampler = "exact",
        threshold: float = 0.1,
    ) -> None:
        if batch_size < 2 * BLOCKS or batch_size % BLOCKS or BLOCKS % launch.world:
            raise OptionError(
                f"a batch of {batch_size} pairs for {launch.world} process(es): expected a multiple of {BLOCKS} from "
                f"{2 * BLOCKS} on, and 1, 2, 4 or 8 processes"
            )
        self.each = batch_size // BLOCKS
        self.blocks = row_blocks(batch_size, self.each, launch)
        self.conditionals = [Conditional(one, sampler, threshold) for one in precision]
        self.network, self.position, self.chunk = network, position, -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        chunk, place = divmod(step, AHEAD)
        if chunk != self.chunk:
            self.chunk, self.drawn = chunk, self._draw(chunk)
        anchor, positive = self.drawn[place]
        return anchor, positive

    @property
    def acceptance(self) -> float:
        return sum(one.kept for one in self.conditionals) / max(sum(one.proposed for one in self.conditionals), 1)

    def _draw(self, chunk: int) -> Tensor:
        """[AHEAD, 2, N, families, n]"""
        rows, families = AHEAD * self.each, len(self.conditionals)
        parts = []
        for block in self.blocks:
            generator = step_generator(*self.position, chunk, block)
            for conditional in self.conditionals:
                z = uniform_directions(rows, len(conditional.precision), generator)
                parts.append(torch.stack([z, conditional.sample(z, generator)]).view(2, AHEAD, self.each, -1))
        with torch.autocast("cpu", enabled=False):  # the data are of full precision whatever the training is of
            seen = self.network(torch.stack(parts).float())
        seen = seen.unflatten(0, (len(self.blocks), families))  # [blocks, families, 2, AHEAD, each, n]
        return seen.permute(3, 2, 0, 4, 1, 5).flatten(2, 3)


def _candidates(dim: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random matrices [count, dim, dim] and their condition numbers."""
    matrix = torch.rand(count, dim, dim, dtype=torch.float64, generator=generator) * 2 - 1
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    singular = torch.linalg.svdvals(matrix)
    return matrix, singular[:, 0] / singular[:, -1]
