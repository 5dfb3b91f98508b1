"""How an evaluation runs as a command: options from a dataclass, errors as one line and status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..adapters.errors import PosthocError
from ..adapters.files import replace_file
from .table import Table, render


@dataclass(kw_only=True)
class TableCommand:
    """The options that every evaluation has, and how its tables are shown."""

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
    """default: the CPU"""

    def show(self, tables: Sequence[Table]) -> None:
        """Print the tables and, if asked, write them as JSON."""
        print(render(tables, self.format))
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.output, (render(tables, "json") + "\n").encode())


def run_command(options: Any, program: str, arguments: Sequence[str] | None = None) -> None:
    """Read the dataclass `options` from the arguments (None: the command line's) and call its `run`."""
    import tyro

    from .datasets import looking_in

    command = tyro.cli(options, prog=program, args=list(sys.argv[1:] if arguments is None else arguments))
    try:
        with looking_in(getattr(command, "data_dir", None)):
            command.run()
    except PosthocError as error:
        print(f"posthoc: {error}", file=sys.stderr)
        raise SystemExit(2) from None
