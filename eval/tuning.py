"""The settings of free scores and detectors, chosen on labelled held-out ID images; no OOD image is ever looked at.

Each method with a setting gets the same budget: the values of its grid, `BUDGET` of them, its default among them. The value
kept is the one whose score best tells the classifier's own mistakes from its right answers there (AUROC). Mistakes are the
only thing a detector can be tried on without an OOD image; what is best for them need not be best for OOD, so tables show
the default beside the tuned one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..adapters.errors import DataError
from . import baselines
from .detectors import SETTINGS, Setting, Training, fit_detectors
from .inputs import Scored
from .statistics import Auroc

BUDGET = 5
KNN = Setting("k", 50, (1, 10, 50, 100, 200))
ENERGY = Setting("T", 1.0, (0.5, 1.0, 2.0, 5.0, 10.0))
"""The temperature of the energy, -T log sum exp(logits / T) (Liu et al. 2020)."""

Scorer = Callable[[Scored], "np.ndarray | None"]


@dataclass(frozen=True)
class Method:
    """A score with a setting: `make(value)` gives what scores a set, None where the set lacks what it needs."""

    setting: Setting
    make: Callable[[float], Scorer]


def methods(train: Scored | None, training: Training | None) -> dict[str, Method]:
    """Every score with a setting that the training features allow, by the name tables print."""
    found = {"energy": Method(ENERGY, _energy)}
    if train is not None and train.embedding is not None:
        found["kNN"] = Method(KNN, lambda k: _knn(train, int(k)))
    if training is not None:
        for name, setting in SETTINGS.items():
            found[name] = Method(setting, partial(_detector, training, name))
    return found


def choose(method: Method, held_out: Scored, wrong: np.ndarray) -> float | None:
    """The value of the method's grid with the highest AUROC of the mistakes; of equal ones the nearest to the default.

    `wrong` bool [N]: the classifier's mistakes on the held-out images, neither none nor all. None where no value gives a
    score that ranks anything.
    """
    best: tuple[float, float] | None = None
    kept = None
    for value in method.setting.grid:
        scores = method.make(value)(held_out)
        if scores is None or scores.min() == scores.max():
            continue
        key = (float(Auroc(scores[~wrong], scores[wrong]).value()), -abs(value - method.setting.default))
        if best is None or key > best:
            best, kept = key, value
    return kept


def tune(found: list[dict[str, np.ndarray]], sets: list[Scored], held_out: Scored, given: Mapping[str, Method]) -> str:
    """Adds a row "NAME (tuned, SETTING)" of each method to the scores of each set; returns the note for the table.

    Raises DataError without labels or logits, and where the classifier makes no mistake on the held-out images or only
    mistakes.
    """
    held_out.need("correct")
    assert held_out.correct is not None
    wrong = ~held_out.correct
    if wrong.all() or not wrong.any():
        word = "only mistakes" if wrong.all() else "no mistake"
        raise DataError(f"--tune needs mistakes and right answers; the classifier makes {word} on {held_out.name}")
    for name, method in given.items():
        value = choose(method, held_out, wrong)
        if value is None:
            continue
        score = method.make(value)
        for scores, one in zip(found, sets, strict=True):
            tuned = score(one)
            if tuned is not None:
                scores[f"{name} (tuned, {method.setting.letter}={value:g})"] = tuned
    return (
        f"tuned on {held_out.rows} labelled ID images of {held_out.name}, {int(wrong.sum())} of them mistakes, by the AUROC of "
        f"the mistakes; no OOD image. Budget: {BUDGET} values for each of {', '.join(given)}; the other rows have no setting"
    )


def _energy(temperature: float) -> Scorer:
    def score(one: Scored) -> np.ndarray | None:
        if one.logits is None:
            return None
        return (baselines.energy(np.asarray(one.logits) / temperature) * temperature).astype(np.float32)

    return score


def _knn(train: Scored, k: int) -> Scorer:
    def score(one: Scored) -> np.ndarray | None:
        if one.embedding is None or k > train.rows:
            return None
        return baselines.knn(one.embedding, train.embedding, k=k)

    return score


def _detector(training: Training, name: str, value: float) -> Scorer:
    fitted = fit_detectors(training, [name], {name: value})
    return lambda one: None if one.penultimate is None else fitted.scores(one.penultimate).get(name)
