"""An evaluation among two processes of one launch: one of them prints and writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def launched(module: str, words: list[str], folder: Path) -> tuple[str, str]:
    """What both processes of a launch print, and their stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "in.npz", mine=rng.normal(size=50))
    np.savez(tmp_path / "out.npz", mine=rng.normal(size=40) + 1)
    return ["--id", "in.npz", "--ood", "out.npz", "--resamples", "20"]


def test_two_processes_print_one_table(sets: list[str], tmp_path: Path) -> None:
    out, _ = launched("posthoc.eval.ood", [*sets, "--format", "json", "--output", "kept/ood.json"], tmp_path)
    (table,) = json.loads(out)  # two would be no JSON
    assert table["set"] == "out"
    assert json.loads((tmp_path / "kept" / "ood.json").read_text()) == [table]


def test_two_processes_write_one_report(sets: list[str], tmp_path: Path) -> None:
    out, errors = launched("posthoc.eval.report", [*sets, "--format", "json", "--output", "report"], tmp_path)
    assert len(json.loads(out)) == 1
    assert errors.count("are in report") == 1
    files = ["histogram_mine.png", "index.html", "results.json", "results.md"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == files
