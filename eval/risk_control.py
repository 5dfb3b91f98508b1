"""How large a nested set must be for its loss to stay small: conformal risk control, and a bound with confidence.

Every true answer of a query has a radius, the smallest at which the query's set holds it. A query's loss is in [0, 1]
and falls as the radius grows; the calibrated radius is the smallest whose risk on calibration queries is low enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..adapters.errors import DataError, OptionError
from .arrays import as_numpy

LOSSES = ("missed", "none")
MODES = ("conformal", "pac")
_GRID_SHIFT = 36  # of a float64's bits, whose order is that of the numbers: 16 of the 52 after the leading one stay
_GRID_FIRST, _GRID_LAST = (int(np.float64(2.0**p).view(np.int64)) >> _GRID_SHIFT for p in (-20, 20))


@dataclass(frozen=True)
class TrueRadii:
    """At which radius each true answer enters the set of its query.

    Attributes:
        radius: float64 [P] >= 0, may be infinite (only the set of everything holds it).
        query: int64 [P], 0 to queries - 1, whose answer it is, in any order.
        queries: Q, all queries, those without a true answer too: they are left out of every risk.
    """

    radius: np.ndarray
    query: np.ndarray
    queries: int

    def __post_init__(self) -> None:
        radius, query = as_numpy(self.radius), as_numpy(self.query)
        if radius.ndim != 1 or query.shape != radius.shape or query.dtype.kind not in "iu":
            raise DataError(f"radius [P] and whole numbers query [P] are expected; given {radius.shape}, {query.shape}")
        if len(query) and (query.min() < 0 or query.max() >= self.queries):
            raise DataError(f"query goes from {query.min()} to {query.max()}; there are {self.queries} queries")
        if np.isnan(radius).any() or (radius < 0).any():
            bad = np.flatnonzero(~(radius >= 0))
            raise DataError(f"a radius is at least 0; {len(bad)} are negative or NaN (first: row {bad[0]})")
        object.__setattr__(self, "radius", radius.astype(np.float64))
        object.__setattr__(self, "query", query.astype(np.int64))

    @property
    def counts(self) -> np.ndarray:
        """True answers of each query, int64 [Q]."""
        return np.bincount(self.query, minlength=self.queries)

    def take(self, queries: np.ndarray) -> TrueRadii:
        """Those of some queries, int [K] without repeats, numbered anew in the order given."""
        place = np.full(self.queries, -1)
        place[queries] = np.arange(len(queries))
        kept = place[self.query] >= 0
        return TrueRadii(self.radius[kept], place[self.query[kept]], len(queries))

    def losses(self, radius: float, loss: str = "missed") -> np.ndarray:
        """Each query's loss at a radius, float64 [Q] in [0, 1]; NaN for a query without a true answer.

        `missed`: share of its true answers outside the set. `none`: 1 if all of them are, else 0.
        """
        _known("loss", loss, LOSSES)
        counts = self.counts
        inside = np.bincount(self.query[self.radius <= radius], minlength=self.queries)
        value = 1.0 - inside / np.maximum(counts, 1) if loss == "missed" else (inside == 0).astype(np.float64)
        return np.where(counts > 0, value, np.nan)

    def risk_steps(self, loss: str = "missed") -> tuple[np.ndarray, np.ndarray]:
        """Radii at which the mean loss falls, ascending [K], and the mean loss from there on, [K] down to 0."""
        _known("loss", loss, LOSSES)
        counts = self.counts
        with_truth = int((counts > 0).sum())
        if loss == "missed":
            radius, weight = self.radius, 1.0 / counts[self.query]
        else:  # only the nearest true answer counts
            first = np.full(self.queries, np.inf)
            np.minimum.at(first, self.query, self.radius)
            radius, weight = first[counts > 0], np.ones(with_truth)
        steps, place = np.unique(radius, return_inverse=True)
        gained = np.bincount(place, weights=weight, minlength=len(steps)).cumsum()
        return steps, np.clip(1.0 - gained / with_truth, 0.0, 1.0)


def calibrated_radius(
    truth: TrueRadii, *, alpha: float = 0.1, mode: str = "conformal", delta: float = 0.1, loss: str = "missed"
) -> float:
    """Smallest radius that keeps the loss of new queries at alpha; infinity when only the set of everything does.

    Args:
        truth: of the calibration queries; those without a true answer take no part.
        alpha: in (0, 1), of the loss.
        mode: `conformal`, the loss expected over calibration and new queries is at most alpha (Angelopoulos et al.,
            Conformal Risk Control, ICLR 2024: (n R + 1) / (n + 1) <= alpha); or `pac`, with probability 1 - delta over
            calibration queries the loss of new ones is (Bates et al., JACM 2021, with the Hoeffding-Bentkus bound).
        loss: see `TrueRadii.losses`.

    Both hold when calibration and new queries with a true answer are exchangeable (`pac`: independent), whatever the
    radii mean. Raises DataError when no query has a true answer, OptionError for numbers or names out of range.
    """
    n = int((truth.counts > 0).sum())
    if not n:
        raise DataError(f"none of the {truth.queries} calibration queries has a true answer: nothing to calibrate on")
    return smallest_radius(*truth.risk_steps(loss), n, alpha=alpha, mode=mode, delta=delta)


def smallest_radius(
    steps: np.ndarray, risk: np.ndarray, n: int, *, alpha: float = 0.1, mode: str = "conformal", delta: float = 0.1
) -> float:
    """`calibrated_radius` from the radii [K], ascending, and mean losses [K] there of n queries with a true answer."""
    _known("mode", mode, MODES)
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0.0 < value < 1.0:
            raise OptionError(f"{name}={value} was given; expected a number between 0 and 1, such as 0.1")
    if mode == "conformal":
        low_enough = n * risk + 1.0 <= alpha * (n + 1) + 1e-9
    else:
        low_enough = hoeffding_bentkus(risk, n, alpha) <= delta
    return float(steps[low_enough.argmax()]) if low_enough.any() else np.inf


class RiskSteps:
    """Mean losses of any number of queries, a chunk at a time, in memory that does not grow: radii on a grid.

    A radius is rounded up to the next of 2^16 steps between two powers of two, at least 2^-20, and above 2^20 to
    infinity. A grid chosen in advance takes nothing from the promises of `smallest_radius`; its answer is at most
    1.00002 times that of all radii.
    """

    def __init__(self, loss: str = "missed") -> None:
        _known("loss", loss, LOSSES)
        self.loss, self.queries = loss, 0
        self.gained = np.zeros(_GRID_LAST - _GRID_FIRST + 2)

    def add(self, radius: np.ndarray, query: np.ndarray) -> None:
        """All true answers of some queries: their radii [P] >= 0 and whose they are, int [P] under any numbers."""
        if not len(radius):
            return
        _, place, counts = np.unique(query, return_inverse=True, return_counts=True)
        self.queries += len(counts)
        weight = 1.0 / counts[place]
        if self.loss == "none":  # only the nearest true answer counts
            first = np.full(len(counts), np.inf)
            np.minimum.at(first, place, radius)
            radius, weight = first, np.ones(len(counts))
        bits = np.ascontiguousarray(radius, dtype=np.float64).view(np.int64)
        cell = (((bits + (1 << _GRID_SHIFT) - 1) >> _GRID_SHIFT).clip(_GRID_FIRST, _GRID_LAST + 1)) - _GRID_FIRST
        cells, place = np.unique(cell, return_inverse=True)
        self.gained[cells] += np.bincount(place, weights=weight)

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Radii at which the mean loss falls, ascending [K], and the mean loss from there on, [K] down to 0."""
        cells = np.flatnonzero(self.gained)
        radius = ((cells + _GRID_FIRST) << _GRID_SHIFT).view(np.float64)
        radius = np.where(cells + _GRID_FIRST > _GRID_LAST, np.inf, radius)
        gained = self.gained[cells].cumsum()
        return radius, np.clip(1.0 - gained / max(1, self.queries), 0.0, 1.0)


def hoeffding_bentkus(risk: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """P-values [...] of "the true risk is above alpha" from mean losses [...] of n independent queries, in [0, 1].

    The smaller of Hoeffding's exp(-n kl(risk, alpha)) and Bentkus's e P(Binomial(n, alpha) <= ceil(n risk)).
    """
    from scipy.special import rel_entr
    from scipy.stats import binom

    r = np.minimum(np.asarray(risk, dtype=np.float64), alpha)
    hoeffding = np.exp(-n * (rel_entr(r, alpha) + rel_entr(1.0 - r, 1.0 - alpha)))
    bentkus = np.e * binom.cdf(
        np.ceil(n * np.asarray(risk) - 1e-9), n, alpha
    )  # n risk may be a hair off a whole number
    return np.minimum(np.minimum(hoeffding, bentkus), 1.0)


def _known(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise OptionError(f"{name}={given!r} was given; expected one of {', '.join(map(repr, allowed))}")
