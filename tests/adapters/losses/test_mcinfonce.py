"""MCInfoNCE: golden numbers, full vectors straight from the formula, and the limits in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import MCInfoNCE, mcinfonce, sampled
from posthoc.adapters.vmf import VonMisesFisher

from .tools import Inputs, Moments, gap, golden_inputs, posteriors, tangent

Loss = Callable[..., Tensor]
STOCHASTIC = ("d3_rolled", "d10_neg4", "d10_rolled_wide", "d64_neg3_k16_32", "d64_rolled_k100_200")


def rows_of_full_vectors(tau: Any, samples: int, generator: torch.Generator, *posterior: VonMisesFisher) -> Tensor:
    """The loss of every row from samples of every posterior, as the formula reads."""
    z = [p.rsample((samples,), generator) for p in posterior]
    far = z[2] if len(z) > 2 else z[1].roll(1, 1)[:, :, None]
    close = tau * (z[0] * z[1]).sum(-1)
    negative = torch.logsumexp(tau * (z[0][:, :, None] * far).sum(-1), -1) - math.log(far.shape[2])
    share = close - torch.logaddexp(close, negative)
    return math.log(samples) - torch.logsumexp(share, 0)


def full_vectors(tau: float, samples: int) -> tuple[Loss, Tensor]:
    log = torch.tensor(math.log(tau), dtype=torch.float64, requires_grad=True)
    return lambda *p, generator: rows_of_full_vectors(log.exp(), samples, generator, *p).mean(), log


def ours(tau: float, samples: int, antithetic: bool) -> tuple[Loss, Tensor]:
    loss = MCInfoNCE(tau, samples, learnable=True, antithetic=antithetic)
    assert loss.log_concentration is not None
    return loss, loss.log_concentration


def draw(objective: tuple[Loss, Tensor], inputs: Inputs, copies: int, calls: int, seed: int = 0) -> dict[str, Moments]:
    """The loss (named "loss") and its gradients for the inputs and for tau, over many draws.

    The rows stand `copies` times one after the other in each call: neither they nor their rolled negatives notice.
    """
    loss, log_tau = objective
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Tensor]] = {name: [] for name in ("loss", "tau", *inputs)}
    for _ in range(calls):
        leaves = {n: x.repeat(copies, *[1] * (x.ndim - 1)).requires_grad_() for n, x in inputs.items()}
        value = loss(*posteriors(leaves), generator=generator)
        grads = torch.autograd.grad(value, [log_tau, *leaves.values()])
        seen["loss"].append(value.detach()[None])
        seen["tau"].append(grads[0][None])
        for (name, x), grad in zip(inputs.items(), grads[1:], strict=True):
            seen[name].append(copies * grad.reshape(copies, *x.shape))
    every = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: Moments(x.mean(0), x.std(0) / math.sqrt(len(x))) for name, x in every.items()}


def assert_same(one: dict[str, Moments], other: dict[str, Moments]) -> None:
    for name, moments in one.items():
        assert gap(moments, other[name]).max() < (4.0 if name == "loss" else 5.0), name
    error = max(float(m["loss"].error / m["loss"].mean.abs()) for m in (one, other))
    assert error < 0.02, "too few draws for this comparison to mean anything"


def make_inputs(dim: int, negatives: int, dtype: torch.dtype = torch.float64, kappa: Any = (0.0, 0.5, 10.0)) -> Inputs:
    """Rows of related pairs; concentrations are `kappa` times the dimension, mixed over rows and columns."""
    generator = torch.Generator().manual_seed(dim + negatives)

    def direction(*shape: int) -> Tensor:
        return functional.normalize(torch.randn(*shape, dim, generator=generator, dtype=torch.float64), dim=-1)

    rows = max(4, len(kappa))
    kappas = dim * torch.tensor(kappa, dtype=torch.float64)
    inputs = {"mu_ref": direction(rows), "kappa_ref": kappas[torch.arange(rows) % len(kappa)]}
    inputs["mu_pos"] = functional.normalize(inputs["mu_ref"] + 0.7 * direction(rows), dim=-1)
    inputs["kappa_pos"] = kappas[(torch.arange(rows) // 2 + 1) % len(kappa)]
    if negatives:
        inputs["mu_neg"] = functional.normalize(0.5 * inputs["mu_ref"][:, None] + direction(rows, negatives), dim=-1)
        inputs["kappa_neg"] = kappas[torch.randint(len(kappa), (rows, negatives), generator=generator)]
    return {name: x.to(dtype) for name, x in inputs.items()}


# The `mcinfonce_*` of golden/mcinfonce/url_losses.npz are no loss of this library: see the `infonce_*` in test_ntxent.


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("case", STOCHASTIC)
def test_golden_means_of_loss_and_gradients(shared: Path, case: str, antithetic: bool) -> None:
    golden = np.load(shared / f"golden/mcinfonce/mcinfonce_{case}.npz")
    meta, inputs = json.loads(str(golden["meta"])), golden_inputs(golden)
    tau, samples = meta["loss_args"]["kappa_init"], meta["loss_args"]["n_samples"]
    seen = draw(ours(tau, samples, antithetic), inputs, copies=50, calls=30)
    exact = Moments(*(torch.tensor(float(golden[f"exact_loss_{part}"])) for part in ("mean", "se")))
    assert gap(seen["loss"], exact) < 4.0
    gaps: list[Tensor] = []
    for name, x in inputs.items():
        mean, error = (torch.tensor(golden[f"exact_grad_{part}_{name}"]).reshape(x.shape) for part in ("mean", "se"))
        truth = Moments(tangent(mean, x) if name.startswith("mu") else mean, error)
        gaps.append(gap(seen[name], truth).flatten())
    apart = torch.cat(gaps)
    assert (apart > 5.0).double().mean() <= 1e-3  # the golden README's rule
    assert apart.max() < 8.0
    truth = Moments(*(tau * torch.tensor(float(golden[f"exact_grad_{p}_loss_kappa"][0])) for p in ("mean", "se")))
    assert gap(seen["tau"], truth) < 5.0


def test_the_papers_sampler_would_be_told_apart(shared: Path) -> None:
    """At d = 64 and kappa 16..32 the reference's numbers are wrong; were ours, the comparison above would pass them."""
    golden = np.load(shared / "golden/mcinfonce/mcinfonce_d64_neg3_k16_32.npz")
    seen = draw(ours(16.0, 64, False), golden_inputs(golden), copies=20, calls=10)
    reference = Moments(*(torch.tensor(float(golden[f"ref_loss_{part}"])) for part in ("mean", "se")))
    assert gap(seen["loss"], reference) > 50.0


@pytest.mark.parametrize(("case", "rounding"), [("neg4_d10", 1e-6), ("rolled_d3", 3e-6)])
def test_golden_loss_of_given_samples(shared: Path, case: str, rounding: float) -> None:
    """The stored gradients are float32: at the second case's temperature of 60 they err by 2e-6 from float64."""
    golden = np.load(shared / f"golden/mcinfonce/fixed_mcinfonce_{case}.npz")
    names = [name for name in ("samples_ref", "samples_pos", "samples_neg") if name in golden]
    z = {name: torch.tensor(golden[name]).double().requires_grad_() for name in names}
    far = z["samples_neg"] if "samples_neg" in z else z["samples_pos"].roll(1, 1)
    cosine = (z["samples_ref"] * torch.cat([z["samples_pos"], far], 2)).sum(-1).permute(1, 2, 0)
    tau = torch.tensor(json.loads(str(golden["meta"]))["loss_args"]["kappa_init"]).double().requires_grad_()
    value, grad, by_tau = (
        x / len(cosine) for x in mcinfonce._rows(cosine.detach(), tau.detach(), weight=1 / (cosine.shape[1] - 1))
    )
    grads = torch.autograd.grad(cosine, list(z.values()), grad, retain_graph=True)
    close, far_cosines = tau * cosine[:, 0], tau * cosine[:, 1:]
    share = close - torch.logaddexp(close, far_cosines.logsumexp(1) - math.log(far.shape[2]))
    plain = (math.log(cosine.shape[2]) - share.logsumexp(-1)).mean()
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-12)
    for x, y in zip((*grads, by_tau), torch.autograd.grad(plain, [*z.values(), tau]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value.detach(), golden["loss_value"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_tau, golden["grad_loss_kappa"][0], rtol=1e-5, atol=1e-6)
    for name, x in zip(names, grads, strict=True):
        np.testing.assert_allclose(x, golden[f"grad_{name}"], rtol=1e-5, atol=rounding)


def test_golden_limit_of_points(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/crisp_mcinfonce_d10_rolled.npz")
    loss = MCInfoNCE(json.loads(str(golden["meta"]))["temp"], n_samples=3)
    value = loss(*posteriors(golden_inputs(golden)))
    np.testing.assert_allclose(value, golden["loss_value"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("dim", [2, 3, 4, 8, 10, 64, 512])
def test_agrees_with_full_vectors(dim: int, negatives: int) -> None:
    inputs = make_inputs(dim, negatives)
    copies = 8 if dim == 512 else 50
    assert_same(
        draw(ours(8.0, 8, False), inputs, copies, calls=40),
        draw(full_vectors(8.0, 8), inputs, copies, calls=40, seed=1),
    )


def test_agrees_with_full_vectors_where_there_are_more_columns_than_dimensions() -> None:
    inputs = make_inputs(4, 9, torch.float32, kappa=(2.0, 6.0, math.inf))
    one, other = draw(ours(8.0, 5, False), inputs, 50, 40), draw(full_vectors(8.0, 5), inputs, 50, 40, seed=1)
    assert_same(one, other)


@pytest.mark.parametrize("dim", [2, 10, 64])
def test_opposite_pairs_give_the_same_loss_and_gradients_with_less_noise(dim: int) -> None:
    inputs = make_inputs(dim, 8, kappa=(1.0, 3.0))
    paired, free = (draw(ours(8.0, 200, antithetic), inputs, copies=4, calls=60) for antithetic in (True, False))
    assert_same(paired, free)
    assert paired["loss"].error < 0.9 * free["loss"].error
    for name in inputs:
        assert paired[name].error.square().mean() < free[name].error.square().mean()


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("samples", [1, 7])
def test_any_number_of_samples(samples: int, antithetic: bool) -> None:
    inputs = make_inputs(10, 3)
    # with one sample, or where nothing is paired, it is the very estimator of the formula; pairs lower the bias
    seen = draw(ours(8.0, samples, antithetic), inputs, 50, 20)["loss"]
    exact = draw(full_vectors(8.0, samples), inputs, 50, 20, seed=1)["loss"]
    if samples == 1 or not antithetic:
        assert gap(seen, exact) < 4.0
    else:
        many = draw(full_vectors(8.0, 500), inputs, 4, 20, seed=1)["loss"]
        assert many.mean - 4.0 * many.error < seen.mean < exact.mean + 4.0 * exact.error


def test_summed_negatives_are_softmax_cross_entropy() -> None:
    inputs = make_inputs(6, 5, torch.float64, kappa=(math.inf,))
    value = MCInfoNCE(7.0, 4, negative_weight=1.0)(*posteriors(inputs))
    mu = {name: functional.normalize(x, dim=-1) for name, x in inputs.items() if name.startswith("mu")}
    columns = torch.cat([mu["mu_pos"][:, None], mu["mu_neg"]], 1)
    logits = 7.0 * (mu["mu_ref"][:, None] * columns).sum(-1)
    expected = functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
    with pytest.raises(OptionError, match="negative_weight=0"):
        MCInfoNCE(negative_weight=0.0)


def closed_form(tau: float, inputs: Inputs) -> Tensor:
    """InfoNCE between unit vectors, with the mean of the negatives' exponentials."""
    mu = {name: functional.normalize(x, dim=-1) for name, x in inputs.items() if name.startswith("mu")}
    far = mu["mu_neg"] if "mu_neg" in mu else mu["mu_pos"].roll(1, 0)[:, None]
    negative = torch.logsumexp(tau * (mu["mu_ref"][:, None] * far).sum(-1), -1) - math.log(far.shape[1])
    return functional.softplus(negative - tau * (mu["mu_ref"] * mu["mu_pos"]).sum(-1)).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("dim", [2, 3, 4, 10, 64])
def test_points_are_infonce(dim: int, negatives: int, dtype: torch.dtype) -> None:
    inputs = {n: x.requires_grad_() for n, x in make_inputs(dim, negatives, dtype, kappa=(math.inf,)).items()}
    loss = MCInfoNCE(20.0, 6, learnable=True)
    assert loss.log_concentration is not None
    value = loss(*posteriors(inputs))
    assert value.dtype == dtype
    *grads, by_log = torch.autograd.grad(value, [*inputs.values(), loss.log_concentration])
    truth = closed_form(20.0, inputs)
    mus = [x for name, x in inputs.items() if name.startswith("mu")]
    expected = dict(zip(map(id, mus), torch.autograd.grad(truth, mus), strict=True))
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(value, truth, **close)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        if name.startswith("mu"):
            torch.testing.assert_close(grad, expected[id(x)], **close)
        else:
            assert torch.equal(grad, torch.zeros_like(x)), "a point cannot be made sharper"
    step = 1e-4
    slope = (closed_form(20.0 * math.exp(step), inputs) - closed_form(20.0 * math.exp(-step), inputs)) / (2.0 * step)
    assert float(by_log) == pytest.approx(slope.item(), rel=2e-2 if dtype == torch.float32 else 1e-5, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.1, 20.0, 1e4])
@pytest.mark.parametrize("dim", [2, 3, 10, 512])
def test_extremes_are_finite(dim: int, tau: float, dtype: torch.dtype) -> None:
    for negatives in (0, 3):
        for kappa in ((0.0,), (1e8,), (1e30,), (0.0, 1e-30, 1e8, math.inf)):
            scaled = tuple(k / dim for k in kappa)
            inputs = {n: x.requires_grad_() for n, x in make_inputs(dim, negatives, dtype, scaled).items()}
            value = MCInfoNCE(tau, 4)(*posteriors(inputs))
            grads = torch.autograd.grad(value, list(inputs.values()))
            assert value.isfinite()
            assert all(grad.isfinite().all() for grad in grads)
            if min(kappa) >= 1e8 and tau < 1e3:
                torch.testing.assert_close(value, closed_form(tau, inputs), rtol=2e-2, atol=1e-3)


def test_rows_that_are_one_and_the_same_point() -> None:
    """Where columns lie on the anchor the frame has no second axis, and nothing can be told apart: log 2."""
    mu = functional.normalize(torch.ones(4, 64), dim=-1).requires_grad_()
    for kappa in (1e8, math.inf):
        for shape in (None, (4, 3)):
            point = VonMisesFisher(mu, kappa)
            far = None if shape is None else VonMisesFisher(mu[:, None].expand(4, 3, 64), kappa)
            value = MCInfoNCE(20.0, 8)(point, point, far)
            (grad,) = torch.autograd.grad(value, mu)
            assert float(value.detach()) == pytest.approx(math.log(2.0), abs=1e-2)
            assert grad.isfinite().all()


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dim", [2, 3, 6, 10, 64])
def test_gradient_for_concentrations_is_that_of_the_same_samples(dim: int, antithetic: bool) -> None:
    """With the random numbers held, the loss is a function of every kappa and of tau: differences are its gradient."""
    inputs = make_inputs(dim, 2, kappa=(0.3, 2.0, 9.0))

    def evaluate(tau: float = 6.0) -> tuple[Tensor, Tensor]:
        loss = MCInfoNCE(tau, 9, learnable=True, antithetic=antithetic).double()
        assert loss.log_concentration is not None
        value = loss(*posteriors(inputs), generator=torch.Generator().manual_seed(3))
        return value, loss.log_concentration

    def of_kappa(_: Tensor) -> float:
        return float(evaluate()[0])

    kappas = [inputs[f"kappa_{name}"].requires_grad_() for name in ("ref", "pos", "neg")]
    value, log = evaluate()
    *grads, by_log = torch.autograd.grad(value, [*kappas, log])
    with torch.no_grad():
        for kappa, grad in zip(kappas, grads, strict=True):
            for place, expected in zip(kappa.view(-1), grad.reshape(-1).tolist(), strict=True):
                step = 1e-4 * float(place)
                difference = of_kappa(place.add_(step)) - of_kappa(place.sub_(2.0 * step))
                place.add_(step)
                assert difference / (2.0 * step) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        slope = (evaluate(6.0 * math.exp(1e-3))[0] - evaluate(6.0 * math.exp(-1e-3))[0]) / 2e-3
    assert float(slope) == pytest.approx(float(by_log), rel=1e-3)


def test_gradients_for_mean_directions_are_tangent() -> None:
    for dim, negatives in ((2, 3), (10, 20), (64, 3)):
        inputs = {n: x.requires_grad_() for n, x in make_inputs(dim, negatives).items()}
        mus = [x for name, x in inputs.items() if name.startswith("mu")]
        for mu, grad in zip(mus, torch.autograd.grad(MCInfoNCE(8.0)(*posteriors(inputs)), mus), strict=True):
            assert (grad * mu).sum(-1).abs().max() < 1e-12
            assert grad.abs().max() > 1e-6


def test_blocks_of_rows_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {n: x.requires_grad_() for n, x in make_inputs(10, 3, kappa=(math.inf,)).items()}
    whole = MCInfoNCE(5.0, 4)(*posteriors(inputs))
    by_whole = torch.autograd.grad(whole, list(inputs.values()))
    monkeypatch.setattr(sampled, "CHUNK", 1)  # a row at a time
    parts = MCInfoNCE(5.0, 4)(*posteriors(inputs))
    torch.testing.assert_close(parts, whole)
    for one, other in zip(torch.autograd.grad(parts, list(inputs.values())), by_whole, strict=True):
        torch.testing.assert_close(one, other)
    inputs = make_inputs(10, 0)
    assert_same(draw(ours(8.0, 8, False), inputs, 8, 50), draw(full_vectors(8.0, 8), inputs, 50, 20, seed=1))


@pytest.mark.parametrize("dim", [2, 10, 64])
def test_random_numbers_come_from_the_generator_alone(dim: int) -> None:
    inputs = {n: x.requires_grad_() for n, x in make_inputs(dim, 3).items()}

    def evaluate(generator: torch.Generator | None) -> tuple[Tensor, ...]:
        value = MCInfoNCE(8.0)(*posteriors(inputs), generator=generator)
        return (value, *torch.autograd.grad(value, list(inputs.values())))

    state = torch.get_rng_state()
    first, again, other = (evaluate(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(7)
    first = evaluate(None)
    assert not torch.equal(first[0], evaluate(None)[0])
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, evaluate(None), strict=True))


def test_value_and_gradients_do_not_depend_on_what_else_is_asked_for() -> None:
    inputs = make_inputs(10, 3)

    def evaluate() -> Tensor:
        return MCInfoNCE(8.0)(*posteriors(inputs), generator=torch.Generator().manual_seed(0))

    plain = evaluate()
    assert not plain.requires_grad
    inputs["kappa_ref"].requires_grad_()
    assert torch.equal(evaluate(), plain)
    (alone,) = torch.autograd.grad(3.0 * evaluate(), inputs["kappa_ref"])
    inputs["mu_neg"].requires_grad_()
    together = torch.autograd.grad(evaluate(), [inputs["kappa_ref"], inputs["mu_neg"]])
    torch.testing.assert_close(alone, 3.0 * together[0])
    with torch.no_grad():
        assert torch.equal(evaluate(), plain)
    with torch.inference_mode():
        assert torch.equal(evaluate(), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_are_computed_in_full(dtype: torch.dtype) -> None:
    half = {n: x.to(dtype) for n, x in make_inputs(64, 3, torch.float32, kappa=(0.5, 2.0)).items()}
    leaves = {n: x.requires_grad_() for n, x in half.items()}

    def evaluate(inputs: Inputs) -> Tensor:
        return MCInfoNCE(8.0)(*posteriors(inputs), generator=torch.Generator().manual_seed(0))

    full = evaluate({n: x.detach().float() for n, x in half.items()})
    assert full.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        value = evaluate(leaves)
    assert torch.equal(value, full)
    assert torch.equal(evaluate(leaves), full)
    for x, grad in zip(leaves.values(), torch.autograd.grad(value, list(leaves.values())), strict=True):
        assert grad.dtype == x.dtype
        assert grad.isfinite().all()


def test_the_concentration_is_a_parameter_only_where_asked() -> None:
    fixed, learnt = MCInfoNCE(16.0), MCInfoNCE(16.0, learnable=True)
    assert list(fixed.parameters()) == []
    assert fixed.concentration == 16.0
    assert [name for name, _ in learnt.named_parameters()] == ["log_concentration"]
    inputs = make_inputs(8, 3, torch.float32, kappa=(4.0,))
    optimizer = torch.optim.Adam(learnt.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    before = float(learnt(*posteriors(inputs), generator=generator).detach())
    for _ in range(20):
        optimizer.zero_grad()
        learnt(*posteriors(inputs), generator=generator).backward()
        optimizer.step()
    after = float(learnt(*posteriors(inputs), generator=generator).detach())
    assert float(torch.as_tensor(learnt.concentration).detach()) != pytest.approx(16.0, abs=1.0)
    assert after < before
    again = MCInfoNCE(3.0, learnable=True)
    again.load_state_dict(learnt.state_dict())
    assert torch.equal(torch.as_tensor(again.concentration), torch.as_tensor(learnt.concentration))
