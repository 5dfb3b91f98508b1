"""The prior precision of a metric posterior by retrieval on held-out rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .metric_laplace import MetricPosterior

SAMPLES, QUERIES, GALLERY = 32, 1000, 1000
DECADES = range(-1, 7)
NOTHING_GAINED = 1e-6


@torch.no_grad()
def choose_prior(
    posterior: MetricPosterior,
    queries: Tensor,
    query_label: Tensor,
    gallery: Tensor,
    gallery_label: Tensor,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Set the prior precision, of eight decades, with the least retrieval risk on held-out rows; returns the report.

    The risk is the Brier score of the vote: under each of 32 draws of the weights a query takes the label of its nearest
    gallery row, and the shares of the labels are scored as class probabilities, sum_c (share_c - [c = y])^2. It is
    proper: a posterior too narrow pays for confident mistakes, one too wide for doubt. It needs no likelihood, which clamped
    curvature is not. Every decade gets the same draws. Of equal risks the widest posterior is taken.

    Decades are counted from the precision at which, without any curvature, the noise of an embedding is as large as the
    embedding (tr Sigma = |z|^2): from a tenth of it to a million times it. Further down the risk is flat: the
    curvature alone holds the weights, and what it does not hold is noise already.

    Args:
        queries, gallery: inputs of the layer [Q, d_in], [G, d_in], of different rows.
        query_label, gallery_label: int [Q], [G].
    Raises: DataError if no query has its label in the gallery.
    """
    present = torch.isin(query_label, gallery_label)
    if not bool(present.any()):
        raise DataError(
            "the prior precision is chosen by retrieving held-out rows' labels among the fitting rows, and no held-out "
            "label is there: give more rows of a class, a larger validation share, or prior_precision=NUMBER"
        )
    queries, query_label = queries[present], query_label[present]
    length = torch.nn.functional.linear(gallery, posterior.weight, posterior.bias).square().sum(-1)
    ratio = len(posterior.bias) * (gallery.square().sum(-1) + float(posterior.has_bias)) / length.clamp(min=1e-12)
    start = math.floor(math.log10(max(float(ratio.median()), 1e-12)))
    votes: dict[float, list[Tensor]] = {10.0 ** (start + decade): [] for decade in DECADES}
    for _ in range(SAMPLES):
        noise = posterior.noise(1, generator)  # one draw is held at a time, and serves every decade
        for tau, cast in votes.items():
            posterior.prior_precision.fill_(tau)
            similar = posterior.embeddings(queries, noise)[0] @ posterior.embeddings(gallery, noise)[0].T
            cast.append(gallery_label[similar.argmax(1)])
    risks = {tau: vote_risk(torch.stack(cast), query_label) for tau, cast in votes.items()}
    least = min(risks.values())
    chosen = min(tau for tau, risk in risks.items() if risk <= least + NOTHING_GAINED)
    posterior.prior_precision.fill_(chosen)
    return {"retrieval_risk": {f"{tau:g}": risk for tau, risk in risks.items()}, "prior_precision": chosen}


def vote_risk(votes: Tensor, label: Tensor) -> float:
    """Mean Brier score, 0 to 2, of the shares of draws that vote for each label; votes int [S, Q], label int [Q]."""
    right = (votes == label).double().mean(0)
    # sum_c share_c^2 is the chance that two draws agree
    agree = torch.stack([(votes == vote).double().mean(0) for vote in votes]).mean(0)
    return float((agree - 2.0 * right + 1.0).mean())


def some_rows(rows: np.ndarray, count: int, generator: torch.Generator) -> np.ndarray:
    """At most `count` of the rows, drawn without replacement."""
    return rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]
