"""Retrieval with an embedding and how well scores tell its mistakes, with intervals; credible sets by option.

    posthoc eval retrieval --data test.npz
    posthoc eval retrieval --data queries.npz --gallery gallery.npz --credible 0.95 --held-out calibration.npz

Neighbours are exact, by cosine. Queries are resampled and the gallery stays: a resampled gallery holds copies of what is
looked for. A true neighbour is an image of the same class; queries without one are reported apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..adapters.errors import DataError, OptionError
from .command import TableCommand, run_command
from .credible_table import credible_table, vote_table
from .inputs import TABLES, Scored, not_constant, open_model, overlap, read
from .retrieval_statistics import (
    Ausc,
    KnownMeans,
    average_precision_at,
    average_precision_at_r,
    label_hits,
)
from .score_rows import score_all, trained_rows
from .search import directions, neighbours
from .selective_statistics import ExcessAurc, FailureAuroc
from .statistics import Aurc, Statistic
from .table import Cell, Table, fill

FIRST = (1, 5, 10)
DEPTH = 10
HITS = 1 << 24  # neighbours held at a time
REFERENCE = "distance"
LOWER = ("aurc", "excess_aurc")


@dataclass(frozen=True)
class Retrieved:
    """What each of Q queries found in a gallery of G images.

    Attributes:
        nearest: gallery row of the first neighbour, int64 [Q]. distance: 1 - its cosine, float64 [Q].
        hit: whether it has the query's label, bool [Q]. positives: gallery images that have, int64 [Q].
        values: metrics by name, float64 [Q], of which the mean is reported; NaN for a query that takes no part.
        gallery: images that a query could find.
    """

    nearest: np.ndarray
    distance: np.ndarray
    hit: np.ndarray
    positives: np.ndarray
    values: Mapping[str, np.ndarray]
    gallery: int

    @property
    def known(self) -> np.ndarray:
        """Queries that have a true neighbour, bool [Q]."""
        return self.positives > 0


def retrieve(
    query: np.ndarray,
    label: np.ndarray,
    gallery: np.ndarray | None = None,
    gallery_label: np.ndarray | None = None,
    *,
    device: torch.device | str = "cpu",
    backend: str = "torch",
) -> Retrieved:
    """Search with unit vectors [Q, D] and labels [Q] in a gallery [G, D] with [G]; None: in the queries themselves.

    Metrics: recall@k for k of 1, 5, 10 (as far as the gallery has rows), MAP@R and mAP@10 over queries with a true
    neighbour, and LAM's mAP@10, where the others count as 1. Raises DataError for labels or shapes that do not fit.
    """
    if (gallery is None) != (gallery_label is None):
        raise DataError("a gallery and its labels come together; one of them was given")
    columns, names = (query, label) if gallery is None else (gallery, gallery_label)
    assert names is not None
    for what, one, words in (("query", query, label), ("gallery", columns, names)):
        if words.shape != (len(one),):
            raise DataError(f"the {what} labels are of shape {words.shape}; expected one for each of {len(one)} rows")
    available = len(columns) - (gallery is None)
    if available < 1:
        raise DataError("the gallery holds nothing but the query: at least two images are needed")
    positives = label_hits(np.zeros((len(query), 1), np.int64), label, gallery_label)[1]
    found = []
    depth = min(available, max(DEPTH, int(positives.max())))
    step = max(1, HITS // depth)
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        own = np.arange(len(query))[rows] if gallery is None else None
        nearest = neighbours(query[rows], columns, depth, own=own, device=device, backend=backend)
        found.append(_values(names[nearest] == label[rows, None], positives[rows]) | {"nearest": nearest[:, 0]})
    joined = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    nearest = joined.pop("nearest")
    cosine = np.einsum("qd,qd->q", query, columns[nearest], dtype=np.float64)
    return Retrieved(nearest, 1.0 - cosine.clip(-1, 1), names[nearest] == label, positives, joined, available)


def _values(hits: np.ndarray, positives: np.ndarray) -> dict[str, np.ndarray]:
    known = positives > 0
    values = {
        f"recall_at_{k}": np.where(known, hits[:, :k].any(1), np.nan) for k in FIRST if k == 1 or k <= hits.shape[1]
    }
    values["map_at_r"] = average_precision_at_r(hits, positives)
    if hits.shape[1] >= DEPTH:
        precision = average_precision_at(hits, positives, DEPTH)
        values |= {f"map_at_{DEPTH}": precision, f"lam_map_at_{DEPTH}": np.nan_to_num(precision, nan=1.0)}
    return values


def embedding_table(found: Retrieved, *, name: str = "retrieval", resamples: int = 1000, seed: int = 0) -> Table:
    """Metrics of the embedding. Raises DataError when no query has a true neighbour."""
    known = found.known
    if not known.any():
        raise DataError(
            f"{name}: no query has a true neighbour in the gallery (an image with its label): nothing can be retrieved"
        )
    names = tuple(found.values)
    statistic = KnownMeans(np.stack([found.values[key] for key in names], 1))
    cells = fill({"embedding": statistic}, names, (), None, resamples, seed)
    chance = found.positives[known].mean() / found.gallery
    notes = [
        f"{len(known)} queries, {found.gallery} images to find, by cosine; "
        f"recall_at_1 of a random neighbour is {chance:.4f}"
    ]
    if len(known) > known.sum():
        notes.append(
            f"{int((~known).sum())} queries have no true neighbour in the gallery and are left out of all but lam_map_at_10, "
            "where they count as 1"
        )
    about = {"set": name, "rows": len(known), "with_truth": int(known.sum()), "gallery": found.gallery, "seed": seed}
    return Table(f"{name}: retrieval", names, cells, tuple(notes), about)


def score_table(
    scores: Mapping[str, np.ndarray],
    found: Retrieved,
    *,
    gallery_scores: Mapping[str, np.ndarray] | None = None,
    name: str = "retrieval",
    reference: str | None = REFERENCE,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """How well scores [Q] by name tell the queries whose first neighbour is of another class.

    R-AUROC (Kirchhof et al. 2023), AURC and its excess of recall@1, and the area under LAM's sparsification curve with
    its slips mended. `lam_ausc` sorts by the sum of the scores of a query and of its first neighbour, as LAM does, where
    `gallery_scores` [G] has them. Raises DataError for scores that are constant, and when every first neighbour is right,
    or none.
    """
    known = found.known
    hit = found.hit[known]
    if hit.all() or not hit.any():
        raise DataError(f"{name}: the first neighbour is {'always' if hit.all() else 'never'} right: no score can tell")
    own = {key: np.asarray(values)[known] for key, values in scores.items()}
    not_constant({key: (values,) for key, values in own.items()})
    made: dict[str, dict[str, Statistic]] = {
        "r_auroc": {key: FailureAuroc(u, ~hit) for key, u in own.items()},
        "ausc": {key: Ausc(u, hit) for key, u in own.items()},
        "aurc": {key: Aurc(u, ~hit) for key, u in own.items()},
        "excess_aurc": {key: ExcessAurc(u, ~hit) for key, u in own.items()},
    }
    theirs = gallery_scores or {}
    both = {key: own[key] + np.asarray(theirs[key])[found.nearest[known]] for key in own if key in theirs}
    if both:
        made["lam_ausc"] = {key: Ausc(u, hit) for key, u in both.items()}
    cells: dict[str, dict[str, Cell]] = {key: {} for key in own}
    for metric, statistics in made.items():
        for key, row in fill(statistics, [metric], LOWER, reference, resamples, seed).items():
            cells[key].update(row)
    notes = [f"{len(hit)} queries with a true neighbour, recall_at_1 {hit.mean():.4f}"]
    if reference in own:
        notes.append(f"marked: better than {reference} on the same resampled queries, beyond the 95 % interval")
    about = {"set": name, "rows": len(hit), "errors": int((~hit).sum()), "reference": reference, "seed": seed}
    return Table(f"{name}: whether the first neighbour is right", tuple(made), cells, tuple(notes), about)


@dataclass
class Retrieval(TableCommand):
    """Measure retrieval with an embedding, how well scores tell its mistakes, and credible sets.

    Example: posthoc eval retrieval --data queries.npz --gallery gallery.npz"""

    data: str
    """labelled queries: score file (.npz) with embedding and label, stored features, or images with --model"""
    gallery: str | None = None
    """labelled images that are searched, as --data; default: the queries, each without itself"""
    model: str | None = None
    """adapter folder (its heads are scored) or timm name (free scores only)"""
    train: str | None = None
    """images or stored features of the training set: kNN and detectors are fitted on them alone"""
    reference: str = REFERENCE
    """score that paired differences are taken from; distance: 1 - cosine to the first neighbour"""
    credible: float | None = None
    """add sets of all images in the cap with this share of a query's posterior, such as 0.95; needs --gallery and a head
    with kappa (or `concentration` in the score file)"""
    held_out: str | None = None
    """labelled queries that are neither data nor gallery: the credible sets' radius is calibrated on them"""
    loss: Literal["missed", "none"] = "missed"
    """of a calibrated set: the share of a query's true neighbours outside, or 1 if all of them are"""
    delta: float = 0.1
    """chance that the calibrated sets of mode pac may fail with"""
    uncertain_gallery: bool = False
    """the gallery's images have posteriors too: the cap is that of both convolved"""
    draws: int = 0
    """from each image's posterior, for votes of the first neighbour: their share is a confidence, and has an ECE"""
    backend: Literal["torch", "faiss"] = "torch"
    """of the search"""

    def run(self) -> None:
        if self.credible is not None and self.gallery is None:
            raise OptionError("--credible needs --gallery: a set round a query may not be judged by the query itself")
        if self.held_out is not None and self.credible is None:
            raise OptionError("--held-out calibrates credible sets: give --credible 0.95 as well")
        model = open_model(self.model, self.checkpoint, self.device)
        one = read(self.data, model, self.split)
        others = None if self.gallery is None else read(self.gallery, model, self.split)
        notes = _prepare(one) + ([] if others is None else _prepare(others) + _copies(one, others))
        query, label = _unit(one)
        gallery, gallery_label = (None, None) if others is None else _unit(others)
        searched = query if gallery is None else gallery
        if len(searched) > 1 and (searched == searched[0]).all():
            raise DataError(f"{one.name}: every embedding that is searched is the same: nothing can be retrieved")
        device = self.device or "cpu"
        found = retrieve(query, label, gallery, gallery_label, device=device, backend=self.backend)
        notes += _equal(query, searched, found)
        common: dict[str, Any] = {"name": one.name, "resamples": self.resamples, "seed": self.seed}
        table = embedding_table(found, **common)
        tables = [table.noted(*notes)]
        tables += self._scores(one, others, model, found, common)
        if self.draws:
            tables.append(vote_table(one, others, self.draws, device=device, **common))
        if self.credible is not None:
            tables.append(self._sets(one, others, model, common, device))
        self.show(tables)

    def _scores(
        self, one: Scored, others: Scored | None, model: Any, found: Retrieved, common: dict[str, Any]
    ) -> list[Table]:
        train = None if self.train is None else read(self.train, model, "train")
        if others is None:
            (scores,), notes = score_all([one], train)
            theirs = scores
        elif _same_scores(one, others) and not (train is not None and trained_rows(others, train)):
            (scores, theirs), notes = score_all([one, others], train)
        else:  # the gallery lacks what the queries have, or is what kNN and detectors are fitted on: its own scores alone
            (scores,), notes = score_all([one], train)
            theirs = score_all([others])[0][0]
        hit = found.hit[found.known]
        if hit.all() or not hit.any():
            return []  # the first table shows a recall of 1 or 0: no score can tell
        notes = [note for note in notes if not note.startswith("no --held-out")]  # which is of the credible sets here
        flat = [key for key, u in scores.items() if np.ptp(u[found.known]) == 0]
        notes += [f"left out {key}: the same for every query" for key in flat]
        kept = {"distance": found.distance} | {key: u for key, u in scores.items() if key not in flat}
        if np.ptp(found.distance[found.known]) == 0:
            del kept["distance"]
        if not kept:
            return []
        table = score_table(kept, found, gallery_scores=theirs, reference=self.reference, **common)
        return [table.noted(*notes)]

    def _sets(self, one: Scored, others: Scored | None, model: Any, common: dict[str, Any], device: str) -> Table:
        assert others is not None
        assert self.credible is not None
        held_out = None if self.held_out is None else read(self.held_out, model, self.split)
        if held_out is not None:
            _prepare(held_out)
            for used in (one, others):
                if len(shared := overlap(held_out, used)[0]):
                    raise DataError(
                        f"{len(shared)} images of --held-out {held_out.name} are also in {used.name} (first: row "
                        f"{shared[0]}): sets are calibrated on queries that are neither judged nor found"
                    )
        return credible_table(
            one, others, held_out, share=self.credible, loss=self.loss, delta=self.delta,
            uncertain_gallery=self.uncertain_gallery, device=device, **common,
        )  # fmt: skip


def _prepare(one: Scored) -> list[str]:
    """Checks what a set must have; notes on vectors that are not of length 1."""
    one.need("embedding", "label")
    assert one.embedding is not None
    assert one.label is not None
    if one.label.ndim != 1:
        raise DataError(f"{one.name}: retrieval needs one class for each image; these labels are of {one.label.shape}")
    length = np.linalg.norm(one.embedding, axis=1)
    if np.allclose(length, 1.0, atol=1e-3):
        return []
    return [f"embeddings of {one.name} were normalised: their lengths go from {length.min():.3g} to {length.max():.3g}"]


def _unit(one: Scored) -> tuple[np.ndarray, np.ndarray]:
    assert one.label is not None
    return directions(f"{one.name}: embedding", one.embedding), one.label


def _copies(one: Scored, others: Scored) -> list[str]:
    shared = overlap(one, others)[0]
    if len(shared) == one.rows:
        raise DataError(
            f"every image of {one.name} is also in the gallery {others.name}, where it would find itself: leave --gallery "
            "away, and each query is left out of its own search"
        )
    return (
        [f"{len(shared)} queries are also in the gallery, and find themselves (first: row {shared[0]})"]
        if shared
        else []
    )


def _same_scores(one: Scored, others: Scored) -> bool:
    """Whether the gallery has every score and table of the queries."""
    tables = all(getattr(one, key) is None or getattr(others, key) is not None for key in TABLES)
    return tables and set(one.scores) <= set(others.scores)


def _equal(query: np.ndarray, gallery: np.ndarray, found: Retrieved) -> list[str]:
    same = int((query == gallery[found.nearest]).all(1).sum())
    return [f"{same} queries have a first neighbour with an equal embedding: copies?"] if same else []


def main(arguments: Sequence[str] | None = None) -> None:
    """`posthoc eval retrieval`."""
    run_command(Retrieval, "posthoc eval retrieval", arguments)


if __name__ == "__main__":
    main()
