"""What every recipe shares besides its options (`options`): the command, and the folder of its run.

    accelerate launch -m posthoc.recipes.NAME --preset smoke --output runs/first

A run's folder holds config.json, a folder with metrics.jsonl and checkpoint.pt for each of its trainings, results.json and
the plots. `--resume` continues an unfinished run to the result that an unbroken one has; a finished one it leaves as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..adapters.distributed import Launch, check_launch
from ..adapters.errors import OptionError, PosthocError
from ..adapters.persistence import plain, write_run
from ..adapters.training import warmup_cosine
from ..adapters.training_loop import Record, step_generator
from ..eval.extras import require
from ..eval.results import made_now
from .options import C, Preset, RecipeConfig, parse, process_number

NOT_OF_TRAINING = ("output", "resume", "tracker", "cache_dir", "data_dir", "resamples")
"""Options that no training depends on: a run may be continued with other values of them."""
OWN_ERROR_AFTER = 30.0
"""Seconds after which a process other than the first tells why it failed."""


class Run:
    """A recipe's run: its folder, this process's share of the work, and what it has to tell.

    Attributes: folder; launch, this process's place; device, where accelerate puts networks.
    Raises, before anything is computed, OptionError for a folder that holds a run already (without `resume`), or a run of
    other options (with it), and PosthocError without the plotting extra.
    """

    def __init__(self, name: str, config: RecipeConfig) -> None:
        require("matplotlib", "matplotlib")
        for tracker in config.tracker:
            if find_spec(tracker) is None:
                raise OptionError(f"--tracker {tracker} needs a package that is not installed: pip install {tracker}")
        self.name, self.config, self.folder = name, config, config.output
        self.launch: Launch = check_launch()
        self.signature = json.dumps(kept(config), sort_keys=True)
        self.content = self.launch.on_main(lambda: check_folder(name, config))
        self.told = 0
        write_run(self.folder, "config.json", self._described())
        self.accelerator = Accelerator(log_with=list(config.tracker) or None, project_dir=str(self.folder))
        if config.tracker:
            shown = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in kept(config).items()}
            self.accelerator.init_trackers(f"posthoc-{name}", config=shown)
        self.device = self.accelerator.device
        self.started = time.perf_counter()

    def stands_on(self, *content: np.ndarray | str) -> None:
        """What the run is made from besides its options: arrays, such as images, or fingerprints, such as a backbone's.

        Raises OptionError where the run to be continued was made from something else.
        """
        digest = hashlib.sha256()
        for one in content:
            digest.update(one.encode() if isinstance(one, str) else np.ascontiguousarray(one).data)
        found = digest.hexdigest()
        if self.content not in (None, found):
            raise OptionError(
                f"--resume: the run in {self.folder} was made from other data or weights: give it the same ones"
            )
        self.content = found
        self.signature += found
        write_run(self.folder, "config.json", self._described())

    def observe(self, training: str, steps: int) -> Callable[[Record], None] | None:
        """For `Plan.observe`: sends the records of a training of so many steps to the trackers, if there are any.

        Their steps count on from one training of the run to the next, as trackers want it.
        """
        before, self.told = self.told, self.told + steps
        if not self.config.tracker:
            return None

        def send(record: Record) -> None:
            named = {f"{training}/{k}": v for k, v in record.items() if k != "step"}
            self.accelerator.log(named, step=before + int(record["step"]))

        return send

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json: the config, what was found, when and with which versions, and the seconds since the run began
        or was last continued."""
        made = {**made_now(sys.argv), "seconds": round(time.perf_counter() - self.started, 1)}
        made |= {"processes": self.launch.world, "mixed_precision": launched(self.config)["mixed_precision"]}
        write_run(
            self.folder, "results.json", {"recipe": self.name, "config": asdict(self.config), **results, "made": made}
        )
        self.accelerator.end_training()

    def _described(self) -> dict[str, Any]:
        made_from = {} if self.content is None else {"content": self.content}
        return {"recipe": self.name, **asdict(self.config), **launched(self.config), **made_from}


def kept(config: RecipeConfig) -> dict[str, Any]:
    """The options that a training depends on, and what it depends on of its launch."""
    options = plain({name: value for name, value in asdict(config).items() if name not in NOT_OF_TRAINING})
    return options | launched(config)


def launched(config: RecipeConfig) -> dict[str, Any]:
    """What a training depends on of its launch: its precision, and where processes do not gather their number."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    apart = not getattr(config, "gather", True)
    return {"mixed_precision": precision} | ({"processes": int(os.environ.get("WORLD_SIZE") or 1)} if apart else {})


def check_folder(name: str, config: RecipeConfig) -> str | None:
    """The fingerprint of what the run in the folder was made from, where there is a run and it says so.

    Raises OptionError for a folder that holds a run already (without `resume`), or a run of other options (with it).
    """
    known = config.output / "config.json"
    if config.output.exists() and not config.output.is_dir():
        raise OptionError(f"--output {config.output} is a file; expected a folder")
    if not known.exists():
        return None
    if not config.resume:
        raise OptionError(
            f"--output {config.output} holds a run already: continue it with --resume, or give another folder"
        )
    try:
        found = json.loads(known.read_text())
    except ValueError as error:
        raise OptionError(f"{known} is not JSON ({error}): give another folder") from error
    wanted = {"recipe": name, **kept(config)}
    other = [key for key, value in wanted.items() if found.get(key) != value]
    if other:
        shown = ", ".join(f"{key} is {found.get(key)!r} there and {wanted[key]!r} here" for key in other[:4])
        raise OptionError(f"--resume: the run in {config.output} has other options ({shown}): give it the same ones")
    return found.get("content")


def scheduled(
    kind: Literal["cosine", "halved", "constant"],
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup: float = 0.0,
    least: float = 0.0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate: "cosine" rises over a share `warmup` and falls to a share `least`; "halved" halves in the middle."""
    if kind == "cosine":
        factor = warmup_cosine(steps, warmup)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: least + (1.0 - least) * factor(i))
    late = 0.5 if kind == "halved" else 1.0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 if i < steps // 2 else late)


def row_blocks(batch_size: int, block: int, launch: Launch) -> range:
    """The blocks of `block` rows of a batch that are this process's, of any number of processes that divides them.

    Random numbers that are drawn for each block by its own generator (`step_generator(seed, step, block)`) are then those
    of the global rows: one process and several see the same batch. Raises OptionError where the numbers do not divide.
    """
    count = batch_size // block
    if not count or batch_size % block or count % launch.world:
        raise OptionError(
            f"a batch of {batch_size} rows in blocks of {block} cannot be shared by {launch.world} process(es): give a batch "
            f"size that is a multiple of {block * launch.world}"
        )
    each = count // launch.world
    return range(launch.rank * each, (launch.rank + 1) * each)


@contextmanager
def seeded(seed: int, *position: int) -> Iterator[None]:
    """PyTorch's global generator, from which modules draw their first weights, seeded inside and left alone outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_generator(seed, *position).initial_seed())
        yield


def seeded_module(make: Callable[[], nn.Module], seed: int, *position: int) -> Any:
    """A module whose first weights depend on (seed, position) alone."""
    with seeded(seed, *position):
        return make()


def main(
    name: str,
    config: type[C],
    presets: Mapping[str, Preset],
    run: Callable[[C], Any],
    about: str | None,
    knobs: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """A recipe as a command: options from its dataclass and presets, errors as one line and status 2.

    Args:
        presets: options by name, `default` among them. about: the recipe's docstring, shown by --help.
        knobs: the options that say how much memory a step takes, for the message when there is too little.
    """
    new = None
    try:
        options = parse(name, config, presets, about, sys.argv[1:] if arguments is None else arguments)
        new = None if (options.output / "config.json").exists() else options.output
        if options.resume and (options.output / "results.json").is_file():
            check_folder(name, options)
            if process_number() == 0:
                print(f"the run in {options.output} is finished: remove its results.json to evaluate it again")
            return
        run(options)
    except PosthocError as error:
        _fail(str(error), new)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        said = (str(error) or "no message").splitlines()[0][:200]  # a MemoryError may come without a word
        _fail(f"out of memory ({said}): give a smaller {knobs}", new)


def _is_out_of_memory(error: Exception) -> bool:
    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in words


def _fail(message: str, new: Path | None) -> None:
    """Say why, and end; a new run's folder in which nothing was computed is free for the command that is put right.

    Of a launch the first process tells. What fails in it fails in nearly every other too, and its launcher ends those as
    soon as it is gone, while they wait here. Who is left has an error of its own, such as a file that only this machine lacks
    or a full GPU: a launcher tells no more of that than an exit status.
    """
    if number := process_number():
        time.sleep(OWN_ERROR_AFTER)
        message = f"process {number}: {message}"
    if new is not None and not any(new.glob("**/checkpoint.pt")) and not (new / "results.json").exists():
        (new / "config.json").unlink(missing_ok=True)
    print(f"posthoc: {message}", file=sys.stderr)
    raise SystemExit(2)
