"""What was measured of an adapter: the report in its folder `evaluation/`, as `posthoc eval report` wrote it there.

    posthoc eval report --model adapter/ --id photos/ --ood textures/ --output adapter/evaluation

Of that folder results.json and plots (.png, .svg) go to the hub and into the card; the page index.html does not, for it
shows images.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.card import Evaluation, Measured
from ..adapters.command_line import published
from ..adapters.config import AdapterConfig
from ..adapters.errors import AdapterError
from ..eval.results import PICTURE, read_run

if TYPE_CHECKING:
    from ..eval.table import Table


FOLDER, RESULTS = "evaluation", "results.json"
PLOT = re.compile(r"[A-Za-z0-9][\w.-]*\.(png|svg)")
OURS = re.compile(rf"{FOLDER}/({re.escape(RESULTS)}|{PICTURE.pattern})")
"""What `posthoc eval report` wrote, within a repository: nothing else of it is ours to replace or to take away."""
MAX_PLOT_BYTES = 2**22


def evaluation_files(folder: Path) -> list[str]:
    """Names within the folder of what of its evaluation is published; empty where there is none."""
    place = folder / FOLDER
    if not (place / RESULTS).is_file():
        return []
    plots = sorted(p.name for p in place.iterdir() if PLOT.fullmatch(p.name) and p.is_file() and not p.is_symlink())
    for name in plots:
        size = (place / name).stat().st_size
        if size > MAX_PLOT_BYTES:
            raise AdapterError(f"{place / name} has {size} bytes; a plot for a card has at most {MAX_PLOT_BYTES}")
    return [f"{FOLDER}/{name}" for name in (RESULTS, *plots)]


def read_evaluation(folder: Path, config: AdapterConfig) -> Evaluation | None:
    """The evaluation in an adapter's folder; None where there is none.

    Raises AdapterError where it is of other weights than the folder's, PosthocError where it cannot be read.
    """
    files = evaluation_files(folder)
    if not files:
        return None
    tables = read_run(folder / files[0])
    told = json.loads((folder / files[0]).read_text(encoding="utf-8"))
    made = told.get("made", {}) if isinstance(told, dict) else {}
    found = made.get("adapter")
    if found != config.weights.sha256:
        of = "no adapter is named in it" if found is None else f"it is of weights with the SHA-256 {found}"
        raise AdapterError(
            f"{folder / files[0]} is not of this adapter ({of}; the folder's are {config.weights.sha256}): evaluate again with "
            f"`posthoc eval report --model {folder} ... --output {folder / FOLDER}`, or delete {FOLDER}/"
        )
    inside = next((str(one.get("name")) for one in told.get("sets", []) if one.get("role") == "id"), "")
    heads = {head.name for head in config.heads}
    measured = [one for table in tables for one in _figures(table, heads, inside)]
    return Evaluation(measured, "\n\n".join(_harmless(table.markdown()) for table in tables), files[1:])


def _figures(table: Table, heads: set[str], inside: str) -> list[Measured]:
    from ..eval.report_sections import KINDS, kind_of

    task = next((title for key, title, _, _ in KINDS if key == kind_of(table)), "Other")
    other = str(table.about.get("set", table.title))
    data = f"{inside} against {other}" if kind_of(table) == "ood" else inside or other
    return [
        Measured(name, task, data, metric, cell.value.value, cell.value.low, cell.value.high)
        for name, row in table.cells.items()
        if name in heads
        for metric, cell in row.items()
    ]


def _harmless(text: str) -> str:
    """Names in tables may be anybody's: none opens a comment or an element in the card."""
    return re.sub(r"<(?=[!/A-Za-z])", "&lt;", text)


def published_file(folder: Path, name: str) -> bytes:
    """What a file of an adapter's folder is on the hub: itself, but that results.json names no folder of this machine."""
    content = (folder / name).read_bytes()
    if name != f"{FOLDER}/{RESULTS}":
        return content
    told = json.loads(content)
    if isinstance(told, dict) and isinstance(told.get("made"), dict):
        told["made"]["command"] = published([str(word) for word in told["made"].get("command") or []])
    return (json.dumps(told, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def copy_evaluation(source: Path, folder: Path) -> None:
    """What is published of a report's folder, into the folder of an adapter.

    Raises AdapterError where the report's folder holds no results.json.
    """
    if not (source / RESULTS).is_file():
        raise AdapterError(f"{source} holds no {RESULTS}: give the folder that `posthoc eval report --output` wrote")
    (folder / FOLDER).mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name == RESULTS or PLOT.fullmatch(path.name):
            (folder / FOLDER / path.name).write_bytes(path.read_bytes())
