"""Decoupled Uniformity: spread the images' centroids, averaged over images that prior knowledge calls alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..gathering import gather_rows
from ..numerics import block_rows, first_order, full, unit_rows
from .kernels import BLOCK, Kernel, gram_matrix, ridge_factor, squared_distances

CHUNK, CHUNK_GPU = 1 << 18, 1 << 24  # pairs held at a time


class DecoupledUniformity(nn.Module):
    """log mean over pairs of images of exp(-t ||c_i - c_j||^2), c = A m.

    m_i is the mean of image i's views, each of length 1 (m_i itself is not: spreading the m_i therefore makes the views
    of an image agree). A = (K + ridge I)^-1 K, with K the kernel between the images' priors, averages an image with
    those alike; without a kernel A = I. The gradient flows through m, not through K. The value lies in [-4t, 0]
    without a kernel; 0 means collapsed. With one view it is Wang and Isola's uniformity.

    Args:
        t: > 0.
        kernel: None, "rbf", "cosine", or a symmetric positive semi-definite callable: rows [M, P], [N, P] -> [M, N],
            called with up to 128 rows of the prior and with all of them.
        ridge: > 0, or None for 1 / sqrt(N) (what the paper's code makes of both None and 0).
        sigma: width of "rbf" > 0, in the prior's units, or "median": the median distance between different rows of the
            batch. Far below the priors' distances nothing is averaged, far above them everything: see `mean_diagonal`.
        gather: whether the processes of a launch take the loss of all their images together, so that it does not
            depend on how many there are. This is the default; the paper's code takes each process's own images
            (its 256 on 4 GPUs are 64 in every loss), `gather=False`.
    Source: Dufumier et al., ICML 2023, arXiv 2206.01646. K + ridge I is factorised (Cholesky, float64), where the
    paper's code inverts it in float32: centroids off by up to 1e-3, and by 4e-2 at 1024 images and a large sigma.
    """

    def __init__(
        self,
        t: float = 2.0,
        kernel: str | Kernel | None = None,
        ridge: float | None = 0.01,
        *,
        sigma: float | str = "median",
        gather: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < t < math.inf:
            raise OptionError(f"DecoupledUniformity: t={t} was given; expected a positive number")
        if not (kernel is None or callable(kernel) or kernel in ("rbf", "cosine")):
            raise OptionError(
                f"DecoupledUniformity: kernel={kernel!r} was given; use None, 'rbf', 'cosine' or a callable"
            )
        if ridge is not None and not 0 < ridge < math.inf:
            raise OptionError(
                f"DecoupledUniformity: ridge={ridge} was given; use a positive number, or None: 1/sqrt(N)"
            )
        if sigma != "median" and (isinstance(sigma, str) or not 0 < sigma < math.inf):
            raise OptionError(f"DecoupledUniformity: sigma={sigma!r} was given; use a positive number or 'median'")
        self.t, self.kernel, self.ridge, self.sigma, self.gather = t, kernel, ridge, sigma, gather

    def forward(self, views: Tensor, prior: Tensor | None = None) -> Tensor:
        """Scalar loss.

        Args:
            views: embeddings [N, V, D] of any length, V >= 1. Half precision is computed in float32.
            prior: [N, P] (or [N], floating point), what is known of each image; for a kernel, and only then.
        Raises: OptionError if the shapes do not fit, if there are fewer than 2 images (of all processes together with
            `gather`), or if prior and kernel do not come together; DataError if K + ridge I is not positive definite.
        """
        with torch.autocast(views.device.type, enabled=False):
            return uniformity(self.centroids(views, prior), self.t)

    def centroids(self, views: Tensor, prior: Tensor | None = None) -> Tensor:
        """c [N, D], the (averaged) centroids of all images; arguments and errors as for the loss."""
        if views.ndim != 3 or 0 in views.shape:
            raise OptionError(f"DecoupledUniformity expects views [N, V, D]; the shape given is {tuple(views.shape)}")
        if (prior is None) != (self.kernel is None):
            raise OptionError(
                f"DecoupledUniformity(kernel={self.kernel!r}) was given {'no' if prior is None else 'a'} prior: a kernel "
                "compares priors, and without a kernel a prior has no say"
            )
        mean = unit_rows(views).mean(1)
        mean = gather_rows(mean) if self.gather else mean
        if len(mean) < 2:
            raise OptionError(
                "DecoupledUniformity compares images and was given 1: use larger batches, or drop the last one"
            )
        if prior is None:
            return mean
        factor, ridge = self._factor(prior, len(views), mean.device)
        # (K + ridge I)^-1 K = I - ridge (K + ridge I)^-1, on m itself: A is never formed
        # (two triangular solves: `cholesky_solve` would copy the factor)
        half = torch.linalg.solve_triangular(factor, mean.to(factor.dtype), upper=False)
        return mean - ridge * torch.linalg.solve_triangular(factor.mT, half, upper=True).to(mean.dtype)

    @torch.no_grad()
    def mean_diagonal(self, prior: Tensor) -> float:
        """Mean of A's diagonal in (0, 1): 1 = no averaging, 1/N = all images averaged into one. A diagnostic of sigma.

        Costs about as much as the loss. With `gather`, every process must call it.
        """
        if self.kernel is None:
            return 1.0
        factor, ridge = self._factor(prior, len(prior), prior.device)
        n, total = len(factor), factor.new_zeros(())
        for start in range(0, n, BLOCK):  # of columns of the factor's inverse
            unit = factor.new_zeros(n, min(BLOCK, n - start))
            unit[start : start + BLOCK].fill_diagonal_(1.0)
            total += torch.linalg.solve_triangular(factor, unit, upper=False).square().sum()
        return 1.0 - ridge * total.item() / n

    @torch.no_grad()
    def _factor(self, prior: Tensor, n: int, device: torch.device) -> tuple[Tensor, float]:
        assert self.kernel is not None
        if prior.ndim == 1 and not prior.dtype.is_floating_point:
            raise OptionError(
                f"DecoupledUniformity was given a prior of {prior.dtype} numbers {tuple(prior.shape)}, such as labels: "
                "distances between class numbers mean nothing. Give one-hot rows [N, C], or float() if they are an order"
            )
        if prior.ndim not in (1, 2) or len(prior) != n:
            raise OptionError(f"DecoupledUniformity expects a prior [N, P] with N = {n}; given {tuple(prior.shape)}")
        rows = full(prior.detach().to(device).reshape(n, -1))
        return ridge_factor(
            gram_matrix(gather_rows(rows) if self.gather else rows, self.kernel, self.sigma), self.ridge
        )


def uniformity(centroids: Tensor, t: float = 2.0) -> Tensor:
    """Scalar log mean_{i<j} exp(-t ||c_i - c_j||^2) of centroids [N, D], N >= 2."""
    return _Uniformity.apply(centroids, t, torch.is_grad_enabled())


def alignment(centroids: Tensor) -> Tensor:
    """Scalar -mean_i ||c_i||^2 of centroids [N, D]: -1 when the views of every image agree. To be watched, not trained."""
    return -centroids.square().sum(1).mean()


class _Uniformity(torch.autograd.Function):
    """Value and gradient in one pass over blocks of rows against the columns from there on: each pair once."""

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, t: float, recorded: bool) -> Tensor:
        needed = recorded and ctx.needs_input_grad[0]
        x = centroids - centroids.mean(0)  # distances do not change; rounding errors shrink
        n = len(x)
        block = min(n, block_rows(x, n, CHUNK, CHUNK_GPU))
        counted = torch.ones(block, block, dtype=torch.bool, device=x.device).tril_()  # itself, and pairs seen before
        top, total, grad = x.new_tensor(-math.inf), x.new_zeros(()), torch.zeros_like(x)
        for start in range(0, n - 1, block):
            rows, columns = x[start : start + block], x[start:]
            weight = squared_distances(rows, columns).mul_(-t)
            weight[:, : len(rows)].masked_fill_(counted[: len(rows), : len(rows)], -math.inf)
            higher = torch.maximum(top, weight.max())
            weight.sub_(higher).exp_()
            shrink, top = (top - higher).exp(), higher
            total = total * shrink + weight.sum()
            if needed:
                grad *= shrink
                grad[start : start + block] += weight.sum(1)[:, None] * rows - weight @ columns
                grad[start:] += weight.sum(0)[:, None] * columns - weight.T @ rows
        ctx.save_for_backward(grad.mul_(-2 * t / total))
        return top + total.log() - math.log(n * (n - 1) / 2)

    @staticmethod
    @first_order("DecoupledUniformity")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None
