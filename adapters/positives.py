"""From labels, soft labels or stored views to positive pairs and true negatives, for every head and recipe.

A source of pairs draws, for the rows of a batch, an anchor and a positive each, and says which rows of the batch may
serve as negatives of which. Row ids are int64 throughout: nothing is cast down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, OptionError


@dataclass
class PairBatch:
    """One batch of pairs.

    Attributes:
        anchor, positive: features [B, D]; of `RowNumbers` row numbers [B].
        negative: [B, B] in [0, 1], the probability that row j's positive counts as a negative of row i's anchor.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor


class PairSource(Protocol):
    def draw(self, rows: Tensor, generator: torch.Generator) -> PairBatch:
        """Pairs for the anchors `rows` int64 [B]."""
        ...


def label_masks(label: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns may be a row's positive (its class, not itself) and negative (another class): bool [N, N] twice.

    Raises: OptionError unless the labels are whole numbers [N].
    """
    if label.ndim != 1 or label.dtype.is_floating_point or label.dtype == torch.bool:
        raise OptionError(
            f"expected class numbers, integer [N]; the labels given are {label.dtype} {tuple(label.shape)}"
        )
    same = label[:, None] == label[None, :]
    return same.clone().fill_diagonal_(False), ~same


def place_masks(position: Tensor, near: float = 10.0, far: float = 25.0) -> tuple[Tensor, Tensor]:
    """As `label_masks`, for places: positives lie nearer than `near`, negatives farther than `far`, others are neither.

    `position` [N, K] are coordinates in the units of near and far (metres for UTM). Distances are taken in float64:
    UTM's northings of 5 million leave float32 half a metre.
    """
    if position.ndim != 2 or not 0 < near <= far:
        raise OptionError(
            f"expected positions [N, K] and 0 < near <= far; given {tuple(position.shape)}, near={near}, far={far}"
        )
    place = position.double()
    distance = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance < near).fill_diagonal_(False), distance > far


def target_masks(target: Tensor) -> tuple[Tensor, Tensor]:
    """`label_masks` of labels [N], `place_masks` of positions [N, K]."""
    return label_masks(target) if target.ndim == 1 else place_masks(target)


class FeatureTable:
    """Rows of a stored array as tensors: held in memory when it is small, read from the memory map when it is not."""

    in_memory_bytes = 2**30

    def __init__(self, array: np.ndarray, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.array = array
        self.tensor = None
        if array.nbytes <= self.in_memory_bytes:
            self.tensor = torch.from_numpy(np.array(array, dtype=np.float32)).to(self.device)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """float32 rows [B, ...] for int64 positions [B]."""
        if self.tensor is not None:
            return self.tensor[rows.to(self.device)]
        picked = np.ascontiguousarray(self.array[rows.cpu().numpy()], dtype=np.float32)
        return torch.from_numpy(picked).to(self.device)


class RowNumbers(FeatureTable):
    """A table whose rows are their own numbers, int64: for pairs of images that are read or augmented later."""

    def __init__(self, rows: int) -> None:
        super().__init__(np.empty((rows, 0), dtype=np.float32))

    def __getitem__(self, rows: Tensor) -> Tensor:
        return rows.to(self.device)


class LabelPairs:
    """Positives share the anchor's class (never the anchor itself); negatives are of another class."""

    def __init__(self, table: FeatureTable, labels: np.ndarray, rows: np.ndarray) -> None:
        """`labels` int64 [N] for every row of the table; pairs are drawn among `rows` only."""
        labels = np.array(labels, dtype=np.int64)  # a copy: stored labels are read-only maps
        classes, counts = np.unique(labels[rows], return_counts=True)
        if len(classes) < 2:
            raise DataError(f"positives by label need at least 2 classes among the rows; all are {classes.tolist()}")
        if counts.max() < 2:
            raise DataError("positives by label need a class with at least 2 rows; here every class has one row only")
        order = rows[np.argsort(labels[rows], kind="stable")]
        start = np.concatenate([[0], np.cumsum(counts)[:-1]])
        dense = np.searchsorted(classes, labels[order])
        position = np.full(len(labels), -1, dtype=np.int64)
        position[order] = np.arange(len(order))
        self.table = table
        self.labels = torch.from_numpy(labels)
        self.order = torch.from_numpy(order)  # rows sorted by class, so that a class is one block
        self.block_start = torch.from_numpy(start[dense])
        self.block_size = torch.from_numpy(counts[dense])
        self.position = torch.from_numpy(position)

    def draw(self, rows: Tensor, generator: torch.Generator) -> PairBatch:
        at = self.position[rows]
        start, size = self.block_start[at], self.block_size[at]
        # an offset in 1..size-1 round the block: every other member with equal probability, itself only if alone
        offset = 1 + (torch.rand(len(rows), generator=generator) * (size - 1)).long().clamp(max=size - 2)
        partner = self.order[start + (at - start + offset.clamp(min=0)) % size]
        _, other = label_masks(self.labels[rows])
        return PairBatch(self.table[rows], self.table[partner], other.float().to(self.table.device))


class SoftLabelPairs:
    """Positives by label distributions: draw a class from the anchor's, then a row in proportion to its share of it.

    Two rows are of the same class with probability <p_i, p_j>, which is also how they are kept from being negatives
    (MCInfoNCE's CIFAR-10H experiment, arXiv 2302.02865, without its 8-bit ids). An anchor's own positive is never its negative.
    """

    def __init__(self, table: FeatureTable, labels: np.ndarray, rows: np.ndarray) -> None:
        """`labels` float [N, C], rows that sum to 1."""
        self.table = table
        self.labels = torch.from_numpy(np.array(labels, dtype=np.float32))
        self.rows = torch.from_numpy(np.array(rows, dtype=np.int64))
        mass = np.asarray(labels, dtype=np.float64)[rows]
        if (mass > 0).any(axis=0).sum() < 2:
            raise DataError("positives by soft labels need at least 2 classes with some probability")
        # one sorted line for all classes: class c's cumulative shares lie in (c, c + 1], so one search serves the batch
        share = np.cumsum(mass, axis=0) / np.maximum(mass.sum(axis=0), 1e-300)
        self.line = torch.from_numpy((share + np.arange(share.shape[1])).T.reshape(-1).copy())

    def _partners(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        classes = torch.multinomial(self.labels[rows], 1, generator=generator)[:, 0]
        u = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        at = torch.searchsorted(self.line, classes + u, right=True) - classes * len(self.rows)
        return self.rows[at.clamp(0, len(self.rows) - 1)]

    def draw(self, rows: Tensor, generator: torch.Generator) -> PairBatch:
        partner = self._partners(rows, generator)
        itself = partner == rows
        if itself.any():  # one more try; an anchor that is alone in its class stays its own positive
            partner[itself] = self._partners(rows[itself], generator)
        p = self.labels[rows]
        other = (1.0 - p @ self.labels[partner].T).clamp(0, 1)
        # of an ambiguous image even its own positive, and itself, would be of another class now and then
        other[(partner == rows[:, None]) | (partner == partner[:, None])] = 0.0
        return PairBatch(self.table[rows], self.table[partner], other.to(self.table.device))


class ViewPairs:
    """Two stored views of the same image, drawn afresh at each step; every other image is a negative."""

    def __init__(self, table: FeatureTable, rows: np.ndarray) -> None:
        """The table holds [N, V, D]."""
        self.table = table
        self.views = table.array.shape[1]
        if self.views < 2:
            raise DataError(f"positives by views need at least 2 stored views of each image; there is {self.views}")

    def draw(self, rows: Tensor, generator: torch.Generator) -> PairBatch:
        first = torch.randint(self.views, (len(rows),), generator=generator)
        second = (first + torch.randint(1, self.views, (len(rows),), generator=generator)) % self.views
        both = self.table[rows]  # [B, V, D]
        index = torch.arange(len(rows), device=both.device)
        other = rows[:, None] != rows[None, :]
        return PairBatch(
            both[index, first.to(both.device)], both[index, second.to(both.device)], other.float().to(both.device)
        )


def draw_negatives(negative: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` negatives for each anchor out of its batch.

    Args:
        negative: [B, B] probabilities that column j is a negative of row i.
        count: M, how many to draw (with replacement, in proportion to the probabilities).

    Returns:
        int64 [B, M] columns, and bool [B]: False for anchors that have no negative in the batch.
    """
    has = negative.sum(1) > 0
    weights = torch.where(has[:, None], negative, torch.ones_like(negative)).cpu()
    return torch.multinomial(weights, count, replacement=True, generator=generator).to(negative.device), has
