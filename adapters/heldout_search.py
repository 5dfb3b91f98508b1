"""Prior precision and likelihood temperature of a last-layer posterior with the least loss on rows it was not fitted on."""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, OptionError
from .laplace_rows import Rows, check_targets, chunks, loss_sum
from .predictive import PROBIT

if TYPE_CHECKING:
    from .laplace import LastLayerPosterior


def best_on_held_out(
    posterior: LastLayerPosterior,
    penultimate: Rows,
    labels: np.ndarray | Tensor,
    grid: Tensor | None,
    temperatures: Tensor | None,
) -> tuple[float, float]:
    """The precision of `grid` and the temperature of `temperatures` with the least mean loss; warns at the grid's ends.

    Variances are computed in float32, losses summed in float64; inputs are projected once for the whole grid.
    """
    grid = torch.logspace(-4, 4, 100, dtype=torch.float64) if grid is None else torch.as_tensor(grid).double()
    fixed = torch.tensor([posterior.temperature], dtype=torch.float64)
    temperatures = fixed if temperatures is None else torch.as_tensor(temperatures).double()
    for name, values in (("grid", grid), ("temperatures", temperatures)):
        if values.ndim != 1 or len(values) == 0 or not bool(((values > 0) & torch.isfinite(values)).all()):
            raise OptionError(f"{name}={values.tolist()} was given; expected a list of positive numbers")
    losses = held_out_losses(posterior, penultimate, labels, grid, temperatures)
    best = int(losses.argmin())
    row, column = divmod(best, len(temperatures))
    if len(grid) > 2 and (float(grid[row]) in (float(grid.min()), float(grid.max()))):
        warnings.warn(
            f"the best prior precision on the held-out rows, {float(grid[row]):.1e}, is at the end of the grid: give a "
            "wider grid=",
            UserWarning,
            stacklevel=3,
        )
    return float(grid[row]), float(temperatures[column])


def held_out_losses(
    posterior: LastLayerPosterior, penultimate: Rows, labels: np.ndarray | Tensor, grid: Tensor, temperatures: Tensor
) -> Tensor:
    """[G, T] mean negative log predictive density in nats, for every scalar prior and temperature."""
    fitted = posterior.fitted()
    softmax = posterior.likelihood == "classification"
    targets = check_targets(penultimate, labels, fitted.inputs, fitted.classes, softmax)
    assert targets is not None
    small = copy.deepcopy(fitted).float()
    losses = torch.zeros(len(grid), len(temperatures), dtype=torch.float64, device=posterior.weight.device)
    norm = 0.0
    for at, phi in chunks(penultimate, np.arange(len(penultimate)), 2 * fitted.width, posterior.weight.device):
        logits = posterior.logits(phi)
        projected, target = small.project(phi.float()), targets[at].to(logits.device)
        norm += float(phi.square().sum())
        for i, tau in enumerate(grid.tolist()):
            for j, temperature in enumerate(temperatures.tolist()):
                factor = posterior.factor * posterior.temperature / temperature
                variance = small.logit_variance(small.spread(projected, phi.new_tensor([tau, tau]).float(), factor))
                if softmax:
                    losses[i, j] += loss_sum(logits / torch.sqrt(1.0 + PROBIT * variance), target, True)
                else:
                    total = variance.double() + posterior.sigma_noise**2
                    losses[i, j] += 0.5 * ((logits - target).square() / total + (2.0 * math.pi * total).log()).sum()
    _check_other_rows(posterior, norm, len(penultimate))
    return losses / len(penultimate)


def _check_other_rows(posterior: LastLayerPosterior, norm: float, count: int) -> None:
    """Refuses the very rows of `fit`, told by the sum of their squares."""
    if count == posterior.n_data and math.isclose(norm, posterior.squares, rel_tol=1e-12):
        raise DataError(
            f"these {count} rows are those the posterior was fitted on: a prior chosen on held-out loss needs others"
        )
