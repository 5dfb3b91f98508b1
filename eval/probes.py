"""What a frozen representation is worth on labelled images: a linear probe, weighted neighbours, the nearest one.

All take stored features and give scores [M, C] of the test images, for `top_k_accuracy` and every metric of logits. The
papers' own protocols are in `probe_protocols`.

>>> rng = np.random.default_rng(0)
>>> label = rng.integers(0, 3, 300)
>>> features = np.eye(3)[label] + 0.3 * rng.normal(size=(300, 3))
>>> scores = neighbour_votes(features[:200], label[:200], features[200:], k=10)
>>> top_k_accuracy(scores, label[200:]) > 0.9
True
"""

from __future__ import annotations

import numpy as np
import torch

from ..adapters.errors import DataError, OptionError
from ..adapters.linear_probe import LinearProbe, fit_linear_probe
from .arrays import Array, as_numpy, finite, same_rows
from .metrics import check_labels
from .search import directions, neighbours

VOTES = 1 << 22  # class scores summed at a time


def linear_probe(
    features: Array,
    label: Array,
    test: Array,
    *,
    held_out: np.ndarray | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, LinearProbe]:
    """Logits float32 [M, C] of the test features under a linear classifier fitted by L-BFGS, and that classifier.

    Args:
        features: [N, P], memory maps welcome. label: int [N], classes 0 to C - 1, or soft [N, C]. test: [M, P].
        held_out: positions of training rows that only choose the L2 strength from a path of seven. None: a seeded fifth
            does, and the probe is then fitted on all rows. Test rows choose nothing.

    Raises DataError as `adapters.linear_probe.fit_linear_probe`, which does the fitting.
    """
    probe = fit_linear_probe(as_numpy(features), as_numpy(label), held_out=held_out, seed=seed, device=device)
    rows = finite("the test features", test, 2)
    if rows.shape[1] != probe.weight.shape[1]:
        raise DataError(
            f"test features have {rows.shape[1]} dimensions; the probe was fitted on {probe.weight.shape[1]}"
        )
    return rows.astype(np.float32) @ probe.weight.numpy().T + probe.bias.numpy(), probe


def neighbour_votes(
    features: Array, label: Array, test: Array, *, k: int = 20, temperature: float | None = 0.07
) -> np.ndarray:
    """Weighted k-nearest neighbours: summed weights of each class among a test image's neighbours, float64 [M, C].

    Args:
        features: [N, P] of training images; they and the test features are normalised. label: int [N], 0 to C - 1.
        test: [M, P]. k: neighbours, 1 to N.
        temperature: a neighbour of cosine c weighs exp((c - 1) / temperature) (Wu et al., CVPR 2018); None: 1.

    Raises DataError for shapes, labels, or rows that are not finite or zero (named); OptionError for a temperature <= 0.
    """
    train, own, other = _checked(features, label, test)
    if temperature is not None and not temperature > 0.0:
        raise OptionError(f"temperature={temperature} was given; expected a number above 0, or None")
    train, other = (directions(name, rows) for name, rows in (("the features", train), ("the test features", other)))
    nearest = neighbours(other, train, k=k)
    votes = np.zeros((len(other), int(own.max()) + 1))
    step = max(1, VOTES // (k * train.shape[1]))
    for start in range(0, len(other), step):
        rows = np.arange(start, min(start + step, len(other)))
        cosine = np.einsum("mp,mkp->mk", other[rows], train[nearest[rows]])
        weight = np.ones_like(cosine) if temperature is None else np.exp((cosine - 1.0) / temperature)
        np.add.at(votes, (rows[:, None], own[nearest[rows]]), weight)
    return votes


def nearest_label(features: Array, label: Array, test: Array, *, normalise: bool = True) -> np.ndarray:
    """Label of the training image with the largest dot product with each test image, int64 [M].

    features: [N, P], label: int [N], test: [M, P]. `normalise`: cosine (1-NN); else features as they are, whose long
    rows win. Raises as `neighbour_votes`.
    """
    train, own, other = _checked(features, label, test)
    if normalise:
        train, other = (
            directions(name, rows) for name, rows in (("the features", train), ("the test features", other))
        )
    return own[neighbours(other, train)[:, 0]]


def top_k_accuracy(scores: Array, label: Array, k: int = 1) -> float:
    """Share of rows whose true class is among the k largest scores, 0 to 1; of equal scores the smaller class first.

    scores: [N, C]. label: int [N]. Raises DataError for shapes, labels or numbers that do not fit, OptionError for
    k outside 1..C.
    """
    rank = ranks_of_truth(scores, label)
    classes = as_numpy(scores).shape[1]
    if not 1 <= k <= classes:
        raise OptionError(f"k={k} was given; expected 1 to {classes}, the number of classes")
    return float((rank < k).mean())


def ranks_of_truth(scores: Array, label: Array) -> np.ndarray:
    """How many classes score higher than the true one, int64 [N], from 0; of equal scores the smaller class first.

    scores: [N, C]. label: int [N]. Raises DataError for shapes, labels or numbers that do not fit.
    """
    values, target = finite("the scores", scores, 2), as_numpy(label)
    check_labels(values, target)
    target = target.astype(np.int64)
    own = values[np.arange(len(values)), target][:, None]
    before = (values > own) | ((values == own) & (np.arange(values.shape[1]) < target[:, None]))
    return before.sum(1)


def _checked(features: Array, label: Array, test: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, own, other = finite("the features", features, 2), as_numpy(label), finite("the test features", test, 2)
    same_rows(features=train, label=own)
    if own.ndim != 1 or own.dtype.kind not in "iu" or own.min() < 0:
        raise DataError(f"labels [N] must be whole numbers from 0; these are {own.dtype} {own.shape}")
    if train.shape[1] != other.shape[1]:
        raise DataError(f"the features have {train.shape[1]} dimensions and the test features {other.shape[1]}")
    return train, own.astype(np.int64), other
