"""Makes an adapter of the zoo: fits it, measures it on images that nothing was fitted on, and writes its card and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.backbone import Backbone, build_backbone
from ..adapters.data import open_source
from ..adapters.distributed import check_launch
from ..adapters.errors import DataError
from ..adapters.features import Features
from ..adapters.model import load, wrap
from ..adapters.source_base import LABEL_COLUMNS, Source
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
    command: str | None = None,
    resamples: int = 1000,
) -> Path:
    """Fit, evaluate and describe one adapter; returns its folder, OUTPUT/NAME.

    Args:
        data, ood: other places of the images, and of the OOD sets, than the list's.
        command: what asks for it, for the card.
        checkpoint: the backbone's weights, where its own cannot be downloaded; such an adapter is loaded with `backbone=`.

    Raises DataError where the images have no labels of the backbone's classes.
    """
    backbone = build_backbone(entry.backbone, pretrained=checkpoint is None, checkpoint=checkpoint, device=device)
    source = open_source(data or entry.images, entry.split)
    features = backbone.extract(source)
    label = classifier_labels(features, class_names(source), backbone)
    features = dataclasses.replace(features, label=label)
    fitting, back = split(label, entry.held_back, entry.seed)
    # a third of what is held back is for the temperature of the softmax beside the head
    tuning, scored = (back[rows] for rows in split(label[back], 2 / 3, entry.seed))
    model = wrap(backbone, entry.head, **OPTIONS.get(entry.head, {}))
    model.fit(features[fitting], positives="labels", seed=entry.seed)
    model.fitted_on["fit"]["command"] = command or f"posthoc zoo build {entry.name}"
    folder = Path(model.save_pretrained(output / entry.name))
    loaded = load(folder, backbone=backbone)
    outside = [read(place, loaded) for place in ood or entry.ood]
    told = f"{Path(data or entry.images).stem}, held back"
    write_report(
        folder / FOLDER,
        inside=from_features(told, features[scored], loaded),
        outside=outside,
        held_out=from_features(f"{told} too", features[tuning]),
        resamples=resamples,
        seed=entry.seed,
    )
    check_launch().on_main(lambda: write_card(folder, f"zoo/{entry.name}"))
    return folder


def split(label: np.ndarray, held_back: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on, and rows held back: that share of every class, drawn by the seed; both in order."""
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    place = np.concatenate([np.arange(n) for n in np.unique(label, return_counts=True)[1]])
    count = np.bincount(label)[label[order]]
    back = place < np.round(held_back * count)
    return np.sort(order[~back]), np.sort(order[back])


def class_names(source: Source) -> list[str] | None:
    """What the data call their classes, in the order of their labels; None where they do not tell."""
    if getattr(source, "classes", None):
        return list(source.classes)  # type: ignore[attr-defined]
    columns: dict[str, Any] = getattr(getattr(source, "plain", None), "features", None) or {}
    label: Any = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    return list(label.names) if getattr(label, "names", None) else None


def classifier_labels(features: Features, names: Sequence[str] | None, backbone: Backbone) -> np.ndarray:
    """Labels [N] as the backbone's classifier counts: where classes are named by WordNet id, the place of that id among its own.

    Raises DataError where there are no labels, or a name that is not among the classifier's.
    """
    if features.label is None or np.asarray(features.label).ndim != 1:
        raise DataError("the zoo's adapters need images with class labels")
    label = np.asarray(features.label)
    if not names or not all(one[:1] == "n" and one[1:].isdigit() and len(one) == 9 for one in names):
        return _checked(label, features, backbone)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(backbone.module)
    known = {one: k for k, one in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
    missing = sorted(set(names) - set(known))
    if missing:
        raise DataError(
            f"{backbone.name} has no classes {', '.join(missing[:3])}: the images' labels are not its classes"
        )
    return _checked(np.array([known[one] for one in names])[label], features, backbone)


def _checked(label: np.ndarray, features: Features, backbone: Backbone) -> np.ndarray:
    right = (np.asarray(features.logits).argmax(1) == label).mean()
    share = np.unique(label, return_counts=True)[1].max() / len(label)
    if right <= min(2 * share, 0.5):
        raise DataError(
            f"{backbone.name} is right for {right:.1%} of the images: their labels are not its classes. Folders or classes named "
            "by WordNet id (n01440764) are understood; other labels must be the classifier's numbers"
        )
    return label
