"""What the sampled losses refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import HedgedInstance, MCInfoNCE, sampled
from posthoc.adapters.vmf import VonMisesFisher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"concentration": x}, "must be positive and finite") for x in (0.0, -1.0, math.inf, 1e300, 1e-300)),
        *(({name: x}, f"{name}={x}.*whole number") for name in ("n_samples", "positive_draws") for x in (0, 2.5, True)),
    ],
)
def test_meaningless_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MCInfoNCE(**options)
    with pytest.raises(OptionError, match="concentration=nan"):
        MCInfoNCE(math.nan)


def test_distributions_that_do_not_fit_are_refused() -> None:
    def point(*shape: int) -> VonMisesFisher:
        return VonMisesFisher(torch.ones(*shape), 1.0)

    loss, fits = MCInfoNCE(), point(4, 8)
    for given in (
        (fits, point(3, 8)),  # other rows
        (fits, point(4, 1, 8)),  # a positive is one a row
        (fits, fits, point(4, 8)),  # negatives have a second axis
        (fits, fits, point(3, 2, 8)),
        (fits, point(4, 7)),  # another dimension
        (fits, fits, point(4, 2, 7)),
        (point(1, 8), point(1, 8)),  # its own positive would be its negative
        (point(8), point(8)),
        (fits, fits, VonMisesFisher(torch.ones(4, 0, 8), 1.0, validate_args=False)),
    ):
        with pytest.raises(OptionError, match=r"batch shapes \[B\], \[B\] and \[B, M\].*given \["):
            loss(*given)
    assert loss(point(1, 8), point(1, 8), point(1, 2, 8)).isfinite()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (HedgedInstance, {"scale": 0.0}, r"scale=0.0.*positive"),
        (HedgedInstance, {"n_samples": 0}, r"n_samples=0"),
        (HedgedInstance, {"shift": math.nan}, r"shift=nan"),
        (HedgedInstance, {"negative_weight": -1.0}, r"negative_weight=-1.0"),
        (HedgedInstance, {"reading": "mean"}, r"reading='mean'.*'log-mean'"),
        (HedgedInstance, {"reference": True, "sobol": True}, r"no Sobol points"),
        (HedgedInstance, {"n_samples": 2.5}, r"n_samples=2.5.*whole"),
        (MCInfoNCE, {"reference": True, "positive_draws": 2}, r"neither extra draws"),
        *(
            (loss, {"reference": True, "compiled": True}, r"compiled=True.*not compiled")
            for loss in (MCInfoNCE, HedgedInstance)
        ),
    ],
)
def test_meaningless_options_are_refused(loss: type[nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        loss(**options)


def test_blocks_are_computed_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of them, the caller has its threads back."""
    seen = []

    def fail(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("out of luck")

    monkeypatch.setattr(sampled, "evaluate_block", fail)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="out of luck"):
        MCInfoNCE()(VonMisesFisher(torch.eye(4), 1.0), VonMisesFisher(torch.eye(4), 1.0))
    assert seen == [1]
    assert torch.get_num_threads() == 2
