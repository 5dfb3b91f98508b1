"""The recipe decoupled_uniformity: what features are worth with each prior beside none and random features, over seeds.

    python benchmarks/decoupled_uniformity.py --data DATA --output outputs/decoupled-uniformity
    python benchmarks/decoupled_uniformity.py --data DATA --dataset omniglot --output outputs/decoupled-uniformity
    python benchmarks/decoupled_uniformity.py --data DATA --dataset cifar10 -- --train-images 12000 --epochs 4

DATA is a folder of data sets, with tf_efficientnet_lite0.safetensors for the prior of that network (timm fetches it otherwise).
Attributes are of omniglot, cub200 and utzappos alone; chexpert's labels, not all of them known, are no prior. A run that is
there is read, not repeated; one that was killed goes on. What stands behind -- goes to the recipe. Writes and
prints DATASET.md, with --only some of the priors prints alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from recipe_runs import carried_out, parted, spread

from posthoc.adapters.files import replace_file
from posthoc.recipes.decoupled_uniformity_data import SEVERAL
from posthoc.recipes.decoupled_uniformity_report import SEEN, seen_by

PRIORS: dict[str, list[str]] = {
    "no kernel": [],
    "VAE": ["--prior", "vae"],
    "EfficientNet-Lite0": ["--prior", "tf_efficientnet_lite0"],
    "attributes": ["--prior", "attributes"],
    "labels": ["--prior", "labels"],
}
WITH_ATTRIBUTES = ("omniglot", "cub200", "utzappos")


def priors_of(dataset: str) -> dict[str, list[str]]:
    """The priors that a data set has."""
    lacking = {"attributes"} if dataset not in WITH_ATTRIBUTES else set()
    if dataset in SEVERAL:
        lacking.add("labels")
    return {name: more for name, more in PRIORS.items() if name not in lacking}


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Priors down; whether they have seen labels, how much they smooth, and what the features are worth, in percent."""
    first = next(iter(found.values()))
    columns = [name for name, value in first[0]["worth"].items() if isinstance(value, float)]
    names = (f"{name.replace('auc', 'AUC').replace('_', ' ')}, %" for name in columns)
    head = ["prior", "labels", "weight on itself", *names]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, runs in found.items():
        told = runs[0]["prior"]
        weight = f"{np.mean([run['prior']['smoother']['diagonal'] for run in runs]):.2f}" if told else "1"
        cells = [spread((100 * run["worth"][column] for run in runs), 1) for column in columns]
        lines.append("| " + " | ".join([name, seen_by(told), weight, *cells]) + " |")
    cells = [spread((100 * run["random_features"][column] for run in first), 1) for column in columns]
    lines.append("| " + " | ".join(["random features", SEEN[False], "-", *cells]) + " |")
    return lines


def main() -> None:
    words, more = parted(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets and weights")
    parser.add_argument(
        "--dataset", default="fashion-mnist", help="a preset of the recipe, such as cifar10 or omniglot"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/decoupled-uniformity"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="some of the priors, by name")
    parser.add_argument("--threads", type=int, help="cores that a run takes")
    arguments = parser.parse_args(words)
    unknown = set(arguments.only or ()) - set(PRIORS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: the priors are {', '.join(PRIORS)}")
    known = priors_of(arguments.dataset)
    priors = {name: more for name, more in known.items() if name in (arguments.only or known)}
    if not priors:
        parser.error(f"--only {', '.join(arguments.only)}: {arguments.dataset} has the priors {', '.join(known)}")
    common = ["--preset", arguments.dataset, "--data-dir", str(arguments.data), *more]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in priors}
    folder = arguments.output / arguments.dataset
    for seed in arguments.seeds:
        for name, prior in priors.items():
            place = folder / f"{name.lower().replace(' ', '-')}-{seed}"
            given = [*common, *prior, "--seed", str(seed)]
            found[name].append(carried_out("decoupled_uniformity", given, place, arguments.threads))
    minutes = spread((run["made"]["seconds"] / 60 for runs in found.values() for run in runs), 1)
    lines = [
        f"{arguments.dataset}, seeds {', '.join(map(str, arguments.seeds))}, {minutes} minutes a run",
        "",
        *table(found),
    ]
    if not arguments.only:
        replace_file(folder.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
