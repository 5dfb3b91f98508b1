"""Telling unseen data from seen, and both from mistakes: what the OOD tables count, ready for the bootstrap.

Two strata everywhere: the uncertainty of ID images [N] and of OOD images [M], resampled separately. Higher uncertainty
means OOD; an image is flagged when its uncertainty is at or above a threshold, and accepted when it is at or below one, so
that equal scores are never told apart. The shares found at a threshold and the average precisions depend on ties only
through that rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from ..adapters.errors import OptionError
from .arrays import Array, finite, same_rows, truth
from .statistics import Aurc, Pairs, Statistic

SLACK = 1e-9
"""What may be missing of an image when a share such as 95 % is turned into a number of images."""


class Merged(Statistic):
    """Base of the statistics that walk through the distinct scores of both sets together, from certain to uncertain."""

    def __init__(self, id_uncertainty: Array, ood_uncertainty: Array) -> None:
        inside = finite("the ID uncertainty", id_uncertainty)
        outside = finite("the OOD uncertainty", ood_uncertainty)
        self.sizes = (len(inside), len(outside))
        scores = np.concatenate([inside, outside])
        self.order = np.argsort(scores, kind="stable")
        self.starts = np.flatnonzero(np.diff(scores[self.order], prepend=-np.inf))
        self.from_ood = self.order >= len(inside)

    def groups(self, counts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Counts of both strata -> ID and OOD images with each distinct score, ascending: [R, G] each."""
        ordered = np.concatenate(counts, axis=1)[:, self.order]
        every = np.add.reduceat(ordered, self.starts, axis=1)
        outside = np.add.reduceat(ordered * self.from_ood, self.starts, axis=1)
        return every - outside, outside


class AveragePrecision(Merged):
    """Area under the precision-recall curve by steps (scikit-learn's average precision, no trapezoids): 0 to 1.

    `positive` "ood" (AUPR-out): precision among the images of highest uncertainty. "id" (AUPR-in): among those of lowest.
    Chance is `ratio`, the share of positive images, which has to stand beside it: a larger OOD set raises AUPR-out.
    """

    def __init__(self, id_uncertainty: Array, ood_uncertainty: Array, positive: Literal["ood", "id"] = "ood") -> None:
        super().__init__(id_uncertainty, ood_uncertainty)
        if positive not in ("ood", "id"):
            raise OptionError(f"positive={positive!r} was given; expected 'ood' or 'id'")
        self.positive = positive
        self.ratio = self.sizes[positive == "ood"] / sum(self.sizes)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        inside, outside = self.groups(counts)
        if self.positive == "ood":
            return average_precision(outside[:, ::-1], inside[:, ::-1])
        return average_precision(inside, outside)


class Fpr95(Merged):
    """Share of ID images flagged when the threshold is the highest that flags at least 95 % of the OOD images: 0 to 1.

    OOD is the positive class (95 % true positives); its twin with the roles exchanged is `OodAcceptedAt95Id`.
    """

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        inside, outside = self.groups(counts)
        return share_at(outside[:, ::-1], inside[:, ::-1])


class OodAcceptedAt95Id(Merged):
    """Share of OOD images accepted when the threshold is the lowest that accepts at least 95 % of the ID images: 0 to 1.

    Much of the literature calls this number FPR95 too (ID as the positive class); here it has its own name.
    """

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        inside, outside = self.groups(counts)
        return share_at(inside, outside)


class OodMetrics(Merged):
    """All of `NAMES` in one walk: [K]. What a table counts, as fast as one of them alone."""

    NAMES: ClassVar[tuple[str, ...]] = ("auroc", "aupr_out", "aupr_in", "fpr95", "ood_accepted_at_95_id")

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        inside, outside = self.groups(counts)
        below = inside.cumsum(1) - inside / 2  # `Auroc`, from the groups that are there already
        area = np.einsum("rg,rg->r", below, outside) / (inside.sum(1) * outside.sum(1))
        down = outside[:, ::-1], inside[:, ::-1]
        return np.stack(
            [
                area,
                average_precision(*down),
                average_precision(inside, outside),
                share_at(*down),
                share_at(inside, outside),
            ],
            axis=1,
        )


class ScodAuroc(Statistic):
    """Chance that an image to be rejected is less certain than one to be kept, ties half: 0 to 1.

    Selective classification with OOD data (SCOD; Xia & Bouganis 2022): kept should be the ID images the classifier gets
    right, rejected its mistakes (`wrong`, bool [N]) and all OOD images together. How many of the rejected are OOD is
    `ratio`, to be printed beside it. NaN for a resample without a right answer.
    """

    def __init__(self, id_uncertainty: Array, wrong: Array, ood_uncertainty: Array) -> None:
        mistakes = truth("wrong", wrong)
        inside, outside = finite("the ID uncertainty", id_uncertainty), finite("the OOD uncertainty", ood_uncertainty)
        same_rows(id_uncertainty=inside, wrong=mistakes)
        self.sizes = (len(inside), len(outside))
        self.ratio = len(outside) / (len(outside) + int(mistakes.sum()))
        self.wrong = mistakes
        self.pairs = Pairs(inside[~mistakes], np.concatenate([inside[mistakes], outside]))

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        inside, outside = counts
        return self.pairs(inside[:, ~self.wrong], np.concatenate([inside[:, self.wrong], outside], axis=1))


class ScodAurc(Statistic):
    """Area under the risk-coverage curve of ID and OOD images together, where accepting an OOD image is a mistake: 0 to 1.

    As `Aurc` otherwise. It depends on the share of OOD images, `ratio`, to be printed beside it.
    """

    def __init__(self, id_uncertainty: Array, wrong: Array, ood_uncertainty: Array) -> None:
        mistakes = truth("wrong", wrong)
        inside, outside = finite("the ID uncertainty", id_uncertainty), finite("the OOD uncertainty", ood_uncertainty)
        same_rows(id_uncertainty=inside, wrong=mistakes)
        self.sizes = (len(inside), len(outside))
        self.ratio = len(outside) / sum(self.sizes)
        self.area = Aurc(np.concatenate([inside, outside]), np.concatenate([mistakes, np.ones(len(outside), bool)]))

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self.area([np.concatenate(counts, axis=1)])


def average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Sum over thresholds of precision times the step in recall: [R]. Images of each score [R, G], best first."""
    hits, flagged = positive.cumsum(1), (positive + negative).cumsum(1)
    precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
    return np.einsum("rg,rg->r", precision, positive) / hits[:, -1]


def share_at(wanted: np.ndarray, other: np.ndarray, share: float = 0.95) -> np.ndarray:
    """Share of the other images that come along when at least `share` of the wanted are taken: [R]; best score first."""
    taken = wanted.cumsum(1)
    place = (taken >= share * taken[:, -1:] - SLACK).argmax(1)[:, None]
    return np.take_along_axis(other.cumsum(1), place, 1)[:, 0] / other.sum(1)
