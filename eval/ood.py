"""OOD detection, one table for each OOD set: every head, every free score, every detector, with intervals.

    posthoc eval ood --id test.npz --ood tiny.npz dtd.npz
    posthoc eval ood --id photos/ --ood textures/ --model adapter/ --train training-photos/

Higher uncertainty means OOD, and nothing is turned round to look better. No OOD row selects or fits anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.errors import DataError, OptionError
from . import baselines
from .command import TableCommand, run_command
from .detectors import Training, augmented, fit_detectors, last_layer
from .inputs import Scored, not_constant, open_model, overlap, read
from .ood_statistics import OodMetrics, ScodAurc, ScodAuroc
from .table import Table, fill

LOWER = ("fpr95", "ood_accepted_at_95_id", "scod_aurc")
REFERENCE = "max-softmax"


def ood_table(
    inside: Mapping[str, np.ndarray],
    outside: Mapping[str, np.ndarray],
    *,
    name: str = "OOD",
    kind: str | None = None,
    wrong: np.ndarray | None = None,
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """The table of one OOD set: scores of ID images [N] and of OOD images [M] by name, higher = less certain.

    Args:
        kind: "near" or "far", printed in the title.
        wrong: bool [N], the classifier's mistakes on the ID images: adds the SCOD columns.
        reference: the score that paired differences are taken from; None, or one that is not there: no differences.

    ID and OOD rows are resampled separately, the same rows for every score. Raises DataError for scores that only one of
    the two has, of different length, not finite (naming the rows), or the same everywhere.
    """
    if set(inside) != set(outside) or not inside:
        odd = ", ".join(sorted(set(inside) ^ set(outside))) or "none at all"
        raise DataError(f"{name}: ID and OOD images need the same scores; only one of them has {odd}")
    if kind not in (None, "near", "far"):
        raise OptionError(f"kind={kind!r} was given; expected 'near', 'far' or None")
    a, b = (
        Scored("ID", dict(inside), correct=None if wrong is None else ~np.asarray(wrong, bool)),
        Scored(name, dict(outside)),
    )
    not_constant({key: (inside[key], outside[key]) for key in inside})
    cells = fill(
        {key: OodMetrics(inside[key], outside[key]) for key in inside},
        OodMetrics.NAMES,
        LOWER,
        reference,
        resamples,
        seed,
    )
    metrics = OodMetrics.NAMES
    about = {"set": name, "kind": kind, "id_rows": a.rows, "ood_rows": b.rows, "ood_share": b.rows / (a.rows + b.rows)}
    notes = [
        f"{a.rows} ID and {b.rows} OOD images: chance of aupr_out is {about['ood_share']:.3f}, of aupr_in the rest"
    ]
    if wrong is not None:
        for metric, make in (("scod_auroc", ScodAuroc), ("scod_aurc", ScodAurc)):
            made = {key: make(inside[key], wrong, outside[key]) for key in inside}
            for key, row in fill(made, [metric], LOWER, reference, resamples, seed).items():
                cells[key].update(row)
            metrics = (*metrics, metric)
        about["id_errors"] = int(np.sum(wrong))
        notes.append(f"scod: {about['id_errors']} mistakes and {b.rows} OOD images are to be rejected together")
    title = f"{name} ({kind} OOD)" if kind else name
    if reference in inside:
        notes.append(f"marked: better than {reference} on the same resampled rows, beyond the 95 % interval")
    return Table(
        title, metrics, cells, tuple(notes), about | {"reference": reference, "resamples": resamples, "seed": seed}
    )


def score_all(
    sets: Sequence[Scored], train: Scored | None = None, k: int = 50
) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    """Given scores and every free one that what is stored allows, for each set, and notes on what was left out.

    `train`: features of training images; kNN and the detectors are fitted on them alone. A score that one set cannot have
    is left out everywhere, and noted.
    """
    found, notes = [dict(one.scores) for one in sets], []
    if all(one.logits is not None for one in sets):
        for scores, one in zip(found, sets, strict=True):
            scores.update({name: score(one.logits) for name, score in baselines.LOGIT_SCORES.items()})
    if all(one.embedding is not None for one in sets):
        for scores, one in zip(found, sets, strict=True):
            scores["1/feature-norm"] = baselines.inverse_norm(one.embedding)
    if all(one.features is not None and one.features.views > 1 and one.logits is not None for one in sets):
        for scores, one in zip(found, sets, strict=True):
            assert one.features is not None
            scores["entropy, augmented"] = augmented(baselines.entropy, one.features.logits)
    if train is None:
        notes.append("no --train: neither kNN nor detectors")
    else:
        notes += _fitted(found, sets, train, k)
    common = set.intersection(*map(set, found))
    for name in sorted(set.union(*map(set, found)) - common):
        notes.append(f"left out {name}: not every set has it")
    return [{name: values for name, values in scores.items() if name in common} for scores in found], notes


def _fitted(found: list[dict[str, np.ndarray]], sets: Sequence[Scored], train: Scored, k: int) -> list[str]:
    notes: list[str] = []
    if train.embedding is not None and all(one.embedding is not None for one in sets):
        k = min(k, train.rows)
        for scores, one in zip(found, sets, strict=True):
            scores[f"kNN (k={k})"] = baselines.knn(one.embedding, train.embedding, k=k)
    if train.penultimate is None or train.logits is None or train.label is None:
        return [*notes, "no detectors: the training features lack a penultimate input, logits or labels"]
    if any(one.penultimate is None for one in sets):
        return [*notes, "no detectors: not every set has penultimate features"]
    try:
        weight, bias = last_layer(train.penultimate, train.logits)
    except DataError as error:
        return [*notes, f"no detectors: {error}"]
    detectors = fit_detectors(Training(train.penultimate, train.label, weight, bias))
    for scores, one in zip(found, sets, strict=True):
        scores.update(detectors.scores(one.penultimate))
    return [*notes, *(f"left out {name}: {why}" for name, why in detectors.left_out.items())]


def check_overlap(inside: Scored, others: Sequence[Scored]) -> list[str]:
    """A note for each set that shares images with the ID set. Raises DataError for one that holds nothing else."""
    notes = []
    for one in others:
        _, theirs = overlap(inside, one)
        if theirs and len(theirs) == one.rows:
            raise DataError(f"every image of {one.name} is also in {inside.name}: this is no OOD set")
        if theirs:
            shown = ", ".join(map(str, theirs[:5])) + (", ..." if len(theirs) > 5 else "")
            notes.append(f"{len(theirs)} of {one.rows} images of {one.name} are also in {inside.name} (rows {shown})")
    return notes


@dataclass
class Ood(TableCommand):
    """Compare how well scores tell OOD images from ID images; every free score and detector stands beside them.

    Example: posthoc eval ood --id test.npz --ood tiny-imagenet.npz dtd.npz --far dtd"""

    id: str
    """ID images: score file (.npz, .csv), stored features, or images with --model"""
    ood: tuple[str, ...]
    """one or several OOD sets, each as --id"""
    model: str | None = None
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    train: str | None = None
    """images or stored features of the training set: kNN and detectors are fitted on them alone"""
    near: tuple[str, ...] = ()
    """names of sets to mark as near"""
    far: tuple[str, ...] = ()
    """names of sets to mark as far"""
    reference: str = REFERENCE
    """score that paired differences are taken from"""

    def tables(self) -> list[Table]:
        if not self.ood:
            raise OptionError("--ood names no set; expected at least one")
        model = open_model(self.model, self.checkpoint, self.device)
        sets = [read(place, model, self.split) for place in (self.id, *self.ood)]
        inside, outside = sets[0], sets[1:]
        names = [one.name for one in outside]
        for name in (*self.near, *self.far):
            if name not in names:
                raise OptionError(f"--near or --far names {name!r}; the OOD sets are {', '.join(names)}")
        notes = check_overlap(inside, outside)
        train = None if self.train is None else read(self.train, model, "train")
        scores, more = score_all(sets, train)
        if not scores[0]:
            raise DataError("there is no score that all sets have: give score files with the same names, or features")
        wrong = None if inside.correct is None else ~inside.correct
        if wrong is not None and wrong.all():
            wrong = None
            more.append(f"no scod: the classifier is never right on {inside.name}; are these labels its classes?")
        made = []
        for name, one in zip(names, scores[1:], strict=True):
            kind = "near" if name in self.near else "far" if name in self.far else None
            table = ood_table(
                scores[0], one, name=name, kind=kind, wrong=wrong, reference=self.reference,
                resamples=self.resamples, seed=self.seed,
            )  # fmt: skip
            mine = [note for note in notes if f" images of {name} are " in note]
            made.append(Table(table.title, table.metrics, table.cells, (*table.notes, *mine, *more), table.about))
        return made

    def run(self) -> None:
        self.show(self.tables())


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval ood`."""
    run_command(Ood, "posthoc eval ood", arguments)


if __name__ == "__main__":
    main()
