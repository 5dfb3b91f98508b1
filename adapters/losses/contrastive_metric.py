"""ContrastiveMetric: the contrastive loss on mined triplets with which Laplace metric learning trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..mining import check_miner, check_pairs, mine_triplets, triplet_counts, unit_distances
from ..numerics import block_rows, first_order, unit_rows
from ..positives import label_masks

CHUNK, CHUNK_GPU = 1 << 17, 1 << 24  # pairs held at a time


class ContrastiveMetric(nn.Module):
    """Pulls positives together, pushes negatives a margin apart, over the pairs of mined triplets.

    The triplets (a, p, n) that the miner keeps are split into pairs; with d the Euclidean distance (not squared) of the
    embeddings divided by their lengths,
    loss = mean of d_ap over triplets with d_ap > 0 + mean of (margin - d_an) over triplets with d_an < margin.
    A pair counts as often as there are triplets with it. A mean of nothing is 0, and so is the loss of a batch
    without triplets (with a gradient of 0): it can always be back-propagated.

    Args:
        margin: m >= 0; distances lie in 0..2. LAM: 0.7 (FashionMNIST, CIFAR10), 1 (CUB200, LFW), 0.1 (MSLS).
        miner: "all" (d_an <= d_ap + m), "semihard" (d_ap < d_an <= d_ap + m), "hard" (d_an <= d_ap), "easy"
            (d_an > d_ap + m) or "none" (every triplet). LAM: all on small data and MSLS, semihard on CUB200 and LFW.
    Source: Warburg et al., NeurIPS 2023, arXiv 2302.01332 (its code uses this loss for "contrastive" and "arccos").
    """

    def __init__(self, margin: float, miner: str = "all") -> None:
        super().__init__()
        check_miner("ContrastiveMetric", margin, miner)
        self.margin, self.miner = margin, miner

    def forward(
        self,
        embedding: Tensor,
        label: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss.

        Args:
            embedding: [N, D] of any length. Half precision is computed in float32.
            label: integer [N]; or, instead of it,
            positive, negative: bool [N, N], which columns may be a row's positive and negative
                (`positives.place_masks` for places).
        Raises: OptionError if the shapes do not fit, or if neither or both of labels and masks are given.
        """
        masks = self._masks(embedding, label, positive, negative)
        with torch.autocast(embedding.device.type, enabled=False):
            return _MinedLoss.apply(unit_rows(embedding), *masks, self.margin, self.miner, torch.is_grad_enabled())

    def mine(
        self,
        embedding: Tensor,
        label: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The triplets of the loss: rows int64 [T] of anchors, positives and negatives; arguments as for the loss."""
        return mine_triplets(embedding, *self._masks(embedding, label, positive, negative), self.margin, self.miner)

    @staticmethod
    def _masks(
        embedding: Tensor, label: Tensor | None, positive: Tensor | None, negative: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        masks = [name for name, mask in (("positive", positive), ("negative", negative)) if mask is not None]
        if len(masks) != (2 if label is None else 0):
            given = " and ".join([*(["label"] if label is not None else []), *masks]) or "neither"
            raise OptionError(
                f"ContrastiveMetric expects either labels [N] or both masks, positive and negative [N, N]; given {given}"
            )
        if label is not None:
            positive, negative = label_masks(label)
        assert positive is not None
        assert negative is not None
        check_pairs("ContrastiveMetric", embedding, positive, negative)
        return positive.to(embedding.device), negative.to(embedding.device)


class _MinedLoss(torch.autograd.Function):
    """Value and gradient in one pass over blocks of anchors: no triplet is ever listed, and no N x N matrix kept."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, positive: Tensor, negative: Tensor, margin: float, miner: str, recorded: bool
    ) -> Tensor:
        n = len(u)
        block = block_rows(u, n, CHUNK, CHUNK_GPU)
        # the two means' sums, numbers of terms and gradients: a term's weight is known only at the end
        total, terms = u.new_zeros(2), u.new_zeros(2, dtype=torch.int64)
        grad = u.new_zeros(2, *u.shape)
        for start in range(0, n, block):
            rows = slice(start, start + block)
            distance = unit_distances(u[rows], u)
            counts = triplet_counts(distance, positive[rows], negative[rows], margin, miner)
            for k, (count, kept) in enumerate(zip(counts, (distance > 0, distance < margin), strict=True)):
                count = count * kept
                total[k] += (count * (distance if k == 0 else margin - distance)).sum()
                terms[k] += count.sum()
                if not (recorded and ctx.needs_input_grad[0]):
                    continue
                weight = torch.where(distance > 0, count / distance, 0.0)  # at distance 0 there is no direction
                weight = weight if k == 0 else -weight
                grad[k, rows] += weight.sum(1)[:, None] * u[rows] - weight @ u
                grad[k] += weight.sum(0)[:, None] * u - weight.T @ u[rows]
        share = 1 / terms.clamp(min=1).to(u.dtype)
        ctx.save_for_backward((grad * share[:, None, None]).sum(0))
        return (total * share).sum()

    @staticmethod
    @first_order("ContrastiveMetric")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], *(None,) * 5
