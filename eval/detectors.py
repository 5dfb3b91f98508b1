"""pytorch-ood's detectors on stored features: fitted on training features only, never on a row that is scored.

All give float32 [N], higher = OOD. ReAct, ASH, SCALE and VRA shape the last linear layer's input, as their papers do, so the
stored input gives the very scores that the live network gives. Left out are those that repeat a score of `baselines`
(max-softmax, entropy, energy, max-logit, kNN: same values), MCM (needs texts), WeightedEBO (needs trained weights) and
TemperatureScaling (its fit is `scaling`'s); those that need images are in `live_detectors`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.errors import DataError, OptionError, suggest
from .arrays import Array, as_numpy, check_labels, finite
from .extras import require
from .gaussian_mixture import gaussian_mixture
from .openmax import open_max

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


class Setting(NamedTuple):
    """What a detector can be tuned by: its letter in tables, its default, and the values `tuning` tries, the same number
    for each detector."""

    letter: str
    default: float
    grid: tuple[float, ...]


Score = Callable[[Tensor, Tensor], Tensor]
"""Features [N, D] and logits [N, C] to scores [N]."""


class Fitting(NamedTuple):
    """What a detector is fitted from: pytorch-ood, training features, labels and logits, the last layer, its setting."""

    module: Any
    features: Tensor
    label: Tensor
    logits: Tensor
    head: nn.Linear
    value: float


Fit = Callable[[Fitting], Score]


def _features(name: str, make: Callable[[Any, Fitting], Any]) -> Fit:
    """A detector that is fitted on features and labels, and scores features."""

    def fit(given: Fitting) -> Score:
        detector = make(getattr(given.module, name), given)
        if detector.requires_fit:
            detector.fit_features(given.features, given.label)
        return lambda x, _: detector.predict_features(x)

    return fit


def _shaped(name: str, make: Callable[..., Any], signed: bool = False) -> Fit:
    """A detector that shapes the last layer's input, taken as maps of one pixel, and scores by the energy of the logits."""

    def fit(given: Fitting) -> Score:
        if not signed and bool((given.features < 0).any()):
            raise ValueError("it divides sums of activations, which these features, some negative, do not allow")
        detector = make(getattr(given.module, name), given.value, lambda maps: given.head(maps.flatten(1)))
        if detector.requires_fit:
            detector.fit_feature_maps(given.features[..., None, None], given.label)
        return lambda x, _: detector.predict_feature_maps(x[..., None, None])

    return fit


def _logits(name: str, make: Callable[[Any, float], Any] = lambda kind, _: kind(nn.Identity())) -> Fit:
    """A detector that is fitted on logits (the model is the identity) and scores logits."""

    def fit(given: Fitting) -> Score:
        detector = make(getattr(given.module, name), given.value)
        if detector.requires_fit:
            rows = torch.utils.data.TensorDataset(given.logits, given.label)
            detector.fit(torch.utils.data.DataLoader(rows, batch_size=ROWS))
        return lambda _, x: detector.predict_logits(x)

    return fit


def _openmax(given: Fitting) -> Score:
    """OpenMax, by `open_max`."""
    score = open_max(given.logits, given.label, int(given.value))
    return lambda _, logit: score(logit)


def _mixture(given: Fitting) -> Score:
    """GMM, by `gaussian_mixture`."""
    score = gaussian_mixture(given.features, given.label, given.value)
    return lambda x, _: score(x)


def _dice(given: Fitting) -> Score:
    """DICE; pytorch-ood 0.4 scores through an array [rows, C, D], 5 GB for 1000 rows of ImageNet's layer: here a product."""
    detector = given.module.DICE(None, given.head.weight, given.head.bias, given.value)
    detector.fit_features(given.features, given.label)
    return lambda x, _: detector.detector(x @ detector.masked_w.T + detector.bias)


def _grad_norm(given: Fitting) -> Score:
    """GradNorm of the last layer's weights, as its paper takes it, in closed form; pytorch-ood runs the network backwards.

    The gradient of the cross-entropy to the uniform distribution is the outer product of p - 1/C and the features, and its
    l1 norm the product of theirs (Huang et al. 2021, equation 8); more of it = more familiar.
    """
    return lambda x, logit: -(logit.softmax(1) - 1 / logit.shape[1]).abs().sum(1) * x.abs().sum(1)


DETECTORS: dict[str, Fit] = {
    "Mahalanobis": _features("Mahalanobis", lambda kind, _: kind(None)),
    "RMD": _features("RMD", lambda kind, _: kind(None)),
    "GMM": _mixture,
    "ViM": _features("ViM", lambda kind, at: kind(None, _principal(at), at.head.weight, at.head.bias)),
    "DICE": _dice,
    "LTS": _features("LTS", lambda kind, at: kind(None, at.head, at.value)),
    "SHE": _features("SHE", lambda kind, at: kind(None, at.head)),
    "NNGuide": _features("NNGuide", lambda kind, at: kind(None, at.head, int(at.value))),
    "fDBD": _features("fDBD", lambda kind, at: kind(None, at.head)),
    "NCI": _features("NCI", lambda kind, at: kind(None, at.head, at.value)),
    "pNML": _features("PNML", lambda kind, at: kind(None, at.head)),
    "ReAct": _shaped("ReAct", lambda kind, p, head: kind(None, head, percentile=p), signed=True),
    "ASH-S": _shaped("ASH", lambda kind, p, head: kind(None, head, "ash-s", p)),
    "ASH-B": _shaped("ASH", lambda kind, p, head: kind(None, head, "ash-b", p)),
    "SCALE": _shaped("SCALE", lambda kind, p, head: kind(None, head, p)),
    "VRA": _shaped("VRA", lambda kind, p, head: kind(None, head, 1 - p, p), signed=True),
    "GradNorm": _grad_norm,
    "GEN": _logits("GEN", lambda kind, gamma: kind(None, gamma)),
    "KL-matching": _logits("KLMatching"),
    "OpenMax": _openmax,
}
"""The detectors by the name tables print, with pytorch-ood's own settings or those of `SETTINGS`."""

SETTINGS: dict[str, Setting] = {
    "GMM": Setting("reg", 1e-6, (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)),
    "ViM": Setting("d", 0.5, (0.125, 0.25, 0.5, 0.75, 0.875)),
    "DICE": Setting("p", 0.7, (0.1, 0.3, 0.5, 0.7, 0.9)),
    "LTS": Setting("p", 0.05, (0.01, 0.05, 0.1, 0.25, 0.5)),
    "NNGuide": Setting("k", 10, (1, 5, 10, 50, 100)),
    "NCI": Setting("alpha", 0.0, (0.0, 1e-4, 1e-3, 1e-2, 1e-1)),
    "ReAct": Setting("p", 0.9, (0.8, 0.85, 0.9, 0.95, 0.99)),
    "ASH-S": Setting("p", 0.65, (0.65, 0.75, 0.85, 0.9, 0.95)),
    "ASH-B": Setting("p", 0.65, (0.65, 0.75, 0.85, 0.9, 0.95)),
    "SCALE": Setting("p", 0.65, (0.65, 0.75, 0.85, 0.9, 0.95)),
    "VRA": Setting("p", 0.99, (0.85, 0.9, 0.95, 0.975, 0.99)),
    "GEN": Setting("gamma", 0.1, (0.01, 0.1, 0.5, 1.0, 2.0)),
    "OpenMax": Setting("tail", 25, (10, 25, 50, 100, 200)),
}
"""What is tuned, with its default: what GMM adds to its covariance's diagonal, ViM's subspace as a share of the dimensions
(its paper: 1000 of 2048), the share of weights DICE drops (its paper's ImageNet setting), the share of activations LTS sums,
NNGuide's neighbours, the weight of the feature's norm in NCI, the quantiles that ReAct and VRA (both ends) clip at, the share
of activations ASH and SCALE count as small, GEN's exponent, the distances OpenMax fits a class's tail to. The others have no
setting."""


EVERY_CLASS = ("SHE",)
"""Detectors that look up the predicted class among those of the training images."""


def _principal(at: Fitting) -> int:
    return min(max(1, int(at.value * at.head.in_features)), at.head.in_features - 1)


@dataclass
class Detectors:
    """Fitted detectors, and those that could not be: `left_out` says why, by name."""

    head: nn.Linear
    fitted: dict[str, Score] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def scores(self, features: Array) -> dict[str, np.ndarray]:
        """Every fitted detector's score of features [N, D]: float32 [N], higher = OOD.

        One that fails, or is not finite on all rows, is missing, and `left_out` says why. Raises DataError for another width.
        """
        x = _tensor(finite("features", features, 2))
        if x.shape[1] != self.head.in_features:
            raise DataError(f"these features have {x.shape[1]} dimensions; fitted were {self.head.in_features}")
        result = {}
        for name, score in self.fitted.items():
            try:
                with torch.no_grad(), quiet():
                    parts = [score(rows, self.head(rows)).float().cpu().numpy() for rows in x.split(ROWS)]
                result[name] = finite("its score", np.concatenate(parts)).astype(np.float32)
            except (DataError, IndexError, RuntimeError, ValueError) as error:
                self.left_out[name] = str(error) or type(error).__name__
        return result


def fit_detectors(
    training: Training, names: Sequence[str] | None = None, values: Mapping[str, float] | None = None
) -> Detectors:
    """Detectors of `names` (None: all of `DETECTORS` that the installed pytorch-ood has), fitted on training rows.

    `values`: settings by the detector's name, in place of the defaults of `SETTINGS`.
    One that cannot be fitted on these rows (a class without an image or a right prediction, a singular covariance) is left
    out, and `left_out` says so. Raises OptionError for an unknown name, PosthocError without pytorch-ood.
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
    found, missing = Detectors(head), _without_image(label, len(weight))
    for name in names or DETECTORS:
        if missing and name in EVERY_CLASS:
            found.left_out[name] = missing
            continue
        try:
            with quiet():
                value = (values or {}).get(name, SETTINGS[name].default if name in SETTINGS else 0.0)
                found.fitted[name] = DETECTORS[name](Fitting(module, z, label, logits, head, value))
        except (ValueError, AssertionError, AttributeError, RuntimeError) as error:
            found.left_out[name] = str(error) or missing or type(error).__name__
    return found


def _without_image(label: Tensor, classes: int) -> str:
    """Says which of the classes have no training image; empty where all have one."""
    absent = torch.nonzero(torch.bincount(label, minlength=classes) == 0).flatten().tolist()
    if not absent:
        return ""
    shown = ", ".join(map(str, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    return (
        f"class{'es' * (len(absent) > 1)} {shown} of {classes} {'have' if len(absent) > 1 else 'has'} no training image"
    )


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


class quiet:
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
