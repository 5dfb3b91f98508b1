"""Whether a set's labels are the classifier's classes: told once, for its mistakes, its calibration and what becomes of both."""

from __future__ import annotations

import numpy as np

from .arrays import first_few
from .inputs import Scored


def misfit(one: Scored, label: np.ndarray) -> str | None:
    """Why labels int [N] are not the classes that the set's logits [N, C] are of; None: they are, as far as can be told.

    They are not where one is no number of a class, or where the classifier is never right.
    """
    logits = np.asarray(one.logits)
    classes = logits.shape[1]
    odd = (label < 0) | (label >= classes)
    if odd.any():
        seen = np.unique(label[odd])
        return (
            f"{int(odd.sum())} of {one.rows} labels of {one.name} ({first_few(seen)}) are none of the classifier's "
            f"{classes} classes (0 to {classes - 1}), so its mistakes there are not known: give these images labels it "
            "was trained on"
        )
    return None if (logits.argmax(1) == label).any() else _never_right(one)


def mistakes(one: Scored) -> tuple[np.ndarray | None, str | None]:
    """The classifier's mistakes on a set, bool [N]; None, and why, where its labels are not all the classifier's classes."""
    if one.correct is None:
        return None, None
    both = _logits_and_label(one)
    if both is not None and np.array_equal(one.correct, both[0].argmax(1) == both[1]):
        why = misfit(one, both[1])
    else:  # the file itself tells what is right
        why = None if one.correct.any() else _never_right(one)
    return (~one.correct, None) if why is None else (None, why)


def usable_labels(one: Scored) -> tuple[np.ndarray | None, str]:
    """Class indices [N] of the classifier (of soft labels the likeliest), or None and why there are none."""
    if one.label is None:
        return None, "the images have no labels"
    if one.logits is None:
        return None, "the backbone has no classifier"
    label = one.label if one.label.ndim == 1 else one.label.argmax(1)
    why = misfit(one, label)
    return (label, "") if why is None else (None, why)


def has_classes(one: Scored) -> bool:
    """Whether there are logits and labels that are their classes, so that confidences can be right or wrong."""
    both = _logits_and_label(one)
    return both is not None and misfit(one, both[1]) is None


def doubtful_labels(one: Scored) -> list[str]:
    """A note where a set's labels fit the classifier so badly that they may be of other classes: else none.

    They do where they cover fewer classes than the classifier has and it is right for less than twice the share of the
    commonest label (at most half the images).
    """
    both = _logits_and_label(one)
    if one.correct is None or both is None:
        return []
    counts, classes = np.unique(both[1], return_counts=True)[1], both[0].shape[1]
    accuracy = one.correct.mean()
    if len(counts) >= classes or accuracy >= min(2 * counts.max() / one.rows, 0.5):
        return []
    return [
        f"the classifier is right for {accuracy:.1%} of {one.name}, whose labels are of {len(counts)} of its {classes} classes: "
        "are these labels the classifier's classes?"
    ]


def _logits_and_label(one: Scored) -> tuple[np.ndarray, np.ndarray] | None:
    """[N, C] and the class index of each image [N]; None where one of them lacks or labels are soft."""
    if one.logits is None or one.label is None or one.label.ndim != 1:
        return None
    return np.asarray(one.logits), one.label


def _never_right(one: Scored) -> str:
    return f"the classifier is never right on {one.name}; are these labels its classes?"
