"""What several losses do alike: numbers that are options or parameters, and their checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import OptionError

LARGEST, LEAST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # what single precision can hold


def check_positive(name: str, **values: float) -> None:
    """Refuses values that are not positive and finite in single precision."""
    if not all(LEAST <= value <= LARGEST for value in values.values()):
        given = ", ".join(f"{option}={value}" for option, value in values.items())
        raise OptionError(f"{name}({given}): must be positive and finite, in single precision too")


def check_counts(name: str, **values: int) -> None:
    """Refuses anything but whole numbers of at least 1."""
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values.values()):
        given = ", ".join(f"{option}={value!r}" for option, value in values.items())
        raise OptionError(f"{name}({given}): expected a whole number of at least 1{' each' * (len(values) > 1)}")


def log_parameter(value: float, learnable: bool) -> nn.Parameter | None:
    """The logarithm of a positive number as a parameter, or None where it is not to be learnt."""
    return nn.Parameter(torch.tensor(math.log(value))) if learnable else None


def number(log: nn.Parameter | None, fixed: float) -> Tensor | float:
    """The positive number itself, whichever of the two it is."""
    return fixed if log is None else log.exp()
