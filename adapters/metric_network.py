"""Curvature of metric losses over pairs for small non-linear heads, from the Jacobians of their D outputs.

A perceptron, a small convolutional network, a normaliser at the end: whatever `torch.func` can differentiate. A row's
Jacobian is [D, P]; only chunks of rows are held. For a single linear layer use `metric_curvature`, which is closed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .metric_curvature import CHUNK_NUMBERS, Pairs, check_curvature


@torch.no_grad()
def network_diagonal(
    network: nn.Module, x: Tensor, pairs: Pairs, *, loss: str = "euclidean", cross: bool = True
) -> dict[str, Tensor]:
    """Diagonal of the Gauss-Newton matrix of a network's parameters, summed over weighted pairs of the rows of x.

    Args:
        network: x [N, ...] -> embeddings [N, D]; in eval mode, each row's output its own affair. A normaliser at its end
            belongs to it ("euclidean"); "arccos" normalises in the loss, and its network must not.
        pairs: of rows of x (`metric_curvature.signed_pairs`).
        cross: False holds each partner fixed.
    Returns: by parameter name, float64 of the parameter's shape. It equals the true Hessian's diagonal only where the
        network is linear.
    Raises: OptionError for an unknown loss.
    """
    check_curvature("network_diagonal", loss)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    buffers = {name: b.detach() for name, b in network.named_buffers()}

    def one(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(network, (values, buffers), (row[None],))[0]

    jacobian = vmap(jacrev(one), in_dims=(None, 0))

    def rows_of(rows: Tensor) -> Tensor:
        """Jacobians [n, D, P] of rows, parameters in their order."""
        return torch.cat([j.flatten(2) for j in jacobian(parameters, x[rows]).values()], dim=2)

    z = network(x)
    size = max(1, CHUNK_NUMBERS // (z.shape[1] * sum(p.numel() for p in parameters.values())))
    total = _own(rows_of, z, pairs, loss, size)
    if cross:
        total = total + 2.0 * _cross(rows_of, z, pairs, loss, size)
    shapes = {name: p.shape for name, p in parameters.items()}
    split = total.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(split, shapes.items(), strict=True)}


def _directions(z: Tensor) -> tuple[Tensor, Tensor]:
    """Directions [N, D] and inverse lengths [N, 1]; none for a length of 0."""
    length = z.norm(dim=-1, keepdim=True)
    inverse = torch.where(length > 0, 1.0 / length, 0.0)
    return z * inverse, inverse


def _own(rows_of: Callable[[Tensor], Tensor], z: Tensor, pairs: Pairs, loss: str, size: int) -> Tensor:
    """Sum over rows of the diagonal of J' B J, B [D, D] being the sum of the pair losses' blocks of this row."""
    weight = pairs.weight.to(z)
    blocks = z.new_zeros(len(z)).index_add_(0, pairs.first, weight).index_add_(0, pairs.second, weight)
    u, inverse = _directions(z)
    partners = torch.zeros_like(u).index_add_(0, pairs.first, u[pairs.second] * weight[:, None])
    partners.index_add_(0, pairs.second, u[pairs.first] * weight[:, None])
    touched = torch.unique(torch.cat([pairs.first, pairs.second]))
    total = z.new_zeros((), dtype=torch.float64)
    for rows in touched.split(size) if len(touched) else (touched,):
        jacobian = rows_of(rows)
        if loss == "euclidean":
            part = (blocks[rows, None, None] * jacobian.square()).sum((0, 1))
        else:
            ui, mi = u[rows], partners[rows]
            cosine = (ui * mi).sum(-1)[:, None]
            along, toward = ((jacobian * y[:, :, None]).sum(1) for y in (ui, mi))
            squares = jacobian.square().sum(1)
            part = (inverse[rows].square() * (cosine * squares + 2.0 * along * toward - 3.0 * cosine * along**2)).sum(0)
        total = total + part.double()
    return total


def _cross(rows_of: Callable[[Tensor], Tensor], z: Tensor, pairs: Pairs, loss: str, size: int) -> Tensor:
    """Sum over pairs of the diagonal of J1' H12 J2."""
    u, inverse = _directions(z)
    total = z.new_zeros((), dtype=torch.float64)
    order = torch.argsort(pairs.first)
    for chunk in order.split(max(1, size // 2)) if len(order) else (order,):
        i, j, w = pairs.first[chunk], pairs.second[chunk], pairs.weight[chunk].to(z)[:, None]
        rows, place = torch.unique(torch.cat([i, j]), return_inverse=True)
        jacobian = rows_of(rows)
        j1, j2 = jacobian[place[: len(i)]], jacobian[place[len(i) :]]
        part = -(j1 * j2).sum(1)
        if loss == "arccos":
            u1, u2 = u[i][:, :, None], u[j][:, :, None]
            c = (u[i] * u[j]).sum(-1, keepdim=True)
            j1u, j1v, j2u, j2v = (j1 * u1).sum(1), (j1 * u2).sum(1), (j2 * u1).sum(1), (j2 * u2).sum(1)
            part = (part + j1u * j2u + j1v * j2v - c * j1u * j2v) * (inverse[i] * inverse[j])
        total = total + (w * part).double().sum(0)
    return total
