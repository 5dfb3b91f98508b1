"""Losses of sampled cosines: HedgedInstance, MCInfoNCE's other ways to draw, and the papers' sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import HedgedInstance, MCInfoNCE, hedged_instance, mcinfonce, sampled
from posthoc.adapters.vmf import VonMisesFisher

from .tools import Inputs, Moments, gap, golden_inputs, posteriors, tangent

READINGS = ("mean-log", "log-mean")


def read(shared: Path, case: str) -> tuple[Any, dict[str, Any], Inputs]:
    """A golden file, its loss's arguments, and its inputs."""
    golden = np.load(shared / f"golden/mcinfonce/{case}.npz")
    return golden, json.loads(str(golden["meta"]))["loss_args"], golden_inputs(golden)


def make_inputs(dim: int, negatives: int, kappa: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Inputs:
    """Six rows of related pairs; concentrations are `kappa` times the dimension, mixed over rows and columns."""
    generator = torch.Generator().manual_seed(dim + negatives)

    def direction(*shape: int) -> Tensor:
        return functional.normalize(torch.randn(*shape, dim, generator=generator, dtype=torch.float64), dim=-1)

    kappas = dim * torch.tensor(kappa, dtype=torch.float64)
    inputs = {"mu_ref": direction(6), "kappa_ref": kappas[torch.arange(6) % len(kappa)]}
    inputs["mu_pos"] = functional.normalize(inputs["mu_ref"] + 0.7 * direction(6), dim=-1)
    inputs["kappa_pos"] = kappas[(torch.arange(6) // 2 + 1) % len(kappa)]
    if negatives:
        inputs["mu_neg"] = functional.normalize(0.5 * inputs["mu_ref"][:, None] + direction(6, negatives), dim=-1)
        inputs["kappa_neg"] = kappas[torch.randint(len(kappa), (6, negatives), generator=generator)]
    return {name: x.to(dtype) for name, x in inputs.items()}


def leaves(inputs: Inputs) -> Inputs:
    return {name: x.clone().requires_grad_() for name, x in inputs.items()}


def measure(loss: Callable[..., Tensor], inputs: Inputs, copies: int, calls: int, seed: int = 0) -> dict[str, Moments]:
    """The loss (named "loss") and its gradients, by a module's parameters too, over many draws.

    The rows stand `copies` times one after the other in each call: neither they nor their rolled negatives notice.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(loss.named_parameters()) if isinstance(loss, nn.Module) else {}
    seen: dict[str, list[Tensor]] = {name: [] for name in ("loss", *parameters, *inputs)}
    for _ in range(calls):
        given = leaves({n: x.repeat(copies, *[1] * (x.ndim - 1)) for n, x in inputs.items()})
        value = loss(*posteriors(given), generator=generator)
        grads = torch.autograd.grad(value, [*parameters.values(), *given.values()])
        seen["loss"].append(value.detach()[None])
        for name, grad in zip(parameters, grads, strict=False):
            seen[name].append(grad[None])
        for (name, x), grad in zip(inputs.items(), grads[len(parameters) :], strict=True):
            seen[name].append(copies * grad.reshape(copies, *x.shape))
    every = {name: torch.cat(parts).double() for name, parts in seen.items()}
    return {name: Moments(x.mean(0), x.std(0) / math.sqrt(len(x))) for name, x in every.items()}


def stored(golden: Any, kind: str, inputs: Inputs, name: str) -> Moments:
    """Stored moments of a gradient, for mean directions their tangent part."""
    mean, error = (torch.tensor(golden[f"{kind}_grad_{part}_{name}"]).double() for part in ("mean", "se"))
    if name not in inputs:
        return Moments(mean[0], error[0])
    x = inputs[name].double()
    mean, error = mean.reshape(x.shape), error.reshape(x.shape)
    return Moments(tangent(mean, x) if name.startswith("mu") else mean, error)


def assert_stored(seen: dict[str, Moments], golden: Any, kind: str, inputs: Inputs) -> None:
    truth = Moments(*(torch.tensor(float(golden[f"{kind}_loss_{part}"])) for part in ("mean", "se")))
    heavy = truth.mean < 1e-3  # the stored standard errors are too small there
    assert gap(seen["loss"], truth) < (8.0 if heavy else 4.0)
    for name in inputs:
        assert gap(seen[name], stored(golden, kind, inputs, name)).max() < (8.0 if heavy else 5.0), name


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("case", ["hib_d10_neg2", "hib_d8_rolled_a2_b1"])
def test_golden_hedged_instance(shared: Path, case: str, reference: bool) -> None:
    golden, given, inputs = read(shared, case)
    scale = given["kappa_init"]
    loss = HedgedInstance(scale, given["b_init"], given["n_samples"], learnable=True, reference=reference)
    seen = measure(loss, inputs, copies=10 if reference else 30, calls=15)
    kind = "ref" if reference else "exact"
    assert_stored(seen, golden, kind, inputs)
    by_scale = stored(golden, kind, inputs, "loss_kappa")
    assert gap(seen["log_scale"], Moments(scale * by_scale.mean, scale * by_scale.error)) < 5.0
    assert gap(seen["learnt_shift"], stored(golden, kind, inputs, "loss_b")) < 5.0


@pytest.mark.parametrize("case", ["d10_neg4", "d10_rolled_wide", "d3_rolled", "d64_neg3_k16_32", "d64_rolled_k100_200"])
def test_golden_mcinfonce_of_the_papers_code(shared: Path, case: str) -> None:
    golden, given, inputs = read(shared, f"mcinfonce_{case}")
    tau = given["kappa_init"]
    loss = MCInfoNCE(tau, given["n_samples"], learnable=True, reference=True)
    seen = measure(loss, inputs, copies=10, calls=15)
    assert_stored(seen, golden, "ref", inputs)
    by_tau = stored(golden, "ref", inputs, "loss_kappa")
    assert gap(seen["log_concentration"], Moments(tau * by_tau.mean, tau * by_tau.error)) < 5.0


@pytest.mark.parametrize("reading", READINGS)
def test_golden_hedged_instance_of_given_samples(shared: Path, reading: str) -> None:
    golden = np.load(shared / "golden/mcinfonce/fixed_hib_neg3_d8.npz")
    z = {n: torch.tensor(golden[f"samples_{n}"]).double().requires_grad_() for n in ("ref", "pos", "neg")}
    cosine = (z["ref"] * torch.cat([z["pos"], z["neg"]], 2)).sum(-1).permute(1, 2, 0)
    scale, shift = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 1.0))
    rows = partial(hedged_instance._rows, reading=reading)
    value = sampled._GivenLoss.apply(cosine, rows, scale, shift)
    p = torch.sigmoid(scale * cosine + shift)
    if reading == "log-mean":
        p = p.mean(-1, keepdim=True)
    plain = -p[:, 0].log().mean() - (1.0 - p[:, 1:]).log().mean() / 3
    torch.testing.assert_close(value, plain, rtol=1e-9, atol=0.0)
    inputs = (*z.values(), scale, shift)
    grads = torch.autograd.grad(value, inputs, retain_graph=True)
    for grad, expected in zip(grads, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-14)
    if reading == "mean-log":
        np.testing.assert_allclose(value.detach(), golden["loss_value"], rtol=1e-5, atol=1e-6)
        for name, grad in zip((*(f"samples_{n}" for n in z), "loss_kappa", "loss_b"), grads, strict=True):
            expected = golden[f"grad_{name}"]
            np.testing.assert_allclose(grad.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_golden_log_of_the_mean_probability(shared: Path) -> None:
    """The second code's version; it adds 1e-5 to every probability."""
    golden = np.load(shared / "golden/mcinfonce/url_losses.npz")
    z = torch.tensor(golden["samples"]).double()
    order = torch.stack([torch.tensor([i ^ 1, *(j for j in range(10) if j not in (i, i ^ 1))]) for i in range(10)])
    cosine = (z[:, :, None] * z[:, order]).sum(-1).permute(1, 2, 0)
    options = json.loads(str(golden["meta"]))["hib"]
    scale, shift = (torch.tensor(options[name], dtype=torch.float64) for name in ("kappa", "b"))
    value = hedged_instance._rows(cosine, scale, shift, weight=1.0, reading="log-mean")[0] / 10
    p = torch.sigmoid(scale * cosine + shift).mean(-1)
    assert float(value) == pytest.approx(float(-p[:, 0].log().mean() - (1.0 - p[:, 1:]).log().mean()), rel=1e-9)
    assert float(value) == pytest.approx(float(golden["hib_ssl"]), rel=1e-4)
    floored = -(p[:, 0] + 1e-5).log().mean() - (1.0 - p[:, 1:] - 1e-5).log().mean()
    assert float(floored) == pytest.approx(float(golden["hib_ssl"]), rel=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        partial(hedged_instance._rows, reading="mean-log"),
        partial(hedged_instance._rows, reading="log-mean", weight=1.7),
        partial(mcinfonce._rows, weight=0.25),
        partial(mcinfonce._rows, weight=1.0, positives=3),
    ],
)
def test_gradients_of_given_samples(rows: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    cosine = (2.0 * torch.rand(3, 5, 4, generator=generator, dtype=torch.float64) - 1.0).requires_grad_()
    hedged = rows.func is hedged_instance._rows if isinstance(rows, partial) else False
    parameters = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ((2.0, 0.3) if hedged else (2.0,))]
    assert torch.autograd.gradcheck(lambda c, *p: sampled._GivenLoss.apply(c, rows, *p), (cosine, *parameters))


@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize(
    ("dim", "kappa", "named"), [(2, 5.0, ("mu", "kappa")), (3, 5.0, ("kappa",)), (3, math.inf, ("mu",))]
)
@pytest.mark.parametrize("loss", [MCInfoNCE(6.0, 7, learnable=True), HedgedInstance(3.0, 0.2, 7, learnable=True)])
def test_gradients_of_fixed_draws(
    loss: nn.Module, dim: int, kappa: float, named: tuple[str, ...], negatives: int
) -> None:
    """By differences, the draws held. Above d = 2 a mean's gradient is that of samples it turns along, another coupling
    with the same mean: there `test_agrees_with_full_vectors` compares means over many draws."""
    inputs = make_inputs(dim, negatives, kappa=(1.0, 1.5))
    if math.isinf(kappa):
        inputs = {n: x if n.startswith("mu") else torch.full_like(x, kappa) for n, x in inputs.items()}
    names = [name for name in inputs if name.startswith(named)]
    loss = loss.double()
    parameters = list(loss.parameters())

    def evaluate(*given: Tensor) -> Tensor:
        everything = {**inputs, **dict(zip(names, given, strict=False))}
        return loss(*posteriors(everything), generator=torch.Generator().manual_seed(3))

    given = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(evaluate, [*given, *parameters], atol=1e-6, rtol=1e-4)


def hedged_of_full_vectors(reading: str, samples: int, *posterior: VonMisesFisher, generator: Any) -> Tensor:
    z = [p.rsample((samples,), generator) for p in posterior]
    far = z[2] if len(z) > 2 else z[1].roll(1, 1)[:, :, None]
    close = torch.sigmoid(3.0 * (z[0] * z[1]).sum(-1) - 0.5)
    apart = 1.0 - torch.sigmoid(3.0 * (z[0][:, :, None] * far).sum(-1) - 0.5)
    if reading == "mean-log":
        return -close.log().mean() - apart.log().mean()
    return -close.mean(0).log().mean() - apart.mean(0).log().mean()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("dim", "negatives"), [(2, 2), (3, 0), (10, 12), (64, 3)])
def test_hedged_instance_agrees_with_full_vectors(dim: int, negatives: int, reading: str) -> None:
    inputs = make_inputs(dim, negatives, kappa=(0.0, 0.5, 10.0))
    loss = HedgedInstance(3.0, -0.5, 4, reading=reading, negative_weight=1.0, antithetic=False)
    one = measure(loss, inputs, copies=40, calls=15)
    other = measure(partial(hedged_of_full_vectors, reading, 4), inputs, copies=40, calls=15, seed=1)
    for name in other:
        assert gap(one[name], other[name]).max() < (4.0 if name == "loss" else 5.0), name
    assert other["loss"].error < 0.02 * other["loss"].mean


@pytest.mark.parametrize("dim", [2, 6, 10, 64])
def test_ways_to_draw_have_the_same_mean_where_the_loss_has_no_bias(dim: int) -> None:
    inputs = make_inputs(dim, 4, kappa=(0.5, 3.0))
    truth = measure(partial(hedged_of_full_vectors, "mean-log", 16), inputs, copies=30, calls=10, seed=1)
    for options in ({"sobol": True}, {"antithetic": True}):
        loss = HedgedInstance(3.0, -0.5, 16, negative_weight=1.0, **options)
        seen = measure(loss, inputs, copies=30, calls=10)
        for name in truth:
            assert gap(seen[name], truth[name]).max() < (4.0 if name == "loss" else 5.0), name
        if dim >= 10:  # 16 Sobol points are too few for the signs that make the samples of a plane
            assert seen["loss"].error < 0.9 * truth["loss"].error


@pytest.mark.parametrize("dim", [2, 10, 64])
def test_sobol_points_lower_the_noise(dim: int) -> None:
    inputs = make_inputs(dim, 6, kappa=(1.0, 3.0))
    even, paired = (measure(MCInfoNCE(8.0, 256, sobol=sobol), inputs, copies=4, calls=40) for sobol in (True, False))
    for name in even:
        assert gap(even[name], paired[name]).max() < 5.0, name
    assert even["loss"].error < 0.8 * paired["loss"].error
    for name in inputs:
        assert even[name].error.square().mean() < paired[name].error.square().mean(), name


def test_more_columns_than_sobol_points_have_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(10, 4, kappa=(0.5, 3.0))
    truth = measure(partial(hedged_of_full_vectors, "mean-log", 8), inputs, copies=30, calls=10, seed=1)
    monkeypatch.setattr("posthoc.adapters.losses.draws.SobolEngine.MAXDIM", 13)
    seen = measure(HedgedInstance(3.0, -0.5, 8, negative_weight=1.0, sobol=True), inputs, copies=30, calls=10)
    assert gap(seen["loss"], truth["loss"]) < 4.0
    assert gap(seen["mu_neg"], truth["mu_neg"]).max() < 5.0


def mcinfonce_with_draws(draws: int, samples: int, *posterior: VonMisesFisher, generator: Any) -> Tensor:
    """Full vectors: `draws` samples of the positive for every sample of the anchor."""
    z = posterior[0].rsample((samples,), generator)
    close = 8.0 * (z * posterior[1].rsample((draws, samples), generator)).sum(-1)
    far = posterior[2].rsample((samples,), generator)
    negative = torch.logsumexp(8.0 * (z[:, :, None] * far).sum(-1), -1) - math.log(far.shape[2])
    share = close - torch.logaddexp(close, negative)
    return (math.log(draws * samples) - share.flatten(0, 1).logsumexp(0)).mean()


@pytest.mark.parametrize("dim", [2, 10, 64])
def test_extra_draws_of_the_positive(dim: int) -> None:
    inputs = make_inputs(dim, 5, kappa=(0.5, 3.0))
    several = measure(MCInfoNCE(8.0, 6, antithetic=False, positive_draws=4), inputs, copies=40, calls=15)
    truth = measure(partial(mcinfonce_with_draws, 4, 6), inputs, copies=40, calls=15, seed=1)
    for name in truth:
        assert gap(several[name], truth[name]).max() < (4.0 if name == "loss" else 5.0), name


def test_extra_draws_of_the_positive_lower_noise_and_bias() -> None:
    inputs = make_inputs(10, 5, kappa=(0.5, 3.0))
    one, several = (
        measure(MCInfoNCE(8.0, 6, antithetic=False, positive_draws=draws), inputs, copies=40, calls=60)
        for draws in (1, 4)
    )
    assert several["loss"].error < 0.9 * one["loss"].error
    assert several["loss"].mean < one["loss"].mean - 3.0 * one["loss"].error


def closed_form(scale: float, shift: float, inputs: Inputs) -> Tensor:
    mu = {name: functional.normalize(x, dim=-1) for name, x in inputs.items() if name.startswith("mu")}
    far = mu["mu_neg"] if "mu_neg" in mu else mu["mu_pos"].roll(1, 0)[:, None]
    close = scale * (mu["mu_ref"] * mu["mu_pos"]).sum(-1) + shift
    apart = scale * (mu["mu_ref"][:, None] * far).sum(-1) + shift
    return functional.softplus(-close).mean() + functional.softplus(apart).mean() / far.shape[1]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("dim", [2, 3, 10, 64])
def test_points_are_a_logistic_regression(dim: int, negatives: int, dtype: torch.dtype, reading: str) -> None:
    inputs = leaves(make_inputs(dim, negatives, (math.inf,), dtype))
    value = HedgedInstance(20.0, -3.0, 5, reading=reading)(*posteriors(inputs))
    truth = closed_form(20.0, -3.0, inputs)
    assert value.dtype == dtype
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(value, truth, **close)
    grads = torch.autograd.grad(value, list(inputs.values()))
    expected = torch.autograd.grad(truth, [x for name, x in inputs.items() if name.startswith("mu")])
    for one, other in zip(grads[::2], expected, strict=True):
        torch.testing.assert_close(one, other, **close)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in grads[1::2]), "a point cannot be made sharper"


def test_rolled_negatives_are_the_rolled_positives() -> None:
    inputs = make_inputs(10, 0, (math.inf,))
    ref, pos = posteriors(inputs)
    rolled = VonMisesFisher(inputs["mu_pos"].roll(1, 0)[:, None], inputs["kappa_pos"].roll(1, 0)[:, None])
    for loss in (HedgedInstance(5.0), MCInfoNCE(5.0), MCInfoNCE(5.0, positive_draws=3)):
        torch.testing.assert_close(loss(ref, pos), loss(ref, pos, rolled))
        assert (loss(ref, pos) - loss(ref, pos, VonMisesFisher(inputs["mu_pos"][:, None], math.inf))).abs() > 1e-3


@pytest.mark.parametrize("options", [{}, {"reading": "log-mean"}, {"sobol": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 3, 10, 4096])
def test_extremes_are_finite(dim: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for scale in (0.1, 1e4):
        for kappa in ((0.0,), (1e8,), (0.0, 1e-30, 1e8, math.inf)):
            given = make_inputs(dim, 3, tuple(k / dim for k in kappa), dtype)
            given["mu_pos"] = given["mu_ref"].clone()  # the sigmoid of a true match saturates
            inputs = leaves(given)
            for loss in (HedgedInstance(scale, 20.0, 4, **options), MCInfoNCE(scale, 4, sobol="sobol" in options)):
                value = loss(*posteriors(inputs))
                assert value.isfinite()
                assert all(x.isfinite().all() for x in torch.autograd.grad(value, list(inputs.values())))


@pytest.mark.parametrize("options", [{}, {"reading": "log-mean"}, {"sobol": True}])
@pytest.mark.parametrize("dim", [2, 6, 10])
def test_gradient_for_concentrations_is_that_of_the_same_samples(dim: int, options: dict[str, Any]) -> None:
    inputs = make_inputs(dim, 2, kappa=(0.3, 2.0, 9.0))
    losses = [HedgedInstance(4.0, -0.5, 9, **options)]
    losses += [MCInfoNCE(4.0, 9, sobol="sobol" in options, positive_draws=2)]  # type: ignore[list-item]
    kappas = [inputs[f"kappa_{name}"].requires_grad_() for name in ("ref", "pos", "neg")]
    for loss in losses:

        def evaluate(loss: nn.Module = loss) -> Tensor:
            return loss(*posteriors(inputs), generator=torch.Generator().manual_seed(3))

        grads = torch.autograd.grad(evaluate(), kappas)
        with torch.no_grad():
            for kappa, grad in zip(kappas, grads, strict=True):
                place, expected = kappa.view(-1)[1], float(grad.reshape(-1)[1])
                step = 1e-4 * float(place)
                place.add_(step)
                above = float(evaluate(loss))
                place.sub_(2.0 * step)
                difference = above - float(evaluate(loss))
                place.add_(step)
                assert difference / (2.0 * step) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"sobol": True}, {"reference": True}])
def test_random_numbers_come_from_the_generator_alone(options: dict[str, Any]) -> None:
    inputs = make_inputs(10, 3, kappa=(0.5, 3.0))
    for loss in (HedgedInstance(**options), MCInfoNCE(**options)):

        def evaluate(seed: int, loss: nn.Module = loss) -> Tensor:
            return loss(*posteriors(inputs), generator=torch.Generator().manual_seed(seed))

        state = torch.get_rng_state()
        assert torch.equal(evaluate(5), evaluate(5))
        assert not torch.equal(evaluate(5), evaluate(6))
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{}, {"sobol": True}, {"reference": True}])
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    inputs = make_inputs(10, 3, (0.5, 2.0), torch.float32)
    for loss in (HedgedInstance(**options), MCInfoNCE(**options)):
        full = loss(*posteriors(inputs), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*posteriors(inputs), generator=torch.Generator().manual_seed(0))
        assert value.dtype == torch.float32
        assert torch.equal(value, full)
        half = {n: x.bfloat16() for n, x in inputs.items()}
        assert loss(*posteriors(half), generator=torch.Generator().manual_seed(0)).dtype == torch.float32


def test_scale_and_shift_are_parameters_only_where_asked() -> None:
    assert list(HedgedInstance().parameters()) == []
    loss = HedgedInstance(2.0, -0.5, learnable=True)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale", "learnt_shift"]
    torch.testing.assert_close((loss.scale, loss.shift), (torch.tensor(2.0), torch.tensor(-0.5)), check_dtype=False)
    inputs = make_inputs(8, 3, (4.0,), torch.float32)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.2)
    before = float(loss(*posteriors(inputs)).detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss(*posteriors(inputs)).backward()
        optimizer.step()
    assert float(loss(*posteriors(inputs)).detach()) < before - 0.1
    again = HedgedInstance(learnable=True)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(torch.as_tensor(again.scale), torch.as_tensor(loss.scale))


def test_more_negatives_weigh_less_unless_told_otherwise() -> None:
    inputs = make_inputs(8, 4, (math.inf,))
    near = HedgedInstance(3.0)(*posteriors(inputs))
    equal = HedgedInstance(3.0, negative_weight=1.0)(*posteriors(inputs))
    quarter = HedgedInstance(3.0, negative_weight=0.25)(*posteriors(inputs))
    torch.testing.assert_close(near, quarter)
    assert equal > near + 0.1


def test_distributions_that_do_not_fit_are_refused() -> None:
    fits = VonMisesFisher(torch.ones(4, 8), 1.0)
    with pytest.raises(OptionError, match=r"expects posteriors.*given \['Tensor'"):
        HedgedInstance()(torch.ones(4, 8), fits)  # type: ignore[arg-type]
    for other in (VonMisesFisher(torch.ones(3, 8), 1.0), VonMisesFisher(torch.ones(4, 7), 1.0)):
        with pytest.raises(OptionError, match=r"HedgedInstance expects .* \[B, M\]"):
            HedgedInstance()(fits, other)
