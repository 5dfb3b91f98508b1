"""Heads on stored features, in chunks: what fitting, held-out scores and prediction share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .backbone import BackboneOutput
from .features import Features
from .heads.base import Head

CHUNK = 4096


def feature_batches(
    features: Features, rows: np.ndarray, device: torch.device, size: int = CHUNK
) -> Iterator[tuple[np.ndarray, BackboneOutput]]:
    """The rows (positions int64 [n]) of plain features as float32 tensors on the device, `size` at a time."""

    def tensor(array: np.ndarray | None, part: np.ndarray) -> Tensor | None:
        if array is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(array[part], dtype=np.float32)).to(device)

    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        embedding = tensor(features.embedding, part)
        assert embedding is not None
        same = features.penultimate is features.embedding
        penultimate = embedding if same else tensor(features.penultimate, part)
        yield part, BackboneOutput(embedding, penultimate, tensor(features.logits, part))


@torch.no_grad()
def score(head: Head, features: Features, rows: np.ndarray, device: torch.device) -> tuple[Tensor, float]:
    """Uncertainty float32 [n] on the CPU of the given rows, and the share of them at a bound of the head's range."""
    scores, at_bound = [], 0
    for _, batch in feature_batches(features, rows, device):
        outputs = head(batch)
        scores.append(outputs["uncertainty"].float().cpu())
        at_bound += int(head.at_bound(outputs).sum())
    return torch.cat(scores) if scores else torch.empty(0), at_bound / max(1, len(rows))


def decisions(features: Features, rows: np.ndarray) -> tuple[Tensor, Tensor] | None:
    """Whether the backbone's decision is wrong, bool [n], and its cross-entropy in nats, float32 [n].

    The true class of a soft label is its most probable one. None without labels, without logits, or when the labels have
    another number of classes than the classifier: they are not its classes then, as heads take it too.
    """
    label, logits = features.label, features.logits
    if label is None or logits is None or features.num_classes != logits.shape[-1]:
        return None
    true = label[rows] if label.ndim == 1 else label[rows].argmax(axis=1)
    wrong, losses = [], []
    for start in range(0, len(rows), CHUNK):
        said = torch.from_numpy(np.ascontiguousarray(logits[rows[start : start + CHUNK]], dtype=np.float32))
        target = torch.from_numpy(np.ascontiguousarray(true[start : start + CHUNK], dtype=np.int64))
        wrong.append(said.argmax(1) != target)
        losses.append(torch.nn.functional.cross_entropy(said, target, reduction="none"))
    return torch.cat(wrong), torch.cat(losses)
