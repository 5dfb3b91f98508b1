"""Kernels between the rows of prior knowledge, for Decoupled Uniformity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError, OptionError
from ..numerics import full

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 128  # rows of a Gram matrix made at a time
SAME = 1e-6  # of the largest squared distance from the mean: rows nearer than that are one row to the median
ASYMMETRY = 1e-4  # of the largest value: what float32 may make of a symmetric kernel


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 >= 0 [N, M] of rows [N, P], [M, P] by one matrix product; exact to rounding for centred rows."""
    gram = torch.addmm(y.square().sum(1)[None], x, y.T, alpha=-2)
    return gram.add_(x.square().sum(1)[:, None]).clamp_(min=0)


def rbf(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """exp(-||x_i - y_j||^2 / (2 sigma^2)) in (0, 1], [N, M] of rows [N, P] and [M, P]."""
    centre = y.mean(0)  # large rows would cancel
    return _gaussian(squared_distances(x - centre, y - centre), sigma)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j> / (|x_i| |y_j|) in [-1, 1], [N, M] of rows [N, P] and [M, P]; a row of zeros has 0 with every row."""
    return functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T


def median_distance(x: Tensor) -> float:
    """Median distance between different rows of centred [N, P]; 1 if all are one."""
    n, filled = len(x), 0
    least = SAME * x.square().sum(1).max()
    squared = x.new_empty(n * (n - 1) // 2)
    for start in range(0, n, BLOCK):
        rows = x[start : start + BLOCK]
        block = squared_distances(rows, x[: start + len(rows)])
        different = torch.ones(block.shape, dtype=torch.bool, device=x.device).tril_(start - 1)
        found = block.masked_select(different.logical_and_(block > least))
        squared[filled : filled + len(found)] = found
        filled += len(found)
    return squared[:filled].median().sqrt().item() if filled else 1.0


def gram_matrix(prior: Tensor, kernel: str | Kernel, sigma: float | str) -> Tensor:
    """K [N, N] between the rows [N, P] of a prior, in float64 (float32 where the device has none); no gradient.

    Only the lower triangle is filled for "rbf" and "cosine". No other matrix of this size is held.
    Raises: OptionError if a callable answers with another shape, or not symmetrically.
    """
    x = full(prior)
    if kernel == "rbf":
        x = x - x.mean(0)
        width = median_distance(x) if sigma == "median" else float(sigma)
    elif kernel == "cosine":
        x = functional.normalize(x, dim=1)
    n = len(x)
    precise = torch.float32 if x.device.type == "mps" else torch.float64
    gram = torch.zeros(n, n, dtype=precise, device=x.device).T  # by columns, as LAPACK wants it: no copy is made
    for start in range(0, n, BLOCK):
        rows, stop = x[start : start + BLOCK], min(start + BLOCK, n)
        if callable(kernel):
            gram[start:stop] = _answer(kernel, rows, x)
            _check_symmetric(gram[start:stop, :stop], gram[:stop, start:stop].T)
        elif kernel == "rbf":
            gram[start:stop, :stop] = _gaussian(squared_distances(rows, x[:stop]).to(precise), width)
        else:
            gram[start:stop, :stop] = rows @ x[:stop].T
    return gram if kernel != "rbf" else gram.fill_diagonal_(1.0)


@dataclass(frozen=True)
class Smoothing:
    """What A = (K + ridge I)^-1 K does to N rows: each becomes a weighted sum of all, by the weights in its row of A.

    Attributes:
        sigma: width of "rbf", in the prior's units; None of another kernel. median_distance: between different rows.
        kernel: mean of K off the diagonal. diagonal: mean of A's, 1 = nothing is averaged, 1/N = all rows into one.
        row_sum: mean of A's rows' sums. lowest, highest: of A off the diagonal.
    """

    sigma: float | None
    median_distance: float
    kernel: float
    diagonal: float
    row_sum: float
    lowest: float
    highest: float


@torch.no_grad()
def smoothing(
    prior: Tensor, kernel: str | Kernel, sigma: float | str = "median", ridge: float | None = 0.01
) -> Smoothing:
    """`Smoothing` of a prior [N, P], N >= 2, by a kernel and ridge as `DecoupledUniformity` takes them; costs N^3.

    Raises: DataError, OptionError as the loss does.
    """
    rows = full(prior)
    centred = rows - rows.mean(0)
    median = median_distance(centred)
    width = (median if sigma == "median" else float(sigma)) if kernel == "rbf" else None
    lower = gram_matrix(rows, kernel, sigma if width is None else width).tril()
    n = len(lower)
    mean = float(lower.tril(-1).sum()) / (n * (n - 1) / 2)
    factor, value = ridge_factor(lower, ridge)
    unit = torch.eye(n, dtype=factor.dtype, device=factor.device)
    weight = unit - value * torch.cholesky_inverse(factor)
    apart = weight[~unit.bool()]
    return Smoothing(
        width,
        median,
        mean,
        float(weight.diagonal().mean()),
        float(weight.sum(1).mean()),
        float(apart.min()),
        float(apart.max()),
    )


def _gaussian(squared: Tensor, sigma: float) -> Tensor:
    """exp(-squared / (2 sigma^2)), written over; divided before anything is squared, which a tiny sigma would not bear."""
    least = torch.finfo(squared.dtype).tiny
    return squared.sqrt_().div_(max(sigma, least)).square_().mul_(-0.5).exp_()


def _answer(kernel: Kernel, rows: Tensor, x: Tensor) -> Tensor:
    given = kernel(rows, x)
    expected = (len(rows), len(x))
    if given.shape != expected:
        raise OptionError(
            f"the kernel answered rows {tuple(rows.shape)} and {tuple(x.shape)} with {tuple(given.shape)}; "
            f"expected {expected}"
        )
    return given.detach()


def _check_symmetric(below: Tensor, above: Tensor) -> None:
    apart = (below - above).abs().max()
    if apart > ASYMMETRY * below.abs().max():
        raise OptionError(f"the kernel is not symmetric: k(x, y) and k(y, x) differ by {apart.item():.3g}")


def ridge_factor(gram: Tensor, ridge: float | None) -> tuple[Tensor, float]:
    """Lower Cholesky factor of K + ridge I and the ridge (None: 1 / sqrt(N)); K is written over.

    Raises: DataError if K + ridge I is not positive definite.
    """
    value = 1 / math.sqrt(len(gram)) if ridge is None else ridge
    gram.diagonal().add_(value)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(gram, out=(gram, info))
    if info.item():
        raise DataError(
            f"kernel matrix [{len(gram)}, {len(gram)}] + {value:.3g} I is not positive definite: a kernel must be "
            "symmetric and positive semi-definite, and the prior finite; a larger ridge mends small negative eigenvalues"
        )
    return gram, value
