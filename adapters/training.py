"""The one training loop: accelerate, AdamW, warm-up and cosine, early stopping, metrics, resume."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .distributed import check_launch
from .errors import DataError, OptionError


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


def step_generator(seed: int, *position: int) -> torch.Generator:
    """A CPU generator that depends on (seed, position) alone: a resumed run draws what an unbroken one draws."""
    mixed = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


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
) -> TrainResult:
    """Train the parameters of `step`, keep the state that is best on held-out rows.

    `step(rows, generator)` is a module whose forward gives the loss of one batch, a scalar tensor; `rows` int64 [b] are
    this process's share of the batch. `evaluate()` gives the held-out loss, lower is better. A run with an
    `options.output_dir` writes `NAME/metrics.jsonl` and continues from `NAME/checkpoint.pt` to the result of an
    unbroken run, provided that the checkpoint was written for the same data and options: `key` stands for the data.

    Raises:
        DataError: there are fewer rows than one batch needs, or the loss is not finite.
    """
    check_launch()
    accelerator = Accelerator()
    batch_size = min(options.batch_size, len(rows))
    if batch_size < 2 * accelerator.num_processes:
        raise DataError(
            f"head {name!r} got {len(rows)} fitting rows for {accelerator.num_processes} process(es); contrastive and "
            "ranking losses need at least 2 rows a process: give more data, or a smaller validation share"
        )
    trainable = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    steps_per_epoch = max(1, len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(epochs * steps_per_epoch, warmup))
    folder = None if options.output_dir is None else Path(options.output_dir) / name
    signature = repr((key, len(rows), epochs, lr, batch_size, options.seed, weight_decay, accelerator.num_processes))
    run = _Run(step, optimizer, schedule, folder, signature)
    result, first_epoch = run.resume()
    if first_epoch and first_epoch - 1 - result.best_epoch >= patience:  # it had stopped early, and stays so
        first_epoch = epochs
    prepared = accelerator.prepare(step) if accelerator.num_processes > 1 else step
    bar = tqdm(
        range(first_epoch, epochs),
        desc=f"fit {name}",
        unit="epoch",
        initial=first_epoch,
        total=epochs,
        disable=not (options.progress and accelerator.is_main_process),
    )
    start = time.perf_counter() - result.seconds
    for epoch in bar:
        loss = _one_epoch(prepared, accelerator, rows, batch_size, optimizer, schedule, trainable, options.seed, epoch)
        if not math.isfinite(loss):
            raise DataError(f"head {name!r}: the loss became {loss} in epoch {epoch + 1}; try a smaller lr than {lr}")
        step.eval()
        with torch.no_grad():
            value = float(evaluate())
        result.train_loss.append(loss)
        result.held_out.append(value)
        if result.best_epoch < 0 or value < result.held_out[result.best_epoch]:
            result.best_epoch = epoch
            run.best = copy.deepcopy(step.state_dict())
        result.seconds = time.perf_counter() - start
        bar.set_postfix(loss=f"{loss:.4f}", held_out=f"{value:.4f}")
        if accelerator.is_main_process:
            run.save(result, epoch)
        if epoch - result.best_epoch >= patience:
            break
    bar.close()
    step.load_state_dict(run.best)
    step.eval()
    return result


def _warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    warm = max(1, round(total * warmup))

    def factor(i: int) -> float:
        if i < warm:
            return (i + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (i - warm) / max(1, total - warm)))

    return factor


def _one_epoch(
    step: nn.Module,
    accelerator: Accelerator,
    rows: np.ndarray,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    trainable: list[nn.Parameter],
    seed: int,
    epoch: int,
) -> float:
    step.train()
    order = rows[torch.randperm(len(rows), generator=step_generator(seed, epoch)).numpy()]
    rank, world = accelerator.process_index, accelerator.num_processes
    total: Tensor | None = None
    n_steps = max(1, len(rows) // batch_size)
    for i in range(n_steps):
        batch = order[i * batch_size : (i + 1) * batch_size][rank::world]
        loss = step(torch.from_numpy(batch), step_generator(seed, epoch, i, rank))
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return float(accelerator.reduce(total / n_steps, "mean"))


class _Run:
    """Where a run keeps its metrics and its checkpoint; with no folder it keeps nothing."""

    def __init__(self, step: nn.Module, optimizer: Any, schedule: Any, folder: Path | None, signature: str) -> None:
        self.step, self.optimizer, self.schedule = step, optimizer, schedule
        self.folder, self.signature = folder, signature
        self.best: dict[str, Any] = copy.deepcopy(step.state_dict())

    def resume(self) -> tuple[TrainResult, int]:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return TrainResult(), 0
        saved = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        if saved["signature"] != self.signature:  # of another fit: begin anew and overwrite it
            return TrainResult(), 0
        self.step.load_state_dict(saved["step"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.best = saved["best"]
        return TrainResult(**saved["result"]), saved["epoch"] + 1

    def save(self, result: TrainResult, epoch: int) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"epoch": i + 1, "train_loss": a, "held_out_loss": b})
            for i, (a, b) in enumerate(zip(result.train_loss, result.held_out, strict=True))
        ]
        _replace(self.folder / "metrics.jsonl", lambda p: p.write_text("\n".join(lines) + "\n"))
        state = {
            "signature": self.signature,
            "step": self.step.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "result": vars(result),
            "epoch": epoch,
        }
        _replace(self.folder / "checkpoint.pt", lambda p: torch.save(state, p))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, then rename it, so that a killed run leaves no half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)
