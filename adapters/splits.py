"""Which rows are held out: a seeded hash of the row, so that the split needs no shuffling and no memory of order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from .errors import OptionError


def _mix(x: Any) -> Any:
    """splitmix64's finaliser: uint64 [N] -> uint64 [N], close to uniform."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_uniform(rows: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row id, a pure function of (row, seed). int64 [N] -> float64 [N]."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019))
        mixed = _mix(rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ key)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def group_ids(group: np.ndarray) -> np.ndarray:
    """Any group labels (numbers, strings) [N] -> int64 [N] that depend on the label alone, not on the data set."""
    values, inverse = np.unique(group, return_inverse=True)
    digests = [hashlib.sha256(str(v).encode()).digest()[:8] for v in values.tolist()]
    return np.array([int.from_bytes(d, "little", signed=True) for d in digests], dtype=np.int64)[inverse]


def held_out_mask(rows: np.ndarray, fraction: float, seed: int, group: np.ndarray | None = None) -> np.ndarray:
    """bool [N]: the rows held out, about `fraction` of them; all rows of a group fall on one side.

    Raises:
        OptionError: `fraction` is outside (0, 1), `group` has another length, or a side of the split is empty.
    """
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"validation={fraction} was given; expected a share of the rows between 0 and 1, such as 0.1")
    if group is not None and len(group) != len(rows):
        raise OptionError(f"group has {len(group)} entries for {len(rows)} rows: give one per row")
    keys = np.asarray(rows) if group is None else group_ids(np.asarray(group))
    mask = row_uniform(keys, seed) < fraction
    if mask.all() or not mask.any():
        raise OptionError(
            f"validation={fraction} leaves {int((~mask).sum())} rows to fit and {int(mask.sum())} held out of "
            f"{len(rows)}{' in groups' if group is not None else ''}: give more rows or groups, or another share"
        )
    return mask
