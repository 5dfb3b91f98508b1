"""Plain numbers for arrays of scores; the same metrics with intervals are in `statistics` and `bootstrap`.

One convention: higher uncertainty = out of distribution = wrong = more ambiguous. Nothing is flipped to look better.
"""

from __future__ import annotations

import numpy as np
import torch

from ..adapters.errors import DataError
from .arrays import Array, as_numpy, finite, same_rows
from .extras import require
from .statistics import Aurc, Ece, SelectiveAccuracy

REJECTED = np.arange(0, 51) / 100
"""Shares rejected where an accuracy-rejection curve is drawn by default: 0 to one half."""


def auroc(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """Chance that an OOD image [M] is less certain than an ID image [N], ties half (scikit-learn): 0 to 1."""
    inside, outside = finite("the ID uncertainty", id_uncertainty), finite("the OOD uncertainty", ood_uncertainty)
    roc_auc_score = require("sklearn.metrics", "scikit-learn").roc_auc_score
    is_ood = np.r_[np.zeros(len(inside), bool), np.ones(len(outside), bool)]
    return float(roc_auc_score(is_ood, np.r_[inside, outside]))


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of two arrays [N], average ranks for ties (SciPy): -1 to 1. DataError when one is constant."""
    from scipy.stats import spearmanr

    a, b = finite("x", x), finite("y", y)
    same_rows(x=a, y=b)
    for name, values in (("x", a), ("y", b)):
        if values.min() == values.max():
            raise DataError(f"{name} is constant ({values[0]:g}): a rank correlation is not defined")
    return float(spearmanr(a, b).statistic)


def nll(log_probability: Array, label: Array) -> float:
    """Mean negative log-likelihood in nats; arguments as in `nll_per_image`."""
    return float(nll_per_image(log_probability, label).mean())


def nll_per_image(log_probability: Array, label: Array, chunk: int = 8192) -> np.ndarray:
    """Negative log-likelihood of the true class, float64 [N], in nats.

    Args:
        log_probability: logits [N, C], or log-probabilities (normalising leaves them as they are).
        label: int [N], classes 0 to C - 1.
    """
    logits, target = as_numpy(log_probability), as_numpy(label)
    check_labels(logits, target)
    parts = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(np.array(logits[i : i + chunk], dtype=np.float64)),
            torch.from_numpy(np.array(target[i : i + chunk], dtype=np.int64)),
            reduction="none",
        ).numpy()
        for i in range(0, len(logits), chunk)
    ]
    return np.concatenate(parts)


def confidence_and_correct(log_probability: Array, label: Array) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the top class, float64 [N], and whether it is the true one, bool [N]: what `ece` takes."""
    from scipy.special import log_softmax

    logits, target = as_numpy(log_probability), as_numpy(label)
    check_labels(logits, target)
    return np.exp(log_softmax(logits.astype(np.float64), axis=1).max(1)), logits.argmax(1) == target


def ece(confidence: Array, correct: Array, bins: int = 15) -> float:
    """Expected calibration error of the top class, 0 to 1; see `statistics.Ece` for the bins."""
    return float(Ece(confidence, correct, bins).value())


def accuracy_rejection_curve(uncertainty: Array, correct: Array, rejected: Array = REJECTED) -> np.ndarray:
    """Accuracy of what is kept, float64 [K], when the share `rejected` [K] with the highest uncertainty is rejected.

    One minus it is the selective risk at coverage 1 - rejected.
    """
    return SelectiveAccuracy(uncertainty, correct, rejected).value()


def aurc(uncertainty: Array, wrong: Array) -> float:
    """Area under the risk-coverage curve, 0 to 1, lower is better; see `statistics.Aurc`."""
    return float(Aurc(uncertainty, wrong).value())


def check_labels(logits: np.ndarray, label: np.ndarray) -> None:
    """Raises DataError unless logits are [N, C] and labels are whole numbers [N] in 0..C-1."""
    if logits.ndim != 2 or label.shape != (len(logits),):
        raise DataError(f"logits [N, C] and labels [N] are expected; these are {logits.shape} and {label.shape}")
    if label.dtype.kind not in "iub" or label.min() < 0 or label.max() >= logits.shape[1]:
        raise DataError(
            f"labels must be whole numbers from 0 to {logits.shape[1] - 1}; "
            f"these are {label.dtype} from {label.min()} to {label.max()}"
        )
