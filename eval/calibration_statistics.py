"""Calibration beyond `statistics.Ece`: bins of equal mass, no bins, every class, and the parts of the Brier score.

Errors that sum absolute or squared values are made larger by noise (`biased`): their bootstrap intervals are corrected.
Probabilities are given as logits or log-probabilities [N, C], labels as int [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..adapters.errors import OptionError
from .arrays import Array, as_numpy, check_labels, finite
from .statistics import Ece, Mean, Statistic, confidences


class AdaptiveEce(Ece):
    """ECE of the top class with bins of equal mass (Nixon et al. 2019): 0 to 1. Arguments as `Ece`.

    Bins end at the quantiles of the confidences given, and stay there in resamples; equal confidences share a bin, so
    that there may be fewer bins than asked for.
    """

    @staticmethod
    def places(confidence: np.ndarray, bins: int) -> np.ndarray:
        ordered = np.sort(confidence)
        last = np.ceil(len(ordered) * np.arange(1, bins) / bins).astype(int) - 1  # last row of each bin but the final
        return np.unique(np.searchsorted(ordered[np.maximum(last, 0)], confidence, side="left"), return_inverse=True)[1]


class SmoothEce(Statistic):
    """Calibration error without bins (smECE; Blasiok & Nakkiran, ICLR 2024): 0 to 1.

    `confidence` [N] in 0..1, `correct` [N] bool. The residuals correct - confidence are smoothed along the confidence by a
    Gaussian reflected at 0 and 1; the error is the integral of the absolute smoothed residual, at the one width that
    equals that error. Found anew for every resample; the reflected Gaussian is a multiplication in the basis of
    cosines. `grid`: points the confidences are spread to (linearly), also the least width that is told apart.
    """

    biased = True
    bias_factor: ClassVar[float] = 1 / (2 ** (1 / 3) - 1)  # the error of noise alone grows with its variance to the 1/3
    STEPS: ClassVar[int] = 10

    def __init__(self, confidence: Array, correct: Array, grid: int = 512) -> None:
        from scipy.sparse import csr_array

        c, right = confidences(confidence, correct)
        if grid < 2:
            raise OptionError(f"grid={grid} was given; expected at least 2")
        self.sizes = (len(c),)
        place = np.clip(c * grid - 0.5, 0, grid - 1)  # between the middles of the cells
        low = np.minimum(place.astype(int), grid - 2)
        share, rows = place - low, np.arange(len(c))
        gap = right - c
        values, at = np.concatenate([gap * (1 - share), gap * share]), np.concatenate([low, low + 1])
        self.spread = csr_array((values, (np.tile(rows, 2), at)), shape=(len(c), grid))
        self.decay = (np.pi * np.arange(grid)) ** 2 / 2

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self._error(counts[0], counts[0].sum(1))

    def noise(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self._error(counts[0] - 1, counts[0].sum(1))

    def _error(self, weight: np.ndarray, total: np.ndarray) -> np.ndarray:
        from scipy.fft import dct, idct

        waves = dct(np.asarray((self.spread.T @ weight.T).T), axis=1) / total[:, None]

        def smoothed(width: np.ndarray) -> np.ndarray:
            return np.abs(idct(waves * np.exp(-self.decay * width[:, None] ** 2), axis=1)).sum(1)

        # the error falls as the width grows, from the mean of the absolute residuals to that of the plain ones, so there is
        # one crossing between these two: false position, halving an end that stays twice (Illinois)
        low, high = np.abs(waves[:, 0]) / 2, np.abs(idct(waves, axis=1)).sum(1)
        above, below = smoothed(low) - low, smoothed(high) - high
        last = np.zeros(len(waves))
        for _ in range(self.STEPS):
            span = above - below
            width = np.where(span > 0, low + above / np.where(span > 0, span, 1) * (high - low), high)
            excess = smoothed(width) - width
            up = np.where(excess > 0, 1, -1)
            stays = np.where(up == last, 0.5, 1.0)
            below, above = np.where(up > 0, below * stays, excess), np.where(up > 0, excess, above * stays)
            low, high, last = np.where(up > 0, width, low), np.where(up > 0, high, width), up
        return width


class ClasswiseEce(Statistic):
    """Mean over classes of the ECE of "it is this class", equal-width bins (static calibration error; Nixon et al. 2019).

    `log_probability` [N, C], `label` int [N]; 0 to 1. Bins as in `Ece`, probability 0 in the first.
    """

    biased = True

    def __init__(self, log_probability: Array, label: Array, bins: int = 15) -> None:
        p, hot = probabilities(log_probability, label)
        self.sizes, self.classes = (len(p),), p.shape[1]
        self.gap = _binned(hot - p, _places(p, bins), bins)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.abs(_sums(self.gap, counts[0])).sum((1, 2)) / (counts[0].sum(1) * self.classes)

    def noise(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.abs(_sums(self.gap, counts[0] - 1)).sum((1, 2)) / (counts[0].sum(1) * self.classes)


class Brier(Mean):
    """Mean over images of the squared distance of the probabilities to the true class, summed over classes: 0 to 2.

    Brier (1950)'s own sum; for two classes it is twice what many libraries print.
    """

    def __init__(self, log_probability: Array, label: Array) -> None:
        super().__init__(brier_per_image(log_probability, label))


class BrierReliability(Statistic):
    """The Brier score's calibration part: squared gap of probability and frequency in each bin, summed over classes.

    Murphy's (1973) decomposition, one class against the rest at a time and summed (see `BrierParts`); 0 to 2, 0 is best.
    """

    biased = True

    def __init__(self, log_probability: Array, label: Array, bins: int = 15) -> None:
        p, hot = probabilities(log_probability, label)
        self.sizes = (len(p),)
        place = _places(p, bins)
        self.gap, self.rows = _binned(hot - p, place, bins), _binned(np.ones_like(p), place, bins)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self._squares(counts[0], counts[0])

    def noise(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self._squares(counts[0], counts[0] - 1)

    def _squares(self, counts: np.ndarray, weight: np.ndarray) -> np.ndarray:
        gap, rows = _sums(self.gap, weight), _sums(self.rows, counts)
        return _ratio(gap**2, rows).sum((1, 2)) / counts.sum(1)


class BrierParts(Statistic):
    """The Brier score and its parts: [5], in the order of `NAMES`; brier = reliability - resolution + uncertainty + within.

    Murphy (1973), one class against the rest at a time, summed over classes; probabilities in equal-width bins. resolution:
    how far the bins' frequencies are from the overall one (larger is better); uncertainty: the Brier score of always
    predicting the overall frequencies; within: what forecasts that differ within a bin add (Stephenson et al. 2008).
    Noise makes reliability and resolution larger by the same amount: percentile intervals of these two are too high.
    `BrierReliability` has a corrected one.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("brier", "reliability", "resolution", "uncertainty", "within")

    def __init__(self, log_probability: Array, label: Array, bins: int = 15) -> None:
        p, hot = probabilities(log_probability, label)
        self.sizes = (len(p),)
        place = _places(p, bins)
        self.squares = ((p - hot) ** 2).sum(1)
        self.rows, self.sure, self.hits = (_binned(x, place, bins) for x in (np.ones_like(p), p, hot))

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        weight, n = counts[0], counts[0].sum(1)
        rows, sure, hits = (_sums(x, weight) for x in (self.rows, self.sure, self.hits))
        base = hits.sum(2, keepdims=True) / n[:, None, None]
        brier = weight @ self.squares / n
        reliability = _ratio((hits - sure) ** 2, rows).sum((1, 2)) / n
        resolution = _ratio((hits - base * rows) ** 2, rows).sum((1, 2)) / n
        uncertainty = (base * (1 - base)).sum((1, 2))
        within = brier - reliability + resolution - uncertainty
        return np.stack([brier, reliability, resolution, uncertainty, within], axis=1)


def probabilities(log_probability: Array, label: Array) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and the true class as 0/1, both float64 [N, C]; logits are normalised. DataError for unusable input."""
    from scipy.special import softmax

    target = as_numpy(label)
    check_labels(as_numpy(log_probability), target)
    floored = np.maximum(as_numpy(log_probability).astype(np.float64), -1e300)  # log 0 is a probability of 0
    p = softmax(finite("log_probability", floored, 2), axis=1)
    hot = np.zeros_like(p)
    hot[np.arange(len(p)), target.astype(np.int64)] = 1
    return p, hot


def brier_per_image(log_probability: Array, label: Array) -> np.ndarray:
    """Squared distance of the probabilities [N, C] to the true class, summed over classes: float64 [N], 0 to 2."""
    p, hot = probabilities(log_probability, label)
    return ((p - hot) ** 2).sum(1)


def _places(p: np.ndarray, bins: int) -> np.ndarray:
    if bins < 1:
        raise OptionError(f"bins={bins} was given; expected at least 1")
    return Ece.places(p, bins)


def _binned(values: np.ndarray, place: np.ndarray, bins: int) -> tuple[object, int]:
    """Values [N, C] in their bins: sparse [N, C * bins], and the bins."""
    from scipy.sparse import csr_array

    rows, classes = values.shape
    at = (place + np.arange(classes) * bins).ravel()
    start = np.arange(rows + 1) * classes
    return csr_array((values.ravel(), at, start), shape=(rows, classes * bins)), bins


def _sums(binned: tuple[object, int], weight: np.ndarray) -> np.ndarray:
    """Weighted sums in each bin: weights [R, N] -> [R, C, bins]."""
    sparse, bins = binned
    return np.asarray((sparse.T @ weight.T).T).reshape(len(weight), -1, bins)  # type: ignore[attr-defined]


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
