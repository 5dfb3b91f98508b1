"""The parts of a report's page, from its numbers: which tables belong together, and every drawing with its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import report_drawings
from .plots import FAINT, Look, looks
from .report_drawings import Drawing
from .report_images import NEAREST, Strip
from .report_page import Figure, Section, legend
from .report_tables import Evaluated
from .results import Results
from .svg import svg, variable
from .table import Table

KINDS: tuple[tuple[str, str, str, frozenset[str]], ...] = (
    (
        "ood",
        "Out-of-distribution detection",
        "Which score tells images that are unlike the training data? A higher uncertainty means out of distribution.",
        frozenset({"fpr95"}),
    ),
    (
        "calibration",
        "Calibration",
        "Is the classifier right as often as it says? Where it is 80 % sure, 80 % of its decisions should be right.",
        frozenset({"ece", "nll", "brier"}),
    ),
    (
        "retrieval",
        "Retrieval",
        "Are the nearest neighbours of an image of its class, and does its uncertainty know when they are not?",
        frozenset({"r_auroc", "recall_at_1", "map_at_r", "share_of_gallery"}),
    ),
    (
        "selective",
        "Selective prediction",
        "Does a score put the classifier's mistakes last? The least certain images are handed to a person.",
        frozenset({"aurc", "augrc"}),
    ),
)


def sections(results: Results, evaluated: Evaluated) -> list[Section]:
    """Every section, empty ones too."""
    found = {key: Section(key, title, lead) for key, title, lead, _ in KINDS}
    found["other"] = Section("other", "Other tables", "Tables of other evaluations, as they were written.")
    for source, table in results.tables:
        found[kind_of(table)].tables.append((source, table))
    drawn, look = evaluated.drawn, look_of(evaluated)
    if "reliability" in results.figures:
        found["calibration"].figures.append(_reliability(results.figures["reliability"]))
    if "risk_coverage" in results.figures:
        found["selective"].figures.append(_risk(results.figures["risk_coverage"], look))
    if evaluated.neighbours:
        found["retrieval"].strips.append(("", evaluated.neighbours))
        found["retrieval"].strips_lead = _cap_words(results.figures["neighbours"])
    order = ["ood", "calibration", "selective", "retrieval"]
    return [
        *(found[key] for key in order),
        _histograms(results, drawn),
        _galleries(evaluated.galleries),
        found["other"],
    ]


def look_of(evaluated: Evaluated) -> dict[str, Look]:
    """How each drawn score looks: those that came with the sets in colour, free ones in grey beside them."""
    own = [name for name in evaluated.drawn if name in evaluated.given]
    rest = [name for name in evaluated.drawn if name not in own]
    return looks(own, rest) if own else looks(rest, [])


def kind_of(table: Table) -> str:
    """The section of a table, by its columns."""
    return next((key for key, _, _, metrics in KINDS if metrics & set(table.metrics)), "other")


def _reliability(given: Mapping[str, Any]) -> Figure:
    drawing = report_drawings.reliability(given)
    return Figure(
        "Reliability", _svg(drawing, "reliability"), _legend(drawing.look),
        "Above the diagonal the classifier is right more often than it says, below it less often. Bars: 95 % intervals.",
    )  # fmt: skip


def _risk(given: Mapping[str, Any], look: Mapping[str, Look]) -> Figure:
    drawing = report_drawings.risk(given, look)
    entries = [*_entries(drawing.look), ("best possible", variable(FAINT), "")]
    return Figure(
        "Risk and coverage", _svg(drawing, "risk"), legend(entries),
        "Lower is better. The intervals of every curve are in results.json; the table has the areas and their differences.",
    )  # fmt: skip


def _svg(drawing: Drawing, name: str) -> str:
    return svg(drawing.draw, drawing.width, drawing.height, name=name, alt=drawing.alt)


def _histograms(results: Results, drawn: Sequence[str]) -> Section:
    """A drawing for every score: those of `drawn` at once, the others when asked for."""
    section = Section(
        "histograms",
        "Where the scores lie",
        "Each score's distribution on the ID images (filled) and on each OOD set. The less they overlap, the better it tells "
        "them; scores beyond the edges are counted in the last bins.",
    )
    given = results.figures.get("histograms", {})
    order = [*(name for name in drawn if name in given), *(name for name in given if name not in drawn)]
    for place, name in enumerate(order):
        drawing = report_drawings.histogram(name, given[name])
        figure = Figure(name, _svg(drawing, f"histogram{place}"), _legend(drawing.look))
        (section.figures if name in drawn else section.more_figures).append(figure)
    return section


def _galleries(given: Mapping[str, list[Strip]]) -> Section:
    return Section(
        "galleries",
        "The images themselves",
        "What each score is most and least certain of. A framed image is of an OOD set: one that the score lets pass.",
        strips=list(given.items()),
    )


def _cap_words(told: Mapping[str, Any]) -> str:
    split = (
        f"Queries and their {NEAREST} nearest among {told['gallery_rows']} other images of {told['set']}, with their cosines. "
        "Orange: of another class."
    )
    if told["mass"] is None:
        return split
    return (
        f"{split} Framed: inside the query's credible set, the smallest cap that holds {told['mass']:.0%} of its posterior "
        "(nominal; whether an image of the class lies inside as often is for a calibrated set to say). From the most certain "
        "query to the least."
    )


def _legend(look: Mapping[str, Look]) -> str:
    return legend(_entries(look))


def _entries(look: Mapping[str, Look]) -> list[tuple[str, str, str]]:
    return [
        (name, variable(one.colour), "" if one.dash == "-" else ",".join(f"{1.6 * part:g}" for part in one.dash[1]))
        for name, one in look.items()
    ]
