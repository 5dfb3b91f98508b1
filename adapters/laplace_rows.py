"""What a last-layer posterior is fitted from: the layer, its inputs and the labels, checked and read in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

CHUNK_BYTES = 32 * 2**20


class RowArray(Protocol):
    """What is read by rows like an array [N, P], computed as it is read."""

    @property
    def ndim(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


Rows = np.ndarray | Tensor | RowArray


def check_layer(weight: Tensor, bias: Tensor | None, at_least: int) -> tuple[int, int]:
    """C and P of weight [C, P] and bias [C] or None; `at_least` is the smallest C."""
    if weight.ndim != 2 or len(weight) < at_least:
        raise DataError(
            f"weight of shape {tuple(weight.shape)} was given; expected [C, P] with C of at least {at_least}"
            f"{' classes' if at_least > 1 else ''}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DataError(f"bias of shape {tuple(bias.shape)} was given; expected ({len(weight)},), or None")
    if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
        raise DataError("the layer's weight or bias holds NaN or infinite values: check the checkpoint")
    return weight.shape[0], weight.shape[1]


def check_targets(
    penultimate: Rows, labels: np.ndarray | Tensor | None, inputs: int, classes: int, softmax: bool
) -> Tensor | None:
    """Shapes and range of the rows; gives the labels as a tensor: int64 [N], or float64 [N, C]."""
    if penultimate.ndim != 2 or penultimate.shape[1] != inputs or len(penultimate) == 0:
        raise DataError(
            f"penultimate of shape {tuple(penultimate.shape)} was given; expected [N, {inputs}], N of at least 1"
        )
    if labels is None:
        return None
    # a copy: the labels may be a memory map that is only read, which torch warns of
    targets = labels if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    if not softmax and targets.ndim == 1 and classes == 1:
        targets = targets[:, None]
    wide = targets.ndim == 2
    fits = targets.shape[1] == classes if wide else softmax and targets.ndim == 1
    if not fits or len(targets) != len(penultimate):
        rows = len(penultimate)
        expected = f"({rows},) or ({rows}, {classes})" if softmax else f"({rows}, {classes})"
        raise DataError(
            f"labels of shape {tuple(targets.shape)} were given; expected {expected}, one for each row of penultimate"
        )
    if wide:
        bad = ~torch.isfinite(targets) | ((targets < 0) & softmax)
        if bool(bad.any()):
            raise DataError(
                "soft labels hold negative or non-finite values; expected probabilities"
                if softmax
                else "targets hold NaN or infinite values"
            )
        return targets.double()
    if targets.is_floating_point() or int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise DataError(
            f"labels from {targets.min()} to {targets.max()} ({targets.dtype}) were given; "
            f"expected whole numbers from 0 to {classes - 1}"
        )
    return targets.long()


def chunks(array: Rows, subset: np.ndarray, width: int, device: torch.device) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions and rows of consecutive chunks of about CHUNK_BYTES; refuses non-finite rows.

    Rows come in their own precision, at least float32. `width`: numbers held for a row, as of 8 bytes.
    """
    size = max(64, CHUNK_BYTES // (8 * width))
    for start in range(0, len(subset), size):
        rows = subset[start : start + size]
        given = array[rows]
        x = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
        x = x.to(device=device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        if not torch.isfinite(x.sum()):
            bad = torch.nonzero(~torch.isfinite(x).all(1)).flatten()
            listed = ", ".join(str(rows[int(i)]) for i in bad[:5])
            raise DataError(
                f"{len(bad)} rows of penultimate hold NaN or infinite values (among them rows {listed}): leave these "
                "images out, or extract in float32"
            )
        yield rows, x


def signature(phi: Tensor) -> Tensor:
    """A sum over rows that tells sets of rows apart, whatever their order: of squared products with one fixed vector."""
    return (phi.double() @ torch.arange(1.0, phi.shape[1] + 1.0).to(phi.device).double().cos()).square().sum()


def loss_sum(outputs: Tensor, targets: Tensor, softmax: bool) -> Tensor:
    """Summed cross-entropy of logits [n, C], or half the summed squared error."""
    if not softmax:
        return 0.5 * (outputs - targets).square().sum()
    log_p = torch.log_softmax(outputs, dim=-1)
    if targets.ndim == 2:
        return -(log_p * targets).sum()
    return -log_p.gather(1, targets.unsqueeze(1)).sum()
