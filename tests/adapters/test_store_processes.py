"""The store among processes: killed half way, two at once, two of one launch, a launch that does not know itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.errors import DataError, PosthocError
from posthoc.adapters.features import Features
from posthoc.adapters.store import Store, list_stores

# One extraction as a program: 1000 images in passes of 64, 16 in all, in two chunks of 512 and 488 rows.
PROGRAM = """
import json, os, pathlib, signal, sys, time
import numpy as np, torch
from torch import nn
from posthoc.adapters.backbone import build_backbone

folder, options = sys.argv[1], json.loads(sys.argv[2])

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.passes = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), []

    def forward(self, images):
        self.passes.append(len(images))
        if len(self.passes) == options.get("killed_in_pass"):
            time.sleep(0.5)  # for the thread that writes the chunk before this one
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.get("slow", 0))
        return self.head(self.conv(images).relu().mean((2, 3)))

def transform(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 64 - 2

images = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 3), dtype=np.uint8)
model = Small()
backbone = build_backbone(model, transform=transform)
model.passes.clear()  # the probe's
if "meet" in options:  # two programs start their extraction at the same time
    pathlib.Path(f"ready-{os.getpid()}").touch()
    while len(list(pathlib.Path().glob("ready-*"))) < options["meet"]:
        time.sleep(0.01)
features = backbone.extract((images, np.arange(1000) % 4), cache_dir=folder)
said = {"passes": len(model.passes), "folder": str(features.folder), "rows": len(features)}
sys.stdout.write(json.dumps(said) + "\\n")  # in one write: two processes share the pipe
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def start(folder: Path, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
    program = folder.parent / "program.py"
    if not program.exists():  # another process may be reading it just now
        program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(program), str(folder), json.dumps(options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=folder.parent)


def ended(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    """What the program (each process of its launch) said at its end, and its stderr."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """What one undisturbed process stores."""
    ((said,), _) = ended(start(tmp_path_factory.mktemp("alone") / "store"))
    assert (said["rows"], said["passes"]) == (1000, 16)
    return Features.load(said["folder"])


def assert_same(folder: str, other: Features) -> None:
    features = Features.load(folder)
    for name in ("embedding", "penultimate", "logits", "label", "row"):
        np.testing.assert_array_equal(getattr(features, name), getattr(other, name), err_msg=name)


def test_after_a_kill_two_runs_at_once_go_on_together(alone: Features, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    killed = start(folder, killed_in_pass=12)
    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL
    (info,) = list_stores(folder)
    store = Store(folder, info.key)
    assert not info.complete
    assert store.chunks() == [0]
    with pytest.raises(DataError, match="not a complete feature store"):
        Features.load(store.partial)

    runs = [ended(run) for run in [start(folder, slow=0.1, meet=2) for _ in range(2)]]
    said = [lines[0] for lines, _ in runs]
    assert sorted(one["passes"] for one in said) == [0, 8], "8 of 16 passes were kept, and one of the two only reads"
    assert sum("waiting: another process extracts the same features" in errors for _, errors in runs) == 1
    for one in said:
        assert_same(one["folder"], alone)
    assert not store.partial.exists()


def test_two_processes_of_a_launch_share_the_work(alone: Features, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port)
    said, _ = ended(start(tmp_path / "store", launcher))
    assert [one["passes"] for one in said] == [8, 8]
    assert [one["rows"] for one in said] == [1000, 1000]
    assert_same(said[0]["folder"], alone)
    assert len(list_stores(tmp_path / "store")) == 1


def test_a_launch_that_accelerate_does_not_see_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PosthocError, match=r"WORLD_SIZE is 2.*ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"):
        backbone.extract(images, cache_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    monkeypatch.delenv("WORLD_SIZE")
    assert len(backbone.extract(images, cache_dir=tmp_path / "store", progress=False)) == 4
