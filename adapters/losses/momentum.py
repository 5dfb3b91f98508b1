"""Momentum contrast: an encoder that trails the trained one, and a queue of the keys it made."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distributed import check_launch
from ..errors import OptionError
from ..gathering import gather_rows


class MomentumContrast(nn.Module):
    """The keys' side of MoCo; all of it is in the state_dict.

        moco = MomentumContrast(encoder, dim=128, queue_size=4096)
        for view1, view2 in loader:
            key, _ = moco(view2)  # what the encoder's copy returns, without gradient
            query, r = encoder(view1)
            loss(query, key, moco.queue, r).backward()
            optimizer.step()
            moco.update(encoder)
            moco.enqueue(key)

    Args:
        encoder: the trained module; a copy of it is kept.
        dim: D of the keys.
        queue_size: K >= 1; it need not be a multiple of the batch.
        momentum: m in [0, 1], the share of itself that the copy keeps in an update.
    Attributes: queue [K, D] unit vectors, at first random ones, the same in every process; encoder, the copy.
    Source: He et al., arXiv 1911.05722. Keys are not shuffled among processes for the sake of batch normalisation.
    """

    queue: Tensor
    position: Tensor

    def __init__(self, encoder: nn.Module, dim: int, queue_size: int = 65536, momentum: float = 0.999) -> None:
        super().__init__()
        if dim < 1 or queue_size < 1 or not 0 <= momentum <= 1:
            raise OptionError(
                f"MomentumContrast(dim={dim}, queue_size={queue_size}, momentum={momentum}): expected sizes of at least 1 "
                "and a momentum in [0, 1]"
            )
        self.momentum = momentum
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        start = torch.randn(queue_size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", functional.normalize(start, dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # of the oldest key

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What the copy of the encoder makes of the inputs, without gradient."""
        return self.encoder(*inputs)

    @torch.no_grad()
    def update(self, encoder: nn.Module) -> None:
        """Moves the copy's parameters and buffers towards the encoder's: x <- m x + (1 - m) y; integers are copied.

        A wrapper such as DistributedDataParallel is taken as well. Raises: OptionError if the tensors do not match.
        """
        kept, given = _tensors(self.encoder), _tensors(encoder)
        if [x.shape for x in kept] != [x.shape for x in given]:
            raise OptionError(
                f"MomentumContrast.update was given an encoder of {len(given)} tensors; expected the {len(kept)} of the "
                "one it copied, of the same shapes and in the same order"
            )
        for ours, theirs in zip(kept, given, strict=True):
            if ours.is_floating_point() or ours.is_complex():
                ours.lerp_(theirs.to(ours), 1.0 - self.momentum)
            else:
                ours.copy_(theirs)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Puts the keys [N, D] of every process, in the order of their ranks, in the place of the oldest ones.

        They are normalised first. Every process must call this, and N may differ; of more than K keys the last K stay.
        Raises: OptionError if the keys are not [N, D].
        """
        if keys.ndim != 2 or keys.shape[1] != self.queue.shape[1]:
            dim = self.queue.shape[1]
            raise OptionError(f"enqueue expects keys [N, {dim}]; the shape given is {tuple(keys.shape)}")
        check_launch()  # several processes must not take themselves for one each
        keys = gather_rows(functional.normalize(keys.to(self.queue), dim=-1))
        size, first = len(self.queue), int(self.position)
        at = torch.arange(first, first + len(keys), device=keys.device)[-size:] % size
        self.queue[at] = keys[-size:]
        self.position.fill_((first + len(keys)) % size)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
