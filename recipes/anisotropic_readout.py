"""What can be read off a representation by linear maps: the class, and what an augmentation did to the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..eval.identifiability import linear_r2_each
from ..eval.plots import COLOURS, FAINT, GREYS, legend, page
from ..eval.probes import linear_probe, top_k_accuracy

Figures = dict[str, float]


@dataclass(frozen=True)
class Judged:
    """Images that readouts are fitted on, or those that they are scored on.

    Attributes:
        plain, view: a representation [N, D] of the images as they are, and of an augmented view of each.
        label: int [N]. parameters: float64 [N] each, what was done in the views.
    """

    plain: np.ndarray
    view: np.ndarray
    label: np.ndarray
    parameters: Mapping[str, Tensor]


def readout(fit: Judged, test: Judged, seed: int) -> Figures:
    """Readouts in percent, fitted on images of `fit` and scored on those of `test`.

    `class`: accuracy of a linear classifier on images as they are. Each parameter: R^2 of linear regression on augmented
    views, also for those that are 0 or 1, so that 0 is what guessing the mean reaches. `augmentation`: their mean.
    """
    logits, _ = linear_probe(fit.plain, fit.label, test.plain, seed=seed)
    found = {"class": 100.0 * top_k_accuracy(logits, test.label)}
    fitted = np.arange(len(fit.view) + len(test.view)) < len(fit.view)
    views = np.concatenate([fit.view, test.view])
    names = list(fit.parameters)
    done = [np.stack([part.parameters[name].numpy() for name in names], 1) for part in (fit, test)]
    scores = 100.0 * linear_r2_each(views, np.concatenate(done), fitted=fitted)
    parameters = dict(zip(names, scores.tolist(), strict=True))
    return {**found, "augmentation": float(scores.mean()), **parameters}


def table(found: Mapping[str, Figures]) -> str:
    """Representations down, readouts across, as Markdown."""
    names = list(next(iter(found.values())))
    lines = ["| representation | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[n]:.1f}" for n in names) + " |" for name, row in found.items()]
    return "\n".join(lines)


def draw(
    folder: Path,
    found: Mapping[str, Figures],
    precision: np.ndarray,
    records: Sequence[Mapping[str, float]],
    collapsed: Mapping[str, float],
) -> None:
    """readouts.png, and training.png: the losses as shares of those of equal embeddings, and the precisions in their order."""
    names = [name for name in next(iter(found.values())) if name != "augmentation"]
    with page(folder / "readouts.png", 8.4, 3.8) as figure:
        axis = figure.subplots()
        bars(axis, {name: [row[n] for n in names] for name, row in found.items()}, names)
        axis.set(title="Linear readouts", ylabel="accuracy or R², %")
        legend(figure, axis, 4)
    with page(folder / "training.png", 8.4, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        steps = [record["step"] for record in records]
        for name, label, colour in (("train_loss", "training", COLOURS[0]), ("held_out_loss", "held out", COLOURS[1])):
            left.plot(steps, [record[name] / collapsed[name] for record in records], color=colour, label=label)
        left.set(title="Loss as a share of that of equal embeddings", xlabel="optimiser step")
        left.legend()
        right.plot(np.sort(precision), "o", color=COLOURS[2], markersize=3)
        right.set(title="Precision of each dimension", xlabel="dimension, in this order", ylim=(0, None))


def bars(
    axis: Any,
    rows: Mapping[str, Sequence[float]],
    names: Sequence[str],
    errors: Mapping[str, Sequence[float]] | None = None,
    reference: str | None = None,
) -> None:
    """A group of bars for each name, one for each row, with its errors if there are; that of the row `reference` is grey."""
    width = 0.8 / len(rows)
    colours = cycle(COLOURS)
    for i, (row, values) in enumerate(rows.items()):
        place = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * width
        error = None if errors is None else errors[row]
        colour = GREYS[-1] if row == reference else next(colours)
        axis.bar(place, values, width, color=colour, label=row, yerr=error, capsize=2, error_kw={"elinewidth": 1.0})
    axis.axhline(0.0, color=FAINT)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.grid(axis="x", visible=False)
