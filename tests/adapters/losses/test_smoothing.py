"""What is told of a kernel's smoother against the matrix itself, and the paper's attributes at three widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posthoc.adapters.losses import DecoupledUniformity
from posthoc.adapters.losses.kernels import smoothing


@pytest.mark.parametrize(
    ("kernel", "sigma", "ridge"), [("rbf", 1.3, 0.01), ("rbf", "median", None), ("cosine", "median", 0.1)]
)
def test_it_is_what_the_matrix_does(
    kernel: str, sigma: float | str, ridge: float | None, generator: torch.Generator
) -> None:
    x = torch.randn(23, 4, generator=generator)
    found = smoothing(x, kernel, sigma, ridge)
    rows = x.double().numpy()
    apart = np.linalg.norm(rows[:, None] - rows, axis=2)
    between = apart[np.triu_indices(23, 1)]
    assert found.median_distance == pytest.approx(np.sort(between)[(len(between) - 1) // 2], rel=1e-5)
    if kernel == "rbf":
        width = found.median_distance if sigma == "median" else sigma
        assert found.sigma == width
        gram = np.exp(-(apart**2) / (2 * float(width) ** 2))
    else:
        assert found.sigma is None
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        gram = unit @ unit.T
    weight = np.linalg.solve(gram + (ridge or 23**-0.5) * np.eye(23), gram)
    others = weight[~np.eye(23, dtype=bool)]
    wanted = (
        gram[np.triu_indices(23, 1)].mean(),
        weight.trace() / 23,
        weight.sum(1).mean(),
        others.min(),
        others.max(),
    )
    told = (found.kernel, found.diagonal, found.row_sum, found.lowest, found.highest)
    assert told == pytest.approx(wanted, abs=1e-5)
    loss = DecoupledUniformity(kernel=kernel, sigma=sigma, ridge=ridge)
    assert found.diagonal == pytest.approx(loss.mean_diagonal(x), abs=1e-6)


@pytest.mark.parametrize(
    ("sigma", "kernel", "diagonal", "row_sum"),
    [(1.0, 0.000, 0.990, 0.990), (20.0, 0.932, 0.751, 1.0), (100.0, 0.997, 0.194, 1.0)],
)
def test_binary_attributes_as_the_paper_has_them(sigma: float, kernel: float, diagonal: float, row_sum: float) -> None:
    """312 attributes, a tenth of them present; the reference figures were measured on other random rows of this kind."""
    attributes = torch.from_numpy((np.random.default_rng(0).random((256, 312)) < 0.1).astype(np.float32))
    found = smoothing(attributes, "rbf", sigma)
    assert found.kernel == pytest.approx(kernel, abs=2e-3)
    assert found.diagonal == pytest.approx(diagonal, abs=6e-3)
    assert found.row_sum == pytest.approx(row_sum, abs=2e-3)
