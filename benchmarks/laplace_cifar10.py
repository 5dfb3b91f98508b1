"""Last-layer posteriors on CIFAR-10: which rows they are fitted on, which structure, and what they are worth.

    python benchmarks/laplace_cifar10.py --shared ../shared --data outputs/data --output outputs/laplace-cifar10

ResNet-20 and ResNet-56 with their own classifiers. Everything that is tuned (temperature of temperature scaling, prior
and likelihood temperature of a posterior) is tuned on the same half of four folds of the TEST images; the curvature
comes from the 50,000 TRAINING images or from the other half; the fifth fold, corrupted copies of 2,000 test images and
the OOD sets are scored, and no OOD image plays any part in a fit. "of f / T" puts the posterior on the logits that
temperature scaling has divided. Then the AUROC of the functional variance alone, with features as they are, of length
1, or centred. Some 15 minutes on 2 cores for both networks, most of it to extract features; features and scores are
kept, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import cifar10_test, extract_all, folds, resnet
from PIL import Image, ImageFilter
from torch import Tensor

from posthoc.adapters.backbone import Backbone
from posthoc.adapters.curvature import KronCurvature
from posthoc.adapters.laplace import LastLayerPosterior
from posthoc.adapters.predictive import entropy
from posthoc.eval.baselines import fit_temperature
from posthoc.eval.metrics import auroc, confidence_and_correct, ece, nll

TEMPERATURES = torch.logspace(-2, 4, 7, dtype=torch.float64)
PLAIN = ("softmax", "temperature scaling")
CORRUPTED = 2000


def methods() -> list[str]:
    listed = list(PLAIN)
    for source in ("training", "held-out"):
        for structure in ("diag", "kron", "full"):
            if source == "training":
                listed.append(f"{structure}, training, evidence")
            listed += [f"{structure}, {source}, tuned", f"{structure}, {source}, tuned, of f / T"]
    return listed


def corrupted(images: np.ndarray) -> dict[str, np.ndarray]:
    """Noise, blur and low contrast at three strengths each, of images uint8 [N, 32, 32, 3]."""
    noise = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    found = {}
    for strength, (sigma, radius, contrast) in enumerate(((8, 0.6, 0.6), (16, 0.9, 0.4), (28, 1.3, 0.25)), start=1):
        found[f"noise {strength}"] = np.clip(images + sigma * noise, 0, 255).astype(np.uint8)
        blur = ImageFilter.GaussianBlur(radius)
        found[f"blur {strength}"] = np.stack([np.asarray(Image.fromarray(one).filter(blur)) for one in images])
        mean = images.mean((1, 2, 3), keepdims=True)
        found[f"contrast {strength}"] = (mean + contrast * (images - mean)).astype(np.uint8)
    return found


class Arrays:
    """Inputs of the last layer by name ("train", "test", corruptions, OOD sets), its weight and bias, and labels."""

    def __init__(self, backbone: Backbone, shared: Path, data: Path) -> None:
        images, self.label = cifar10_test(shared, data)
        whole = np.load(data / "cifar10.npz")
        self.train_label = whole["y_train"].astype(np.int64)
        stored, _ = extract_all(backbone, shared, data)
        cache = {"cache_dir": data / "features"}
        sources = {"test": stored.test, **stored.ood}
        sources["train"] = backbone.extract((whole["x_train"], self.train_label), **cache)
        for name, copies in corrupted(images[:CORRUPTED]).items():
            sources[name] = backbone.extract(copies, **cache)
        self.ood = list(stored.ood)
        self.corruptions = list(corrupted(images[:1]))
        self.phi = {name: np.asarray(features.penultimate) for name, features in sources.items()}
        layer = backbone.classifier()
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()

    def logits(self, phi: np.ndarray) -> Tensor:
        return torch.from_numpy(phi) @ self.weight.T + self.bias

    def predictor(self, method: str, fitting: np.ndarray) -> Any:
        """A function from inputs [B, P] to class probabilities, made of the test rows `fitting` (and training rows)."""
        curvature_rows, tuning = fitting[::2], fitting[1::2]
        t = fit_temperature(self.logits(self.phi["test"][tuning]).numpy(), self.label[tuning])
        if method in PLAIN:
            return lambda phi: torch.softmax(self.logits(phi) / (1.0 if method == "softmax" else t), 1)
        structure, source, choice, *rest = method.split(", ")
        scale = t if rest else 1.0
        layer = (self.weight / scale, self.bias / scale)
        posterior = LastLayerPosterior(structure)
        if source == "training":
            posterior.fit(self.phi["train"], *layer, self.train_label, rows="train")
        else:
            posterior.fit(self.phi["test"], *layer, subset=curvature_rows, rows="heldout")
        if choice == "evidence":
            posterior.optimize_prior_precision("marglik")
        else:
            held_out = {"penultimate": self.phi["test"][tuning], "labels": self.label[tuning]}
            posterior.optimize_prior_precision("heldout", **held_out, temperatures=TEMPERATURES)
        return lambda phi: posterior.predict(torch.from_numpy(phi))


def scores(arrays: Arrays, seed: int) -> dict[str, dict[str, float]]:
    """For every method: NLL and ECE on the test images, NLL by corruption (out of fold), AUROC against each OOD set."""
    found = {}
    for method in methods():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # priors at an end of the grid are told apart below by their scores
            found[method] = _scores_of(arrays, method, seed)
        print(seed, method, {k: round(v, 4) for k, v in found[method].items()}, flush=True)
    return found


def _scores_of(arrays: Arrays, method: str, seed: int) -> dict[str, float]:
    label, test = arrays.label, arrays.phi["test"]
    log_p = {name: np.zeros((len(label), len(arrays.bias))) for name in ("test", *arrays.corruptions)}
    unseen: dict[str, list[float]] = {name: [] for name in arrays.ood}
    for fitting, scored in folds(len(label), seed):
        predict = arrays.predictor(method, fitting)
        p = predict(test[scored])
        log_p["test"][scored] = p.clamp(min=1e-30).log()
        few = scored[scored < CORRUPTED]
        for name in arrays.corruptions:
            log_p[name][few] = predict(arrays.phi[name][few]).clamp(min=1e-30).log()
        for name in arrays.ood:
            unseen[name].append(auroc(entropy(p).numpy(), entropy(predict(arrays.phi[name])).numpy()))
    result = {"nll": nll(log_p["test"], label), "ece": ece(*confidence_and_correct(log_p["test"], label))}
    shifted = [nll(log_p[name][:CORRUPTED], label[:CORRUPTED]) for name in arrays.corruptions]
    result["nll corrupted"] = float(np.mean(shifted))
    return result | {f"auroc {name}": float(np.mean(values)) for name, values in unseen.items()}


def variance_alone(arrays: Arrays) -> dict[str, dict[str, float]]:
    """AUROC of the mean functional variance (kron, training images), for three ways to write the features."""
    mean = arrays.phi["train"].mean(0)
    ways = {
        "as they are": lambda phi: phi,
        "of length 1": lambda phi: phi / np.linalg.norm(phi, axis=1, keepdims=True),
        "centred": lambda phi: phi - mean,
        "centred, of length 1": lambda phi: (phi - mean) / np.linalg.norm(phi - mean, axis=1, keepdims=True),
    }
    p = torch.softmax(arrays.logits(arrays.phi["train"]).double(), 1)
    found = {}
    for name, way in ways.items():
        curvature = KronCurvature(arrays.weight.shape[1], len(arrays.bias), bias=True).double()
        curvature.assign(curvature.sums(torch.from_numpy(way(arrays.phi["train"])).double(), p), len(p))
        prior = torch.ones(2, dtype=torch.float64)

        def variance(phi: np.ndarray, way: Any = way, curvature: KronCurvature = curvature) -> np.ndarray:
            spread = curvature.spread(curvature.project(torch.from_numpy(way(phi)).double()), prior, 1.0)  # noqa: B023
            return curvature.logit_variance(spread).mean(1).numpy()

        found[name] = {ood: auroc(variance(arrays.phi["test"]), variance(arrays.phi[ood])) for ood in arrays.ood}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with photos and weights")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where CIFAR-10 and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/laplace-cifar10"))
    parser.add_argument("--backbone", type=int, nargs="+", default=[20, 56], help="depths of the networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for depth in arguments.backbone:
        arrays = Arrays(resnet(depth, arguments.shared), arguments.shared, arguments.data)
        for seed in arguments.seeds:
            path = arguments.output / f"resnet{depth}-seed{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(scores(arrays, seed), indent=1) + "\n")
        alone = arguments.output / f"resnet{depth}-variance.json"
        if not alone.exists():
            alone.write_text(json.dumps(variance_alone(arrays), indent=1) + "\n")
        table(arguments.output, depth, arguments.seeds)


def table(output: Path, depth: int, seeds: list[int]) -> None:
    found = [json.loads((output / f"resnet{depth}-seed{seed}.json").read_text()) for seed in seeds]
    columns = list(found[0]["softmax"])
    print(f"\n### ResNet-{depth}, {len(seeds)} seeds\n\n| method | {' | '.join(columns)} |")
    print("| --- |" + " --- |" * len(columns))
    for method in methods():
        values = {key: np.array([one[method][key] for one in found]) for key in columns}
        print(f"| {method} | " + " | ".join(f"{v.mean():.4f} ± {v.std():.4f}" for v in values.values()) + " |")
    alone = json.loads((output / f"resnet{depth}-variance.json").read_text())
    sets = list(next(iter(alone.values())))
    print(f"\n| variance alone, features | {' | '.join(sets)} |\n| --- |" + " --- |" * len(sets))
    for name, values in alone.items():
        print(f"| {name} | " + " | ".join(f"{values[one]:.3f}" for one in sets) + " |", flush=True)


if __name__ == "__main__":
    main()
