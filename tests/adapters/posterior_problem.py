"""A small classifier with data, and its posterior from the definition, for tests of the closed form."""

import torch
from torch import Tensor

STRUCTURES = ["kron", "diag", "full"]


def problem(rows: int = 60, inputs: int = 5, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the layer, its weight and bias, and labels drawn from it, in float64."""
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(rows, inputs, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, inputs, generator=g, dtype=torch.float64) / inputs**0.5
    bias = torch.randn(classes, generator=g, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(phi @ weight.T + bias, -1), 1, generator=g).flatten()
    return phi, weight, bias, labels


def dense(structure: str, phi: Tensor, weight: Tensor, bias: Tensor, prior: tuple[float, float]) -> Tensor:
    """Posterior covariance [C (P + 1), C (P + 1)], weights first (row by row), from its definition, row by row."""
    classes, inputs = weight.shape
    p = torch.softmax(phi @ weight.T + bias, -1)
    g = [torch.diag(q) - torch.outer(q, q) for q in p]
    if structure == "kron":
        block = torch.kron(sum(g), phi.T @ phi / len(phi))  # type: ignore[arg-type]
        curvature = torch.block_diag(block, sum(g))  # type: ignore[arg-type]
    else:
        jac = jacobians(phi, classes)
        curvature = torch.einsum("ncp,ncd,ndq->pq", jac, torch.stack(g), jac)
        curvature = curvature.diagonal().diag() if structure == "diag" else curvature
    prior_diagonal = torch.cat([torch.full((classes * inputs,), prior[0]), torch.full((classes,), prior[1])])
    return torch.linalg.inv(curvature + prior_diagonal.double().diag())


def jacobians(phi: Tensor, classes: int) -> Tensor:
    """[B, C, C (P + 1)] of the logits in the parameters, in the order of `dense`."""
    eye = torch.eye(classes, dtype=phi.dtype)
    return torch.stack([torch.cat([torch.kron(eye, x.unsqueeze(0)), eye], 1) for x in phi])
