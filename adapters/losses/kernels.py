"""Kernels between the rows of prior knowledge, for Decoupled Uniformity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError, OptionError

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 256  # rows of a Gram matrix made at a time
SAME = 1e-6  # of the largest squared distance: rows nearer than that are one row to the median


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 >= 0 [N, M] of rows [N, P], [M, P] by one matrix product; exact to rounding for centred rows."""
    gram = torch.addmm(y.square().sum(1)[None], x, y.T, alpha=-2)
    return gram.add_(x.square().sum(1)[:, None]).clamp_(min=0)


def rbf(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """exp(-||x_i - y_j||^2 / (2 sigma^2)) in (0, 1], [N, M] of rows [N, P] and [M, P]."""
    centre = y.mean(0)  # large rows would cancel
    return squared_distances(x - centre, y - centre).mul_(-0.5 / sigma**2).exp_()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_j> / (|x_i| |y_j|) in [-1, 1], [N, M] of rows [N, P] and [M, P]; a row of zeros has 0 with every row."""
    return functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T


def median_distance(squared: Tensor) -> Tensor:
    """Median distance between different rows, from the lower triangle of squared distances [N, N]; 1 if all are one."""
    upper = squared.T  # by rows, where `gram_matrix` fills by columns: the mask below runs along memory
    different = torch.ones(upper.shape, dtype=torch.bool, device=upper.device).triu_(1)
    distances = upper.masked_select(different.logical_and_(upper > SAME * upper.max()))
    return distances.median().sqrt() if len(distances) else squared.new_ones(())


def gram_matrix(prior: Tensor, kernel: str | Kernel, sigma: float | str) -> Tensor:
    """K [N, N] between the rows [N, P] of a prior, in float64 (float32 where the device has none); no gradient.

    Only the lower triangle is filled for "rbf" and "cosine".
    Raises: OptionError if a callable answers with another shape.
    """
    n = len(prior)
    x = prior if prior.dtype == torch.float64 else prior.float()
    precise = torch.float32 if x.device.type == "mps" else torch.float64
    if callable(kernel):
        given = kernel(x, x)
        if given.shape != (n, n):
            raise OptionError(
                f"the kernel answered rows {tuple(x.shape)} with {tuple(given.shape)}; expected ({n}, {n})"
            )
        return given.detach().to(precise, copy=True)
    x = x - x.mean(0) if kernel == "rbf" else functional.normalize(x, dim=1)
    gram = torch.zeros(n, n, dtype=precise, device=x.device).T  # by columns, as LAPACK wants it: no copy is made
    for start in range(0, n, BLOCK):
        rows, seen = x[start : start + BLOCK], x[: start + BLOCK]
        gram[start : start + BLOCK, : start + BLOCK] = (
            squared_distances(rows, seen) if kernel == "rbf" else rows @ seen.T
        )
    if kernel == "rbf":
        width = median_distance(gram) if sigma == "median" else gram.new_tensor(float(sigma))
        gram.mul_(-0.5 / width.square()).exp_().fill_diagonal_(1.0)
    return gram


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
