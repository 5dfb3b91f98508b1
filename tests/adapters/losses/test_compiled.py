"""Losses of sampled cosines through torch.compile: the same function of the same random numbers."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import HedgedInstance, MCInfoNCE, sampled
from posthoc.adapters.vmf import VonMisesFisher

NEGATIVES, SAMPLES, ROWS = 3, 12, 4  # rows of a block

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler: no g++, nor CXX"
)


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sampled, "CHUNK", ROWS * (1 + NEGATIVES) * SAMPLES)
    _forget()
    yield
    _forget()


def _forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sampled._compiler.cache_clear()


def _evaluate(loss: nn.Module, rows: int, dim: int) -> list[Tensor]:
    """The loss and its gradients for all posteriors and parameters."""
    generator = torch.Generator().manual_seed(rows)
    kappas = dim * torch.tensor([0.1, 1.0, 10.0, math.inf])
    given, leaves = [], []
    for shape in ((rows,), (rows,), (rows, NEGATIVES)):
        mu = functional.normalize(torch.randn(*shape, dim, generator=generator), dim=-1).requires_grad_()
        kappa = kappas[torch.randint(4, shape, generator=generator)].requires_grad_()
        given.append(VonMisesFisher(mu, kappa))
        leaves += [mu, kappa]
    value = loss(*given, generator=generator)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *loss.parameters()])]


def _assert_same_as_eager(make: Callable[..., nn.Module], dim: int) -> None:
    """Also where the last block is smaller, or a row alone, and with one compilation for them all."""
    compiled, eager = make(compiled=True), make()
    for rows in (2 * ROWS + 2, 2 * ROWS + 1, ROWS + 3):
        for seen, expected in zip(_evaluate(compiled, rows, dim), _evaluate(eager, rows, dim), strict=True):
            assert seen.isfinite().all()
            assert (seen - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def _mcinfonce(**options: Any) -> nn.Module:
    return MCInfoNCE(16.0, SAMPLES, learnable=True, **options)


def _hedged(**options: Any) -> nn.Module:
    return HedgedInstance(5.0, 0.5, SAMPLES, learnable=True, **options)


@needs_compiler
@pytest.mark.parametrize(("dim", "antithetic"), [(2, False), (3, True), (10, True), (128, False)])
def test_compiled_mcinfonce_is_the_same(dim: int, antithetic: bool) -> None:
    _assert_same_as_eager(lambda **options: _mcinfonce(antithetic=antithetic, **options), dim)


@needs_compiler
def test_compiled_hedged_instance_is_the_same() -> None:
    _assert_same_as_eager(lambda **options: _hedged(reading="log-mean", **options), 10)


@pytest.mark.parametrize(
    ("make", "options", "dim"),
    [
        (_mcinfonce, {"sobol": True}, 5),
        (_mcinfonce, {"positive_draws": 2, "antithetic": False}, 10),
        (_hedged, {"reading": "mean-log", "antithetic": False}, 2),
        (_hedged, {"reading": "log-mean"}, 128),
    ],
)
def test_every_way_to_draw_is_one_graph(
    make: Callable[..., nn.Module], options: dict[str, Any], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as for the compiler, then run eagerly."""
    traced = torch.compile(sampled.evaluate_block, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(sampled, "_compiler", _Cached(traced))
    _assert_same_as_eager(lambda **more: make(**options, **more), dim)


class _Cached:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self) -> Callable[..., Any]:
        return self.function

    def cache_clear(self) -> None:
        pass


def test_without_a_compiler_there_is_one_error() -> None:
    given = {"cpp.cxx": ("no-such-compiler",)}
    with (
        torch._inductor.config.patch(given),
        pytest.raises(OptionError, match=r"compiled=True.*No working C\+\+ compiler"),
    ):
        _evaluate(_mcinfonce(compiled=True), 2 * ROWS, 10)
