"""pytorch-ood's detectors on stored features: fitted on training features only, never on a row that is scored.

All give float32 [N], higher = OOD. Left out are those that repeat a score of `baselines` (max-softmax, entropy, energy,
max-logit, kNN: same values), MCM (needs texts), WeightedEBO (needs trained weights), TemperatureScaling (its fit is
`scaling`'s), and those that run the live model (ODIN, ReAct, ASH, ...).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.errors import DataError, OptionError, suggest
from .arrays import Array, as_numpy, check_labels, finite
from .extras import require

ROWS = 1024


@dataclass(frozen=True)
class Training:
    """What detectors are fitted on: features [M, D] and labels int [M] of training images, and the last linear layer.

    `weight` [C, D] and `bias` [C]: logits = features @ weight.T + bias. `last_layer` finds them where only features and
    logits were stored. Raises DataError for shapes that do not fit and values that are not finite.
    """

    features: Array
    label: Array
    weight: Array
    bias: Array

    def __post_init__(self) -> None:
        f, w, b = finite("features", self.features, 2), finite("weight", self.weight, 2), finite("bias", self.bias)
        if f.shape[1] != w.shape[1] or w.shape[0] != len(b):
            raise DataError(
                f"features [M, D], a weight [C, D] and a bias [C] are expected; these are {f.shape}, {w.shape}, {b.shape}"
            )
        check_labels(np.broadcast_to(b, (len(f), len(b))), as_numpy(self.label))


Fit = Callable[[Any, Tensor, Tensor, Tensor, nn.Linear], Callable[[Tensor, Tensor], Tensor]]


def _features(name: str, make: Callable[[Any, nn.Linear], Any]) -> Fit:
    """A detector that is fitted on features and labels, and scores features."""

    def fit(
        module: Any, z: Tensor, label: Tensor, logits: Tensor, head: nn.Linear
    ) -> Callable[[Tensor, Tensor], Tensor]:
        detector = make(getattr(module, name), head)
        if detector.requires_fit:
            detector.fit_features(z, label)
        return lambda x, _: detector.predict_features(x)

    return fit


def _logits(name: str) -> Fit:
    """A detector that is fitted on logits (the model is the identity) and scores logits."""

    def fit(
        module: Any, z: Tensor, label: Tensor, logits: Tensor, head: nn.Linear
    ) -> Callable[[Tensor, Tensor], Tensor]:
        detector = getattr(module, name)(nn.Identity())
        if detector.requires_fit:
            rows = torch.utils.data.TensorDataset(logits, label)
            detector.fit(torch.utils.data.DataLoader(rows, batch_size=ROWS))
        return lambda _, x: detector.predict_logits(x)

    return fit


def _openmax(
    module: Any, z: Tensor, label: Tensor, logits: Tensor, head: nn.Linear
) -> Callable[[Tensor, Tensor], Tensor]:
    """OpenMax; pytorch-ood 0.4 takes the distance to a class that no row of the batch is predicted as for 0.

    So a row's score depends on its company (.11 among seven rows, .34 alone, in this library's test): every batch gets one
    row of each class as well, which is dropped.
    """
    score, every = _logits("OpenMax")(module, z, label, logits, head), torch.eye(logits.shape[1])
    return lambda x, logit: score(x, torch.cat([logit, every]))[: len(logit)]


DETECTORS: dict[str, Fit] = {
    "Mahalanobis": _features("Mahalanobis", lambda kind, _: kind(None)),
    "RMD": _features("RMD", lambda kind, _: kind(None)),
    "GMM": _features("GMM", lambda kind, _: kind(None)),
    "ViM": _features("ViM", lambda kind, head: kind(None, _principal(head), head.weight, head.bias)),
    "DICE": _features("DICE", lambda kind, head: kind(None, head.weight, head.bias, 0.7)),
    "LTS": _features("LTS", lambda kind, head: kind(None, head)),
    "SHE": _features("SHE", lambda kind, head: kind(None, head)),
    "NNGuide": _features("NNGuide", lambda kind, head: kind(None, head)),
    "fDBD": _features("fDBD", lambda kind, head: kind(None, head)),
    "NCI": _features("NCI", lambda kind, head: kind(None, head)),
    "pNML": _features("PNML", lambda kind, head: kind(None, head)),
    "GEN": _logits("GEN"),
    "KL-matching": _logits("KLMatching"),
    "OpenMax": _openmax,
}
"""The detectors by the name tables print, with pytorch-ood's own settings; ViM's subspace has half the feature's
dimensions (its paper: 1000 of 2048), DICE drops 70 % of the weights (its paper's ImageNet setting)."""


def _principal(head: nn.Linear) -> int:
    return max(1, head.in_features // 2)


@dataclass
class Detectors:
    """Fitted detectors, and those that could not be: `left_out` says why, by name."""

    head: nn.Linear
    fitted: dict[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def scores(self, features: Array) -> dict[str, np.ndarray]:
        """Every fitted detector's score of features [N, D]: float32 [N], higher = OOD.

        Raises DataError for another width, and naming the detector and the rows where a score is not finite.
        """
        x = _tensor(finite("features", features, 2))
        if x.shape[1] != self.head.in_features:
            raise DataError(f"these features have {x.shape[1]} dimensions; fitted were {self.head.in_features}")
        result = {}
        for name, score in self.fitted.items():
            parts = []
            for rows in x.split(ROWS):
                with torch.no_grad(), _quiet():
                    parts.append(score(rows, self.head(rows)).float().cpu().numpy())
            result[name] = finite(f"the score of {name}", np.concatenate(parts)).astype(np.float32)
        return result


def fit_detectors(training: Training, names: Sequence[str] | None = None) -> Detectors:
    """Detectors of `names` (None: all of `DETECTORS` that the installed pytorch-ood has), fitted on training rows.

    One that cannot be fitted on these rows (a class without a right prediction, a singular covariance) is left out, and
    `left_out` says so. Raises OptionError for an unknown name, PosthocError without pytorch-ood.
    """
    for name in names or ():
        if name not in DETECTORS:
            raise OptionError(f"detector {name!r} is unknown: {suggest(name, DETECTORS)}")
    module = require("pytorch_ood.detector", "pytorch-ood")
    weight, bias = _tensor(as_numpy(training.weight)), _tensor(as_numpy(training.bias))
    head = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    z, label = _tensor(as_numpy(training.features)), torch.from_numpy(as_numpy(training.label).astype(np.int64))
    logits = head(z)
    found = Detectors(head)
    for name in names or DETECTORS:
        try:
            with _quiet():
                found.fitted[name] = DETECTORS[name](module, z, label, logits, head)
        except (ValueError, AssertionError, AttributeError, RuntimeError) as error:
            found.left_out[name] = str(error) or type(error).__name__
    return found


def last_layer(features: Array, logits: Array, tolerance: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """Weight [C, D] and bias [C] of the linear layer between features [N, D] and logits [N, C], by least squares.

    Directions in which the features never vary get the weight 0. Raises DataError where no linear layer gives these logits
    (root mean square left over above `tolerance` times that of the logits): then give the layer itself.
    """
    f, z = finite("features", features, 2), finite("logits", logits, 2)
    if len(f) != len(z) or len(f) <= f.shape[1]:
        raise DataError(
            f"more rows than dimensions, features [N, D] and logits [N, C], needed; these are {f.shape}, {z.shape}"
        )
    centre = f.mean(0)
    weight = np.linalg.lstsq(f - centre, z - z.mean(0), rcond=1e-6)[0].T
    bias = z.mean(0) - weight @ centre
    left = float(np.sqrt(np.mean((f @ weight.T + bias - z) ** 2)))
    scale = float(z.std())
    if left > tolerance * max(scale, 1e-12):
        raise DataError(
            f"these logits are no linear function of these features (left over {left:.3g}, spread {scale:.3g}): the layer "
            "before the logits is another one"
        )
    return weight, bias


def augmented(score: Callable[[Array], np.ndarray], views: Array) -> np.ndarray:
    """Test-time augmentation: the mean of a score over stored views. `views` [N, V, ...] -> float32 [N]."""
    array = as_numpy(views)
    if array.ndim != 3 or not array.shape[1]:
        raise DataError(f"views [N, V, C] are expected (extract with views=V); these have shape {array.shape}")
    each = score(array.reshape(-1, array.shape[2]))
    return np.asarray(each.reshape(array.shape[:2]).mean(1, dtype=np.float64), dtype=np.float32)


def ensemble(scores: Sequence[Array], held_out: Sequence[Array]) -> np.ndarray:
    """Ensemble of heads: the mean over heads of the share of ITS held-out scores not above the image's, float32 [N].

    Scores of different heads have different units; their places among the held-out scores of the head (`held_out`, in the
    same order) have one. 0 to 1.
    """
    if not scores or len(scores) != len(held_out):
        raise DataError(
            f"one array of held-out scores for each of at least one head; given {len(scores)}, {len(held_out)}"
        )
    parts = []
    for k, (one, kept) in enumerate(zip(scores, held_out, strict=True)):
        ordered = np.sort(finite(f"held-out scores of head {k}", kept))
        parts.append(np.searchsorted(ordered, finite(f"scores of head {k}", one), side="right") / len(ordered))
    if len({len(part) for part in parts}) > 1:
        raise DataError(f"the heads scored different numbers of images: {[len(part) for part in parts]}")
    return np.mean(parts, axis=0).astype(np.float32)


class _quiet:
    """pytorch-ood warns and logs about devices and small subspaces, which are settled here."""

    def __enter__(self) -> None:
        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("ignore")
        self.log = logging.getLogger("pytorch_ood")
        self.level = self.log.level
        self.log.setLevel(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        self.log.setLevel(self.level)
        self.catch.__exit__(*error)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
