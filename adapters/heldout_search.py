"""Prior precision and likelihood temperature of a last-layer posterior with the least loss on rows it was not fitted on.

A variance is a sum of terms 1 / (l + tau) over curvatures l, so those of a whole grid of precisions tau are linear
combinations of those at a few of them: these are computed, the others combined from them.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, OptionError
from .laplace_rows import Rows, check_targets, chunks, signature
from .predictive import PROBIT

if TYPE_CHECKING:
    from .laplace import LastLayerPosterior

BLOCK = 1 << 20  # outputs of all precisions looked at together: what a cache holds
SPACING, NEAREST = 0.25, 12  # decades between computed precisions, and how many of them make one


def best_on_held_out(
    posterior: LastLayerPosterior,
    penultimate: Rows,
    labels: np.ndarray | Tensor,
    grid: Tensor | None,
    temperatures: Tensor | None,
) -> tuple[float, float]:
    """The precision of `grid` and the temperature of `temperatures` with the least mean loss; warns at the grid's ends."""
    grid = torch.logspace(-4, 4, 100, dtype=torch.float64) if grid is None else torch.as_tensor(grid).double()
    fixed = torch.tensor([posterior.temperature], dtype=torch.float64)
    temperatures = fixed if temperatures is None else torch.as_tensor(temperatures).double()
    grid, temperatures = grid.cpu(), temperatures.cpu()
    for name, values in (("grid", grid), ("temperatures", temperatures)):
        if values.ndim != 1 or len(values) == 0 or not bool(((values > 0) & torch.isfinite(values)).all()):
            raise OptionError(f"{name}={values.tolist()} was given; expected a list of positive numbers")
    pairs = torch.cartesian_prod(grid, temperatures).view(-1, 2)
    tau, temperature = pairs[int(held_out_losses(posterior, penultimate, labels, pairs).argmin())].tolist()
    if len(grid) > 2 and tau in (float(grid.min()), float(grid.max())):
        warnings.warn(
            f"the best prior precision on the held-out rows, {tau:.1e}, is at the end of the grid: give a wider grid=",
            UserWarning,
            stacklevel=3,
        )
    return tau, temperature


def held_out_losses(
    posterior: LastLayerPosterior, penultimate: Rows, labels: np.ndarray | Tensor, pairs: Tensor
) -> Tensor:
    """[E] mean negative log predictive density in nats (probit, or Gaussian) for pairs [E, 2] of prior, temperature.

    In the precision of the rows, at least float32; sums in float64. Memory is bounded by chunks.
    """
    fitted = posterior.fitted()
    softmax = posterior.likelihood == "classification"
    targets = check_targets(penultimate, labels, fitted.inputs, fitted.classes, softmax)
    assert targets is not None
    _check_other_rows(posterior, penultimate)
    # curvature / T + tau = (curvature + tau T) / T, so a temperature scales another precision's variance
    scale = pairs[:, 1] * posterior.sigma_noise**2
    computed, mix = _combinations(pairs[:, 0] * scale)
    gain, offset = (PROBIT, 1.0) if softmax else (1.0, posterior.sigma_noise**2)  # wanted is offset + gain * variance
    mix = (mix * (gain * scale)[:, None]).to(device=posterior.weight.device, dtype=torch.float32)
    base = mix.new_tensor(offset)
    small = copy.deepcopy(fitted).float()
    losses = torch.zeros(len(pairs), dtype=torch.float64, device=posterior.weight.device)
    width = fitted.width + len(computed) * fitted.classes
    for at, phi in chunks(penultimate, np.arange(len(penultimate)), width, posterior.weight.device):
        projected = small.project(phi.float())
        variances = torch.stack(
            [small.logit_variance(small.spread(projected, projected.new_full((2,), tau), 1.0)) for tau in computed]
        )
        outputs, target = posterior.logits(phi).float(), targets[at].to(phi.device)
        rows = max(1, BLOCK // (fitted.classes * len(pairs)))
        for i in range(0, len(phi), rows):
            block = variances[:, i : i + rows]
            mixed = torch.addmm(base, mix, block.flatten(1)).view(-1, *block.shape[1:])
            loss = _softmax_losses if softmax else _gaussian_losses
            losses += loss(outputs[i : i + rows], mixed, target[i : i + rows])
    return losses / len(penultimate)


def _check_other_rows(posterior: LastLayerPosterior, penultimate: Rows) -> None:
    """Refuses the very rows of `fit`, whatever their order, before any work."""
    count = len(penultimate)
    if count != posterior.n_data:
        return
    parts = chunks(penultimate, np.arange(count), penultimate.shape[1], posterior.weight.device)
    if math.isclose(sum(float(signature(phi)) for _, phi in parts), posterior.signature, rel_tol=1e-9):
        raise DataError(
            f"these {count} rows are those the posterior was fitted on: a prior chosen on held-out loss needs others"
        )


def _combinations(wanted: Tensor) -> tuple[list[float], Tensor]:
    """Precisions [R] to compute, and the matrix [E, R] that makes of 1 / (l + computed) those at the wanted ones [E].

    Each is combined of its `NEAREST` computed ones, so that variances of one size are mixed.
    """
    low, high = float(wanted.min().log10()), float(wanted.max().log10())
    few = max(2, math.ceil((high - low) / SPACING) + 1)
    if few >= len(wanted):
        return wanted.tolist(), torch.eye(len(wanted), dtype=wanted.dtype)
    computed = np.logspace(low, high, few)
    curvature = np.concatenate([[0.0], np.logspace(low - 6.0, high + 6.0, 12 * few)])[:, None]
    mix = np.zeros((len(wanted), few))
    for row, tau in zip(mix, wanted.numpy(), strict=True):
        near = np.argsort(np.abs(np.log(computed / tau)))[:NEAREST]
        # relative errors are made least: (l + wanted) / (l + computed) @ mix = 1
        ratio = (curvature + tau) / (curvature + computed[near])
        row[near] = np.linalg.lstsq(ratio, np.ones(len(ratio)), rcond=1e-12)[0]
    return computed.tolist(), torch.from_numpy(mix)


def _softmax_losses(logits: Tensor, squares: Tensor, target: Tensor) -> Tensor:
    """[E] summed cross-entropies of logits [n, C] divided by the roots of squares [E, n, C], which are overwritten."""
    log_p = torch.log_softmax(squares.rsqrt_().mul_(logits), dim=-1)
    if target.ndim == 2:
        return -(log_p * target.to(log_p)).double().sum((1, 2))
    return -log_p[:, torch.arange(len(target)), target].double().sum(1)


def _gaussian_losses(means: Tensor, variances: Tensor, target: Tensor) -> Tensor:
    """[E] summed negative log densities of targets [n, C] under variances [E, n, C]."""
    total = variances.double()
    return 0.5 * ((means - target).double().square() / total + (2.0 * math.pi * total).log()).sum((1, 2))
