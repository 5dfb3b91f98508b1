"""What every loss must do: no wrong second derivative, no memory beyond the promise, any device."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from posthoc.adapters import losses, vmf_table
from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.losses import sampled
from posthoc.adapters.vmf import VonMisesFisher, concentration_from_resultant

from .tools import calls, peak_bytes

NAMES = list(calls(4, 3))
TWICE = {
    "AnInfoNCE reference",
    "ExpectedLikelihoodKernel",
    "ExpectedLikelihoodKernel rolled",
    "ExpectedLikelihoodKernel all pairs",
    "MutualLikelihood",
    "LossRanking",
    "LossMSE",
}


def test_every_loss_is_here() -> None:
    assert {name.split()[0] for name in NAMES} == set(losses.__all__) - {"MomentumContrast"}


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    """Of a scalar loss: torch's `once_differentiable` would call its second derivative zero, and say nothing."""
    call = calls(4, 3, negatives=2, dtype=torch.float64)[name]
    trained = [x for x in call.inputs if x.requires_grad]
    if name in TWICE:
        assert torch.autograd.gradgradcheck(call.loss, call.inputs)
        return
    with pytest.raises(OptionError, match="no second derivative; call without create_graph"):
        torch.autograd.grad(call.loss(*call.inputs), trained, create_graph=True)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(call.loss(*call.inputs), trained))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_is_seen(name: str) -> None:
    """A NaN in any input that is trained makes the loss one: 0, or the mean of the other rows, would be taken for learning."""
    call = calls(4, 3, dtype=torch.float64)[name]
    for place, x in enumerate(call.inputs):
        inputs = list(call.inputs)
        inputs[place] = x.detach().clone()
        inputs[place].view(-1)[0] = math.nan
        try:
            value = call.loss(*inputs)
        except (DataError, OptionError, ValueError):
            continue  # refused, in words
        assert value.isnan(), place


def test_second_derivatives_of_distributions_are_right_or_refused(generator: torch.Generator) -> None:
    kappa = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    posterior = VonMisesFisher(torch.ones(3, dtype=torch.float64), kappa)
    level = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for value, x in (
        (posterior.rsample(generator=generator).sum(), kappa),
        (posterior.cosine_quantile(0.05), kappa),
        (concentration_from_resultant(level, 3), level),
    ):
        with pytest.raises(OptionError, match="no second derivative"):
            torch.autograd.grad(value, x, create_graph=True)


def test_samples_turn_with_the_mean_direction_to_second_order(generator: torch.Generator) -> None:
    start, target = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    kappa = torch.tensor(3.0, dtype=torch.float64)

    def sampled(mu: torch.Tensor) -> torch.Tensor:
        return (VonMisesFisher(mu, kappa).rsample((100_000,), torch.Generator().manual_seed(0)) @ target).mean()

    seen, truth = (
        torch.autograd.functional.hessian(f, start)
        for f in (sampled, lambda mu: VonMisesFisher(mu, kappa).mean @ target)
    )
    torch.testing.assert_close(seen, truth, rtol=0.01, atol=0.01)


CHUNKED = (
    "vmf",
    *(
        f"losses.{name}"
        for name in (
            "contrast",
            "contrastive_metric",
            "decoupled_uniformity",
            "elk",
            "hedged_gaussian",
            "sampled",
            "tau_moco",
        )
    ),
)
EXEMPT = {"AnInfoNCE reference", "MCInfoNCE reference"}  # as the papers' codes


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXEMPT])
def test_one_matrix_is_held_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond some vectors of the inputs' sizes and the promised matrix: blocks, whose size does not grow with N."""
    for module in CHUNKED:
        monkeypatch.setattr(importlib.import_module(f"posthoc.adapters.{module}"), "CHUNK", 1 << 12)
    for module in ("kernels", "decoupled_uniformity"):
        monkeypatch.setattr(importlib.import_module(f"posthoc.adapters.losses.{module}"), "BLOCK", 8)
    # below 8 dimensions the polynomials of a block's columns take some 40 times what its cosines do
    monkeypatch.setattr(sampled, "CHUNK", 1 << 10)
    monkeypatch.setattr(sampled, "PREPARED", 1 << 7)
    monkeypatch.setattr(vmf_table, "CHUNK", 1 << 7)
    n, negatives = 640, 8
    call = calls(n, 4, negatives)[name]
    trained = [x for x in call.inputs if x.requires_grad]

    def step() -> None:
        torch.autograd.grad(call.loss(*call.inputs), trained)

    step()  # tables of distributions are made once
    given = sum(4 * x.numel() for x in call.inputs)
    matrix = 0
    if name.startswith(("NTXent", "TaU", "AnInfoNCE")) and name != "TaUMoCo":
        matrix = 4 * (2 * n) ** 2  # both views' rows against all rows
    elif name.startswith("DecoupledUniformity "):
        matrix = 8 * n**2  # the kernel's, in float64
    elif name == "ContrastiveMetric":
        matrix = 2 * n**2  # two masks of a byte each
    numbers = 96 if name.endswith("all pairs") else 64  # of a block's elements, in float32
    assert matrix < peak_bytes(step) < 1.05 * matrix + 8 * given + numbers * 4 * (1 << 12)


DEVICES = (
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
    ),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_any_device(name: str, device: str) -> None:
    """Value and gradients live where the inputs do, and are those of float64 on the CPU where nothing is drawn."""
    call = calls(8, 5, device=device)[name]
    trained = [x for x in call.inputs if x.requires_grad]
    value = call.loss(*call.inputs)
    grads = torch.autograd.grad(value, trained)
    assert value.device.type == device
    assert all(g.device.type == device and g.isfinite().all() for g in grads)
    if name.split()[0] not in ("MCInfoNCE", "HedgedInstance", "HedgedGaussian"):
        exact = calls(8, 5, dtype=torch.float64)[name]
        torch.testing.assert_close(value.cpu().double(), exact.loss(*exact.inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [2, 3, 10])
def test_samples_on_any_device(device: str, dim: int) -> None:
    kappa = torch.tensor([0.0, 5.0, torch.inf], device=device, requires_grad=True)
    posterior = VonMisesFisher(torch.ones(dim, device=device), kappa)
    for generator in (None, torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)):
        z = posterior.rsample((4000,), generator)
        assert z.device.type == device
        assert (z.norm(dim=-1) - 1.0).abs().max() < 1e-5
        assert ((z * posterior.mean_direction).sum(-1).mean(0) - posterior.mean.norm(dim=-1)).abs().max() < 0.05
        (grad,) = torch.autograd.grad(z.sum(), kappa)
        assert grad.isfinite().all()
