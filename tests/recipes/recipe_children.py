"""Recipes run in this process, as a program of its own that is killed, and as two processes of a launch."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

Words = list[str]
DEADLINE = 1200.0
"""Seconds that a child may take: of a minute's work, on a machine that others crowd."""


def output_of(words: Words, folder: Path) -> Path:
    return folder / words[words.index("--output") + 1]


def results(recipe: str, words: Words, folder: Path) -> dict[str, Any]:
    """results.json of a whole run in this process, with --output DIR among the words; paths begin in `folder`."""
    module = importlib.import_module(f"posthoc.recipes.{recipe}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        getattr(module, "command", module.main)(words)
    return _written(words, folder, 1)


def two_processes(recipe: str, words: Words, folder: Path) -> tuple[int, str, str]:
    """Exit status of a launch of two processes, what they printed, and their stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    process = _start(launcher, recipe, words, folder, OMP_NUM_THREADS="1")
    printed, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, printed, errors


def results_of_two(recipe: str, words: Words, folder: Path) -> dict[str, Any]:
    """results.json of a whole run by two processes (asserted), whose report is printed once."""
    status, printed, errors = two_processes(recipe, words, folder)
    assert status == 0, errors
    for head in [line for line in printed.splitlines() if line.startswith("|")][:1]:
        assert printed.count(head) == 1
    return _written(words, folder, 2)


def kill_at_checkpoint(recipe: str, words: Words, folder: Path, checkpoint: str) -> dict[str, str]:
    """Start a run, and kill it by SIGKILL as soon as that file of its output is there; what it had seen by then."""
    output = output_of(words, folder)
    assert not (output / checkpoint).exists()
    process = _start([], recipe, words, folder)
    deadline = time.monotonic() + DEADLINE
    while not (output / checkpoint).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "results.json").exists()
    return metrics(output)


def metrics(output: Path) -> dict[str, str]:
    """metrics.jsonl of every training of a run, to the last bit."""
    return {path.parent.name: path.read_text() for path in sorted(output.glob("**/metrics.jsonl"))}


def records(output: Path, training: str = "train") -> list[dict[str, float]]:
    """metrics.jsonl of one training."""
    return [json.loads(line) for line in metrics(output)[training].splitlines()]


def _start(launcher: Words, recipe: str, words: Words, folder: Path, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::UserWarning", *launcher, "-m", f"posthoc.recipes.{recipe}", *words]
    pipe = subprocess.PIPE
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **more}
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def _written(words: Words, folder: Path, processes: int) -> dict[str, Any]:
    found = json.loads((output_of(words, folder) / "results.json").read_text())
    assert found["made"]["processes"] == processes
    return found
