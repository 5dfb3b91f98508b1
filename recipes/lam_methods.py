"""The methods of the recipe `lam`: how each is trained, and how it answers for images.

A method answers by a head on the features of a trunk, so that all posteriors over one network's last layer share its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.embedding_baselines import Deterministic, GaussianEmbedding, procrustes
from ..adapters.errors import DataError
from ..adapters.losses import ContrastiveMetric
from ..adapters.metric_curvature import APPROXIMATIONS, LOSSES
from ..adapters.metric_laplace import MetricPosterior
from ..adapters.metric_predictive import MetricEmbedding, summarise
from ..adapters.metric_prior import GALLERY, QUERIES, choose_prior
from ..adapters.metric_training import MetricObjective
from ..adapters.training_loop import History, step_generator
from .image_files import Pictures
from .lam_data import Part, Sets
from .lam_networks import EmbeddingNetwork, make_network
from .lam_training import ROWS, Batches, FaceObjective, HedgedObjective, Step, TrunkRows, Watch, train
from .masked_dropout import draw_masks, dropping
from .running import Run, seeded_module

if TYPE_CHECKING:
    from .lam import LamConfig

BASELINES = ("deterministic", "mc-dropout", "ensemble", "pfe", "hib")
TIMES = ("post-hoc", "online")
VARIANTS = tuple(f"{time}-{loss}-{how}" for time in TIMES for loss in LOSSES for how in APPROXIMATIONS)
METHODS = (*BASELINES, *VARIANTS)
NETWORK, MASKS, NOISE, FITTING, PRIOR = 410, 411, 412, 413, 414  # places of the random numbers
STARTING = 2000
"""Training images whose curvature an online posterior begins with."""
IN_MEMORY = 2**30
"""Bytes of features that are kept for several posteriors; more are computed anew for each."""
NOISE_SHARE = 0.1
"""Of the squared length of an embedding: the noise without curvature while an online posterior trains."""

Head = Callable[[Tensor], MetricEmbedding]


@dataclass(frozen=True)
class Group:
    """Methods that answer from the same features: a trunk, images -> features, and their heads by name."""

    trunk: nn.Module
    heads: dict[str, Head]


class Methods:
    """Trains what a run's methods need, each network once, and gathers how they answer.

    Attributes: histories and reports, by the trainings' and the methods' names. Every process of a launch makes one.
    """

    def __init__(self, run: Run, config: LamConfig, sets: Sets) -> None:
        self.run, self.config, self.sets = run, config, sets.to(run.device)
        self.histories: dict[str, History] = {}
        self.before: dict[str, float] = {}
        self.reports: dict[str, Any] = {}
        self.networks: dict[str, EmbeddingNetwork] = {}
        self.gaussians: dict[str, GaussianEmbedding] = {}
        self.online: dict[str, MetricPosterior] = {}

    @property
    def device(self) -> torch.device:
        return self.run.device

    def train(self) -> None:
        """All trainings, by all processes together."""
        config = self.config
        self._network("deterministic", config.seed)
        if "mc-dropout" in config.methods:
            self._network("mc-dropout", config.seed, rate=config.dropout)
        if "ensemble" in config.methods:
            for member in range(1, config.members):
                self._network(f"member-{member}", config.seed * config.members + member + 2**31)
        if "pfe" in config.methods:
            gaussian = self._gaussian("pfe", self.networks["deterministic"])
            step = Step(self.networks["deterministic"], FaceObjective(gaussian), config.gather)
            self._train("pfe", step, config.seed, lowest=None)
        if "hib" in config.methods:
            network = self._fresh(config.seed)
            gaussian = self._gaussian("hib", network)
            self._train(
                "hib", Step(network, HedgedObjective(gaussian, config).to(self.device), config.gather), config.seed
            )
        for name in config.methods:
            if name.startswith("online"):
                self._online(name)

    def best(self) -> dict[str, float]:
        """Each training's mAP@5 of held-out images, at the epoch that was kept."""
        return {name: one.records[one.best]["validation_map_at_5"] for name, one in self.histories.items()}

    def _fresh(self, seed: int, rate: float = 0.0) -> EmbeddingNetwork:
        config = self.config
        size = self.sets.train.pictures.size

        def make() -> nn.Module:
            return make_network(
                config.network, size, config.dim, rate=rate, pretrained=config.pretrained, checkpoint=config.checkpoint
            )

        return seeded_module(make, seed, NETWORK).to(self.device)

    def _network(self, name: str, seed: int, rate: float = 0.0) -> None:
        network = self._fresh(seed, rate)
        objective = MetricObjective(network.head, ContrastiveMetric(self.config.margin, self.config.miner))
        self._train(name, Step(network, objective, self.config.gather), seed)

    def _train(self, name: str, step: Step, seed: int, **more: Any) -> None:
        watch = Watch(step.network, self.sets.validation, self.device)
        self.before[name] = watch()["validation_map_at_5"]
        batches = Batches(self.sets.train, step.network, self.config, self.run.launch, seed)
        self.histories[name] = train(self.run, name, step, batches, watch, self.config, **more)
        self.networks[name] = step.network.requires_grad_(False)

    def _gaussian(self, name: str, network: EmbeddingNetwork) -> GaussianEmbedding:
        gaussian = GaussianEmbedding(self.config.samples)
        gaussian.network = network.head
        gaussian.start(
            network.head.in_features, self.config.dim, step_generator(self.config.seed, NETWORK).initial_seed()
        )
        self.gaussians[name] = gaussian.to(self.device)
        return gaussian

    def _online(self, name: str) -> None:
        config, rows = self.config, len(self.sets.train)
        network = self._fresh(config.seed)
        posterior = self._posterior(name, network, "all" if config.reference else "images")
        few = self.sets.train.some(STARTING)
        x = torch.from_numpy(TrunkRows(network, few, self.device)[np.arange(len(few))])
        precision = 1.0 if config.reference else noise_precision(network, x.to(self.device))
        if config.online_precision is not None:
            precision = config.online_precision
        start = float(rows) if config.reference and config.hessian_start is None else config.hessian_start
        posterior.take(network.head.weight, network.head.bias, start or 0.0)
        if start is None:
            fit(posterior, x, few, config, rows / len(few))
        loss = ContrastiveMetric(config.margin, config.miner)
        objective = MetricObjective(network.head, loss, posterior, config.memory, rows, precision)
        self._train(name, Step(network, objective, config.gather), config.seed)
        posterior.weight.copy_(network.head.weight)
        posterior.bias.copy_(network.head.bias)
        self.online[name] = posterior

    def _posterior(self, name: str, network: EmbeddingNetwork, pair_count: str) -> MetricPosterior:
        config = self.config
        _, loss, approximation = name.rsplit("-", 2)
        posterior = MetricPosterior(
            network.head.in_features, config.dim, loss=loss, approximation=approximation, margin=config.margin,
            miner=config.hessian_miner or config.miner, pair_count=pair_count, max_triplets=config.max_triplets,
            reference=config.reference,
        )  # fmt: skip
        return posterior.to(self.device)

    @torch.no_grad()
    def groups(self) -> list[Group]:
        """How the methods answer, in the order of the config; posteriors are fitted here, by one process."""
        config, base = self.config, self.networks["deterministic"]
        point = Deterministic()
        point.network = base.head
        shared: dict[str, Head] = {"deterministic": point.embed}
        others: list[Group] = []
        noise: Tensor | None = None
        features = None
        for name in config.methods:
            if name == "mc-dropout":
                others.append(
                    Group(nn.Identity(), {name: DropoutHead(self.networks[name], config.samples, config.seed)})
                )
            elif name == "ensemble":
                members = [base, *(self.networks[f"member-{i}"] for i in range(1, config.members))]
                others.append(Group(nn.Identity(), {name: EnsembleHead(members, self._few(), not config.reference)}))
            elif name == "pfe":
                shared[name] = self.gaussians[name].embed
            elif name == "hib":
                others.append(Group(self.networks[name].trunk, {name: self.gaussians[name].embed}))
            elif name in VARIANTS:
                network = self.networks[name] if name in self.online else base
                posterior = self.online.get(name)
                if posterior is None:
                    features = self._features() if features is None else features
                    posterior = self._fitted(name, *features)
                self.reports[name] = self._prior(posterior, network)
                if name not in self.online:  # whose curvature is clamped at every step
                    share = float((posterior.curvature_weight < 0).float().mean())
                    self.reports[name]["negative_curvature"] = share
                if noise is None:
                    noise = posterior.noise(config.samples, step_generator(config.seed, NOISE))
                head = PosteriorHead(posterior, noise, config.reference)
                if network is base:
                    shared[name] = head
                else:
                    others.append(Group(network.trunk, {name: head}))
        return [Group(base.trunk, shared), *others]

    def _few(self) -> Tensor:
        few = self.sets.train.some(STARTING)
        return few.pictures.plain(np.arange(len(few))).to(self.device)

    def _features(self) -> tuple[Any, Part]:
        """Features of the images that post-hoc curvature is summed over, stored where they fit in memory."""
        part = self.sets.train.some(self.config.curvature_images or len(self.sets.train))
        rows = TrunkRows(self.networks["deterministic"], part, self.device)
        return (rows[np.arange(len(rows))] if 4 * rows.shape[0] * rows.shape[1] < IN_MEMORY else rows), part

    def _fitted(self, name: str, x: Any, part: Part) -> MetricPosterior:
        network = self.networks["deterministic"]
        posterior = self._posterior(name, network, "observed" if self.config.reference else "images")
        posterior.take(network.head.weight, network.head.bias)
        fit(posterior, x, part, self.config, len(self.sets.train) / len(part))
        return posterior

    def _prior(self, posterior: MetricPosterior, network: EmbeddingNetwork) -> dict[str, Any]:
        """The prior precision: a number, or by votes of one half of held-out images for the other's labels."""
        config, part = self.config, self.sets.validation
        number = 1.0 if config.reference and config.prior_precision is None else config.prior_precision
        if number is not None:
            posterior.prior_precision.fill_(number)
            return {"prior_precision": number}
        generator = step_generator(config.seed, PRIOR)
        order = torch.randperm(len(part), generator=generator)[: QUERIES + GALLERY]
        halves = [torch.sort(half).values for half in order.tensor_split(2)]
        inputs = [
            torch.from_numpy(TrunkRows(network, part, self.device)[half.numpy()]).to(self.device) for half in halves
        ]
        labels = [torch.from_numpy(part.target)[half].to(self.device) for half in halves]
        return choose_prior(posterior, inputs[0], labels[0], inputs[1], labels[1], generator)


def fit(posterior: MetricPosterior, x: Any, part: Part, config: LamConfig, times: float) -> None:
    """Curvature of a part's features, which stands for `times` as many images where each image counts once."""
    given = {"position": part.target} if part.of_places else {"label": part.target}
    generator = step_generator(config.seed, FITTING)
    posterior.fit(x, batch_size=config.batch_size, generator=generator, **given)
    if posterior.pair_count == "images":
        posterior.curvature_weight.mul_(times)
        posterior.curvature_bias.mul_(times)


@torch.no_grad()
def noise_precision(network: EmbeddingNetwork, x: Tensor) -> float:
    """The prior precision at which, without curvature, an embedding's noise has `NOISE_SHARE` of its squared length."""
    length = network.head(x).square().sum(-1).clamp(min=1e-12)
    return float((network.head.out_features * (x.square().sum(-1) + 1.0) / length).median() / NOISE_SHARE)


class PosteriorHead:
    """In closed form, with joint draws of the weights for votes; `reference`: from the draws, as the paper's code."""

    def __init__(self, posterior: MetricPosterior, noise: Tensor, reference: bool) -> None:
        self.posterior, self.noise, self.reference = posterior, noise, reference

    def __call__(self, x: Tensor) -> MetricEmbedding:
        drawn = self.posterior.embeddings(x, self.noise)
        return summarise(drawn, debiased=False) if self.reference else replace(self.posterior.predict(x), samples=drawn)


class DropoutHead:
    """Images under the same mask for all of them in each sample, which the seed draws."""

    def __init__(self, network: EmbeddingNetwork, samples: int, seed: int) -> None:
        self.network, self.samples, self.seed = network, samples, seed

    def __call__(self, images: Tensor) -> MetricEmbedding:
        drawn = []
        for sample in range(self.samples):
            with dropping(self.network, draw_masks(self.network, 1, [step_generator(self.seed, MASKS, sample)])):
                drawn.append(functional.normalize(self.network(images), dim=-1))
        return summarise(torch.stack(drawn))


class EnsembleHead:
    """Images by several networks, each turned onto the first by the rotation that fits training images best (`align`)."""

    def __init__(self, networks: Sequence[EmbeddingNetwork], training: Tensor, align: bool) -> None:
        self.networks, self.rotations = networks, None
        if align:
            frames = [self._frames(part) for part in training.split(ROWS)]
            self.rotations = procrustes(torch.cat(frames, 1))

    def _frames(self, images: Tensor) -> Tensor:
        return torch.stack([functional.normalize(network(images), dim=-1) for network in self.networks])

    def __call__(self, images: Tensor) -> MetricEmbedding:
        frames = self._frames(images)
        return summarise(frames if self.rotations is None else frames @ self.rotations)


class Inputs:
    """What the heads of a group take, some images at a time. Features that several heads take are computed once, and kept."""

    def __init__(self, group: Group, pictures: Pictures, device: torch.device) -> None:
        self.trunk, self.pictures, self.device = group.trunk, pictures, device
        self.kept: list[Tensor] | None = None
        if len(group.heads) > 1:
            self.kept = [x.cpu() for x in self]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        if self.kept is not None:
            yield from (x.to(self.device) for x in self.kept)
            return
        for rows in np.array_split(np.arange(len(self.pictures)), max(1, -(-len(self.pictures) // ROWS))):
            yield self.trunk(self.pictures.plain(rows).to(self.device)).float()


@torch.no_grad()
def answer(head: Head, inputs: Inputs, with_samples: bool) -> MetricEmbedding:
    """What one method says of all images, on the CPU; without its samples, which are large, unless asked for."""
    parts: dict[str, list[Tensor]] = {}
    drawn: Tensor | None = None
    start = 0
    for x in inputs:
        found = dict(vars(head(x)))
        samples = found.pop("samples")
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
        if (
            with_samples and samples is not None
        ):  # into their place, where a list of them would be there twice at the end
            if drawn is None:
                drawn = samples.new_empty(len(samples), len(inputs.pictures), samples.shape[-1], device="cpu")
            drawn[:, start : start + len(x)] = samples.cpu()
        start += len(x)
    whole: dict[str, Any] = {name: torch.cat(values) for name, values in parts.items()}
    return MetricEmbedding(**whole, samples=drawn)


def score(name: str, answer: MetricEmbedding, reference: bool) -> np.ndarray:
    """One uncertainty [N] for each image: 1 - R^2 (of PFE and HIB the summed variance); the paper's sum of deviations."""
    found = (answer.spread.sum(-1) if reference else answer.uncertainty).numpy()
    if not np.isfinite(found).all():
        raise DataError(f"{name}: an uncertainty is not finite: try a smaller --lr")
    return found
