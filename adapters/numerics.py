"""What the mathematics shares: at least single precision, blocks of rows, and gradients that are of first order only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import OptionError


def full(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Tensor) -> Tensor:
    """Rows [..., D] divided by their lengths, in at least float32."""
    return torch.nn.functional.normalize(full(x), dim=-1)


def block_rows(x: Tensor, elements: int, cpu: int, gpu: int) -> int:
    """Rows of `elements` numbers each to be held at a time, at least 1: `cpu` numbers in all, `gpu` on a GPU."""
    return max(1, (cpu if x.device.type == "cpu" else gpu) // max(1, elements))


def by_blocks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """An elementwise function, of `size` elements at a time: what it needs on the way does not grow with x."""
    return torch.cat([function(part) for part in x.reshape(-1).split(size)]).reshape(x.shape)


def first_order(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of the `backward` of an autograd.Function that is computed beside the value: a graph of it is refused.

    torch's `once_differentiable` lets `create_graph=True` pass where the incoming gradient is a constant, as that of a
    scalar loss is: a penalty on the gradient would then train nothing and say nothing.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise OptionError(f"{name} has no second derivative; call without create_graph")
            return backward(ctx, *grads)

        return checked

    return decorate
