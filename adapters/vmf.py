"""The von Mises-Fisher distribution on the unit sphere: normaliser, mean resultant length, and exact sampling.

Dimensions 2 to 4096 and more, concentrations from 0 to infinity. Values are computed in float64 and given back in the
dtype of the arguments (float32 for half precision).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn import functional

from .errors import OptionError
from .numerics import by_blocks, first_order
from .vmf_table import cosine_table, solve_quantile

ORDER, TERMS = 14, 8  # Debye's expansion is used at orders >= 14 with 8 corrections, where it errs by less than 1e-10
CHUNK = 1 << 16  # concentrations at a time: the normaliser's recurrence takes some 50 numbers for each
LARGEST = 1e100  # stands for infinity where infinity would make a NaN


def log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """Logarithm of C_d(kappa), the factor that makes C_d(kappa) exp(kappa mu.z) a density on the sphere S^(d-1).

    Args:
        kappa: concentration >= 0, any shape; infinity gives -infinity (and the gradient -1).
        dim: of the space, d >= 2.
    Returns: the shape of kappa, with respect to surface measure; in float64 off by less than 1e-9 of its value, or 1e-9
        where that is near 0. The gradient is -A_d.
    Raises: OptionError if dim < 2.
    Source: Debye's uniform expansion of the Bessel function (DLMF 10.41), at a shifted order, and recurrence down.
    """
    _check_dim(dim)
    return _LogNormalizer.apply(kappa.double(), dim).to(_dtype(kappa))


def mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """A_d(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa) in [0, 1], the length of the mean of vMF(mu, kappa).

    Args:
        kappa: concentration >= 0, any shape; infinity gives 1.
        dim: of the space, d >= 2.
    Returns: the shape of kappa; relative error below 1e-9. Differentiable any number of times, and exportable.
    Raises: OptionError if dim < 2.
    """
    _check_dim(dim)
    k = kappa.double().clamp(max=LARGEST)
    ratio, complement = _ratios(k, dim)
    # each form keeps its relative precision, and its derivative's, where the other loses it
    return torch.where(k < dim, k * ratio[0], 1.0 - complement).to(_dtype(kappa))


def concentration_from_resultant(resultant: Tensor, dim: int) -> Tensor:
    """The kappa with A_d(kappa) = resultant, to 1e-9 relative: 0 for 0, infinity for 1.

    Args:
        resultant: mean resultant length in [0, 1], any shape. Once differentiable.
        dim: of the space, d >= 2.
    Raises: OptionError if dim < 2 or a resultant lies outside [0, 1].
    Source: Newton's method from the approximation of Banerjee et al., JMLR 2005.
    """
    _check_dim(dim)
    r = resultant.double()
    if not bool(((r >= 0.0) & (r <= 1.0)).all()):
        raise OptionError(f"a mean resultant length must lie in [0, 1]; the range given is {r.min():g} to {r.max():g}")
    fixed = r.detach()
    inner = fixed.clamp(max=1.0 - 1e-16)
    kappa = inner * (dim - inner * inner) / (1.0 - inner * inner)
    for _ in range(6):
        gap, slope = _gap_and_slope(kappa, inner, dim)
        kappa = torch.maximum(kappa - gap / slope, 0.5 * kappa)
    inverse = torch.where(fixed < 1.0, 1.0 / _gap_and_slope(kappa, inner, dim)[1], 0.0)
    return _WithSlopes.apply(torch.where(fixed < 1.0, kappa, torch.inf), r, inverse).to(_dtype(resultant))


class VonMisesFisher(Distribution):
    """The von Mises-Fisher distribution vMF(mu, kappa), of density C_d(kappa) exp(kappa mu.z) on the sphere S^(d-1).

    Args:
        mean_direction: mu [..., d], d >= 2, of any length but 0, with `validate_args` too: it is normalised here, so
            its gradients are tangent to the sphere.
        concentration: kappa [...] in [0, infinity]; 0 is uniform, infinity the point mass at mu. Broadcasts.
    """

    arg_constraints = {"mean_direction": constraints.real_vector, "concentration": constraints.nonnegative}  # noqa: RUF012
    has_rsample = True
    mean_direction: Tensor
    concentration: Tensor

    def __init__(
        self, mean_direction: Tensor, concentration: Tensor | float, validate_args: bool | None = None
    ) -> None:
        if mean_direction.ndim < 1:
            raise OptionError("mean_direction must have shape [..., d]; a scalar was given")
        _check_dim(mean_direction.shape[-1])
        mu = mean_direction.to(_dtype(mean_direction))
        kappa = torch.as_tensor(concentration, dtype=mu.dtype, device=mu.device)
        batch = torch.broadcast_shapes(mu.shape[:-1], kappa.shape)
        self.mean_direction = functional.normalize(mu, dim=-1).expand(*batch, mu.shape[-1])
        self.concentration = kappa.expand(batch)
        # torch's own checks fail on a batch of none
        super().__init__(batch, mu.shape[-1:], validate_args=validate_args if batch.numel() else False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Sphere()

    @property
    def dim(self) -> int:
        """d, the dimension of the space the sphere lies in."""
        return self.event_shape[0]

    def expand(self, batch_shape: Any, _instance: VonMisesFisher | None = None) -> VonMisesFisher:
        new = self._get_checked_instance(VonMisesFisher, _instance)
        batch_shape = torch.Size(batch_shape)
        new.mean_direction = self.mean_direction.expand(batch_shape + self.event_shape)
        new.concentration = self.concentration.expand(batch_shape)
        super(VonMisesFisher, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """A_d(kappa) mu, shape [..., d]."""
        return mean_resultant_length(self.concentration, self.dim).unsqueeze(-1) * self.mean_direction

    @property
    def mode(self) -> Tensor:
        return self.mean_direction

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of points [..., d] on the sphere; at kappa = infinity, infinity at mu and -infinity elsewhere."""
        if self._validate_args:
            self._validate_sample(value)
        chord = (value - self.mean_direction).double().square().sum(-1)
        kappa = self.concentration.double()
        finite = torch.where(torch.isinf(kappa), 0.0, kappa)
        log = _LogNormalizer.apply(finite, self.dim) + finite * (1.0 - 0.5 * chord)
        point = torch.where(chord == 0.0, torch.inf, -torch.inf)
        return torch.where(torch.isinf(kappa), point, log).to(self.concentration.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy with respect to surface measure; -infinity at kappa = infinity."""
        kappa = self.concentration.double()
        finite = torch.where(torch.isinf(kappa), 0.0, kappa)
        value = -_LogNormalizer.apply(finite, self.dim) - finite * mean_resultant_length(finite, self.dim)
        return torch.where(torch.isinf(kappa), -torch.inf, value).to(self.concentration.dtype)

    def cosine_quantile(self, q: Tensor | float) -> Tensor:
        """The cosine mu.z that a share q of the distribution stays below: q = 0.05 bounds the 95 % cap round mu.

        q in [0, 1] broadcasts with the batch shape. Once differentiable in kappa and q. Raises: OptionError for other q.
        """
        level = torch.as_tensor(q, dtype=torch.float64, device=self.concentration.device)
        if not bool(((level >= 0.0) & (level <= 1.0)).all()):
            raise OptionError(f"cosine_quantile: shares lie in [0, 1]; q={q} was given")
        kappa, level = torch.broadcast_tensors(self.concentration.double(), level)
        with torch.no_grad():
            score = -torch.special.ndtri(level.clamp(1e-300, 1.0 - 1e-16))
            exact = solve_quantile(kappa.clamp(max=1e15), score, self.dim)
            h, point = exact.half_chord, torch.isinf(kappa)
            sine = 2.0 * h * torch.sqrt((1.0 - h * h).clamp(min=0.0))
            by_kappa = torch.where(point, 0.0, -4.0 * h * exact.slope)
            by_level = torch.where(point, 0.0, sine / exact.density)
            cosine = torch.where(point, 1.0, 1.0 - 2.0 * h * h)
            cosine = torch.where(level <= 0.0, -1.0, torch.where(level >= 1.0, 1.0, cosine))
        return _WithSlopes.apply(cosine, level, by_level, kappa, by_kappa).to(self.concentration.dtype)

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Samples [*sample_shape, *batch, d], with unbiased gradients for mu and kappa.

        The cosine is drawn by its quantile function (its kappa gradient is the implicit one); a turn of mu carries the
        sample along by the smallest rotation, which adds no variance.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        mu = self.mean_direction
        if not shape.numel():
            return mu.new_empty(shape)
        score = standard_normal((self.concentration.numel(), torch.Size(sample_shape).numel()), mu, generator)
        return self.from_normal(score.T.reshape(shape[:-1]), standard_normal(shape, mu, generator))

    def from_normal(self, score: Tensor, noise: Tensor) -> Tensor:
        """The samples [*sample_shape, *batch, d] of `rsample` that standard normal numbers make.

        score: [*sample_shape, *batch], larger ones give samples farther from mu. noise: with one more dimension, d.
        """
        mu, kappa = self.mean_direction, self.concentration
        columns = score.reshape(-1, kappa.numel()).T
        h = _HalfChord.apply(kappa.reshape(-1), columns, self.dim).T.reshape(score.shape).unsqueeze(-1)
        fixed = mu.detach()
        tangent = functional.normalize(noise - (noise * fixed).sum(-1, keepdim=True) * fixed, dim=-1)
        # the smallest rotation from `fixed` to mu: none now, but its derivatives are there
        turn = (tangent * mu).sum(-1, keepdim=True) / (1.0 + (fixed * mu).sum(-1, keepdim=True))
        tangent = tangent - turn * (fixed + mu)
        return (1.0 - 2.0 * h * h) * mu + 2.0 * h * torch.sqrt((1.0 - h * h).clamp(min=1e-12)) * tangent

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, generator)


def standard_normal(shape: Any, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, whatever the generator's device."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


class _LogNormalizer(torch.autograd.Function):
    """log C_d with its exact gradient -A_d, itself differentiable."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(kappa)
        ctx.dim = dim
        k = kappa.clamp(max=LARGEST)
        at_zero = math.lgamma(0.5 * dim) - math.log(2.0) - 0.5 * dim * math.log(math.pi)
        return at_zero - by_blocks(lambda part: _log_growth(part, dim), k, CHUNK) - (kappa - k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (kappa,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return -grads[0] * mean_resultant_length(kappa, ctx.dim), None
        return -grads[0] * by_blocks(lambda part: mean_resultant_length(part, ctx.dim), kappa, CHUNK), None


class _HalfChord(torch.autograd.Function):
    """Half chords [K, S] at normal scores [K, S], with the implicit gradient for kappa [K]."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, score: Tensor, dim: int) -> Tensor:
        h, slope = cosine_table(dim, kappa.device).half_chord(kappa, score)
        ctx.save_for_backward(slope)
        return h

    @staticmethod
    @first_order("a sample's cosine")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grads[0] * slope).sum(-1), None, None


class _WithSlopes(torch.autograd.Function):
    """Given values, as a function of inputs with given slopes: of (value, input, slope, input, slope, ...)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return value.clone()

    @staticmethod
    @first_order("this function of a von Mises-Fisher distribution")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(g for slope in ctx.saved_tensors for g in (grads[0] * slope, None))


class _Sphere(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.norm(dim=-1) - 1.0).abs() < 1e-3


def _check_dim(dim: int) -> None:
    if dim < 2:
        raise OptionError(f"a von Mises-Fisher distribution needs at least 2 dimensions; {dim} was given")


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _debye() -> list[list[float]]:
    """Coefficients c[m][j] of Debye's polynomials u_m(p) = p^m sum_j c[m][j] p^(2j), by their recurrence."""
    u = [[Fraction(1)]]
    for m in range(TERMS):
        new = [Fraction(0)] * (m + 2)
        for j, c in enumerate(u[m]):
            n = m + 2 * j  # u_{m+1} = p^2 (1 - p^2) u_m' / 2 + integral of (1 - 5 t^2) u_m / 8
            new[j] += c * (Fraction(n, 2) + Fraction(1, 8 * (n + 1)))
            new[j + 1] -= c * (Fraction(n, 2) + Fraction(5, 8 * (n + 3)))
        u.append(new)
    return [[float(c) for c in row] for row in u]


_DEBYE = _debye()


def _debye_sums(s: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """U = sum_m u_m / N^m and the companion sum of its logarithmic derivative, at p^2 = `square`, s = N / p."""
    total, slope = torch.zeros_like(s), torch.zeros_like(s)
    for m, row in reversed(list(enumerate(_DEBYE))):
        value, derived = torch.zeros_like(s), torch.zeros_like(s)
        for j, c in reversed(list(enumerate(row))):
            value = value * square + c
            derived = derived * square + c * (m + 0.5 + 2 * j)
        total = total / s + value
        slope = slope / s + derived
    return total, slope


def _start(k: Tensor, dim: int) -> tuple[int, float, Tensor, Tensor, Tensor]:
    """Steps down, the order N they start from, s = sqrt(N^2 + k^2), and the Debye sums there."""
    nu = 0.5 * dim - 1.0
    steps = max(0, math.ceil(ORDER - nu))
    order = nu + steps
    s = torch.sqrt(order * order + k * k)
    total, slope = _debye_sums(s, (order / s) ** 2)
    return steps, order, s, total, slope


def _ratios(k: Tensor, dim: int) -> tuple[list[Tensor], Tensor]:
    """I_{v+1} / (k I_v) for v = nu, nu + 1, ..., N, finite at k = 0; and 1 - I_{nu+1} / I_nu, precise at large k."""
    steps, order, s, total, slope = _start(k, dim)
    correction = slope / (s * s * total)
    ratio = [1.0 / (s + order) - correction]
    complement = (order + order * order / (s + k)) / (s + order) + k * correction
    for i in range(steps):
        twice = 2.0 * (order - i)
        ratio.append(1.0 / (twice + k * k * ratio[-1]))
        complement = (twice - k * complement) / (twice + k * (1.0 - complement))
    return ratio[::-1], complement


def _log_growth(k: Tensor, dim: int) -> Tensor:
    """log of Gamma(nu + 1) (2/k)^nu I_nu(k): 0 at k = 0, about k at large k."""
    steps, order, s, total, _ = _start(k, dim)
    at_zero, _ = _debye_sums(torch.full_like(k, order), torch.ones_like(k))
    rise = k * k / (s + order)  # s - N
    log = (
        rise - order * torch.log1p(rise / (2.0 * order)) - 0.5 * torch.log1p(rise / order) + torch.log(total / at_zero)
    )
    ratio = _ratios(k, dim)[0]
    for i in range(steps):
        log = log + torch.log1p(k * k * ratio[i + 1] / (2.0 * (order - steps + i + 1)))
    return log


def _gap_and_slope(kappa: Tensor, resultant: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A_d(kappa) - resultant without cancellation near 1, and the derivative of A_d."""
    with torch.inference_mode(False), torch.enable_grad():
        k = kappa.detach().clone().requires_grad_()
        ratio, complement = _ratios(k, dim)
        value = torch.where(k < dim, k * ratio[0], 1.0 - complement)
        (slope,) = torch.autograd.grad(value.sum(), k)
    gap = torch.where(k < dim, k * ratio[0] - resultant, (1.0 - resultant) - complement)
    return gap.detach(), slope
