"""The temperature head on frozen features: sign and strength of its score over base temperature, positives, backbone.

    python benchmarks/temperature.py --shared ../shared --data DATA >table.md

For each backbone, positives (class labels, or 8 augmented views of the same image) and base temperature t, the head is
fitted on four fifths of the CIFAR-10 test images (seeds 0 to 2), and scores the rest. "blur" is the Spearman
correlation with the severity of blur on 256 of the images the fit has held out: what a fit with `base_temperature=None`
chooses by, and all it sees. The AUROC against three OOD sets shows whether that choice is a good one; below 0.5 the
score is inverted. Takes about 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from cifar10 import cifar10_test, folds, ood_images, resnet

import posthoc
from posthoc.adapters.backbone import Backbone
from posthoc.adapters.blurring import blurred_embeddings
from posthoc.adapters.features import Features
from posthoc.adapters.heads.temperature import BASE_TEMPERATURES, PROBE_ROWS
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.scoring import score
from posthoc.adapters.splits import held_out_mask
from posthoc.eval.metrics import auroc, spearman

VIEWS = 8


def uncertainty(model: UncertainModel, features: Features) -> np.ndarray:
    return score(model.heads["temperature"], features, np.arange(len(features)), model.device)[0].numpy()


def rise(model: UncertainModel, severity: np.ndarray, embedding: np.ndarray) -> float:
    """Spearman of the score with blur, over all images and severities; embedding [S, n, D]."""
    scores = np.stack([uncertainty(model, Features.from_arrays(one)) for one in embedding])
    return spearman(scores.ravel(), np.repeat(severity, embedding.shape[1]))


def print_rows(backbone: Backbone, name: str, shared: Path, data: Path, seeds: list[int]) -> None:
    """One line of the table for each kind of positives and t."""
    cache = data / "features"
    images, label = cifar10_test(shared, data)
    plain = backbone.extract((images, label), cache_dir=cache)
    fitted_from = {"labels": plain, "views": backbone.extract((images, label), views=VIEWS, cache_dir=cache)}
    sets = {place: one for place, one in ood_images(shared).items() if place != "overlap"}
    ood = {place: backbone.extract(one, cache_dir=cache) for place, one in sets.items()}
    for positives, features in fitted_from.items():
        for t in BASE_TEMPERATURES:
            found = []
            for seed in seeds:
                fitting, scored = next(folds(len(plain), seed))
                model = posthoc.wrap(backbone, "temperature", base_temperature=t)
                model.fit(features[fitting], positives=positives, batch_size=256, seed=seed)
                inside = uncertainty(model, plain[scored])
                held_out = fitting[held_out_mask(fitting, 0.1, seed)][:PROBE_ROWS]
                assert plain.source is not None
                severity, blurred = blurred_embeddings(backbone, plain.source, held_out)
                found.append(
                    [rise(model, severity, blurred), *(auroc(inside, uncertainty(model, one)) for one in ood.values())]
                )
            mean, spread = np.mean(found, 0), np.std(found, 0, ddof=min(1, len(seeds) - 1))
            cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, spread, strict=True)]
            print(f"| {name} | {positives} | {t} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where CIFAR-10 and features are kept")
    parser.add_argument("--backbone", type=int, nargs="+", default=[20, 56], help="depths of the networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| backbone | positives | t | blur | Tiny ImageNet | DTD | notMNIST |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for depth in arguments.backbone:
        print_rows(
            resnet(depth, arguments.shared), f"ResNet-{depth}", arguments.shared, arguments.data, arguments.seeds
        )


if __name__ == "__main__":
    main()
