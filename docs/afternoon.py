"""An afternoon with posthoc: fit on CIFAR-10, measure, publish, and use the adapter elsewhere with the same scores.

    python docs/afternoon.py ada/cifar10-uncertainty

The hub is the one that `hf auth login` knows; HF_ENDPOINT names another. CIFAR-10 is downloaded by torchvision, or read from
--images, an .npz file with x_test [N,32,32,3] and y_test [N]. With EfficientNet-Lite0 and 800 rows
it took 150 s on two busy cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import Positional, arg

import posthoc
from posthoc.eval.inputs import from_features
from posthoc.eval.report import write_report

ELSEWHERE = """
import json, sys
import numpy as np
import posthoc

model = posthoc.load(sys.argv[1], revision=sys.argv[2])
prediction = model.predict(np.load(sys.argv[3]))
print(json.dumps({name: prediction[name].uncertainty.tolist() for name in model.heads}))
"""
"""What somebody else runs: all that it is given is the adapter's id, its commit and images."""


@dataclass
class Afternoon:
    """Fit, measure, publish and load back; see the docstring of this file."""

    repo_id: Annotated[Positional[str], arg(metavar="ORG/NAME")]
    """where the adapter goes"""
    model: str = "mobilenetv3_small_100.lamb_in1k"
    """timm's name of the backbone"""
    images: Path | None = None
    """CIFAR-10 as .npz; default: torchvision downloads it"""
    ood: str | None = None
    """images that are unlike CIFAR-10: folder, parquet file or hub data set id"""
    rows: int = 2000
    """test images to use: three quarters to fit on, one to measure on"""
    folder: Path = Path("afternoon")
    """where everything is written"""


def cifar10(path: Path | None, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Test images uint8 [N,32,32,3] and labels int64 [N]."""
    if path is not None:
        arrays = np.load(path)
        return arrays["x_test"], arrays["y_test"].astype(np.int64)
    from torchvision.datasets import CIFAR10

    data = CIFAR10(folder, train=False, download=True)
    return np.asarray(data.data), np.asarray(data.targets)


def main(given: Afternoon) -> None:
    images, label = cifar10(given.images, given.folder)
    chosen = np.random.default_rng(0).permutation(len(label))[: given.rows]
    fitting, kept = np.split(chosen, [3 * len(chosen) // 4])

    model = posthoc.wrap(given.model, ["kappa", "loss"])
    model.fit((images[fitting], label[fitting]), seed=0)
    adapter = model.save_pretrained(given.folder / "adapter")

    model = posthoc.load(adapter, backbone=model.backbone)  # as it was written, for the report to say what it measured
    features = model.backbone.extract((images[kept], label[kept]))
    others = [] if given.ood is None else [from_features("unlike", model.backbone.extract(given.ood), model)]
    inside = from_features("cifar10", features, model)
    write_report(Path(adapter) / "evaluation", inside=inside, outside=others, resamples=200)

    address = posthoc.hub.push(adapter, given.repo_id)
    print(f"published: {address}")

    np.save(given.folder / "images.npy", images[kept[:64]])
    words = [given.repo_id, address.rpartition("/")[2], str(given.folder / "images.npy")]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *words], stdout=subprocess.PIPE, text=True, check=True)
    there = json.loads(done.stdout.splitlines()[-1])
    here = model.predict(images[kept[:64]])
    for name in model.heads:
        same = here[name].uncertainty.tolist() == there[name]
        print(f"{name}: {len(there[name])} scores of another process are {'identical' if same else 'DIFFERENT'}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Afternoon, description=__doc__))
