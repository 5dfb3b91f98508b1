"""How the recipe `tau` trains: SimCLR and MoCo, plain and with a temperature for each image, and the baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from ..adapters.errors import BackboneError
from ..adapters.gathering import gather_rows
from ..adapters.losses import HedgedGaussian, MomentumContrast, NTXent, TaU, TaUMoCo
from ..adapters.numerics import full
from ..adapters.training_loop import step_generator
from .pretraining_networks import PretrainingNetwork
from .view_batches import BLOCK, Images, ViewBatches

if TYPE_CHECKING:
    from .tau import TauConfig

NOISE, SAMPLES = 600, 601  # streams of random numbers
UNCERTAIN = ("tau", "tau-moco", "hib")
"""The methods whose projection has one number more: the raw temperature, or the spread."""
LEAST_STD = 1e-4


class BlockDropout(nn.Module):
    """Dropout of whole channels [B, C, ...] inside `dropping`, and nothing outside it.

    Masks belong to blocks of rows, so that one process and several draw the same.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generators: Sequence[torch.Generator] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.generators:
            return x
        parts = []
        for place, rows in enumerate(x.split(BLOCK)):
            generator = self.generators[place % len(self.generators)]
            kept = torch.rand(rows.shape[:2], generator=generator) >= self.probability
            parts.append((kept / (1.0 - self.probability)).to(x))
        return x * torch.cat(parts)[(...,) + (None,) * (x.ndim - 2)]


@contextmanager
def dropping(network: nn.Module, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Inside, every `BlockDropout` of the network draws from these: one for each block of rows, of each view again."""
    layers = [part for part in network.modules() if isinstance(part, BlockDropout)]
    for layer in layers:
        layer.generators = generators
    try:
        yield
    finally:
        for layer in layers:
            layer.generators = ()


def with_dropout(network: nn.Module, probability: float) -> None:
    """Puts `BlockDropout` behind the first activation of each residual block, or behind each hidden layer of a plain network.

    Raises BackboneError for a network that has neither.
    """
    inner_parts = (
        part for part in network.modules() if part is not network
    )  # the stem has an activation of that name too
    blocks = [part for part in inner_parts if isinstance(getattr(part, "act1", None), nn.Module)]
    for block in blocks:
        inner: Any = block
        inner.act1 = nn.Sequential(inner.act1, BlockDropout(probability))
    features = getattr(network, "features", None)
    if not blocks and isinstance(features, nn.Sequential):
        for place, part in enumerate(features):
            if isinstance(part, nn.ReLU):
                features[place] = nn.Sequential(part, BlockDropout(probability))
                blocks.append(part)
    if not blocks:
        raise BackboneError(
            f"--dropout: {type(network).__name__} has no blocks of timm's ResNets and no plain layers; take small or resnet18"
        )


class Method(nn.Module):
    """One step's loss of this process's views. `network` is what is trained; `noise`: generators of the blocks' dropout."""

    def __init__(self, network: PretrainingNetwork, config: TauConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def embed(self, views: Sequence[Tensor], noise: Sequence[torch.Generator]) -> Tensor:
        """Projections of this process's images, or of all processes', [N, views, D]."""
        with dropping(self.network, noise):
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

    def forward(self, first: Tensor, second: Tensor, step: int, noise: Sequence[torch.Generator]) -> Tensor:
        one, other = self.embed((first, second), noise).unbind(1)
        if self.config.method == "tau":
            return self.loss(one[:, :-1], other[:, :-1], one[:, -1], other[:, -1])
        return self.loss(one, other)


class Queue(Method):
    """MoCo, plain or with temperatures: keys of the second view by a network that trails, against a queue of older ones."""

    def __init__(self, network: PretrainingNetwork, config: TauConfig) -> None:
        super().__init__(network, config)
        self.moco = MomentumContrast(network, config.dim, config.queue, config.momentum)
        self.loss = TaUMoCo(config.temperature)

    def forward(self, first: Tensor, second: Tensor, step: int, noise: Sequence[torch.Generator]) -> Tensor:
        self.moco.update(self.network)  # after the optimiser's last step; before the first both are the same
        with dropping(self.network, noise):
            query = self.network(first)[1]
        with dropping(self.moco.encoder, noise):
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

    def forward(self, first: Tensor, second: Tensor, step: int, noise: Sequence[torch.Generator]) -> Tensor:
        one, other = (posterior(rows) for rows in self.embed((first, second), noise).unbind(1))
        return self.loss(one, other, generator=step_generator(self.config.seed, SAMPLES, step))


class Supervised(Method):
    """Cross-entropy with the labels; the projection is the classifier."""

    def forward(self, view: Tensor, label: Tensor, noise: Sequence[torch.Generator]) -> Tensor:
        with dropping(self.network, noise):
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
    """What a method's forward takes at a step."""

    views: ViewBatches
    images: Images
    supervised: bool
    dropout: bool

    def __call__(self, step: int) -> tuple[Any, ...]:
        noise = self.views.rows.generators(step, NOISE) if self.dropout else []
        views = self.views(step)
        if self.supervised:
            return *views, torch.from_numpy(self.images.label[self.views.rows(step).numpy()]), noise
        return *views, step, noise
