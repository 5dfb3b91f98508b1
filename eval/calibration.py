"""Calibration of probabilities, as they are and after temperature, vector and isotonic scaling, with intervals.

posthoc eval calibration --data test.npz --held-out validation.npz
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.errors import DataError, OptionError
from .bootstrap import bootstrap, bootstrap_difference
from .calibration_statistics import AdaptiveEce, Brier, BrierParts, BrierReliability, ClasswiseEce, SmoothEce
from .command import TableCommand, run_command
from .inputs import open_model, overlap, read
from .metrics import confidence_and_correct, nll_per_image
from .scaling import scaled
from .statistics import Ece, Mean, Statistic
from .table import Cell, Table, cell

NAMES = ("accuracy", "nll", "brier", "reliability", "ece", "adaptive_ece", "smooth_ece", "classwise_ece")
LOWER = NAMES[1:]
MOST_BINS = 1000
"""More hold few images each, or none, and their errors are noise."""


def statistics(log_probability: np.ndarray, label: np.ndarray, bins: int = 15) -> dict[str, Statistic]:
    """The statistics of `NAMES` for logits or log-probabilities [N, C] and labels int [N]."""
    confidence, correct = confidence_and_correct(log_probability, label)
    return {
        "accuracy": Mean(correct),
        "nll": Mean(nll_per_image(log_probability, label)),
        "brier": Brier(log_probability, label),
        "reliability": BrierReliability(log_probability, label, bins),
        "ece": Ece(confidence, correct, bins),
        "adaptive_ece": AdaptiveEce(confidence, correct, bins),
        "smooth_ece": SmoothEce(confidence, correct),
        "classwise_ece": ClasswiseEce(log_probability, label, bins),
    }


def calibration_table(
    log_probability: Mapping[str, np.ndarray],
    label: np.ndarray,
    *,
    name: str = "calibration",
    reference: str | None = "softmax",
    bins: int = 15,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """Every metric of `NAMES` for logits or log-probabilities [N, C] by name, labels int [N].

    Differences are paired; those of biased errors are the wide ones of `bootstrap_difference`. Raises DataError for labels
    that do not fit and values that are not finite.
    """
    made = {key: statistics(values, label, bins) for key, values in log_probability.items()}
    cells: dict[str, dict[str, Cell]] = {}
    for key, row in made.items():
        cells[key] = {}
        for metric, one in row.items():
            minus = None
            if reference in made and key != reference:
                minus = bootstrap_difference(one, made[reference][metric], resamples=resamples, seed=seed)
            cells[key][metric] = cell(bootstrap(one, resamples=resamples, seed=seed), minus, metric in LOWER)
    parts = {
        k: dict(zip(BrierParts.NAMES, BrierParts(p, label, bins).value(), strict=True))
        for k, p in log_probability.items()
    }
    notes = [f"{len(label)} images, {bins} bins; Brier score summed over classes"]
    for key, part in parts.items():
        notes.append(
            f"Brier of {key}: {part['reliability']:.4f} reliability - {part['resolution']:.4f} resolution + "
            f"{part['uncertainty']:.4f} uncertainty + {part['within']:.4f} within bins"
        )
    about = {"set": name, "rows": len(label), "bins": bins, "reference": reference, "seed": seed}
    return Table(name, NAMES, cells, tuple(notes), about)


@dataclass
class Calibration(TableCommand):
    """Measure the calibration of a classifier's probabilities; scalings fitted on held-out rows stand beside it.

    Example: posthoc eval calibration --data test.npz --held-out validation.npz"""

    data: str
    """labelled images with logits: score file (.npz), stored features, or images with --model"""
    held_out: str | None = None
    """labelled images the classifier was not fitted on: temperature, vector and isotonic scaling are fitted on them"""
    model: str | None = None
    """adapter folder or timm name, for images"""
    bins: int = 15
    """of the binned errors"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bins <= MOST_BINS:
            raise OptionError(f"--bins {self.bins} was given; expected 1 to {MOST_BINS}")

    def run(self) -> None:
        model = open_model(self.model, self.checkpoint, self.device)
        one = read(self.data, model, self.split)
        one.need("label", "logits")
        assert one.label is not None
        assert one.logits is not None
        values, notes = {"softmax": np.asarray(one.logits)}, ["no --held-out: no scaling was fitted"]
        if self.held_out is not None:
            kept = read(self.held_out, model, self.split)
            kept.need("label", "logits")
            assert kept.label is not None
            shared, _ = overlap(one, kept)
            if shared:
                raise DataError(
                    f"{len(shared)} images of {one.name} are also in {kept.name} (first: row {shared[0]}): scalings would "
                    "be fitted on rows that are scored"
                )
            notes = [f"scalings fitted on {kept.rows} rows of {kept.name}"]
            assert kept.logits is not None
            values |= scaled(one.logits, kept.logits, kept.label)
        table = calibration_table(
            values, one.label, name=one.name, bins=self.bins, resamples=self.resamples, seed=self.seed
        )
        self.show([table.noted(*notes)])


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval calibration`."""
    run_command(Calibration, "posthoc eval calibration", arguments)


if __name__ == "__main__":
    main()
