"""OOD detection, one table for each OOD set: every head, every free score, every detector, with intervals.

    posthoc eval ood --id test.npz --ood tiny.npz dtd.npz
    posthoc eval ood --id cifar10 --ood tiny-imagenet dtd --model adapter/
    posthoc eval ood --id photos/ --ood textures/ --model adapter/ --train training-photos/ --held-out other-photos/

Higher uncertainty means OOD, and nothing is turned round to look better. No OOD row selects or fits anything. Of an OOD set that
shares classes with the ID set (`dataset_classes`) there are two tables, with these images and without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..adapters.errors import DataError, OptionError
from .arrays import first_few
from .class_labels import doubtful_labels, mistakes
from .command import run_command
from .dataset_notes import parts_by_class, preprocessing_notes, unremoved_classes
from .datasets import check_there
from .inputs import TABLES, Scored, not_constant, overlap, read, same_network
from .ood_statistics import OodMetrics, ScodAurc, ScodAuroc
from .score_rows import REFERENCE, RowsCommand
from .table import Table, fill, over_seeds

LOWER = ("fpr95", "ood_accepted_at_95_id", "scod_aurc")


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
        notes.append(
            f"scod: {about['id_errors']} mistakes (accuracy {1 - np.mean(wrong):.4f}) and {b.rows} OOD images are to be rejected "
            "together"
        )
    title = f"{name} ({kind} OOD)" if kind else name
    if reference in inside:
        notes.append(f"marked: better than {reference} on the same resampled rows, beyond the 95 % interval")
    return Table(
        title, metrics, cells, tuple(notes), about | {"reference": reference, "resamples": resamples, "seed": seed}
    )


def check_overlap(inside: Scored, others: Sequence[Scored]) -> list[str]:
    """A note for each set that shares images with the ID set. Raises DataError for one that holds nothing else.

    Of files with scores alone it is told only that all rows are the same in the same order: single scores repeat by chance.
    """
    notes = []
    for one in others:
        _, theirs = overlap(inside, one)
        if (theirs and len(theirs) == one.rows) or _same_scores(inside, one):
            raise DataError(f"every image of {one.name} is also in {inside.name}: this is no OOD set")
        if theirs:
            notes.append(
                f"{len(theirs)} of {one.rows} images of {one.name} are also in {inside.name} (rows {first_few(theirs)})"
            )
    return notes


def _same_scores(inside: Scored, one: Scored) -> bool:
    """Whether two sets that share nothing but scores have the same in all rows."""
    if any(getattr(inside, key) is not None and getattr(one, key) is not None for key in ("content", *TABLES)):
        return False
    names = inside.scores.keys() & one.scores.keys()
    return bool(names) and all(np.array_equal(inside.scores[name], one.scores[name]) for name in names)


@dataclass
class Ood(RowsCommand):
    """Compare how well scores tell OOD images from ID images; every free score and detector stands beside them.

    Example: posthoc eval ood --id test.npz --ood tiny-imagenet.npz dtd.npz --far dtd"""

    id: str
    """ID images: score file (.npz, .csv), stored features, or images with --model: a folder, a data set on the hub, or one of
    cifar10, cifar100, svhn, tiny-imagenet, lsun, celeba, coco, dtd, notmnist, cars196, mnist, fashion-mnist, omniglot"""
    ood: tuple[str, ...]
    """one or several OOD sets, each as --id"""
    near: tuple[str, ...] = ()
    """names of sets to mark as near"""
    far: tuple[str, ...] = ()
    """names of sets to mark as far"""

    def tables(self) -> list[Table]:
        self._check_places()
        for place in (self.id, *self.ood):
            check_there(place, self.split)  # before any image is looked at
        models = self.models()
        sets = [read(place, models[0], self.split) for place in (self.id, *self.ood)]
        same_network(sets)
        inside, outside = sets[0], sets[1:]
        names = [one.name for one in outside]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise OptionError(
                f"two OOD sets are called {', '.join(twice)}; rename a file or folder: a name tells them apart"
            )
        for name in (*self.near, *self.far):
            if name not in names:
                raise OptionError(f"--near or --far names {name!r}; the OOD sets are {', '.join(names)}")
        shared = [check_overlap(inside, [one]) for one in outside]
        every, more = self.rows(sets, models)
        if not every[0][0]:
            raise DataError("there is no score that all sets have: give score files with the same names, or features")
        wrong, why = mistakes(inside)
        if why is not None:
            more.append(f"no scod: {why}")
        more += doubtful_labels(inside)
        more += preprocessing_notes(sets)
        made = []
        for k, one in enumerate(outside, start=1):
            mine = shared[k - 1] + unremoved_classes(inside, one)
            for part in parts_by_class(inside, one):
                tables = [
                    ood_table(
                        scores[0],
                        {key: values[part.rows] for key, values in scores[k].items()},
                        name=part.name,
                        kind="near" if one.name in self.near else "far" if one.name in self.far else None,
                        wrong=wrong,
                        reference=self.reference,
                        resamples=self.resamples,
                        seed=self.seed,
                    )
                    for scores in every
                ]
                table = tables[0] if len(tables) == 1 else over_seeds(tables)
                table = table.noted(*part.notes, *mine, *more)
                made.append(replace(table, about={**table.about, "set": one.name}))
        return made

    def _check_places(self) -> None:
        """Raises OptionError, before anything is read, for sets that are given twice or not at all."""
        if not self.ood:
            raise OptionError("--ood names no set; expected at least one")
        both = sorted(set(self.near) & set(self.far))
        if both:
            raise OptionError(f"{', '.join(both)} cannot be both --near and --far")
        inside, *outside = (Path(place).expanduser().resolve() for place in (self.id, *self.ood))
        for place, path in zip(self.ood, outside, strict=True):
            if path == inside:
                raise OptionError(
                    f"--ood {place} is the set of --id: every image of it is in both, so it is no OOD set"
                )
            if outside.count(path) > 1:
                raise OptionError(f"--ood names {place} twice; give each OOD set once")

    def run(self) -> None:
        self.show(self.tables())


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval ood`."""
    run_command(Ood, "posthoc eval ood", arguments)


if __name__ == "__main__":
    main()
