"""What a pretrained encoder is worth: linear evaluation, nearest neighbours, other sets told from its own, a look at the ends.

train, test = (encode(network, images, device) for images in (train_images, test_images))
worth(train, test, seed)                                  # {"linear": ..., "nearest_feature": ..., ...}
others, notes = other_sets(dataset, folder, most, test_images)  # every named set that is at hand
tables = ood_tables(scores, {name: scores_of(one) for name, one in others.items()}, seed)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..adapters.errors import DataError
from ..adapters.source_base import Item, Source, digest
from ..adapters.source_loader import load_image
from ..adapters.training_loop import step_generator
from ..eval.dataset_classes import CLASSES, UNREMOVED, shared_classes
from ..eval.datasets import SETS, open_named
from ..eval.ood import ood_table
from ..eval.plots import Strip, gallery, page
from ..eval.probe_protocols import TAU, sgd_probe, tau_nearest_label
from ..eval.probes import linear_probe, nearest_label, top_k_accuracy
from .view_batches import Images, Labelled

PROBE = 500  # place of the random numbers
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


def worth(train: Encoded, test: Encoded, seed: int, views: Sequence[np.ndarray] | None = None) -> dict[str, float]:
    """Shares of right test labels, 0 to 1: of a linear classifier, and of the nearest training image by cosine.

    views: projections [N, D] of two augmented views of the training images. With them also TaU's own protocols: its optimiser,
    whose learning rate is very low for a probe, on the features as they are (its training views are augmented, ours are not), and
    its neighbours, of both views' mean, and of the first alone, whose rows are not normalised.
    """
    logits, _ = linear_probe(train.feature, train.label, test.feature, seed=seed)
    found = {"linear": top_k_accuracy(logits, test.label)}
    for name in ("feature", "projection"):
        near = nearest_label(getattr(train, name), train.label, getattr(test, name))
        found[f"nearest_{name}"] = float((near == test.label).mean())
    if views is not None:
        logits = sgd_probe(train.feature, train.label, test.feature, TAU, step_generator(seed, PROBE))
        found["linear_papers_sgd_unaugmented"] = top_k_accuracy(logits, test.label)
        for count, name in ((2, "nearest_papers_two_views"), (1, "nearest_papers_one_view")):
            near = tau_nearest_label(views[:count], train.label, [test.projection] * count)
            found[name] = float((near == test.label).mean())
    return found


class Chosen(Source):
    """Some rows of another source, int64 [n], in that order."""

    kind = "rows of a source"

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.name, self.length = source.name, len(rows)

    def item(self, row: int) -> Item:
        return self.source.item(int(self.rows[row]))

    def _fingerprint(self, progress: bool) -> str:
        return digest("rows", self.source.fingerprint(progress), self.rows)


def other_sources(dataset: str, data_dir: Path | None, most: int) -> tuple[dict[str, Chosen], dict[str, str]]:
    """The test images of every other named set that is at hand, and notes by the set's name.

    At most so many of each, evenly spread over the set. Images of classes that both sets have are left out
    (`eval.dataset_classes`). A set whose files are damaged is left out, and the note says why.
    """
    found: dict[str, Chosen] = {}
    notes: dict[str, str] = {}
    for name in SETS:
        if name == dataset:
            continue
        try:
            source = open_named(name, "test", data_dir)
        except DataError as error:
            if " are not in " not in str(error):  # there, and damaged
                notes[name] = str(error)
            continue
        rows, note = _rows_of_other_classes(dataset, name, source)
        found[name] = Chosen(source, spread_over(rows, most))
        if note:
            notes[name] = note
    return found, notes


def spread_over(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]


def _rows_of_other_classes(inside: str, name: str, source: Source) -> tuple[np.ndarray, str]:
    assert source.length is not None
    rows = np.arange(source.length)
    shared = shared_classes(inside, name)
    if not shared:
        return rows, UNREMOVED.get(frozenset((inside, name)), "")
    odd = np.isin(source.column("label"), [CLASSES[name].index(one) for one in shared])
    return rows[~odd], f"without {odd.sum()} images of classes that {inside} has too"


def other_sets(
    dataset: str, data_dir: Path | None, most: int, like: Images
) -> tuple[dict[str, Images], dict[str, str]]:
    """`other_sources` in the shape of `like`: resized by their shorter side and cut to the middle."""
    sources, notes = other_sources(dataset, data_dir, most)
    return {name: shaped_like(source, like) for name, source in sources.items()}, notes


def shaped_like(source: Source, like: Images) -> Images:
    """The images of a source, resized (bilinear, antialiased) and cut to the size and the colours of `like`; labels are rows."""
    channels, size = like.pixels.shape[1], like.pixels.shape[2]
    pixels = torch.empty(len(source), channels, size, size, dtype=torch.uint8)
    for row in range(len(source)):
        image = load_image(source.item(row).image)
        if not isinstance(image, Image.Image):
            raise DataError(f"{source.name} holds tensors; expected images")
        pixels[row] = _square(image.convert("L" if channels == 1 else "RGB"), size)
    return Images(pixels, np.arange(len(source)))


def _square(image: Image.Image, size: int) -> Tensor:
    scale = size / min(image.size)
    width, height = (max(size, round(scale * side)) for side in image.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    small = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    array = np.array(small)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def ood_tables(
    inside: Mapping[str, np.ndarray],
    outside: Mapping[str, Mapping[str, np.ndarray]],
    seed: int,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The OOD table of each other set, JSON-able: AUROC and more of each score with intervals; kNN is the reference."""
    tables = {}
    for name, scores in outside.items():
        table = ood_table(inside, scores, name=name, reference="kNN", resamples=RESAMPLES, seed=seed)
        note = (notes or {}).get(name)
        tables[name] = table.noted(*([note] if note else [])).as_dict()
    return tables


def save_scores(folder: Path, scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """The scores of each set's images as files SET.npz that `posthoc eval ood` reads, in the order of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in scores.items():
        arrays: dict[str, Any] = dict(one)
        np.savez(folder / f"{Path(name).name}.npz", **arrays)


def auroc(tables: Mapping[str, Any], name: str, score: str) -> float:
    """The AUROC of one score against one set, out of `ood_tables`: 1 where it is higher for all images of the other set."""
    return float(tables[name]["scores"][score]["auroc"]["value"])


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
    with page(path, 15.0, 0.9 * len(rows) + 1.1) as figure:
        gallery(figure, rows, "Certain and uncertain")


def picture_of(images: Images) -> Callable[[int], np.ndarray]:
    """A row's image for `certainty_grid`."""
    return lambda row: images.pixels[row].permute(1, 2, 0).numpy().squeeze()
