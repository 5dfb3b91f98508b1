"""Zero-shot transfer: heads fitted on one data set say how certain they are on others that they were not fitted on.

    posthoc eval transfer --model adapter/ --data cifar10-test/ textures.parquet letters/

For every data set: does the uncertainty tell images whose nearest neighbour is of another class (R-AUROC; Kirchhof et al.,
NeurIPS 2023 Datasets), does it rise for crops, does it follow people's disagreement. The heads stay as they are, and data that
they were fitted on are refused; of the scores beside them, kNN and detectors are fitted on --train and a temperature on
--held-out. A random score stands beside the free ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.errors import DataError, OptionError
from ..adapters.source_base import Source
from .ambiguity import FRACTIONS, crop_scores, crop_statistics, human_statistics, read_votes
from .arrays import Array, same_rows
from .bootstrap import bootstrap
from .command import run_command
from .datasets import check_there
from .inputs import Scored, not_constant, open_model, read
from .retrieval_statistics import label_hits
from .score_rows import REFERENCE, score_all, seen_by_heads
from .search import directions, neighbours
from .selective_statistics import FailureAuroc
from .statistics import Mean, Statistic
from .table import Cell, Table, fill
from .views import ViewsCommand, holds_images, open_rows

RANDOM = "random"


def nearest_hits(embedding: Array, label: Array) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image's nearest other image (by cosine) has its class, and whether any other image has: bool [N] each.

    An image that is alone in its class cannot be a hit and takes no part, as in `retrieval`. Soft labels [N, C] count as
    their likeliest class. Raises DataError for fewer than two images, and when all or none of those that take part are hits.
    """
    classes = np.asarray(label)
    classes = classes if classes.ndim == 1 else classes.argmax(1)
    unit = directions("embedding", embedding)
    same_rows(embedding=unit, label=classes)
    found, positives = label_hits(neighbours(unit), classes)
    hits, known = found[:, 0], positives > 0
    if hits[known].all() or not hits.any():
        word = "no" if not hits.any() else "every"
        raise DataError(f"{word} image's nearest neighbour has its class: there is nothing to tell apart")
    return hits, known


def transfer_table(
    scores: Mapping[str, np.ndarray],
    embedding: Array,
    label: Array | None,
    *,
    votes: Array | None = None,
    fractions: Sequence[float] = (),
    name: str = "transfer",
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """R-AUROC, crop test and human ambiguity of scores by name on a data set they were not fitted on.

    Args:
        scores: [N], or [N, 1 + F] with the scores of F crops after the whole image's; a seeded random score is added.
        embedding: the backbone's [N, D]. label: int [N] or soft [N, C]; None: no R-AUROC and recall@1.
        votes: annotators' counts or shares [N, C].
        fractions: the F crops' shares of the side.

    `r_auroc` is the chance that an image whose nearest other image has another class is less certain than one whose nearest
    has its own; one alone in its class takes no part. Queries are resampled; the gallery, and with it every query's
    neighbour, stays as it is. recall@1 belongs to the embedding, not to a score: it is in the notes and in `about`. Raises
    DataError for shapes that do not fit, and scores that are constant or not finite.
    """
    rows = len(next(iter(scores.values())))
    values = {key: u if u.ndim == 2 else u[:, None] for key, u in scores.items()}
    values[RANDOM] = np.random.default_rng([seed, rows]).random((rows, 1 + len(fractions)))
    whole = {key: u[:, 0] for key, u in values.items()}
    not_constant({key: (u,) for key, u in Scored(name, dict(whole)).scores.items()})
    made: dict[str, dict[str, Statistic]] = {}
    notes = [f"{rows} images"]
    about: dict[str, Any] = {"set": name, "rows": rows, "reference": reference, "resamples": resamples, "seed": seed}
    if label is not None:
        hits, known = nearest_hits(embedding, label)
        made["r_auroc"] = {key: FailureAuroc(u[known], ~hits[known]) for key, u in whole.items()}
        recall = bootstrap(Mean(hits[known]), resamples=resamples, seed=seed)
        alone = int((~known).sum())
        about |= {"recall_at_1": vars(recall), "alone_in_their_class": alone}
        told = f"; {alone} images alone in their class are left out of it and of r_auroc" if alone else ""
        notes.append(f"recall@1 of the embedding {recall}{told}")
    if fractions:
        made |= crop_statistics(values, fractions)
        about["crop_fractions"] = list(fractions)
    if votes is not None:
        made["human_spearman"] = human_statistics(whole, votes)
    if not made:
        raise DataError(f"{name} has neither labels nor votes nor crops: there is nothing to compare scores with")
    cells: dict[str, dict[str, Cell]] = {key: {} for key in values}
    for metric, statistics in made.items():
        for key, row in fill(statistics, [metric], (), reference, resamples, seed).items():
            cells[key].update(row)
    return Table(name, tuple(made), cells, tuple(notes), about)


@dataclass
class Transfer(ViewsCommand):
    """Evaluate fitted heads, without refitting, on data sets they have not seen.

    Example: posthoc eval transfer --model adapter/ --data cifar10-test/ textures.parquet"""

    model: str
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    data: tuple[str, ...]
    """one or several data sets with labels: images, or stored features, of which no crops can be made"""
    votes: tuple[str, ...] = ()
    """annotators' votes of a data set, NAME=FILE: the name its table has, and a .npy file [N, C]"""
    fractions: tuple[float, ...] = FRACTIONS
    """sides of the crops over the image's sides; none: no crops"""

    def run(self) -> None:
        if not self.data:
            raise OptionError("--data names no data set; expected at least one")
        voted = self._votes()
        for place in filter(holds_images, self.data):
            check_there(place, self.split)
        model = open_model(self.model, self.checkpoint, self.device)
        opened = [
            open_rows(place, split=self.split) if holds_images(place) else read(place, model, self.split)
            for place in self.data
        ]
        known = [one.name for one in opened]
        if set(voted) - set(known):
            raise OptionError(
                f"--votes names {', '.join(sorted(set(voted) - set(known)))}; the data sets are {', '.join(known)}"
            )
        for given in opened:
            if seen_by_heads(model, given if isinstance(given, Source) else given.features):
                raise DataError(
                    f"the heads of {self.model} were fitted on {given.name}: transfer is to data sets they were not fitted on; "
                    "leave it out"
                )
        train, held_out = self.fitted_on(model)
        tables = []
        for place, given in zip(self.data, opened, strict=True):
            fractions = self.fractions if isinstance(given, Source) else ()
            if isinstance(given, Source):
                one, scores, notes = crop_scores(model, given, fractions, train=train, held_out=held_out)
            else:
                one = given
                (scores,), notes = score_all([one], train, held_out=held_out)
                notes.append(f"no crops: {place} holds no images")
            if one.embedding is None:
                raise DataError(f"{place} has no embedding: neighbours are looked for among embeddings")
            path = voted.get(one.name)
            votes = None if path is None else read_votes(path, one.rows)
            table = transfer_table(
                scores, one.embedding, one.label, votes=votes, fractions=fractions, name=one.name,
                reference=self.reference, resamples=self.resamples, seed=self.seed,
            )  # fmt: skip
            tables.append(table.noted(*notes))
        self.show(tables)

    def _votes(self) -> dict[str, Path]:
        pairs = [word.partition("=") for word in self.votes]
        for name, equals, path in pairs:
            if not (name and equals and path):
                raise OptionError(
                    f"--votes {name}{equals}{path} was given; expected NAME=FILE, such as cifar10=votes.npy"
                )
        return {name: Path(path) for name, _, path in pairs}


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval transfer`."""
    run_command(Transfer, "posthoc eval transfer", arguments)


if __name__ == "__main__":
    main()
