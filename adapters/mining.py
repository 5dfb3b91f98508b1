"""Triplets (anchor, positive, negative) of a batch whose distances are of one kind: Laplace metric learning's miners.

With d = Euclidean distance of embeddings of length 1 and a margin m, a triplet is
"all": d_an <= d_ap + m (violates the margin); "semihard": d_ap < d_an <= d_ap + m; "hard": d_an <= d_ap;
"easy": d_an > d_ap + m; "none": any triplet. Source: Warburg et al., NeurIPS 2023, arXiv 2302.01332.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .errors import OptionError
from .numerics import block_rows, unit_rows

MINERS = ("all", "semihard", "hard", "easy", "none")
CHUNK, CHUNK_GPU = 1 << 20, 1 << 26  # candidate triplets held at a time


def check_miner(owner: str, margin: float, miner: str) -> None:
    if not 0 <= margin < math.inf:
        raise OptionError(f"{owner}: margin={margin} was given; expected a number >= 0 (distances lie in 0..2)")
    if miner not in MINERS:
        raise OptionError(f"{owner}: miner={miner!r} was given; use one of {', '.join(MINERS)}")


def check_pairs(owner: str, embedding: Tensor, positive: Tensor, negative: Tensor) -> None:
    n = len(embedding)
    if embedding.ndim != 2 or any(x.shape != (n, n) or x.dtype != torch.bool for x in (positive, negative)):
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (embedding, positive, negative))
        raise OptionError(f"{owner} expects embeddings [N, D] and two bool [N, N] (positive, negative); given {given}")


def unit_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Distances in [0, 2] [N, M] between rows of length 1; 0 below the rounding error of the products (7e-4 in float32)."""
    squared = (rows @ columns.T).mul_(-2).add_(2)
    return squared.masked_fill_(squared <= 4 * torch.finfo(squared.dtype).eps, 0).sqrt_()


@torch.no_grad()
def mine_triplets(
    embedding: Tensor, positive: Tensor, negative: Tensor, margin: float, miner: str = "all"
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows int64 [T] of anchors, positives and negatives, in ascending order; T may be 0.

    Args:
        embedding: [N, D] of any length.
        positive, negative: bool [N, N], which columns may be a row's positive and negative
            (`positives.label_masks`, `positives.place_masks`).
    Raises: OptionError if shapes, margin or miner do not fit.
    """
    check_miner("mine_triplets", margin, miner)
    check_pairs("mine_triplets", embedding, positive, negative)
    u = unit_rows(embedding)
    n = len(u)
    block = block_rows(u, n * n, CHUNK, CHUNK_GPU)
    found = [torch.empty(3, 0, dtype=torch.int64, device=u.device)]
    for start in range(0, n, block):
        rows = slice(start, start + block)
        distance = unit_distances(u[rows], u)
        far = distance[:, None, :]
        near = distance[:, :, None]
        kept = positive[rows, :, None] & negative[rows, None, :]
        if miner in ("all", "semihard"):
            kept &= far <= near + margin
        if miner == "semihard":
            kept &= far > near
        elif miner == "hard":
            kept &= far <= near
        elif miner == "easy":
            kept &= far > near + margin
        triplets = kept.nonzero().T
        triplets[0] += start
        found.append(triplets)
    anchors, positives, negatives = torch.cat(found, 1)
    return anchors, positives, negatives


@torch.no_grad()
def draw_triplets(
    embedding: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    miner: str,
    limit: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """At most `limit` of the triplets of `mine_triplets`, int64 [3, K] in ascending order, and how many those are.

    Of more than `limit` a random subset, any of them equally likely, found by counts: the others are never listed.
    generator: on the CPU, so that every device draws the same. Arguments and errors as of `mine_triplets`.
    """
    check_miner("draw_triplets", margin, miner)
    check_pairs("draw_triplets", embedding, positive, negative)
    u = unit_rows(embedding)
    n = len(u)
    distance = unit_distances(u, u)
    far, order = torch.where(negative, distance, distance.new_tensor(math.inf)).sort(1)
    first, last = _mined_places(distance, far, negative, margin, miner)
    counts = ((last - first) * positive).flatten()
    ends = counts.cumsum(0)
    total = int(counts.sum())
    if total <= limit:
        rank = torch.arange(total)
    else:
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        rank = torch.from_numpy(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))
    rank = rank.to(ends.device)
    pair = torch.searchsorted(ends, rank, right=True)
    place = first.flatten()[pair] + rank - (ends - counts)[pair]
    found = (pair * n + order[pair // n, place]).sort().values
    return torch.stack([found // n**2, found // n % n, found % n]), total


def _mined_places(distance: Tensor, far: Tensor, negative: Tensor, margin: float, miner: str) -> tuple[Tensor, Tensor]:
    """Which of an anchor's negatives, `far` [R, N] in ascending order, are mined with each positive: from and to, [R, N]."""
    closer = torch.searchsorted(far, distance, right=True)  # negatives with d_an <= d_ap
    within = torch.searchsorted(far, distance + margin, right=True)  # and with d_an <= d_ap + m
    none, every = torch.zeros_like(closer), negative.sum(1, keepdim=True).expand_as(closer)
    return {
        "all": (none, within),
        "semihard": (closer, within),
        "hard": (none, closer),
        "easy": (within, every),
        "none": (none, every),
    }[miner]


def triplet_counts(
    distance: Tensor, positive: Tensor, negative: Tensor, margin: float, miner: str
) -> tuple[Tensor, Tensor]:
    """In how many mined triplets each (anchor, positive) and each (anchor, negative) is: int64 [R, N] twice.

    The numbers of `mine_triplets` without its triplets: by sorting each anchor's distances [R, N], not by comparing all
    its positives with all its negatives.
    """
    endless = distance.new_tensor(math.inf)
    far = torch.where(negative, distance, endless).sort(1).values
    near = torch.where(positive, distance, endless).sort(1).values
    reach = near + margin  # ascending, as near is
    distance = distance.contiguous()
    positives = positive.sum(1, keepdim=True)
    first, last = _mined_places(distance, far, negative, margin, miner)
    # of (a, n): positives with d_ap >= d_an, and with d_ap + m >= d_an
    farther = positives - torch.searchsorted(near, distance)
    reaching = positives - torch.searchsorted(reach, distance)
    by_negative = {
        "all": reaching,
        "semihard": reaching - farther,
        "hard": farther,
        "easy": positives - reaching,
        "none": positives.expand_as(distance),
    }[miner]
    return (last - first) * positive, by_negative * negative
