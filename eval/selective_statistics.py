"""Selective prediction beyond `statistics.Aurc`: how far from the best order, risk over all images, accuracy kept.

One stratum: `uncertainty` [N] and whether the prediction is wrong (or correct), bool [N]. Ties are treated as every order
of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..adapters.errors import OptionError
from .arrays import Array, finite, same_rows, truth
from .statistics import Aurc, Kept, Pairs, SelectiveAccuracy, Statistic


class ExcessAurc(Aurc):
    """AURC less that of the best order, which puts every mistake last (E-AURC; Geifman et al. 2019): 0 to 1.

    The best order's area is exact for the number of images, not the limit r + (1 - r) log(1 - r). Unlike AURC it does not
    reward a more accurate classifier for being accurate.
    """

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        _, errors = self.kept(counts[0])
        n, wrong = counts[0].sum(1).astype(int), errors.sum(1).astype(int)
        harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n.max() + 1))])
        best = (wrong - (n - wrong) * (harmonic[n] - harmonic[n - wrong])) / n
        return super().__call__(counts) - best


class Augrc(Statistic):
    """Area under the generalised risk-coverage curve (Traub et al. 2024): 0 to 1/2, lower is better.

    The generalised risk at a coverage is the share of ALL images that are accepted and wrong, so that a mistake weighs the
    same wherever it is accepted. Equals (1 - AUROC of the mistakes) a (1 - a) + (1 - a)^2 / 2 for an accuracy a.
    """

    def __init__(self, uncertainty: Array, wrong: Array) -> None:
        self.kept = Kept(uncertainty, wrong)
        self.sizes = (len(self.kept.order),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        weight, errors = self.kept(counts[0])
        accepted = errors.cumsum(1) - errors / 2  # mean over the group of the mistakes accepted so far
        return np.einsum("rg,rg->r", weight, accepted) / counts[0].sum(1) ** 2


class AccuracyAtCoverage(SelectiveAccuracy):
    """Accuracy of the most certain images at each share kept: [K]. `coverage` [K] in 0 < share <= 1.

    `uncertainty` [N], `correct` [N] bool. Ties and shares between two images as in `SelectiveAccuracy`.
    """

    def __init__(self, uncertainty: Array, correct: Array, coverage: Array) -> None:
        share = finite("coverage", np.atleast_1d(coverage))
        if share.min() <= 0 or share.max() > 1:
            raise OptionError(f"coverage must lie above 0 and not above 1; it lies in {share.min():g}..{share.max():g}")
        super().__init__(uncertainty, correct, 1 - share)


class FailureAuroc(Statistic):
    """Chance that a mistake is less certain than a right answer, ties half: 0 to 1.

    `uncertainty` [N], `wrong` [N] bool. One stratum, unlike `Auroc`: how many mistakes there are is resampled as well. NaN
    where all are right or all wrong. With `wrong` = "the nearest neighbour has another class" it is R-AUROC (Kirchhof et
    al. 2023).
    """

    def __init__(self, uncertainty: Array, wrong: Array) -> None:
        u, self.wrong = finite("uncertainty", uncertainty), truth("wrong", wrong)
        same_rows(uncertainty=u, wrong=self.wrong)
        self.sizes = (len(u),)
        self.pairs = Pairs(u[~self.wrong], u[self.wrong])

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self.pairs(counts[0][:, ~self.wrong], counts[0][:, self.wrong])
