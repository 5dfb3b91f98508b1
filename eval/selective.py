"""Selective prediction: how well scores sort a classifier's mistakes to the end, with intervals.

posthoc eval selective --data test.npz
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.errors import DataError
from .class_labels import doubtful_labels, mistakes
from .command import run_command
from .inputs import Scored, not_constant, read
from .score_rows import REFERENCE, RowsCommand
from .selective_statistics import AccuracyAtCoverage, Augrc, ExcessAurc, FailureAuroc
from .statistics import Aurc
from .table import Table, fill, over_seeds

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
class Selective(RowsCommand):
    """Compare how well scores tell a classifier's mistakes from its right answers.

    Example: posthoc eval selective --data test.npz"""

    data: str
    """labelled images: score file (.npz, .csv) with `correct`, or labels and logits; stored features; images with --model"""

    def run(self) -> None:
        models = self.models()
        one = read(self.data, models[0], self.split)
        one.need("correct")
        wrong, why = mistakes(one)
        if wrong is None:
            raise DataError(str(why))
        every, notes = self.rows([one], models)
        notes += doubtful_labels(one)
        tables = [
            selective_table(
                scores, wrong, name=one.name, reference=self.reference, resamples=self.resamples, seed=self.seed
            )
            for (scores,) in every
        ]
        table = tables[0] if len(tables) == 1 else over_seeds(tables)
        self.show([table.noted(*notes)])


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval selective`."""
    run_command(Selective, "posthoc eval selective", arguments)


if __name__ == "__main__":
    main()
