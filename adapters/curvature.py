"""Curvature of a softmax classifier's likelihood in the parameters of its linear layer: one class per structure.

A structure turns additive sums over rows into what a posterior needs: its eigenvalues, and the variance of an image's
logits in coordinates where they are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import OptionError, suggest

ONE_THREAD_BELOW = 2048


class KronCurvature(nn.Module):
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
        super().__init__()
        self.bias = bias
        self.register_buffer("input_vectors", torch.zeros(inputs, inputs))
        self.register_buffer("input_values", torch.zeros(inputs))
        self.register_buffer("output_vectors", torch.zeros(classes, classes))
        self.register_buffer("output_values", torch.zeros(classes))

    @staticmethod
    def sums(phi: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Additive statistics of a chunk: sum phi phi^T [P, P] and sum G [C, C]."""
        return phi.T @ phi, torch.diag(p.sum(0)) - p.T @ p

    def assign(self, sums: tuple[Tensor, Tensor], count: int) -> None:
        """Take the statistics of `count` rows."""
        self.input_values, self.input_vectors = _eigh(sums[0] / count)
        self.output_values, self.output_vectors = _eigh(sums[1])

    def eigenvalues(self) -> tuple[Tensor, Tensor | None]:
        """Curvature in its own basis: weight [P, C], bias [C] (None without a bias)."""
        return torch.outer(self.input_values, self.output_values), self.output_values if self.bias else None

    def variance(self, phi: Tensor, prior: Tensor, factor: float) -> Tensor:
        """[B, C] variances of the independent coordinates of the logits, see `to_logits`."""
        weight, bias = self.eigenvalues()
        result = (phi @ self.input_vectors).square() @ (1.0 / (factor * weight + prior[0]))
        return result if bias is None else result + 1.0 / (factor * bias + prior[1])

    def to_logits(self, x: Tensor) -> Tensor:
        """Deviations [..., C] from the independent coordinates to the logits."""
        return x @ self.output_vectors.T

    def logit_variance(self, variance: Tensor) -> Tensor:
        """[B, C] variance of each logit from those of the independent coordinates."""
        return variance @ self.output_vectors.square().T


class DiagCurvature(nn.Module):
    """Diagonal of the likelihood curvature: weight [C, P] sum_n p_n (1 - p_n) phi_n^2, bias [C] sum_n p_n (1 - p_n)."""

    weight_values: Tensor
    bias_values: Tensor

    def __init__(self, inputs: int, classes: int, bias: bool) -> None:
        super().__init__()
        self.bias = bias
        self.register_buffer("weight_values", torch.zeros(classes, inputs))
        self.register_buffer("bias_values", torch.zeros(classes))

    @staticmethod
    def sums(phi: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Additive statistics of a chunk: [C, P] and [C]."""
        g = p * (1.0 - p)
        return g.T @ phi.square(), g.sum(0)

    def assign(self, sums: tuple[Tensor, Tensor], count: int) -> None:
        """Take the statistics of all rows."""
        self.weight_values, self.bias_values = sums

    def eigenvalues(self) -> tuple[Tensor, Tensor | None]:
        """Curvature of each parameter: weight [C, P], bias [C] (None without a bias)."""
        return self.weight_values, self.bias_values if self.bias else None

    def variance(self, phi: Tensor, prior: Tensor, factor: float) -> Tensor:
        """[B, C] variances of the logits, independent here."""
        weight, bias = self.eigenvalues()
        result = phi.square() @ (1.0 / (factor * weight + prior[0])).T
        return result if bias is None else result + 1.0 / (factor * bias + prior[1])

    def to_logits(self, x: Tensor) -> Tensor:
        """Deviations [..., C] from the independent coordinates to the logits: the same thing here."""
        return x

    def logit_variance(self, variance: Tensor) -> Tensor:
        """[B, C] variance of each logit from those of the independent coordinates: the same thing here."""
        return variance


CURVATURES: dict[str, type[KronCurvature] | type[DiagCurvature]] = {"kron": KronCurvature, "diag": DiagCurvature}


def curvature_class(structure: str) -> type[KronCurvature] | type[DiagCurvature]:
    """The class of that structure, "kron" or "diag"; OptionError for another name."""
    if structure not in CURVATURES:
        raise OptionError(f"structure={structure!r} is not a posterior structure: {suggest(structure, CURVATURES)}")
    return CURVATURES[structure]


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
