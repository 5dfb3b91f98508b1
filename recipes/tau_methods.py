"""How the recipe `tau` trains: SimCLR and MoCo, plain and with a temperature for each image, and the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from ..adapters.distributed import check_launch
from ..adapters.errors import BackboneError
from ..adapters.gathering import gather_rows
from ..adapters.losses import HedgedGaussian, MomentumContrast, NTXent, TaU, TaUMoCo
from ..adapters.numerics import full
from ..adapters.training_loop import step_generator
from .masked_dropout import MaskedDropout, draw_masks, dropouts, dropping
from .pretraining_networks import PretrainingNetwork
from .view_batches import BLOCK, Images, ViewBatches

if TYPE_CHECKING:
    from .tau_options import TauConfig

NOISE, SAMPLES = 600, 601  # streams of random numbers
UNCERTAIN = ("tau", "tau-moco", "hib")
"""The methods whose projection has one number more: the raw temperature, or the spread."""
LEAST_STD = 1e-4


def with_dropout(network: nn.Module, probability: float) -> None:
    """Puts `MaskedDropout` behind the first activation of each residual block, or behind each hidden layer of a plain network.

    Raises BackboneError for a network that has neither.
    """
    inner_parts = (
        part for part in network.modules() if part is not network
    )  # the stem has an activation of that name too
    blocks = [part for part in inner_parts if isinstance(getattr(part, "act1", None), nn.Module)]
    for block in blocks:
        inner: Any = block
        inner.act1 = nn.Sequential(inner.act1, MaskedDropout(probability, inner.conv1.out_channels))
    features = getattr(network, "features", None)
    if not blocks and isinstance(features, nn.Sequential):
        channels = 0
        for place, part in enumerate(features):
            channels = part.out_channels if isinstance(part, nn.Conv2d) else channels
            if isinstance(part, nn.ReLU):
                features[place] = nn.Sequential(part, MaskedDropout(probability, channels))
    if not dropouts(network):
        raise BackboneError(
            f"--dropout: {type(network).__name__} has no blocks of timm's ResNets and no plain layers; take small or resnet18"
        )


class Method(nn.Module):
    """One step's loss of this process's views. `network` is what is trained; `kept`: masks of the dropout, view by view."""

    def __init__(self, network: PretrainingNetwork, config: TauConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def embed(self, views: Sequence[Tensor], kept: Tensor | None) -> Tensor:
        """Projections of this process's images, or of all processes', [N, views, D]."""
        with dropping(self.network, kept):
            projected = self.network(torch.cat(tuple(views)))[1]
        rows = full(torch.stack(projected.chunk(len(views)), 1))  # autocast's 8 bits are too few for others' rows too
        return gather_rows(rows) if self.config.gather else rows


class Contrast(Method):
    """SimCLR, plain or with temperatures (TaU)."""

    def __init__(self, network: PretrainingNetwork, config: TauConfig) -> None:
        super().__init__(network, config)
        self.loss: nn.Module
        if config.method == "tau":
            self.loss = TaU(config.temperature, config.include_positive, config.reference)
        else:
            self.loss = NTXent(config.temperature, reference=config.reference)

    def forward(self, first: Tensor, second: Tensor, step: int, kept: Tensor | None) -> Tensor:
        one, other = self.embed((first, second), kept).unbind(1)
        if self.config.method == "tau":
            return self.loss(one[:, :-1], other[:, :-1], one[:, -1], other[:, -1])
        return self.loss(one, other)


class Queue(Method):
    """MoCo, plain or with temperatures: keys of the second view by a network that trails, against a queue of older ones."""

    def __init__(self, network: PretrainingNetwork, config: TauConfig) -> None:
        super().__init__(network, config)
        self.moco = MomentumContrast(network, config.dim, config.queue, config.momentum)
        self.loss = TaUMoCo(config.temperature)

    def forward(self, first: Tensor, second: Tensor, step: int, kept: Tensor | None) -> Tensor:
        self.moco.update(self.network)  # after the optimiser's last step; before the first both are the same
        of_query, of_key = (None, None) if kept is None else kept.chunk(2)
        with dropping(self.network, of_query):
            query = self.network(first)[1]
        with dropping(self.moco.encoder, of_key):
            key = self.moco(second)[1][:, : self.config.dim]
        if self.config.method == "tau-moco":
            loss = self.loss(query[:, :-1], key, self.moco.queue, query[:, -1])
        else:
            # a temperature of t for every image, as sigmoid(raw) = 1
            loss = self.loss(query, key, self.moco.queue, query.new_full((len(query),), torch.inf))
        self.moco.enqueue(key)
        return loss


class Hedged(Method):
    """HIB: Gaussian posteriors of one spread in all dimensions; whether two images match, by their samples."""

    def __init__(self, network: PretrainingNetwork, config: TauConfig) -> None:
        super().__init__(network, config)
        self.loss = HedgedGaussian(0.5, 0.0, config.samples, 1e-4)
        self.rank = 0 if config.gather else check_launch().rank  # samples are of all images, or of each process's own

    def forward(self, first: Tensor, second: Tensor, step: int, kept: Tensor | None) -> Tensor:
        one, other = (posterior(rows) for rows in self.embed((first, second), kept).unbind(1))
        return self.loss(one, other, generator=step_generator(self.config.seed, SAMPLES, step, self.rank))


class Supervised(Method):
    """Cross-entropy with the labels; the projection is the classifier."""

    def forward(self, view: Tensor, label: Tensor, kept: Tensor | None) -> Tensor:
        with dropping(self.network, kept):
            logits = self.network(view)[1]
        return functional.cross_entropy(logits.float(), label.to(logits.device))


def posterior(rows: Tensor) -> Normal:
    """N(mean, std^2) of projections [N, D + 1], std of the last number, the same in all dimensions."""
    values = full(rows)
    mean = values[:, :-1]
    std = functional.softplus(values[:, -1:]) + LEAST_STD
    return Normal(mean, std.expand_as(mean), validate_args=False)


def make_method(network: PretrainingNetwork, config: TauConfig) -> Method:
    """The module that is trained, by the options' method."""
    kind = {"moco": Queue, "tau-moco": Queue, "hib": Hedged, "supervised": Supervised}.get(config.method, Contrast)
    return kind(network, config)


@dataclass
class Batches:
    """What a method's forward takes at a step. network: whose channels are dropped."""

    views: ViewBatches
    images: Images
    supervised: bool
    network: nn.Module

    def __call__(self, step: int) -> tuple[Any, ...]:
        views, kept = self.views(step), self.masks(step)
        if self.supervised:
            return *views, torch.from_numpy(self.images.label[self.views.rows(step).numpy()]), kept
        return *views, step, kept

    def masks(self, step: int) -> Tensor | None:
        """Of all views, those of a row by the generator of its block, so that one process and several draw the same."""
        generators = self.views.rows.generators(step, NOISE)
        drawn = [draw_masks(self.network, BLOCK, generators) for _ in range(self.views.views)]
        parts = [kept for kept in drawn if kept is not None]
        return torch.cat(parts).to(self.views.device) if parts else None
