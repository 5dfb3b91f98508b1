"""A report: the tables of earlier runs, and those of sets given here with pictures, in JSON, Markdown and one HTML page.

    posthoc eval report ood.json calibration.json --output report/
    posthoc eval report --id test.npz --ood textures.npz --output report/
    posthoc eval report --id photos/ --ood textures/ --model adapter/ --output report/

Its drawings are written as pictures beside it. The page needs no network and no other file. What results.json holds is told
in docs/report.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..adapters.command_line import command_words
from ..adapters.distributed import check_launch
from ..adapters.errors import OptionError
from ..adapters.files import replace_file
from . import report_page
from .command import TableCommand, run_command
from .extras import require
from .inputs import Scored, open_model, read
from .report_drawings import pictures
from .report_sections import look_of, sections
from .report_tables import Evaluated, evaluate
from .results import PICTURE, Results, made_now, read_run
from .score_rows import REFERENCE
from .table import render

TITLE = "Evaluation report"
FILES = ("results.json", "results.md", "index.html")


def write_report(
    output: str | Path,
    runs: Sequence[str | Path] = (),
    inside: Scored | None = None,
    outside: Sequence[Scored] = (),
    train: Scored | None = None,
    held_out: Scored | None = None,
    *,
    reference: str = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
    command: Sequence[str] = (),
) -> Results:
    """Write results.json, results.md, index.html and pictures to the folder `output`, each under a temporary name first.

    Args:
        runs: files of `posthoc eval NAME --output`, or earlier results.json.
        inside, outside, train, held_out: sets as `posthoc eval ood` takes them (`inputs.read`, `inputs.from_arrays`).
            Tables and pictures are made of whatever they hold: scores, labels, logits, embeddings, images.
        reference: the score that paired differences are taken from. command: the command line, to be kept.

    Equal input gives equal files, but for the block `made` of results.json. Raises OptionError where nothing is given or
    the folder cannot be written, DataError for runs and sets that cannot be read, PosthocError without matplotlib.
    """
    places = [Path(run) for run in runs]
    if not places and inside is None:
        raise OptionError(
            "there is nothing to report: give runs (files of posthoc eval NAME --output), or --id and more"
        )
    if outside and inside is None:
        raise OptionError("OOD sets were given without ID images: give --id too")
    folder = _folder(Path(output))
    tables = [(run.name, table) for run in places for table in read_run(run)]
    sets = [] if inside is None else [inside, *outside]
    found = Evaluated()
    if sets:
        require("matplotlib", "matplotlib")
        found = evaluate(sets, train, held_out, reference=reference, resamples=resamples, seed=seed)
        tables += [("", table) for table in found.tables]
    told = [{"name": one.name, "role": "ood" if place else "id", "rows": one.rows} for place, one in enumerate(sets)]
    made = made_now(command, getattr(getattr(inside, "model", None), "loaded_from", {}).get("weights"))
    results = Results(tuple(tables), tuple(told), found.figures, seed, resamples, made)
    html = report_page.page(TITLE, told, sections(results, found))
    if check_launch().is_main:
        for name, content in zip(FILES, (results.json(), results.markdown(), html), strict=True):
            replace_file(folder / name, content.encode())
        made_pictures = pictures(found.figures, found.given or found.drawn, look_of(found))
        for name, picture in made_pictures.items():
            replace_file(folder / name, picture)
        for path in folder.iterdir():  # of an earlier report into the same folder
            if PICTURE.fullmatch(path.name) and path.name not in made_pictures:
                path.unlink()
    return results


def _folder(output: Path) -> Path:
    """The folder, made and found writable before any work, by the main process of a launch."""
    if not check_launch().is_main:
        return output
    try:
        output.mkdir(parents=True, exist_ok=True)
        replace_file(output / "results.json.try", b"")
        (output / "results.json.try").unlink()
    except OSError as error:
        raise OptionError(f"cannot write a report to {output}: {error}; give --output a folder of yours") from error
    return output


@dataclass
class Report(TableCommand):
    """Gather runs, and evaluate sets given here, in results.json, results.md and one HTML page with pictures.

    Example: posthoc eval report ood.json --id test.npz --ood textures.npz --output report/"""

    output_is_folder = True
    output: Path = field()  # asked for, unlike that of a table
    """folder to write to"""
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """files written by posthoc eval NAME --output FILE.json, or results.json of other reports"""
    id: str | None = None
    """ID images to evaluate here: score file (.npz, .csv), stored features, or images with --model"""
    ood: tuple[str, ...] = ()
    """OOD sets, each as --id"""
    model: str | None = None
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    train: str | None = None
    """images or stored features of the training set: kNN and detectors are fitted on them alone"""
    held_out: str | None = None
    """labelled ID images that are neither scored nor trained on: temperature, vector and isotonic scaling are fitted on them"""
    reference: str = REFERENCE
    """score that paired differences are taken from"""

    def run(self) -> None:
        for name in ("ood", "train", "held_out", "model"):
            if getattr(self, name) and self.id is None:
                raise OptionError(
                    f"--{name.replace('_', '-')} was given without --id: which images are to be evaluated?"
                )
        _folder(self.output)
        for place in self.runs:
            read_run(place)  # what is wrong with them is told before any image is looked at
        model = open_model(self.model, self.checkpoint, self.device)
        results = write_report(
            self.output,
            self.runs,
            None if self.id is None else read(self.id, model, self.split),
            [read(place, model, self.split) for place in self.ood],
            None if self.train is None else read(self.train, model, "train"),
            None if self.held_out is None else read(self.held_out, model, self.split),
            reference=self.reference,
            resamples=self.resamples,
            seed=self.seed,
            command=command_words(self, ("posthoc", "eval", "report"), ("runs",)),
        )
        if self.id is not None:
            self.check_reference([table for _, table in results.tables])
        if not check_launch().is_main:
            return
        print(render([table for _, table in results.tables], self.format))
        print(f"{', '.join(FILES)} and pictures are in {self.output}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval report`."""
    run_command(Report, "posthoc eval report", arguments)


if __name__ == "__main__":
    main()
