"""What a report finds out by itself about sets of images: every table, number and picture they allow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..adapters.errors import DataError, OptionError
from .calibration import calibration_table
from .class_labels import doubtful_labels, has_classes, mistakes
from .dataset_notes import parts_by_class, preprocessing_notes, unremoved_classes
from .inputs import Scored
from .ood import check_overlap, ood_table
from .report_figures import drawn_names, figures_of
from .report_images import Strip, can_show, gallery, retrieval_strips
from .retrieval import embedding_table, retrieve, score_table
from .scaling import scaled
from .score_rows import REFERENCE, score_all
from .search import directions
from .selective import selective_table
from .table import Table


@dataclass(frozen=True)
class Evaluated:
    """Tables, the numbers of the figures, and the strips of images.

    drawn: scores with a curve and galleries. given: those scores that came with the sets, not free ones.
    """

    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    galleries: dict[str, list[Strip]] = field(default_factory=dict)
    neighbours: list[Strip] = field(default_factory=list)


def evaluate(
    sets: Sequence[Scored],
    train: Scored | None = None,
    held_out: Scored | None = None,
    *,
    reference: str = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluated:
    """All of it for sets of different names, the ID one first; arguments as of `posthoc eval ood`.

    Raises OptionError for two sets of one name, DataError where the sets share no score or `score_all` refuses them.
    """
    inside = sets[0]
    names = [one.name for one in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptionError(f"two sets are called {', '.join(twice)}; rename a file or folder: a name tells them apart")
    shared = {one.name: check_overlap(inside, [one]) for one in sets[1:]}
    scores, notes = score_all(sets, train, held_out=held_out)
    if not scores[0]:
        raise DataError("there is no score that all sets have: give score files with the same names, or features")
    wrong, why = mistakes(inside)
    if wrong is not None and not wrong.any():
        wrong, why = None, f"the classifier is always right on {inside.name}: there is no mistake to find"
    if why and len(sets) == 1:  # with OOD sets their tables say it
        warnings.warn(f"no table of mistakes: {why}", UserWarning, stacklevel=3)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    notes += doubtful_labels(inside)
    tables = []
    seen = preprocessing_notes(sets)
    for one, theirs in zip(sets[1:], scores[1:], strict=True):
        more = [
            *shared[one.name],
            *unremoved_classes(inside, one),
            *notes,
            *([f"no scod: {why}"] if why else []),
            *seen,
        ]
        for part in parts_by_class(inside, one):
            kept = {key: values[part.rows] for key, values in theirs.items()}
            table = ood_table(scores[0], kept, name=part.name, wrong=wrong, reference=reference, **options)
            tables.append(table.noted(*part.notes, *more))
    if has_classes(inside):
        tables.append(_calibration(inside, held_out, **options))
    if wrong is not None:
        table = selective_table(scores[0], wrong, name=inside.name, reference=reference, **options)
        tables.append(table.noted(*notes))
    tables += [table.noted(*notes) for table in _retrieval(inside, scores[0], **options)]
    given = [name for name in scores[0] if name in inside.scores]
    drawn = drawn_names(given, [name for name in scores[0] if name not in given])
    figures = figures_of(sets, scores, drawn, wrong, **options)
    galleries: dict[str, list[Strip]] = {}
    if any(map(can_show, sets)):
        found = {name: gallery(sets, scores, name) for name in drawn}
        galleries = {name: strips for name, (strips, _) in found.items()}
        figures["galleries"] = {name: numbers for name, (_, numbers) in found.items()}
    neighbours, told = retrieval_strips(inside, seed)
    if told is not None:
        figures["neighbours"] = told
    return Evaluated(tables, figures, drawn, given, galleries, neighbours)


def _calibration(inside: Scored, held_out: Scored | None, **options: Any) -> Table:
    """The softmax's row and, with held-out images, those of the scalings fitted on them."""
    logits, label = np.asarray(inside.logits), np.asarray(inside.label)
    values, note = {"softmax": logits}, "no --held-out: no scaling was fitted"
    if held_out is not None:
        values |= scaled(logits, held_out.logits, held_out.label)
        note = f"scalings fitted on {held_out.rows} rows of {held_out.name}"
    return calibration_table(values, label, name=inside.name, **options).noted(note)


def _retrieval(inside: Scored, scores: Mapping[str, np.ndarray], **options: Any) -> list[Table]:
    """What an image finds among the others of its set, and which scores tell where it is of another class."""
    if inside.embedding is None or inside.label is None or inside.label.ndim != 1 or inside.rows < 2:
        return []
    rows = directions(f"{inside.name}: embedding", inside.embedding)
    found = retrieve(rows, inside.label)
    hit = found.hit[found.known]
    if not len(hit):
        return []
    tables = [embedding_table(found, name=inside.name, **options)]
    every = {"distance": found.distance, **scores}
    kept = {name: values for name, values in every.items() if np.ptp(np.asarray(values)[found.known]) > 0}
    if kept and 0 < hit.sum() < len(hit):
        tables.append(score_table(kept, found, gallery_scores=scores, name=inside.name, **options))
    return tables
