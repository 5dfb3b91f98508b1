"""Reliability diagrams: accuracy against confidence in bins, with the interval each bin's rows allow, and their picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array
from .bootstrap import Interval
from .plots import FAINT, Look
from .statistics import Ece

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Reliability:
    """Bins that hold at least one image: mean confidence [K], accuracy with its interval [K], images [K]."""

    confidence: np.ndarray
    accuracy: list[Interval]
    rows: np.ndarray


def reliability(confidence: Array, correct: Array, bins: int = 15, level: float = 0.95) -> Reliability:
    """The bins of `statistics.Ece`: confidence [N] in 0..1, correct bool [N]; intervals by Wilson (1927).

    Each gap times its share of the rows sums to the ECE. Raises as `Ece`.
    """
    ece = Ece(confidence, correct, bins)
    c, right = np.asarray(ece.confidence), np.asarray(ece.correct)
    place = Ece.places(c, bins)
    rows = np.bincount(place, minlength=bins)
    kept = rows > 0
    n = rows[kept]
    mean = np.bincount(place, weights=c, minlength=bins)[kept] / n
    hits = np.bincount(place, weights=right, minlength=bins)[kept]
    low, high = wilson(hits, n, level)
    rate = hits / n
    return Reliability(mean, [Interval(*map(float, one)) for one in zip(rate, low, high, strict=True)], n)


def wilson(hits: np.ndarray, rows: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a share, [K] each."""
    from scipy.special import ndtri

    z = float(ndtri(0.5 + level / 2))
    share = hits / rows
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2)) / (1 + z**2 / rows)
    return np.minimum(middle - half, share).clip(min=0), np.maximum(middle + half, share).clip(max=1)


def diagram(axis: Axes, values: Mapping[str, Reliability], look: Mapping[str, Look], *, title: str) -> None:
    """One line for each name with the interval of every bin; above the diagonal: less confident than right."""
    axis.plot([0, 1], [0, 1], color=FAINT, linewidth=1.5, zorder=1)
    for name, one in values.items():
        style, y = look[name], np.array([a.value for a in one.accuracy])
        below, above = y - [a.low for a in one.accuracy], np.array([a.high for a in one.accuracy]) - y
        axis.errorbar(
            one.confidence, y, yerr=np.stack([below, above]), color=style.colour, linestyle=style.dash, label=name,
            marker=style.marker, elinewidth=0.9,
        )  # fmt: skip
    axis.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
