"""Runs of recipes for the tables of docs/recipes.md: each is made once, goes on where it was killed, and is then read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def carried_out(
    recipe: str, words: Sequence[str], folder: Path, threads: int | None = None, processes: int = 1
) -> dict[str, Any]:
    """results.json of a run by so many processes, whose progress goes to FOLDER.log.

    The recipe itself tells whether the folder's run has these options; raises CalledProcessError where it has others.
    """
    several = (
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *several, "-m", f"posthoc.recipes.{recipe}", *words, "--output", str(folder)]
    if (folder / "config.json").exists():
        command.append("--resume")
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        print(log.read_text()[-2000:], file=sys.stderr)
        done.check_returncode()
    return json.loads((folder / "results.json").read_text())


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before --, which are a benchmark's own, and those behind it, which go to the recipe."""
    cut = list(words).index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and, of several, standard deviation, with so many digits behind the point."""
    numbers = np.array(list(values))
    return f"{numbers.mean():.{digits}f}" + (f" ± {numbers.std(ddof=1):.{digits}f}" if len(numbers) > 1 else "")
