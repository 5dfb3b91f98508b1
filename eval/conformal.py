"""Conformal classification: sets of classes that hold the true one with a chosen probability, coverage beside their size.

    posthoc eval conformal --data test.npz --held-out calibration.npz --alpha 0.1

Thresholds come from the held-out rows alone; the promise is for images like those. A set of every class is no success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..adapters.errors import DataError
from .bootstrap import Interval
from .command import TableCommand, run_command
from .conformal_sets import ClassSetReport, fit_conformal, set_report
from .inputs import Scored, open_model, overlap, read
from .retrieval_statistics import KnownMeans
from .statistics import Statistic
from .table import Cell, Table, fill

REFERENCE = "LAC"
NAMES = ("coverage", "size", "single", "empty")
WORST = "worst_class_coverage: the interval is from exact bounds of every class at once, and is conservative"
RULES: Mapping[str, dict] = {
    "LAC": {"method": "lac"},
    "APS": {"method": "aps"},
    "APS, randomised": {"method": "aps", "randomised": True},
    "RAPS": {"method": "raps"},
    "RAPS, randomised": {"method": "raps", "randomised": True},
}


class ClassCoverage(Statistic):
    """Coverage of the worst class and its mean over classes, [2]: `covered` bool [N], `label` int [N], rows of each class.

    A class that a resample has no row of does not count there. The worst of many classes is low by chance alone.
    """

    def __init__(self, covered: np.ndarray, label: np.ndarray) -> None:
        _, place = np.unique(label, return_inverse=True)
        self.rows = np.eye(place.max() + 1)[place]
        self.covered = self.rows * np.asarray(covered, bool)[:, None]
        self.sizes = (len(place),)

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        rows = counts[0] @ self.rows
        share = np.divide(counts[0] @ self.covered, rows, out=np.full_like(rows, np.nan), where=rows > 0)
        return np.stack([np.nanmin(share, 1), np.nanmean(share, 1)], 1)


def worst_class_interval(covered: np.ndarray, label: np.ndarray, level: float = 0.95) -> Interval:
    """The worst class's coverage and an exact interval of the least true one: `covered` bool [N], `label` int [N].

    From Clopper and Pearson's (1934) bounds of every class. Low: the least of the lower bounds, which is above the truth only
    where the worst class's own bound is. High: the least of the upper bounds, each at (1 - level) / 2 over the number of
    classes (Bonferroni), for any of them may be the least by chance. Conservative; classes without a row say nothing. A
    bootstrap of a minimum is too low: ten classes of coverage .9 and 2,000 rows, and it holds .9 in 1 % of the sets.
    """
    from scipy.stats import beta

    place = np.unique(label, return_inverse=True)[1]
    rows = np.bincount(place)
    hits = np.bincount(place, weights=np.asarray(covered, bool))
    miss = (1 - level) / 2
    low = np.where(hits > 0, beta.ppf(miss, np.maximum(hits, 1), rows - hits + 1), 0.0)
    high = np.where(hits < rows, beta.ppf(1 - miss / len(rows), hits + 1, np.maximum(rows - hits, 1)), 1.0)
    return Interval(float((hits / rows).min()), float(low.min()), float(high.min()))


def conformal_table(
    reports: Mapping[str, ClassSetReport],
    *,
    name: str = "conformal sets",
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """Coverage, mean size, shares of sets of one class and of none, and coverage by class, of rules by name.

    Nothing is marked: a coverage is not better for being higher. The worst class's interval is `worst_class_interval`'s, and
    its differences have none. Raises DataError for reports of different rows.
    """
    cells = fill(
        {
            key: KnownMeans(np.stack([one.covered, one.size, one.size == 1, one.size == 0], 1).astype(float))
            for key, one in reports.items()
        },
        NAMES, (), reference, resamples, seed,
    )  # fmt: skip
    made = {key: ClassCoverage(one.covered, one.label) for key, one in reports.items()}
    by_class = ("worst_class_coverage", "mean_class_coverage")
    for key, row in fill(made, by_class, (), reference, resamples, seed).items():
        cells[key].update(row)
        worst = worst_class_interval(reports[key].covered, reports[key].label)
        cells[key]["worst_class_coverage"] = Cell(worst)
    plain = {key: {m: replace(c, better=False) for m, c in row.items()} for key, row in cells.items()}
    about = {"set": name, "rows": next(iter(made.values())).sizes[0], "reference": reference, "seed": seed}
    return Table(name, (*NAMES, *by_class), plain, (WORST,), about)


def fit_rules(
    kept: Scored, one: Scored, *, alpha: float = 0.1, seed: int = 0
) -> tuple[dict[str, ClassSetReport], list[str]]:
    """Every rule of `RULES`, calibrated on all rows and within each class, reported on another set; notes.

    Class-conditional rules are left out, and noted, where a class has too few calibration rows. Both sets need logits of the
    same classes, and labels. Raises as `fit_conformal` and `set_report`.
    """
    reports: dict[str, ClassSetReport] = {}
    notes: list[str] = []
    for conditional in (False, True):
        for name, rule in RULES.items():
            streams = (np.random.default_rng([seed, part]) for part in (0, 1))
            calibrating, judging = streams
            try:
                fitted = fit_conformal(
                    kept.logits, kept.label, alpha=alpha, class_conditional=conditional, generator=calibrating, **rule
                )
            except DataError as error:
                if not conditional:
                    raise
                notes.append(f"no class-conditional sets: {error}")
                return reports, notes
            sets = fitted.sets(one.logits, generator=judging)
            reports[f"{name}, by class" if conditional else name] = set_report(sets, one.label)
    return reports, notes


@dataclass
class Conformal(TableCommand):
    """Sets of classes with a promised coverage: LAC, APS and RAPS, for all classes together and for each class.

    Example: posthoc eval conformal --data test.npz --held-out calibration.npz"""

    data: str
    """labelled images with logits: score file (.npz), stored features, or images with --model"""
    held_out: str
    """labelled images the classifier was not fitted on: the thresholds come from them"""
    model: str | None = None
    """adapter folder or timm name, for images"""
    alpha: float = 0.1
    """share of images whose true class may be missing from their set"""
    reference: str = REFERENCE
    """rule that paired differences are taken from"""

    def run(self) -> None:
        model = open_model(self.model, self.checkpoint, self.device)
        one, kept = (read(place, model, self.split) for place in (self.data, self.held_out))
        for each in (one, kept):
            each.need("label", "logits")
        shared, _ = overlap(one, kept)
        if shared:
            raise DataError(
                f"{len(shared)} images of {one.name} are also in {kept.name} (first: row {shared[0]}): sets would be judged "
                "on the rows they were calibrated on"
            )
        reports, notes = fit_rules(kept, one, alpha=self.alpha, seed=self.seed)
        table = conformal_table(
            reports,
            name=f"{one.name}: conformal sets",
            reference=self.reference,
            resamples=self.resamples,
            seed=self.seed,
        )
        promise = (
            f"{one.rows} images; thresholds from {kept.rows} rows of {kept.name}: coverage at least {1 - self.alpha:.3g}, on "
            "average over calibration sets (by class: within each class)"
        )
        ranked = (
            "RAPS: 0.01 for each rank beyond the fifth; randomised: the true class is counted in part, which is drawn"
        )
        self.show([replace(table, notes=(promise, ranked, *table.notes, *notes))])


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval conformal`."""
    run_command(Conformal, "posthoc eval conformal", arguments)


if __name__ == "__main__":
    main()
