"""Hedged Gaussian embeddings: both papers' golden numbers, the true divergence, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import HedgedGaussian, hedged_gaussian
from posthoc.adapters.losses.hedged_gaussian import standard_divergence


def make_inputs(*shape: int, seed: int = 0) -> Normal:
    generator = torch.Generator().manual_seed(seed)
    mean, raw = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return Normal(mean, functional.softplus(raw))


@pytest.mark.parametrize("case", ["hib_n6_d8_K4_s140", "hib_n8_d16_K2_s141"])
def test_golden_of_the_temperature_paper(shared: Path, case: str) -> None:
    golden = np.load(shared / f"golden/tau/{case}.npz")
    given = {n: torch.tensor(golden[n]).double().requires_grad_() for n in ("loc1", "loc2", "pre1", "pre2")}
    std1, std2 = functional.softplus(given["pre1"]), functional.softplus(given["pre2"])
    k, noise = int(golden["K"]), torch.tensor(golden["noise"]).double()
    scale, shift = (float(np.float32(golden[name])) for name in "ab")  # as the paper's code holds them
    loss = HedgedGaussian(scale, shift, k, float(golden["beta"])).double()
    assert loss.log_scale is not None
    assert loss.learnt_shift is not None
    loss.log_scale.data.fill_(math.log(scale))

    def samples(mean: Tensor, std: Tensor, first: int) -> Tensor:
        return (mean + std * noise[first : first + 2 * k : 2]).transpose(0, 1)

    numbers = (torch.as_tensor(loss.scale), torch.as_tensor(loss.shift))
    rows = len(given["loc1"])
    close = loss._log_chance(samples(given["loc1"], std1, 0), samples(given["loc2"], std2, 1), 1.0, *numbers) / rows
    rolled = samples(given["loc2"].roll(1, 0), std2.roll(1, 0), 2 * k + 1)
    apart = loss._log_chance(samples(given["loc1"], std1, 2 * k), rolled[:, None], -1.0, *numbers) / rows
    divergence = sum(standard_divergence(Normal(given[f"loc{i}"], s)).mean() for i, s in ((1, std1), (2, std2)))
    value = -close - apart + loss.kl_weight * divergence
    assert abs(value.item() - golden["loss_f64"]) < 1e-10 + 1e-8 * abs(golden["loss_f64"])
    *grads, by_log, by_shift = torch.autograd.grad(value, [*given.values(), loss.log_scale, loss.learnt_shift])
    for seen, name in [*zip(grads, given, strict=True), (by_log / scale, "a"), (by_shift, "b")]:
        expected = golden[f"grad_{name}_f64"]
        assert np.abs(seen.numpy() - expected).max() < 1e-10 + 1e-8 * np.abs(expected).max(), name


def test_golden_of_the_metric_paper(shared: Path) -> None:
    """Its code adds 1e-6 to every probability; ours needs no such floor."""
    golden = np.load(shared / "golden/lam/baseline_losses_a.npz")
    z = torch.tensor(golden["z_samples"], requires_grad=True)
    a, p, n = (torch.tensor(golden[f"idx_{name}"]) for name in "apn")
    raw = torch.tensor(float(golden["hib_alpha_raw"]), dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(float(golden["hib_beta"]), dtype=torch.float64, requires_grad=True)

    def outcome(**options: Any) -> tuple[float, list[np.ndarray]]:
        loss = HedgedGaussian(n_samples=3, **options)
        numbers = (functional.softplus(raw), shift)
        value = -loss._log_chance(z[a], z[p], 1.0, *numbers) - loss._log_chance(z[a], z[n][:, None], -1.0, *numbers)
        value = value / len(a)
        return value.item(), [g.numpy() for g in torch.autograd.grad(value, [z, raw, shift])]

    value, grads = outcome(reference=True)
    assert value == pytest.approx(float(golden["hib_loss"]), rel=1e-9)
    along = golden["z_samples"]  # samples of length 1; normalising them once more takes the radial part away
    by_z = golden["hib_grad_samples"] - (golden["hib_grad_samples"] * along).sum(-1, keepdims=True) * along
    expected = (by_z, golden["hib_grad_alpha"][0], golden["hib_grad_beta"][0])
    for seen, truth in zip(grads, expected, strict=True):
        np.testing.assert_allclose(seen, truth, rtol=1e-9, atol=1e-12)
    plain, grads = outcome(squared=True, normalized=True, reading="mean-log")
    assert 1e-6 < abs(plain / value - 1.0) < 2e-5
    for seen, truth in zip(grads, expected, strict=True):
        np.testing.assert_allclose(seen, truth, rtol=1e-4, atol=1e-5)


def test_the_papers_divergence(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/baseline_losses_a.npz")
    mean, std = torch.tensor(golden["mu"]), (0.5 * torch.tensor(golden["log_var"])).exp()
    halves = [Normal(mean[part], std[part]) for part in (slice(6), slice(6, None))]  # anchors and positives
    with_it, without = (
        HedgedGaussian(kl_weight=weight, reference=True)(*halves, generator=torch.Generator().manual_seed(0))
        for weight in (1.0, 0.0)
    )
    assert (with_it - without).item() == pytest.approx(float(golden["hib_kl_reference"]), rel=1e-9)


def test_divergence_is_the_true_one(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/baseline_losses_a.npz")
    posterior = Normal(torch.tensor(golden["mu"]), (0.5 * torch.tensor(golden["log_var"])).exp())
    assert standard_divergence(posterior).sum().item() == pytest.approx(float(golden["kl_standard_normal"]), rel=1e-9)
    truth = kl_divergence(posterior, Normal(torch.zeros(12, 5), torch.ones(12, 5))).sum(-1)
    torch.testing.assert_close(standard_divergence(posterior), truth)
    small = standard_divergence(Normal(torch.zeros(1, 5), torch.full((1, 5), 1e-4)))
    assert small > 30.0, "it must hold the variance up, not press it down"


@pytest.mark.parametrize("reading", ["log-mean", "mean-log"])
def test_loss_from_the_formula(reading: str) -> None:
    anchor, positive, negatives = make_inputs(5, 3), make_inputs(5, 3, seed=1), make_inputs(5, 2, 3, seed=2)
    loss = HedgedGaussian(1.3, 0.4, 200, 0.01, learnable=False, reading=reading)
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([loss(anchor, positive, negatives, generator=generator) for _ in range(20)])
    z = [Normal(p.mean, p.stddev).sample((2000,)) for p in (anchor, positive, negatives)]
    p, q = torch.sigmoid(0.4 - 1.3 * (z[0] - z[1]).norm(dim=-1)), (z[0][:, :, None] - z[2]).norm(dim=-1)
    q = torch.sigmoid(0.4 - 1.3 * q)
    if reading == "log-mean":
        plain = -p.mean(0).log().mean() - (1.0 - q.mean(0)).log().mean()
    else:
        plain = -p.log().mean() - (1.0 - q).log().mean()
    plain = plain + 0.01 * sum(kl_divergence(x, Normal(0.0, 1.0)).sum(-1).mean() for x in (anchor, positive))
    assert abs(values.mean() - plain) < 4.0 * values.std() / math.sqrt(20) + 0.02
    assert values.std() < 0.1


def test_rolled_negatives_are_the_rolled_positives() -> None:
    anchor, positive = (Normal(make_inputs(5, 3, seed=i).mean, 1e-9) for i in (0, 1))
    rolled = Normal(positive.mean.roll(1, 0)[:, None], 1e-9)
    loss = HedgedGaussian()
    torch.testing.assert_close(loss(anchor, positive), loss(anchor, positive, rolled), rtol=1e-6, atol=1e-6)
    own = Normal(positive.mean[:, None], 1e-9)
    assert (loss(anchor, positive) - loss(anchor, positive, own)).abs() > 1e-2


@pytest.mark.parametrize("options", [{}, {"squared": True, "normalized": True, "reading": "mean-log"}])
def test_gradients(options: dict[str, Any]) -> None:
    loss = HedgedGaussian(0.7, 0.2, 3, 0.1, **options).double()

    def evaluate(*x: Tensor) -> Tensor:
        pairs = [Normal(x[i], functional.softplus(x[i + 1])) for i in range(0, len(x), 2)]
        return loss(*pairs, generator=torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 2), (3, 1), (3, 2), (3, 2), (3, 2, 2), (3, 2, 1))
    x = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(evaluate, x)
    assert torch.autograd.gradcheck(evaluate, x[:4])


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where samples hardly scatter, so that those of other blocks are the same."""
    mean = [make_inputs(*shape, seed=i).mean for i, shape in enumerate(((5, 3), (5, 3), (5, 2, 3)))]
    loss = HedgedGaussian(1.3, 0.4).double()

    def outcome() -> list[Tensor]:
        leaves = [m.clone().requires_grad_() for m in mean]
        value = loss(*(Normal(m, 1e-9) for m in leaves))
        return [value, *torch.autograd.grad(3.0 * value, [*leaves, *loss.parameters()])]

    whole = outcome()
    monkeypatch.setattr(hedged_gaussian, "CHUNK", 2 * 4 * 8 * 8)  # blocks of two rows, and the last one
    torch.testing.assert_close(outcome(), whole, rtol=1e-6, atol=1e-7)


def test_saturated_chances_are_finite() -> None:
    """The papers' logarithm of 1 - p is of 0 where a negative lies on its anchor."""
    mean = torch.zeros(4, 3, requires_grad=True)
    same = Normal(mean, torch.full((4, 3), 1e-6))
    for reading in ("log-mean", "mean-log"):
        value = HedgedGaussian(1.0, 50.0, reading=reading)(same, same)
        (grad,) = torch.autograd.grad(value, mean)
        assert value.item() == pytest.approx(50.0, rel=0.1)
        assert grad.isfinite().all()


def test_random_numbers_autocast_and_parameters() -> None:
    anchor, positive = (
        Normal(p.mean.float(), p.stddev.float()) for p in (make_inputs(4, 3), make_inputs(4, 3, seed=1))
    )
    loss, state = HedgedGaussian(), torch.get_rng_state()
    first, again, other = (loss(anchor, positive, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(anchor, positive, generator=torch.Generator().manual_seed(1)), first)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale", "learnt_shift"]
    assert list(HedgedGaussian(learnable=False).parameters()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 2.5}, "n_samples=2.5.*whole"),
        ({"n_samples": True}, "n_samples=True.*whole"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"shift": math.inf}, "shift=inf"),
        ({"reading": "mean"}, "reading='mean'"),
    ],
)
def test_meaningless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HedgedGaussian(**options)


def test_distributions_that_do_not_fit_are_refused() -> None:
    fits = make_inputs(4, 3)
    for given in (
        (fits, make_inputs(3, 3)),
        (fits, fits, fits),
        (fits, fits, make_inputs(4, 2, 2)),
        (make_inputs(1, 3),) * 2,
    ):
        with pytest.raises(OptionError, match=r"\[B, D\], \[B, D\] and \[B, M, D\].*given \["):
            HedgedGaussian()(*given)
