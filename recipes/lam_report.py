"""What the recipe `lam` says of its methods: retrieval, votes, other images; a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapters.metric_predictive import MetricEmbedding
from ..eval import metrics
from ..eval import retrieval_statistics as retrieval
from ..eval.plots import COLOURS, DASHES, FAINT, GREYS, MARKERS, legend, page
from ..eval.search import neighbours
from .lam_data import Part

DEPTHS, FIRST = (5, 10, 20), (1, 5, 10, 20)
NEAR = 25.0
"""Metres to a place that counts as found."""
MAIN = ("mAP@5", "mAP@10", "recall@1", "vote ECE", "AUSC")
WIDE = (*(f"mAP@{k}" for k in DEPTHS), *(f"recall@{k}" for k in FIRST), *MAIN[3:])
Row = dict[str, float]


@dataclass(frozen=True)
class Found:
    """The neighbours of Q queries: gallery rows int64 [Q, k], whether each is of the query's label or place bool [Q, k], and
    how many of the gallery are, int64 [Q]; query and gallery, int64 rows of the part, None: all, and none finds itself."""

    nearest: np.ndarray
    hits: np.ndarray
    positives: np.ndarray
    query: np.ndarray | None = None
    gallery: np.ndarray | None = None

    def map_at(self, k: int) -> float:
        return retrieval.map_at(self.hits, self.positives, min(k, self.hits.shape[1]))


def found_images(embedding: np.ndarray, part: Part) -> Found:
    """Search with unit embeddings [N, D] of a part's images among them."""
    if part.query is None:
        depth = min(max(FIRST), len(part) - 1)
        nearest = neighbours(embedding, k=depth)
        return Found(nearest, *retrieval.label_hits(nearest, part.target))
    query, gallery = np.flatnonzero(part.query), np.flatnonzero(~part.query)
    nearest = neighbours(embedding[query], embedding[gallery], min(max(FIRST), len(gallery)))
    if part.of_places:
        places = part.target[gallery]
        near = np.stack([np.hypot(*(places - one).T) < NEAR for one in part.target[query]])
        hits, positives = np.take_along_axis(near, nearest, 1), near.sum(1)
    else:
        hits, positives = retrieval.label_hits(nearest, part.target[query], part.target[gallery])
    return Found(nearest, hits, positives, query, gallery)


@dataclass(frozen=True)
class Judged:
    """A method's figures, and what its curves are drawn from: the sparsification's uncertainty [Q] and hits [Q], and votes'
    confidence and whether they are right, [Q] each or None."""

    row: Row
    uncertainty: np.ndarray
    hit: np.ndarray
    votes: tuple[np.ndarray, np.ndarray] | None


def judge(
    answer: MetricEmbedding, part: Part, ood: Mapping[str, np.ndarray], score: np.ndarray, reference: bool
) -> Judged:
    """All figures of one method.

    Args:
        answer: of the part's images. score: their uncertainty [N]; ood: that of other images, by the name of their set.
        reference: also mAP, ECE, AUSC and AUPR as the paper's code counts them.
    """
    found = found_images(answer.mean_direction.numpy(), part)
    available = found.hits.shape[1]
    row = {f"mAP@{k}": found.map_at(k) for k in DEPTHS if k <= available}
    row |= {f"recall@{k}": retrieval.recall_at(found.hits, k) for k in FIRST if k <= available}
    own, theirs = (score, score) if found.query is None else (score[found.query], score[found.gallery])
    both = retrieval.retrieval_uncertainty(own, found.nearest, theirs)
    hit = found.hits[:, 0]
    row["AUSC"] = retrieval.ausc(both, hit)
    votes = None
    if answer.samples is not None and not part.of_places:
        predicted, confidence = retrieval.vote_confidence(_votes(answer.samples, part, found))
        asked = part.target if found.query is None else part.target[found.query]
        votes = confidence, predicted == asked
        row["vote ECE"] = retrieval.vote_ece(*votes)
    if reference:
        row |= {
            f"reference mAP@{k}": retrieval.lam_map_at(found.hits, found.positives, k) for k in DEPTHS if k <= available
        }
        row["reference AUSC"] = retrieval.ausc(both, hit, reference=True)
        if votes is not None and (votes[0] < 1).any():
            row["reference vote ECE"] = retrieval.vote_ece(*votes, reference=True)
    if score.max() > score.min():
        for name, others in ood.items():
            row[f"AUROC {name}"] = metrics.auroc(score, others)
            row[f"AUPR {name}"] = metrics.aupr_out(score, others)
            if reference:
                row[f"reference AUPR {name}"] = retrieval.lam_aupr(score, others)
    return Judged(row, both, hit, votes)


def _votes(samples: torch.Tensor, part: Part, found: Found) -> np.ndarray:
    if found.query is None:
        return retrieval.votes(samples, part.target)
    query, gallery = (torch.from_numpy(rows) for rows in (found.query, found.gallery))  # type: ignore[arg-type]
    return retrieval.votes(samples[:, query], part.target[found.query], samples[:, gallery], part.target[found.gallery])


def columns(rows: Sequence[Row], wide: bool = False) -> list[str]:
    """The columns of the table: the main ones that are there (wide: at every depth), and those of each OOD set."""
    known = {name for row in rows for name in row}
    of_sets = (name for name in known if name.startswith("AU") and " " in name)
    others = sorted(of_sets, key=lambda one: (one.split()[1:], one[:5] != "AUROC"))
    return [*(name for name in (WIDE if wide else MAIN) if name in known), *others]


def table(rows: Mapping[str, Row]) -> str:
    """Methods down, figures across, as Markdown."""
    names = columns(list(rows.values()))
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, row in rows.items():
        lines.append(f"| {method} | " + " | ".join(f"{row[name]:.3f}" if name in row else "" for name in names) + " |")
    return "\n".join(lines)


def draw(path: Path, judged: Mapping[str, Judged]) -> None:
    """Accuracy of the first neighbour as the least certain are left out; votes against their shares; AUROC of other images."""
    style = {name: {"color": COLOURS[i % 6], "linestyle": ("-", *DASHES)[i // 6 % 7]} for i, name in enumerate(judged)}
    with page(path, 13.0, 4.6) as figure:
        left, middle, right = figure.subplots(1, 3)
        for name, one in judged.items():
            curve = metrics.accuracy_rejection_curve(one.uncertainty, one.hit, retrieval.DROPPED)
            left.plot(100 * retrieval.DROPPED, curve, label=name, **style[name])
            if one.votes is not None:
                sizes, accuracy, mean = retrieval.vote_bins(*one.votes)
                middle.plot(mean[sizes > 0], accuracy[sizes > 0], marker="o", markersize=3, **style[name])
        left.set(title="First neighbour right", xlabel="least certain left out, %", ylabel="accuracy")
        middle.plot([0, 1], [0, 1], color=GREYS[2], linewidth=0.8)
        middle.set(title="Votes of the draws", xlabel="share of the votes", ylabel="accuracy")
        names = sorted({name for one in judged.values() for name in one.row if name.startswith("AUROC")})
        marked = [(method, one.row) for method, one in judged.items() if names and names[0] in one.row]
        for place, (method, row) in enumerate(marked):
            for i, name in enumerate(names):
                label = None if place else name.removeprefix("AUROC ")
                right.plot(row[name], place, MARKERS[i % 6], color=style[method]["color"], label=label)
        right.set_yticks(range(len(marked)), [method for method, _ in marked])
        right.axvline(0.5, color=FAINT)
        right.set(title="Other images less certain", xlabel="AUROC")
        if marked:
            right.legend(loc="best")
        legend(figure, left, 4)


def as_results(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """The rows, for results.json."""
    return {name: one.row for name, one in judged.items()}
