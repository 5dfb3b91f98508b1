"""Metrics as functions of how often each row is counted: what the bootstrap resamples.

A statistic is prepared once (sorted, binned) and then answers for many resamples at a time: called with the counts
[R, N] of every stratum it gives [R], or [R, K] when it has several values. Counts of one everywhere give the plain
metric. Everywhere a higher uncertainty means: out of distribution, wrong, more ambiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..adapters.errors import DataError, OptionError
from .arrays import Array, finite, same_rows, truth


class Statistic:
    """A metric over strata of rows; the strata are resampled separately."""

    sizes: tuple[int, ...]
    """Rows in each stratum."""
    biased: ClassVar[bool] = False
    """Whether noise alone makes it larger, as it does a sum of absolute values; such a metric is >= 0."""
    bias_factor: ClassVar[float] = 1 + 2**0.5
    """At most how much larger that bias is than what the bootstrap shows of it; as it stands, of a sum of absolute values."""

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        """One array of counts [R, N] for each stratum -> [R] or [R, K], float64; NaN where it is not defined."""
        raise NotImplementedError

    def value(self) -> np.ndarray:
        """The metric on the rows as they are: a scalar array, or [K]."""
        return self([np.ones((1, n)) for n in self.sizes])[0]

    def noise(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        """What a biased metric would be if its true value were 0 and only the resampling moved it: [R]."""
        raise NotImplementedError


class Mean(Statistic):
    """Mean of one number per image: accuracy, error rate, NLL, ... `values` is [N]."""

    def __init__(self, values: Array) -> None:
        self.values = finite("values", values)
        self.sizes = (len(self.values),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return counts[0] @ self.values / counts[0].sum(1)


class Auroc(Statistic):
    """Chance that an out-of-distribution image is less certain than an in-distribution one; ties count half.

    Two strata: `id_uncertainty` [N], `ood_uncertainty` [M]. Equals the Mann-Whitney U statistic over N M.
    """

    def __init__(self, id_uncertainty: Array, ood_uncertainty: Array) -> None:
        inside = finite("the ID uncertainty", id_uncertainty)
        outside = finite("the OOD uncertainty", ood_uncertainty)
        self.sizes = (len(inside), len(outside))
        self.pairs = Pairs(inside, outside)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self.pairs(*counts)


class Spearman(Statistic):
    """Spearman's rank correlation, average ranks for ties.

    `x` and `y` are both [N], or both [N, S] when each image gives S pairs (one for each severity, say): then the pairs
    are pooled and an image is resampled with all of them. Raises DataError when `x` or `y` is constant.
    """

    def __init__(self, x: Array, y: Array) -> None:
        a, b = finite("x", x, (1, 2)), finite("y", y, (1, 2))
        if a.shape != b.shape:
            raise DataError(f"x and y must have the same shape; these are {a.shape} and {b.shape}")
        for name, values in (("x", a), ("y", b)):
            if values.min() == values.max():
                raise DataError(f"{name} is constant ({values.flat[0]:g}): a rank correlation is not defined")
        self.sizes = (len(a),)
        self.repeats = a.size // len(a)
        self.rankings = [_ranking(values, values) for values in (a.ravel(), b.ravel())]

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        weight = np.repeat(counts[0], self.repeats, axis=1)
        half = weight.sum(1, keepdims=True) / 2  # the mean of the mid-ranks below
        x, y = (_mid_ranks(weight, *ranking) - half for ranking in self.rankings)
        covariance, *variances = (np.einsum("rn,rn,rn->r", weight, p, q) for p, q in ((x, y), (x, x), (y, y)))
        scale = np.sqrt(variances[0] * variances[1])
        return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def confidences(confidence: Array, correct: Array) -> tuple[np.ndarray, np.ndarray]:
    """Confidences [N] in 0..1 and whether each prediction is right, bool [N], checked. Raises DataError."""
    c, right = finite("confidence", confidence), truth("correct", correct)
    same_rows(confidence=c, correct=right)
    if c.min() < 0 or c.max() > 1:
        raise DataError(f"confidence must lie in 0..1; it lies in {c.min():g}..{c.max():g}")
    return c, right


class Ece(Statistic):
    """Expected calibration error of the top class, equal-width bins (Guo et al. 2017): 0 to 1.

    `confidence` [N] in 0..1, `correct` [N] bool. Bin m of M holds (m-1)/M < confidence <= m/M, so that a confidence of
    exactly 1, common in float32, is in the last bin (torchmetrics 1.9 gives it a bin of its own).
    """

    biased = True

    def __init__(self, confidence: Array, correct: Array, bins: int = 15) -> None:
        c, right = confidences(confidence, correct)
        if bins < 1:
            raise OptionError(f"bins={bins} was given; expected at least 1")
        self.sizes, self.confidence, self.correct = (len(c),), c, right
        place = self.places(c, bins)
        self.gap = np.zeros((len(c), place.max() + 1))  # correct - confidence, in the row's bin
        self.gap[np.arange(len(c)), place] = right - c

    @staticmethod
    def places(confidence: np.ndarray, bins: int) -> np.ndarray:
        """The bin of each row, int [N]."""
        return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.abs(counts[0] @ self.gap).sum(1) / counts[0].sum(1)

    def noise(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.abs((counts[0] - 1) @ self.gap).sum(1) / counts[0].sum(1)


class Aurc(Statistic):
    """Area under the risk-coverage curve (Geifman & El-Yaniv 2017): mean error rate of the k most certain, over k.

    `uncertainty` [N], `wrong` [N] bool; 0 to 1, lower is better. Images of equal uncertainty are taken in every order
    at once: the expectation over their orders, in closed form by harmonic numbers.
    """

    def __init__(self, uncertainty: Array, wrong: Array) -> None:
        self.kept = Kept(uncertainty, wrong)
        self.sizes = (len(self.kept.order),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        weight, errors = self.kept(counts[0])
        before, errors_before = weight.cumsum(1) - weight, errors.cumsum(1) - errors
        n = counts[0].sum(1).astype(int)
        harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n.max() + 1))])
        start, stop = before.astype(int), (before + weight).astype(int)
        # sum over j = 1..w of (E + e j/w) / (C + j), with E errors among the C images before a tie of w with e errors
        rate = np.divide(errors, weight, out=np.zeros_like(errors), where=weight > 0)
        area = (errors_before - rate * before) * (harmonic[stop] - harmonic[start]) + errors
        return area.sum(1) / n


class SelectiveAccuracy(Statistic):
    """Accuracy of the images that are kept when the least certain ones are rejected: [K], one for each share rejected.

    `uncertainty` [N], `correct` [N] bool, `rejected` [K] in 0 <= share < 1. Ties are kept in proportion. A share that
    falls between two images is interpolated in the number of right answers.
    """

    def __init__(self, uncertainty: Array, correct: Array, rejected: Array) -> None:
        self.rejected = finite("rejected", rejected)
        if self.rejected.min() < 0 or self.rejected.max() >= 1:
            raise OptionError("the shares to reject must be at least 0 and below 1")
        self.kept = Kept(uncertainty, correct)
        self.sizes = (len(self.kept.order),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        weight, right = (np.pad(a.cumsum(1), ((0, 0), (1, 0))) for a in self.kept(counts[0]))
        total = weight[:, -1:]
        wanted = np.maximum(total * (1 - self.rejected), 1.0)
        # one search for all resamples: each row of cumulated counts is moved beyond the row before it
        shift = np.arange(len(weight))[:, None] * (total.max() + 1)
        width = weight.shape[1]
        place = np.searchsorted((weight + shift).ravel(), (wanted + shift).ravel()).reshape(wanted.shape)
        place = np.clip(place - np.arange(len(weight))[:, None] * width, 1, width - 1)
        low, high = (np.take_along_axis(weight, p, 1) for p in (place - 1, place))
        low_right, high_right = (np.take_along_axis(right, p, 1) for p in (place - 1, place))
        step = np.divide(wanted - low, high - low, out=np.zeros_like(low), where=high > low)
        return (low_right + step * (high_right - low_right)) / wanted


class Kept:
    """Rows from the most to the least certain, in groups of equal uncertainty."""

    def __init__(self, uncertainty: Array, marked: Array) -> None:
        u, self.marked = finite("uncertainty", uncertainty), truth("correct or wrong", marked)
        same_rows(uncertainty=u, marked=self.marked)
        self.order = np.argsort(u, kind="stable")
        self.starts = np.flatnonzero(np.diff(u[self.order], prepend=-np.inf))
        self.marked = self.marked[self.order].astype(np.float64)

    def __call__(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts [R, N] -> images in each group and marked images in each group, both [R, G]."""
        ordered = counts[:, self.order]
        return np.add.reduceat(ordered, self.starts, axis=1), np.add.reduceat(
            ordered * self.marked, self.starts, axis=1
        )


class Pairs:
    """Share of the pairs of a low [N] and a high [M] in which the high number is the larger, ties half; checks nothing."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self.ranking = _ranking(low, high)

    def __call__(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Counts [R, N] and [R, M] -> [R]; NaN where either side has none."""
        larger = np.einsum("rm,rm->r", _mid_ranks(low, *self.ranking), high)
        every = low.sum(1) * high.sum(1)
        return np.divide(larger, every, out=np.full_like(larger, np.nan), where=every > 0)


def _ranking(values: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of `values` [N], and how many of them are below, and not above, each number in `of` [M]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.searchsorted(ordered, of, side="left"), np.searchsorted(ordered, of, side="right")


def _mid_ranks(counts: np.ndarray, order: np.ndarray, below: np.ndarray, upto: np.ndarray) -> np.ndarray:
    """Counted rows below, and half of those equal, for each number ranked: [R, M]."""
    cumulated = np.pad(counts[:, order].cumsum(1), ((0, 0), (1, 0)))
    return (cumulated[:, below] + cumulated[:, upto]) / 2
