"""What extraction costs beside a bare loop of the same backbone and loader.

    python benchmarks/extraction.py --threads 2 --repeats 9

Both run in one process, taking turns, so that a slow moment of the machine hits both; the figure is the median of the
ratios of neighbours. The bare loop is what one would write by hand: a DataLoader over the same images and the same
preprocessing, one pass for each batch, outputs kept in memory. Extraction does the same and hashes data and weights,
writes, checks and merges the store, which is a new one in every repetition. Goal: at most 3 % slower. CPU time
(of this process, not of loader workers) is the steadier figure where other programs share the machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.recipes.networks import CifarResNet


class Images(Dataset):
    """Preprocessed images and labels, as a user's own loop would read them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, backbone: Backbone) -> None:
        self.images, self.labels, self.transform = images, labels, backbone.require_transform()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), int(self.labels[row])


@dataclass
class Case:
    """A backbone and the images it is given."""

    name: str
    backbone: Backbone
    side: int
    rows: int
    batch_size: int = 64

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (self.rows, self.side, self.side, 3), dtype=np.uint8)
        return images, generator.integers(0, 10, self.rows)


def cases(device: str, scale: float) -> list[Case]:
    """ResNet-20 on 32x32 images and EfficientNet-Lite0 on 128x128, random weights."""
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    small = transforms.Compose([transforms.ToTensor(), normalise])
    large = transforms.Compose([transforms.Resize(128), transforms.ToTensor(), normalise])
    lite = build_backbone("tf_efficientnet_lite0", pretrained=False, transform=large, device=device)
    resnet = build_backbone(CifarResNet(20), transform=small, device=device)
    return [
        Case("ResNet-20, 32 px", resnet, 32, int(8000 * scale)),
        Case("EfficientNet-Lite0, 128 px", lite, 160, int(1000 * scale)),
    ]


def bare(case: Case, images: np.ndarray, labels: np.ndarray, workers: int) -> None:
    """The loop one would write by hand."""
    pinned = case.backbone.device.type == "cuda"
    loader = DataLoader(
        Images(images, labels, case.backbone), batch_size=case.batch_size, num_workers=workers, pin_memory=pinned
    )
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for batch, label in loader:
            output = case.backbone(batch.to(case.backbone.device, non_blocking=True))
            assert output.logits is not None
            kept.append((output.embedding.cpu(), output.logits.cpu(), label))
    assert sum(len(part[0]) for part in kept) == case.rows


def ours(case: Case, images: np.ndarray, labels: np.ndarray, workers: int) -> None:
    """An extraction into a new store."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"batch_size": case.batch_size, "num_workers": workers, "progress": False}
        features = case.backbone.extract((images, labels), cache_dir=Path(folder), **options)
        assert len(features) == case.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs for each backbone")
    parser.add_argument("--workers", type=int, default=0, help="loader workers, of both")
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of images")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, {arguments.workers} workers")
    print(f"{'backbone':28} {'images':>7} {'bare/s':>8} {'extract/s':>9} {'wall':>6} {'CPU':>6}   all wall ratios")
    for case in cases(arguments.device, arguments.scale):
        images, labels = case.data()
        spent: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}  # wall and CPU seconds
        for repeat in range(-1, arguments.repeats):  # the first pair warms up
            for name, run in [("bare", bare), ("ours", ours)][:: -1 if repeat % 2 else 1]:
                start = time.perf_counter(), time.process_time()
                run(case, images, labels, arguments.workers)
                if repeat >= 0:
                    spent[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        loops, runs = np.array(spent["bare"]), np.array(spent["ours"])
        ratios = runs / loops
        rates = case.rows / np.median(loops[:, 0]), case.rows / np.median(runs[:, 0])
        wall, cpu = np.median(ratios, axis=0)
        spread = " ".join(f"{ratio:.3f}" for ratio in sorted(ratios[:, 0]))
        print(
            f"{case.name:28} {case.rows:7} {rates[0]:8.1f} {rates[1]:9.1f} {wall:6.3f} {cpu:6.3f}   {spread}",
            flush=True,
        )


if __name__ == "__main__":
    main()
