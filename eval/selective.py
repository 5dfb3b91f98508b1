"""Selective prediction: how well scores sort a classifier's mistakes to the end, with intervals.

posthoc eval selective --data test.npz
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.errors import DataError
from .command import TableCommand, run_command
from .inputs import Scored, not_constant, open_model, read
from .ood import REFERENCE, score_all
from .selective_statistics import AccuracyAtCoverage, Augrc, ExcessAurc, FailureAuroc
from .statistics import Aurc
from .table import Table, fill

COVERAGES = (0.8, 0.9)
LOWER = ("aurc", "excess_aurc", "augrc")


def selective_table(
    scores: Mapping[str, np.ndarray],
    wrong: np.ndarray,
    *,
    name: str = "selective prediction",
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """AURC, its excess, AUGRC, AUROC of the mistakes and accuracy at coverage of scores [N] by name; `wrong` bool [N].

    Raises DataError for scores of another length, not finite or constant, and for a classifier that is always right or
    always wrong.
    """
    mistakes = np.asarray(wrong, bool)
    if mistakes.all() or not mistakes.any():
        raise DataError(f"{name}: the classifier is {'never' if mistakes.all() else 'always'} right: nothing to select")
    Scored(name, dict(scores), correct=~mistakes)
    not_constant({key: (values,) for key, values in scores.items()})
    made = {
        "aurc": lambda u: Aurc(u, mistakes),
        "excess_aurc": lambda u: ExcessAurc(u, mistakes),
        "augrc": lambda u: Augrc(u, mistakes),
        "error_auroc": lambda u: FailureAuroc(u, mistakes),
    } | {f"accuracy_at_{c:.0%}": lambda u, c=c: AccuracyAtCoverage(u, ~mistakes, [c]) for c in COVERAGES}
    cells: dict = {key: {} for key in scores}
    for metric, make in made.items():
        filled = fill({key: make(u) for key, u in scores.items()}, [metric], LOWER, reference, resamples, seed)
        for key, row in filled.items():
            cells[key].update(row)
    note = f"{len(mistakes)} images, accuracy {1 - mistakes.mean():.4f}"
    about = {"set": name, "rows": len(mistakes), "errors": int(mistakes.sum()), "reference": reference, "seed": seed}
    return Table(name, tuple(made), cells, (note,), about)


@dataclass
class Selective(TableCommand):
    """Compare how well scores tell a classifier's mistakes from its right answers.

    Example: posthoc eval selective --data test.npz"""

    data: str
    """labelled images: score file (.npz, .csv) with `correct`, or labels and logits; stored features; images with --model"""
    model: str | None = None
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    train: str | None = None
    """images or stored features of the training set: kNN and detectors are fitted on them alone"""
    reference: str = REFERENCE
    """score that paired differences are taken from"""

    def run(self) -> None:
        model = open_model(self.model, self.checkpoint, self.device)
        one = read(self.data, model, self.split)
        one.need("correct")
        assert one.correct is not None
        train = None if self.train is None else read(self.train, model, "train")
        (scores,), notes = score_all([one], train)
        table = selective_table(
            scores, ~one.correct, name=one.name, reference=self.reference, resamples=self.resamples, seed=self.seed
        )
        self.show([Table(table.title, table.metrics, table.cells, (*table.notes, *notes), table.about)])


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval selective`."""
    run_command(Selective, "posthoc eval selective", arguments)


if __name__ == "__main__":
    main()
