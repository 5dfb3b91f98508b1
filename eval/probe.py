"""What a frozen representation is worth on labelled images: linear probe, weighted neighbours, 1-NN, papers' protocols.

    posthoc eval probe --train train.npz --data test.npz
    posthoc eval probe --train train.npz --data test.npz --protocol tau decoupled-uniformity

Every choice is made on training rows; test rows only count. Intervals are over test images, the probe held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..adapters.errors import DataError, OptionError
from .command import TableCommand, run_command
from .inputs import Scored, open_model, overlap, read
from .probe_protocols import IMAGENET100, TAU, decoupled_uniformity_probe, sgd_probe, tau_nearest_label
from .probes import linear_probe, nearest_label, neighbour_votes, ranks_of_truth
from .retrieval_statistics import KnownMeans
from .table import Table, fill

REFERENCE = "linear"
TOP = 5
PROTOCOLS: Mapping[str, str] = {
    "tau": "TaU's linear probe (SGD, 100 epochs, learning rate 1e-4)",
    "tau-1nn": "TaU's 1-NN by dot product, rows as they are (its one-view form)",
    "decoupled-uniformity": "Decoupled Uniformity's, hyperparameter by balanced accuracy in three folds",
    "decoupled-uniformity-imagenet100": "Decoupled Uniformity's on ImageNet100 (SGD, 150 epochs, its last one)",
}


def probe_table(
    scores: Mapping[str, np.ndarray],
    label: np.ndarray,
    *,
    name: str = "probe",
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """Top-1 and top-5 accuracy of class scores [M, C], or of predicted classes [M], by name; labels int [M].

    Differences are paired. Top-5 only with more than five classes and for scores. Raises DataError for labels that do
    not fit.
    """
    values: dict[str, np.ndarray] = {}
    metrics: tuple[str, ...] = ("accuracy",)
    for key, one in scores.items():
        if one.ndim == 1:
            values[key] = np.stack([one == label, np.full(len(label), np.nan)], 1).astype(float)
        else:
            rank = ranks_of_truth(one, label)
            values[key] = np.stack([rank < 1, rank < TOP], 1).astype(float)
    cells = fill({k: KnownMeans(v[:, :1]) for k, v in values.items()}, metrics, (), reference, resamples, seed)
    ranked = {k: KnownMeans(v[:, 1:]) for k, v in values.items() if scores[k].ndim == 2 and scores[k].shape[1] > TOP}
    if ranked:
        metrics = ("accuracy", f"top_{TOP}")
        for key, row in fill(ranked, metrics[1:], (), reference, resamples, seed).items():
            cells[key].update(row)
    notes = [f"{len(label)} test images"]
    if reference in scores:
        notes.append(f"marked: better than {reference} on the same resampled images, beyond the 95 % interval")
    about = {"set": name, "rows": len(label), "reference": reference, "seed": seed}
    return Table(name, metrics, cells, tuple(notes), about)


def run_probes(
    train: np.ndarray,
    label: np.ndarray,
    test: np.ndarray,
    *,
    k: int = 20,
    protocols: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Scores [M, C] or classes [M] of test features [M, P] by the probe's name, and notes on what was chosen.

    Raises OptionError for an unknown protocol, DataError as the probes.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise OptionError(f"protocol {protocol!r} is unknown; expected one of {', '.join(PROTOCOLS)}")
    k = min(k, len(train))
    logits, probe = linear_probe(train, label, test, seed=seed, device=device)
    found: dict[str, np.ndarray] = {"linear": logits}
    notes = [
        f"linear: L2 strength {probe.strength:g} on standardised features, chosen from 1 to 1e-6 on a seeded fifth of the "
        f"training rows (cross-entropy there {probe.held_out_nll:.4f}), fitted on all {len(train)}",
    ]
    if probe.strength in (1.0, 1e-6):
        notes.append("the chosen strength is at the end of its path: a better one may lie beyond")
    found[f"kNN (k={k})"] = neighbour_votes(train, label, test, k=k)
    found["1-NN"] = nearest_label(train, label, test)
    notes.append("kNN and 1-NN by cosine; votes weigh exp((cosine - 1) / 0.07)")
    for protocol in protocols:
        found[protocol] = _protocol(protocol, train, label, test, seed, device)
        notes.append(f"{protocol}: {PROTOCOLS[protocol]}")
    return found, notes


def _protocol(
    name: str, train: np.ndarray, label: np.ndarray, test: np.ndarray, seed: int, device: torch.device | str
) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    every: dict[str, Callable[[], np.ndarray]] = {
        "tau": lambda: sgd_probe(train, label, test, TAU, generator, device),
        "tau-1nn": lambda: tau_nearest_label([train], label, [test]),
        "decoupled-uniformity": lambda: decoupled_uniformity_probe(train, label, test, generator, device),
        "decoupled-uniformity-imagenet100": lambda: sgd_probe(train, label, test, IMAGENET100, generator, device),
    }
    return every[name]()


@dataclass
class Probe(TableCommand):
    """Measure what frozen features are worth: probes fitted on training images, accuracy on others.

    Example: posthoc eval probe --train train.npz --data test.npz"""

    train: str
    """labelled images the probes are fitted on: score file (.npz) with embedding and label, stored features, images"""
    data: str
    """labelled images they are tested on, as --train"""
    model: str | None = None
    """adapter folder or timm name, for images"""
    features: Literal["embedding", "penultimate"] = "embedding"
    """what is probed"""
    k: int = 20
    """of the weighted neighbours"""
    protocol: tuple[str, ...] = ()
    """papers' own protocols as well: tau, tau-1nn, decoupled-uniformity, decoupled-uniformity-imagenet100"""
    reference: str = REFERENCE
    """probe that paired differences are taken from"""

    def run(self) -> None:
        if self.k < 1:
            raise OptionError(f"--k {self.k} was given; expected at least 1")
        model = open_model(self.model, self.checkpoint, self.device)
        train, test = read(self.train, model, "train"), read(self.data, model, self.split)
        (x, y), (other, truth) = (_rows(one, self.features) for one in (train, test))
        notes = []
        shared = overlap(test, train)[0]
        if len(shared) == test.rows:
            raise DataError(
                f"every image of {test.name} is also in {train.name}: probes would be tested on what they know"
            )
        if shared:
            notes.append(f"{len(shared)} of {test.rows} test images are also training images (first: row {shared[0]})")
        unseen = ~np.isin(truth, y)
        if unseen.all():
            raise DataError(f"no class of {test.name} occurs in {train.name}: are these the same classes?")
        if unseen.any():
            notes.append(f"{int(unseen.sum())} test images are of classes without a training image, and always wrong")
        if other.shape[1] != x.shape[1]:
            raise DataError(f"{train.name} has {x.shape[1]} dimensions and {test.name} {other.shape[1]}")
        classes = np.unique(np.concatenate([y, truth]))  # probes take classes 0 to C - 1
        dense, target = np.searchsorted(classes, y), np.searchsorted(classes, truth)
        scores, more = run_probes(
            x, dense, other, k=self.k, protocols=self.protocol, seed=self.seed, device=self.device or "cpu"
        )
        scores = {key: widened(one, len(classes)) for key, one in scores.items()}
        table = probe_table(
            scores, target, name=f"{test.name}: probes of {train.name}", reference=self.reference,
            resamples=self.resamples, seed=self.seed,
        )  # fmt: skip
        more.insert(0, f"{train.rows} training images of {len(np.unique(y))} classes, {x.shape[1]} dimensions")
        self.show([table.noted(*more, *notes)])


def _rows(one: Scored, table: str) -> tuple[np.ndarray, np.ndarray]:
    one.need(table, "label")
    label = np.asarray(one.label)
    if label.ndim != 1 or label.dtype.kind not in "iuUS":
        raise DataError(f"{one.name}: a probe needs one class for each image; labels are {label.dtype} {label.shape}")
    return np.asarray(getattr(one, table)), label


def widened(scores: np.ndarray, classes: int) -> np.ndarray:
    """Classes that no training image has get the lowest score of all."""
    if scores.ndim == 1 or scores.shape[1] == classes:
        return scores
    missing = np.full((len(scores), classes - scores.shape[1]), scores.min() - 1.0, scores.dtype)
    return np.concatenate([scores, missing], 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval probe`."""
    run_command(Probe, "posthoc eval probe", arguments)


if __name__ == "__main__":
    main()
