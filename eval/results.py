"""results.json of a report: what is in it, how it is written, and how it and the runs it gathers are read.

A run is what `posthoc eval NAME --output FILE.json` wrote, a list of tables, or an earlier results.json, of which the tables
are taken. Files are read as if a stranger had sent them: whatever does not fit is named, with its place.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..adapters.errors import DataError
from .bootstrap import Interval
from .table import Cell, Table

SCHEMA_VERSION = 1
KIND = "posthoc report"
LIBRARIES = ("posthoc", "torch", "timm", "numpy", "scipy", "scikit-learn", "pytorch-ood", "matplotlib", "pillow")
PICTURE = re.compile(r"(reliability|risk_coverage|histogram_\w+)\.png")
"""Files of a report's pictures (`report_drawings.pictures`)."""
LARGEST = 2**26
"""Bytes of a run, at most: tables of thousands of rows have less."""
HOW_TO_MEND = "expected a file written by posthoc eval NAME --output FILE.json, or the results.json of a report"


@dataclass(frozen=True)
class Results:
    """What a report says, in numbers.

    Attributes:
        tables: each with the name of the file it was read from; "" for those the report made itself.
        sets: name, role ("id" or "ood") and rows of the sets it looked at. figures: the numbers under its pictures.
        made: date, versions and command line: all that differs when the same input is reported again.
    """

    tables: tuple[tuple[str, Table], ...]
    sets: tuple[Mapping[str, Any], ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    resamples: int = 1000
    made: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As it is written; docs/report.md explains every key."""
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "made": dict(self.made),
            "seed": self.seed,
            "resamples": self.resamples,
            "sets": [dict(one) for one in self.sets],
            "tables": [{"source": source, **table.as_dict()} for source, table in self.tables],
            "figures": dict(self.figures),
        }

    def json(self) -> str:
        """Numbers that are not finite raise ValueError: no reader has to know what NaN means in JSON."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """The tables, in their order."""
        return "\n\n".join(table.markdown() for _, table in self.tables) + "\n"


def made_now(command: Sequence[str], adapter: str | None = None) -> dict[str, Any]:
    """Date (UTC, whole seconds), versions of Python and the libraries that are there, the command line, and the SHA-256 of
    the weights of the adapter that was evaluated, if one was."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    date = datetime.now(UTC).replace(microsecond=0).isoformat()
    return {"date": date, "versions": found, "command": list(command), "adapter": adapter}


def read_run(place: str | Path) -> list[Table]:
    """The tables of a run.

    Raises DataError, naming the file and the place in it, for one that is missing, too large, not JSON, not of posthoc, of
    another schema version, without tables, or with a table that is damaged.
    """
    path = Path(place)
    content = _parsed(path)
    if isinstance(content, dict):
        if content.get("kind") != KIND or "schema_version" not in content:
            raise DataError(f"{path} is JSON of another origin (its keys: {_shown(content)}); {HOW_TO_MEND}")
        if content["schema_version"] != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {content['schema_version']!r}; this posthoc reads version {SCHEMA_VERSION}: "
                "make it again, or read it with the posthoc that wrote it"
            )
        content = content.get("tables")
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise DataError(f"{path} holds no list of tables; {HOW_TO_MEND}")
    if not content:
        raise DataError(f"{path} holds no table; {HOW_TO_MEND}")
    return [table_from_dict(one, f"{path}, table {place}") for place, one in enumerate(content, 1)]


def table_from_dict(given: Mapping[str, Any], where: str = "the table") -> Table:
    """The table that `Table.as_dict` wrote: equal cells, metrics in their order of appearance. Raises DataError."""
    rest = {key: value for key, value in given.items() if key not in ("title", "notes", "scores", "source")}
    title, notes, scores = given.get("title"), given.get("notes", []), given.get("scores")
    if not isinstance(title, str) or not isinstance(scores, dict) or not scores:
        raise DataError(f"{where} lacks a title or scores (its keys: {_shown(given)}); {HOW_TO_MEND}")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise DataError(f"{where} ({title!r}): notes must be a list of sentences")
    cells: dict[str, dict[str, Cell]] = {}
    for name, row in scores.items():
        if not isinstance(row, dict):
            raise DataError(f"{where} ({title!r}): the row {name!r} must map metrics to values, not {row!r}")
        cells[name] = {metric: _cell(one, f"{where} ({title!r}), {metric} of {name}") for metric, one in row.items()}
    metrics = tuple(dict.fromkeys(metric for row in cells.values() for metric in row))
    return Table(title, metrics, cells, tuple(notes), rest)


def _cell(given: Any, where: str) -> Cell:
    if not isinstance(given, dict):
        raise DataError(f"{where} must have value, low and high; it is {given!r}")
    minus, spread, better = given.get("minus_reference"), given.get("spread"), given.get("better", False)
    if not isinstance(better, bool):
        raise DataError(f"{where}: better must be true or false, not {better!r}")
    if spread is not None:
        _number(spread, f"{where}: spread")
    return Cell(
        _interval(given, where), None if minus is None else _interval(minus, f"{where}, difference"), better, spread
    )


def _interval(given: Any, where: str) -> Interval:
    if not isinstance(given, dict):
        raise DataError(f"{where} must have value, low and high; it is {given!r}")
    return Interval(*(_number(given.get(key), f"{where}: {key}") for key in ("value", "low", "high")))


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where} must be a finite number, not {value!r}")
    return float(value)


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"there is no file {path}; {HOW_TO_MEND}")
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path} has {path.stat().st_size} bytes, more than any run needs ({LARGEST}); it was not read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); {HOW_TO_MEND}") from error


def _shown(keys: Mapping[str, Any]) -> str:
    return ", ".join(list(map(str, keys))[:6]) or "none"
