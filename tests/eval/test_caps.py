"""Caps of posteriors hold what they say, also where the gallery is uncertain; the product of densities does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.vmf import VonMisesFisher, concentration_from_resultant
from posthoc.eval.caps import cap_cosine, convolved_cap_cosine, convolved_concentration, resultants

DRAWS = 10_000


def pairs(dim: int, query: float, gallery: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Query directions and directions of gallery images that show the same latent, drawn from the true posteriors."""
    generator = torch.Generator().manual_seed(dim)
    mu = torch.zeros(DRAWS, dim, dtype=torch.float64)
    mu[:, 0] = 1.0
    latent = VonMisesFisher(mu, query).sample(generator=generator)
    return mu, VonMisesFisher(latent, gallery).sample(generator=generator)


@pytest.mark.parametrize("dim", [3, 10, 64])
@pytest.mark.parametrize("kappa", [2.0, 30.0])
def test_caps_hold_their_share_of_points(dim: int, kappa: float) -> None:
    mu, points = pairs(dim, kappa, float("inf"))
    for alpha in (0.05, 0.4):
        covered = ((mu * points).sum(1).numpy() >= cap_cosine(kappa, dim, alpha)).mean()
        assert covered == pytest.approx(1 - alpha, abs=4 * (alpha * (1 - alpha) / DRAWS) ** 0.5)


@pytest.mark.parametrize("dim", [3, 10, 64])
@pytest.mark.parametrize(("query", "gallery"), [(16.0, 16.0), (8.0, 40.0), (1.0, 3.0)])
def test_caps_of_the_convolution_hold_uncertain_images(dim: int, query: float, gallery: float) -> None:
    mu, shown = pairs(dim, query, gallery)
    cap = cap_cosine(convolved_concentration(query, gallery, dim), dim, 0.05)
    assert -0.006 < ((mu * shown).sum(1).numpy() >= cap).mean() - 0.95 < 0.015  # a convolution is not quite a vMF


def test_the_product_of_densities_is_not_the_set() -> None:
    mu, shown = pairs(10, 16.0, 16.0)
    cosine = (mu * shown).sum(1).numpy()
    both = (16.0 * (mu + shown)).norm(dim=1).numpy()  # concentration of the posterior given both images
    assert (cosine >= cap_cosine(both, 10, 0.05)).mean() == pytest.approx(0.18, abs=0.01)
    assert (cosine >= cap_cosine(16.0, 10, 0.05)).mean() == pytest.approx(0.60, abs=0.02)  # the query's cap alone
    assert (cosine >= cap_cosine(convolved_concentration(16.0, 16.0, 10), 10, 0.05)).mean() > 0.948


def test_caps_are_the_golden_quantiles(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/vmf_sampler_stats.npz")
    for row, dim in enumerate(golden["dims"]):
        found = cap_cosine(golden["kappas"][:, None], int(dim), 0.05), golden["q_exact"][row, :, 1:2]
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert golden["probs"][1] == 0.05


@pytest.mark.parametrize("dim", [2, 3, 10, 2048])
def test_the_table_is_the_quantile(dim: int) -> None:
    r = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = torch.cat([r, 1 - r * 1e-4, r * 1e-3, torch.tensor([0.0])])
    exact = cap_cosine(concentration_from_resultant(r, dim), dim, 0.05)
    np.testing.assert_allclose(1 - convolved_cap_cosine(r, dim, 0.05).numpy(), 1 - exact, rtol=1e-7)
    assert convolved_cap_cosine(torch.ones(1, dtype=torch.float64), dim, 0.05) == 1.0


def test_certain_images_leave_the_query_as_it_is() -> None:
    kappa = np.array([0.0, 3.0, 1e4, np.inf])
    np.testing.assert_allclose(convolved_concentration(kappa, np.inf, 10), kappa, rtol=1e-8)
    assert convolved_concentration(5.0, 0.0, 10) == 0.0
    assert (convolved_concentration(5.0, kappa[1:3], 10) < 5.0).all()
    assert cap_cosine(np.inf, 7) == 1.0
    assert resultants([0.0, np.inf], 4).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cap_cosine([1.0, -1.0], 3), DataError, "row 1"),
        (lambda: cap_cosine([np.nan], 3), DataError, "NaN"),
        (lambda: cap_cosine(1.0, 3, alpha=1.0), OptionError, "alpha=1"),
        (lambda: cap_cosine(1.0, 1), OptionError, "d >= 2|dim"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
