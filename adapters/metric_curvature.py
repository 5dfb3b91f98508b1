"""Curvature of metric losses over pairs of images, in closed form for a last linear layer.

For z = W x + b and a pair (1, 2) the generalised Gauss-Newton matrix is J1' H11 J1 + J1' H12 J2 + J2' H21 J1 + J2' H22 J2,
H being the Hessian of the pair's loss in (z1, z2). Its diagonal is, with the diagonals d11, d12, d22 of those blocks,

    weight: d11 (x) x1^2 + 2 d12 (x) x1 x2 + d22 (x) x2^2        bias: d11 + 2 d12 + d22

Summed over many pairs the terms in x1^2 and x2^2 need one product over rows, not over pairs, and the cross term one
product over the pairs that differ, however many triplets repeat them. No D x D matrix is ever formed.

Source: Warburg et al., "Bayesian Metric Learning for Uncertainty Quantification in Image Retrieval", NeurIPS 2023, arXiv
2302.01332. Its code has the wrong sign in the cross term of the arccos loss; here it is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import OptionError, suggest
from .mining import draw_triplets, triplet_counts, unit_distances

LOSSES = ("euclidean", "arccos")
APPROXIMATIONS = ("positives", "fixed", "full")
CHUNK_NUMBERS = 1 << 21  # numbers of one temporary array: 8 MB in float32


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows with a weight each: `first`, `second` int64 [P], `weight` floating [P] (negative for repulsion)."""

    first: Tensor
    second: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.first)


def check_curvature(owner: str, loss: str, approximation: str = "positives") -> None:
    if loss not in LOSSES:
        raise OptionError(f"{owner}: loss={loss!r} is unknown: {suggest(str(loss), LOSSES)}")
    if approximation not in APPROXIMATIONS:
        raise OptionError(
            f"{owner}: approximation={approximation!r} is unknown: {suggest(approximation, APPROXIMATIONS)}"
        )


@torch.no_grad()
def hessian_diagonal(
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loss: str = "euclidean",
    normalized: bool = True,
    cross: bool = True,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Diagonal of the Gauss-Newton matrix of a linear layer under a metric loss, summed over pairs of its inputs.

    >>> x1, x2 = torch.randn(1000, 512), torch.randn(1000, 512)
    >>> of_weight, of_bias = hessian_diagonal(x1, x2, torch.randn(128, 512))
    >>> of_weight.shape, of_bias.shape
    (torch.Size([128, 512]), torch.Size([128]))

    The losses of a pair: "euclidean" |u1 - u2|^2 / 2 of the embeddings divided by their lengths, the division belonging
    to the layer (`normalized=False`: of the embeddings as they are; the matrix is then exact); "arccos" 1 - <u1, u2>, the
    division belonging to the loss (always; the matrix is exact, and not positive where the pair is far apart).

    Args:
        x1, x2: [P, d_in] float32 or float64; P may be 0.
        weight, bias: [D, d_in], [D] or None.
        cross: False holds each partner fixed: no term in which both embeddings move.
        eps: added to the lengths by the normaliser of "euclidean"; the paper's code has 1e-6.
    Returns: [D, d_in] and [D]. With "euclidean" and `cross` they are not negative but for rounding. Embeddings of length 0
        have no direction and no curvature. Memory beyond inputs and result does not grow with P.
    Raises: OptionError on shapes that do not fit or an unknown loss.
    """
    check_curvature("hessian_diagonal", loss)
    if x1.ndim != 2 or x1.shape != x2.shape:
        raise OptionError(f"hessian_diagonal expects x1, x2 [P, d_in]; given {tuple(x1.shape)}, {tuple(x2.shape)}")
    _check_layer(x1, weight, bias)
    outputs, inputs = weight.shape
    total = weight.new_zeros(outputs, inputs, dtype=torch.float64), weight.new_zeros(outputs, dtype=torch.float64)
    step = chunk_rows(outputs + inputs)
    for start in range(0, len(x1), step):
        x = torch.cat([x1[start : start + step], x2[start : start + step]])
        rows = torch.arange(len(x), device=x.device).view(2, -1)
        pairs = Pairs(rows[0], rows[1], x.new_ones(len(rows[0])))
        part = pair_diagonal(x, weight, bias, pairs, loss=loss, normalized=normalized, cross=cross, eps=eps)
        total[0].add_(part[0])
        total[1].add_(part[1])
    return total[0].to(x1.dtype), total[1].to(x1.dtype)


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = weight.ndim == 2 and x.ndim == 2 and x.shape[1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        given = f"{tuple(x.shape)}, {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)}"
        raise OptionError(f"inputs [N, d_in], weight [D, d_in] and bias [D] or None are expected; given {given}")
    if not x.dtype == weight.dtype or not x.dtype.is_floating_point:
        raise OptionError(f"inputs and weight of one floating dtype are expected; given {x.dtype} and {weight.dtype}")


def chunk_rows(width: int) -> int:
    """Rows of so many numbers that are held at a time."""
    return max(1, CHUNK_NUMBERS // max(1, width))


@torch.no_grad()
def pair_diagonal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Pairs,
    *,
    loss: str = "euclidean",
    normalized: bool = True,
    cross: bool = True,
    eps: float = 0.0,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `hessian_diagonal`, of weighted pairs of the rows of x [N, d_in]: float64 [D, d_in] and [D].

    Computed in float64, as neighbours' own and cross terms nearly cancel. `reference`: the cross term of "arccos" as in the
    paper's code, subtracted although its sign is in it already.
    """
    check_curvature("pair_diagonal", loss)
    _check_layer(x, weight, bias)
    touch = x.new_zeros(len(x)).index_add_(0, pairs.first, pairs.weight.to(x))
    touch.index_add_(0, pairs.second, pairs.weight.to(x))
    if loss == "euclidean" and not normalized:
        return _plain(x, len(weight), pairs, touch, cross)
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    z = nn.functional.linear(x, weight, bias)
    length = z.norm(dim=-1, keepdim=True)
    inverse = torch.where(length > 0, 1.0 / (length + (eps if loss == "euclidean" else 0.0)), 0.0)
    u = nn.functional.normalize(z, dim=-1, eps=torch.finfo(z.dtype).tiny)
    v = z * inverse  # u, but for eps
    if loss == "euclidean":
        own = touch[:, None] * (1.0 - 2.0 * u * v + v * v) * inverse.square()
    else:
        partners = _partner_sums(u, pairs)
        cosine = (u * partners).sum(-1, keepdim=True)
        own = (cosine + 2.0 * u * partners - 3.0 * cosine * u * u) * inverse.square()
    of_weight, of_bias = (own.T @ x.square()).double(), own.double().sum(0)
    if cross:
        twice = -2.0 if reference and loss == "arccos" else 2.0
        step = chunk_rows(len(weight) + x.shape[1])
        for start in range(0, len(pairs), step):
            i, j, w = (field[start : start + step] for field in (pairs.first, pairs.second, pairs.weight))
            ui, uj, vi, vj = u[i], u[j], v[i], v[j]
            c = (ui * uj).sum(-1, keepdim=True)
            both = (ui * vi + uj * vj - c * vi * vj - 1.0) * (inverse[i] * inverse[j] * w.to(x)[:, None])
            of_weight += twice * (both.T @ (x[i] * x[j])).double()
            of_bias += twice * both.double().sum(0)
    return of_weight, of_bias


def _plain(x: Tensor, outputs: int, pairs: Pairs, touch: Tensor, cross: bool) -> tuple[Tensor, Tensor]:
    """Of |z1 - z2|^2 / 2 without normaliser: the same for every output, and nothing for the bias if both move."""
    if not cross:
        row, bias = (touch.double() @ x.square().double()), touch.double().sum()
    else:
        row, bias = x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
        step = chunk_rows(x.shape[1])
        for start in range(0, len(pairs), step):
            apart = x[pairs.first[start : start + step]] - x[pairs.second[start : start + step]]
            row += (pairs.weight[start : start + step].to(x) @ apart.square()).double()
    return row.expand(outputs, -1).clone(), bias.expand(outputs).clone()


def _partner_sums(u: Tensor, pairs: Pairs) -> Tensor:
    """[N, D]: for each row the weighted sum of the directions it is paired with."""
    total = torch.zeros_like(u)
    step = chunk_rows(u.shape[1])
    for start in range(0, len(pairs), step):
        i, j, w = (field[start : start + step] for field in (pairs.first, pairs.second, pairs.weight))
        total.index_add_(0, i, u[j] * w.to(u)[:, None])
        total.index_add_(0, j, u[i] * w.to(u)[:, None])
    return total


def signed_pairs(
    positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor], approximation: str
) -> tuple[Pairs, bool]:
    """The pairs of a list, each once with its multiplicity, and whether the cross term counts (`cross`).

    positive, negative: rows int64 ([P], [P]) and ([Q], [Q]); of triplets (a, p, n): (a, p) and (a, n). "positives" keeps
    only the positives; "fixed" (no cross terms) and "full" subtract the negatives. Order in a pair is of no account.
    """
    check_curvature("signed_pairs", "euclidean", approximation)
    parts = [(positive, 1.0)] if approximation == "positives" else [(positive, 1.0), (negative, -1.0)]
    first, second = (torch.cat([rows[side] for rows, _ in parts]) for side in (0, 1))
    sign = torch.cat([torch.full(rows[0].shape, s, dtype=torch.float64, device=first.device) for rows, s in parts])
    base = 1 + max(int(first.max()), int(second.max())) if len(first) else 1
    key, place = torch.unique(torch.minimum(first, second) * base + torch.maximum(first, second), return_inverse=True)
    count = sign.new_zeros(len(key)).index_add_(0, place, sign)
    return Pairs(key // base, key % base, count), approximation != "fixed"


def dense_pairs(positive: Tensor, negative: Tensor, approximation: str) -> tuple[Pairs, bool]:
    """As `signed_pairs`, from how much each pair of a batch counts: [N, N] twice."""
    signed = positive if approximation == "positives" else positive - negative
    upper = (signed + signed.T).triu(1)
    first, second = upper.nonzero(as_tuple=True)
    return Pairs(first, second, upper[first, second]), approximation != "fixed"


@dataclass(frozen=True)
class MinedCounts:
    """In how many triplets of a batch each (anchor, positive) and (anchor, negative) is: float64 [N, N] twice."""

    positive: Tensor
    negative: Tensor

    @property
    def per_anchor(self) -> Tensor:
        """Triplets of each anchor, [N]."""
        return self.positive.sum(1)

    def mean_per_anchor(self) -> MinedCounts:
        """Each anchor's triplets counted as one altogether; anchors without any count nothing."""
        share = 1.0 / self.per_anchor.clamp(min=1.0)[:, None]
        return MinedCounts(self.positive * share, self.negative * share)


@torch.no_grad()
def mine_counts(
    embedding: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    miner: str,
    max_triplets: int | None = None,
    generator: torch.Generator | None = None,
) -> MinedCounts:
    """The triplets of a batch as counts of pairs; with `max_triplets` those of a random subset of so many.

    embedding: [N, D] of any length; masks bool [N, N].
    """
    if max_triplets is None:
        u = nn.functional.normalize(embedding, dim=-1)
        counts = triplet_counts(unit_distances(u, u), positive, negative, margin, miner)
        return MinedCounts(counts[0].double(), counts[1].double())
    (a, p, n), _ = draw_triplets(embedding, positive, negative, margin, miner, max_triplets, generator)
    zeros = embedding.new_zeros(2, *positive.shape, dtype=torch.float64)
    one = zeros.new_ones(())
    return MinedCounts(
        zeros[0].index_put_((a, p), one, accumulate=True), zeros[1].index_put_((a, n), one, accumulate=True)
    )


def check_scale(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"{owner}: {name}={value!r} was given; expected a positive number")
