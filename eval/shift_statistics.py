"""Statistics of images seen in many views, all of them resampled together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..adapters.errors import DataError
from .arrays import Array, finite
from .statistics import Ece, Statistic


class Means(Statistic):
    """The mean over images of each column of `values` [N, V]: V values."""

    def __init__(self, values: Array) -> None:
        self.values = finite("values", values, 2)
        self.sizes = (len(self.values),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return counts[0] @ self.values / counts[0].sum(1, keepdims=True)


class Joined(Statistic):
    """Several statistics of one value each on the same rows, as one of V values."""

    def __init__(self, parts: Sequence[Statistic]) -> None:
        if len({part.sizes for part in parts}) != 1:
            raise DataError("statistics of the same rows are expected, at least one")
        self.parts, self.sizes = list(parts), parts[0].sizes

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([part(counts) for part in self.parts], axis=-1)


class AveragedEce(Statistic):
    """The mean of several ECEs of the same images, one for each kind of view; biased as each of them is."""

    biased = True

    def __init__(self, parts: Sequence[Ece]) -> None:
        self.parts, self.sizes = list(parts), parts[0].sizes

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean([part(counts) for part in self.parts], axis=0)

    def noise(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean([part.noise(counts) for part in self.parts], axis=0)
