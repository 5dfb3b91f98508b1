"""What happens between `model.fit(data)` and the heads: features, checks, the split, positives, held-out scores."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .blurring import blurred_embeddings
from .checks import check_classes, check_features
from .data import Source
from .errors import BackboneError, DataError, OptionError, suggest
from .features import Features
from .heads.base import FitData, Head
from .scores import HeldOutScores
from .scoring import decisions, score
from .source_loader import load_image
from .splits import held_out_mask
from .training import TrainOptions

if TYPE_CHECKING:
    from .backbone import Backbone

POSITIVES = ("auto", "labels", "soft-labels", "views")


@dataclass(frozen=True)
class FitOptions:
    """The arguments of `UncertainModel.fit` beside the data and the training options."""

    positives: str
    views: int
    validation: float
    group: str | np.ndarray | None
    cache_dir: str | Path | None


def prepare(backbone: Backbone, heads: list[Head], data: Any, options: FitOptions, training: TrainOptions) -> FitData:
    """Features of the data, checked and split, with all that the heads may ask for.

    Raises DataError for data the heads cannot be fitted on, OptionError for options out of range.
    """
    features = _plain_features(backbone, data, options.cache_dir)
    check_features(features)
    positives, ids = resolve_positives(options.positives, features, any(head.uses_pairs for head in heads))
    check_classes(features, positives, ids, heads)
    mask = held_out_mask(features.row, options.validation, training.seed, _group(options.group, features))
    if (
        ~mask
    ).sum() < 2:  # heads store the fitting rows' mean, and that of one row is the row: training data in an adapter
        raise DataError(
            f"validation={options.validation} leaves one of {len(mask)} rows to fit: give more rows, or hold out less"
        )
    needs_views = positives == "views" and any(head.uses_pairs for head in heads)
    classifier, reason = _classifier(backbone)
    return FitData(
        features,
        np.flatnonzero(~mask),
        np.flatnonzero(mask),
        views=_view_features(backbone, data, features, options, training.seed) if needs_views else None,
        positives=positives,
        ids=ids,
        classifier=classifier,
        classifier_reason=reason,
        blurred=_blurring(backbone, features),
        options=training,
        device=backbone.device,
    )


def fit_head(
    head: Head, held_out: HeldOutScores, data: FitData
) -> tuple[dict[str, Any], list[warnings.WarningMessage]]:
    """Fit one head and store its held-out scores; returns its report, and what it warned of, to be warned of again."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = head.fit(data)
    once = list({str(w.message): w for w in caught}.values())
    head.eval()
    scores, at_bound = score(head, data.features, data.held_out, data.device)
    judged = decisions(data.features, data.held_out)
    held_out.fit(scores, None if judged is None else judged[0])
    report |= {
        "seconds": round(time.perf_counter() - start, 3),
        "rows": len(data.train),
        "held_out": held_out.summary(),
        "share_at_bound": at_bound,
        "warnings": [str(w.message) for w in once if w.category is UserWarning],
    }
    return report, once


def _plain_features(backbone: Backbone, data: Any, cache_dir: str | Path | None) -> Features:
    if isinstance(data, Features) and data.views > 1:
        if data.source is None:
            raise DataError(
                f"these features hold {data.views} views of each image and no plain images: give the images, or plain "
                "features (views=1)"
            )
        plain = backbone.extract(data.source, cache_dir=cache_dir)
        return plain if np.array_equal(plain.row, data.row) else plain[np.flatnonzero(np.isin(plain.row, data.row))]
    return backbone.extract(data, cache_dir=cache_dir)


def resolve_positives(positives: str, features: Features, needed: bool) -> tuple[str, np.ndarray | None]:
    """The kind of positives ("labels", "soft-labels", "views" or "ids") and, for "ids", the column [N] that tells them.

    Raises OptionError for an unknown word, DataError when the data lacks what the word asks for.
    """
    label = features.label
    if positives == "auto":
        if label is not None:
            return ("labels" if label.ndim == 1 else "soft-labels"), None
        return "views", None
    if positives in ("labels", "soft-labels"):
        if needed and label is None:
            raise DataError(f"positives={positives!r} needs labels and the data has none: give labels, or 'views'")
        if needed and positives == "soft-labels" and label is not None and label.ndim == 1:
            raise DataError("positives='soft-labels' needs labels float [N,C]; these are class indices: use 'labels'")
        return positives, None
    if positives == "views":
        return "views", None
    if features.source is None:
        raise OptionError(
            f"positives={positives!r} is unknown: {suggest(positives, POSITIVES)} Or the name of a column."
        )
    try:
        column = features.source.column(positives)
    except DataError as error:
        raise OptionError(
            f"positives={positives!r} is unknown: {suggest(positives, POSITIVES)} Or a column: {error}"
        ) from error
    return "ids", np.unique(column[features.row], return_inverse=True)[1].astype(np.int64)


def _group(group: str | np.ndarray | None, features: Features) -> np.ndarray | None:
    if group is None:
        return None
    source = features.source
    if isinstance(group, str):
        if source is None:
            raise OptionError(f"group={group!r} names a column, but features carry none: give one group per row")
        return source.column(group)[features.row]
    values = np.asarray(group)
    if source is not None and source.length is not None and len(values) == source.length:
        return values[features.row]
    return values


def _view_features(backbone: Backbone, data: Any, features: Features, options: FitOptions, seed: int) -> Features:
    """V views of the same rows, in the same order."""
    if isinstance(data, Features) and data.views > 1:
        views = data
    else:
        if options.views < 2:
            raise OptionError(f"views={options.views} was given; positives by views need at least 2 of each image")
        source = features.source
        if source is None:
            raise DataError("positives by views need the images, and these are features: give images, or labels")
        views = backbone.extract(source, cache_dir=options.cache_dir, views=options.views, seed=seed)
    if np.array_equal(views.row, features.row):
        return views
    order = np.argsort(views.row)
    at = order[np.searchsorted(views.row[order], features.row).clip(max=len(order) - 1)]
    if not np.array_equal(views.row[at], features.row):
        raise DataError("the views and the plain features are not of the same rows: extract both from the same data")
    return views[at]


def _classifier(backbone: Backbone) -> tuple[Any, str]:
    try:
        layer = backbone.classifier()
    except BackboneError as error:
        return None, str(error)
    bias = None if layer.bias is None else layer.bias.detach()
    return (layer.weight.detach(), bias), ""


def _blurring(backbone: Backbone, features: Features) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    source = features.source
    if source is None or source.length is None:  # no images, or a stream, which cannot go back
        return None
    return lambda positions: blurred_embeddings(backbone, source, features.row[positions])


def describe(backbone: Backbone, data: FitData, options: FitOptions, facts: dict[str, float]) -> dict[str, Any]:
    """JSON-able: what the rows were ("data"), how the heads were fitted and what the backbone did there ("fit"), and
    how the images were prepared ("preprocessing")."""
    source, training = data.features.source, data.options
    known = {} if source is None else {**source.describe(), "fingerprint": source.fingerprint()}
    rows = {"rows": len(data.features), "skipped": data.features.skipped, "classes": data.features.num_classes}
    fit = {
        "rows": len(data.train),
        "held_out_rows": len(data.held_out),
        "positives": data.positives,
        "views": 1 if data.views is None else data.views.views,
        "validation": options.validation,
        "grouped": options.group is not None,
        "epochs": training.epochs,
        "lr": training.lr,
        "batch_size": training.batch_size,
        "seed": training.seed,
        "backbone": facts,
    }
    preprocessing = {**backbone.preprocessing, **_ready_size(backbone, source)}
    return {"data": {"kind": "features", **known, **rows}, "fit": fit, "preprocessing": preprocessing}


def _ready_size(backbone: Backbone, source: Source | None) -> dict[str, list[int]]:
    """The size of images as the network takes them, where its preprocessing does not tell it: that of the first one."""
    known = backbone.preprocessing.get("input_size")
    if (known and None not in known) or source is None:
        return {}
    image = load_image(next(iter(source.stream())).image)
    if backbone.transform is not None and not isinstance(image, Tensor):
        return {"input_size": list(backbone.prepare([image]).shape[1:])}
    return {"input_size": list(image.shape)} if hasattr(image, "shape") and len(image.shape) == 3 else {}
