from __future__ import annotations

import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posthoc.adapters.errors import OptionError
from posthoc.adapters.vmf import (
    VonMisesFisher,
    concentration_from_resultant,
    log_normalizer,
    mean_resultant_length,
)

DIMS = (2, 3, 4, 8, 10, 16, 32, 64, 128, 512, 2048)
KAPPAS = (0.1, 1.0, 4.0, 10.0, 10.5, 12.0, 16.0, 32.0, 64.0, 200.0, 1000.0)


def _axis(dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.eye(1, dim, dtype=dtype)[0]


def _exact(kappa: float, dim: int) -> tuple[float, float]:
    """log C and A to 30 digits, by recurrence from where the Bessel function of order 0 or 1/2 is known."""
    with mpmath.workdps(40):
        k, nu = mpmath.mpf(kappa), mpmath.mpf(dim) / 2 - 1
        order, ratio, log = nu + 60 + int(8 * mpmath.sqrt(k)), mpmath.mpf(0), mpmath.mpf(0)
        while order > nu % 1:  # the ratio of the orders order and order - 1; whatever it starts from is soon forgotten
            ratio = 1 / (2 * order / k + ratio)
            if order == nu + 1:
                mean = ratio
            elif order <= nu:
                log += mpmath.log(ratio)
            order -= 1
        log += mpmath.log(mpmath.besseli(nu % 1, k))
        return float(nu * mpmath.log(k) - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi) - log), float(mean)


def test_golden_normaliser_and_mean_length(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/vmf_norm.npz")
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        kappa = torch.tensor(golden["kappas"], dtype=dtype)
        for row, dim in enumerate(golden["dims"].tolist()):
            np.testing.assert_allclose(log_normalizer(kappa, dim), golden["logC"][row], rtol=tolerance)
            np.testing.assert_allclose(mean_resultant_length(kappa, dim), golden["A"][row], rtol=tolerance)
            np.testing.assert_allclose(log_normalizer(kappa[0] * 0, dim), golden["logC0"][row], rtol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 4096), st.floats(-6.0, 8.0))
def test_normaliser_and_mean_length_against_mpmath(dim: int, exponent: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        kappa = torch.tensor(10.0**exponent, dtype=dtype)
        log, mean = _exact(float(kappa), dim)
        assert float(mean_resultant_length(kappa, dim)) == pytest.approx(mean, rel=tolerance)
        assert float(log_normalizer(kappa, dim)) == pytest.approx(log, rel=tolerance, abs=tolerance)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 4096), st.floats(-6.0, 6.0))
def test_concentration_against_mpmath(dim: int, exponent: float) -> None:
    kappa = 10.0**exponent
    _, mean = _exact(kappa, dim)
    seen = float(concentration_from_resultant(torch.tensor(mean, dtype=torch.float64), dim))
    # what a rounding of the resultant makes of kappa bounds what can be asked near 1
    assert seen == pytest.approx(kappa, rel=1e-9 + 4e-16 * kappa / dim)


def _share_below(cosine: float, kappa: float, dim: int) -> float:
    """The distribution function of mu.z by Gauss-Legendre in the angle, over what lies within 14 deviations of the mode."""
    n = dim - 2.0
    mode = math.acos((math.sqrt(n * n + 4.0 * kappa * kappa) - n) / (2.0 * kappa))
    bend = kappa * math.cos(mode) + (n / math.sin(mode) ** 2 if n else 0.0)
    low, high = max(0.0, mode - 14.0 / math.sqrt(bend)), min(math.pi, mode + 14.0 / math.sqrt(bend))
    node, weight = np.polynomial.legendre.leggauss(400)

    def mass(start: float, stop: float) -> float:
        angle = 0.5 * (stop - start) * (node + 1.0) + start
        log = kappa * (np.cos(angle) - math.cos(mode)) + (n * np.log(np.sin(angle) / math.sin(mode)) if n else 0.0)
        return float(0.5 * (stop - start) * (weight * np.exp(log)).sum())

    split = min(max(math.acos(cosine), low), high)
    above, below = mass(low, split), mass(split, high)
    return below / (above + below)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 4096), st.floats(-3.0, 5.0), st.floats(0.001, 0.999))
def test_quantile_of_the_cosine_against_quadrature(dim: int, exponent: float, level: float) -> None:
    kappa = 10.0**exponent
    posterior = VonMisesFisher(_axis(dim, torch.float64), kappa)
    assert _share_below(float(posterior.cosine_quantile(level)), kappa, dim) == pytest.approx(level, abs=1e-8)


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512, 4096])
def test_derivative_of_mean_length_does_not_cancel(dim: int) -> None:
    kappa = torch.tensor([1e-8, 1e-3, 0.5, 7.0, 90.0, 1e4, 1e8], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(mean_resultant_length(kappa, dim).sum(), kappa)
    with mpmath.workdps(60):
        for k, got in zip(kappa.tolist(), slope.tolist(), strict=True):
            if k > 1e6:
                truth = (dim - 1) / (2 * k * k)  # the next term is smaller by d / k
                assert got == pytest.approx(truth, rel=dim / k)
                continue
            nu = mpmath.mpf(dim) / 2 - 1
            a = mpmath.besseli(nu + 1, k) / mpmath.besseli(nu, k)
            assert got == pytest.approx(float(1 - a * a - (dim - 1) * a / mpmath.mpf(k)), rel=1e-8)


@pytest.mark.parametrize("dim", [2, 5, 64])
def test_gradients_of_the_special_functions(dim: int) -> None:
    kappa = torch.tensor([0.0, 0.3, 5.0, dim - 0.1, dim + 0.1, 300.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(log_normalizer(kappa, dim).sum(), kappa)
    assert torch.equal(grad, -mean_resultant_length(kappa, dim))
    inner = kappa.detach()[1:].requires_grad_()
    for function in (log_normalizer, mean_resultant_length):
        assert torch.autograd.gradcheck(lambda k, f=function: f(k, dim), (inner,))
        assert torch.autograd.gradgradcheck(lambda k, f=function: f(k, dim), (inner,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 3, 100, 4096])
def test_extreme_concentrations_are_finite(dim: int, dtype: torch.dtype) -> None:
    kappa = torch.tensor([0.0, 1e-30, 1e-6, 1.0, 1e8, 1e30, math.inf], dtype=dtype, requires_grad=True)
    mean, log = mean_resultant_length(kappa, dim), log_normalizer(kappa, dim)
    by_mean, by_log = (torch.autograd.grad(x.sum(), kappa)[0] for x in (mean, log))
    assert mean[0] == 0
    assert mean[-1] == 1
    assert log[:-1].isfinite().all()
    assert log[-1] == -torch.inf
    assert by_mean.isfinite().all()
    assert by_mean[-1] == 0
    assert torch.equal(by_log, -mean)


def test_half_precision_is_computed_in_full() -> None:
    kappa = torch.tensor([0.5, 20.0]).half()
    assert log_normalizer(kappa, 8).dtype == torch.float32
    torch.testing.assert_close(mean_resultant_length(kappa, 8), mean_resultant_length(kappa.float(), 8))


def test_mean_length_can_be_exported() -> None:
    class Head(torch.nn.Module):
        def forward(self, kappa: torch.Tensor) -> torch.Tensor:
            return mean_resultant_length(kappa, 16)

    kappa = torch.tensor([0.0, 3.0, 1e8])
    program = torch.export.export(Head(), (kappa,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    other = torch.tensor([0.5, math.inf])
    torch.testing.assert_close(program.module()(other), mean_resultant_length(other, 16))


@pytest.mark.parametrize("dim", [2, 3, 16, 1280, 4096])
def test_concentration_inverts_the_mean_length(dim: int) -> None:
    kappa = torch.tensor([1e-6, 0.1, 3.0, 50.0, 1e4, 1e7], dtype=torch.float64)
    resultant = mean_resultant_length(kappa, dim)
    # what a rounding of the resultant makes of kappa bounds what can be asked near 1
    tolerance = 1e-6 + 4e-16 * kappa / dim
    assert ((concentration_from_resultant(resultant, dim) / kappa - 1.0).abs() < tolerance).all()
    ends = concentration_from_resultant(torch.tensor([0.0, 1.0]), dim)
    assert ends.tolist() == [0.0, math.inf]
    assert concentration_from_resultant(torch.tensor([0.5]), dim).dtype == torch.float32
    inner = torch.tensor([0.05, 0.4, 0.97], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: concentration_from_resultant(r, dim).log(), (inner,))
    with torch.inference_mode():
        assert torch.equal(concentration_from_resultant(inner, dim), concentration_from_resultant(inner, dim))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionError, match=r"\[0, 1\].*1.5"):
        concentration_from_resultant(torch.tensor([0.2, 1.5]), 4)
    with pytest.raises(OptionError, match="at least 2 dimensions; 1"):
        log_normalizer(torch.ones(1), 1)
    with pytest.raises(OptionError, match="at least 2 dimensions; 1"):
        VonMisesFisher(torch.ones(3, 1), 1.0)
    with pytest.raises(ValueError, match="concentration"):
        VonMisesFisher(torch.ones(3), -1.0, validate_args=True)


@pytest.mark.parametrize("dim", DIMS)
def test_sampled_mean_cosine_and_its_gradient(dim: int, generator: torch.Generator) -> None:
    n = max(500, min(20_000, 1_000_000 // dim))
    kappa = torch.tensor(KAPPAS).expand(n, -1).clone().requires_grad_()
    cosine = VonMisesFisher(_axis(dim), kappa).rsample((), generator)[..., 0]
    (slope,) = torch.autograd.grad(cosine.sum(), kappa)
    exact = torch.tensor(KAPPAS, dtype=torch.float64, requires_grad=True)
    mean = mean_resultant_length(exact, dim)
    (by_kappa,) = torch.autograd.grad(mean.sum(), exact)
    for seen, truth in ((cosine, mean), (slope, by_kappa)):
        seen = seen.detach().double()
        assert ((seen.mean(0) - truth).abs() < 4.0 * seen.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("dim", [2, 3, 5, 8, 10, 64, 512])
def test_sampled_cosine_has_its_distribution(dim: int, generator: torch.Generator) -> None:
    for kappa in (0.0, 0.7, 12.0, 500.0):
        z = VonMisesFisher(_axis(dim), kappa).sample((20_000,), generator).double().numpy()
        angle = np.linspace(0.0, math.pi, 200_001)[1:-1]
        log = (dim - 2) * np.log(np.sin(angle)) + kappa * (np.cos(angle) - 1.0)
        mass = np.cumsum(np.exp(log - log.max()))
        seen = np.arctan2(np.linalg.norm(z[:, 1:], axis=1), z[:, 0])
        assert stats.kstest(np.interp(seen, angle, mass / mass[-1]), "uniform").pvalue > 1e-3
        if dim > 2:  # and the rest of it is uniform round the mean
            side = z[:, 1] / np.linalg.norm(z[:, 1:], axis=1)
            assert stats.kstest(0.5 * (side + 1.0), stats.beta(0.5 * (dim - 2), 0.5 * (dim - 2)).cdf).pvalue > 1e-3


def test_gradient_of_sampled_mean_is_unbiased(shared: Path, generator: torch.Generator) -> None:
    golden = np.load(shared / "golden/mcinfonce/vmf_sampler_stats.npz")
    n = 5_000
    for row, dim in enumerate(golden["dims"].tolist()):
        kappa = torch.tensor(golden["kappas"], dtype=torch.float32).expand(n, -1).clone().requires_grad_()
        cosine = VonMisesFisher(_axis(dim), kappa).rsample(generator=generator)[..., 0]
        (grad,) = torch.autograd.grad(cosine.sum(), kappa)
        for value, truth in ((cosine.detach(), golden["A"][row]), (grad, golden["dA"][row])):
            value = value.double()
            assert ((value.mean(0) - torch.tensor(truth)).abs() < 4.0 * value.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_gradient_for_the_mean_direction_is_tangent_and_unbiased(dim: int, generator: torch.Generator) -> None:
    n, kappa = 20_000, torch.tensor(5.0, dtype=torch.float64)
    start = torch.randn(dim, generator=generator, dtype=torch.float64)
    mu = start.expand(n, -1).clone().requires_grad_()
    target = torch.randn(dim, generator=generator, dtype=torch.float64)
    z = VonMisesFisher(mu, kappa).rsample(generator=generator)
    (grad,) = torch.autograd.grad((z @ target).sum(), mu)
    unit = start / start.norm()
    assert (grad @ unit).abs().max() < 1e-10
    truth = mean_resultant_length(kappa, dim) * (target - (target @ unit) * unit) / start.norm()
    assert ((grad.mean(0) - truth).abs() < 4.5 * grad.std(0) / math.sqrt(n)).all()


def test_golden_quantiles_of_the_cosine(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/vmf_sampler_stats.npz")
    kappa = torch.tensor(golden["kappas"], dtype=torch.float64)[:, None]
    for row, dim in enumerate(golden["dims"].tolist()):
        quantile = VonMisesFisher(_axis(dim, torch.float64), kappa).cosine_quantile(torch.tensor(golden["probs"]))
        np.testing.assert_allclose(quantile.numpy(), golden["q_exact"][row], rtol=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 10, 300])
def test_quantile_at_the_ends_and_its_gradients(dim: int) -> None:
    kappa = torch.tensor([0.0, 2.0, 1e8, math.inf], dtype=torch.float64)
    posterior = VonMisesFisher(_axis(dim, torch.float64), kappa)
    assert posterior.cosine_quantile(0.0).tolist() == [-1.0] * 4
    assert posterior.cosine_quantile(1.0).tolist() == [1.0] * 4
    low, high = posterior.cosine_quantile(1e-12), posterior.cosine_quantile(1.0 - 1e-12)
    assert (low < high).tolist() == [True, True, True, False]
    assert low[-1] == 1.0
    k = torch.tensor([0.5, 3.0, 80.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.02, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    axis = _axis(dim, torch.float64)
    assert torch.autograd.gradcheck(lambda k, q: VonMisesFisher(axis, k).cosine_quantile(q), (k, q), rtol=1e-4)
    pointed = torch.tensor(math.inf, requires_grad=True)
    VonMisesFisher(_axis(dim), pointed).cosine_quantile(0.05).backward()
    assert pointed.grad == 0


@pytest.mark.parametrize("dim", [2, 3, 10, 200])
def test_density_and_entropy(dim: int, generator: torch.Generator) -> None:
    kappa = torch.tensor([0.0, 1.5, 40.0], dtype=torch.float64)
    posterior = VonMisesFisher(_axis(dim, torch.float64), kappa)
    z = posterior.sample((20_000,), generator)
    log = posterior.log_prob(z)
    torch.testing.assert_close(log, log_normalizer(kappa, dim) + kappa * z[..., 0], rtol=1e-9, atol=1e-9)
    se = log.std(0) / math.sqrt(20_000)
    assert ((log.mean(0) + posterior.entropy()).abs() <= 4.0 * se + 1e-9).all()
    single = VonMisesFisher(_axis(dim), torch.tensor(1e8))
    peak = float(log_normalizer(torch.tensor(1e8, dtype=torch.float64), dim)) + 1e8
    assert float(single.log_prob(_axis(dim))) == pytest.approx(peak, abs=1e-4, rel=1e-6)
    point = VonMisesFisher(_axis(dim), torch.tensor(math.inf))
    assert point.log_prob(torch.stack([_axis(dim), -_axis(dim)])).tolist() == [math.inf, -math.inf]
    assert point.entropy() == -torch.inf


@pytest.mark.parametrize("dim", [2, 5, 10, 700])
def test_extreme_samples_and_gradients_are_finite(dim: int, generator: torch.Generator) -> None:
    kappa = torch.tensor([0.0, 1e-6, 1e8, 1e30, math.inf], requires_grad=True)
    mu = torch.randn(5, dim, generator=generator, requires_grad=True)
    z = VonMisesFisher(mu, kappa).rsample((64,), generator)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(64, 5))
    weight = torch.randn(z.shape, generator=generator)
    by_mu, by_kappa = torch.autograd.grad((z * weight).sum(), (mu, kappa))
    assert by_mu.isfinite().all()
    assert by_kappa.isfinite().all()
    assert by_kappa[-1] == 0
    torch.testing.assert_close(z[:, -1], (mu[-1] / mu[-1].norm()).expand(64, -1))


def test_batches_of_none_and_no_samples() -> None:
    none = VonMisesFisher(torch.ones(0, 3), torch.ones(0))
    assert none.rsample((2,)).shape == (2, 0, 3)
    assert none.mean.shape == (0, 3)
    assert VonMisesFisher(torch.ones(2, 3), 1.0).sample((0,)).shape == (0, 2, 3)


def test_a_share_outside_0_and_1_is_no_share() -> None:
    for q in (-0.1, 1.5, math.nan):
        with pytest.raises(OptionError, match=f"q={q}"):
            VonMisesFisher(torch.ones(3), 1.0).cosine_quantile(q)


def test_it_is_a_torch_distribution(generator: torch.Generator) -> None:
    mu = torch.randn(4, 1, 6, generator=generator)
    posterior = VonMisesFisher(3.0 * mu, torch.rand(3, generator=generator), validate_args=True)
    assert posterior.batch_shape == (4, 3)
    assert posterior.event_shape == (6,)
    torch.testing.assert_close(posterior.mean_direction.norm(dim=-1), torch.ones(4, 3))
    wide = posterior.expand((2, 4, 3))
    assert wide.rsample((5,)).shape == (5, 2, 4, 3, 6)
    assert wide.log_prob(posterior.sample()).shape == (2, 4, 3)
    torch.testing.assert_close(wide.mean[1], posterior.mean)
    with pytest.raises(ValueError, match="support"):
        posterior.log_prob(2.0 * posterior.sample())


def test_samples_come_from_the_generator_alone() -> None:
    posterior = VonMisesFisher(torch.eye(4), 3.0)
    state = torch.get_rng_state()
    first = posterior.rsample((3,), torch.Generator().manual_seed(5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, posterior.rsample((3,), torch.Generator().manual_seed(5)))
    assert not torch.equal(first, posterior.rsample((3,), torch.Generator().manual_seed(6)))
