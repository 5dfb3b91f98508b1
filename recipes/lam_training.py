"""Trainings of the recipe `lam`: batches, the losses of its methods, what is watched on held-out images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from ..adapters.distributed import Launch
from ..adapters.embedding_baselines import GaussianEmbedding
from ..adapters.gathering import gather_rows
from ..adapters.losses import HedgedGaussian, MutualLikelihood
from ..adapters.mining import draw_triplets
from ..adapters.positives import target_masks
from ..adapters.training_loop import History, Plan, Record, run_plan, step_generator
from .augmentations import Augmentation
from .image_files import FileImages
from .lam_data import Part
from .lam_networks import EmbeddingNetwork, GeneralisedMean
from .lam_report import found_images
from .masked_dropout import draw_masks, dropping
from .pretraining import Ahead
from .running import Run, scheduled
from .view_batches import BlockRows

if TYPE_CHECKING:
    from .lam import LamConfig

BLOCK = 16
"""Rows of a batch that share a generator: so many rows, or a multiple, are a process's share."""
ROWS = 256
"""Images of one pass without gradients."""
WATCHED = 1000
"""Held-out images that are watched at most."""
TRIPLETS = 512
"""Mined triplets of a step that HIB compares samples of at most."""
PAPERS_SCALE = math.log1p(math.e)
"""Of HIB's distances at the start of the paper's code: softplus(1)."""
ORDER, TRAINING, OBJECTIVE = 401, 402, 403  # places of the random numbers
CROPS = Augmentation(jitter=0.0, grayscale=0.0)
WARMUP, DECAY = 0.05, 0.01
"""Share of the steps in which a cosine's learning rate rises; of an exponential, per epoch (the paper)."""

MISSING = "validation_missing"
"""The figure whose lowest value decides which epoch is kept."""
Batch = tuple[Tensor, Tensor, Tensor | None, torch.Generator]


class Batches:
    """This process's images of each step, the targets that the loss is of, masks of the network's dropout, and a generator.

    Random numbers belong to the rows of all processes, the generator to the whole step. Images of files are cropped at random and
    mirrored; small ones stay as they are, as in the paper. With `gather` the loss is of all processes' images, and so are
    the targets; else of this process's.
    """

    def __init__(self, part: Part, network: nn.Module, config: LamConfig, launch: Launch, seed: int) -> None:
        self.pictures, self.network, self.seed, self.gather = part.pictures, network, seed, config.gather
        self.rows = BlockRows(len(part), config.batch_size, seed, launch, BLOCK, ORDER)
        self.target = torch.from_numpy(np.ascontiguousarray(part.target))

    def __call__(self, step: int) -> Batch:
        own, generators = self.rows(step), self.rows.generators(step, TRAINING)
        if isinstance(self.pictures, FileImages):
            images = self.pictures.views(own.numpy(), CROPS, generators)
        else:
            images = self.pictures.plain(own.numpy())
        target = self.target[self.rows.whole(step) if self.gather else own]
        kept = draw_masks(self.network, BLOCK, generators)
        return images, target, kept, step_generator(self.seed, OBJECTIVE, step)


class Step(nn.Module):
    """The loss of one batch, as a module that the training loop trains.

    objective: its `of_inputs(x, target, generator)` is the loss of the trunk's features [n, d_in] and their targets.
    """

    def __init__(self, network: EmbeddingNetwork, objective: nn.Module, gather: bool) -> None:
        super().__init__()
        self.network, self.objective, self.gather = network, objective, gather

    def forward(self, images: Tensor, target: Tensor, kept: Tensor | None, own: torch.Generator) -> Tensor:
        device = next(self.network.parameters()).device
        with dropping(self.network, kept):
            x = self.network.trunk(images.to(device))
        with torch.autocast(device.type, enabled=False):  # distances and curvatures want their digits
            x = gather_rows(x.float()) if self.gather else x.float()
            objective: Any = self.objective
            return objective.of_inputs(x, target.to(device), own)


class FaceObjective(nn.Module):
    """PFE: variances that make positive pairs likely, on features and means that stay as they are."""

    def __init__(self, gaussian: GaussianEmbedding) -> None:
        super().__init__()
        self.gaussian, self.loss = gaussian, MutualLikelihood()

    def of_inputs(self, x: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_variance = self.gaussian.posterior(x)
        first, second = target_masks(target)[0].triu().nonzero(as_tuple=True)
        if not len(first):
            return 0.0 * log_variance.sum()
        return self.loss(mean[first], log_variance[first], mean[second], log_variance[second])


class HedgedObjective(nn.Module):
    """HIB: means and variances by the chance that samples of mined triplets match.

    `reference`: with the paper's scale at the start, and its divergence, which is a sum over all mined triplets: that of the
    drawn ones stands for it.
    """

    def __init__(self, gaussian: GaussianEmbedding, config: LamConfig) -> None:
        super().__init__()
        self.gaussian, self.margin, self.miner = gaussian, config.margin, config.miner
        more: dict[str, Any] = {"reference": True, "scale": PAPERS_SCALE} if config.reference else {
            "squared": True, "normalized": True, "reading": "mean-log",
        }  # fmt: skip
        self.kl_weight = config.kl_weight
        self.loss = HedgedGaussian(kl_weight=config.kl_weight, **more)

    def of_inputs(self, x: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_variance = self.gaussian.posterior(x)
        masks = target_masks(target)
        triplets, mined = draw_triplets(mean.detach(), *masks, self.margin, self.miner, TRIPLETS, generator)
        if not mined:
            return 0.0 * (mean.sum() + log_variance.sum() + sum(p.sum() for p in self.loss.parameters()))
        std = (0.5 * log_variance).exp()
        anchor, positive, negative = (Normal(mean[i], std[i], validate_args=False) for i in triplets)
        far = Normal(negative.mean[:, None], negative.stddev[:, None], validate_args=False)
        if self.loss.reference:
            self.loss.kl_weight = self.kl_weight * mined / triplets.shape[1]
        return self.loss(anchor, positive, far, generator=generator)


class TrunkRows:
    """The features [N, d_in] of images as `MetricPosterior.fit` reads an array's rows: computed as they are read."""

    ndim = 2

    def __init__(self, network: EmbeddingNetwork, part: Part, device: torch.device) -> None:
        self.network, self.part, self.device = network, part, device
        self.shape = (len(part), network.head.in_features)

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: Any) -> np.ndarray:
        parts = np.array_split(np.asarray(rows), math.ceil(len(rows) / ROWS))
        found = [self.network.trunk(self.part.pictures.plain(one).to(self.device)).float().cpu() for one in parts]
        return torch.cat(found).numpy()


class Watch:
    """mAP@5 of held-out images by the embedding, and how much is missing of 1, after each epoch."""

    def __init__(self, network: EmbeddingNetwork, part: Part, device: torch.device) -> None:
        self.network, self.part, self.device = network, part.some(WATCHED), device

    @torch.no_grad()
    def __call__(self) -> Record:
        parts = np.array_split(np.arange(len(self.part)), math.ceil(len(self.part) / ROWS))
        z = [self.network(self.part.pictures.plain(rows).to(self.device)).float() for rows in parts]
        found = found_images(functional.normalize(torch.cat(z), dim=-1).cpu().numpy(), self.part)
        score = found.map_at(5)
        return {"validation_map_at_5": score, MISSING: 1.0 - score}


def train(
    run: Run, name: str, step: Step, batches: Batches, watch: Watch, config: LamConfig, lowest: str | None = MISSING
) -> History:
    """One training by the library's loop; it ends at the epoch with the best mAP@5 of held-out images (lowest None: the last)."""
    powers = [p for part in step.network.modules() if isinstance(part, GeneralisedMean) for p in part.parameters()]
    known = {id(p) for p in powers}
    rest = [p for p in step.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": config.lr, "weight_decay": config.weight_decay}]
    powers = [p for p in powers if p.requires_grad]
    if powers:  # as the paper does
        groups.append({"params": powers, "lr": 10.0 * config.lr, "weight_decay": 0.0})
    make = torch.optim.RMSprop if config.optimizer == "rmsprop" else torch.optim.AdamW
    optimizer = make(groups)
    each = batches.rows.each
    steps = config.epochs * each
    if config.schedule == "cosine":
        schedule = scheduled("cosine", optimizer, steps, WARMUP)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: math.exp(-DECAY * (i // each)))
    with Ahead(batches) as ahead:
        plan = Plan(
            name=name,
            steps=steps,
            every=each,
            batch=ahead,
            evaluate=watch,
            folder=run.folder,
            signature=run.signature,
            lowest=lowest,
            observe=run.observe(name, steps),
        )
        return run_plan(step, optimizer, schedule, plan)
