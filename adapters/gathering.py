"""What every process of a launch has, on each of them: rows, with gradient, and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .distributed import check_launch
from .numerics import first_order


def gather_rows(x: Tensor) -> Tensor:
    """The rows [N_r, ...] of all processes under one another, in the order of their ranks: [sum of N_r, ...].

    Processes may hold different numbers of rows; all other sizes and the dtype must agree. Every process must call
    this, and must go back through it if one does. Without a launch the input itself.

    Gradient: that of the SUM of all processes' losses. With DistributedDataParallel or accelerate, which average
    gradients over processes, a loss that every process takes of all rows trains as in one process with the whole batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, counts[0].new_tensor([len(x)]))
    return _GatherRows.apply(x, torch.cat(counts).tolist())


def sum_over_launch(parts: list[Tensor]) -> list[Tensor]:
    """Sums of tensors of one dtype and device over the processes of the launch, in one collective and without gradient.

    Every process must call this, with the same shapes. Without a launch the tensors themselves.
    """
    if check_launch().world == 1:
        return parts
    flat = torch.cat([part.reshape(-1) for part in parts])
    distributed.all_reduce(flat)
    shaped = zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    return [found.view(part.shape) for found, part in shaped]


class _GatherRows(torch.autograd.Function):
    """torch.distributed.all_gather has no gradient; its one with a gradient is deprecated in torch 2.14."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])  # backends gather equal shapes only
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @first_order("the gathering of rows")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.split(ctx.counts)[distributed.get_rank()], None
