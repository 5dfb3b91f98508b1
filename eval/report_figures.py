"""The numbers under a report's pictures, from scores, labels and logits: JSON-able, and all that the drawings know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import bootstrap_curve
from .class_labels import has_classes
from .inputs import Scored
from .metrics import confidence_and_correct
from .reliability import reliability
from .selective_statistics import AccuracyAtCoverage

DRAWN = 6
"""Scores that have a curve and galleries of their own; every score has a row in the tables and a histogram."""
COVERAGE = np.arange(1, 41) / 40
BINS = 40
CLIPPED = 0.005
"""Share of the images at each end whose scores are drawn in the last bin."""
SKEWED, LOWEST = 100.0, 1e-8
"""Scores of at least 0 whose lower quarter (zeros left out) lies this factor below the top are drawn on a logarithmic
axis, which begins at no less than that share of the top: a softmax's doubt rounds to 0."""


def drawn_names(given: Sequence[str], free: Sequence[str]) -> list[str]:
    """The scores that are drawn: the user's own first, then free ones, at most `DRAWN`, at least two free ones if there are."""
    own = list(given)[: DRAWN - min(2, len(free))]
    return own + list(free)[: DRAWN - len(own)]


def reliability_figure(logits: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """Bins of confidence with accuracy and interval, and how many images each holds."""
    found = reliability(*confidence_and_correct(logits, label))
    return {
        "confidence": found.confidence.tolist(),
        "accuracy": [one.value for one in found.accuracy],
        "low": [one.low for one in found.accuracy],
        "high": [one.high for one in found.accuracy],
        "rows": found.rows.tolist(),
    }


def risk_figure(
    scores: Mapping[str, np.ndarray], names: Sequence[str], wrong: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    """Error rate of the share of most certain images, by score, with pointwise intervals; and that of the best order."""
    coverage = COVERAGE[COVERAGE * len(wrong) >= 1]
    curves = {}
    for name in names:
        kept = bootstrap_curve(AccuracyAtCoverage(scores[name], ~wrong, coverage), resamples=resamples, seed=seed)
        curves[name] = {
            "risk": [1 - one.value for one in kept],
            "low": [1 - one.high for one in kept],
            "high": [1 - one.low for one in kept],
        }
    best = np.maximum(0, coverage - float(np.mean(~wrong))) / coverage
    return {"coverage": coverage.tolist(), "best": best.tolist(), "scores": curves}


def histogram_figure(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Shares of each set's images in common bins of one score; what lies beyond `CLIPPED` is in the bins at the ends."""
    pooled = np.concatenate([np.asarray(one, np.float64) for one in values.values()])
    low, high = np.quantile(pooled, [CLIPPED, 1 - CLIPPED])
    logarithmic = bool(pooled.min() >= 0 < high and high > SKEWED * np.quantile(pooled[pooled > 0], 0.25))
    if logarithmic:
        edges = np.geomspace(max(low, LOWEST * high), high, BINS + 1)
    elif low < high:
        edges = np.linspace(low, high, BINS + 1)
    else:
        edges = low + np.array([-0.5, 0.5]) * max(1.0, abs(low))
    shares = {
        name: (np.histogram(np.clip(one, edges[0], edges[-1]), edges)[0] / len(one)).tolist()
        for name, one in values.items()
    }
    return {"edges": edges.tolist(), "logarithmic": logarithmic, "shares": shares}


def figures_of(
    sets: Sequence[Scored],
    scores: Sequence[Mapping[str, np.ndarray]],
    names: Sequence[str],
    wrong: np.ndarray | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Every figure that the sets, the ID one first, have the numbers for.

    names: the scores with curves. wrong: bool [N], the classifier's mistakes on the ID images, some but not all.
    """
    inside = sets[0]
    found: dict[str, Any] = {}
    if has_classes(inside):
        found["reliability"] = {"softmax": reliability_figure(np.asarray(inside.logits), np.asarray(inside.label))}
    if wrong is not None:
        found["risk_coverage"] = risk_figure(scores[0], names, wrong, resamples, seed)
    found["histograms"] = {
        name: histogram_figure({one.name: values[name] for one, values in zip(sets, scores, strict=True)})
        for name in scores[0]
    }
    return found
