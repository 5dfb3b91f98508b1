"""Recalibration from logits alone: what a head has to beat. Fitted on held-out rows, applied to others.

>>> scaled = fit_scaling("temperature", held_out_logits, held_out_label).log_probability(logits)  # doctest: +SKIP

Fit on rows the classifier was not fitted on, and never on the rows that are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..adapters.errors import DataError, OptionError, suggest
from .arrays import Array, as_numpy, check_labels, finite
from .baselines import fit_temperature
from .extras import require


class Scaling(Protocol):
    """A fitted recalibration."""

    def log_probability(self, logits: Array) -> np.ndarray:
        """Calibrated log-probabilities, float64 [N, C], of logits [N, C]. DataError for other widths, NaN, no rows."""
        ...


@dataclass(frozen=True)
class TemperatureScaling:
    """softmax(logits / temperature): one number, the predicted class stays (Guo et al. 2017)."""

    temperature: float

    def log_probability(self, logits: Array) -> np.ndarray:
        return _log_softmax(finite("logits", logits, 2) / self.temperature)


@dataclass(frozen=True)
class VectorScaling:
    """softmax(scale * logits + shift): two numbers for each class, which may change the predicted one (Guo et al. 2017)."""

    scale: np.ndarray
    shift: np.ndarray

    def log_probability(self, logits: Array) -> np.ndarray:
        return _log_softmax(_wide(logits, len(self.scale)) * self.scale + self.shift)


@dataclass(frozen=True)
class IsotonicScaling:
    """A rising step-free curve for each class's probability, then division by the sum (Zadrozny & Elkan 2002).

    `x` and `y` are the corners of each class's curve, linear between them. Probabilities stay above `floor`, 1 / (rows fitted
    on + 2), since a curve that ends at 0 would give an infinite loss.
    """

    x: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]
    floor: float

    def log_probability(self, logits: Array) -> np.ndarray:
        p = np.exp(_log_softmax(_wide(logits, len(self.x))))
        curves = zip(p.T, self.x, self.y, strict=True)
        fitted = np.stack([np.interp(one, x, y) for one, x, y in curves], axis=1).clip(min=self.floor)
        return np.log(fitted / fitted.sum(1, keepdims=True))


def fit_scaling(kind: str, logits: Array, label: Array) -> Scaling:
    """The recalibration `kind` ("temperature", "vector" or "isotonic") that makes labelled held-out rows likeliest.

    Args:
        logits: [N, C]. label: int [N], 0 to C - 1.

    Isotonic fits each class's squared error and needs scikit-learn. Raises OptionError for another kind, DataError for
    logits that are not finite and labels that do not fit.
    """
    if kind not in FITS:
        raise OptionError(f"scaling {kind!r} is unknown: {suggest(kind, FITS)}")
    z, target = finite("logits", logits, 2), as_numpy(label)
    check_labels(z, target)
    return FITS[kind](z, target.astype(np.int64))


def _temperature(z: np.ndarray, label: np.ndarray) -> Scaling:
    return TemperatureScaling(fit_temperature(z, label))


def _vector(z: np.ndarray, label: np.ndarray) -> Scaling:
    """Convex in scale and shift; the bounds hold where the rows are separable or lack a class."""
    from scipy.optimize import minimize

    rows, classes = np.arange(len(z)), z.shape[1]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, shift = parameters[:classes], parameters[classes:]
        log_p = _log_softmax(z * scale + shift)
        gap = np.exp(log_p)
        gap[rows, label] -= 1
        gradient = np.concatenate([(gap * z).sum(0), gap.sum(0)]) / len(z)
        return -float(log_p[rows, label].mean()), gradient

    start = np.concatenate([np.full(classes, 1 / fit_temperature(z, label)), np.zeros(classes)])
    bounds = [(-100.0, 100.0)] * (2 * classes)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000}).x
    return VectorScaling(found[:classes], found[classes:])


def _isotonic(z: np.ndarray, label: np.ndarray) -> Scaling:
    regression = require("sklearn.isotonic", "scikit-learn").IsotonicRegression
    p = np.exp(_log_softmax(z))
    curves = [regression(y_min=0, y_max=1, out_of_bounds="clip").fit(p[:, k], label == k) for k in range(p.shape[1])]
    return IsotonicScaling(
        tuple(c.X_thresholds_ for c in curves), tuple(c.y_thresholds_ for c in curves), 1 / (len(z) + 2)
    )


FITS = {"temperature": _temperature, "vector": _vector, "isotonic": _isotonic}


def scaled(logits: Array, held_out_logits: Array, held_out_label: Array) -> dict[str, np.ndarray]:
    """Log-probabilities [N, C] after every recalibration of `FITS`, fitted on labelled held-out rows, by its name."""
    return {kind: fit_scaling(kind, held_out_logits, held_out_label).log_probability(logits) for kind in FITS}


def _wide(logits: Array, classes: int) -> np.ndarray:
    z = finite("logits", logits, 2)
    if z.shape[1] != classes:
        raise DataError(f"these logits have {z.shape[1]} classes; the scaling was fitted on {classes}")
    return z


def _log_softmax(z: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    return log_softmax(z, axis=1)
