"""What every score and metric asks of its input: real numbers, matching lengths, nothing missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..adapters.errors import DataError

Array = Any
"""A NumPy array, a torch tensor on any device, or anything NumPy can read."""


def as_numpy(values: Array) -> np.ndarray:
    """The same numbers as a NumPy array, on the CPU and without gradient."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def finite(name: str, values: Array, ndim: int | tuple[int, ...] = 1) -> np.ndarray:
    """Float64 array of `ndim` dimensions with at least one row and, of two dimensions and more, one column.

    Raises DataError for what are no real numbers, another shape, no rows or columns, or values that are not finite (naming the
    first rows).
    """
    array = as_numpy(values)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} is {array.dtype}; real numbers are expected")
    array = array.astype(np.float64)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if array.ndim not in allowed or 0 in array.shape:
        wanted = " or ".join(f"{n}-dimensional" for n in allowed)
        least = "one row" if array.ndim < 2 else "one row and one column"
        raise DataError(f"{name} has shape {array.shape}; expected a {wanted} array with at least {least}")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
        rows = first_few(bad)
        raise DataError(f"{name} is not finite in {len(bad)} of {len(array)} rows (rows {rows})")
    return array


def truth(name: str, values: Array) -> np.ndarray:
    """Bool array [N]; raises DataError for anything but booleans or zeros and ones."""
    array = finite(name, values)
    if not np.isin(array, (0.0, 1.0)).all():
        raise DataError(f"{name} must be booleans or zeros and ones; it has other values")
    return array.astype(bool)


def same_rows(**arrays: np.ndarray) -> None:
    """Raises DataError unless all arrays have the same first dimension."""
    if len({len(a) for a in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(a)}" for name, a in arrays.items())
        raise DataError(f"one row for each image is expected, and the lengths differ: {lengths}")


def check_labels(logits: np.ndarray, label: np.ndarray) -> None:
    """Raises DataError unless logits are [N, C] and labels are whole numbers [N] in 0..C-1."""
    if logits.ndim != 2 or label.shape != (len(logits),):
        raise DataError(f"logits [N, C] and labels [N] are expected; these are {logits.shape} and {label.shape}")
    if label.dtype.kind not in "iub" or label.min() < 0 or label.max() >= logits.shape[1]:
        raise DataError(
            f"labels must be whole numbers from 0 to {logits.shape[1] - 1}; "
            f"these are {label.dtype} from {label.min()} to {label.max()}"
        )


def first_few(rows: Sequence[int] | np.ndarray) -> str:
    """Up to five of the rows for a message: "3, 8", or "0, 1, 2, 3, 4, ..."."""
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
