from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import LossMSE, LossRanking


@pytest.fixture
def golden(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden/mcinfonce/url_losses.npz"))


def _inputs(golden: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u = torch.tensor(golden["unc"], requires_grad=True)
    return u, torch.tensor(golden["logits"]), torch.tensor(golden["targets"])


@pytest.mark.parametrize(
    ("name", "loss", "inverse_temperature", "weight", "task_weight"),
    [
        ("losspred_order", LossRanking(0.1), 1.0, 1.0, 1.0),
        ("losspred_order_frozen", LossRanking(0.1, leeway=0.5), 1.0, 1.0, 0.0),
        ("losspred_mse", LossMSE(), 3.0, 0.04, 1.0),
    ],
)
def test_matches_the_papers_code(golden, name, loss, inverse_temperature, weight, task_weight) -> None:
    """The logits learn from the cross-entropy alone: the loss predictor's targets get no gradient."""
    u, logits, targets = _inputs(golden)
    logits.requires_grad_()
    task = cross_entropy(logits * inverse_temperature, targets, reduction="none")
    value = task_weight * task.mean() + weight * loss(u, task)
    assert value.item() == pytest.approx(float(golden[name]), rel=1e-5)
    for seen, of in zip(torch.autograd.grad(value, (u, logits)), ("unc", "logits"), strict=True):
        np.testing.assert_allclose(seen.numpy(), golden[f"{name}_grad_{of}"], rtol=1e-5, atol=1e-6)


def test_only_the_order_of_targets_matters_and_ties_count_as_less() -> None:
    u = torch.tensor([0.5, 0.2, 0.1, 0.4])
    loss = LossRanking(0.1)
    assert loss(u, torch.tensor([3.0, 1.0, 0.0, 9.0])).item() == 0.0
    assert loss(u, torch.tensor([1e5, 1.0, -1e5, 9.0])).item() == 0.0
    assert loss(u, torch.tensor([1.0, 3.0, 0.0, 9.0])).item() == pytest.approx((0.1 + 0.3) / 2)
    assert loss(u, torch.tensor([1.0, 1.0, 0.0, 9.0])).item() == pytest.approx((0.1 + 0.3) / 2)


def test_odd_last_row_is_left_out() -> None:
    u = torch.tensor([0.5, 0.2, 7.0], requires_grad=True)
    value = LossRanking(0.1)(u, torch.tensor([0.0, 1.0, 5.0]))
    assert value.item() == pytest.approx(0.4)
    (grad,) = torch.autograd.grad(value, u)
    assert grad.tolist() == [1.0, -1.0, 0.0]


def test_targets_get_no_gradient() -> None:
    for loss in (LossRanking(), LossMSE()):
        u, target = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
        loss(u, target).backward()
        assert target.grad is None
        assert u.grad is not None


def test_gradients(generator: torch.Generator) -> None:
    u = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: LossRanking(0.7)(x, target), (u,))
    assert torch.autograd.gradcheck(lambda x: LossMSE()(x, target), (u,))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionError, match="at least one"):
        LossMSE()(torch.ones(0), torch.ones(0))
    with pytest.raises(OptionError, match="B >= 2"):
        LossRanking()(torch.ones(1), torch.ones(1))
    with pytest.raises(OptionError, match=r"\(4,\), \(4, 1\)"):
        LossMSE()(torch.ones(4), torch.ones(4, 1))
    with pytest.raises(OptionError, match="margin=-1"):
        LossRanking(-1)


def test_half_precision_and_targets_that_are_no_numbers() -> None:
    u, target = torch.tensor([3e4, -6e4]).half(), torch.tensor([0.0, 300.0]).half()
    assert LossRanking()(u, target).item() == pytest.approx(9e4, rel=1e-3)
    assert LossMSE()(target, torch.zeros(2).half()).item() == pytest.approx(45_000.0)
    assert LossRanking()(torch.zeros(2), torch.tensor([1.0, math.nan])).isnan()
