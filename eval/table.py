"""One table for every evaluation: values with intervals, paired differences, and how it prints as text, Markdown, JSON.

A value is marked as better only where the interval of its paired difference from the reference lies on the better side
of 0; a difference inside its interval is no difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..adapters.errors import DataError, OptionError
from .bootstrap import Interval, percentile_interval, resampled_values
from .statistics import Statistic


@dataclass(frozen=True)
class Cell:
    """A metric of one score: `value` with its interval, and `minus`, its paired difference from the reference's."""

    value: Interval
    minus: Interval | None = None
    better: bool = False
    """Whether the whole interval of the difference lies on the better side of 0."""
    spread: float | None = None
    """Standard deviation over seeds, where the table is of several."""


@dataclass(frozen=True)
class Table:
    """Rows are scores, columns metrics: `cells[score][metric]`. `notes` are printed below, `about` is for JSON."""

    title: str
    metrics: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def noted(self, *notes: str) -> Table:
        """The same table with these notes after its own."""
        return replace(self, notes=(*self.notes, *notes))

    def text(self) -> str:
        """Aligned columns for a terminal; * marks what is better than the reference beyond its interval."""
        return "\n".join([self.title, *_aligned(self._lines("*", "")), *self.notes])

    def markdown(self) -> str:
        """A Markdown table; bold is what is better than the reference beyond its interval."""
        head, *rows = self._lines("**", "**")
        lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
        return "\n".join([f"### {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes)]).rstrip()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: title, about, notes, and for each score and metric value, low, high, minus, better, spread."""
        rows = {name: {metric: _plain(cell) for metric, cell in row.items()} for name, row in self.cells.items()}
        return {"title": self.title, **self.about, "notes": list(self.notes), "scores": rows}

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def _lines(self, before: str, after: str) -> list[list[str]]:
        lines = [["score", *self.metrics]]
        for name, row in self.cells.items():
            lines.append([name, *(_shown(row.get(metric), before, after) for metric in self.metrics)])
        return lines


def fill(
    statistics: Mapping[str, Statistic],
    names: Sequence[str],
    lower: Sequence[str],
    reference: str | None,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Cell]]:
    """Cells of statistics with one value for each of `names`, all counted on the same resampled rows.

    `lower`: those of `names` that are better lower. `reference`: the score the others are compared with, if it is there.
    Raises DataError for scores with different rows, and when a metric is not defined on them.
    """
    if len({one.sizes for one in statistics.values()}) > 1:
        rows = ", ".join(f"{name} {one.sizes}" for name, one in statistics.items())
        raise DataError(f"every score must have the same rows: {rows}")
    drawn = dict(zip(statistics, resampled_values(list(statistics.values()), resamples, seed), strict=True))
    value = {name: np.atleast_1d(one.value()) for name, one in statistics.items()}
    cells: dict[str, dict[str, Cell]] = {}
    for name in statistics:
        cells[name] = {}
        for k, metric in enumerate(names):
            minus = None
            if reference is not None and reference in statistics and name != reference:
                gap = drawn[name][:, k] - drawn[reference][:, k]
                minus = percentile_interval(value[name][k] - value[reference][k], gap)
            cells[name][metric] = cell(percentile_interval(value[name][k], drawn[name][:, k]), minus, metric in lower)
    return cells


def cell(value: Interval, minus: Interval | None, lower: bool) -> Cell:
    """A cell that knows whether it is better than the reference."""
    better = minus is not None and (minus.high < 0 if lower else minus.low > 0)
    return Cell(value, minus, better)


def over_seeds(tables: Sequence[Table]) -> Table:
    """The first table with the mean over all, and the standard deviation beside it; intervals have their mean ends.

    An interval is one of the rows, not of the seeds: the standard deviation tells how the seeds differ. Bold is what is
    better than the reference in EVERY seed. Raises DataError for tables of different scores or metrics.
    """
    if not tables or any(list(t.cells) != list(tables[0].cells) or t.metrics != tables[0].metrics for t in tables):
        raise DataError("tables of the same scores and metrics are expected, one for each seed")
    first = tables[0]
    cells: dict[str, dict[str, Cell]] = {}
    for name, row in first.cells.items():
        cells[name] = {}
        for metric in row:
            every = [t.cells[name][metric] for t in tables]
            gaps = [c.minus for c in every if c.minus is not None]
            spread = float(np.std([c.value.value for c in every], ddof=1)) if len(every) > 1 else None
            minus = _mean_interval(gaps) if gaps else None
            value = _mean_interval([c.value for c in every])
            cells[name][metric] = Cell(value, minus, all(c.better for c in every), spread)
    note = f"mean ± standard deviation over {len(tables)} seeds; intervals are of the rows (mean of the seeds' ends)"
    return Table(first.title, first.metrics, cells, (*first.notes, note), {**first.about, "seeds": len(tables)})


def _mean_interval(every: Sequence[Interval]) -> Interval:
    return Interval(*(float(np.mean([getattr(one, end) for one in every])) for end in ("value", "low", "high")))


def render(tables: Sequence[Table], how: str) -> str:
    """Several tables as "text", "markdown" or "json" (a list). Raises OptionError for another word."""
    if how == "json":
        return json.dumps([table.as_dict() for table in tables], indent=2, allow_nan=False)
    if how not in ("text", "markdown"):
        raise OptionError(f"format {how!r} is unknown; expected text, markdown or json")
    return "\n\n".join(table.text() if how == "text" else table.markdown() for table in tables)


def _shown(one: Cell | None, before: str, after: str) -> str:
    if one is None:
        return "-"
    spread = "" if one.spread is None else f" ± {one.spread:.3f}"
    shown = f"{one.value.value:.3f}{spread} [{one.value.low:.3f}, {one.value.high:.3f}]"
    return f"{before}{shown}{after}" if one.better else shown


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _plain(one: Cell) -> dict[str, Any]:
    result: dict[str, Any] = {"value": one.value.value, "low": one.value.low, "high": one.value.high}
    if one.minus is not None:
        result["minus_reference"] = {"value": one.minus.value, "low": one.minus.low, "high": one.minus.high}
        result["better"] = one.better
    if one.spread is not None:
        result["spread"] = one.spread
    return result
