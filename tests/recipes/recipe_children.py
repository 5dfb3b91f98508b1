"""Recipes as programs of their own: alone, two processes of a launch, and killed when they have written a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

QUIET = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(recipe: str, words: list[str], folder: Path, launcher: list[str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-m", *(launcher or []), *(["-m"] if launcher else [])]
    command += [f"posthoc.recipes.{recipe}", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **QUIET}, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def results(recipe: str, words: list[str], folder: Path, processes: int = 1) -> dict[str, Any]:
    """results.json of a whole run, by so many processes (asserted), with --output DIR among the words."""
    launcher = None
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        count = str(processes)
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", count, "--main_process_port", port]
    process = start(recipe, words, folder, launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = json.loads((folder / words[words.index("--output") + 1] / "results.json").read_text())
    assert found["made"]["processes"] == processes
    return found


def kill_at_checkpoint(recipe: str, words: list[str], folder: Path, checkpoint: str) -> None:
    """Start a run, and kill it by SIGKILL as soon as that file of its output is there; it had not ended by then."""
    output = folder / words[words.index("--output") + 1]
    process = start(recipe, words, folder)
    deadline = time.monotonic() + 120
    while not (output / checkpoint).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "results.json").exists()


def metrics(output: Path) -> dict[str, str]:
    """metrics.jsonl of every training of a run, to the last bit."""
    return {path.parent.name: path.read_text() for path in sorted(output.glob("**/metrics.jsonl"))}
