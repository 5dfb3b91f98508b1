"""A report's curves and histograms from its numbers: as SVG for its page, and as pictures for a card or a talk."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .bootstrap import Interval
from .plots import (
    COLOURS,
    DASHES,
    MARKERS,
    Look,
    best_possible,
    curves,
    figure_like,
    histograms,
    legend,
    looks,
    shortened,
)
from .reliability import Reliability, diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.3, 3.1
"""Inches of a drawing: legible at the width of a phone."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn on a figure of its size in inches, in which colours, and in words for those who do not see it."""

    draw: Callable[[Figure], Axes]
    look: Mapping[str, Look]
    alt: str
    width: float = WIDTH
    height: float = HEIGHT


def reliability(given: Mapping[str, Any]) -> Drawing:
    """Accuracy against confidence, from the report's `figures["reliability"]`."""
    values = {
        name: Reliability(
            np.array(one["confidence"]),
            [Interval(*each) for each in zip(one["accuracy"], one["low"], one["high"], strict=True)],
            np.array(one["rows"]),
        )
        for name, one in given.items()
    }
    look = looks(list(values), [])

    def draw(canvas: Figure) -> Axes:
        axis = canvas.subplots()
        diagram(axis, values, look, title="")
        return axis

    return Drawing(
        draw, look, "Reliability diagram: accuracy against confidence in bins, with 95 % intervals", height=3.9
    )


def risk(given: Mapping[str, Any], look: Mapping[str, Look]) -> Drawing:
    """Errors among the most certain images against their share, from the report's `figures["risk_coverage"]`."""
    coverage = 100 * np.array(given["coverage"])
    lines = {
        name: [Interval(*(100 * x for x in each)) for each in zip(one["risk"], one["low"], one["high"], strict=True)]
        for name, one in given["scores"].items()
    }

    def draw(canvas: Figure) -> Axes:
        axis = canvas.subplots()
        best_possible(axis, coverage, 100 * np.array(given["best"]))
        curves(
            axis, coverage, lines, look, title="", xlabel="most certain images kept, %",
            ylabel="errors among them, %", bands=len(lines) <= 2,
        )  # fmt: skip
        axis.set(xlim=(0, 100), ylim=(0, None))
        return axis

    alt = f"Risk-coverage curves of {', '.join(lines)}: errors among the most certain images against their share"
    return Drawing(draw, {name: look[name] for name in lines}, alt)


def histogram(name: str, given: Mapping[str, Any]) -> Drawing:
    """A score on every set, from one of the report's `figures["histograms"]`."""
    shares = {key: np.array(share) for key, share in given["shares"].items()}
    look = {key: _set_look(number) for number, key in enumerate(shares)}
    xlabel = "uncertainty" + (", logarithmic" if given["logarithmic"] else "")
    options = {"shares": shares, "look": look, "logarithmic": given["logarithmic"], "xlabel": xlabel}
    draw = partial(_draw_histogram, edges=np.array(given["edges"]), **options)
    return Drawing(draw, look, f"Histogram of {name} on {', '.join(shares)}", height=2.3)


def pictures(figures: Mapping[str, Any], names: Sequence[str], look: Mapping[str, Look]) -> dict[str, bytes]:
    """PNG files by name: reliability, risk and coverage, and a histogram of each of `names`; those there are numbers for."""
    made: dict[str, tuple[Drawing, str]] = {}
    if "reliability" in figures:
        made["reliability"] = (reliability(figures["reliability"]), "Reliability")
    if "risk_coverage" in figures:
        made["risk_coverage"] = (risk(figures["risk_coverage"], look), "Risk and coverage")
    for name in names:
        if name in figures.get("histograms", {}):
            made[_histogram_name(name, made)] = (histogram(name, figures["histograms"][name]), shortened(name))
    return {f"{name}.png": _png(drawing, title) for name, (drawing, title) in made.items()}


def _histogram_name(name: str, taken: Collection[str]) -> str:
    """histogram_SCORE: letters and digits of the score's name, and a digest of it where they do not tell it from others."""
    kept = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:80]
    place = f"histogram_{kept}"
    if not kept or len(name) > 80 or place.lower() in {one.lower() for one in taken}:
        place = f"histogram_{kept}_{hashlib.sha256(name.encode()).hexdigest()[:8]}".replace("__", "_")
    return place


def _png(drawing: Drawing, title: str) -> bytes:
    buffer = io.BytesIO()
    size = drawing.width * 1.3, drawing.height * 1.3 + 0.5
    with warnings.catch_warnings(), figure_like(*size, {"text.parse_math": False}) as figure:
        warnings.filterwarnings(
            "ignore", "Glyph .* missing"
        )  # a name may be written in any script: a box stands for it
        axis = drawing.draw(figure)
        axis.set_title(title)
        legend(figure, axis, 3)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_histogram(canvas: Figure, **options: Any) -> Axes:
    axis = canvas.subplots()
    histograms(axis, **options)
    return axis


def _set_look(number: int) -> Look:
    """The ID set's line is solid; sets beyond the sixth repeat a colour with another dash."""
    return Look(COLOURS[number % 6], MARKERS[number % 6], DASHES[(number // 6) % 6] if number > 5 else "-", True)
