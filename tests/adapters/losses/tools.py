"""What the tests of several losses share: one call of each loss, moments of repeated draws, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional

from posthoc.adapters import losses
from posthoc.adapters.vmf import VonMisesFisher

Inputs = dict[str, Tensor]  # mu_ref [B, d], kappa_ref [B], mu_pos, kappa_pos, and mu_neg [B, M, d], kappa_neg [B, M]


class Moments(NamedTuple):
    """Mean and standard error of an average of repeated draws."""

    mean: Tensor
    error: Tensor


def posteriors(inputs: Inputs) -> list[VonMisesFisher]:
    names = ("ref", "pos", "neg") if "mu_neg" in inputs else ("ref", "pos")
    return [VonMisesFisher(inputs[f"mu_{name}"], inputs[f"kappa_{name}"]) for name in names]


def golden_inputs(golden: Any) -> Inputs:
    inputs = {}
    for name in ("ref", "pos", "neg"):
        if f"mu_{name}" in golden:
            mu = torch.tensor(golden[f"mu_{name}"])
            mu = mu.squeeze(1) if name == "pos" else mu
            inputs[f"mu_{name}"] = mu
            inputs[f"kappa_{name}"] = torch.full(mu.shape[:-1], math.inf)
            if f"kappa_{name}" in golden:
                inputs[f"kappa_{name}"] = torch.tensor(golden[f"kappa_{name}"]).reshape(mu.shape[:-1])
    return inputs


def gap(one: Moments, other: Moments) -> Tensor:
    """Distance in combined standard errors; 0 where both are the same number without an error."""
    apart = (one.mean - other.mean).abs()
    return torch.where(apart == 0.0, 0.0, apart / torch.hypot(one.error, other.error))


def tangent(x: Tensor, mu: Tensor) -> Tensor:
    return x - (x * mu).sum(-1, keepdim=True) * mu


class Call(NamedTuple):
    """A loss as a function of leaves; `loss(*inputs)` is the scalar."""

    loss: Callable[..., Tensor]
    inputs: list[Tensor]


def calls(
    n: int, dim: int, negatives: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Call]:
    """Each loss, and its ways that differ in memory or derivatives, on `n` images in `dim` dimensions."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    views, raw = [leaf(n, dim), leaf(n, dim)], [leaf(n), leaf(n)]
    stacked, prior = [leaf(n, 2, dim)], leaf(n, 2 * dim).detach()
    label = (torch.arange(n) % 2).to(device)
    shares = prior.square() / prior.square().sum(1, keepdim=True)
    same = shares @ shares.T
    triples = [x for shape in ((n,), (n,), (n, negatives)) for x in (leaf(*shape, dim), leaf(*shape))]
    normals = [x for shape in ((n,), (n,), (n, negatives)) for x in (leaf(*shape, dim), leaf(*shape, dim))]

    def on_sphere(loss: Any, *x: Tensor, **options: Any) -> Tensor:
        return loss(
            *(VonMisesFisher(x[i], 8.0 * functional.softplus(x[i + 1])) for i in range(0, len(x), 2)), **options
        )

    def gaussian(loss: Any, *x: Tensor) -> Tensor:
        seeded = torch.Generator(device).manual_seed(0)
        pairs = (Normal(x[i], functional.softplus(x[i + 1])) for i in range(0, len(x), 2))
        return loss(*pairs, generator=seeded)

    def sampled(loss: Any, *x: Tensor) -> Tensor:
        return on_sphere(loss, *x, generator=torch.Generator(device).manual_seed(0))

    def uniformity(**options: Any) -> Call:
        return Call(partial(losses.DecoupledUniformity(**options), prior=prior), stacked)

    def module(loss: torch.nn.Module) -> torch.nn.Module:
        return loss.to(device, dtype)

    ensemble = module(losses.AnInfoNCEEnsemble(dim, 2))
    return {
        "NTXent": Call(module(losses.NTXent(0.5)), views),
        "TaU": Call(module(losses.TaU(0.5)), [*views, *raw]),
        "TaUMoCo": Call(lambda q, r: losses.TaUMoCo(0.5)(q, views[1], prior[:, :dim], r), [views[0], raw[0]]),
        "AnInfoNCE": Call(module(losses.AnInfoNCE(dim)), views),
        "AnInfoNCE hard": Call(module(losses.AnInfoNCE(dim, hard_negatives=0.5)), views),
        "AnInfoNCE reference": Call(module(losses.AnInfoNCE(dim, reference=True)), views),
        "AnInfoNCEEnsemble": Call(lambda z1, z2: ensemble([(z1, z2), (z2, z1)]), views),
        "DecoupledUniformity": Call(losses.DecoupledUniformity(), stacked),
        "DecoupledUniformity rbf": uniformity(kernel="rbf", sigma=float(dim) ** 0.5),
        "DecoupledUniformity median": uniformity(kernel="rbf"),
        "DecoupledUniformity cosine": uniformity(kernel="cosine"),
        "DecoupledUniformity callable": uniformity(kernel=lambda x, y: x @ y.T),
        "ContrastiveMetric": Call(partial(losses.ContrastiveMetric(0.5), label=label), views[:1]),
        "MCInfoNCE": Call(partial(sampled, module(losses.MCInfoNCE(8.0, 8, learnable=True))), triples),
        "MCInfoNCE rolled": Call(partial(sampled, losses.MCInfoNCE(8.0, 8)), triples[:4]),
        "MCInfoNCE reference": Call(partial(sampled, losses.MCInfoNCE(8.0, 8, reference=True)), triples),
        "HedgedInstance": Call(partial(sampled, module(losses.HedgedInstance(2.0, 0.5, 8, learnable=True))), triples),
        "ExpectedLikelihoodKernel": Call(partial(on_sphere, losses.ExpectedLikelihoodKernel(2.0)), triples),
        "ExpectedLikelihoodKernel rolled": Call(partial(on_sphere, losses.ExpectedLikelihoodKernel(2.0)), triples[:4]),
        "ExpectedLikelihoodKernel all pairs": Call(
            lambda mu, kappa: losses.ExpectedLikelihoodKernel(2.0).all_pairs(
                VonMisesFisher(mu, 8.0 * functional.softplus(kappa)), same
            ),
            triples[:2],
        ),
        "HedgedGaussian": Call(partial(gaussian, module(losses.HedgedGaussian())), normals),
        "HedgedGaussian rolled": Call(
            partial(gaussian, module(losses.HedgedGaussian(reading="mean-log"))), normals[:4]
        ),
        "MutualLikelihood": Call(losses.MutualLikelihood(), normals[:4]),
        "LossRanking": Call(losses.LossRanking(), [raw[0], raw[1].detach()]),
        "LossMSE": Call(losses.LossMSE(), [raw[0], raw[1].detach()]),
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` holds at once beyond what it was called with."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes
    return int(np.cumsum(sizes).max())
