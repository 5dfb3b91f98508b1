"""The loop under every training: rounds of optimiser steps, an evaluation after each, metrics, checkpoints, resume."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .distributed import check_launch
from .errors import DataError, OptionError
from .files import replace_file

Record = dict[str, float]


@dataclass
class Plan:
    """One training, as `run_plan` carries it out.

    Attributes:
        name: of the progress bar, and of the folder under `folder` that metrics and checkpoint are written to.
        steps: optimiser steps in all. every: steps of a round; a round ends with an evaluation and a checkpoint.
        batch: what the module's forward takes at a step, counted from 0; its answer is the loss, a scalar tensor.
        evaluate: figures at the end of a round; every process calls it, and must get the same.
        folder: None writes nothing. signature: a checkpoint of another one is not continued.
        lowest: the figure whose lowest value decides which round's state is kept; None keeps the last.
        patience: rounds without a lower value after which the training stops. clip: largest norm of the gradient.
        placed: whether the caller has put the module on its device; else accelerate does, with its mixed precision.
        observe: called in the main process with each new record.
    """

    name: str
    steps: int
    every: int
    batch: Callable[[int], tuple[Any, ...]]
    evaluate: Callable[[], Record]
    folder: Path | None = None
    signature: str = ""
    lowest: str | None = None
    patience: int | None = None
    clip: float | None = None
    placed: bool = False
    progress: bool = True
    observe: Callable[[Record], None] | None = None


@dataclass
class History:
    """What a training has seen: a record for each round (its `step`, its mean `train_loss`, the figures), the seconds spent
    in it, and which record is the best (the last, where the plan names no figure)."""

    records: list[Record] = field(default_factory=list)
    best: int = -1
    seconds: float = 0.0
    stopped: bool = False

    def column(self, name: str) -> list[float]:
        """One figure of all rounds."""
        return [record[name] for record in self.records]


def step_generator(seed: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, position) alone: a resumed run draws what an unbroken one draws.

    `device`: where it draws, the CPU; other kinds of device draw other numbers from the same seed.
    """
    mixed = np.random.SeedSequence(seed, spawn_key=position).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def run_plan(module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, plan: Plan) -> History:
    """Train the parameters of `module` that are in `optimizer`; `schedule` (or None) advances with every step.

    A run with a folder writes `NAME/metrics.jsonl` and `NAME/checkpoint.pt` after each round, and continues from there to
    the result of an unbroken run. At the end the module holds the state that the plan keeps, and is in eval mode.

    Raises:
        DataError: the loss is not finite. OptionError: BatchNorm would train with each process's own statistics.
    """
    launch = check_launch()
    accelerator = Accelerator()
    check_statistics(module, launch.world)
    if not plan.placed:
        module.to(accelerator.device)
    run = _Run(module, optimizer, schedule, accelerator, plan)
    history = run.resume()
    move = launch.world > 1 or not plan.placed
    prepared, optimizer = accelerator.prepare(_Called(module), optimizer, device_placement=[move, move])
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    done = int(history.records[-1]["step"]) if history.records else 0
    start = time.perf_counter() - history.seconds
    with _bar(plan, done, accelerator.is_main_process) as bar:
        while done < plan.steps and not history.stopped:
            module.train()
            last = min(done + plan.every, plan.steps)
            total: Tensor | None = None
            for step in range(done, last):
                loss = prepared(_Arguments(plan.batch(step)))
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                if plan.clip is not None:
                    accelerator.clip_grad_norm_(trainable, plan.clip)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                total = loss.detach() if total is None else total + loss.detach()
                bar.update()
            assert total is not None
            mean = float(accelerator.reduce(total / (last - done), "mean"))
            if not math.isfinite(mean):
                rate = optimizer.param_groups[0]["lr"]
                raise DataError(
                    f"{plan.name}: the loss became {mean} before step {last}; try a smaller lr (it is {rate:.2g})"
                )
            done = last
            module.eval()
            with torch.no_grad():
                figures = plan.evaluate()
            history.records.append({"step": done, "train_loss": mean, **figures})
            run.judge(history)
            history.seconds = time.perf_counter() - start
            bar.set_postfix({name: f"{value:.4g}" for name, value in list(history.records[-1].items())[1:4]})
            if accelerator.is_main_process:
                run.save(history)
                if plan.observe is not None:
                    plan.observe(history.records[-1])
    if run.best is not None:
        module.load_state_dict(run.best)
    module.eval()
    return history


class _Arguments:
    """What a forward takes, as it was given: what processes share on GPUs would move tensors, row numbers too, to the GPU."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


class _Called(nn.Module):
    """The module, called with `_Arguments`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, arguments: _Arguments) -> Tensor:
        return self.module(*arguments.values)


@contextmanager
def _bar(plan: Plan, done: int, is_main: bool) -> Iterator[Any]:
    shown = plan.progress and is_main
    with tqdm(total=plan.steps, initial=done, desc=plan.name, unit="step", disable=not shown) as bar:
        yield bar


def check_statistics(module: nn.Module, world: int) -> None:
    """Raises OptionError where BatchNorm would train on several processes, each with its own rows' statistics; the module is in
    training mode afterwards."""
    if world == 1:
        return
    module.train()
    own = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    loose = [name for name, part in module.named_modules() if isinstance(part, own) and part.training]
    if loose:
        raise OptionError(
            f"{len(loose)} BatchNorm layers ({loose[0]}, ...) would train on {world} processes, each with the statistics of "
            "its own rows: freeze them, take GroupNorm, or (on GPUs) torch.nn.SyncBatchNorm"
        )


class _Run:
    """Where a training keeps its metrics and its checkpoint; with no folder it keeps nothing."""

    def __init__(self, module: nn.Module, optimizer: Any, schedule: Any, accelerator: Accelerator, plan: Plan) -> None:
        self.module, self.optimizer, self.schedule, self.accelerator = module, optimizer, schedule, accelerator
        self.plan = plan
        self.folder = None if plan.folder is None else Path(plan.folder) / plan.name
        self.best: dict[str, Any] | None = None

    def judge(self, history: History) -> None:
        """Whether the newest record is the best one, and whether it is time to stop."""
        place, figure = len(history.records) - 1, self.plan.lowest
        if figure is None:
            history.best = place
            return
        now, best = (history.records[i][figure] for i in (place, history.best))
        if history.best < 0 or now < best or (math.isnan(best) and not math.isnan(now)):
            history.best, self.best = place, copy.deepcopy(self.module.state_dict())
        history.stopped = self.plan.patience is not None and place - history.best >= self.plan.patience

    def resume(self) -> History:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return History()
        saved = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        if saved["signature"] != self.plan.signature:  # of another training: begin anew and overwrite it
            return History()
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, part in self._others():
            part.load_state_dict(saved[name])
        self.best = saved["best"]
        return History(**saved["history"])

    def save(self, history: History) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in history.records).encode())
        state = {
            "signature": self.plan.signature,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: part.state_dict() for name, part in self._others()},
            "best": self.best,
            "history": vars(history),
        }
        content = BytesIO()
        torch.save(state, content)
        replace_file(self.folder / "checkpoint.pt", content.getvalue())

    def _others(self) -> list[tuple[str, Any]]:
        """What else has a state: the schedule, and the scaler of float16."""
        both = (("schedule", self.schedule), ("scaler", self.accelerator.scaler))
        return [(name, part) for name, part in both if part is not None]
