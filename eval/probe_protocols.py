"""The papers' own probe protocols, on stored features: to compare with their numbers, not to be preferred.

TaU (Zhang et al., arXiv 2110.04403) and Decoupled Uniformity (Dufumier et al., ICML 2023, arXiv 2206.01646). Both train
on freshly augmented images in some of these protocols; stored features hold the views they were extracted with. Decoupled
Uniformity reports ImageNet100's best epoch on the test set; here it is the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..adapters.errors import DataError, OptionError
from .arrays import Array, as_numpy, finite, same_rows
from .extras import require
from .probes import nearest_label
from .search import as_unit


@dataclass(frozen=True)
class SgdProbe:
    """How a paper trains a linear softmax classifier by SGD with momentum.

    Attributes:
        schedule: of the learning rate, a step an epoch: `cosine` to 0, or `plateau`, a tenth of it whenever the mean
            training loss has not fallen for more than 10 epochs (torch's ReduceLROnPlateau).
        settled: None, or stop after epoch 20 when the last ten training losses are all within this of their mean.
    """

    lr: float
    epochs: int
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    settled: float | None = None


TAU = SgdProbe(lr=1e-4, epochs=100, batch_size=256, weight_decay=1e-6)
"""TaU's linear evaluation, on pooled features before the projection; its learning rate is very low for a probe."""
IMAGENET100 = SgdProbe(lr=0.2, epochs=150, batch_size=512, schedule="plateau")
"""Decoupled Uniformity's on ImageNet100."""
DECOUPLED_LARGE = SgdProbe(lr=0.1, epochs=300, batch_size=512, schedule="plateau", settled=1e-4)
"""Decoupled Uniformity's elsewhere from 20,000 images on, for each weight decay of its grid."""
DECAYS = (0.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
STRENGTHS = (0.1, *(10.0**p for p in range(7)))
"""Its grid of scikit-learn's C below 20,000 images."""
LARGE, FOLDS, SAGA_STEPS = 20_000, 3, 150


def sgd_probe(
    features: Array, label: Array, test: Array, protocol: SgdProbe, generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> np.ndarray:  # fmt: skip
    """Logits float32 [M, C] of test features [M, P] under the probe trained on features [N, P], label int [N].

    Features are taken as they are; the classifier starts as torch's Linear does. The generator (on the CPU) draws it and the
    batches; device: where they are computed, which all features must fit. Raises DataError for shapes, labels, numbers that
    are not finite, or a loss that is not.
    """
    x, y, other = (tensor.to(device) for tensor in _tensors(features, label, test))
    weight, bias = _train(x, y, protocol, generator)
    return (other @ weight.T + bias).cpu().numpy()


def decoupled_uniformity_probe(
    features: Array, label: Array, test: Array, generator: torch.Generator, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Scores [M, C] under its protocol for all sets but ImageNet100: a grid scored by balanced accuracy in three folds.

    Below 20,000 images logistic regression by saga (on the CPU), stopped after 150 steps, C from the grid 0.1 to 1e6, giving
    log probabilities; from there on `DECOUPLED_LARGE`, weight decay from its grid, giving logits. Refitted on all rows.

    Raises as `sgd_probe`, and DataError for a class with fewer than three images.
    """
    x, y, other = _tensors(features, label, test)
    classes, rows = torch.unique(y, return_counts=True)
    if len(rare := classes[rows < FOLDS].tolist()):
        raise DataError(f"classes {rare[:5]} have fewer than {FOLDS} images: they cannot be in every fold")
    selection = require("sklearn.model_selection", "scikit-learn")
    if len(x) < LARGE:
        return _saga(x.numpy(), y.numpy(), other.numpy(), generator)
    metrics = require("sklearn.metrics", "scikit-learn")
    folds = list(selection.StratifiedKFold(FOLDS).split(x, y))
    own, truth = x.to(device), y.to(device)
    scores = []
    for decay in DECAYS:
        protocol, found = replace(DECOUPLED_LARGE, weight_decay=decay), []
        for fit, check in folds:
            weight, bias = _train(own[fit], truth[fit], protocol, generator)
            said = (own[check] @ weight.T + bias).argmax(1).cpu()
            found.append(metrics.balanced_accuracy_score(y[check], said))
        scores.append(np.mean(found))
    best = replace(DECOUPLED_LARGE, weight_decay=DECAYS[int(np.argmax(scores))])
    return sgd_probe(x, y, other, best, generator, device)


def tau_nearest_label(views: Sequence[Array], label: Array, test_views: Sequence[Array]) -> np.ndarray:
    """TaU's 1-NN on projection outputs: int64 [M], the label of the largest dot product.

    Args:
        views: two arrays [N, D] (the mean of their normalised rows, not normalised again) or one (rows as they are, the
            baselines' `--one-view`). test_views: as many, [M, D].

    Raises OptionError for other numbers of views, DataError as `probes.nearest_label`.
    """
    if len(views) not in (1, 2) or len(test_views) != len(views):
        raise OptionError(f"{len(views)} and {len(test_views)} views were given; expected one or two of each")
    train, test = (_merged(v) for v in (views, test_views))
    return nearest_label(train, label, test, normalise=False)


def _merged(views: Sequence[Array]) -> np.ndarray:
    rows = [finite(f"view {i + 1}", view, 2) for i, view in enumerate(views)]
    if len(rows) == 1:
        return rows[0]
    same_rows(view_1=rows[0], view_2=rows[1])
    return (as_unit(rows[0]) + as_unit(rows[1])) / 2


def _tensors(features: Array, label: Array, test: Array) -> tuple[Tensor, Tensor, Tensor]:
    x, y, other = finite("the features", features, 2), as_numpy(label), finite("the test features", test, 2)
    same_rows(features=x, label=y)
    if y.ndim != 1 or y.dtype.kind not in "iu" or y.min() < 0 or y.min() == y.max():
        raise DataError(
            f"labels [N] must be whole numbers from 0, of two classes or more; these are {y.dtype} {y.shape}"
        )
    if x.shape[1] != other.shape[1]:
        raise DataError(f"the features have {x.shape[1]} dimensions and the test features {other.shape[1]}")
    return torch.from_numpy(x).float(), torch.from_numpy(y.astype(np.int64)), torch.from_numpy(other).float()


def _train(x: Tensor, y: Tensor, protocol: SgdProbe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    bound = 1.0 / math.sqrt(x.shape[1])
    shapes = [(int(y.max()) + 1, x.shape[1]), (int(y.max()) + 1,)]
    drawn = [(2.0 * torch.rand(shape, generator=generator) - 1.0) * bound for shape in shapes]
    layer = [one.to(x.device).requires_grad_() for one in drawn]
    optimizer = torch.optim.SGD(layer, lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if protocol.schedule == "plateau":
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    elif protocol.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs)
    else:
        raise OptionError(f"schedule={protocol.schedule!r} was given; expected 'cosine' or 'plateau'")
    losses: list[float] = []
    for epoch in range(protocol.epochs):
        seen: list[Tensor] = []  # read once an epoch: a GPU waits for nothing
        batches = torch.randperm(len(x), generator=generator).to(x.device).split(protocol.batch_size)
        for rows in batches:
            loss = torch.nn.functional.cross_entropy(x[rows] @ layer[0].T + layer[1], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        each = torch.tensor([len(rows) for rows in batches], dtype=torch.float64)
        losses.append(float(torch.stack(seen).cpu().double() @ each) / len(x))
        if not math.isfinite(losses[-1]):
            raise DataError(f"the probe's loss is {losses[-1]} in epoch {epoch + 1}: scale the features down")
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            schedule.step(losses[-1])
        else:
            schedule.step()
        last = np.array(losses[-10:])
        if protocol.settled is not None and epoch >= 20 and np.abs(last.mean() - last).max() < protocol.settled:
            break
    return layer[0].detach(), layer[1].detach()


def _saga(x: np.ndarray, y: np.ndarray, test: np.ndarray, generator: torch.Generator) -> np.ndarray:
    import warnings

    linear = require("sklearn.linear_model", "scikit-learn")
    search = require("sklearn.model_selection", "scikit-learn").GridSearchCV
    seed = int(torch.randint(1 << 31, (1,), generator=generator))
    model = linear.LogisticRegression(solver="saga", max_iter=SAGA_STEPS, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=require("sklearn.exceptions", "scikit-learn").ConvergenceWarning)
        found = search(model, {"C": list(STRENGTHS)}, cv=FOLDS, scoring="balanced_accuracy").fit(x, y)
    scores = np.full((len(test), int(y.max()) + 1), -np.inf)
    with np.errstate(divide="ignore"):
        scores[:, found.classes_] = np.log(found.predict_proba(test))
    return np.maximum(scores, -1e9)  # a class without images, or of probability 0
