"""Ambiguity: do scores follow what people disagree about, and do they rise where part of the image is cut away?

    posthoc eval ambiguity --data photos/ --model adapter/ --votes votes.npy

Human ambiguity is the entropy of annotators' votes; synthetic ambiguity is a centre crop, enlarged to the image's size.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import entr

from ..adapters.errors import DataError, OptionError
from ..adapters.perturbations import CROP_FRACTIONS
from .arrays import Array, finite
from .bootstrap import bootstrap_curve
from .command import run_command
from .datasets import check_there
from .inputs import Scored, not_constant, open_model, read
from .score_rows import REFERENCE, score_all
from .shift_statistics import Means
from .statistics import Mean, Spearman, Statistic
from .table import Cell, Table, fill
from .views import ViewsCommand, cropped, holds_images, open_rows, scored_source

FRACTIONS = tuple(fraction for fraction in CROP_FRACTIONS if fraction < 1)


def vote_entropy(votes: Array) -> np.ndarray:
    """Entropy in nats of annotators' votes, float64 [N], 0 to log C.

    `votes`: counts or shares [N, C], C >= 2, one row for each image; a row is divided by its sum. Raises DataError for
    another shape, negative or non-finite votes, and rows without a vote.
    """
    table = finite("votes", votes, 2)
    if table.shape[1] < 2:
        raise DataError(f"votes have shape {table.shape}; expected [N, C] with a column for each of at least 2 classes")
    if table.min() < 0:
        raise DataError(f"votes are counts or shares, at least 0; row {np.argmin(table.min(1))} has {table.min():g}")
    total = table.sum(1, keepdims=True)
    if not total.all():
        bad = np.flatnonzero(total[:, 0] == 0)
        raise DataError(f"{len(bad)} of {len(table)} images have no vote (first: row {bad[0]}); leave them out")
    return entr(table / total).sum(1)


def read_votes(path: Path, rows: int, classes: int | None = None) -> np.ndarray:
    """Shares of the votes float64 [N, C] from a .npy file of shares or of counts, for the `rows` images of a data set.

    `classes`: C, where it is known.

    Raises DataError: no such file, no array of numbers, another shape, negative or non-finite numbers (naming the first),
    rows that neither sum to 1 nor are whole numbers.
    """
    table = _vote_table(path, rows, classes).astype(np.float64)
    bad = np.argwhere(~((table >= 0) & (table < np.inf)))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"{path}: row {row} has {table[row, column]:g} in column {column}, the first of {len(bad)} such numbers; expected "
            "counts or shares of votes, finite and not negative"
        )
    total = table.sum(1)
    counts = (table == np.round(table)).all() and (total > 0).all()
    off = np.flatnonzero(np.abs(total - 1) > 1e-3)
    if len(off) and not counts:
        raise DataError(
            f"{path}: {len(off)} rows do not sum to 1 (first: row {off[0]}, {total[off[0]]:g}); expected each image's "
            "shares of the votes, or whole numbers of votes, at least one for each image"
        )
    return table / total[:, None]


def _vote_table(path: Path, rows: int, classes: int | None) -> np.ndarray:
    """The file's numbers [rows, C]."""
    expected = f"expected a .npy array of votes [{rows}, {classes or 'C'}], a row for each image"
    try:
        with path.open("rb") as file:  # of a torn archive numpy would leave it open
            votes = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"cannot read votes: there is no file {path}; {expected}") from error
    except OSError as error:
        raise DataError(f"cannot read votes from {path}: {error}; {expected}") from error
    # numpy's own message advises to unpickle what a stranger may have written
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read votes from {path}: it is no .npy file of plain numbers; {expected}") from error
    if not isinstance(votes, np.ndarray):
        votes.close()
        raise DataError(f"{path} is an archive of arrays; {expected}")
    if votes.ndim != 2 or votes.dtype.kind not in "iuf":
        raise DataError(f"{path} holds {votes.dtype} {list(votes.shape)}; {expected}")
    for what, found, wanted in (("rows", votes.shape[0], rows), ("columns", votes.shape[1], classes)):
        if wanted is not None and found != wanted:
            raise DataError(f"{path} has {found} {what}, expected {wanted}: {expected}")
    return votes


def human_statistics(scores: Mapping[str, np.ndarray], votes: Array) -> dict[str, Statistic]:
    """Spearman of each score [N] with the entropy of the votes [N, C]."""
    ambiguous = vote_entropy(votes)
    return {name: Spearman(u, ambiguous) for name, u in scores.items()}


def crop_statistics(crops: Mapping[str, np.ndarray], fractions: Sequence[float]) -> dict[str, dict[str, Statistic]]:
    """By metric and score, from scores [N, 1 + F] of the whole image and of its crops.

    `crop_spearman`: of the score with 1 - crop fraction, the whole image being fraction 1; `crop_less_certain`: share of
    crops whose score is above the whole image's, ties being none. An image is resampled with all its crops.
    """
    cut = np.array([0.0, *(1 - fraction for fraction in fractions)])
    for name, u in crops.items():
        if u.ndim != 2 or u.shape[1] != len(cut):
            raise DataError(
                f"score {name!r} has shape {u.shape}; expected [N, {len(cut)}]: the whole image and its crops"
            )
    return {
        "crop_spearman": {name: Spearman(u, np.broadcast_to(cut, u.shape)) for name, u in crops.items()},
        "crop_less_certain": {name: Mean((u[:, 1:] > u[:, :1]).mean(1)) for name, u in crops.items()},
    }


def ambiguity_table(
    scores: Mapping[str, np.ndarray],
    *,
    votes: Array | None = None,
    fractions: Sequence[float] = (),
    name: str = "ambiguity",
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """Human and synthetic ambiguity of scores by name, with paired differences from the reference.

    Args:
        scores: [N], or [N, 1 + F] with the scores of F crops of each image after the whole image's.
        votes: annotators' counts or shares [N, C]; None: no `human_spearman`.
        fractions: the F crops' shares of the side; none: no crop columns.

    Raises DataError for shapes that do not fit, votes that are none, and scores that are constant or not finite.
    """
    if votes is None and not fractions:
        raise OptionError("neither votes nor crop fractions were given: there is nothing to compare scores with")
    whole = {key: u[:, 0] if u.ndim == 2 else u for key, u in scores.items()}
    not_constant({key: (u,) for key, u in Scored(name, dict(whole)).scores.items()})
    made: dict[str, dict[str, Statistic]] = {}
    notes = [f"{len(next(iter(whole.values())))} images"]
    if votes is not None:
        made["human_spearman"] = human_statistics(whole, votes)
        notes.append("human_spearman: rank correlation of the score with the entropy of the annotators' votes")
    about: dict[str, Any] = {"set": name, "reference": reference, "resamples": resamples, "seed": seed}
    if fractions:
        made |= crop_statistics(scores, fractions)
        about["crop_fractions"] = list(fractions)
        about["less_certain_by_fraction"] = {
            key: [vars(one) for one in bootstrap_curve(Means(u[:, 1:] > u[:, :1]), resamples=resamples, seed=seed)]
            for key, u in scores.items()
        }
        shown = ", ".join(f"{fraction:g}" for fraction in fractions)
        notes.append(f"crops: the middle {shown} of each side; one image's crops are resampled together")
    cells: dict[str, dict[str, Cell]] = {key: {} for key in scores}
    for metric, statistics in made.items():
        for key, row in fill(statistics, [metric], (), reference, resamples, seed).items():
            cells[key].update(row)
    return Table(name, tuple(made), cells, tuple(notes), about)


def crop_scores(
    model: Any,
    data: Any,
    fractions: Sequence[float] = FRACTIONS,
    *,
    train: Scored | None = None,
    held_out: Scored | None = None,
    cache_dir: Any = None,
) -> tuple[Scored, dict[str, np.ndarray], list[str]]:
    """The whole images, the scores [N, 1 + F] of them and of F crops by name, and notes on what was left out.

    `model`: a fitted `UncertainModel` (its heads are scored) or a `Backbone`; beside its heads stand the free scores.
    `train`, `held_out`: what `score_all` fits kNN, detectors and a temperature on.
    """
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise OptionError(f"crop fraction {fraction:g} was given; expected numbers above 0 and below 1")
    source = open_rows(data)
    sets = [scored_source(model, one, cache_dir) for one in (source, *(cropped(source, f) for f in fractions))]
    found, notes = score_all(sets, train, held_out=held_out)
    return sets[0], {name: np.stack([one[name] for one in found], axis=1) for name in found[0]}, notes


@dataclass
class Ambiguity(ViewsCommand):
    """Compare how well scores follow people's disagreement, and whether they rise when an image is cropped.

    Example: posthoc eval ambiguity --data photos/ --model adapter/ --votes votes.npy"""

    data: str
    """images with --model; or a score file or stored features, of which no crops can be made"""
    model: str | None = None
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    votes: Path | None = None
    """.npy file of annotators' votes, counts or shares [N, C], a row for each image of --data"""
    fractions: tuple[float, ...] = FRACTIONS
    """sides of the crops over the image's sides; none: no crops"""
    rows: int | None = None
    """how many of the images, drawn by the seed; default: all"""

    def run(self) -> None:
        if holds_images(self.data):
            check_there(self.data, self.split)
        model = open_model(self.model, self.checkpoint, self.device)
        train, held_out = self.fitted_on(model)
        fractions: tuple[float, ...] = ()
        if model is None or not holds_images(self.data):
            if self.rows is not None:
                raise OptionError(
                    "--rows chooses among images; of a score file or stored features all rows are compared"
                )
            one = read(self.data, model, self.split)
            (scores,), notes = score_all([one], train, held_out=held_out)
            notes.append(f"no crops: {self.data} holds no images")
            votes = None if self.votes is None else read_votes(self.votes, one.rows)
        else:
            fractions = self.fractions
            source = open_rows(self.data, self.rows, self.seed, self.split)
            one, scores, notes = crop_scores(model, source, fractions, train=train, held_out=held_out)
            votes = self._votes_of(source)
        table = ambiguity_table(
            scores, votes=votes, fractions=fractions, name=one.name, reference=self.reference,
            resamples=self.resamples, seed=self.seed,
        )  # fmt: skip
        self.show([table.noted(*notes)])

    def _votes_of(self, source: Any) -> np.ndarray | None:
        """The votes of the chosen rows; the file has a row for every image of the whole data set."""
        if self.votes is None:
            return None
        chosen = getattr(source, "rows", None)
        whole = source if chosen is None else source.inner
        votes = read_votes(self.votes, len(whole))
        return votes if chosen is None else votes[chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval ambiguity`."""
    run_command(Ambiguity, "posthoc eval ambiguity", arguments)


if __name__ == "__main__":
    main()
