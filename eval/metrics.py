"""Plain numbers for arrays of scores; the same metrics with intervals are in `statistics` and `bootstrap`.

One convention: higher uncertainty = out of distribution = wrong = more ambiguous. Nothing is flipped to look better.
"""

from __future__ import annotations

import numpy as np
import torch

from ..adapters.errors import DataError
from .arrays import Array, as_numpy, check_labels, finite, same_rows
from .calibration_statistics import AdaptiveEce, BrierParts, ClasswiseEce, SmoothEce, brier_per_image
from .ood_statistics import AveragePrecision, Fpr95, OodAcceptedAt95Id, ScodAurc, ScodAuroc
from .selective_statistics import AccuracyAtCoverage, Augrc, ExcessAurc
from .statistics import Aurc, Auroc, Ece, SelectiveAccuracy

REJECTED = np.arange(0, 51) / 100
"""Shares rejected where an accuracy-rejection curve is drawn by default: 0 to one half."""


def auroc(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """Chance that an OOD image [M] is less certain than an ID image [N], ties half: 0 to 1; see `statistics.Auroc`."""
    return float(Auroc(id_uncertainty, ood_uncertainty).value())


def aupr_out(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """Average precision with OOD as the positive class, 0 to 1; chance is M / (N + M): see `AveragePrecision`."""
    return float(AveragePrecision(id_uncertainty, ood_uncertainty, "ood").value())


def aupr_in(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """Average precision with ID as the positive class, 0 to 1; chance is N / (N + M): see `AveragePrecision`."""
    return float(AveragePrecision(id_uncertainty, ood_uncertainty, "id").value())


def fpr95(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """Share of ID images [N] flagged where 95 % of the OOD images [M] are: 0 to 1, lower is better; see `Fpr95`."""
    return float(Fpr95(id_uncertainty, ood_uncertainty).value())


def ood_accepted_at_95_id(id_uncertainty: Array, ood_uncertainty: Array) -> float:
    """Share of OOD images [M] accepted where 95 % of the ID images [N] are: 0 to 1; see `OodAcceptedAt95Id`."""
    return float(OodAcceptedAt95Id(id_uncertainty, ood_uncertainty).value())


def scod_auroc(id_uncertainty: Array, wrong: Array, ood_uncertainty: Array) -> float:
    """Chance that a mistake [N, where `wrong`] or an OOD image [M] is less certain than a right answer; `ScodAuroc`."""
    return float(ScodAuroc(id_uncertainty, wrong, ood_uncertainty).value())


def scod_aurc(id_uncertainty: Array, wrong: Array, ood_uncertainty: Array) -> float:
    """Area under the risk-coverage curve of ID [N] and OOD [M] together, accepted OOD being a mistake; `ScodAurc`."""
    return float(ScodAurc(id_uncertainty, wrong, ood_uncertainty).value())


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


def adaptive_ece(confidence: Array, correct: Array, bins: int = 15) -> float:
    """Expected calibration error with bins of equal mass, 0 to 1; see `calibration_statistics.AdaptiveEce`."""
    return float(AdaptiveEce(confidence, correct, bins).value())


def smooth_ece(confidence: Array, correct: Array) -> float:
    """Calibration error without bins, 0 to 1; see `calibration_statistics.SmoothEce`."""
    return float(SmoothEce(confidence, correct).value())


def classwise_ece(log_probability: Array, label: Array, bins: int = 15) -> float:
    """Mean over classes of their calibration error, 0 to 1; see `calibration_statistics.ClasswiseEce`."""
    return float(ClasswiseEce(log_probability, label, bins).value())


def brier(log_probability: Array, label: Array) -> float:
    """Brier's score summed over classes, mean over images: 0 to 2. Logits or log-probabilities [N, C], int [N]."""
    return float(brier_per_image(log_probability, label).mean())


def brier_decomposition(log_probability: Array, label: Array, bins: int = 15) -> dict[str, float]:
    """The Brier score and its parts by name; see `calibration_statistics.BrierParts`."""
    parts = BrierParts(log_probability, label, bins)
    return dict(zip(parts.NAMES, map(float, parts.value()), strict=True))


def accuracy_rejection_curve(uncertainty: Array, correct: Array, rejected: Array = REJECTED) -> np.ndarray:
    """Accuracy of what is kept, float64 [K], when the share `rejected` [K] with the highest uncertainty is rejected.

    One minus it is the selective risk at coverage 1 - rejected.
    """
    return SelectiveAccuracy(uncertainty, correct, rejected).value()


def aurc(uncertainty: Array, wrong: Array) -> float:
    """Area under the risk-coverage curve, 0 to 1, lower is better; see `statistics.Aurc`."""
    return float(Aurc(uncertainty, wrong).value())


def excess_aurc(uncertainty: Array, wrong: Array) -> float:
    """AURC less that of the best order, 0 to 1, lower is better; see `selective_statistics.ExcessAurc`."""
    return float(ExcessAurc(uncertainty, wrong).value())


def augrc(uncertainty: Array, wrong: Array) -> float:
    """Area under the generalised risk-coverage curve, 0 to 1/2, lower is better; see `selective_statistics.Augrc`."""
    return float(Augrc(uncertainty, wrong).value())


def accuracy_at_coverage(uncertainty: Array, correct: Array, coverage: Array) -> np.ndarray:
    """Accuracy of the most certain share, float64 [K]; `coverage` [K] above 0 and up to 1."""
    return AccuracyAtCoverage(uncertainty, correct, coverage).value()
