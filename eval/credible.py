"""Credible sets in retrieval: all gallery images within the smallest cap that holds 1 - alpha of a query's posterior.

A query is a von Mises-Fisher posterior over latents, a gallery image a point or a posterior of its own. The nominal cap
is right when the posteriors are; on real data, where a true neighbour is an image of the same class, only a calibrated
set claims coverage. A set that returns everything is no success, so sizes stand beside every loss.

>>> rng = np.random.default_rng(0)
>>> gallery, label = rng.normal(size=(200, 8)), np.arange(200) % 4
>>> sets = CredibleSets(gallery, label, alpha=0.05)
>>> query, kappa, query_label = rng.normal(size=(50, 8)), np.full(50, 20.0), np.arange(50) % 4
>>> calibrated = sets.calibrate(query[:40], kappa[:40], query_label[:40], alpha=0.2)
>>> calibrated.evaluate(query[40:], kappa[40:], query_label[40:]).summary()["queries"]
10
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters.errors import DataError, OptionError
from .arrays import Array, as_numpy, finite, first_few, same_rows
from .caps import cap_cosine, check_share, concentrations, convolved_cap_cosine, resultants
from .risk_control import RiskSteps, TrueRadii, smallest_radius
from .search import directions

PAIRS = 1 << 22  # query-gallery pairs held at a time
SLACK = 1e-12  # added to every cosine, so that equal directions are at angle 0 in spite of rounding
ROUNDING = 1e-14  # of a cosine turned into an angle and back: a radius taken from a pair holds that pair


@dataclass(frozen=True)
class SetReport:
    """Losses and sizes of the sets of Q queries over a gallery of G images.

    Attributes:
        missed: share of the query's true neighbours outside its set, float64 [Q]; NaN for a query without any.
        none: 1 where none of them is inside, else 0, [Q]; NaN likewise.
        size: gallery images returned, int64 [Q]. gallery: G.
    """

    missed: np.ndarray
    none: np.ndarray
    size: np.ndarray
    gallery: int

    @property
    def with_truth(self) -> np.ndarray:
        """Which queries have a true neighbour, bool [Q]: only these count in losses; `size` counts them all."""
        return ~np.isnan(self.missed)

    def summary(self) -> dict[str, float]:
        """Means over the queries with a true neighbour; those without are counted and sized apart. NaN: no such query."""
        known = self.with_truth

        def mean(values: np.ndarray) -> float:
            return float(values.mean()) if len(values) else np.nan

        return {
            "queries": int(known.sum()),
            "coverage": 1.0 - mean(self.missed[known]),
            "missed": mean(self.missed[known]),
            "none": mean(self.none[known]),
            "size": mean(self.size[known]),
            "median_size": float(np.median(self.size[known])) if known.any() else np.nan,
            "share_of_gallery": mean(self.size[known]) / self.gallery,
            "empty": mean(self.size[known] == 0),
            "everything": mean(self.size[known] == self.gallery),
            "queries_without_truth": int((~known).sum()),
            "size_without_truth": mean(self.size[~known]),
        }


class CredibleSets:
    """Sets of gallery images within a cap round each query.

    Args:
        gallery: directions [G, D], D >= 2, of any length but 0. label: [G], what makes an image a true neighbour of the
            queries with the same label; None: no losses, only sets.
        concentration: [G] >= 0, infinity allowed, the gallery's own posteriors: each image then has its own cap,
            that of the convolution of its posterior with the query's. None: the gallery images are points.
        alpha: the nominal caps hold 1 - alpha.
        radius: the cap's angle is this many nominal ones; `calibrate` sets it. Infinity returns everything.

    Queries come as directions [Q, D] and concentrations [Q]. Raises DataError for shapes that do not fit, rows that
    are not finite or zero (named), negative concentrations, or queries that are gallery rows bit for bit (named).
    """

    def __init__(
        self,
        gallery: Array,
        label: Array | None = None,
        concentration: Array | None = None,
        *,
        alpha: float = 0.05,
        radius: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.alpha, self.radius, self.device = check_share("alpha", alpha), _factor(radius), torch.device(device)
        self.rows = _directions("the gallery", gallery)
        self.gallery = torch.from_numpy(self.rows).to(self.device)
        self.label = None if label is None else _labels(label)
        self.concentration = None if concentration is None else concentrations(concentration, 1)
        for name, values in (("label", self.label), ("concentration", self.concentration)):
            if values is not None:
                same_rows(gallery=self.rows, **{name: values})

    def members(self, query: Array, concentration: Array) -> tuple[np.ndarray, np.ndarray]:
        """Query and gallery rows of all pairs (query, image in its set), int64 [P] each, queries ascending."""
        found = [
            (cosine >= cap.to_cosine(self.radius)).nonzero().cpu().numpy() + np.array([start, 0])
            for start, cosine, cap in self._chunks(query, concentration)
        ]
        both = np.concatenate(found)
        return both[:, 0], both[:, 1]

    def true_radii(self, query: Array, concentration: Array, label: Array) -> TrueRadii:
        """How many nominal angles away each true neighbour is: 16 bytes for each pair of equal labels, all in memory.

        To look at many splits of the same queries; `calibrate` keeps no pairs.
        """
        found = list(self._true_radii(query, concentration, label))
        radii, queries = (np.concatenate([part[k] for part in found]) for k in (0, 1))
        return TrueRadii(radii, queries, len(as_numpy(query)))

    def _true_radii(self, query: Array, concentration: Array, label: Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Radii and query rows of the pairs of equal labels, a chunk of queries at a time."""
        own = self._query_labels(query, label)
        for start, cosine, cap in self._chunks(query, concentration):
            row, column = (own[start : start + len(cosine), None] == self.label).nonzero()
            pick = torch.from_numpy(row).to(self.device), torch.from_numpy(column).to(self.device)
            yield cap.to_radius(cosine[pick], *pick).cpu().numpy(), row + start

    def calibrate(
        self,
        query: Array,
        concentration: Array,
        label: Array,
        *,
        alpha: float = 0.1,
        mode: str = "conformal",
        delta: float = 0.1,
        loss: str = "missed",
    ) -> CredibleSets:
        """The same sets with the radius that keeps the loss at alpha; see `risk_control.calibrated_radius`.

        The queries are calibration queries, not those that are evaluated later. Radii lie on a grid (`RiskSteps`), so that
        memory does not grow with the pairs. Raises as `calibrated_radius`.
        """
        losses = RiskSteps(loss)
        for radius, rows in self._true_radii(query, concentration, label):
            losses.add(radius, rows)
        if not losses.queries:
            raise DataError(
                f"none of the {len(as_numpy(query))} calibration queries has a true neighbour: nothing to calibrate on"
            )
        found = smallest_radius(*losses.steps(), losses.queries, alpha=alpha, mode=mode, delta=delta)
        return self.with_radius(found)

    def with_radius(self, radius: float) -> CredibleSets:
        """The same sets at another radius."""
        other = copy.copy(self)  # rows normalised twice differ from a query's by rounding, and would not be found equal
        other.radius = _factor(radius)
        return other

    def evaluate(self, query: Array, concentration: Array, label: Array) -> SetReport:
        """Losses and sizes of the queries' sets."""
        own = self._query_labels(query, label)
        inside, size, truth = (np.zeros(len(own), np.int64) for _ in range(3))
        for start, cosine, cap in self._chunks(query, concentration):
            member = cosine >= cap.to_cosine(self.radius)
            rows = slice(start, start + len(member))
            true = torch.from_numpy(own[rows, None] == self.label).to(self.device)
            for total, counted in ((size, member), (inside, member & true), (truth, true)):
                total[rows] = counted.sum(1).cpu().numpy()
        known = truth > 0
        missed = np.where(known, 1.0 - inside / np.maximum(truth, 1), np.nan)
        return SetReport(missed, np.where(known, inside == 0, np.nan), size, len(self.rows))

    def _query_labels(self, query: Array, label: Array) -> np.ndarray:
        if self.label is None:
            raise DataError("these sets know no gallery labels: give label=[G] to CredibleSets")
        own = _labels(label)
        same_rows(query=as_numpy(query), label=own)
        return own

    def _chunks(self, query: Array, concentration: Array) -> Iterator[tuple[int, Tensor, _Caps]]:
        """First row, cosines [q, G] and caps of consecutive queries."""
        rows, kappa = _directions("the queries", query), concentrations(concentration, 1)
        same_rows(query=rows, concentration=kappa)
        if rows.shape[1] != (dim := self.rows.shape[1]):
            raise DataError(f"the queries have {rows.shape[1]} dimensions and the gallery {dim}")
        _refuse_overlap(rows, self.rows)
        own = None if self.concentration is None else resultants(self.concentration, dim).to(self.device)
        step = max(1, PAIRS // len(self.rows))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            cosine = torch.from_numpy(rows[part]).to(self.device) @ self.gallery.T + SLACK
            if own is None:
                angle = torch.from_numpy(np.arccos(cap_cosine(kappa[part], dim, self.alpha)))[:, None].to(self.device)
            else:
                both = resultants(kappa[part], dim).to(self.device)[:, None] * own
                angle = torch.arccos(convolved_cap_cosine(both, dim, self.alpha))
            yield start, cosine, _Caps(angle)


@dataclass(frozen=True)
class _Caps:
    """Nominal angles in radians [q, G], or [q, 1] where all gallery images share one."""

    angle: Tensor

    def to_cosine(self, radius: float) -> Tensor:
        """The cosine that bounds the set at a radius."""
        angle = (self.angle * radius).nan_to_num(torch.pi).clamp(max=torch.pi)  # an infinite radius holds everything
        return torch.cos(angle) - ROUNDING

    def to_radius(self, cosine: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The radius [P] at which the pairs of cosines [P] enter."""
        away = torch.arccos(cosine.clamp(-1.0, 1.0))
        nominal = self.angle[row, column] if self.angle.shape[1] > 1 else self.angle[row, 0]
        return torch.where(away > 0.0, away / nominal, 0.0)


def _directions(name: str, values: Array) -> np.ndarray:
    """Rows of length 1, float64 [N, D]; DataError for a shape, a number or a row (of length 0) that is not one."""
    rows = finite(name, values, 2)
    if rows.shape[1] < 2:
        raise DataError(f"{name} must be directions [N, D >= 2]; these are of shape {rows.shape}")
    return directions(name, rows)


def _factor(radius: float) -> float:
    if not radius >= 0.0:
        raise OptionError(f"radius={radius} was given; expected a factor of at least 0")
    return float(radius)


def _labels(values: Array) -> np.ndarray:
    label = as_numpy(values)
    if label.ndim != 1:
        raise DataError(f"labels of shape {label.shape} were given; expected one for each row")
    return label


def _refuse_overlap(query: np.ndarray, gallery: np.ndarray) -> None:
    """Raises DataError for queries that are gallery rows bit for bit; rows are compared by hash, then in full."""
    factor = np.random.default_rng(0).integers(0, 1 << 63, query.shape[1], dtype=np.uint64) * 2 + 1
    keys = [(np.ascontiguousarray(rows).view(np.uint64) * factor).sum(1) for rows in (query, gallery)]
    suspects = np.flatnonzero(np.isin(keys[0], keys[1]))
    if not len(suspects):
        return
    known = {row.tobytes() for row in gallery[np.isin(keys[1], keys[0])]}
    found = [int(q) for q in suspects if query[q].tobytes() in known]
    if found:
        rows = first_few(found)
        raise DataError(
            f"{len(found)} queries are gallery rows bit for bit (rows {rows}): "
            "the gallery may hold no calibration or test query"
        )
