"""One fold of the CIFAR-10H recipe: pairs by soft labels, the loss of a step, what is watched on validation rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.errors import DataError, PosthocError
from ..adapters.losses import ExpectedLikelihoodKernel, HedgedInstance, MCInfoNCE
from ..adapters.positives import PairBatch, RowNumbers, SoftLabelPairs, draw_negatives
from ..adapters.training import EpochOrder
from ..adapters.training_loop import History, Plan, Record, run_plan, step_generator
from ..adapters.vmf import VonMisesFisher
from ..eval.ambiguity import vote_entropy
from ..eval.baselines import entropy
from ..eval.metrics import spearman
from ..eval.retrieval import retrieve
from ..eval.search import directions
from .cifar10h_networks import PosteriorNetwork, SoftClassifier
from .running import Run, row_blocks, scheduled

if TYPE_CHECKING:
    from .cifar10h import Cifar10HConfig
    from .cifar10h_data import Inputs

ROWS = 128
"""Images of one pass without gradients."""
SAME = 1e-5
"""Uncertainties that differ by less, relative to their size, are float noise."""
ORDER, TRAINING, VALIDATION = 300, 301, 302  # places of the random numbers
Stage = Literal["", "-head"]
"""The training of a fold's whole network, and of its head alone before."""
STAGES: tuple[Stage, ...] = get_args(Stage)
ELK, SOFT = "elk", "soft-cross-entropy"


@dataclass(frozen=True)
class Answer:
    """What a network says of N images: unit embeddings [N, d], uncertainty [N]; kappa [N] of posteriors, or logits [N, C]."""

    embedding: np.ndarray
    uncertainty: np.ndarray
    kappa: np.ndarray | None = None
    logits: np.ndarray | None = None


def make_loss(config: Cifar10HConfig) -> nn.Module | None:
    """The loss of posteriors; None for cross-entropy."""
    learnable, reference = config.learnable, config.reference
    drawn: dict[str, Any] = {"antithetic": config.antithetic, "reference": reference}
    if config.loss == "mcinfonce":
        return MCInfoNCE(config.concentration, config.samples, learnable, **drawn)
    if config.loss == ELK:
        return ExpectedLikelihoodKernel(config.concentration, learnable, reference=reference)
    if config.loss == "hib":
        return HedgedInstance(config.hib_scale, config.hib_shift, config.samples, learnable, **drawn)
    return None


class Step(nn.Module):
    """The loss of this process's blocks of one batch, as a module that the training loop trains.

    All pairs: every two rows of a block, by the probability that both show one class. Drawn ones: a block's rows are
    anchors, each with a positive by the labels; its negatives are the positives of other rows of the block, taken with the
    probability that both show different classes.
    """

    def __init__(
        self, network: PosteriorNetwork | SoftClassifier, loss: nn.Module | None, inputs: Inputs, labels: np.ndarray,
        rows: np.ndarray, config: Cifar10HConfig,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.loss, self.inputs, self.config = network, loss, inputs, config
        self.labels = torch.from_numpy(labels)
        self.pairs = SoftLabelPairs(RowNumbers(len(labels)), labels, rows)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(self, rows: Tensor, places: list[tuple[int, ...]], directions_only: bool) -> Tensor:
        """rows int64 [K, block] and one place of the random numbers for each of the K blocks."""
        generators = [step_generator(*place) for place in places]
        if self.loss is not None and self.config.pairs == "drawn":
            return self._drawn_pairs(rows, generators, directions_only)
        answered = self._answered(list(zip(rows, generators, strict=True)))
        if self.loss is None:
            _, logits = answered
            return functional.cross_entropy(logits, self.labels[rows.flatten()].to(self.device))
        size = rows.shape[1]
        blocks = [self.of_all(_part(answered, i * size, size), self.labels[block]) for i, block in enumerate(rows)]
        return torch.stack(blocks).mean()

    def _drawn_pairs(self, rows: Tensor, generators: list[torch.Generator], directions_only: bool) -> Tensor:
        with _full_precision(self.device):
            drawn = [self.pairs.draw(block, one) for block, one in zip(rows, generators, strict=True)]
        both = zip(drawn, generators, strict=True)
        posterior = self._answered([(side, one) for batch, one in both for side in (batch.anchor, batch.positive)])
        losses, size = [], rows.shape[1]
        for i, (batch, one) in enumerate(zip(drawn, generators, strict=True)):
            anchor, positive = (_part(posterior, start * size, size) for start in (2 * i, 2 * i + 1))
            losses.append(self.of_pairs(anchor, positive, batch.negative, one, directions_only))
        return torch.stack(losses).mean()

    def _answered(self, sides: list[tuple[Tensor, torch.Generator]]) -> Any:
        """What the network says of several groups of rows at once, each as images drawn by its own generator."""
        with _full_precision(self.device):
            parts = [self.inputs.training(rows, self.config.crops, self.config.augment, one) for rows, one in sides]
        return self.network(torch.cat(parts).to(self.device))

    def of_all(self, posterior: VonMisesFisher, labels: Tensor) -> Tensor:
        """The loss of all pairs of posteriors [B], from their rows' labels [B, C]."""
        assert isinstance(self.loss, ExpectedLikelihoodKernel)
        return self.loss.all_pairs(posterior, _one_class(labels.to(self.device)))

    def of_pairs(
        self, anchor: VonMisesFisher, positive: VonMisesFisher, negative: Tensor, generator: torch.Generator,
        directions_only: bool = False,
    ) -> Tensor:  # fmt: skip
        """The loss of pairs [B], from the probabilities [B, B] that column j's positive is a negative of row i.

        directions_only: kappas get no gradient and negatives are rolled, as in the paper's first phase. symmetric: the mean
        with the loss of the pairs turned round, which the labels make equally likely.
        """
        if directions_only:
            anchor, positive = (_fixed_kappa(one) for one in (anchor, positive))
        value = self._one_way(anchor, positive, negative, generator, directions_only)
        if not self.config.symmetric:
            return value
        return 0.5 * (value + self._one_way(positive, anchor, negative.T, generator, directions_only))

    def _one_way(
        self, anchor: VonMisesFisher, positive: VonMisesFisher, negative: Tensor, generator: torch.Generator, rolled: bool
    ) -> Tensor:  # fmt: skip
        assert self.loss is not None
        more = {} if self.config.loss == ELK else {"generator": generator}
        if rolled or not self.config.negatives:
            return self.loss(anchor, positive, None, **more)
        with _full_precision(self.device):
            columns, has = draw_negatives(negative, self.config.negatives, generator)
        columns, has = columns.to(self.device), has.to(self.device)
        if not has.any():  # a block of one class
            return self.loss(anchor, positive, None, **more)
        far = VonMisesFisher(
            positive.mean_direction[columns[has]], positive.concentration[columns[has]], validate_args=False
        )
        return self.loss(_rows(anchor, has), _rows(positive, has), far, **more)


def _full_precision(device: torch.device) -> torch.autocast:
    """What is drawn, and what labels say, is the same whatever precision the network trains in."""
    return torch.autocast(device.type, enabled=False)


def _one_class(labels: Tensor) -> Tensor:
    """The probability [B, B] that two rows show one class, from their labels [B, C]."""
    with _full_precision(labels.device):
        return (labels @ labels.T).clamp(max=1.0)


def _part(one: VonMisesFisher, start: int, size: int) -> VonMisesFisher:
    part = slice(start, start + size)
    return VonMisesFisher(one.mean_direction[part], one.concentration[part], validate_args=False)


def _rows(one: VonMisesFisher, chosen: Tensor) -> VonMisesFisher:
    return VonMisesFisher(one.mean_direction[chosen], one.concentration[chosen], validate_args=False)


def _fixed_kappa(one: VonMisesFisher) -> VonMisesFisher:
    kappa = one.concentration
    # every parameter keeps a gradient, of 0, which several processes have to agree on
    return VonMisesFisher(one.mean_direction, kappa.detach() + 0.0 * kappa, validate_args=False)


@torch.no_grad()
def answer(network: nn.Module, inputs: Inputs, rows: np.ndarray, crop: bool = False, mirrored: bool = False) -> Answer:
    """What the network says of the images `rows`, whole, cropped or mirrored. Every process of a launch asks for itself."""
    device = next(network.parameters()).device
    network.eval()
    parts = [network(inputs.whole(rows[i : i + ROWS], crop, mirrored).to(device)) for i in range(0, len(rows), ROWS)]
    if isinstance(parts[0], VonMisesFisher):
        embedding = torch.cat([one.mean_direction for one in parts])
        kappa = torch.cat([one.concentration for one in parts]).double().cpu().numpy()
        return Answer(directions("the embedding", embedding.cpu()), 1 / kappa, kappa)
    embedding, logits = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Answer(directions("the embedding", embedding), entropy(logits), logits=logits.numpy())


def check_distinct(found: Answer, fold: int) -> None:
    """Raises PosthocError where the network's uncertainty is the same for all images."""
    if np.ptp(found.uncertainty) <= SAME * np.abs(found.uncertainty).max():
        value = "the entropy" if found.kappa is None else f"kappa, {found.kappa[0]:.3g},"
        raise PosthocError(
            f"fold {fold}: {value} is the same for all images, so it ranks nothing: the training has run to a bound. Give a "
            "lower --lr or --head-lr, or kappa from --parametrization norm"
        )


def rank_correlation(score: np.ndarray, target: np.ndarray) -> float:
    """Spearman's, and 0 of a score that is the same for all images: it ranks nothing."""
    return 0.0 if np.ptp(score) == 0 or np.ptp(target) == 0 else spearman(score, target)


class Watch:
    """Figures of a fold's validation rows at the end of a round."""

    def __init__(
        self, step: Step, rows: np.ndarray, votes: np.ndarray, fractions: np.ndarray, config: Cifar10HConfig
    ) -> None:
        self.step, self.rows, self.votes, self.fractions, self.config = step, rows, votes, fractions, config
        self.pairs = SoftLabelPairs(RowNumbers(len(rows)), votes[rows], np.arange(len(rows)))

    def __call__(self) -> Record:
        network, rows = self.step.network, self.rows
        found = answer(network, self.step.inputs, rows)
        human = rank_correlation(found.uncertainty, vote_entropy(self.votes[rows]))
        label = self.votes[rows].argmax(1)
        figures = {
            "validation_loss": self._loss(found),
            "human_spearman": human,
            "recall_at_1": float(retrieve(found.embedding, label).values["recall_at_1"].mean()),
        }
        if self.config.keep == "crop":
            crops = answer(network, self.step.inputs, rows, crop=True)
            figures["crop_spearman"] = rank_correlation(crops.uncertainty, 1 - self.fractions[rows])
            figures["judged"] = -figures["crop_spearman"]
        elif self.config.keep == "human":
            figures["judged"] = -human
        else:
            figures["judged"] = figures["validation_loss"]
        return figures

    def _loss(self, found: Answer) -> float:
        """With the same pairs and draws at every call: rounds compare."""
        device = self.step.device
        if found.logits is not None:
            votes = torch.from_numpy(self.votes[self.rows])
            return float(functional.cross_entropy(torch.from_numpy(found.logits), votes))
        mu, kappa = torch.from_numpy(found.embedding), torch.from_numpy(found.kappa).float()
        if self.config.pairs == "all":
            return self._loss_of_all(mu.to(device), kappa.to(device))
        every, total, count = torch.arange(len(self.rows)), 0.0, 0
        for number, part in enumerate(every.split(self.config.batch_size)):
            if len(part) < 2:
                continue
            generator = step_generator(self.config.seed, VALIDATION, number)
            batch: PairBatch = self.pairs.draw(part, generator)
            anchor, positive = (
                VonMisesFisher(mu[side].to(device), kappa[side].to(device), validate_args=False)
                for side in (batch.anchor, batch.positive)
            )
            total += len(part) * float(self.step.of_pairs(anchor, positive, batch.negative, generator))
            count += len(part)
        return total / count

    def _loss_of_all(self, mu: Tensor, kappa: Tensor) -> float:
        """Blocks as in the training, in the rows' order."""
        values = []
        for part in torch.arange(len(self.rows)).split(self.config.block):
            if len(part) > 1:
                posterior = VonMisesFisher(mu[part], kappa[part], validate_args=False)
                values.append(self.step.of_all(posterior, torch.from_numpy(self.votes[self.rows[part]])))
        return float(torch.stack(values).mean())


def check_rows(count: int, config: Cifar10HConfig) -> None:
    """Raises DataError where there are fewer rows to train on than a batch has."""
    if count < config.batch_size:
        raise DataError(f"{count} rows to train on are fewer than a batch: give --batch-size {count} or less")


def train_fold(run: Run, step: Step, watch: Watch, rows: np.ndarray, fold: int, stage: Stage = "") -> History:
    """Train one fold's network on `rows`; it ends at the round that `config.keep` says, in eval mode."""
    config = step.config
    blocks = row_blocks(config.batch_size, config.block, run.launch)
    check_rows(len(rows), config)
    each = len(rows) // config.batch_size
    name, number = f"fold{fold}{stage}", STAGES.index(stage)
    parameters = _groups(step, config)
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    schedule = scheduled(config.schedule, optimizer, config.steps, config.warmup)
    order = EpochOrder(rows, config.seed, ORDER, fold, number)

    def batch(i: int) -> tuple[Tensor, list[tuple[int, ...]], bool]:
        epoch, place = divmod(i, each)
        taken = torch.from_numpy(order(epoch))[place * config.batch_size : (place + 1) * config.batch_size]
        places: list[tuple[int, ...]] = [(config.seed, TRAINING, fold, number, i, block) for block in blocks]
        return taken.view(-1, config.block)[list(blocks)], places, config.phases == 1 and i < config.steps // 2

    plan = Plan(
        name=name,
        steps=config.steps,
        every=config.every,
        batch=batch,
        evaluate=watch,
        folder=run.folder,
        signature=f"{run.signature} {name}",
        lowest="judged",
        clip=config.clip,
        placed=True,
        observe=run.observe(name, config.steps),
    )
    return run_plan(step, optimizer, schedule, plan)


def _groups(step: Step, config: Cifar10HConfig) -> list[dict[str, Any]]:
    """The backbone's weights with their learning rate, all others with the head's."""
    inside = {id(p) for p in step.network.backbone.parameters()}
    trainable = [p for p in step.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in inside], "lr": config.lr},
        {"params": [p for p in trainable if id(p) not in inside], "lr": config.head_lr or config.lr},
    ]
    return [group for group in groups if group["params"]]
