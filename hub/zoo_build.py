"""Makes an adapter of the zoo: fits it, measures it on images that nothing was fitted on, and writes its card and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.backbone import Backbone, build_backbone
from ..adapters.data import open_source
from ..adapters.errors import DataError
from ..adapters.features import Features
from ..adapters.model import UncertainModel, load, wrap
from ..eval.inputs import from_features, read
from ..eval.report import write_report
from .evaluation import FOLDER
from .pushing import write_card
from .zoo import Entry

OPTIONS: dict[str, dict[str, Any]] = {
    "loss": {"classifier": "backbone"},
    "laplace": {"classifier": "backbone"},
}
"""Heads that are about the classifier are about the network's own."""


def build(
    entry: Entry,
    output: Path,
    *,
    data: str | None = None,
    ood: Sequence[str] = (),
    checkpoint: Path | None = None,
    device: str | None = None,
    resamples: int = 1000,
) -> Path:
    """Fit, evaluate and describe one adapter; returns its folder, OUTPUT/NAME.

    Args:
        data, ood: other places of the images, and of the OOD sets, than the list's.
        checkpoint: the backbone's weights, where its own cannot be downloaded; such an adapter is loaded with `backbone=`.

    Raises DataError where the images have no labels of the backbone's classes.
    """
    name = entry.backbone
    backbone = build_backbone(name, pretrained=checkpoint is None, checkpoint=checkpoint, device=device)
    source = open_source(data or entry.images, entry.split)
    features = backbone.extract(source)
    features = dataclasses.replace(
        features, label=classifier_labels(features, getattr(source, "classes", None), backbone)
    )
    fitting, back = split(np.asarray(features.label), entry.held_back, entry.seed)
    model = wrap(backbone, entry.head, **{entry.head: OPTIONS[entry.head]} if entry.head in OPTIONS else {})
    model.fit(features[fitting], positives="labels", seed=entry.seed)
    model.fitted_on["fit"]["command"] = entry.command
    folder = Path(model.save_pretrained(output / entry.name))
    _evaluate(load(folder, backbone=backbone), features[back], entry, list(ood) or list(entry.ood), folder, resamples)
    write_card(folder, f"zoo/{entry.name}")
    return folder


def _evaluate(
    model: UncertainModel, back: Features, entry: Entry, ood: list[str], folder: Path, resamples: int
) -> None:
    outside = [read(place, model) for place in ood]
    inside = from_features(f"{Path(entry.images).name}, held back", back, model)
    write_report(
        folder / FOLDER,
        inside=inside,
        outside=outside,
        resamples=resamples,
        seed=entry.seed,
        command=entry.command.split(),
    )


def split(label: np.ndarray, held_back: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on, and rows held back: that share of every class, drawn by the seed; both in order."""
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    place = np.concatenate([np.arange(n) for n in np.unique(label, return_counts=True)[1]])
    count = np.bincount(label)[label[order]]
    back = place < np.round(held_back * count)
    return np.sort(order[~back]), np.sort(order[back])


def classifier_labels(features: Features, names: Sequence[str] | None, backbone: Backbone) -> np.ndarray:
    """Labels [N] as the backbone's classifier counts: where classes are named by WordNet id, the place of that id among its own.

    Raises DataError where there are no labels, or a name that is not among the classifier's.
    """
    if features.label is None or np.asarray(features.label).ndim != 1:
        raise DataError("the zoo's adapters need images with class labels")
    label = np.asarray(features.label)
    if not names or not all(one[:1] == "n" and one[1:].isdigit() and len(one) == 9 for one in names):
        return label
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(backbone.module)
    known = {one: k for k, one in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
    missing = sorted(set(names) - set(known))
    if missing:
        raise DataError(
            f"{backbone.name} has no classes {', '.join(missing[:3])}: the images' labels are not its classes"
        )
    return np.array([known[one] for one in names])[label]
