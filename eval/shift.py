"""Shift: what becomes of accuracy, calibration and uncertainty as images are corrupted more and more.

    posthoc eval shift --data photos/ --model adapter/ --output shift.json

Fifteen kinds of corruption at five severities are made from the images as they are read (`eval.corruptions`), and the
backbone sees each corrupted image once. Averages are over the kinds at one severity; an image is resampled with all its
views. A classifier that is right to be unsure gets less certain as it gets worse.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..adapters.distributed import check_launch
from ..adapters.errors import DataError, OptionError
from .bootstrap import Interval, bootstrap, bootstrap_difference, percentile_interval, resampled_values
from .class_labels import doubtful_labels, usable_labels
from .command import check_writable, run_command
from .corruptions import KINDS, SEVERITIES, check_corruption
from .datasets import check_there
from .inputs import Scored, not_constant, open_model
from .metrics import confidence_and_correct, nll_per_image
from .scaling import fit_scaling
from .score_rows import REFERENCE, score_all
from .shift_statistics import AveragedEce, Joined, Means
from .statistics import Aurc, Ece, Statistic
from .table import Cell, Table, cell
from .views import ViewsCommand, corrupted, open_rows, scored_source

SOFTMAX = "softmax"
BINS = 15
PLOT = ".png"
"""The plot is written beside the tables, with this ending."""
NOTES = {
    "mean uncertainty": ("in standard deviations of the clean images' scores, from their mean",),
    "share whose uncertainty rises": ("above the clean image's; an equal score is no rise",),
}


@dataclass
class Shifted:
    """N images as they are and in V = K S corrupted views: arrays [N, 1 + V], the clean image first, then kind by kind.

    `scores` by name. `correct`, `confidence` (of the top class) and `nll` by the name of the probabilities: "softmax",
    "temperature scaling" and heads that give class probabilities; empty without usable labels.
    """

    name: str
    kinds: tuple[str, ...]
    severities: tuple[int, ...]
    scores: dict[str, np.ndarray]
    correct: dict[str, np.ndarray] = field(default_factory=dict)
    confidence: dict[str, np.ndarray] = field(default_factory=dict)
    nll: dict[str, np.ndarray] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        views = 1 + len(self.kinds) * len(self.severities)
        parts = {"scores": self.scores, "correct": self.correct, "confidence": self.confidence, "nll": self.nll}
        for part, arrays in parts.items():
            for name, values in arrays.items():
                if values.ndim != 2 or values.shape[1] != views:
                    raise DataError(f"{part} of {name!r} have shape {values.shape}; expected [N, {views}]")
        if not self.scores:
            raise DataError(f"{self.name}: there is no score to follow: give a model with a head or a classifier")

    def averaged(self, values: np.ndarray) -> np.ndarray:
        """[R, 1 + V] -> [R, 1 + S + 1]: clean, mean over kinds at each severity, mean over all corrupted views."""
        each = values[:, 1:].reshape(len(values), len(self.kinds), len(self.severities)).mean(1)
        return np.concatenate([values[:, :1], each, each.mean(1, keepdims=True)], axis=1)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `averaged` gives."""
        return ("severity 0", *(f"severity {s}" for s in self.severities), "mean of all")


def shifted(
    model: Any,
    data: Any,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    train: Scored | None = None,
    held_out: Scored | None = None,
    cache_dir: Any = None,
    progress: bool = True,
) -> Shifted:
    """Scores and probabilities of images and of their corrupted views, each view made while it is read.

    Args:
        model: a fitted `UncertainModel`, whose heads are scored, or a `Backbone`; free scores stand beside them.
        data: whatever `open_source` takes, except streams; labels are class indices of the backbone's classifier.
        seed: of the corruptions.
        train: features of training images, for kNN and detectors.
        held_out: labelled features of images that are neither scored nor trained on, for temperature scaling.

    Raises OptionError for an unknown kind or severity, DataError for data that cannot be corrupted.
    """
    kinds, severities = tuple(dict.fromkeys(kinds)), tuple(sorted(set(severities)))
    if not kinds or not severities or 0 in severities:
        raise OptionError(
            f"kinds={kinds} and severities={severities} were given; expected at least one of each, from 1"
        )
    for kind in kinds:
        for severity in severities:
            check_corruption(kind, severity)
    source = open_rows(data)
    views = [source, *(corrupted(source, kind, severity, seed) for kind in kinds for severity in severities)]
    sets = [scored_source(model, view, cache_dir) for view in tqdm(views, "shift", unit="view", disable=not progress)]
    found, notes = score_all(sets, train, held_out=held_out)
    scores = {name: np.stack([one[name] for one in found], axis=1) for name in found[0]}
    label, why = usable_labels(sets[0])
    result = Shifted(source.name, kinds, severities, scores, heads=tuple(getattr(model, "heads", ())))
    doubt = [f"no accuracy, NLL, ECE and AURC: {why}"] if label is None else doubtful_labels(sets[0])
    result.notes = (*notes, *doubt)
    if label is not None:
        for name, log_p in _log_probabilities(model, sets, held_out).items():
            pairs = [confidence_and_correct(one, label) for one in log_p]
            result.confidence[name], result.correct[name] = (np.stack(part, 1) for part in zip(*pairs, strict=True))
            result.nll[name] = np.stack([nll_per_image(one, label) for one in log_p], axis=1)
    return result


def _log_probabilities(model: Any, sets: Sequence[Scored], held_out: Scored | None) -> dict[str, list[np.ndarray]]:
    """Logits, the same scaled by temperature, and log-probabilities of heads that give them, [N, C] for each set."""
    import torch

    from ..adapters.scoring import feature_batches

    names = [name for name, head in getattr(model, "heads", {}).items() if "probabilities" in head.fields]
    found: dict[str, list[np.ndarray]] = {SOFTMAX: [np.asarray(one.logits) for one in sets]}
    if held_out is not None:
        scaling = fit_scaling("temperature", held_out.logits, held_out.label)
        found["temperature scaling"] = [scaling.log_probability(one.logits) for one in sets]
    for one in sets if names else ():
        assert one.features is not None
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for _, batch in feature_batches(one.features, np.arange(one.rows), model.device):
            with torch.no_grad():
                prediction = model.answer(batch)
            for name in names:
                p = prediction[name].probabilities
                parts[name].append(p.clamp(min=torch.finfo(p.dtype).tiny).log().cpu().numpy())
        for name in names:
            found.setdefault(name, []).append(np.concatenate(parts[name]))
    return found


def shift_tables(
    one: Shifted, *, reference: str | None = REFERENCE, resamples: int = 1000, seed: int = 0
) -> list[Table]:
    """Tables against severity: accuracy, NLL and ECE of probabilities; AURC, mean uncertainty and share that rises of scores.

    Values are means over kinds; those of every kind are in the JSON. The mean uncertainty is told in standard deviations of
    the clean images' scores from their mean (both are in the JSON and held fixed), so that scores can be compared. AURC is
    of the backbone's own decisions. Raises DataError for scores that are constant or not finite.
    """
    Scored(one.name, {name: u[:, 0] for name, u in one.scores.items()})
    not_constant({name: tuple(u.T) for name, u in one.scores.items()})
    make = _Maker(one, resamples, seed)
    tables = []
    if one.correct:
        tables.append(make.table("accuracy", {k: Means(v) for k, v in one.correct.items()}, reference=SOFTMAX))
        tables.append(make.table("NLL", {k: Means(v) for k, v in one.nll.items()}, reference=SOFTMAX, lower=True))
        tables.append(make.ece())
        wrong = ~one.correct[SOFTMAX]
        areas = {
            name: Joined([Aurc(*view) for view in zip(u.T, wrong.T, strict=True)]) for name, u in one.scores.items()
        }
        tables.append(make.table("AURC", areas, reference=reference, lower=True))
    clean = {name: (float(u[:, 0].mean()), float(u[:, 0].std())) for name, u in one.scores.items()}
    moved = {k: Means((u - clean[k][0]) / (clean[k][1] or 1.0)) for k, u in one.scores.items()}
    units = {name: {"mean": mean, "standard_deviation": deviation} for name, (mean, deviation) in clean.items()}
    tables.append(make.table("mean uncertainty", moved, clean=False, about={"clean": units}))
    rises = {name: Means(u > u[:, :1]) for name, u in one.scores.items()}
    tables.append(make.table("share whose uncertainty rises", rises, reference=reference, clean=False))
    first, *rest = tables
    return [replace(first, notes=(*make.notes, *first.notes)), *rest]


FREE = 6
"""Scores beside the heads in a plot, one for each grey and dash there is."""


class _Maker:
    """Makes the tables of one `Shifted` with the same resamples."""

    def __init__(self, one: Shifted, resamples: int, seed: int) -> None:
        self.one, self.resamples, self.seed = one, resamples, seed
        self.rows = len(next(iter(one.scores.values())))
        self.notes = (f"{self.rows} images, {len(one.kinds)} kinds of corruption; a mean over kinds", *one.notes)

    def table(
        self,
        metric: str,
        made: Mapping[str, Statistic],
        *,
        reference: str | None = None,
        lower: bool = False,
        clean: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> Table:
        """A table of statistics of 1 + V values; without `clean` severity 0, which says nothing, is left out."""
        samples = dict(zip(made, resampled_values(list(made.values()), self.resamples, self.seed), strict=True))
        values = {name: one.value()[None] for name, one in made.items()}
        cells: dict[str, dict[str, Cell]] = {}
        by_kind: dict[str, Any] = {}
        for name in made:
            drawn, value = self.one.averaged(samples[name]), self.one.averaged(values[name])[0]
            cells[name] = {}
            for k, column in enumerate(self.one.columns):
                minus = None
                if reference is not None and reference in made and name != reference:
                    gap = drawn[:, k] - self.one.averaged(samples[reference])[:, k]
                    minus = percentile_interval(value[k] - self.one.averaged(values[reference])[0, k], gap)
                if k or clean:
                    cells[name][column] = cell(percentile_interval(value[k], drawn[:, k]), minus, lower)
            each = [percentile_interval(v, s) for v, s in zip(values[name][0, 1:], samples[name][:, 1:].T, strict=True)]
            by_kind[name] = self._by_kind(each)
        return self._finished(metric, cells, by_kind, reference, clean, about)

    def ece(self) -> Table:
        """Expected calibration error, whose intervals are corrected for its bias."""
        cells: dict[str, dict[str, Cell]] = {}
        by_kind: dict[str, Any] = {}
        parts = {
            name: [Ece(c, r, BINS) for c, r in zip(p.T, self.one.correct[name].T, strict=True)]
            for name, p in self.one.confidence.items()
        }
        few, many = len(self.one.severities), len(self.one.kinds)
        groups = [[0], *([1 + k * few + s for k in range(many)] for s in range(few)), list(range(1, 1 + few * many))]
        averaged = {name: [AveragedEce([p[i] for i in group]) for group in groups] for name, p in parts.items()}
        options = {"resamples": self.resamples, "seed": self.seed}
        for name, statistics in averaged.items():
            cells[name] = {}
            for column, mine, theirs in zip(self.one.columns, statistics, averaged[SOFTMAX], strict=True):
                minus = None if name == SOFTMAX else bootstrap_difference(mine, theirs, **options)
                cells[name][column] = cell(bootstrap(mine, **options), minus, True)
            by_kind[name] = self._by_kind([bootstrap(one, **options) for one in parts[name][1:]])
        return self._finished("ECE", cells, by_kind, SOFTMAX, True, {"bins": BINS})

    def _by_kind(self, each: Sequence[Interval]) -> dict[str, dict[str, dict[str, float]]]:
        few = len(self.one.severities)
        return {
            kind: {str(s): vars(each[k * few + i]) for i, s in enumerate(self.one.severities)}
            for k, kind in enumerate(self.one.kinds)
        }

    def _finished(
        self, metric: str, cells: Any, by_kind: Any, reference: str | None, clean: bool, about: Mapping[str, Any] | None
    ) -> Table:
        common = {"set": self.one.name, "metric": metric, "rows": self.rows, "reference": reference}
        common |= {"resamples": self.resamples, "seed": self.seed, **(about or {}), "by_kind": by_kind}
        return Table(f"{self.one.name}: {metric}", self.one.columns[not clean :], cells, NOTES.get(metric, ()), common)


def draw_shift(path: Path, tables: Sequence[Table], heads: Sequence[str] = ()) -> None:
    """A panel for each table, severity to the right; heads in colour with their intervals, what costs nothing in grey.

    Of the scores that are no heads' the first `FREE` in the order of the tables, which hold all of them: with more no line
    could be told from the next.
    """
    from .plots import curves, legend, looks, page

    names = list(dict.fromkeys(name for table in tables for name in table.cells))
    scores = [n for n in names if n in tables[-1].cells and n not in heads][:FREE]
    kept = [n for n in names if n in scores or n not in tables[-1].cells]
    look = looks([n for n in names if n in heads], kept)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    columns = min(3, len(tables))
    with page(part, 4.4 * columns, 3.4 * -(-len(tables) // columns) + 0.6) as figure:
        panels = figure.subplots(-(-len(tables) // columns), columns, squeeze=False)
        for axis, table in zip(panels.flat, tables, strict=True):
            shown = table.metrics[:-1]
            x = [int(metric.split()[1]) for metric in shown]
            lines = {name: [row[metric].value for metric in shown] for name, row in table.cells.items() if name in look}
            title = str(table.about["metric"])
            curves(axis, x, lines, look, title=title, xlabel="severity", ylabel="")
            axis.set_xticks(x)
            if not lines.keys() <= tables[-1].cells.keys():  # probabilities, which the common legend has not
                axis.legend(fontsize=8)
        legend(figure, panels.flat[-1], 4)
    part.replace(path)


@dataclass
class Shift(ViewsCommand):
    """Follow accuracy, calibration and uncertainty as images are corrupted in 15 ways at 5 severities.

    Example: posthoc eval shift --data photos/ --model adapter/ --rows 500 --output shift.json"""

    data: str
    """images: name of a set (cifar10, ...), folder, parquet file, or hub data set id; labels, if any, as the classifier has"""
    model: str
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    kinds: tuple[str, ...] = tuple(KINDS)
    """which corruptions"""
    severities: tuple[int, ...] = SEVERITIES
    """which of the severities 1 to 5"""
    rows: int | None = None
    """how many of the images, drawn by the seed; default: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None:
            if self.output.suffix.lower() == PLOT:
                raise OptionError(
                    f"--output {self.output} is where the plot would go; give the name of the tables, such as "
                    f"{self.output.with_suffix('.json')}: the plot is written beside them"
                )
            check_writable(self.output.with_suffix(PLOT))

    def run(self) -> None:
        check_there(self.data, self.split)
        model = open_model(self.model, self.checkpoint, self.device)
        source = open_rows(self.data, self.rows, self.seed, self.split)
        train, held_out = self.fitted_on(model)
        one = shifted(
            model, source, kinds=self.kinds, severities=self.severities, seed=self.seed, train=train, held_out=held_out
        )
        tables = shift_tables(one, reference=self.reference, resamples=self.resamples, seed=self.seed)
        self.show(tables)
        if self.output is not None and check_launch().is_main:
            draw_shift(self.output.with_suffix(PLOT), tables, one.heads)


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval shift`."""
    run_command(Shift, "posthoc eval shift", arguments)


if __name__ == "__main__":
    main()
