"""How an evaluation runs as a command: options from a dataclass, errors as one line and status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..adapters.errors import PosthocError


def run_command(options: Any, program: str, arguments: Sequence[str] | None = None) -> None:
    """Read the dataclass `options` from the arguments (None: the command line's) and call its `run`."""
    import tyro

    command = tyro.cli(options, prog=program, args=list(sys.argv[1:] if arguments is None else arguments))
    try:
        command.run()
    except PosthocError as error:
        print(f"posthoc: {error}", file=sys.stderr)
        raise SystemExit(2) from None
