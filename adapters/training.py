"""How heads are trained: epochs over rows with AdamW, warm-up and cosine, until the held-out loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .distributed import check_launch
from .errors import DataError, OptionError
from .training_loop import Plan, run_plan, step_generator


@dataclass
class TrainOptions:
    """How to train a head. None means the head's own default.

    Attributes:
        epochs: passes over the rows. lr: peak learning rate of AdamW. batch_size: rows a step, over all processes.
        seed: of every random number of the fit. output_dir: where metrics and checkpoints go (None: nowhere).
    """

    epochs: int | None = None
    lr: float | None = None
    batch_size: int = 512
    seed: int = 0
    output_dir: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "seed"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise OptionError(f"{name}={value!r} was given; expected a whole number that is not negative")
        if self.epochs is not None and self.epochs < 1:
            raise OptionError(f"epochs={self.epochs} was given; expected at least 1")
        if self.lr is not None and not 0.0 < self.lr < math.inf:
            raise OptionError(f"lr={self.lr} was given; expected a positive number such as 1e-3")
        if self.batch_size < 2:
            raise OptionError(f"batch_size={self.batch_size} was given; expected at least 2 rows")


@dataclass
class TrainResult:
    """What a training run reports: losses per epoch, the best held-out value and where it was, and the seconds."""

    train_loss: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best_epoch: int = -1
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "train_loss": self.train_loss[-1],
            "held_out_loss": self.held_out[self.best_epoch],
            "best_epoch": self.best_epoch + 1,
            "epochs": len(self.train_loss),
            "seconds": round(self.seconds, 3),
        }


def epochs_for(rows: int, batch_size: int, steps: int, lowest: int = 5, highest: int = 200) -> int:
    """Epochs that make about `steps` optimiser steps on so many rows."""
    return min(highest, max(lowest, math.ceil(steps * batch_size / max(rows, 1))))


def train(
    step: nn.Module,
    rows: np.ndarray,
    evaluate: Callable[[], float],
    *,
    name: str,
    options: TrainOptions,
    epochs: int,
    lr: float,
    key: str = "",
    weight_decay: float = 1e-4,
    warmup: float = 0.1,
    patience: int = 20,
    shared: bool = False,
) -> TrainResult:
    """Train the parameters of `step`, keep the state that is best on held-out rows.

    `step(rows, generator)` is a module whose forward gives the loss of one batch, a scalar tensor; `rows` int64 [b] are
    this process's share of the batch. `evaluate()` gives the held-out loss, lower is better. A run with an
    `options.output_dir` writes `NAME/metrics.jsonl` and continues from `NAME/checkpoint.pt` to the result of an
    unbroken run, provided that the checkpoint was written for the same data and options: `key` stands for the data.
    shared: every process takes the whole batch, with the numbers that one process draws: for a loss that contrasts all its
    rows. Features are stored, so nothing need be sent for it; several processes train as one does, and no faster.

    Raises:
        DataError: there are fewer rows than one batch needs, or the loss is not finite.
    """
    launch = check_launch()
    rank, world = (0, 1) if shared else (launch.rank, launch.world)
    batch_size = min(options.batch_size, len(rows))
    if batch_size < 2 * world:
        raise DataError(
            f"head {name!r} got {len(rows)} fitting rows for {world} process(es); contrastive and ranking losses need "
            "at least 2 rows a process: give more data, or a smaller validation share"
        )
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    each = max(1, len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(epochs * each, warmup))
    order = EpochOrder(rows, options.seed)

    def batch(i: int) -> tuple[Tensor, torch.Generator]:
        epoch, place = divmod(i, each)
        taken = order(epoch)[place * batch_size : (place + 1) * batch_size][rank::world]
        return torch.from_numpy(taken), step_generator(options.seed, epoch, place, rank)

    plan = Plan(
        name=name,
        steps=epochs * each,
        every=each,
        batch=batch,
        evaluate=lambda: {"held_out_loss": float(evaluate())},
        folder=options.output_dir,
        signature=repr((key, len(rows), epochs, lr, batch_size, options.seed, weight_decay, world)),
        lowest="held_out_loss",
        patience=patience,
        clip=1.0,
        placed=True,
        progress=options.progress,
    )
    history = run_plan(step, optimizer, schedule, plan)
    return TrainResult(history.column("train_loss"), history.column("held_out_loss"), history.best, history.seconds)


class EpochOrder:
    """The rows [N] in the random order of an epoch, which depends on (seed, position, epoch) alone; drawn once for each."""

    def __init__(self, rows: np.ndarray, seed: int, *position: int) -> None:
        self.rows, self.place, self.epoch = rows, (seed, *position), -1

    def __call__(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            order = torch.randperm(len(self.rows), generator=step_generator(*self.place, epoch)).numpy()
            self.epoch, self.now = epoch, self.rows[order]
        return self.now


def warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate at each of `total` steps: a linear rise over a share `warmup`, then a cosine to 0."""
    warm = max(1, round(total * warmup))

    def factor(i: int) -> float:
        if i < warm:
            return (i + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (i - warm) / max(1, total - warm)))

    return factor
