"""Heads: one method, one file, the same small surface.

>>> from posthoc.adapters import heads
>>> sorted(heads.HEADS)
['kappa', 'laplace', 'loss', 'metric-laplace', 'temperature']
"""

from __future__ import annotations

from typing import Any

from ..errors import OptionError, suggest
from .base import FeatureDims, FitData, Head
from .kappa import KappaHead
from .laplace import LaplaceHead
from .loss import LossHead
from .metric_laplace import MetricLaplaceHead
from .temperature import TemperatureHead

HEADS: dict[str, type[Head]] = {
    h.name: h for h in (KappaHead, TemperatureHead, LossHead, LaplaceHead, MetricLaplaceHead)
}


def make_head(head: str | Head, **options: Any) -> Head:
    """A head by name with its options, or the object itself.

    Raises:
        OptionError: the name or an option is unknown (the nearest one is suggested).
    """
    if isinstance(head, Head):
        if options:
            raise OptionError(f"options {sorted(options)} were given beside a head object: set them on the object")
        return head
    if head not in HEADS:
        raise OptionError(f"unknown head {head!r}: {suggest(str(head), HEADS)}")
    cls = HEADS[head]
    known = cls().config()
    for option in options:
        if option not in known:
            raise OptionError(f"head {head!r} has no option {option!r}: {suggest(option, known)}")
    return cls(**options)


__all__ = [
    "HEADS",
    "FeatureDims",
    "FitData",
    "Head",
    "KappaHead",
    "LaplaceHead",
    "LossHead",
    "MetricLaplaceHead",
    "TemperatureHead",
    "make_head",
]
