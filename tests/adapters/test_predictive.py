"""Links of Gaussian logits against brute-force sampling and their definitions, written out."""

import math

import pytest
import torch
from torch import Tensor

from posthoc.adapters.predictive import laplace_bridge, mean_field, monte_carlo, normal_draws, probit


def gaussians(rows: int = 6, classes: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Means [B, C] and covariances [B, C, C] in float64."""
    g = torch.Generator().manual_seed(0)
    root = scale * torch.randn(rows, classes, classes, generator=g, dtype=torch.float64) / classes**0.5
    return 2.0 * torch.randn(rows, classes, generator=g, dtype=torch.float64), root @ root.transpose(1, 2)


def sampled(mean: Tensor, covariance: Tensor, samples: int = 200_000) -> Tensor:
    noise = torch.randn(samples, mean.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.stack(
        [
            torch.softmax(m + noise @ torch.linalg.cholesky(c).T, -1).mean(0)
            for m, c in zip(mean, covariance, strict=True)
        ]
    )


@pytest.mark.parametrize(("link", "tolerance"), [(probit, 0.08), (mean_field, 0.035)])
def test_links_are_close_to_the_exact_predictive(link, tolerance: float) -> None:
    mean, covariance = gaussians()
    variance = covariance.diagonal(dim1=1, dim2=2)
    exact, found, plain = sampled(mean, torch.diag_embed(variance)), link(mean, variance), torch.softmax(mean, -1)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, dtype=torch.float64))
    assert float((found - exact).abs().max()) < tolerance
    assert float((found - exact).abs().mean()) < 0.75 * float((plain - exact).abs().mean())


def test_the_mean_field_is_exact_for_two_classes_up_to_the_probit() -> None:
    """For C = 2 the softmax is a sigmoid of one Gaussian, whose mean the probit gives to .01."""
    mean = torch.tensor([[1.0, -0.5], [3.0, 0.0]], dtype=torch.float64)
    variance = torch.tensor([[2.0, 1.0], [5.0, 4.0]], dtype=torch.float64)
    expected = torch.sigmoid((mean[:, 0] - mean[:, 1]) / torch.sqrt(1.0 + math.pi / 8.0 * variance.sum(1)))
    torch.testing.assert_close(mean_field(mean, variance)[:, 0], expected)
    exact = sampled(mean, torch.diag_embed(variance))
    assert float((mean_field(mean, variance) - exact).abs().max()) < 0.01


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_the_bridge_is_the_mean_of_its_dirichlet(classes: int) -> None:
    mean, covariance = gaussians(4, classes)
    ones = torch.ones(classes, dtype=torch.float64)
    for k in range(4):  # the map as its paper writes it, in the subspace where logits sum to 0
        total = ones @ covariance[k] @ ones
        moved = mean[k] - covariance[k] @ ones * mean[k].sum() / total
        inside = covariance[k] - torch.outer(covariance[k] @ ones, covariance[k] @ ones) / total
        alpha = (1.0 - 2.0 / classes + moved.exp() * (-moved).exp().sum() / classes**2) / inside.diagonal()
        found = laplace_bridge(mean[k : k + 1], covariance[k].diagonal()[None], covariance[k].sum(1)[None])
        torch.testing.assert_close(found[0], alpha / alpha.sum())


def test_the_bridge_takes_large_logits_in_float32() -> None:
    mean = torch.tensor([[200.0, 0.0, -200.0]])
    variance = torch.tensor([[1.0, 2.0, 1.0]])
    for normalised in (False, True):
        found = laplace_bridge(mean, variance, variance, normalised)
        assert torch.isfinite(found).all()
        assert float(found[0, 0]) > 0.99


def test_monte_carlo_converges_to_the_exact_predictive() -> None:
    mean, covariance = gaussians(scale=2.0)
    root = torch.linalg.cholesky(covariance)

    def deviations(spread: Tensor, draws: Tensor) -> Tensor:
        return draws @ spread.transpose(1, 2)

    found = monte_carlo(mean, root, deviations, normal_draws(5, 16384)).probabilities
    torch.testing.assert_close(found, sampled(mean, covariance), rtol=0, atol=4e-3)
