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

from ..vmf_table import SMOOTH_DIM, CosineTable, cosine_table, fit_scores, horner, solve_quantile
from .draws import Draws, Pairs

T_DEGREES = ((10, 13), (16, 11), (24, 9), (48, 7))  # dimension below which, degree; 5 above
SMALLEST_REST = 7  # dimensions outside the columns' span from which the fit of their length is good


class Gradients(NamedTuple):
    """For the anchors' mu [R, d] and kappa [R], and the columns' mu [R, J, d] and kappa [R, J]."""

    anchor_mu: Tensor
    anchor_kappa: Tensor
    mu: Tensor
    kappa: Tensor


class Sampled(Protocol):
    """Sampled cosines [R, J, S], and the way back from a loss's gradient for them, once."""

    cosine: Tensor

    def pull_back(self, grad: Tensor) -> Gradients: ...


class Block(Protocol):
    """All that cosines of some rows are computed from: a tuple of tensors, random numbers included, and constants.

    What is computed from it is a function of tensors alone, as a compiler wants it. Tensors of one axis are constants, those of
    more have the rows first.
    """

    @property
    def scores(self) -> Scores: ...

    def sample(self) -> Sampled: ...


class Columns(Protocol):
    """What cosines of rows of anchors with their columns are sampled from; all that needs no random number is ready."""

    def draw(self, part: slice) -> Block: ...


def prepare(anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, draws: Draws) -> Columns:
    """For cosines of S samples of R anchors with one sample each of J columns.

    Directions of length 1, [R, d] and [R, J, d], d >= 2; concentrations [R] and [R, J] in [0, infinity].
    """
    return (_Circle if mu.shape[-1] == 2 else _Sphere)(anchor_mu, anchor_kappa, mu, kappa, draws)


class Scores(NamedTuple):
    """Normal scores of the samples' cosines with their own means, and the polynomials in them that give half chords."""

    polynomials: Tensor  # [R, degree + 1, 2, 1 + J, cells], the anchor first
    scores: Tensor  # [R, 1 + J, drawn]

    def chords(self, pairs: Pairs) -> tuple[_Chord, _Chord]:
        """Of anchors [R, 1, S] and of columns [R, J, S]."""
        both = CosineTable.evaluate(self.polynomials.movedim(0, 2), self.scores, pairs.antithetic)
        h, slope = (x[..., : pairs.samples] for x in both)
        return _Chord(h[:, :1], slope[:, :1]), _Chord(h[:, 1:], slope[:, 1:])


def _polynomials(anchor_kappa: Tensor, kappa: Tensor, dim: int, draws: Draws) -> Tensor:
    """Those of rows of one anchor, kappa [R], and J columns, kappa [R, J]."""
    table = cosine_table(dim, kappa.device)
    return table.polynomials(torch.cat([anchor_kappa[:, None], kappa], 1), draws.like.dtype).movedim(2, 0)


def _scores(polynomials: Tensor, draws: Draws) -> Scores:
    rows, _, _, each, _ = polynomials.shape
    packed = polynomials.movedim(0, 2).contiguous().movedim(2, 0)  # as it is computed with
    return Scores(packed, draws.normal(rows, each))


class _Sphere:
    def __init__(self, anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, draws: Draws) -> None:
        self.draws = draws
        self.frame = _frame(anchor_mu, mu)
        self.polynomials = _polynomials(anchor_kappa, kappa, mu.shape[-1], draws)
        self.coordinate = _coordinate(mu.shape[-1], draws.like)

    def draw(self, part: slice) -> Block:
        frame = self.frame.rows(part)
        direction = self.draws.normal(*frame.own.shape)
        scores = _scores(self.polynomials[part], self.draws)
        coordinate = self.coordinate.draw(self.draws, *frame.columns.shape[:2])
        return _SphereBlock(frame, direction, scores, coordinate, self.draws.pairs)


class _SphereBlock(NamedTuple):
    frame: _Frame
    direction: Tensor  # normal numbers [R, K, drawn]
    scores: Scores
    coordinate: _Coordinate
    pairs: Pairs

    def sample(self) -> Sampled:
        v = self.pairs.directions(self.frame.direction(self.direction))
        anchor, column = self.scores.chords(self.pairs)
        t = self.pairs.directions(self.coordinate.twice())
        return _OnSphere(self.frame, anchor, v, column, t)


class _OnSphere:
    def __init__(self, frame: _Frame, anchor: _Chord, v: Tensor, column: _Chord, t: Tensor) -> None:
        self.frame, self.anchor, self.v, self.column = frame, anchor, v, column
        self.anchor_s = 2.0 * anchor.half_s
        self.z = (anchor.w * frame.own[:, :, None]).addcmul_(self.anchor_s, v)
        self.a = torch.bmm(frame.columns, self.z)
        floor = 1e-12 if v.dtype == torch.float64 else 1e-6  # a * a is not known better
        self.u2 = torch.addcmul(v.new_ones(()), self.a, self.a, value=-1.0).clamp_(min=floor)
        self.tu = t.mul_(self.u2.sqrt())
        self.stu = column.half_s * self.tu
        self.cosine = torch.addcmul(self.stu, column.w, self.a)

    def pull_back(self, grad: Tensor) -> Gradients:
        by_a = torch.addcdiv(self.column.w, self.stu.mul_(self.a), self.u2, value=-1.0).mul_(grad)
        by_z = torch.bmm(self.frame.columns.transpose(1, 2), by_a)
        by_w = torch.bmm(self.frame.own[:, None], by_z)
        by_half_s = (by_z * self.v).sum(1, keepdim=True).mul_(2.0)
        turned = by_z.mul_(self.anchor.w).addcmul_(self.v, self.anchor_s * by_w, value=-1.0)
        return Gradients(
            self.frame.embed(turned.sum(-1)[:, None])[:, 0],
            self.anchor.by_kappa(by_w, by_half_s).sum(-1)[:, 0],
            self.frame.embed(torch.bmm(by_a, self.z.transpose(1, 2))),
            self.column.by_kappa(self.a, self.tu).mul_(grad).sum(-1),
        )


class _Chord:
    """Cosine w and half the sine s of the angle whose half chord is h."""

    def __init__(self, h: Tensor, slope: Tensor) -> None:
        one = h.new_ones(())
        self.h, self.slope = h, slope
        self.w = torch.addcmul(one, h, h, value=-2.0)
        self.root = torch.addcmul(one, h, h, value=-1.0).sqrt_()
        self.half_s = h * self.root

    def by_kappa(self, by_w: Tensor, by_half_s: Tensor) -> Tensor:
        """The samples' gradients for kappa, from those for w and s / 2, the latter of which are overwritten."""
        return by_half_s.mul_(self.w).div_(self.root).addcmul_(by_w, self.h, value=-4.0).mul_(self.slope)

    def angle(self) -> Tensor:
        return 2.0 * torch.asin(self.h)

    def angle_slope(self) -> Tensor:
        """Derivative of the angle for kappa."""
        return 2.0 * self.slope / self.root


class _Frame(NamedTuple):
    """Coordinates in which samples are taken: the whole space, or an orthonormal basis of the means' span in it.

    The part of a sample outside that span has no say in any cosine, and is 0 on average in every gradient.
    """

    own: Tensor  # the anchors' means [R, K]
    columns: Tensor  # the columns' means [R, J, K]
    basis: tuple[Tensor, Tensor, Tensor] | None = None  # factor [R, J, J], what it spans [R, J, d], anchors [R, d]
    length: Tensor | None = None  # polynomial of the length of a sample's part outside the span

    def rows(self, part: slice) -> _Frame:
        basis = None if self.basis is None else (self.basis[0][part], self.basis[1][part], self.basis[2][part])
        return _Frame(self.own[part], self.columns[part], basis, self.length)

    def direction(self, normal: Tensor) -> Tensor:
        """Uniform directions orthogonal to the anchors' means (their part in the span), from normal numbers [R, K, drawn]."""
        own = self.own[:, :, None]
        if self.length is None:
            g = torch.addcmul(normal, (normal * own).sum(1, keepdim=True), own, value=-1.0)
            return g.div_(g.square().sum(1, keepdim=True).sqrt_())
        rest = horner(self.length.unbind(), normal[:, 0])
        g = normal * (1.0 - own)  # the anchor's mean is the first of these axes
        return g.div_(g.square().sum(1).addcmul_(rest, rest).sqrt_()[:, None])

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
        return _Frame(anchor, mu)
    wide, own = mu.double(), anchor.double()
    along = wide @ own[:, :, None]
    spanned = wide - along * own[:, None]
    gram = spanned @ spanned.transpose(1, 2)
    factor = torch.linalg.cholesky_ex(gram + 1e-12 * torch.eye(columns, dtype=gram.dtype, device=gram.device))[0]
    unit = anchor.new_zeros(rows, columns + 1)
    unit[:, 0] = 1.0
    inside = torch.cat([along, factor], -1).to(mu)
    return _Frame(unit, inside, (factor, spanned, anchor), mu.new_tensor(_length_fit(rest)))


class _Circle:
    def __init__(self, anchor_mu: Tensor, anchor_kappa: Tensor, mu: Tensor, kappa: Tensor, draws: Draws) -> None:
        self.anchor_mu, self.mu, self.draws = anchor_mu[:, None], mu, draws
        self.polynomials = _polynomials(anchor_kappa, kappa, 2, draws)

    def draw(self, part: slice) -> Block:
        rows, columns, _ = self.mu[part].shape
        sign = self.draws.normal(rows, 1 + columns).sign_()
        scores = _scores(self.polynomials[part], self.draws)
        return _CircleBlock(self.anchor_mu[part], self.mu[part], sign, scores, self.draws.pairs)


class _CircleBlock(NamedTuple):
    anchor_mu: Tensor  # [R, 1, 2]
    mu: Tensor  # [R, J, 2]
    sign: Tensor  # [R, 1 + J, drawn]
    scores: Scores
    pairs: Pairs

    def sample(self) -> Sampled:
        sign = self.pairs.directions(self.sign)
        anchor, column = self.scores.chords(self.pairs)
        return _OnCircle(self.anchor_mu, anchor, sign[:, :1], self.mu, column, sign[:, 1:])


class _OnCircle:
    """In the plane a sample is an angle, and the cosine that of a sum of angles."""

    def __init__(
        self, anchor_mu: Tensor, anchor: _Chord, anchor_sign: Tensor, mu: Tensor, column: _Chord, sign: Tensor
    ) -> None:
        self.anchor_normal, self.normal = _quarter_turn(anchor_mu), _quarter_turn(mu)
        self.turned_by_kappa, self.by_kappa = anchor_sign * anchor.angle_slope(), sign * column.angle_slope()
        between = torch.atan2((mu * self.anchor_normal).sum(-1), (mu * anchor_mu).sum(-1))
        angle = between[..., None] + sign * column.angle() - anchor_sign * anchor.angle()
        self.cosine, self.sine = torch.cos(angle), torch.sin(angle)

    def pull_back(self, grad: Tensor) -> Gradients:
        by_angle = -grad * self.sine
        by_turn = -by_angle.sum(1, keepdim=True)
        return Gradients(
            by_turn.sum(-1) * self.anchor_normal[:, 0],
            (by_turn * self.turned_by_kappa).sum(-1)[:, 0],
            by_angle.sum(-1, keepdim=True) * self.normal,
            (by_angle * self.by_kappa).sum(-1),
        )


def _quarter_turn(mu: Tensor) -> Tensor:
    return torch.stack([-mu[..., 1], mu[..., 0]], -1)


class _Coordinate(NamedTuple):
    """One coordinate of uniform points on the sphere S^(dim-2), dim >= 3, of random numbers."""

    dim: int
    odd: Tensor | None  # coefficients
    numbers: tuple[Tensor, ...] = ()

    def draw(self, draws: Draws, *shape: int) -> _Coordinate:
        if self.odd is not None:
            return self._replace(numbers=(draws.normal(*shape),))
        return self._replace(numbers=tuple(draws.uniform(*shape) for _ in range(1 if self.dim == 3 else 2)))

    def twice(self) -> Tensor:
        """Two times that [*shape, drawn]."""
        x = self.numbers[0]
        if self.odd is not None:
            return horner(self.odd.unbind(), x * x).mul_(x)
        t = torch.cos(2.0 * math.pi * x).mul_(2.0)  # the first of a uniform point's two coordinates in a plane
        return t if self.dim == 3 else t * (1.0 - self.numbers[1] ** (2.0 / (self.dim - 3))).sqrt_()


def _coordinate(dim: int, like: Tensor) -> _Coordinate:
    return _Coordinate(dim, None if dim < SMOOTH_DIM else like.new_tensor(_coordinate_fit(dim)))


@lru_cache(maxsize=64)
def _coordinate_fit(dim: int) -> list[float]:
    """Coefficients of that quantity in the odd powers of the normal score."""
    degree = next((degree for below, degree in T_DEGREES if dim < below), 5)
    uniform = torch.zeros((), dtype=torch.float64)
    return fit_scores(
        lambda x: 4.0 * solve_quantile(uniform, x, dim - 1).half_chord ** 2 - 2.0, range(1, degree + 1, 2)
    )


@lru_cache(maxsize=64)
def _length_fit(dim: int) -> list[float]:
    """Of lengths of standard normal vectors of `dim` dimensions, in normal scores."""

    def length(x: Tensor) -> Tensor:
        half = torch.as_tensor(gammaincinv(0.5 * dim, torch.special.ndtr(x).numpy()))
        upper = torch.as_tensor(gammainccinv(0.5 * dim, torch.special.ndtr(-x).numpy()))
        return torch.sqrt(2.0 * torch.where(x < 0.0, half, upper))

    return fit_scores(length, range(9))
