"""What is refused before a fit, and what is warned of: values, labels, classes, rows the backbone has learnt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .data import check_labels
from .errors import DataError
from .features import Features
from .heads.base import FitData, Head
from .scoring import CHUNK, decisions

MAX_CLASSES = 2**20


def check_features(features: Features) -> None:
    """Raises DataError, naming the rows, for values that are not finite and for labels no head can use."""
    for name in ("embedding", "penultimate", "logits"):
        array = getattr(features, name)
        if array is None or (name == "penultimate" and array is features.embedding):
            continue
        for start in range(0, len(array), CHUNK):
            bad = ~np.isfinite(array[start : start + CHUNK]).all(axis=1)
            if bad.any():
                rows = ", ".join(map(str, features.row[start + np.flatnonzero(bad)[:5]]))
                raise DataError(
                    f"the {name} is not finite in row(s) {rows}: leave these rows out or extract them again"
                )
    label = check_labels(features.label, len(features))
    if label is None or label.ndim == 2:
        return
    values = np.unique(label)
    if values[-1] >= MAX_CLASSES:
        row = features.row[int(label.argmax())]
        raise DataError(f"the label of row {row} is {values[-1]}: class indices run from 0 to classes - 1, map them so")
    if features.logits is not None:
        _check_range(features, label, values)


def _check_range(features: Features, label: np.ndarray, values: np.ndarray) -> None:
    """Labels of other classes than the classifier's are fine; a few stray ones among the classifier's are a mistake."""
    assert features.logits is not None
    classes = features.logits.shape[-1]
    stray = np.flatnonzero(label >= classes)
    rare = len(stray) * 4 * len(values) < len(label)
    sparse = 2 * len(values) < values[-1] + 1
    if classes > 1 and len(stray) and (rare or sparse):
        rows = ", ".join(map(str, features.row[stray[:5]]))
        raise DataError(
            f"labels out of range: {label[stray[0]]} in row(s) {rows} for a classifier of {classes} classes. Leave "
            "these rows out; if the labels name other classes, number them 0, 1, 2, ... without gaps."
        )


def check_classes(features: Features, positives: str, ids: np.ndarray | None, heads: Sequence[Head]) -> None:
    """Raises DataError when a head needs labels and there are none, or learns from classes (or ids) and there is one."""
    for head in heads:
        if head.needs_labels and features.label is None:
            raise DataError(f"the {head.name} head needs labels, and the data has none: give (images, labels)")
    label = ids if ids is not None else features.label
    if label is None or (positives == "views" and all(head.uses_pairs for head in heads)):
        return
    seen = np.unique(label if label.ndim == 1 else label.argmax(axis=1))
    if len(seen) < 2:
        raise DataError(
            f"all {len(features)} rows are of one class ({seen[0]}): nothing can be learnt from such labels. Give rows "
            "of several classes; for kappa and temperature positives='views' needs no classes."
        )


def trained_on(data: FitData) -> tuple[dict[str, float], str | None]:
    """The backbone's accuracy on the fitting and the held-out rows, and a warning when it has plainly learnt them.

    Two signs: an accuracy on the fitting rows far above the held-out rows' (possible with groups), and hardly any
    error with hardly any loss on the rows given: held-out rows of the same data cannot show that by a difference.
    """
    on_train, on_held_out = decisions(data.features, data.train), decisions(data.features, data.held_out)
    if on_train is None or on_held_out is None:
        return {}, None
    fitting, held_out = (1 - float(judged[0].float().mean()) for judged in (on_train, on_held_out))
    facts = {"accuracy": fitting, "held_out_accuracy": held_out, "cross_entropy": float(on_train[1].mean())}
    spread = (held_out * (1 - held_out) / len(data.held_out) + fitting * (1 - fitting) / len(data.train)) ** 0.5
    if fitting - held_out > max(0.05, 4 * spread):
        return facts, (
            f"the backbone's accuracy is {fitting:.1%} on the fitting rows and {held_out:.1%} on the held-out rows: it "
            "was trained on the fitting rows, where errors say little about new images. Fit on rows it has not seen."
        )
    if fitting > 0.99 and facts["cross_entropy"] < 0.05 and len(data.train) >= 200:
        return facts, (
            f"the backbone makes hardly an error on these rows (accuracy {fitting:.2%}, cross-entropy "
            f"{facts['cross_entropy']:.3f}): either it was trained on them or they are too easy for it to show errors. "
            "Scores and thresholds may be too optimistic for new images. Fit on rows it has not seen."
        )
    return facts, None
