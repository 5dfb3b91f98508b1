"""The cosines MCInfoNCE samples have the distribution that cosines of full vectors have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from posthoc.adapters.losses.cosines import Draws, prepare
from posthoc.adapters.vmf import VonMisesFisher
from posthoc.adapters.vmf_table import cosine_table, solve_quantile

DIMS = (2, 3, 4, 5, 7, 8, 9, 10, 16, 64, 512)
SAMPLES = 20_000


def _two_columns(dim: int, generator: torch.Generator, cosine: float = 0.3) -> tuple[Tensor, Tensor]:
    """An anchor [1, d] and two columns [1, 2, d]: one at right angles to it, one at a given cosine."""
    basis = torch.linalg.qr(torch.randn(dim, 2, generator=generator, dtype=torch.float64))[0].T
    return basis[:1], torch.stack([basis[1], cosine * basis[0] + math.sqrt(1.0 - cosine**2) * basis[1]])[None]


def _sample(mu: Tensor, kappa: float, columns: Tensor, kappas: float, generator: torch.Generator) -> np.ndarray:
    draws = Draws(columns, SAMPLES, False, generator)
    k = columns.new_tensor([kappa]), columns.new_full((1, columns.shape[1]), kappas)
    return prepare(mu, k[0], columns, k[1], draws).draw(slice(None)).sample().cosine[0].numpy()


@pytest.mark.parametrize("dim", DIMS)
def test_cosine_of_a_uniform_point_with_a_fixed_one(dim: int, generator: torch.Generator) -> None:
    mu, columns = _two_columns(dim, generator)
    coordinate = stats.beta(0.5 * (dim - 1), 0.5 * (dim - 1)).cdf
    for kappa, kappas in ((0.0, math.inf), (math.inf, 0.0), (0.0, 0.0)):  # the anchor is uniform, the columns are, both
        for seen in _sample(mu, kappa, columns, kappas, generator):
            assert stats.kstest(0.5 * (seen + 1.0), coordinate).pvalue > 1e-4


@pytest.mark.parametrize("dim", DIMS)
def test_cosine_of_two_samples(dim: int, generator: torch.Generator) -> None:
    mu, columns = _two_columns(dim, generator)
    for kappa, kappas in ((0.5 * dim, 3.0 * dim), (5.0 * dim, 0.2 * dim)):
        seen = _sample(mu, kappa, columns, kappas, generator)
        z = VonMisesFisher(mu[0], kappa).sample((SAMPLES,), generator)
        for column, cosines in zip(columns[0], seen, strict=True):
            full = (z * VonMisesFisher(column, kappas).sample((SAMPLES,), generator)).sum(-1)
            assert stats.ks_2samp(cosines, full.numpy()).pvalue > 1e-4


def test_columns_together_are_as_correlated_as_full_vectors(generator: torch.Generator) -> None:
    """Columns share the anchor's sample: their cosines are not independent."""
    for dim in (3, 10, 64):
        mu = functional.normalize(torch.randn(1, dim, generator=generator, dtype=torch.float64), dim=-1)
        noise = functional.normalize(torch.randn(2, 4, dim, generator=generator, dtype=torch.float64), dim=-1)
        columns = functional.normalize(mu + noise[0, 0] + 0.5 * noise[1], dim=-1)[None]
        seen = np.corrcoef(_sample(mu, float(dim), columns, 20.0 * dim, generator))
        z = VonMisesFisher(mu[0], float(dim)).sample((SAMPLES,), generator)
        full = (z[:, None] * VonMisesFisher(columns[0], 20.0 * dim).sample((SAMPLES,), generator)).sum(-1)
        correlation = np.corrcoef(full.T.numpy())
        assert np.abs(correlation - np.eye(4)).max() > 0.3
        np.testing.assert_allclose(seen, correlation, atol=5.0 * math.sqrt(2.0 / SAMPLES))


@pytest.mark.parametrize("dim", DIMS)
def test_table_of_half_chords_against_the_exact_quantile(dim: int) -> None:
    y = torch.linspace(0.0, 16.9, 23, dtype=torch.float64)[:, None]
    kappa, score = 0.5 * (dim - 1) * torch.sinh(y), torch.linspace(-5.5, 5.5, 45, dtype=torch.float64)[None]
    h, slope = cosine_table(dim, torch.device("cpu")).half_chord(kappa[:, 0], score.expand(23, -1))
    exact = solve_quantile(kappa, score, dim)
    weight = torch.exp(-0.5 * score * score)
    weight = weight / weight.sum()
    error = ((h - exact.half_chord) * torch.exp(0.5 * y)).square() * weight
    assert error.sum(1).sqrt().max() < (2e-5 if dim == 2 else 1e-5)
    scale = torch.exp(1.5 * y) * dim
    error = (((slope - exact.slope) * scale).square() * weight).sum(1)
    assert (error / ((exact.slope * scale).square() * weight).sum(1)).sqrt().max() < 5e-4


@pytest.mark.parametrize("dim", [2, 6, 8, 10, 64])
def test_mirrored_scores_are_scores_like_any(dim: int, generator: torch.Generator) -> None:
    table = cosine_table(dim, torch.device("cpu"))
    at = table.polynomials(torch.tensor([[0.0, 3.0, 1e3], [50.0, 1e8, math.inf]]), torch.float64)
    score = torch.randn(2, 3, 50, generator=generator, dtype=torch.float64)
    mirrored = table.evaluate(at, score, mirrored=True)
    for one, other in zip(mirrored, table.evaluate(at, torch.cat([score, -score], -1)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 6, 12])
def test_opposite_pairs(samples: int) -> None:
    """Directions and scores are opposite in pairs of samples, never both in one pair where there are four or more."""
    draws = Draws(torch.zeros(()), samples, True, torch.Generator().manual_seed(0))
    direction, drawn = draws.pairs.directions(draws.normal(3)), draws.normal(3)
    score = torch.cat([drawn, -drawn], -1)[:, :samples]
    assert direction.shape == (3, samples)
    for x in (direction, score):
        assert x.abs().unique().numel() <= 3 * draws.drawn
    both = (direction[:, :, None] == -direction[:, None]) & (score[:, :, None] == -score[:, None])
    assert samples == 2 or not both.any()
    if samples % 4 == 0:
        for x in (direction, score):
            assert torch.equal((x[:, :, None] == -x[:, None]).sum(-1), torch.ones(3, samples))
