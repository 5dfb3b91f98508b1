"""The store among processes: killed half way, two at once, two of one launch, a launch that does not know itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posthoc.adapters.distributed import check_launch
from posthoc.adapters.errors import PosthocError
from posthoc.adapters.features import Features
from posthoc.adapters.store import Store, list_stores

# One extraction as a program: 1000 images in chunks of 512 and 488, or of 512 over two processes, passes of 64.
PROGRAM = '''
import json, os, signal, sys, time
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
backbone = build_backbone(model)
backbone.transform = transform
features = backbone.extract((images, np.arange(1000) % 4), cache_dir=folder, progress=options.get("progress", False))
print(json.dumps({"passes": len(model.passes), "folder": str(features.folder), "rows": len(features)}))
'''


def start(folder: Path, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(program), str(folder), json.dumps(options)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )


def answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What the program (or each process of its launch) said at its end."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Features:
    """The store of one undisturbed process."""
    folder = tmp_path_factory.mktemp("alone") / "store"
    (said,) = answers(start(folder))
    assert said["rows"] == 1000
    return Features.load(said["folder"])


def assert_same(features: Features, other: Features) -> None:
    for name in ("embedding", "penultimate", "logits", "label", "row"):
        np.testing.assert_array_equal(getattr(features, name), getattr(other, name), err_msg=name)


def test_killed_half_way_the_next_run_goes_on(alone: Features, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    killed = start(folder, killed_in_pass=12)
    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL
    (info,) = list_stores(folder)
    assert not info.complete
    store = Store(folder, info.key)
    assert store.chunks() == [0]
    with pytest.raises(PosthocError, match="not a complete feature store"):
        Features.load(store.partial)
    kept = store.chunk_path(0).stat()
    first, second = start(folder, slow=0.05), start(folder, slow=0.05, progress=True)  # and both at once
    (one,), (two,) = answers(first), answers(second)
    assert sorted([one["passes"], two["passes"]]) == [1, 9], "8 of 16 passes were kept; one program only reads"
    assert kept.st_size > 0
    assert one["folder"] == two["folder"]
    assert_same(Features.load(one["folder"]), alone)
    assert not store.partial.exists()
'''
'''
