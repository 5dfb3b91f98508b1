"""The small surface every head has, and what it is fitted from.

A head is an `nn.Module` that maps the outputs of a frozen backbone to one uncertainty per image. Adding a method means
one new file with a subclass of `Head`, and one line in the registry of `heads/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import BackboneOutput
from ..errors import NotFittedError
from ..features import Features
from ..training import TrainOptions


@dataclass(frozen=True)
class FeatureDims:
    """Widths a head is built for: embedding D, last linear layer's input P (None: no single one), classes C or 0."""

    embedding: int
    penultimate: int | None = None
    classes: int = 0


@dataclass
class FitData:
    """Everything a head may be fitted from. Held-out rows serve early stopping and tuning only.

    Attributes:
        features: plain features of every row.
        train, held_out: int64 positions into `features`, disjoint.
        views: features of V augmented views of the same rows, or None.
        positives: "labels", "soft-labels", "views" or "ids".
        ids: int64 [N], which rows belong together, when `positives` is "ids".
        classifier: weight [C, P] and bias [C] or None of the backbone's one linear classifier, or None.
        classifier_reason: why `classifier` is None, for error messages.
        blurred: gives (severity [S], embedding [S, n, D]) for positions n, or None when no images are at hand.
        options: epochs, learning rate, batch size, seed, progress, output folder.
        device: where the head is trained.
    """

    features: Features
    train: np.ndarray
    held_out: np.ndarray
    views: Features | None = None
    positives: str = "labels"
    ids: np.ndarray | None = None
    classifier: tuple[Tensor, Tensor | None] | None = None
    classifier_reason: str = ""
    blurred: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    options: TrainOptions = field(default_factory=TrainOptions)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def dims(self) -> FeatureDims:
        f = self.features
        penultimate = None if f.penultimate is None else f.penultimate.shape[-1]
        return FeatureDims(f.embedding.shape[-1], penultimate, f.num_classes)


class Head(nn.Module):
    """One method of uncertainty on frozen features.

    Subclasses take their options as keyword arguments, keep them for `config()`, make their tensors in `build`,
    train in `fit` and answer in `forward`. All state lives in parameters and buffers, so that an adapter is nothing but
    tensors and options.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    """What the score means: "aleatoric", "decision", "total" or "epistemic"."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Outputs beside "uncertainty"."""
    uses_pairs: ClassVar[bool] = False
    """Whether it is trained on positive pairs (labels, soft labels or views)."""
    needs_labels: ClassVar[bool] = False
    """Whether it cannot be fitted without labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._config: dict[str, Any] = options
        self.dims: FeatureDims | None = None

    @property
    def scope(self) -> str:
        """Which part of the backbone the head depends on: "embedding", or "logits" (the classifier too)."""
        return "embedding"

    def config(self) -> dict[str, Any]:
        """JSON-able options; `type(head)(**head.config())` is an unfitted twin."""
        return dict(self._config)

    def build(self, dims: FeatureDims) -> None:
        """Make the parameters and buffers for these widths (by `fit`, and by `load` before tensors are filled in)."""
        raise NotImplementedError

    def fit(self, data: FitData) -> dict[str, Any]:
        """Train on `data.train`, stop and tune on `data.held_out`; returns what a report should say."""
        raise NotImplementedError

    def forward(self, features: BackboneOutput) -> dict[str, Tensor]:
        """{"uncertainty": [B] float32, finite, higher = less certain, and the `fields` of the head}."""
        raise NotImplementedError

    def at_bound(self, outputs: dict[str, Tensor]) -> Tensor:
        """[B] bool: which answers sit at a bound of the head's range (reported: many of them mean a poor fit)."""
        return torch.zeros_like(outputs["uncertainty"], dtype=torch.bool)

    def require_built(self) -> FeatureDims:
        if self.dims is None:
            raise NotFittedError(
                f"head {self.name!r} was asked before it was fitted: call model.fit(data) first, "
                "or load a fitted adapter with posthoc.load(...)"
            )
        return self.dims
