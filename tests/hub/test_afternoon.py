"""The user's afternoon of docs/afternoon.py, with a small network, against the loopback hub."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "afternoon.py"
NETWORK = "test_resnet.r160_in1k"


def test_fit_measure_publish_and_load_elsewhere(hub_server, child, tmp_path):
    if not SCRIPT.is_file():
        pytest.skip("needs the folder docs, which is not beside these tests")
    torch.manual_seed(0)
    weights = timm.create_model(NETWORK, pretrained=False).state_dict()
    hub_server.store.add(f"timm/{NETWORK}", {"model.safetensors": save(weights)})
    digits = load_digits()
    images = np.repeat((digits.images * 15.9).astype(np.uint8)[..., None], 3, axis=3)
    np.savez(tmp_path / "images.npz", x_test=images, y_test=digits.target)
    words = ["org/afternoon", "--model", NETWORK, "--images", tmp_path / "images.npz", "--rows", "200"]
    environment = {"POSTHOC_CACHE": str(tmp_path / "store")}
    process = child.start(SCRIPT, [*words, "--folder", tmp_path / "afternoon"], **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    commit = hub_server.store.repositories["model", "org/afternoon"].find("main")
    assert out.splitlines() == [
        f"published: {hub_server.url}/org/afternoon/commit/{commit.oid}",
        "kappa: 50 scores of another process are identical",
        "loss: 50 scores of another process are identical",
    ]
    assert {"README.md", "evaluation/results.json"} <= set(commit.files)
    assert not any(name.endswith((".html", ".npy")) for name in commit.files)
    # the card's example runs as it is printed, beside a photo.jpg
    card = hub_server.store.read(commit, "README.md").decode()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.S)
    Image.fromarray(images[0]).save(tmp_path / "photo.jpg")
    place = f"import os; os.chdir({str(tmp_path)!r})\n"
    assert child(f"{place}{example}\nprint(len(prediction.uncertainty))") == 1
