"""Pieces that several heads share: a small network on standardised features, and the source of positive pairs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, OptionError
from ..linear_probe import inverse_deviation
from ..positives import FeatureTable, LabelPairs, PairSource, SoftLabelPairs, ViewPairs
from ..training import step_generator
from .base import FitData, Head


class StandardisedNet(nn.Module):
    """A small network on standardised features [B, D]; the subclass answers in `read`."""

    center: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.read((x - self.center) * self.scale)

    def read(self, x: Tensor) -> Tensor:
        """Standardised features [B, D] -> [B]."""
        raise NotImplementedError

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Take the fitting rows' mean and standard deviation; dimensions that never move are switched off."""
        self.center.copy_(mean)
        self.scale.copy_(inverse_deviation(std))


class ScalarNet(StandardisedNet):
    """Features [B, D] -> one number [B], by a perceptron whose size keeps an adapter under 1 MB."""

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__(dim)
        widths = [dim] + [width] * depth
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def read(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


class LogSumExpNet(StandardisedNet):
    """Features [B, D] -> one number [B], a scaled log mean exp of linear scores.

    It is convex: high where one score stands out, low between the places where several compete, which is where images
    are ambiguous. On CIFAR-10 features a head with it ranks images better than one with a perceptron of the same size.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(dim)
        self.scores = nn.Linear(dim, width)
        self.log_gain = nn.Parameter(torch.zeros(()))

    def read(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return (scores.logsumexp(-1) - math.log(scores.shape[-1])) * self.log_gain.exp()


def moments(array: np.ndarray, rows: np.ndarray, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per dimension of the rows of [N, D] or [N, V, D], in float64 sums, chunked."""
    total = squares = np.zeros(array.shape[-1])
    count = 0
    for i in range(0, len(rows), chunk):
        x = np.asarray(array[rows[i : i + chunk]], dtype=np.float64).reshape(-1, array.shape[-1])
        total = total + x.sum(0)
        squares = squares + (x * x).sum(0)
        count += len(x)
    mean = total / count
    variance = np.maximum(squares / count - mean * mean, 0.0)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


def pair_sources(data: FitData) -> tuple[FeatureTable, PairSource, PairSource]:
    """The table and the sources of pairs among the fitting and among the held-out rows."""
    table, source = _pairing(data)
    fitting = source(data.train)
    try:
        return table, fitting, source(data.held_out)
    except DataError as error:
        raise DataError(
            f"among the {len(data.held_out)} held-out rows (of {len(data.train) + len(data.held_out)}): {error}; hold out "
            "more with a larger validation share, or give more rows"
        ) from error


def _pairing(data: FitData) -> tuple[FeatureTable, Callable[[np.ndarray], PairSource]]:
    """The table, and what makes a source of pairs of some of its rows."""
    if data.positives == "views":
        if data.views is None:
            raise DataError("positives='views' need stored views: give images, or extract(data, views=8) and labels")
        table = FeatureTable(data.views.embedding, data.device)
        return table, partial(ViewPairs, table)
    table = FeatureTable(data.features.embedding, data.device)
    if data.positives == "ids":
        assert data.ids is not None
        return table, partial(LabelPairs, table, data.ids)
    label = data.features.label
    if label is None:
        raise DataError(f"positives={data.positives!r} need labels, and the data has none: give labels, or 'views'")
    if data.positives == "soft-labels":
        if label.ndim != 2:
            raise DataError(f"positives='soft-labels' need labels of shape [N, C]; these are {label.shape}")
        return table, partial(SoftLabelPairs, table, label)
    return table, partial(LabelPairs, table, label if label.ndim == 1 else label.argmax(1))


def held_out_loss(step: nn.Module, rows: np.ndarray, batch_size: int, seed: int) -> float:
    """Mean of a pair loss over the held-out rows, with the same pairs and draws at every call: epochs compare."""
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [b for b in batches if len(b) >= 2]
    if not batches:
        raise DataError(f"{len(rows)} held-out row(s) make no pair: hold out more rows, with a larger validation share")
    losses = [float(step(torch.from_numpy(b), step_generator(seed, 0, i))) * len(b) for i, b in enumerate(batches)]
    return sum(losses) / sum(len(b) for b in batches)


def fit_key(head: Head, data: FitData) -> str:
    """What a checkpoint belongs to: the head's options, the rows, the labels and a sample of the features."""
    digest = hashlib.sha256(json.dumps([head.name, head.config(), data.positives], sort_keys=True).encode())
    for rows in (data.train, data.held_out, data.ids):
        if rows is not None:
            digest.update(np.ascontiguousarray(rows).tobytes())
    f = data.features if data.views is None else data.views
    sample = data.train[:: max(1, len(data.train) // 1024)]
    digest.update(np.ascontiguousarray(f.embedding[sample]).tobytes())
    if data.features.logits is not None:
        digest.update(np.ascontiguousarray(data.features.logits[sample]).tobytes())
    if data.features.label is not None:
        digest.update(np.ascontiguousarray(data.features.label[data.train]).tobytes())
    return digest.hexdigest()


MAX_DEPTH = 64  # of a head's network; a stranger's config could ask for a million layers of one number each


def check_choice(head: str, option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"head {head!r}: {option}={value!r} was given; expected one of {', '.join(allowed)}")


def check_positive(head: str, **values: float | int | None) -> None:
    for option, value in values.items():
        if value is not None and (not isinstance(value, int | float) or not 0 < value < float("inf")):
            raise OptionError(f"head {head!r}: {option}={value!r} was given; expected a positive number")


def check_whole(head: str, low: int = 1, high: int | None = None, **values: int | None) -> None:
    expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    for option, value in values.items():
        if value is not None and (type(value) is not int or value < low or (high is not None and value > high)):
            raise OptionError(f"head {head!r}: {option}={value!r} was given; expected {expected}")


@dataclass
class Standardised:
    """Rows of an array [N, P], standardised when they are read, so that a memory map stays one."""

    array: np.ndarray
    center: np.ndarray
    scale: np.ndarray | np.float32
    ndim = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return (np.asarray(self.array[rows], dtype=np.float32) - self.center) * self.scale
