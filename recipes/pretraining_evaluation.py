"""What a pretrained encoder is worth: linear evaluation, nearest neighbours, other sets told from its own, a look at the ends.

train, test = (encode(network, images, device) for images in (train_images, test_images))
worth(train, test, seed)                                  # {"linear": ..., "nearest_feature": ..., ...}
tables = ood_tables(scores, {name: scores_of(one) for name, one in others.items()}, seed)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.errors import DataError
from ..adapters.linear_probe import held_out_by_seed
from ..adapters.training_loop import step_generator
from ..eval.inputs import not_constant
from ..eval.ood import ood_table
from ..eval.ood_statistics import OodMetrics
from ..eval.plots import Strip, gallery, page
from ..eval.probe import widened
from ..eval.probe_protocols import FOLDS, TAU, sgd_probe, tau_nearest_label
from ..eval.probes import linear_probe, nearest_label, top_k_accuracy
from ..eval.table import Table
from .view_batches import Images, Labelled

PROBE = 500  # place of the random numbers
SETTLING = 2048
"""Images that BatchNorm's statistics of a random network are taken from."""
RESAMPLES = 200
"""Bootstrap samples of an OOD table."""
SHOWN = 12
"""Images at each end of a grid."""


@dataclass(frozen=True)
class Encoded:
    """Images by a network: pooled features float32 [N, F], projections [N, D], labels int64 [N] (or whatever they were)."""

    feature: np.ndarray
    projection: np.ndarray
    label: np.ndarray


@torch.no_grad()
def encode(network: nn.Module, images: Labelled, device: torch.device) -> Encoded:
    """All images as they are, by a network in eval mode that answers with (features, projections)."""
    network.eval()
    parts = [network(chunk) for chunk in images.chunks(device)]
    feature, projection = (torch.cat(column).float().cpu().numpy() for column in zip(*parts, strict=True))
    return Encoded(feature, projection, images.label)


@torch.no_grad()
def settle(network: nn.Module, images: Labelled, device: torch.device) -> None:
    """Gives BatchNorm the statistics of the first images, as a trained network has them; without it nothing happens."""
    norms = [part for part in network.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.train()
    seen = 0
    for chunk in images.chunks(device) if norms else ():
        network(chunk)
        seen += len(chunk)
        if seen >= SETTLING:
            break
    network.eval()


def check_judged(label: np.ndarray, test: np.ndarray, dataset: str, seed: int, papers: bool) -> None:
    """Raises DataError where labels, of the images that are probed and of test images, are too few for what follows."""
    if label.ndim == 2:
        if not any(judgeable(label[:, place], test[:, place], seed) for place in range(label.shape[1])):
            raise DataError("no label has both positive and negative images in training and test: give more of them")
        return
    kinds, counts = np.unique(label, return_counts=True)
    if len(kinds) < 2:
        raise DataError("the images that are probed are of one class: give more --probe-images")
    if held_out := _one_sided(len(label), seed):
        raise DataError(
            f"{held_out} images that are probed are held out to choose the strength of the linear evaluation, which needs "
            "images on either side: give more --probe-images"
        )
    if papers and dataset != "imagenet100" and counts.min() < FOLDS:
        raise DataError(
            f"--papers-probe: {(counts < FOLDS).sum()} classes have fewer than {FOLDS} images, one for each fold: give more "
            "--probe-images"
        )


def _one_sided(rows: int, seed: int) -> str:
    """How many of so many rows a linear probe would hold out, in words, where those are none or all; else nothing."""
    held_out = int(held_out_by_seed(np.arange(rows), seed).sum())
    return "" if 0 < held_out < rows else f"{held_out} of {rows}"


def judgeable(label: np.ndarray, test: np.ndarray, seed: int) -> bool:
    """Whether a label, 0, 1 and NaN, can be learnt from training images and judged on test images."""
    return _both(label) and _both(test) and not _one_sided(int((~np.isnan(label)).sum()), seed)


def _both(label: np.ndarray) -> bool:
    return bool((label == 0).any() and (label == 1).any())


def worth(
    train: Encoded,
    test: Encoded,
    seed: int,
    views: Sequence[np.ndarray] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Shares of right test labels, 0 to 1: of a linear classifier (fitted on the device), and of the nearest training image by
    cosine.

    views: projections [N, D] of two augmented views of the training images. With them also TaU's own protocols: its optimiser,
    whose learning rate is very low for a probe, on the features as they are (its training views are augmented, ours are not), and
    its neighbours, of both views' mean, and of the first alone, whose rows are not normalised.
    """
    classes = int(max(train.label.max(), test.label.max())) + 1
    logits, _ = linear_probe(train.feature, train.label, test.feature, seed=seed, device=device)
    found = {"linear": top_k_accuracy(widened(logits, classes), test.label)}
    for name in ("feature", "projection"):
        near = nearest_label(getattr(train, name), train.label, getattr(test, name))
        found[f"nearest_{name}"] = float((near == test.label).mean())
    if views is not None:
        logits = sgd_probe(train.feature, train.label, test.feature, TAU, step_generator(seed, PROBE), device)
        found["linear_papers_sgd_unaugmented"] = top_k_accuracy(widened(logits, classes), test.label)
        for count, name in ((2, "nearest_papers_two_views"), (1, "nearest_papers_one_view")):
            near = tau_nearest_label(views[:count], train.label, [test.projection] * count)
            found[name] = float((near == test.label).mean())
    return found


def ood_tables(
    inside: Mapping[str, np.ndarray],
    outside: Mapping[str, Mapping[str, np.ndarray]],
    seed: int,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The OOD table of each other set, JSON-able: AUROC and more of each score with intervals; kNN is the reference.

    `left_out` of a table says which scores it has no row for, since they are one number for all images, and why.
    """
    tables = {}
    for name, scores in outside.items():
        left_out = constant(inside, scores)
        one, other = ({key: x for key, x in part.items() if key not in left_out} for part in (inside, scores))
        note = (notes or {}).get(name)
        if one or other:
            table = ood_table(one, other, name=name, reference="kNN", resamples=RESAMPLES, seed=seed)
        else:
            table = Table(name, OodMetrics.NAMES, {})
        tables[name] = {**table.noted(*([note] if note else [])).as_dict(), "left_out": left_out}
    return tables


def constant(inside: Mapping[str, np.ndarray], outside: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The scores that are one number for all images of both sets, and the words for it."""
    found = {}
    for name in [name for name in inside if name in outside]:
        try:
            not_constant({name: (inside[name], outside[name])})
        except DataError as error:
            found[name] = str(error)
    return found


def save_scores(folder: Path, scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """The scores of each set's images as files SET.npz that `posthoc eval ood` reads, in the order of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in scores.items():
        arrays: dict[str, Any] = dict(one)
        np.savez(folder / f"{Path(name).name}.npz", **arrays)


def scores_in(tables: Mapping[str, Any]) -> list[str]:
    """The scores that any of `ood_tables` has a row for."""
    return list(dict.fromkeys(score for table in tables.values() for score in table["scores"]))


def auroc(tables: Mapping[str, Any], name: str, score: str) -> float:
    """The AUROC of one score against one set, out of `ood_tables`: 1 where it is higher for all images of the other set; NaN
    where the score is left out."""
    rows = tables[name]["scores"]
    return float(rows[score]["auroc"]["value"]) if score in rows else np.nan


def certainty_grid(
    path: Path,
    picture: Callable[[int], np.ndarray],
    label: np.ndarray,
    scores: Mapping[str, np.ndarray],
    words: Sequence[str] | None = None,
) -> None:
    """The most and the least certain images of each score, into a file.

    Args:
        picture: a row's image, [H, W, 3] or [H, W]. label: int [N]. words: what stands for a label.
    """
    rows = []
    for name, score in scores.items():
        order = np.argsort(score, kind="stable")
        strips = []
        for title, end in (("most certain", order[:SHOWN]), ("least certain", order[::-1][:SHOWN])):
            below = [words[label[row]] if words else str(label[row]) for row in end]
            strips.append(Strip(title, [picture(int(row)) for row in end], below, [False] * len(end)))
        rows.append((name, strips[0], strips[1]))
    with page(path, 15.0, 0.75 * len(rows) + 0.9) as figure:
        gallery(figure, rows, "Certain and uncertain")


def picture_of(images: Images) -> Callable[[int], np.ndarray]:
    """A row's image for `certainty_grid`."""
    return lambda row: images.pixels[row].permute(1, 2, 0).numpy().squeeze()
