"""Expected likelihood kernels: golden numbers, integrals, high precision, and the limits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import ExpectedLikelihoodKernel, elk
from posthoc.adapters.losses.elk import log_expected_likelihood
from posthoc.adapters.vmf import VonMisesFisher, log_normalizer

from .tools import Inputs, golden_inputs, posteriors


def make_inputs(dim: int, negatives: int, kappa: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(dim + negatives)
    kappas = torch.tensor(kappa, dtype=torch.float64)
    inputs = {}
    for name, shape in (("ref", (5,)), ("pos", (5,)), ("neg", (5, negatives))):
        if math.prod(shape):
            mu = functional.normalize(torch.randn(*shape, dim, generator=generator, dtype=torch.float64), dim=-1)
            inputs[f"mu_{name}"] = mu.to(dtype).requires_grad_()
            inputs[f"kappa_{name}"] = kappas[torch.arange(math.prod(shape)) % len(kappa)].reshape(shape).to(dtype)
            inputs[f"kappa_{name}"].requires_grad_()
    return inputs


def read(shared: Path, case: str) -> tuple[Any, float, Inputs]:
    golden = np.load(shared / f"golden/mcinfonce/{case}.npz")
    inputs = {name: x.double().requires_grad_() for name, x in golden_inputs(golden).items()}
    return golden, json.loads(str(golden["meta"]))["temp"], inputs


@pytest.mark.parametrize(("kind", "rtol"), [("exactC", 1e-6), ("ref", 1e-4)])
@pytest.mark.parametrize("case", ["elk_d10_neg1", "elk_d8_neg5", "elk_d64_neg2", "elk_d10_rolled_bug"])
def test_golden(shared: Path, monkeypatch: pytest.MonkeyPatch, case: str, kind: str, rtol: float) -> None:
    golden, tau, inputs = read(shared, case)
    bug = case.endswith("bug")
    loss = ExpectedLikelihoodKernel(tau, learnable=True, reference=bug or kind == "ref").double()
    assert loss.log_concentration is not None
    loss.log_concentration.data.fill_(math.log(tau))
    if bug and kind == "exactC":  # the exact normaliser with the kernels rolled: half of the reference
        monkeypatch.setattr(elk, "_paper_log_c", elk._log_c)
    value = loss(*posteriors(inputs))
    np.testing.assert_allclose(value.item(), golden[f"{kind}_loss"], rtol=rtol)
    *grads, by_log = torch.autograd.grad(value, [*inputs.values(), loss.log_concentration])
    np.testing.assert_allclose(by_log / tau, golden[f"{kind}_grad_loss_kappa"][0], rtol=rtol)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        expected = torch.tensor(golden[f"{kind}_grad_{name}"]).double().reshape(x.shape)
        if name.startswith("mu"):
            mu = x.detach()
            expected = expected - (expected * mu).sum(-1, keepdim=True) * mu
        # the stored directions are float32, and of length 1 only to 1e-7
        np.testing.assert_allclose(grad, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_golden_fit_of_the_papers_normaliser(shared: Path) -> None:
    """Up to its constant, which cancels in every kernel."""
    golden = np.load(shared / "golden/mcinfonce/vmf_norm.npz")
    kappa = torch.tensor(golden["kappas"])
    there = [row for row, dim in enumerate(golden["dims"].tolist()) if dim in elk.PAPER_FIT]
    assert len(there) >= 3
    for row in there:
        expected = golden["ref_elk_logC"][row]
        seen = (elk._paper_log_c(kappa, int(golden["dims"][row])) - kappa).numpy()
        np.testing.assert_allclose(seen - seen[0], expected - expected[0], rtol=1e-6, atol=1e-9)


def test_the_papers_rolled_kernels_are_no_negatives(shared: Path) -> None:
    golden, tau, inputs = read(shared, "elk_d10_rolled_bug")
    right = ExpectedLikelihoodKernel(tau)(*posteriors(inputs)).item()
    assert abs(right - float(golden["exactC_loss"])) > 40.0


def test_golden_classes_as_distributions(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/url_losses.npz")
    features, u, weight = (torch.tensor(golden[n]).double() for n in ("features", "unc", "classifier_weight"))
    features.requires_grad_()
    u.requires_grad_()
    target = torch.tensor(golden["targets"])
    other = torch.stack([torch.tensor([c for c in range(6) if c != t]) for t in target.tolist()])
    kappa = 10.0 * weight.norm(dim=-1).clamp(min=1.0)
    value = ExpectedLikelihoodKernel(1.0, reference=True)(
        VonMisesFisher(features, 1.0 / u),
        VonMisesFisher(weight[target], kappa[target]),
        VonMisesFisher(weight[other], kappa[other]),
    )
    assert value.item() == pytest.approx(float(golden["elk_class"]), rel=1e-5)
    for grad, name in zip(torch.autograd.grad(value, [features, u]), ("features", "unc"), strict=True):
        expected = golden[f"elk_class_grad_{name}"]
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def exact_log_kernel(k1: float, k2: float, chord: float, dim: int) -> float:
    with mpmath.workdps(60):
        nu = mpmath.mpf(dim) / 2 - 1

        def log_c(k: Any) -> Any:
            if k == 0:
                return mpmath.loggamma(nu + 1) - mpmath.log(2) - (nu + 1) * mpmath.log(mpmath.pi)
            return (
                nu * mpmath.log(k)
                - (nu + 1) * mpmath.log(2 * mpmath.pi)
                - mpmath.log(mpmath.besseli(nu, k, maxterms=10**6))
            )

        one, two = mpmath.mpf(k1), mpmath.mpf(k2)
        k3 = mpmath.sqrt((one + two) ** 2 - one * two * mpmath.mpf(chord))
        return float(log_c(one) + log_c(two) - log_c(k3))


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 4096])
def test_kernel_in_high_precision(dim: int) -> None:
    cases = [(0.0, 0.0, 1.0), (0.0, 7.0, 1.0), (1.0, 2.0, 0.3), (16.0, 32.0, 3.9), (100.0, 5.0, 0.0), (2e3, 3e4, 1.7)]
    k1, k2, chord = (torch.tensor(x, dtype=torch.float64) for x in zip(*cases, strict=True))
    seen = elk._log_kernel(k1, k2, chord, dim, elk._log_c)
    expected = torch.tensor([exact_log_kernel(*case, dim) for case in cases], dtype=torch.float64)
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-6 if dim == 4096 else 1e-8)


@pytest.mark.parametrize("dim", [2, 3])
def test_kernel_is_the_integral_of_the_product(dim: int) -> None:
    """By quadrature: equally spaced angles on the circle, Gauss-Legendre in the height on the sphere."""
    angle = torch.arange(400, dtype=torch.float64) * (2.0 * math.pi / 400)
    z = torch.stack([angle.cos(), angle.sin()], -1)
    weight = torch.full((400,), 2.0 * math.pi / 400, dtype=torch.float64)
    if dim == 3:
        height, share = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(80))
        ring = (1.0 - height.square()).sqrt()[:, None, None] * z
        z = torch.cat([ring, height[:, None, None].expand(-1, 400, 1)], -1).reshape(-1, 3)
        weight = (share[:, None] * weight).flatten()
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(2, 6, dim, generator=generator, dtype=torch.float64)
    kappa = 20.0 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    one, other = (VonMisesFisher(mu[i], kappa[i]) for i in (0, 1))
    density = torch.exp(one.log_prob(z[:, None]) + other.log_prob(z[:, None]))
    truth = (weight[:, None] * density).sum(0).log()
    torch.testing.assert_close(log_expected_likelihood(one, other), truth, rtol=1e-9, atol=1e-9)


def test_kernel_is_the_mean_density_under_samples(generator: torch.Generator) -> None:
    mu = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    one, other = VonMisesFisher(mu[0], 4.0), VonMisesFisher(mu[1], 9.0)
    density = other.log_prob(one.sample((40_000,), generator)).exp()
    kernel = log_expected_likelihood(one, other).exp()
    assert abs(density.mean() - kernel) < 4.0 * density.std() / 200.0
    assert density.std() / 200.0 < 0.05 * kernel


def test_loss_is_the_softmax_of_the_kernels() -> None:
    inputs = make_inputs(12, 3, kappa=(3.0, 8.0, 20.0))
    ref, pos, neg = posteriors(inputs)
    kernels = [log_expected_likelihood(ref, pos)[:, None]]
    kernels += [
        log_expected_likelihood(ref, VonMisesFisher(neg.mean_direction[:, m], neg.concentration[:, m]))[:, None]
        for m in range(3)
    ]
    plain = functional.cross_entropy(1.5 * torch.cat(kernels, 1), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(ExpectedLikelihoodKernel(1.5)(ref, pos, neg), plain, rtol=1e-9, atol=1e-9)


def test_rolled_negatives_are_the_rolled_positives() -> None:
    ref, pos = posteriors(make_inputs(10, 0, kappa=(3.0, 8.0)))
    rolled = VonMisesFisher(pos.mean_direction.roll(1, 0)[:, None], pos.concentration.roll(1, 0)[:, None])
    loss = ExpectedLikelihoodKernel(2.0)
    torch.testing.assert_close(loss(ref, pos), loss(ref, pos, rolled))


def labelled(rows: int, dim: int, seed: int = 0) -> tuple[VonMisesFisher, Tensor]:
    """Posteriors of a batch, and class probabilities of three classes: some certain, some not."""
    generator = torch.Generator().manual_seed(seed)
    mu = functional.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)
    kappa = 2.0 + 20.0 * torch.rand(rows, generator=generator, dtype=torch.float64)
    p = torch.softmax(4.0 * torch.randn(rows, 3, generator=generator, dtype=torch.float64), 1)
    p[: rows // 2] = torch.eye(3, dtype=torch.float64)[torch.arange(rows // 2) % 3]
    return VonMisesFisher(mu.requires_grad_(), kappa.requires_grad_()), p


@pytest.mark.parametrize("tau", [0.5, 2.0])
@torch.no_grad()
def test_all_pairs_one_by_one(tau: float) -> None:
    q, p = labelled(9, 6)
    same, total, weights = p @ p.T, 0.0, 0.0

    def kernel(i: int, j: int) -> float:
        one, other = (VonMisesFisher(q.mean_direction[k], q.concentration[k]) for k in (i, j))
        return float((tau * log_expected_likelihood(one, other)).exp())

    for i in range(9):
        for j in set(range(9)) - {i}:
            others = sum(float(1 - same[i, k]) * kernel(i, k) for k in range(9) if k not in (i, j))
            total += float(same[i, j]) * math.log(1 + others / kernel(i, j))
            weights += float(same[i, j])
    assert float(ExpectedLikelihoodKernel(tau).all_pairs(q, same)) == pytest.approx(total / weights, rel=1e-9)


def test_all_pairs_of_sure_labels_are_the_loss_with_all_rows_of_other_classes_as_negatives() -> None:
    q, _ = labelled(8, 5)
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    loss, values = ExpectedLikelihoodKernel(1.0), []
    for i in range(8):
        far = label != label[i]
        for j in torch.nonzero(~far)[:, 0].tolist():
            if j != i:
                anchor, positive = (VonMisesFisher(q.mean_direction[[k]], q.concentration[[k]]) for k in (i, j))
                negative = VonMisesFisher(q.mean_direction[far][None], q.concentration[far][None])
                values.append(loss(anchor, positive, negative))
    same = (label[:, None] == label).double()
    torch.testing.assert_close(loss.all_pairs(q, same), torch.stack(values).mean())


def test_gradients_of_all_pairs_in_the_extremes() -> None:
    q, p = labelled(6, 4)
    mu, kappa = q.mean_direction.detach().requires_grad_(), q.concentration.detach().requires_grad_()
    loss = ExpectedLikelihoodKernel(1.0)
    same = p @ p.T
    assert torch.autograd.gradcheck(
        lambda m, k: loss.all_pairs(VonMisesFisher(functional.normalize(m, dim=-1), k, validate_args=False), same),
        (mu, kappa),
    )
    for one in (torch.ones(6, 6), torch.eye(6), torch.zeros(6, 6)):  # no negatives; no positives
        value = loss.all_pairs(VonMisesFisher(functional.normalize(mu, dim=-1), kappa, validate_args=False), one)
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, (mu, kappa)))
    sharp = torch.full_like(kappa, 1e12).requires_grad_()
    value = loss.all_pairs(VonMisesFisher(functional.normalize(mu, dim=-1), sharp, validate_args=False), same)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, (mu, sharp)))


def test_all_pairs_refuse_what_does_not_fit() -> None:
    q, p = labelled(6, 4)
    with pytest.raises(OptionError, match=r"shape \[6, 3\]; expected \[6, 6\]"):
        ExpectedLikelihoodKernel(1.0).all_pairs(q, p)
    with pytest.raises(OptionError, match="reference=True"):
        ExpectedLikelihoodKernel(1.0, reference=True).all_pairs(q, p @ p.T)


@pytest.mark.parametrize(("dim", "negatives"), [(2, 2), (5, 0), (5, 2)])
def test_gradients(dim: int, negatives: int) -> None:
    every = make_inputs(dim, negatives, kappa=(0.5, 3.0, 20.0))
    inputs = {name: x[:3].detach().requires_grad_() for name, x in every.items()}
    loss = ExpectedLikelihoodKernel(1.3, learnable=True).double()

    def evaluate(log: Tensor, *given: Tensor) -> Tensor:
        loss.log_concentration = None
        loss.fixed_concentration = log.exp()  # type: ignore[assignment]
        return loss(*posteriors(dict(zip(inputs, given, strict=True))))

    log = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(evaluate, (log, *inputs.values()))


def test_gradient_of_opposite_posteriors_is_finite() -> None:
    """There |k1 mu1 + k2 mu2| is 0, and a root has no slope."""
    mu = torch.eye(6, dtype=torch.float64)[:2].requires_grad_()
    kappa = torch.full((2,), 5.0, dtype=torch.float64, requires_grad=True)
    value = log_expected_likelihood(VonMisesFisher(mu, kappa), VonMisesFisher(-mu, kappa))
    assert value[0].item() == pytest.approx(exact_log_kernel(5.0, 5.0, 4.0, 6))
    by_mu, by_kappa = torch.autograd.grad(value.sum(), [mu, kappa])
    torch.testing.assert_close(by_mu, torch.zeros_like(by_mu))
    step = 1e-4
    slope = (exact_log_kernel(5.0 + step, 5.0 + step, 4.0, 6) - exact_log_kernel(5.0 - step, 5.0 - step, 4.0, 6)) / 2e-4
    torch.testing.assert_close(by_kappa, torch.full_like(by_kappa, slope), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 3, 10, 4096])
def test_extremes_are_finite(dim: int, dtype: torch.dtype) -> None:
    for tau in (0.1, 1e4):
        for kappa in ((0.0,), (1e8,), (1e30,), (math.inf,), (0.0, 1e-30, 1e8, math.inf)):
            for negatives in (0, 3):
                inputs = make_inputs(dim, negatives, kappa, dtype)
                value = ExpectedLikelihoodKernel(tau)(*posteriors(inputs))
                assert value.isfinite()
                assert value.dtype == dtype
                for (name, x), grad in zip(
                    inputs.items(), torch.autograd.grad(value, list(inputs.values())), strict=True
                ):
                    assert grad.isfinite().all()
                    if name.startswith("kappa"):
                        assert (grad[torch.isinf(x)] == 0.0).all(), "a point cannot be made sharper"


@pytest.mark.parametrize("dim", [2, 10, 512])
def test_limits_of_the_kernel(dim: int) -> None:
    mu = torch.randn(2, 4, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = VonMisesFisher(mu[0], torch.tensor([0.0, 3.0, 50.0, 1e4]))
    point, uniform = VonMisesFisher(mu[1], math.inf), VonMisesFisher(mu[1], 0.0)
    density = posterior.log_prob(point.mean_direction)
    torch.testing.assert_close(log_expected_likelihood(posterior, point), density, rtol=1e-9, atol=1e-7)
    area = log_normalizer(torch.zeros(4, dtype=torch.float64), dim)
    torch.testing.assert_close(log_expected_likelihood(posterior, uniform), area, rtol=1e-9, atol=1e-9)
    same = log_expected_likelihood(point, point)
    assert (same > log_expected_likelihood(VonMisesFisher(mu[1], 1e8), point) - 1e-6).all()
    assert (log_expected_likelihood(VonMisesFisher(mu[0], math.inf), point) < -1e10).all(), "two points are apart"


def test_float32_is_computed_in_full_and_autocast_changes_nothing() -> None:
    inputs = make_inputs(64, 3, (10.0, 3e4, 1e6), torch.float32)
    loss = ExpectedLikelihoodKernel(2.0)
    value = loss(*posteriors(inputs))
    double = loss(*posteriors({name: x.double() for name, x in inputs.items()}))
    torch.testing.assert_close(value.double(), double, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*posteriors(inputs)), value)
    assert loss(*posteriors({name: x.bfloat16() for name, x in inputs.items()})).dtype == torch.float32


@pytest.mark.parametrize("negatives", [0, 3])
def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, negatives: int) -> None:
    inputs = {name: x.detach()[:3].requires_grad_() for name, x in make_inputs(4, negatives, kappa=(3.0,)).items()}
    loss = ExpectedLikelihoodKernel()
    whole = loss(*posteriors(inputs))
    by_whole = torch.autograd.grad(whole, list(inputs.values()))
    monkeypatch.setattr(elk, "CHUNK", 1)
    parts = loss(*posteriors(inputs))
    assert torch.equal(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, list(inputs.values())), by_whole)
    tau = ExpectedLikelihoodKernel(1.5)
    evaluate = lambda *x: tau(*posteriors(dict(zip(inputs, x, strict=True))))  # noqa: E731
    assert torch.autograd.gradgradcheck(evaluate, list(inputs.values()))


def test_the_concentration_is_a_parameter_only_where_asked() -> None:
    assert list(ExpectedLikelihoodKernel().parameters()) == []
    loss = ExpectedLikelihoodKernel(3.0, learnable=True)
    assert float(torch.as_tensor(loss.concentration).detach()) == pytest.approx(3.0)
    loss(*posteriors(make_inputs(8, 2, (3.0,)))).backward()
    assert loss.log_concentration is not None
    assert loss.log_concentration.grad is not None
    assert loss.log_concentration.grad != 0.0


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"concentration=-1.0.*positive"):
        ExpectedLikelihoodKernel(-1.0)
    fits, other = VonMisesFisher(torch.ones(4, 8), 1.0), VonMisesFisher(torch.ones(4, 7), 1.0)
    with pytest.raises(OptionError, match=r"ExpectedLikelihoodKernel expects .* \[B, M\]"):
        ExpectedLikelihoodKernel()(fits, other)
    with pytest.raises(OptionError, match="dimensions 8 and 7"):
        log_expected_likelihood(fits, other)
    with pytest.raises(OptionError, match=r"dimensions \[4, 8, 10.*; 7 was given"):
        ExpectedLikelihoodKernel(reference=True)(other, other)
