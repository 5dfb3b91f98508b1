"""A report as one HTML page that needs nothing else: no network, no other file, and no script to be read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any

from .bootstrap import Interval
from .metric_words import Words, words
from .report_images import Strip
from .table import Cell, Table


@dataclass(frozen=True)
class Figure:
    """A drawing as an <svg> element with its title, a legend as HTML (or nothing) and a sentence below."""

    title: str
    svg: str
    legend: str = ""
    note: str = ""


@dataclass
class Section:
    """A part of the page: tables with the file each came from ("": none), figures, and rows of images."""

    key: str
    title: str
    lead: str
    tables: list[tuple[str, Table]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    more_figures: list[Figure] = field(default_factory=list)
    """Shown when asked for."""
    strips: list[tuple[str, list[Strip]]] = field(default_factory=list)
    strips_lead: str = ""

    @property
    def empty(self) -> bool:
        return not (self.tables or self.figures or self.more_figures or self.strips)


READING = (
    "Every number stands above its 95 % interval; the line below shows the interval among those of its column, and the tick "
    'where the reference lies. <b class="better">Bold</b> is better than the reference on the same resampled images, beyond '
    "the interval of their difference; nothing else is marked. ↑ higher is better, ↓ lower is. "
    '<span class="js">A click on a column\'s head sorts by it.</span>'
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="posthoc eval report">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<p class="brand">posthoc</p>
<h1>{title}</h1>
<p class="lede">{lede}</p>
<nav aria-label="Sections"><ul>{nav}</ul></nav>
</header>
<main>
<p class="reading">{reading}</p>
{sections}
</main>
<footer><p>The same tables are in results.md. results.json has every number of this page, and the versions, the date and the
command line that made it.</p></footer>
<script>{js}</script>
</body>
</html>
"""


def page(title: str, sets: Sequence[Mapping[str, Any]], sections: Iterable[Section]) -> str:
    """The whole page; `sets` as in `Results.sets`. Every string that comes from outside is escaped."""
    shown = [section for section in sections if not section.empty]
    js = _asset("report_page.js")
    return PAGE.format(
        digest=base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        title=escape(title),
        css=_asset("report_page.css"),
        lede=_lede(sets),
        nav="".join(f'<li><a href="#{one.key}">{escape(one.title)}</a></li>' for one in shown),
        reading=READING,
        sections="\n".join(map(_section, shown)),
        js=js,
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _lede(sets: Sequence[Mapping[str, Any]]) -> str:
    """Which sets were looked at."""
    if not sets:
        return "Tables gathered from earlier runs."
    told = {role: [one for one in sets if one["role"] == role] for role in ("id", "ood")}
    named = {role: ", ".join(f"<b>{escape(s['name'])}</b> ({s['rows']:,})" for s in of) for role, of in told.items()}
    return f"In distribution: {named['id']} images." + (f" Out of distribution: {named['ood']}." if told["ood"] else "")


def _section(one: Section) -> str:
    parts = [f'<section id="{one.key}" aria-labelledby="{one.key}-title">']
    parts.append(f'<h2 id="{one.key}-title">{escape(one.title)}</h2><p class="lead">{escape(one.lead)}</p>')
    shared = _shared_notes([table for _, table in one.tables])
    for place, (source, table) in enumerate(one.tables, 1):
        parts.append(_table(source, table, f"{one.key}-{place}", shared))
    parts.append(_meanings(one.tables))
    parts.append(_notes(shared))
    parts.append(_figures(one.figures))
    if one.more_figures:
        parts.append(
            f"<details><summary>{len(one.more_figures)} more scores</summary>{_figures(one.more_figures)}</details>"
        )
    if one.strips_lead:
        parts.append(f'<p class="lead apart">{escape(one.strips_lead)}</p>')
    parts += [_strips(title, strips, opened=not place) for place, (title, strips) in enumerate(one.strips)]
    return "\n".join([*filter(None, parts), "</section>"])


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    drawn = "".join(
        f"<figure>{one.svg}<figcaption><b>{escape(one.title)}</b>{one.legend}"
        + (f'<p class="note">{escape(one.note)}</p>' if one.note else "")
        + "</figcaption></figure>"
        for one in figures
    )
    return f'<div class="figures{" one" if len(figures) == 1 else ""}">{drawn}</div>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Names beside a piece of their line: (name, CSS colour, SVG dash array or "")."""
    rows = "".join(
        f'<li><svg class="key" viewBox="0 0 24 6" aria-hidden="true"><path d="M0 3H24" style="stroke:{escape(colour)};'
        f'stroke-dasharray:{dash or "none"}"></path></svg>{escape(name)}</li>'
        for name, colour, dash in entries
    )
    return f'<ul class="legend">{rows}</ul>'


def _shared_notes(tables: Sequence[Table]) -> list[str]:
    """What every one of several tables says: it is said once, below them."""
    if len(tables) < 2:
        return []
    return [note for note in tables[0].notes if all(note in table.notes for table in tables)]


def _notes(notes: Sequence[str]) -> str:
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _table(source: str, table: Table, key: str, shared: Sequence[str]) -> str:
    """A table in a box that scrolls by itself, the paired differences, and the notes that are not shared."""
    reference = table.about.get("reference")
    reference = reference if isinstance(reference, str) and reference in table.cells else None
    origin = f' <span class="source">{escape(source)}</span>' if source else ""
    parts = [f'<h3 id="{key}">{escape(table.title)}{origin}</h3>', _grid(table, key, reference)]
    if any(cell.minus is not None for row in table.cells.values() for cell in row.values()):
        than = f" from {escape(reference)}" if reference else ""
        parts.append(f"<details><summary>Paired differences{than}</summary>{_differences(table, key)}</details>")
    parts.append(_notes([note for note in table.notes if note not in shared]))
    return "".join(parts)


def _grid(table: Table, key: str, reference: str | None) -> str:
    columns = {m: {n: row[m] for n, row in table.cells.items() if m in row} for m in table.metrics}
    spans = {m: _span(cell.value for cell in column.values()) for m, column in columns.items()}
    tick = {m: column[reference].value.value for m, column in columns.items() if reference in column}
    body = []
    for name, row in table.cells.items():
        mark = ' <span class="reference">reference</span>' if name == reference else ""
        cells = "".join(_value(row.get(m), spans[m], tick.get(m)) for m in table.metrics)
        body.append(f'<tr><th scope="row">{escape(name)}{mark}</th>{cells}</tr>')
    return _box(key, table.metrics, body, "" if len(table.cells) > 1 else " single")


def _differences(table: Table, key: str) -> str:
    spans = {
        m: _span(cell.minus for row in table.cells.values() if (cell := row.get(m)) and cell.minus)
        for m in table.metrics
    }
    body = []
    for name, row in table.cells.items():
        if any(cell.minus for cell in row.values()):
            cells = "".join(
                _number(
                    cell.minus if (cell := row.get(m)) else None, spans[m], 0.0, cell is not None and cell.better, "+"
                )
                for m in table.metrics
            )
            body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return _box(f"{key}-difference", table.metrics, body)


def _box(key: str, metrics: Sequence[str], body: Sequence[str], more: str = "") -> str:
    label = key.removesuffix("-difference")
    heads = "".join(map(_head, map(words, metrics)))
    return (
        f'<div class="box{more}" role="region" aria-labelledby="{label}" tabindex="0"><table id="{key}-table"><thead><tr>'
        f'<th scope="col">score</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _head(one: Words) -> str:
    arrow, told = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better")}.get(one.better, ("", ""))
    direction = f' <span class="arrow" title="{told}" aria-label="{told}" role="img">{arrow}</span>' if arrow else ""
    return f'<th scope="col" data-better="{one.better}">{escape(one.label)}{direction}</th>'


def _value(cell: Cell | None, span: tuple[float, float], tick: float | None) -> str:
    if cell is None:
        return _number(None, span, tick, False)
    return _number(cell.value, span, tick, cell.better, spread=cell.spread)


def _number(
    one: Interval | None,
    span: tuple[float, float],
    tick: float | None,
    better: bool,
    sign: str = "",
    spread: float | None = None,
) -> str:
    """A cell: the value, its interval, and where both lie among the column's."""
    if one is None:
        return '<td class="none">–</td>'
    shown = f"{one.value:{sign}.3f}"
    shown = f'<b class="better">{shown}</b>' if better else f"<span>{shown}</span>"
    if spread is not None:
        shown += f" ± {spread:.3f}"
    left, width, point = (_percent(x, span) for x in (one.low, span[0] + one.high - one.low, one.value))
    reference = "" if tick is None else f";--t:{_percent(tick, span)}"
    return (
        f'<td data-v="{one.value!r}">{shown}<small>[{one.low:{sign}.3f}, {one.high:{sign}.3f}]</small>'
        f'<i class="rail{"" if tick is None else " ticked"}" style="--l:{left};--w:{width};--p:{point}{reference}"></i></td>'
    )


def _span(values: Iterable[Interval]) -> tuple[float, float]:
    ends = [end for one in values for end in (one.low, one.high)]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _percent(value: float, span: tuple[float, float]) -> str:
    width = span[1] - span[0]
    return f"{min(100.0, max(0.0, 100 * (value - span[0]) / width)) if width else 50.0:.1f}%"


def _meanings(tables: Sequence[tuple[str, Table]]) -> str:
    """What the columns of a section's tables mean, each once."""
    metrics = dict.fromkeys(metric for _, table in tables for metric in table.metrics)
    labels: dict[str, list[str]] = {}
    for one in map(words, metrics):
        if one.meaning:
            labels.setdefault(one.meaning, []).append(one.label)
    rows = "".join(
        f"<div><dt>{escape(', '.join(of))}</dt><dd>{escape(meaning)}</dd></div>" for meaning, of in labels.items()
    )
    return f'<dl class="meanings">{rows}</dl>' if rows else ""


def _strips(title: str, strips: Sequence[Strip], opened: bool) -> str:
    inside = "".join(_strip(one) for one in strips)
    if not title:
        return inside
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{inside}</details>"


def _strip(strip: Strip) -> str:
    pictures = []
    for one in strip.pictures:
        kind = " ".join(word for word, given in (("marked", one.marked), ("odd", one.odd)) if given) or "plain"
        tiny = ' class="tiny"' if one.tiny else ""
        pictures.append(
            f'<figure class="{kind}"><img src="{escape(one.uri)}" alt="{escape(one.alt)}"{tiny}>'
            f"<figcaption>{_lines(one.words)}</figcaption></figure>"
        )
    return (
        f'<h4>{escape(strip.title)}</h4><div class="strip" role="group" aria-label="{escape(strip.title)}" tabindex="0">'
        f"{''.join(pictures)}</div>"
    )


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))
