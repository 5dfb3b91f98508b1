"""What a metric posterior is compared with: five other ways to an uncertain embedding, under one contract.

>>> for method in (Deterministic(), MCDropout(), DeepEnsemble(), ProbabilisticFace(), HedgedInstance(), Laplace()):
...     report = method.fit(data)                  # EmbeddingData: stored features, labels, split
...     answer = method.embed(torch.randn(5, 64))  # MetricEmbedding: direction, spread, uncertainty, samples

Each trains a linear layer, or a perceptron with one hidden layer, on stored features with the one training loop. Samples
are the same draws for every image and every call where draws are of weights, so that an image's answer is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from .errors import OptionError
from .losses.contrastive_metric import ContrastiveMetric
from .losses.hedged_gaussian import HedgedGaussian
from .losses.pfe import MutualLikelihood
from .metric_laplace import MetricPosterior
from .metric_predictive import MetricEmbedding, summarise
from .metric_prior import GALLERY, QUERIES, choose_prior, some_rows
from .metric_training import MetricStep, principal_layer, start_online, train_metric
from .positives import FeatureTable, LabelPairs, draw_negatives
from .training import TrainOptions, step_generator


@dataclass
class EmbeddingData:
    """What an embedding is trained on.

    Attributes:
        inputs: centred features [N, d_in] float32. label: int64 [N].
        train, held_out: int64 positions, disjoint; held-out rows stop the training.
        dim: D of the embedding. hidden: width of a hidden layer, or None for a linear embedding.
        margin, miner: of the contrastive loss.
    """

    inputs: np.ndarray
    label: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    dim: int = 32
    hidden: int | None = None
    margin: float = 0.7
    miner: str = "all"
    options: TrainOptions = field(default_factory=TrainOptions)

    @property
    def width(self) -> int:
        """Inputs of the last layer."""
        return self.hidden or self.inputs.shape[1]

    def network(self, dropout: float = 0.0) -> nn.Sequential:
        """A fresh embedding, initialised by the options' seed; the linear one starts at the principal directions."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            if self.hidden is None:
                layers: list[nn.Module] = [principal_layer(torch.from_numpy(self.inputs[self.train]), self.dim)]
            else:
                layers = [nn.Linear(self.inputs.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.dim)]
            layers.insert(len(layers) - 1, SharedDropout(dropout))
        return nn.Sequential(*layers)

    def train_network(
        self, name: str, dropout: float = 0.0, posterior: MetricPosterior | None = None, memory: float = 0.999
    ) -> tuple[nn.Sequential, dict[str, Any]]:
        """An embedding trained by the contrastive loss, and its report; with `posterior` under weights drawn from it."""
        network, table = self.network(dropout), FeatureTable(self.inputs)
        trained: nn.Module = network
        if posterior is not None:
            if self.hidden is not None:
                raise OptionError(
                    f"hidden={self.hidden} was given; an online posterior needs hidden=None, one linear layer"
                )
            layer, generator = network[-1], step_generator(self.options.seed, 5)
            assert isinstance(layer, nn.Linear)
            start_online(posterior, layer, self.inputs, self.label, self.train, generator)
            trained = layer
        loss, label = ContrastiveMetric(self.margin, self.miner), torch.from_numpy(np.array(self.label))
        step = MetricStep(trained, table.__getitem__, label, loss, posterior, memory, len(self.train))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)  # dropout draws from the global generator
            result = train_metric(step, self.train, self.held_out, name=name, options=self.options)
        return network, result.summary()


class SharedDropout(nn.Module):
    """Dropout; when `mask` [d] is set it is applied instead to every row: one draw of the weights for all images."""

    mask: Tensor | None = None

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise OptionError(f"dropout={rate} was given; expected a share in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is not None:
            return x * self.mask
        return functional.dropout(x, self.rate, self.training)


class Deterministic(nn.Module):
    """The trained embedding alone: no spread, and an uncertainty of 0 for every image."""

    network: nn.Module

    def fit(self, data: EmbeddingData) -> dict[str, Any]:
        self.network, report = data.train_network("deterministic")
        return report

    @torch.no_grad()
    def embed(self, x: Tensor) -> MetricEmbedding:
        u = functional.normalize(self.network(x), dim=-1)
        nothing = u.new_zeros(len(u))
        return MetricEmbedding(u, u, torch.zeros_like(u), nothing + 1, nothing + torch.inf, nothing, u[None])


class MCDropout(nn.Module):
    """Dropout before the last layer, in training and when asked; the masks are drawn once. Gal & Ghahramani 2016."""

    masks: Tensor

    def __init__(self, rate: float = 0.1, samples: int = 32) -> None:
        super().__init__()
        self.rate, self.samples = rate, samples

    def fit(self, data: EmbeddingData) -> dict[str, Any]:
        self.network, report = data.train_network("mc-dropout", self.rate)
        kept = torch.rand(self.samples, data.width, generator=step_generator(data.options.seed, 4)) >= self.rate
        self.register_buffer("masks", kept.float() / (1.0 - self.rate))
        return report

    @torch.no_grad()
    def embed(self, x: Tensor) -> MetricEmbedding:
        dropout = self.network[-2]
        assert isinstance(dropout, SharedDropout)
        drawn = []
        for mask in self.masks:
            dropout.mask = mask
            drawn.append(functional.normalize(self.network(x), dim=-1))
        dropout.mask = None
        return summarise(torch.stack(drawn))


class DeepEnsemble(nn.Module):
    """Embeddings trained from several seeds. Lakshminarayanan et al. 2017.

    Each member has a coordinate frame of its own, and a mean over frames says nothing: `align` turns every member onto the
    first by the orthogonal Procrustes rotation of the fitting rows. Members start at random: from the principal
    directions they would share a frame from the beginning.
    """

    rotations: Tensor

    def __init__(self, members: int = 5, align: bool = True) -> None:
        super().__init__()
        if members < 2:
            raise OptionError(f"DeepEnsemble: members={members} was given; expected at least 2")
        self.count, self.align = members, align

    def fit(self, data: EmbeddingData) -> dict[str, Any]:
        reports, networks = [], []
        for member in range(self.count):
            seed = data.options.seed * self.count + member + 1
            network, report = _RandomStart(
                **vars(replace(data, options=replace(data.options, seed=seed)))
            ).train_network(f"member-{member}")
            networks.append(network)
            reports.append(report)
        self.networks = nn.ModuleList(networks)
        x = torch.from_numpy(data.inputs[data.train[:: max(1, len(data.train) // 5000)]])
        self.register_buffer("rotations", procrustes(self._frames(x)))
        return {"members": reports}

    @torch.no_grad()
    def _frames(self, x: Tensor) -> Tensor:
        return torch.stack([functional.normalize(network(x), dim=-1) for network in self.networks])

    def embed(self, x: Tensor) -> MetricEmbedding:
        frames = self._frames(x)
        return summarise(frames @ self.rotations if self.align else frames)


@torch.no_grad()
def procrustes(frames: Tensor) -> Tensor:
    """Orthogonal matrices [M, D, D] that turn each of the embeddings [M, N, D] onto the first, in least squares."""
    left, _, right = torch.linalg.svd(frames.transpose(1, 2).double() @ frames[0].double())
    return (left @ right).to(frames)


class _RandomStart(EmbeddingData):
    def network(self, dropout: float = 0.0) -> nn.Sequential:
        if self.hidden is not None:
            return super().network(dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            return nn.Sequential(SharedDropout(dropout), nn.Linear(self.inputs.shape[1], self.dim))


class GaussianEmbedding(nn.Module):
    """A Gaussian about the unit embedding, with a variance of its own for each dimension and image: what PFE and HIB answer.

    `network` embeds inputs [B, d_in]; `start` makes `variance`, a small perceptron on the same inputs of `width` hidden units.
    """

    network: nn.Module
    variance: nn.Module

    def __init__(self, samples: int = 32, width: int = 64) -> None:
        super().__init__()
        self.samples, self.width = samples, width

    def start(self, inputs: int, dim: int, seed: int) -> None:
        """Variances before training: the same for every image."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(self.width, dim)
            self.variance = nn.Sequential(nn.Linear(inputs, self.width), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -5.0)  # a length of unit order has a variance of 1 / D a dimension

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, of length 1, and log variance [B, D]."""
        return functional.normalize(self.network(x), dim=-1), self.variance(x).clamp(-15.0, 5.0)

    @torch.no_grad()
    def embed(self, x: Tensor) -> MetricEmbedding:
        """`spread` and `uncertainty` (the summed variance) are the Gaussian's; `samples`, normalised, are each image's own
        draws, the same at every call for its place in the batch."""
        mean, log_variance = self.posterior(x)
        spread = (0.5 * log_variance).exp()
        noise = torch.randn(self.samples, *mean.shape, generator=step_generator(0, 5)).to(mean)
        drawn = summarise(functional.normalize(mean + spread * noise, dim=-1))
        return replace(drawn, mean_direction=mean, spread=spread, uncertainty=spread.square().sum(-1))


class ProbabilisticFace(GaussianEmbedding):
    """PFE: variances trained on a fixed embedding, to make positive pairs likely (`losses.pfe`). Shi & Jain 2019."""

    def fit(self, data: EmbeddingData) -> dict[str, Any]:
        self.network, base = data.train_network("pfe-mean")
        self.network.requires_grad_(False)
        self.start(data.inputs.shape[1], data.dim, data.options.seed)
        table = FeatureTable(data.inputs)
        step = _PairStep(self, LabelPairs(table, data.label, data.train), LabelPairs(table, data.label, data.held_out))
        return {"base": base} | train_metric(
            step, data.train, data.held_out, name="pfe", options=data.options
        ).summary()

    def pair_loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, generator: torch.Generator) -> Tensor:
        return MutualLikelihood()(*self.posterior(anchor), *self.posterior(positive))


class HedgedInstance(GaussianEmbedding):
    """HIB: mean and variances trained together by the chance of a match (`losses.hedged_gaussian`). Oh et al. 2019."""

    def fit(self, data: EmbeddingData) -> dict[str, Any]:
        self.network = data.network()
        self.start(data.inputs.shape[1], data.dim, data.options.seed)
        self.loss = HedgedGaussian(squared=True, normalized=True, reading="mean-log", kl_weight=1e-6)
        table = FeatureTable(data.inputs)
        step = _PairStep(self, LabelPairs(table, data.label, data.train), LabelPairs(table, data.label, data.held_out))
        return train_metric(step, data.train, data.held_out, name="hib", options=data.options).summary()

    def pair_loss(self, anchor: Tensor, positive: Tensor, negative: Tensor, generator: torch.Generator) -> Tensor:
        columns, has = draw_negatives(negative, 4, generator)
        mean, log_variance = self.posterior(positive)
        close = Normal(mean, (0.5 * log_variance).exp(), validate_args=False)
        far = Normal(mean[columns], (0.5 * log_variance).exp()[columns], validate_args=False)
        mean, log_variance = self.posterior(anchor)
        own = Normal(mean, (0.5 * log_variance).exp(), validate_args=False)
        if not has.any():  # a batch of one class asks for nothing
            return 0.0 * (own.mean.sum() + own.stddev.sum())
        picked = [Normal(p.mean[has], p.stddev[has], validate_args=False) for p in (own, close, far)]
        return self.loss(picked[0], picked[1], picked[2], generator=generator)


class _PairStep(nn.Module):
    def __init__(self, method: ProbabilisticFace | HedgedInstance, fitting: LabelPairs, held_out: LabelPairs) -> None:
        super().__init__()
        self.method, self.fitting, self.held_out = method, fitting, held_out

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        batch = (self.fitting if self.training else self.held_out).draw(rows, generator)
        return self.method.pair_loss(batch.anchor, batch.positive, batch.negative, generator)


class Laplace(nn.Module):
    """The metric posterior over the last layer, its prior chosen by held-out retrieval (`MetricPosterior`).

    Args:
        network: trained already, for a post-hoc posterior.
        online: train the layer under weights drawn from the posterior, and its curvature with it, which keeps `memory` of
            itself in each step (`MetricStep`).
        options: go to `MetricPosterior`.
    """

    noise: Tensor

    def __init__(
        self,
        samples: int = 32,
        network: nn.Sequential | None = None,
        online: bool = False,
        memory: float = 0.999,
        **options: Any,
    ) -> None:
        super().__init__()
        if online and network is not None:
            raise OptionError("online=True trains a layer of its own: give no network")
        self.samples, self.trained, self.online, self.memory, self.options = samples, network, online, memory, options

    def fit(self, data: EmbeddingData) -> dict[str, Any]:
        report: dict[str, Any]
        options: dict[str, Any] = {"margin": data.margin, "miner": data.miner} | self.options
        posterior = MetricPosterior(data.width, data.dim, **options)
        network, report = self.trained, {}
        if network is None:
            running = posterior if self.online else None
            network, report = data.train_network("laplace", posterior=running, memory=self.memory)
        layer = network[-1]
        assert isinstance(layer, nn.Linear)
        self.body, self.posterior = network[:-1], posterior
        generator = step_generator(data.options.seed, 3)
        with torch.no_grad():
            x = self.body(torch.from_numpy(data.inputs))
            if self.online:
                posterior.weight.copy_(layer.weight)
                posterior.bias.copy_(layer.bias)
            else:
                posterior.take(layer.weight, layer.bias)
                posterior.fit(x, data.label, subset=data.train, generator=generator)
        label = torch.from_numpy(data.label)
        q, g = some_rows(data.held_out, QUERIES, generator), some_rows(data.train, GALLERY, generator)
        report |= choose_prior(self.posterior, x[q], label[q], x[g], label[g], generator)
        self.register_buffer("noise", self.posterior.noise(self.samples, generator), persistent=False)
        return report

    @torch.no_grad()
    def embed(self, x: Tensor) -> MetricEmbedding:
        """In closed form; the samples are joint draws of the weights."""
        inputs = self.body(x)
        return replace(self.posterior.predict(inputs), samples=self.posterior.embeddings(inputs, self.noise))
