"""Quantiles of the cosine mu.z under a von Mises-Fisher distribution: an exact solver, and the table samplers read.

Everything is in the half chord h = |z - mu| / 2 = sqrt((1 - w) / 2) of the cosine w, so that neither w = 1 - 2 h^2 nor
sqrt(1 - w^2) = 2 h sqrt(1 - h^2) cancels at large kappa, and in the normal score x of the probability, in which h grows
and is smooth. Scaled by exp(y / 2), y = asinh(2 kappa / (d - 1)), h hardly moves along y and has a limit, so that 171
nodes in y serve every kappa from 0 to infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

REACH = 6.0  # the table's range of normal scores: 2e-9 of the mass lies outside
SPACING, LAST = 0.1, 17.0  # nodes in y; beyond the last the scaled function is at its limit to 1e-7
SMOOTH_DIM = 8  # from here on one polynomial in x does; below it the range of x is cut in cells
WINDOW = 12.0  # standard deviations around the mode that hold all the mass
DEGREES = ((10, 12), (16, 10), (24, 8), (64, 6), (256, 5))  # dimension below which, degree
HIGHEST = 1.0 - 1e-6  # half chords end a little below 1, for sqrt(1 - h^2) is divided by
CHUNK = 1 << 14  # polynomials looked up at once, one for each kappa and cell
CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # where tables are built


class Quantile(NamedTuple):
    """Half chord, its derivative with respect to kappa, and the density of the angle there."""

    half_chord: Tensor
    slope: Tensor
    density: Tensor


@lru_cache(maxsize=1)
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return 0.5 * (nodes + 1.0), 0.5 * weights


def _mode(kappa: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Where the density of the angle arccos(mu.z) peaks, and the standard deviation its curvature there suggests."""
    n = dim - 2.0
    root = torch.sqrt(n * n + 4.0 * kappa * kappa) + n
    root = root.clamp(min=1e-300)
    sine = torch.sqrt(2.0 * n / root)
    angle = torch.atan2(sine, 2.0 * kappa / root)
    curvature = kappa * (2.0 * kappa / root) + (n / (sine * sine) if dim > 2 else 0.0)
    return angle, curvature.clamp(min=1e-2).rsqrt()


def _sides(angle: Tensor, kappa: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Unnormalised mass and first cosine moment below and above `angle`, and the density at it."""
    mode, spread = _mode(kappa, dim)
    nodes, weights = (torch.as_tensor(a, device=angle.device) for a in _legendre())

    def density(t: Tensor, k: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        cosine = -2.0 * torch.sin(0.5 * (t + m)) * torch.sin(0.5 * (t - m))  # cos t - cos m, without cancellation
        log = k * cosine
        if dim > 2:
            log = log + (dim - 2.0) * torch.log(torch.sin(t) / torch.sin(m))
        return torch.exp(log), cosine

    def side(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        t = start.unsqueeze(-1) + (end - start).unsqueeze(-1) * nodes
        p, cosine = density(t, kappa.unsqueeze(-1), mode.unsqueeze(-1))
        p = p * weights * (end - start).unsqueeze(-1)
        return p.sum(-1), (p * cosine).sum(-1)

    low = (torch.minimum(angle, mode) - WINDOW * spread).clamp(min=0.0)
    high = (torch.maximum(angle, mode) + WINDOW * spread).clamp(max=math.pi)
    return *side(low, angle), *side(angle, high), density(angle, kappa, mode)[0]


def solve_quantile(kappa: Tensor, score: Tensor, dim: int) -> Quantile:
    """Half chord whose probability of being undercut is Phi(score), by Newton's method on the normal score.

    kappa: float64 [...], finite, >= 0. score: float64 [...], within +-37. dim: of the space, >= 2.
    """
    kappa, score = torch.broadcast_tensors(kappa, score)
    mode, spread = _mode(kappa, dim)
    angle = torch.minimum(torch.maximum(mode + score * spread, 0.3 * spread), torch.full_like(mode, 0.9 * math.pi))
    position = torch.log(angle / (math.pi - angle))  # on this scale the normal score is nearly straight at any dim
    for _ in range(100):
        angle = math.pi * torch.sigmoid(position)
        below, _, above, _, p = _sides(angle, kappa, dim)
        share, lower = torch.minimum(below, above) / (below + above), below < above
        reached = torch.special.ndtri(share.clamp(min=1e-305))
        normal = torch.exp(-0.5 * reached * reached) / math.sqrt(2.0 * math.pi)
        slope = p / (below + above) / normal.clamp(min=1e-305) * angle * (1.0 - angle / math.pi)
        step = (torch.where(lower, reached, -reached) - score) / slope.clamp(min=1e-30)
        position = position - step.clamp(-2.0, 2.0)
        if bool(((step * (1.0 - angle / math.pi)).abs() < 1e-7).all()):  # relative change of the angle
            break
    angle = math.pi * torch.sigmoid(position)
    below, first_below, above, first_above, p = _sides(angle, kappa, dim)
    total = below + above
    # implicit derivative of the quantile: -(dF/dkappa) / f, with dF/dkappa = E[(w - A) 1(below)]
    moved = -(first_below / total * (above / total) - first_above / total * (below / total)) / (p / total)
    return Quantile(torch.sin(0.5 * angle), 0.5 * torch.cos(0.5 * angle) * moved, p / total)


class CosineTable:
    """Half chord and its kappa derivative as polynomials in the normal score, for one dimension.

    The scaled half chord errs by less than 1e-5 (2e-5 at d = 2) in root mean square under the scores' distribution.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.cells = 1 if dim >= SMOOTH_DIM else 16
        degree = _degree(dim)
        if self.cells == 1:
            points, solve = _score_fit(range(degree + 1))
            score = points[None]
        else:
            points, solve = _fit(range(degree + 1), torch.ones(degree + 1, **CPU))
            width = 2.0 * REACH / self.cells
            centre = width * (torch.arange(self.cells, **CPU) + 0.5) - REACH
            score = centre[:, None] + 0.5 * width * points  # [cells, points]
        y = torch.arange(0.0, LAST + 0.5 * SPACING, SPACING, **CPU)[:, None, None]
        kappa = 0.5 * (dim - 1) * torch.sinh(y)
        exact = solve_quantile(kappa, score[None], dim)
        value = exact.half_chord * torch.exp(0.5 * y)
        slope = exact.slope * torch.exp(0.5 * y) * 0.5 * (dim - 1) * torch.cosh(y) + 0.5 * value  # along y
        v, s = value @ solve, slope @ solve * SPACING
        a, b = 2.0 * (v[:-1] - v[1:]) + s[:-1] + s[1:], 3.0 * (v[1:] - v[:-1]) - 2.0 * s[:-1] - s[1:]
        # powers 0 to 3 of the cubic Hermite polynomials between two nodes of y, [nodes - 1, 4, cells, degree + 1]
        self.cubics = torch.stack([v[:-1], s[:-1], b, a], 1)

    def coefficients(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [..., cells, degree + 1] of h and of dh/dkappa for kappa [...] in [0, inf], in float64."""
        k = kappa.double()
        n = self.dim - 1.0
        y = torch.asinh(2.0 * k / n)
        inside = y.clamp(max=LAST - 1e-9) / SPACING
        cell = torch.floor(inside.nan_to_num(0.0)).long()
        t = (inside - cell)[..., None, None]
        c0, c1, c2, c3 = self.cubics.index_select(0, cell.reshape(-1)).unflatten(0, cell.shape).unbind(-3)
        value = ((c3 * t + c2) * t + c1) * t + c0
        dy = ((3.0 * c3 * t + 2.0 * c2) * t + c1) / SPACING
        y = y[..., None, None]
        scale = torch.exp(-0.5 * y)
        return value * scale, (dy - 0.5 * value) * scale * (2.0 / n) / torch.cosh(y)

    def polynomials(self, kappa: Tensor, dtype: torch.dtype) -> Tensor:
        """Coefficients [degree + 1, 2, ..., cells] of h and of dh/dkappa for kappa [...], for `evaluate`."""
        parts = kappa.reshape(-1).split(max(1, CHUNK // self.cells))
        both = torch.cat([torch.stack(self.coefficients(part)).to(dtype) for part in parts], 1)
        return both.movedim(-1, 0).reshape(-1, 2, *kappa.shape, self.cells)

    @staticmethod
    def evaluate(polynomials: Tensor, score: Tensor, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """h and dh/dkappa [..., S] at normal scores [..., S]; if mirrored at those and their negatives, [..., 2 S]."""
        cells = polynomials.shape[-1]
        if cells == 1:
            h, slope = (_horner_mirrored if mirrored else horner)(polynomials.unbind(), score)
        else:
            score = both_signs(score).flatten(-2) if mirrored else score
            place = (score.clamp(-REACH, REACH) + REACH) * (0.5 * cells / REACH)
            cell = place.long().clamp(max=cells - 1)
            chosen = [c.gather(-1, cell.expand(2, *cell.shape)) for c in polynomials]
            h, slope = horner(chosen, 2.0 * (place - cell) - 1.0)
        return h.clamp(0.0, HIGHEST), slope

    def half_chord(self, kappa: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """h and dh/dkappa [..., S] for kappa [...] and normal scores [..., S], in the dtype of the scores."""
        flat, scores = kappa.reshape(-1), score.reshape(-1, score.shape[-1])
        h, slope = torch.empty_like(scores), torch.empty_like(scores)
        size = max(1, CHUNK // self.cells)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            h[part], slope[part] = self.evaluate(self.polynomials(flat[part], score.dtype), scores[part])
        return h.reshape(score.shape), slope.reshape(score.shape)


def horner(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """The polynomial whose coefficients, lowest first and two or more, broadcast with x."""
    *rest, second, first = coefficients
    total = (first * x).add_(second)  # addcmul is slow where two of three broadcast
    for c in reversed(rest):
        torch.addcmul(c, total, x, out=total)
    return total


def _horner_mirrored(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """The same at x [..., S] and at -x, [..., 2 S], which even and odd powers part: two for little more than one."""
    square = x * x
    even, odd = horner(coefficients[::2], square), horner(coefficients[1::2], square)
    return torch.addcmul(even.unsqueeze(-2), odd.unsqueeze(-2), both_signs(x)).flatten(-2)


def both_signs(x: Tensor) -> Tensor:
    """x [..., S] and -x, [..., 2, S]."""
    return x.unsqueeze(-2) * (1.0 - 2.0 * torch.arange(2, dtype=x.dtype, device=x.device))[:, None]


def fit_scores(function: Callable[[Tensor], Tensor], powers: range) -> list[float]:
    """Coefficients of a function of the normal score, for the given powers of it."""
    score, solve = _score_fit(powers)
    return (function(score) @ solve).tolist()


def _score_fit(powers: range) -> tuple[Tensor, Tensor]:
    """Normal scores [P] and the matrix [P, powers] from values there to the coefficients of the polynomial that fits.

    The points weigh as samples will find them, widened so that the ends stay sane.
    """
    weight = torch.exp(-((torch.cos(torch.linspace(math.pi, 0.0, 2 * powers[-1] + 10, **CPU)) * REACH / 3.0) ** 2))
    points, solve = _fit(powers, weight)
    return REACH * points, solve / REACH ** torch.tensor(list(powers), **CPU)


def _fit(powers: range, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As many Chebyshev points in [-1, 1] as weights, and the weighted least-squares solution for values at them."""
    points = torch.cos(torch.linspace(math.pi, 0.0, len(weight), **CPU))
    basis = torch.stack([points**p for p in powers], -1)
    return points, (torch.linalg.pinv(basis * weight[:, None]) * weight).T


@lru_cache(maxsize=64)
def cosine_table(dim: int, device: torch.device) -> CosineTable:
    """The table of a dimension on a device, built at its first use (0.1 s; about 1 s below d = 8)."""
    with torch.inference_mode(False), torch.no_grad():
        table = CosineTable(dim)
        table.cubics = table.cubics.to(device)
    return table


def _degree(dim: int) -> int:
    """The degree at which the fit errs by less than 1e-5: the larger the dimension, the straighter h."""
    if dim < SMOOTH_DIM:
        return 5
    return next((degree for below, degree in DEGREES if dim < below), 4)
