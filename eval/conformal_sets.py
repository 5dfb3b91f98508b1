"""Conformal classification on stored logits: sets of classes that hold the true one with a chosen probability.

>>> rng = np.random.default_rng(0)
>>> label = rng.integers(0, 5, 2000)
>>> logits = 3.0 * np.eye(5)[label] + 1.5 * rng.normal(size=(2000, 5))
>>> sets = fit_conformal(logits[:1000], label[:1000], method="lac", alpha=0.1).sets(logits[1000:])
>>> report = set_report(sets, label[1000:])
>>> round(float(report.covered.mean()), 1), bool(report.size.mean() < 3)
(0.9, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..adapters.errors import DataError, OptionError
from .arrays import Array, as_numpy, finite
from .metrics import check_labels

METHODS = ("lac", "aps", "raps")
NUMBERS = 1 << 22  # probabilities held at a time


@dataclass(frozen=True)
class ConformalClassifier:
    """A fitted rule: a class is in the set of an image when its score is at most the threshold of the class.

    Attributes:
        method: `lac`, `aps` or `raps`; see `class_scores`.
        threshold: float64 [C]; the same number everywhere unless class-conditional. Infinity: the class is always in.
        alpha: the share of images whose true class may be missing.
        randomised: the scores draw one uniform number for each image.
        penalty, free_ranks: of RAPS.
    """

    method: str
    threshold: np.ndarray
    alpha: float
    randomised: bool
    penalty: float
    free_ranks: int

    def sets(self, logits: Array, *, generator: np.random.Generator | None = None) -> np.ndarray:
        """Which classes are in each image's set, bool [N, C]; a set may be empty.

        logits: [N, C] of new images. generator: needed if randomised, and not in the state the calibration began with.
        """
        values = as_numpy(logits)
        if values.ndim != 2 or values.shape[1] != len(self.threshold):
            raise DataError(f"logits [N, {len(self.threshold)}] are expected, as calibrated; these are {values.shape}")
        rule = (self.method, self.randomised, self.penalty, self.free_ranks)
        found = [scores <= self.threshold for _, scores in _chunks(values, rule, generator)]
        return np.concatenate(found) if found else np.zeros(values.shape, bool)


def fit_conformal(
    logits: Array,
    label: Array,
    *,
    method: str = "aps",
    alpha: float = 0.1,
    class_conditional: bool = False,
    randomised: bool = False,
    generator: np.random.Generator | None = None,
    penalty: float = 0.01,
    free_ranks: int = 5,
) -> ConformalClassifier:
    """Thresholds from calibration rows, which neither fitted the classifier nor are evaluated.

    The true class of an exchangeable new image is in its set with probability at least 1 - alpha, and, when no two
    scores are equal, at most 1 - alpha + 1 / (n + 1).

    Args:
        logits: [N, C]. label: int [N]. alpha: in (0, 1).
        method: `lac` (Sadinle et al., JASA 2019), `aps` (Romano et al., NeurIPS 2020) or `raps` (Angelopoulos et al.,
            ICLR 2021).
        class_conditional: one threshold for each class from its own rows (Mondrian), so that the promise holds within
            every class.
        randomised: APS and RAPS take the true class in part, which brings the coverage down to 1 - alpha; `generator`
            draws the parts.
        penalty, free_ranks: RAPS adds penalty x (rank - free_ranks) to the scores of classes that rank lower.

    Raises DataError for shapes, labels or numbers that do not fit, and when class-conditional for classes with fewer
    than 1 / alpha - 1 rows (named), whose threshold would be infinite. OptionError for unknown names, numbers out of
    range, or no generator where one is needed.
    """
    if not 0.0 < alpha < 1.0:
        raise OptionError(f"alpha={alpha} was given; expected a number between 0 and 1, such as 0.1")
    scores = true_class_scores(
        logits,
        label,
        method=method,
        randomised=randomised,
        generator=generator,
        penalty=penalty,
        free_ranks=free_ranks,
    )
    target = as_numpy(label).astype(np.int64)
    classes = as_numpy(logits).shape[1]
    if class_conditional:
        counts, needed = np.bincount(target, minlength=classes), math.ceil((1 - alpha) / alpha - 1e-9)
        rare = np.flatnonzero(counts < needed)
        if len(rare):
            names = ", ".join(f"{c} ({counts[c]})" for c in rare[:10]) + (", ..." if len(rare) > 10 else "")
            raise DataError(
                f"{len(rare)} of {classes} classes have fewer than the {needed} calibration rows that alpha={alpha} needs "
                f"within a class: class (rows) {names}. Give more rows, a larger alpha, or class_conditional=False"
            )
        order = np.argsort(target, kind="stable")
        groups = np.split(scores[order], counts.cumsum()[:-1])
        threshold = np.array([conformal_quantile(group, alpha) for group in groups])
    else:
        threshold = np.full(classes, conformal_quantile(scores, alpha))
    return ConformalClassifier(method, threshold, alpha, randomised, penalty, free_ranks)


def conformal_quantile(scores: Array, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores; infinity when there are too few, n < 1 / alpha - 1."""
    values = finite("the scores", scores)
    place = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9)
    return float(np.partition(values, place - 1)[place - 1]) if 1 <= place <= len(values) else math.inf


def true_class_scores(
    logits: Array,
    label: Array,
    *,
    method: str = "aps",
    randomised: bool = False,
    generator: np.random.Generator | None = None,
    penalty: float = 0.01,
    free_ranks: int = 5,
) -> np.ndarray:
    """How badly the true class conforms, float64 [N]: `class_scores` at the labels."""
    values, target = as_numpy(logits), as_numpy(label)
    if not len(values):
        raise DataError("there are no calibration rows")
    check_labels(values, target)
    rule = (method, randomised, penalty, free_ranks)
    parts = [
        np.take_along_axis(scores, target[start : start + len(scores), None].astype(np.int64), 1)[:, 0]
        for start, scores in _chunks(values, rule, generator)
    ]
    return np.concatenate(parts)


def class_scores(
    probability: np.ndarray, method: str, uniform: np.ndarray | None, penalty: float, free_ranks: int
) -> np.ndarray:
    """Scores of every class, float64 [N, C], higher = conforms less.

    `lac`: 1 - p. `aps`: the summed probability of the classes that rank before it, and its own, which `uniform` [N] in
    0..1 takes off in part. `raps`: the same and penalty x max(rank - free_ranks, 0), ranks from 1. Equal probabilities
    rank by class.
    """
    if method == "lac":
        return 1.0 - probability
    order = np.argsort(-probability, axis=1, kind="stable")
    ordered = np.take_along_axis(probability, order, 1)
    ranked = ordered.cumsum(1) - (0.0 if uniform is None else uniform[:, None] * ordered)
    if method == "raps":
        ranked += penalty * np.maximum(np.arange(1, ordered.shape[1] + 1) - free_ranks, 0)
    scores = np.empty_like(ranked)
    np.put_along_axis(scores, order, ranked, 1)
    return scores


@dataclass(frozen=True)
class ClassSetReport:
    """Per image whether the true class is in its set, bool [N], and the set's size, int64 [N]; labels int [N]."""

    covered: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def summary(self) -> dict[str, float]:
        """Coverage, sizes, share of empty sets, and coverage of the worst of the classes that occur."""
        rows = np.bincount(self.label)
        by_class = np.bincount(self.label, weights=self.covered)[rows > 0] / rows[rows > 0]
        return {
            "coverage": float(self.covered.mean()),
            "size": float(self.size.mean()),
            "median_size": float(np.median(self.size)),
            "empty": float((self.size == 0).mean()),
            "worst_class_coverage": float(by_class.min()),
            "mean_class_coverage": float(by_class.mean()),
        }


def set_report(sets: Array, label: Array) -> ClassSetReport:
    """Coverage and size of sets bool [N, C] with labels int [N]; raises DataError as `metrics.check_labels`, or for no rows."""
    inside, target = as_numpy(sets), as_numpy(label)
    if inside.dtype != bool or not len(inside):
        raise DataError(f"sets must be bool [N, C] with at least one row; these are {inside.dtype} {inside.shape}")
    check_labels(inside, target)
    target = target.astype(np.int64)
    return ClassSetReport(inside[np.arange(len(target)), target], inside.sum(1), target)


def _chunks(
    logits: np.ndarray, rule: tuple[str, bool, float, int], generator: np.random.Generator | None
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and class scores of consecutive rows."""
    from scipy.special import softmax

    method, randomised, penalty, free_ranks = rule
    if method not in METHODS:
        raise OptionError(f"method={method!r} was given; expected one of {', '.join(map(repr, METHODS))}")
    if randomised and (method == "lac" or generator is None):
        raise OptionError("randomised scores are APS's or RAPS's, and need generator=np.random.default_rng(seed)")
    if not penalty >= 0.0 or free_ranks < 0:
        raise OptionError(f"penalty={penalty} and free_ranks={free_ranks} were given; neither may be negative")
    if logits.ndim == 2 and not np.isfinite(logits).all():
        finite("the logits", logits, 2)  # names the rows
    step = max(1, NUMBERS // max(1, logits.shape[1]))
    for start in range(0, len(logits), step):
        probability = softmax(logits[start : start + step].astype(np.float64), axis=1)
        uniform = generator.random(len(probability)) if randomised and generator is not None else None
        yield start, class_scores(probability, method, uniform, penalty, free_ranks)
