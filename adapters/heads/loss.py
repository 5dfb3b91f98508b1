"""The loss head: predicts the classifier's own loss on an image from the embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbone import BackboneOutput
from ..errors import DataError
from ..linear_probe import fit_linear_probe
from ..losses.loss_ranking import LossRanking
from ..positives import FeatureTable
from ..splits import row_uniform
from ..training import epochs_for, train
from .base import FeatureDims, FitData, Head
from .common import MAX_DEPTH, ScalarNet, check_choice, check_positive, check_whole, fit_key, moments

STEPS = 1500
FOLDS = 5
CLASSIFIERS = ("auto", "backbone", "probe")


class LossHead(Head):
    """Uncertainty of the decision: how large the classifier's cross-entropy on this image is expected to be.

    Fit it on rows the backbone was not trained on: on its own training rows a network's losses are near zero and say
    nothing. When the backbone has no classifier, or other classes than the labels, the losses are those of a linear
    probe, each row's by a probe that has not seen the row (5 folds).

    Args:
        objective: "ranking" (which of two images has the larger loss, margin below) or "mse" (the loss itself).
        classifier: whose losses: "backbone"; "probe", a cross-fitted linear probe; "auto": the backbone's, if it has one of
            as many classes as the labels (highest index + 1). Labels of some of its classes need "backbone".
        margin: of the ranking loss.
        width, depth: of the network's hidden layers.

    Outputs: "uncertainty" > 0; with "mse" in nats, with "ranking" on an arbitrary scale.
    Source: Kirchhof et al., Pretrained Visual Uncertainties, arXiv 2402.16569.
    """

    name = "loss"
    kind = "decision"
    needs_labels = True

    def __init__(
        self,
        objective: str = "ranking",
        margin: float = 0.1,
        width: int = 64,
        depth: int = 2,
        classifier: str = "auto",
    ) -> None:
        super().__init__(
            objective=objective,
            margin=margin,
            width=width,
            depth=depth,
            classifier=classifier,
        )
        check_choice(self.name, "classifier", classifier, CLASSIFIERS)
        check_choice(self.name, "objective", objective, ("ranking", "mse"))
        check_positive(self.name, margin=margin)
        check_whole(self.name, width=width)
        check_whole(self.name, high=MAX_DEPTH, depth=depth)

    def build(self, dims: FeatureDims) -> None:
        self.dims = dims
        self.network = ScalarNet(dims.embedding, self._config["width"], self._config["depth"])

    def score(self, embedding: Tensor) -> Tensor:
        """[B, D] -> [B], positive."""
        return functional.softplus(self.network(embedding)) + 1e-6

    def forward(self, features: BackboneOutput) -> dict[str, Tensor]:
        self.require_built()
        return {"uncertainty": self.score(features.embedding.float())}

    def fit(self, data: FitData) -> dict[str, Any]:
        options = data.options
        target, origin = _losses(data, self._config["classifier"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.build(data.dims)
        self.network.standardise(*moments(data.features.embedding, data.train))
        self.to(data.device)
        table = FeatureTable(data.features.embedding, data.device)
        step = _Step(self, table, torch.from_numpy(target).to(data.device))
        result = train(
            step,
            data.train,
            lambda: step.held_out_loss(data.held_out, options.batch_size),
            name=self.name,
            key=fit_key(self, data),
            options=options,
            epochs=options.epochs or epochs_for(len(data.train), options.batch_size, STEPS),
            lr=options.lr or 1e-3,
            weight_decay=1e-2,
        )
        return result.summary() | {"losses_of": origin, "mean_loss": float(target[data.train].mean())}


def _losses(data: FitData, wanted: str) -> tuple[np.ndarray, str]:
    """Cross-entropy [N] of the classifier on every row, and whose classifier it is."""
    f = data.features
    if f.label is None:
        raise DataError("the loss head learns the classifier's loss and needs labels: give (images, labels)")
    classes = int(f.label.max()) + 1 if f.label.ndim == 1 else f.label.shape[1]
    own = 0 if f.logits is None else f.logits.shape[-1]
    if wanted == "backbone" and own < classes:
        raise DataError(
            f"classifier='backbone' was asked for; it has {own or 'no'} classes and the labels {classes}: use classifier='probe'"
        )
    if wanted == "backbone" or (wanted == "auto" and own == classes):
        return _cross_entropy(np.asarray(f.logits), f.label), "backbone"
    fold = np.floor(row_uniform(f.row, data.options.seed + 1) * FOLDS).astype(np.int64)
    fold[data.held_out] = -1  # scored by a probe fitted on all fitting rows
    target = np.zeros(len(f), dtype=np.float32)
    for k in range(-1, FOLDS):
        fitting = data.train[fold[data.train] != k]
        scored = np.flatnonzero(fold == k)
        if len(scored) == 0:
            continue
        probe = fit_linear_probe(np.asarray(f.embedding[fitting]), f.label[fitting], seed=data.options.seed)
        logits = np.asarray(f.embedding[scored], dtype=np.float32) @ probe.weight.numpy().T + probe.bias.numpy()
        target[scored] = _cross_entropy(logits, f.label[scored])
    return target, "linear probe (cross-fitted)"


def _cross_entropy(logits: np.ndarray, label: np.ndarray, chunk: int = 8192) -> np.ndarray:
    parts = [
        functional.cross_entropy(
            torch.from_numpy(np.array(logits[i : i + chunk], dtype=np.float32)),
            torch.from_numpy(np.array(label[i : i + chunk])),
            reduction="none",
        )
        for i in range(0, len(logits), chunk)
    ]
    return torch.cat(parts).numpy()


class _Step(nn.Module):
    def __init__(self, head: LossHead, table: FeatureTable, target: Tensor) -> None:
        super().__init__()
        c = head.config()
        self.head, self.table, self.target = head, table, target
        self.ranking = LossRanking(c["margin"]) if c["objective"] == "ranking" else None

    def forward(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows = rows[: len(rows) // 2 * 2]  # ranked in pairs
        score, target = self.head.score(self.table[rows]), self.target[rows.to(self.target.device)]
        return functional.mse_loss(score, target) if self.ranking is None else self.ranking(score, target)

    def held_out_loss(self, rows: np.ndarray, batch_size: int) -> float:
        """Mean loss over the held-out rows, always in the same pairs."""
        size = max(2, batch_size // 2 * 2)
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        batches = [b for b in batches if len(b) >= 2]
        if not batches:
            raise DataError(f"the loss head compares held-out rows in pairs and got {len(rows)}: hold out more rows")
        losses = [float(self(torch.from_numpy(b))) * len(b) for b in batches]
        return sum(losses) / sum(len(b) for b in batches)
