"""How an evaluation runs as a command: options from a dataclass, errors as one line and status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..adapters.distributed import check_launch
from ..adapters.errors import OptionError, PosthocError, suggest
from ..adapters.files import replace_file
from .table import Table, render


@dataclass(kw_only=True)
class TableCommand:
    """The options that every evaluation has, and how its tables are shown.

    Raises OptionError, before anything is computed, for a seed or number of resamples out of range, a device that is not there
    and an output that cannot be written.
    """

    output_is_folder: ClassVar[bool] = False
    """Whether `output` names a folder, which the command itself looks after."""
    checkpoint: Path | None = None
    """local weights of the backbone, .safetensors or .pth"""
    split: str = "test"
    """of a hub data set, or of a folder of splits"""
    data_dir: Path | None = None
    """where the sets that have a name (cifar10, dtd, ...) lie; default: $POSTHOC_DATA, else ~/.cache/posthoc/data"""
    resamples: int = 1000
    """of the bootstrap"""
    seed: int = 0
    """of the bootstrap"""
    format: Literal["text", "markdown", "json"] = "text"
    """of what is printed"""
    output: Path | None = None
    """also write the tables there as JSON"""
    device: str | None = None
    """where the network runs, such as cuda; without it: the CPU"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"--seed {self.seed} was given; expected a whole number from 0 to 2^63 - 1")
        if self.resamples < 1:
            raise OptionError(f"--resamples {self.resamples} was given; expected at least 1")
        if self.device is not None:
            check_device(self.device)
        if self.output is not None and not self.output_is_folder:
            check_writable(self.output)

    def check_reference(self, tables: Sequence[Table]) -> None:
        """Raises OptionError for a --reference that is in none of the tables; the default may be, and nothing is compared."""
        reference, names = getattr(self, "reference", None), {name for table in tables for name in table.cells}
        default = {field.name: field.default for field in fields(self)}.get("reference")
        if reference not in (default, *names):
            raise OptionError(f"--reference {reference!r} is none of the scores; {suggest(str(reference), names)}")

    def show(self, tables: Sequence[Table]) -> None:
        """Print the tables and, if asked, write them as JSON; of several processes of a launch the main one alone does."""
        self.check_reference(tables)
        if not check_launch().is_main:
            return
        print(render(tables, self.format))
        if self.output is not None:
            content = (render(tables, "json") + "\n").encode()
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self.output, content)
            except OSError as error:
                raise OptionError(f"cannot write --output {self.output}: {error}") from error


def check_device(name: str) -> None:
    """Raises OptionError unless PyTorch knows the device and can compute there."""
    try:
        torch.zeros(1, device=torch.device(name)).cpu()
    # torch's words for an unknown name, a build without the accelerator, and a device that holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise OptionError(
            f"--device {name} cannot be used ({why}); expected cpu, or an accelerator that is here, such as cuda"
        ) from error


def check_writable(path: Path) -> None:
    """Raises OptionError unless a file can be written there, its folders made if need be; makes nothing."""
    try:
        if path.is_dir():
            raise OptionError(
                f"--output {path} is a folder; expected the name of a file, such as {path / 'tables.json'}"
            )
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if not there.is_dir():
            raise OptionError(f"--output {path} cannot be written: {there} is a file, not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OptionError(f"--output {path} cannot be written: nothing may be written to {there}")
    except (OSError, ValueError) as error:  # a name that is too long, or none at all
        raise OptionError(f"--output {path} cannot be written: {error}") from error


def run_command(options: Any, program: str, arguments: Sequence[str] | None = None) -> None:
    """Read the dataclass `options` from the arguments (None: the command line's) and call its `run`."""
    import tyro

    from .datasets import looking_in

    try:
        command = tyro.cli(options, prog=program, args=list(sys.argv[1:] if arguments is None else arguments))
        with looking_in(getattr(command, "data_dir", None)):
            command.run()
    except PosthocError as error:
        print(f"posthoc: {error}", file=sys.stderr)
        raise SystemExit(2) from None
