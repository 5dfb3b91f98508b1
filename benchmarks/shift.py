"""Shift on CIFAR-10: accuracy, calibration and uncertainty of ResNet-20 and ResNet-56 under 15 corruptions.

    python benchmarks/shift.py --shared ../shared --data outputs/data --output outputs/shift

Prints the Markdown tables of docs/results.md and writes them as JSON, with a plot, one for each network. Heads are fitted
on the features of 4,000 clean TEST images (the classifier has been trained on the training images, on which it is nearly
always right); kNN and detectors have the same images, and a temperature is fitted on 1,000 more. `--rows` of the other
5,000, drawn by the seed, are corrupted and scored: 75 views of each, 15 kinds at 5 severities. No corrupted image plays any
part in a fit.

The corruptions cost 0.6 ms an image on one core. Features are kept, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from cifar10 import cifar10_test, resnet

import posthoc
from posthoc.adapters.files import replace_file
from posthoc.eval.inputs import from_features
from posthoc.eval.shift import draw_shift, shift_tables, shifted
from posthoc.eval.table import Table, render

HEADS = ["kappa", "temperature", "loss", "laplace", "metric-laplace"]


def tables(depth: int, arguments: argparse.Namespace) -> list[Table]:
    """The shift tables of one network."""
    backbone = resnet(depth, arguments.shared)
    images, label = cifar10_test(arguments.shared, arguments.data)
    order = np.random.default_rng(arguments.seed).permutation(len(label))
    fitting, kept, others = np.split(order, [4000, 5000])
    scored = np.sort(others[: arguments.rows])
    cache = arguments.data / "features"
    clean = backbone.extract((images, label), cache_dir=cache)
    features, held_out = clean[np.sort(fitting)], clean[np.sort(kept)]
    model = posthoc.wrap(backbone, arguments.heads).fit(features, seed=arguments.seed, batch_size=256)
    one = shifted(
        model,
        (images[scored], label[scored]),
        seed=arguments.seed,
        train=from_features("fitting rows", features),
        held_out=from_features("held-out rows", held_out),
        cache_dir=cache,
    )
    one.name = f"ResNet-{depth}"
    made = shift_tables(one, resamples=arguments.resamples, seed=arguments.seed)
    replace_file(arguments.output / f"resnet{depth}.json", (render(made, "json") + "\n").encode())
    draw_shift(arguments.output / f"resnet{depth}.png", made, one.heads)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where CIFAR-10 and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/shift"))
    parser.add_argument("--backbone", type=int, nargs="+", default=[20, 56], help="depths of the networks")
    parser.add_argument("--heads", nargs="+", default=HEADS, help="to be fitted")
    parser.add_argument("--rows", type=int, default=2000, help="test images that are corrupted")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the split, fits, corruptions and bootstrap")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for depth in arguments.backbone:
        start = time.perf_counter()
        print(render(tables(depth, arguments), "markdown") + "\n")
        print(f"ResNet-{depth}: {time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
