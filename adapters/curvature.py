"""Curvature of a linear layer's likelihood in its parameters: one class per structure.

A structure turns additive sums over rows into what a posterior needs: log determinants, and the covariance of an
image's logits. A prior is a tensor: [2] (precision of weights, of biases), or one for each parameter [C, P + 1], the
biases last ([C, P] without a bias).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import OptionError, suggest

ONE_THREAD_BELOW = 2048
FULL_BYTES = 2 * 2**30  # what the full structure may allocate
CERTAIN = 1e30  # a precision that leaves no variance
Sums = tuple[Tensor, ...]


class Curvature(nn.Module):
    """What a structure answers. `factor` scales the curvature of the likelihood, as 1 / temperature does.

    The spread of B images is what `spread` gives: the covariance of their C logits, in the structure's own form.
    """

    def __init__(self, inputs: int, classes: int, bias: bool) -> None:
        super().__init__()
        self.inputs, self.classes, self.bias = inputs, classes, bias

    @property
    def width(self) -> int:
        """Numbers `sums` holds for a row."""
        return self.inputs + self.classes

    def sums(self, phi: Tensor, p: Tensor | None) -> Sums:
        """Additive statistics of a chunk: inputs [n, P], class probabilities [n, C] (None: Gaussian, unit noise)."""
        raise NotImplementedError

    def assign(self, sums: Sums, count: int) -> None:
        """Take the statistics of `count` rows."""
        raise NotImplementedError

    def totals(self, count: int) -> Sums:
        """The statistics taken: what was given to `assign`."""
        raise NotImplementedError

    def eigenvalues(self) -> tuple[Tensor, Tensor | None]:
        """Curvature in its own basis: of the weights, and of the biases (None where they are not apart)."""
        raise NotImplementedError

    def log_det_ratio(self, prior: Tensor, factor: float | Tensor) -> Tensor:
        """log det(factor * curvature + prior) - log det(prior), differentiable in the prior."""
        weight, bias = self.eigenvalues()
        precision = self.split(prior)
        ratio = torch.log1p(factor * weight / precision[0]).sum()
        return ratio if bias is None else ratio + torch.log1p(factor * bias / precision[1]).sum()

    def project(self, phi: Tensor) -> Tensor:
        """What of inputs [B, P] the variances under any prior need."""
        raise NotImplementedError

    def spread(self, projected: Tensor, prior: Tensor, factor: float) -> Tensor:
        """Spread of the images that were projected."""
        raise NotImplementedError

    def logit_variance(self, spread: Tensor) -> Tensor:
        """[B, C] variance of each logit."""
        raise NotImplementedError

    def covariance_sums(self, spread: Tensor) -> Tensor:
        """[B, C] covariance of each logit with the sum of all."""
        raise NotImplementedError

    def deviations(self, spread: Tensor, draws: Tensor) -> Tensor:
        """[B, S, C] deviations of the logits from their means, for standard normal draws [S, C]."""
        raise NotImplementedError

    def split(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Precisions of weights and of biases, as scalars or [C, P] and [C]."""
        return (prior[0], prior[1]) if prior.ndim == 1 else (prior[:, : self.inputs], prior[:, -1])


class _Independent(Curvature):
    """Structures with a basis of the classes in which an image's logits are independent: their spread is [B, C]."""

    def to_logits(self, x: Tensor) -> Tensor:
        """Deviations [..., C] from the independent coordinates to the logits."""
        raise NotImplementedError

    def deviations(self, spread: Tensor, draws: Tensor) -> Tensor:
        return self.to_logits(spread.sqrt().unsqueeze(1) * draws)


class KronCurvature(_Independent):
    """Kronecker-factored likelihood curvature: weight block sum_n G_n (x) mean_n phi_n phi_n^T, bias block sum_n G_n.

    Kept as eigenvectors and eigenvalues of the two factors: P^2 + C^2 + P + C numbers (10.6 MB in float32
    for 1280 inputs and 1000 classes). Both blocks share the output factor's eigenvectors U_B, so in that basis an
    image's C logits are independent and everything costs [B, C].
    """

    input_vectors: Tensor
    input_values: Tensor
    output_vectors: Tensor
    output_values: Tensor

    def __init__(self, inputs: int, classes: int, bias: bool) -> None:
        super().__init__(inputs, classes, bias)
        self.register_buffer("input_vectors", torch.zeros(inputs, inputs))
        self.register_buffer("input_values", torch.zeros(inputs))
        self.register_buffer("output_vectors", torch.zeros(classes, classes))
        self.register_buffer("output_values", torch.zeros(classes))

    def sums(self, phi: Tensor, p: Tensor | None) -> Sums:
        """sum phi phi^T [P, P] and sum G [C, C]."""
        if p is None:
            return _gram(phi), len(phi) * torch.eye(self.classes).to(phi)
        return _gram(phi), torch.diag(p.sum(0)) - _gram(p)

    def assign(self, sums: Sums, count: int) -> None:
        self.input_values, self.input_vectors = _eigh(sums[0] / count)
        self.output_values, self.output_vectors = _eigh(sums[1])

    def totals(self, count: int) -> Sums:
        return count * _restored(self.input_values, self.input_vectors), _restored(
            self.output_values, self.output_vectors
        )

    def eigenvalues(self) -> tuple[Tensor, Tensor | None]:
        return torch.outer(self.input_values, self.output_values), self.output_values if self.bias else None

    def project(self, phi: Tensor) -> Tensor:
        return (phi @ self.input_vectors).square()

    def spread(self, projected: Tensor, prior: Tensor, factor: float) -> Tensor:
        weight, bias = self.eigenvalues()
        result = projected @ (1.0 / (factor * weight + prior[0]))
        return result if bias is None else result + 1.0 / (factor * bias + prior[1])

    def to_logits(self, x: Tensor) -> Tensor:
        return x @ self.output_vectors.T

    def logit_variance(self, spread: Tensor) -> Tensor:
        return spread @ self.output_vectors.square().T

    def covariance_sums(self, spread: Tensor) -> Tensor:
        return (spread * self.output_vectors.sum(0)) @ self.output_vectors.T


class DiagCurvature(_Independent):
    """Diagonal of the likelihood curvature: weight [C, P] sum_n p_n (1 - p_n) phi_n^2, bias [C] sum_n p_n (1 - p_n)."""

    weight_values: Tensor
    bias_values: Tensor

    def __init__(self, inputs: int, classes: int, bias: bool) -> None:
        super().__init__(inputs, classes, bias)
        self.register_buffer("weight_values", torch.zeros(classes, inputs))
        self.register_buffer("bias_values", torch.zeros(classes))

    def sums(self, phi: Tensor, p: Tensor | None) -> Sums:
        """[C, P] and [C]."""
        g = phi.new_ones(len(phi), self.classes) if p is None else p * (1.0 - p)
        return g.T @ phi.square(), g.sum(0)

    def assign(self, sums: Sums, count: int) -> None:
        self.weight_values, self.bias_values = sums

    def totals(self, count: int) -> Sums:
        return self.weight_values, self.bias_values

    def eigenvalues(self) -> tuple[Tensor, Tensor | None]:
        return self.weight_values, self.bias_values if self.bias else None

    def project(self, phi: Tensor) -> Tensor:
        return phi.square()

    def spread(self, projected: Tensor, prior: Tensor, factor: float) -> Tensor:
        weight, bias = self.eigenvalues()
        precision = self.split(prior)
        result = projected @ (1.0 / (factor * weight + precision[0])).T
        return result if bias is None else result + 1.0 / (factor * bias + precision[1])

    def to_logits(self, x: Tensor) -> Tensor:
        return x

    def logit_variance(self, spread: Tensor) -> Tensor:
        return spread

    def covariance_sums(self, spread: Tensor) -> Tensor:
        return spread


class FullCurvature(Curvature):
    """The whole likelihood curvature sum_n G_n (x) phi_n phi_n^T of weights and biases together, phi_n ending in a 1.

    Kept as its eigenvectors and eigenvalues: K^2 + K numbers for K = C (P + 1) parameters, ordered [C, P + 1]. The
    spread is the covariance [B, C, C]. With one precision for all parameters every prior is free; with several,
    each takes a Cholesky factor of [K, K].
    """

    values: Tensor
    vectors: Tensor

    def __init__(self, inputs: int, classes: int, bias: bool) -> None:
        super().__init__(inputs, classes, bias)
        size = classes * (inputs + bias)
        needed = 6 * 8 * size**2  # the sums, a chunk's, eigenvectors and the solver's room, in float64
        if needed > FULL_BYTES:
            raise OptionError(
                f"structure='full' of {classes} classes and {inputs} inputs has {size} parameters and would allocate "
                f"some {needed / 2**30:.1f} GiB for matrices of {size} x {size} (limit {FULL_BYTES / 2**30:.0f} GiB): use "
                "structure='kron' or 'diag'"
            )
        self.register_buffer("values", torch.zeros(size))
        self.register_buffer("vectors", torch.zeros(size, size))

    @property
    def width(self) -> int:
        return len(self.values)

    def _with_one(self, phi: Tensor) -> Tensor:
        return nn.functional.pad(phi, (0, 1), value=1.0) if self.bias else phi

    def sums(self, phi: Tensor, p: Tensor | None) -> Sums:
        """[K, K]."""
        wide = self._with_one(phi)
        if p is None:
            return (torch.kron(torch.eye(self.classes).to(wide), wide.T @ wide),)
        each = (p[:, :, None] * wide[:, None, :]).flatten(1)
        total = -(each.T @ each)
        shape = self.classes, wide.shape[1]
        own = total.view(*shape, *shape).diagonal(dim1=0, dim2=2)  # [P + 1, P + 1, C], the classes' own blocks
        own += (each.T @ wide).view(*shape, wide.shape[1]).permute(1, 2, 0)
        return (total,)

    def assign(self, sums: Sums, count: int) -> None:
        self.values, self.vectors = _eigh(sums[0])

    def totals(self, count: int) -> Sums:
        return (_restored(self.values, self.vectors),)

    def with_certain_bias(self) -> FullCurvature:
        """Of a layer without a bias: the same for one whose biases are known for certain (with any one prior)."""
        wide = FullCurvature(self.inputs, self.classes, True).to(self.values)
        size, end = len(self.values), len(wide.values)
        place = torch.arange(end, device=self.values.device).view(self.classes, self.inputs + 1)
        wide.vectors[place[:, :-1].flatten(), :size] = self.vectors
        wide.vectors[place[:, -1], torch.arange(size, end)] = 1.0
        wide.values[:size], wide.values[size:] = self.values, CERTAIN
        return wide

    def eigenvalues(self) -> tuple[Tensor, Tensor | None]:
        return self.values, None

    def precision(self, prior: Tensor, factor: float | Tensor) -> Tensor:
        """[K, K] of the posterior."""
        return factor * _restored(self.values.double(), self.vectors.double()) + torch.diag(self._each(prior).double())

    def log_det_ratio(self, prior: Tensor, factor: float | Tensor) -> Tensor:
        if _is_scalar(prior):
            return torch.log1p(factor * self.values / prior[0]).sum()
        factor_of = torch.linalg.cholesky(self.precision(prior, factor))
        return 2.0 * factor_of.diagonal().log().sum() - self._each(prior).log().sum()

    def _each(self, prior: Tensor) -> Tensor:
        """[K] precisions."""
        if prior.ndim == 2:
            return prior.flatten()
        row = prior[:1].expand(self.inputs)
        return (torch.cat([row, prior[1:]]) if self.bias else row).repeat(self.classes)

    def project(self, phi: Tensor) -> Tensor:
        return self._with_one(phi)

    def spread(self, projected: Tensor, prior: Tensor, factor: float) -> Tensor:
        # the direction no class feels has only the prior: in single precision its variance would swamp the others
        projected, prior = projected.double(), prior.double()
        if _is_scalar(prior):
            root, weight = self.vectors.double(), 1.0 / (factor * self.values.double() + prior[0])
        else:  # the columns of the inverse transposed Cholesky factor are such a root too
            lower = torch.linalg.cholesky(self.precision(prior, factor))
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            root = torch.linalg.solve_triangular(lower, identity, upper=False).T
            weight = torch.ones_like(self.values, dtype=torch.float64)
        root = root.view(self.classes, projected.shape[1], -1)
        step = max(1, 2**22 // max(1, root.numel() // projected.shape[1]))
        whole = (
            torch.compiler.is_compiling() or len(projected) <= step
        )  # an exported graph keeps its batch in one piece
        parts = [self._covariance(part, root, weight) for part in ([projected] if whole else projected.split(step))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _covariance(projected: Tensor, root: Tensor, weight: Tensor) -> Tensor:
        part = torch.einsum("bp,cpk->bck", projected, root)
        return (part * weight) @ part.transpose(1, 2)

    def logit_variance(self, spread: Tensor) -> Tensor:
        return spread.diagonal(dim1=1, dim2=2).to(self.values)

    def covariance_sums(self, spread: Tensor) -> Tensor:
        return spread.sum(2).to(self.values)

    def deviations(self, spread: Tensor, draws: Tensor) -> Tensor:
        size = spread.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-30)
        floor = size * torch.finfo(spread.dtype).eps * 10.0 * torch.eye(self.classes).to(spread)
        return (draws.to(spread) @ torch.linalg.cholesky(spread + floor).transpose(1, 2)).to(self.values)


CURVATURES: dict[str, type[Curvature]] = {"kron": KronCurvature, "diag": DiagCurvature, "full": FullCurvature}


def curvature_class(structure: str) -> type[Any]:
    """The class of that structure, "kron", "diag" or "full"; OptionError for another name."""
    if structure not in CURVATURES:
        raise OptionError(f"structure={structure!r} is not a posterior structure: {suggest(structure, CURVATURES)}")
    return CURVATURES[structure]


def _is_scalar(prior: Tensor) -> bool:
    """Whether one precision is meant for all; so it is in what gets compiled or exported, where data cannot be asked."""
    return prior.ndim == 1 and (torch.compiler.is_compiling() or bool(prior[0] == prior[1]))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (not below 0) and eigenvectors of a symmetric positive semi-definite matrix."""
    threads = torch.get_num_threads()
    try:
        if (
            len(matrix) <= ONE_THREAD_BELOW
        ):  # more threads wait for each other: 2 took up to ten times the CPU time of 1
            torch.set_num_threads(1)
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    return values.clamp(min=0.0), vectors


def _gram(x: Tensor, block: int = 256) -> Tensor:
    """x^T x, the half of it that is needed computed and mirrored."""
    product = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, len(product), block):
        rows = x[:, start : start + block].T @ x[:, start:]
        product[start : start + block, start:] = rows
        product[start:, start : start + block] = rows.T
    return product


def _restored(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * values) @ vectors.T
