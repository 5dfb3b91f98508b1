"""The one place that draws: galleries, curves and intervals in one style, straight to a file.

Nothing here goes through pyplot, so no backend is chosen, no window opens and no global setting stays changed. Colours are
Okabe and Ito's, told apart by people with any colour vision; every line has its own marker or dash as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bootstrap import Interval
from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = (
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 2, 1, 2)),
    (0, (8, 2)),
    (0, (2, 2)),
    (0, (4, 1, 1, 1, 1, 1)),
)
GREYS = ("#3A3A3A", "#6A6A6A", "#8C8C8C", "#555555", "#7A7A7A", "#A0A0A0")
FLAG = "#D55E00"
INK, FAINT = "#222222", "#D9D9D9"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#8C8C8C",
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}


@dataclass(frozen=True)
class Look:
    """How one score is drawn, wherever it is drawn."""

    colour: str
    marker: str
    dash: Any
    fitted: bool


def looks(fitted: Sequence[str], free: Sequence[str]) -> dict[str, Look]:
    """A look for each name: colours and solid lines for fitted heads, greys and dashes for scores that cost nothing."""
    return {
        **{name: Look(COLOURS[i % 6], MARKERS[i % 6], "-", True) for i, name in enumerate(fitted)},
        **{name: Look(GREYS[i % 6], "none", DASHES[i % 6], False) for i, name in enumerate(free)},
    }


@contextmanager
def page(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches in the common style, saved to `path` (.png, .svg or .pdf) when the block ends.

    Raises PosthocError without matplotlib.
    """
    with figure_like(width, height) as figure:
        yield figure
        figure.savefig(path)


@contextmanager
def figure_like(width: float, height: float, settings: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """A figure of that size in inches in the common style, `settings` (matplotlib's names) over it, to be saved inside.

    Raises PosthocError without matplotlib.
    """
    matplotlib = require("matplotlib", "matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the caller's session has set, the page looks the same
        matplotlib.rcParams.update({**STYLE, **(settings or {})})
        yield require("matplotlib.figure", "matplotlib").Figure(figsize=(width, height), layout="constrained")


@dataclass(frozen=True)
class Strip:
    """A row of images with a word under each; `flags` marks those that get a coloured frame."""

    title: str
    images: Sequence[Any]
    words: Sequence[str]
    flags: Sequence[bool]


GAP, STEP, LINE = 0.6, 1.12, 1.42
"""Of a gallery, in sides of an image: between its strips, and from one image and from one row to the next."""


def gallery(figure: Figure | SubFigure, rows: Sequence[tuple[str, Strip, Strip]], title: str) -> None:
    """Two strips of images side by side in every row, such as the most and the least certain, under a common title.

    `rows` are (name, left, right); the strips' titles are written once, above the first row. Images are what
    matplotlib can show: PIL or arrays; grey ones are drawn dark on light. All are drawn in one axis, which takes a
    quarter of the time that an axis for each image does.
    """
    width = STEP * max(len(strip.images) for _, *strips in rows for strip in strips)
    starts = (0.0, width + GAP)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    axis = figure.subplots()
    for line, (_, *strips) in enumerate(rows):
        for start, strip in zip(starts, strips, strict=True):
            cells = zip(strip.images, strip.words, strip.flags, strict=True)
            for place, (image, word, flag) in enumerate(cells):
                _thumbnail(axis, start + STEP * place, LINE * line, image, word, flag)
    for start, strip in zip(starts, rows[0][1:], strict=True):
        axis.text(start, -0.15, strip.title, va="bottom", fontsize=10)
    axis.set(xlim=(-0.1, starts[1] + width), ylim=(LINE * len(rows), -0.6), aspect="equal", anchor="NW", xticks=[])
    axis.set_yticks([LINE * line + 0.5 for line in range(len(rows))], [name for name, *_ in rows], fontweight="bold")
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)


def _thumbnail(axis: Axes, x: float, y: float, image: Any, word: str, flag: bool) -> None:
    """An image in the square of side 1 that begins at (x, y), framed, and a word under it."""
    pixels = np.asarray(image)
    tall, wide = (side / max(pixels.shape[:2]) for side in pixels.shape[:2])
    left, top = x + (1.0 - wide) / 2, y + (1.0 - tall) / 2
    axis.imshow(
        pixels, cmap="gray_r" if pixels.ndim == 2 else None, interpolation="nearest",
        extent=(left, left + wide, top + tall, top),
    )  # fmt: skip
    frame = require("matplotlib.patches", "matplotlib").Rectangle((left, top), wide, tall, fill=False)
    frame.set(edgecolor=FLAG if flag else FAINT, linewidth=2.4 if flag else 0.8)
    axis.add_patch(frame)
    axis.text(x + 0.5, top + tall + 0.06, word, ha="center", va="top", fontsize=8, color=FLAG if flag else INK)


def intervals(
    axis: Axes,
    values: Mapping[str, Interval],
    look: Mapping[str, Look],
    *,
    title: str,
    label: str,
    reference: str | None = None,
) -> None:
    """A point and its interval for each name, the largest on top, with the figures written beside them.

    `reference`: a name through whose value a line is drawn, for the others to be read against.
    """
    names = sorted(values, key=lambda name: values[name].value)
    if reference is not None:
        axis.axvline(values[reference].value, color=look[reference].colour, linewidth=0.8, linestyle=(0, (4, 4)))
    for height, name in enumerate(names):
        one, style = values[name], look[name]
        marker = style.marker if style.fitted else "o"
        axis.plot([one.low, one.high], [height] * 2, color=style.colour, linewidth=2.2, solid_capstyle="round")
        axis.plot(
            one.value, height, marker, color=style.colour, markerfacecolor=style.colour if style.fitted else "white"
        )
        axis.annotate(
            f"{one.value:.3f}", (1.0, height), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=9, color=style.colour,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    for tick, name in zip(axis.get_yticklabels(), names, strict=True):
        tick.set(color=look[name].colour, fontweight="bold" if look[name].fitted else "normal")
    axis.grid(axis="y", visible=False)
    axis.set(title=title, xlabel=label)


def curves(
    axis: Axes,
    x: Sequence[float] | np.ndarray,
    values: Mapping[str, Sequence[Interval]],
    look: Mapping[str, Look],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    bands: bool = True,
) -> None:
    """One line for each name, fitted heads with their interval as a band (`bands`); few points get markers."""
    for name, line in values.items():
        style, y = look[name], [one.value for one in line]
        marker = style.marker if len(line) <= 10 else "none"
        axis.plot(
            x, y, color=style.colour, linestyle=style.dash, marker=marker, label=name,
            linewidth=1.8 if style.fitted else 1.2, zorder=3 if style.fitted else 2,
        )  # fmt: skip
        if style.fitted and bands:
            axis.fill_between(
                x, [one.low for one in line], [one.high for one in line], color=style.colour, alpha=0.12, lw=0
            )
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.margins(x=0.02)


def legend(figure: Figure | SubFigure, axis: Axes, columns: int) -> None:
    """One legend for all panels of a figure, below them, in at most so many columns; the names are those of `axis`."""
    handles, names = axis.get_legend_handles_labels()
    names = [shortened(name) for name in names]
    fitting = int(12 * figure.bbox.width / figure.figure.dpi) // (max(map(len, names), default=0) + 8)
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, min(columns, fitting)), handlelength=3.2)


def shortened(name: str) -> str:
    """A name as a picture has room for it."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def histograms(
    axis: Axes,
    edges: np.ndarray,
    shares: Mapping[str, np.ndarray],
    look: Mapping[str, Look],
    *,
    xlabel: str,
    logarithmic: bool = False,
) -> None:
    """Shares [K] of several sets in the same bins, edges [K + 1]: an outline each, the first one filled."""
    for place, (name, share) in enumerate(shares.items()):
        style = look[name]
        if not place:
            axis.stairs(share, edges, fill=True, color=style.colour, alpha=0.22, lw=0)
        axis.stairs(share, edges, color=style.colour, linestyle=style.dash, linewidth=1.4, label=name)
    if logarithmic:
        ticker = require("matplotlib.ticker", "matplotlib")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set(xlabel=xlabel, ylabel="share of images", ylim=(0, None), xlim=(edges[0], edges[-1]))


def best_possible(axis: Axes, coverage: np.ndarray, risk: np.ndarray) -> None:
    """A faint line that no score can go below."""
    axis.plot(coverage, risk, color=FAINT, linewidth=1.5, zorder=1)
