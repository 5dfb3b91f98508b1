"""Triplets (anchor, positive, negative) of a batch whose distances are of one kind: Laplace metric learning's miners.

With d = Euclidean distance of embeddings of length 1 and a margin m, a triplet is
"all": d_an <= d_ap + m (violates the margin); "semihard": d_ap < d_an <= d_ap + m; "hard": d_an <= d_ap;
"easy": d_an > d_ap + m; "none": any triplet. Source: Warburg et al., NeurIPS 2023, arXiv 2302.01332.
"""

from __future__ import annotations

import math

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
    negatives, positives = negative.sum(1, keepdim=True), positive.sum(1, keepdim=True)
    # of (a, p): negatives with d_an <= d_ap, and with d_an <= d_ap + m
    closer = torch.searchsorted(far, distance, right=True)
    within = torch.searchsorted(far, distance + margin, right=True)
    # of (a, n): positives with d_ap >= d_an, and with d_ap + m >= d_an
    farther = positives - torch.searchsorted(near, distance)
    reaching = positives - torch.searchsorted(reach, distance)
    by_positive, by_negative = {
        "all": (within, reaching),
        "semihard": (within - closer, reaching - farther),
        "hard": (closer, farther),
        "easy": (negatives - within, positives - reaching),
        "none": (negatives.expand_as(distance), positives.expand_as(distance)),
    }[miner]
    return by_positive * positive, by_negative * negative
