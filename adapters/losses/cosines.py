"""Cosines between samples of von Mises-Fisher posteriors, and their gradients, without a sample of any but the anchor.

A column's sample enters a loss only through its cosine with the anchor's. With the anchor's sample z = w mu + s v (v
uniform, orthogonal to mu) and a = z.mu_j, that cosine is distributed as w_j a + s_j sqrt(1 - a^2) t_j: w_j the cosine
marginal of vMF(kappa_j), s_j its sine, t_j one coordinate of a uniform point on the sphere S^(d-2). Two scalars stand
for a vector, exactly. Gradients for mean directions move the samples by the smallest rotation that takes mu along.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from scipy.special import gammainccinv, gammaincinv
from torch import Tensor

from ..vmf_table import SMOOTH_DIM, cosine_table, fit_scores, horner, solve_quantile
from .draws import Draws

T_DEGREES = ((10, 13), (16, 11), (24, 9), (48, 7))  # dimension below which, degree; 5 above
SMALLEST_REST = 7  # dimensions outside the columns' span from which the fit of their length is good


class Gradients(NamedTuple):
    """For the anchors' mu [R, d] and kappa [R], and the columns' mu [R, J, d] and kappa [R, J]."""

    anchor_mu: Tensor
    anchor_kappa: Tensor
    mu: Tensor
    kappa: Tensor


class Sampled(Protocol):
    """Sampled cosines [R, J, S], and the way back from a loss's gradient for them."""

    cosine: Tensor

    def pull_back(self, grad: Tensor) -> Gradients: ...


def sample_cosines(anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, draws: Draws) -> Sampled:
    """Cosines of S samples of R anchors with one sample each of J columns.

    Directions of length 1, [R, d] and [R, J, d], d >= 2; concentrations [R] and [R, J] in [0, infinity].
    """
    return (_OnCircle if mu.shape[-1] == 2 else _OnSphere)(anchor_mu, anchor_kappa, mu, kappa, draws)


class _OnSphere:
    def __init__(self, anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, draws: Draws) -> None:
        rows, columns, dim = mu.shape
        table = cosine_table(dim, mu.device)
        self.frame = _frame(anchor_mu, mu)
        h, self.anchor_slope = table.half_chord(anchor_kappa, draws.normal(rows, draws.samples))
        self.anchor = _Chord(h)
        self.anchor_s = 2.0 * self.anchor.half_s
        self.v = draws.paired(lambda n: self.frame.direction(n, draws))
        self.z = self.anchor.w[:, None] * self.frame.own[:, :, None] + self.anchor_s[:, None] * self.v
        self.a = torch.bmm(self.frame.columns, self.z)
        floor = 1e-12 if mu.dtype == torch.float64 else 1e-6  # a * a is not known better
        self.u = torch.addcmul(self.a.new_ones(()), self.a, self.a, value=-1.0).clamp_(min=floor).sqrt_()
        h, self.slope = table.half_chord(kappa, draws.normal(rows, columns, draws.samples))
        self.column = _Chord(h)
        self.t = draws.paired(lambda n: _twice_coordinate((rows, columns, n), dim, draws))
        self.st = self.column.half_s * self.t
        self.cosine = (self.column.w * self.a).addcmul_(self.st, self.u)

    def pull_back(self, grad: Tensor) -> Gradients:
        by_a = torch.addcdiv(self.column.w, self.st.mul_(self.a), self.u, value=-1.0).mul_(grad)
        by_z = torch.bmm(self.frame.columns.transpose(1, 2), by_a)
        by_w = (by_z * self.frame.own[:, :, None]).sum(1)
        by_s = (by_z * self.v).sum(1)
        turned = by_z.mul_(self.anchor.w[:, None]).sub_(self.v * (self.anchor_s * by_w)[:, None])
        by_h = self.column.pull_back(self.a.mul_(grad), self.t.mul_(self.u).mul_(grad))
        return Gradients(
            self.frame.embed(turned.sum(-1)[:, None])[:, 0],
            (self.anchor.pull_back(by_w, 2.0 * by_s) * self.anchor_slope).sum(-1),
            self.frame.embed(torch.bmm(by_a, self.z.transpose(1, 2))),
            by_h.mul_(self.slope).sum(-1),
        )


class _Chord:
    """Cosine w and half the sine s of the angle whose half chord is h."""

    def __init__(self, h: Tensor) -> None:
        one = h.new_ones(())
        self.h = h
        self.w = torch.addcmul(one, h, h, value=-2.0)
        self.root = torch.addcmul(one, h, h, value=-1.0).sqrt_()
        self.half_s = h * self.root

    def pull_back(self, by_w: Tensor, by_half_s: Tensor) -> Tensor:
        """The gradient for h, from those for w and s / 2; the second is overwritten."""
        return by_half_s.mul_(self.w).div_(self.root).addcmul_(by_w, self.h, value=-4.0)


class _Frame(NamedTuple):
    """Coordinates in which samples are taken: the whole space, or an orthonormal basis of the means' span in it.

    The part of a sample outside that span has no say in any cosine, and is 0 on average in every gradient.
    """

    own: Tensor  # the anchors' means [R, K]
    columns: Tensor  # the columns' means [R, J, K]
    rest: int  # dimensions outside the span
    basis: tuple[Tensor, Tensor, Tensor] | None = None  # factor [R, J, J], what it spans [R, J, d], anchors [R, d]

    def direction(self, samples: int, draws: Draws) -> Tensor:
        """Uniform directions [R, K, S] orthogonal to the anchors' means (their part in the span)."""
        rows, coordinates = self.own.shape
        if self.basis is None:
            g = draws.normal(rows, coordinates, samples)
            g = g - (g * self.own[:, :, None]).sum(1, keepdim=True) * self.own[:, :, None]
            return g.div_(g.square().sum(1, keepdim=True).sqrt_())
        g = draws.normal(rows, coordinates, samples)
        rest = _length(self.rest, g[:, 0])
        g[:, 0] = 0.0
        return g.div_((g.square().sum(1) + rest.square()).sqrt_()[:, None])

    def embed(self, x: Tensor) -> Tensor:
        """Vectors [R, n, K] in these coordinates to [R, n, d]."""
        if self.basis is None:
            return x
        factor, spanned, anchor = self.basis
        inside = torch.linalg.solve_triangular(factor, x[..., 1:].to(factor), upper=False, left=False) @ spanned
        return inside.to(x) + x[..., :1] * anchor[:, None]


def _frame(anchor: Tensor, mu: Tensor) -> _Frame:
    rows, columns, dim = mu.shape
    rest = dim - 1 - columns
    if columns + 2 > 0.7 * dim or rest < SMALLEST_REST:
        return _Frame(anchor, mu, 0)
    wide, own = mu.double(), anchor.double()
    along = wide @ own[:, :, None]
    spanned = wide - along * own[:, None]
    gram = spanned @ spanned.transpose(1, 2)
    factor = torch.linalg.cholesky_ex(gram + 1e-12 * torch.eye(columns, dtype=gram.dtype, device=gram.device))[0]
    unit = anchor.new_zeros(rows, columns + 1)
    unit[:, 0] = 1.0
    return _Frame(unit, torch.cat([along, factor], -1).to(mu), rest, (factor, spanned, anchor))


class _OnCircle:
    """In the plane a sample is an angle, and the cosine that of a sum of angles."""

    def __init__(self, anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, draws: Draws) -> None:
        rows, columns, _ = mu.shape
        table = cosine_table(2, mu.device)
        h, self.anchor_slope = table.half_chord(anchor_kappa, draws.normal(rows, draws.samples))
        self.anchor_sign = draws.paired(lambda n: draws.normal(rows, n).sign())
        self.anchor_h = h
        turn = 2.0 * self.anchor_sign * torch.asin(h)
        h, self.slope = table.half_chord(kappa, draws.normal(rows, columns, draws.samples))
        self.sign, self.h = draws.paired(lambda n: draws.normal(rows, columns, n).sign()), h
        self.anchor_normal, self.normal = _quarter_turn(anchor_mu), _quarter_turn(mu)
        between = torch.atan2((mu * self.anchor_normal[:, None]).sum(-1), (mu * anchor_mu[:, None]).sum(-1))
        angle = between[..., None] + 2.0 * self.sign * torch.asin(h) - turn[:, None]
        self.cosine, self.sine = torch.cos(angle), torch.sin(angle)

    def pull_back(self, grad: Tensor) -> Gradients:
        by_angle = -grad * self.sine
        by_between = by_angle.sum(-1, keepdim=True)
        return Gradients(
            -by_between.sum(1) * self.anchor_normal,
            (-by_angle.sum(1) * self.anchor_sign * _angle_slope(self.anchor_h, self.anchor_slope)).sum(-1),
            by_between * self.normal,
            (by_angle * self.sign * _angle_slope(self.h, self.slope)).sum(-1),
        )


def _quarter_turn(mu: Tensor) -> Tensor:
    return torch.stack([-mu[..., 1], mu[..., 0]], -1)


def _angle_slope(h: Tensor, slope: Tensor) -> Tensor:
    """Derivative of the angle 2 asin(h) from that of h."""
    return 2.0 * slope / (1.0 - h * h).sqrt()


def _twice_coordinate(shape: tuple[int, ...], dim: int, draws: Draws) -> Tensor:
    """Twice one coordinate of uniform points on the sphere S^(dim-2), dim >= 3."""
    if dim < SMOOTH_DIM:  # the first of a uniform point's two coordinates in a plane, in polar form
        t = torch.cos(2.0 * math.pi * draws.uniform(*shape)).mul_(2.0)
        return t if dim == 3 else t * (1.0 - draws.uniform(*shape) ** (2.0 / (dim - 3))).sqrt_()
    x = draws.normal(*shape)
    return horner(x.new_tensor(_coordinate_fit(dim)), x * x).mul_(x)


@lru_cache(maxsize=64)
def _coordinate_fit(dim: int) -> list[float]:
    """Coefficients of that quantity in the odd powers of the normal score."""
    degree = next((degree for below, degree in T_DEGREES if dim < below), 5)
    uniform = torch.zeros((), dtype=torch.float64)
    return fit_scores(
        lambda x: 4.0 * solve_quantile(uniform, x, dim - 1).half_chord ** 2 - 2.0, range(1, degree + 1, 2)
    )


def _length(dim: int, score: Tensor) -> Tensor:
    """Lengths of standard normal vectors of `dim` dimensions, at normal scores of any shape."""
    return horner(score.new_tensor(_length_fit(dim)), score.reshape(-1)).reshape(score.shape)


@lru_cache(maxsize=64)
def _length_fit(dim: int) -> list[float]:
    def length(x: Tensor) -> Tensor:
        half = torch.as_tensor(gammaincinv(0.5 * dim, torch.special.ndtr(x).numpy()))
        upper = torch.as_tensor(gammainccinv(0.5 * dim, torch.special.ndtr(-x).numpy()))
        return torch.sqrt(2.0 * torch.where(x < 0.0, half, upper))

    return fit_scores(length, range(9))
