"""The recipe tau: linear evaluation, AUROCs and throughput of every method, mean and spread over seeds.

    python benchmarks/tau.py methods --data DATA --output outputs/tau
    python benchmarks/tau.py methods --data DATA --dataset fashion-mnist --output outputs/tau
    python benchmarks/tau.py frozen --data DATA --output outputs/tau
    python benchmarks/tau.py gather --data DATA --output outputs/tau   (two processes; on CPUs with ACCELERATE_USE_CPU=true)
    python benchmarks/tau.py methods --data DATA --paper --seeds 1337 1338 1339 --output outputs/tau   (GPU)
    python benchmarks/tau.py methods --data DATA --preset gpu --mixed-precision bf16 --only TaU --output outputs/tau-gpu   (GPU)
    python benchmarks/tau.py methods --data DATA --output outputs/tau-short -- --train-images 12000 --width 16

The last but one is the throughput of ResNet-18 in bf16, channels last, compiled. What stands behind -- goes to the recipe.
DATA is a folder of data sets as `posthoc eval ood --data-dir` takes it, with the weights of frozen networks. A run that is there
is not computed again, and one that was killed goes on. Without a GPU the parts take hours at the recipe's own size. Writes and
prints DATASET-PART.md, with --only some of the variants prints alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

from recipe_runs import carried_out, parted, spread

from posthoc.adapters.files import replace_file
from posthoc.recipes.pretraining_evaluation import auroc, scores_in

METHODS: dict[str, list[str]] = {
    "TaU": [],
    "TaU, loss as released": ["--reference"],
    "TaU, positive in the denominator": ["--include-positive"],
    "SimCLR": ["--method", "simclr"],
    "SimCLR, loss and kNN as released": ["--method", "simclr", "--reference"],
    "TaU-MoCo": ["--method", "tau-moco"],
    "MoCo": ["--method", "moco"],
    "MoCo, kNN as released": ["--method", "moco", "--reference"],
    "HIB": ["--method", "hib"],
    "MC dropout": ["--preset", "mc-dropout"],
    "ensemble": ["--preset", "ensemble"],
    "supervised": ["--preset", "supervised"],
    "MC dropout, supervised": ["--preset", "mc-dropout-supervised"],
}
FROZEN: dict[str, list[str]] = {
    f"{name}, {positives}{', loss as released' if released else ''}": [
        "--preset", preset, positives, *(["--reference"] if released else []),
    ]
    for name, preset in {
        "EfficientNet-Lite0": "efficientnet-lite0", "EfficientNet-Lite1": "efficientnet-lite1",
        "EfficientNet-Lite2": "efficientnet-lite2", "ResNet-20 (CIFAR-10)": "resnet20",
        "ResNet-56 (CIFAR-10)": "resnet56",
    }.items()
    for positives in ("views", "labels")
    for released in (False, True)
}  # fmt: skip
"""Heads on frozen networks by name."""
GATHER: dict[str, list[str]] = {
    f"{name}, {which}": [*words, *more]
    for name, words in {"TaU": [], "SimCLR": ["--method", "simclr"]}.items()
    for which, more in {"images of all processes": [], "each process's own": ["--no-gather"]}.items()
}
PAPERS = {"SimCLR": "paper-simclr", "MoCo": "paper-moco", "ensemble": "paper-ensemble"}
"""Methods that the released configurations train at another rate than TaU."""
PARTS = {"methods": METHODS, "frozen": FROZEN, "gather": GATHER}


def worth_table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Methods down; what their features are worth, beside random ones, and how fast they trained."""
    columns = list(next(iter(found.values()))[0]["worth"])
    head = ["method", *(name.replace("_", " ") for name in columns), "linear, random features", "images/s", "share"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, runs in found.items():
        cells = [spread((100 * run["worth"][column] for run in runs), 1) for column in columns]
        cells.append(spread((100 * run["random_features"]["linear"] for run in runs), 1))
        speeds = [run["throughput"] for run in runs if run["throughput"]]
        cells += [spread((speed[key] for speed in speeds), digits) for key, digits in SPEED] if speeds else ["-", "-"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


SPEED = (("training_images_per_second", 0), ("share", 2))


def ood_table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every score of every method down, the other sets across: AUROC; - where it was constant in a run."""
    sets = list(next(iter(found.values()))[0]["ood"])
    lines = ["| method | score | " + " | ".join(sets) + " |", "|---" * (len(sets) + 2) + "|"]
    for name, runs in found.items():
        for score in dict.fromkeys(score for run in runs for score in scores_in(run["ood"])):
            cells = [[value for run in runs if not isnan(value := auroc(run["ood"], one, score))] for one in sets]
            shown = " | ".join(spread(cell, 3) if len(cell) == len(runs) else "-" for cell in cells)
            lines.append(f"| {name} | {score} | {shown} |")
    return lines


def runs_of(
    variants: dict[str, list[str]],
    common: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    processes: int,
    threads: int | None,
) -> dict[str, list[dict[str, Any]]]:
    """The results of every variant for every seed, seed by seed."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in seeds:
        for name, words in variants.items():
            short = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
            options = [*words, *common, "--seed", str(seed)]
            found[name].append(carried_out("tau", options, output / f"{short}-{seed}", threads, processes))
    return found


def main() -> None:
    words, more = parted(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets and weights")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--output", type=Path, default=Path("outputs/tau"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="some of the variants, by name")
    parser.add_argument("--paper", action="store_true", help="the released settings: needs a GPU")
    parser.add_argument("--preset", nargs="+", default=[], help="sizes that the variants are laid on, such as gpu")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no", help="of accelerate")
    parser.add_argument("--threads", type=int, help="cores that a run takes")
    arguments = parser.parse_args(words)
    if arguments.part == "frozen" and (arguments.paper or arguments.preset):
        parser.error(
            "--paper and --preset are sizes of a pretraining; a head on a frozen network has none of their options"
        )
    os.environ["ACCELERATE_MIXED_PRECISION"] = arguments.mixed_precision
    variants = PARTS[arguments.part]
    unknown = set(arguments.only or ()) - set(variants)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: the variants are {', '.join(variants)}")
    variants = {name: words for name, words in variants.items() if name in (arguments.only or variants)}
    for name, words in variants.items():
        rate = [PAPERS[one]] if (one := name.split(",")[0]) in PAPERS else []
        sizes = [*(["paper", *rate] if arguments.paper else []), *arguments.preset]
        variants[name] = laid_on(sizes, words)
    common = ["--data-dir", str(arguments.data), "--dataset", arguments.dataset, *more]
    folder = arguments.output / arguments.dataset
    processes = 1 + (arguments.part == "gather")
    found = runs_of(variants, common, arguments.seeds, folder, processes, arguments.threads)
    minutes = spread((run["made"]["seconds"] / 60 for runs in found.values() for run in runs), 1)
    seeds = ", ".join(map(str, arguments.seeds))
    lines = [f"{arguments.dataset}, seeds {seeds}, {minutes} minutes a run", ""]
    if arguments.part != "frozen":
        lines += [*worth_table(found), ""]
    text = "\n".join([*lines, *ood_table(found)]) + "\n"
    if not arguments.only:
        replace_file(arguments.output / f"{arguments.dataset}-{arguments.part}.md", text.encode())
    print(text)


def laid_on(sizes: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words of a variant laid on presets: its own presets, and what stands beside them, win."""
    own = words[:1] == ["--preset"]
    return ["--preset", *sizes, *(words[1:] if own else words)] if sizes else list(words)


if __name__ == "__main__":
    main()
