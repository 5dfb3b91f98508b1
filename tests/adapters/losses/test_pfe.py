"""Mutual likelihood: golden numbers, the integral it stands for, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import MutualLikelihood
from posthoc.adapters.losses.pfe import mutual_likelihood_score


def test_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/baseline_losses_a.npz")
    mean, log_variance = (torch.tensor(golden[n], requires_grad=True) for n in ("mu", "log_var"))
    a, p = (torch.tensor(golden[n]) for n in ("idx_a", "idx_p"))
    value = MutualLikelihood()(mean[a], log_variance[a], mean[p], log_variance[p])
    np.testing.assert_allclose(value.item(), golden["pfe_loss"], rtol=1e-9)
    by_mean, by_variance = torch.autograd.grad(value, [mean, log_variance])
    np.testing.assert_allclose(by_mean, golden["pfe_grad_mu"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_variance, golden["pfe_grad_log_var"], rtol=1e-9, atol=1e-12)


def test_score_is_the_log_of_the_integral_of_the_product(generator: torch.Generator) -> None:
    mean = torch.randn(2, 4, 1, generator=generator, dtype=torch.float64)
    log = torch.randn(2, 4, 1, generator=generator, dtype=torch.float64)
    z = torch.linspace(-25.0, 25.0, 100_001, dtype=torch.float64)
    both = sum(Normal(mean[i], (0.5 * log[i]).exp()).log_prob(z) for i in (0, 1))
    truth = torch.trapezoid(torch.as_tensor(both).exp(), z, dim=-1).log()
    torch.testing.assert_close(mutual_likelihood_score(mean[0], log[0], mean[1], log[1]), truth, rtol=1e-8, atol=1e-8)


def test_loss_is_the_negative_score_up_to_factor_and_constant(generator: torch.Generator) -> None:
    mean = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    for width in (3, 1):  # a variance for each dimension, or one for all
        log = torch.randn(2, 6, width, generator=generator, dtype=torch.float64)
        given = (mean[0], log[0], mean[1], log[1])
        other = -2.0 * mutual_likelihood_score(*given).mean() / 3.0 - np.log(2.0 * np.pi)
        torch.testing.assert_close(MutualLikelihood()(*given), other)


def test_gradients(generator: torch.Generator) -> None:
    given = [torch.randn(3, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(MutualLikelihood(), given)


def test_extreme_variances_are_finite_and_autocast_changes_nothing(generator: torch.Generator) -> None:
    mean = torch.randn(2, 4, 3, generator=generator)
    for level, other in ((-160.0, mean[0]), (-80.0, mean[1]), (0.0, mean[1]), (80.0, mean[1]), (160.0, mean[1])):
        log = torch.full((4, 1), level, requires_grad=True)
        value = MutualLikelihood()(mean[0], log, other, log)
        (grad,) = torch.autograd.grad(value, log)
        assert value.isfinite()
        assert grad.isfinite().all()
        if other is mean[0]:  # equal means: log v alone
            torch.testing.assert_close(value, torch.tensor(level + math.log(2.0)))
    log = torch.zeros(4, 1)
    value = MutualLikelihood()(mean[0], log, mean[1], log)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MutualLikelihood()(mean[0], log, mean[1], log), value)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.ones(4, 3)
    for given in ((x, x[:, :2], x, x), (x, x, x[:2], x), (x[0], x[0], x[0], x[0]), (x[:0],) * 4):
        with pytest.raises(OptionError, match=r"\[B, D\] or \[B, 1\], twice; the shapes given are"):
            MutualLikelihood()(*given)
