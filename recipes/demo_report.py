"""What the demo measures, from scores and nothing else: three questions, their tables, the picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..eval import plots
from ..eval.bootstrap import Interval, bootstrap, bootstrap_curve, bootstrap_difference
from ..eval.statistics import Auroc, Mean, SelectiveAccuracy, Spearman

BASELINE = "max-softmax"
"""The free score that the others are compared with, image by image."""
REJECTED = (0.0, 0.05, 0.1, 0.2)
CURVE = np.arange(0, 31) / 100
DRAWN = (BASELINE, "kNN")
"""The free scores that the curves show, for legibility; the tables have all of them."""
LENGTHS = {"blur": "standard deviation", "occlusion": "side of the patch", "crop": "cut from width and height"}
SHOWN = 8
"""Images at either end of a row of the picture."""


@dataclass(frozen=True)
class Judged:
    """Images that no head was fitted on, and which row of the scores belongs to what.

    Attributes:
        images: PIL [N], undamaged, the test images first, then those of unseen digits: the first N rows of the scores.
        label: their digits, int64 [N].
        right: bool [T], whether the classifier names the digit; T test images.
        ladders: by name of the damage, its severities in source pixels [S], beginning with 0, and the rows [n, S] where
            each of n test images is damaged so much.
    """

    images: Sequence[Any]
    label: np.ndarray
    right: np.ndarray
    ladders: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @property
    def test(self) -> slice:
        return slice(0, len(self.right))

    @property
    def unseen(self) -> slice:
        return slice(len(self.right), len(self.images))


@dataclass(frozen=True)
class Measured:
    """By score, with 95 % intervals.

    Attributes:
        unseen: AUROC of unseen digits against test images.
        above: that minus the baseline's, on the same images.
        ambiguity: by damage, Spearman's correlation of score and severity.
        places: by damage, for each severity, the mean place (0 to 100) of a score among those of undamaged images.
        accuracy: of the test images kept at each share of `REJECTED`, and `rejection` at each of `CURVE`.
        gain: accuracy at the largest of these shares minus that of all test images.
    """

    unseen: dict[str, Interval] = field(default_factory=dict)
    above: dict[str, Interval] = field(default_factory=dict)
    ambiguity: dict[str, dict[str, Interval]] = field(default_factory=dict)
    places: dict[str, dict[str, list[Interval]]] = field(default_factory=dict)
    accuracy: dict[str, list[Interval]] = field(default_factory=dict)
    rejection: dict[str, list[Interval]] = field(default_factory=dict)
    gain: dict[str, Interval] = field(default_factory=dict)


def measure(scores: Mapping[str, np.ndarray], judged: Judged, seed: int) -> Measured:
    """Answer the three questions for every score [rows]; the copies of an image are resampled together with it."""
    m = Measured(ambiguity={name: {} for name in judged.ladders}, places={name: {} for name in judged.ladders})
    baseline = Auroc(scores[BASELINE][judged.test], scores[BASELINE][judged.unseen])
    for name, score in tqdm(scores.items(), desc="measure", unit="score"):
        clean = score[judged.test]
        auroc = Auroc(clean, score[judged.unseen])
        m.unseen[name] = bootstrap(auroc, seed=seed)
        m.above[name] = bootstrap_difference(auroc, baseline, seed=seed)
        for damage, (severity, rows) in judged.ladders.items():
            m.ambiguity[damage][name] = bootstrap(
                Spearman(score[rows], np.broadcast_to(severity, rows.shape)), seed=seed
            )
            m.places[damage][name] = [bootstrap(Mean(step), seed=seed) for step in _places(score[rows], clean).T]
        m.accuracy[name] = bootstrap_curve(SelectiveAccuracy(clean, judged.right, REJECTED), seed=seed)
        m.rejection[name] = bootstrap_curve(SelectiveAccuracy(clean, judged.right, CURVE), seed=seed)
        rejecting = SelectiveAccuracy(clean, judged.right, REJECTED[-1:])
        m.gain[name] = bootstrap_difference(rejecting, Mean(judged.right), seed=seed)
    return m


def _places(score: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each score stands among others, 0 to 100, ties half way."""
    ordered = np.sort(among)
    below, upto = np.searchsorted(ordered, score, "left"), np.searchsorted(ordered, score, "right")
    return 50 * (below + upto) / len(ordered)


def tables(m: Measured, judged: Judged, kinds: Mapping[str, str]) -> str:
    """The three questions with their answers; `kinds` says what each score is, "free" or the kind of a head."""
    heads = [name for name, kind in kinds.items() if kind != "free"]
    last = {name: values[-1] for name, values in m.accuracy.items()}
    lengths = [f"{name} up to {px[-1]:g} px ({LENGTHS[name]})" for name, (px, _) in judged.ladders.items()]
    steepest = {damage: max(values, key=lambda name: values[name].value) for damage, values in m.ambiguity.items()}
    parts = {
        "a) Unseen digits. AUROC: how often an image of an unseen digit is less certain than one of a known digit; "
        f"guessing gives .5. Here {best_of(m.unseen, heads)}": unseen_table(m, kinds),
        "b) Ambiguity. Spearman's correlation of the score with the severity of damage to images of 8 x 8 px: "
        f"{', '.join(lengths)}. Steepest with {', '.join(f'{d}: {name}' for d, name in steepest.items())}.": (
            ambiguity_table(m, kinds)
        ),
        f"c) Errors. A linear classifier of the known digits is right on {judged.right.mean():.1%} of the "
        f"{len(judged.right)} test images; accuracy in % of those that stay when the least certain are rejected. With "
        f"{REJECTED[-1]:.0%} rejected: {best_of(last, heads)}": error_table(m, kinds),
    }
    return "\n".join(
        f"{textwrap.fill(text, 110, subsequent_indent='   ')}\n\n{table}\n" for text, table in parts.items()
    )


def unseen_table(m: Measured, kinds: Mapping[str, str]) -> str:
    """Question a; the largest AUROC first, each beside the baseline's on the same images."""
    rows = []
    for name in sorted(kinds, key=lambda name: -m.unseen[name].value):
        verdict = "" if name == BASELINE else _word(m.above[name], "above", "level", "below")
        difference = "" if name == BASELINE else _show(m.above[name])
        rows.append([name, kinds[name], _show(m.unseen[name]), difference, verdict])
    return _table(["score", "what it is", "AUROC", f"minus {BASELINE}", ""], rows)


def ambiguity_table(m: Measured, kinds: Mapping[str, str]) -> str:
    """Question b; in words, which damage a score does not rise with."""
    rows = []
    for name in kinds:
        found = {damage: values[name] for damage, values in m.ambiguity.items()}
        wrong: dict[str, list[str]] = {}
        for damage, one in found.items():
            if one.low <= 0:
                wrong.setdefault(_word(one, "", "flat", "falls"), []).append(damage)
        verdict = "; ".join(f"{', '.join(damages)} ({word})" for word, damages in wrong.items())
        shown = (_show(one, digits=2) for one in found.values())
        rows.append([name, *shown, f"NOT with {verdict}" if wrong else "yes, with all"])
    return _table(["score", *m.ambiguity, "does it rise?"], rows)


def error_table(m: Measured, kinds: Mapping[str, str]) -> str:
    """Question c; the most accurate at the largest share first."""
    rows = []
    for name in sorted(kinds, key=lambda name: -m.accuracy[name][-1].value):
        verdict = _word(m.gain[name], "yes", "not clearly", "NO, worse")
        rows.append([name, *(_show(one, 100, 1) for one in m.accuracy[name][1:]), verdict])
    return _table(["score", *(f"{share:.0%} rejected" for share in REJECTED[1:]), "better than at random?"], rows)


def best_of(values: Mapping[str, Interval], heads: Sequence[str]) -> str:
    """The best head and the best free score, whichever is ahead, in a sentence."""
    head, free = (max(names, key=lambda name: values[name].value) for names in (heads, values.keys() - set(heads)))
    a, b = values[head].value, values[free].value
    told = "level with" if a == b else "ahead of" if a > b else "behind"
    return f"the best head ({head}, {_number(a)}) is {told} the best free score ({free}, {_number(b)})."


def _word(one: Interval, positive: str, unclear: str, negative: str) -> str:
    """The word for an interval above, across or below 0."""
    return positive if one.low > 0 else negative if one.high < 0 else unclear


def _show(one: Interval, scale: float = 1, digits: int = 3) -> str:
    value, low, high = (_number(scale * x, digits) for x in (one.value, one.low, one.high))
    return f"{value:>{digits + 2}} [{low}, {high}]"


def _number(value: float, digits: int = 3) -> str:
    """As statisticians write what lies between -1 and 1: without the zero before the point."""
    text = f"{value + 0.0:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and "0." in text[:3] else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in [head, *rows]]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: Path, scores: Mapping[str, np.ndarray], judged: Judged, m: Measured, heads: Sequence[str]) -> None:
    """The most and the least certain images of every head, and the three answers as curves."""
    look = plots.looks(heads, [name for name in scores if name not in heads])
    drawn = [*heads, *DRAWN]
    with plots.page(path, 12, 12.3) as figure:
        parts: Any = figure.subfigures(3, 1, height_ratios=[1.06, 1.0, 1.0])
        top, middle, bottom = parts
        gallery = [(name, *_ends(scores[name], judged)) for name in heads]
        plots.gallery(top, gallery, "Handwritten digits, by an ImageNet network; orange: a digit that no head has seen")
        left, right = middle.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        plots.intervals(
            left, m.unseen, look, title="Does it tell unseen digits?", label="AUROC, .5 is guessing", reference=BASELINE
        )
        plots.curves(
            right,
            100 * CURVE,
            {name: m.rejection[name] for name in drawn},
            look,
            title="Does it know when the classifier errs?",
            xlabel="least certain images rejected, %",
            ylabel="accuracy of the others",
            bands=False,  # all share the noise of the same images, which the bands would show four times
        )
        axes = bottom.subplots(1, len(judged.ladders), sharey=True)
        for axis, (damage, (severity, _)) in zip(axes, judged.ladders.items(), strict=True):
            plots.curves(
                axis,
                severity,
                {name: m.places[damage][name] for name in drawn},
                look,
                title=f"Does it rise with {damage}?",
                xlabel=f"{LENGTHS[damage]}, source pixels",
                ylabel="undamaged images more certain, %" if axis is axes[0] else "",
            )
        plots.legend(bottom, axes[0], len(drawn))


def _ends(score: np.ndarray, judged: Judged) -> tuple[plots.Strip, plots.Strip]:
    """The most and the least certain undamaged images, most extreme outside; unseen digits are flagged."""
    order = np.argsort(score[: len(judged.images)], kind="stable")
    ends = []
    for title, rows in (("most certain", order[:SHOWN]), ("least certain", order[-SHOWN:])):
        new = [row >= judged.unseen.start for row in rows]
        words = [f"{judged.label[row]}{' new' if flag else ''}" for row, flag in zip(rows, new, strict=True)]
        ends.append(plots.Strip(title, [judged.images[row] for row in rows], words, new))
    return ends[0], ends[1]
