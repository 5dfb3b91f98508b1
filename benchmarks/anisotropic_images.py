"""InfoNCE against AnInfoNCE on images: readouts of class and augmentation, mean and spread over seeds.

    python benchmarks/anisotropic_images.py --data DATA --output outputs/anisotropic_images
    python benchmarks/anisotropic_images.py --data DATA --only "post-hoc InfoNCE" "post-hoc AnInfoNCE"

DATA is where `shared/data/get_data.py` has put CIFAR-10, and where cifar10_resnet20.safetensors lies (or give --checkpoint). A
run that is there is not computed again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from recipe_runs import carried_out, spread

from posthoc.eval.plots import legend, page
from posthoc.recipes.anisotropic_readout import bars

VARIANTS: dict[str, list[str]] = {
    "InfoNCE": ["--preset", "infonce"],
    "InfoNCE, learned temperature": ["--preset", "infonce", "--learn-temperature"],
    "AnInfoNCE": ["--preset", "aninfonce"],
    "post-hoc InfoNCE": ["--preset", "post-hoc", "infonce"],
    "post-hoc InfoNCE, learned temperature": ["--preset", "post-hoc", "infonce", "--learn-temperature"],
    "post-hoc AnInfoNCE": ["--preset", "post-hoc", "aninfonce"],
}
"""Runs by name; what they have in common stands once in a table."""


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.replace(',', '').replace(' ', '-').lower()}-{seed}"


def table(found: dict[str, list[dict[str, Any]]], names: list[str]) -> list[str]:
    """Representations of some variants down, readouts across."""
    columns = list(found[names[0]][0]["readouts"]["projection"])
    lines = ["| loss | read from | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    shared: set[str] = set()
    for name in names:
        runs = found[name]
        for level in runs[0]["readouts"]:
            rows = [one["readouts"][level] for one in runs]
            common = level.startswith("untrained") or (level == "backbone" and name.startswith("post-hoc"))
            if common and level in shared:
                continue
            shared.update({level} if common else ())
            loss = "none" if common else name.removeprefix("post-hoc ")
            cells = " | ".join(spread([row[column] for row in rows], 1) for column in columns)
            lines.append(f"| {loss} | {level} | {cells} |")
    return lines


def gains(found: dict[str, list[dict[str, Any]]], one: str, other: str) -> str:
    """Differences of `other` to `one` with the same seed."""
    lines = []
    for level in ("backbone", "projection"):
        pairs = [(a["readouts"][level], b["readouts"][level]) for a, b in zip(found[one], found[other], strict=True)]
        if all(a == b for a, b in pairs):
            continue
        both = (f"{kind} {spread([b[kind] - a[kind] for a, b in pairs], 1)}" for kind in ("class", "augmentation"))
        lines.append(f"{level}: {', '.join(both)}")
    return f"{other} less {one}, same seed: " + "; ".join(lines)


def draw(path: Path, found: dict[str, list[dict[str, Any]]], names: list[str], reference: str) -> None:
    """What can be read from the projections, means and standard deviations over seeds, beside the level `reference`."""
    columns = [name for name in found[names[0]][0]["readouts"]["projection"] if name != "augmentation"]
    levels = {reference: [one["readouts"][reference] for one in found[names[0]]]}
    for name in names:
        levels[name.removeprefix("post-hoc ")] = [one["readouts"]["projection"] for one in found[name]]
    values = {row: np.array([[one[column] for column in columns] for one in runs]) for row, runs in levels.items()}
    means = {row: one.mean(0).tolist() for row, one in values.items()}
    several = len(found[names[0]]) > 1
    errors = {row: one.std(0, ddof=1).tolist() for row, one in values.items()} if several else None
    with page(path, 8.4, 3.8) as figure:
        axis = figure.subplots()
        bars(axis, means, columns, errors, reference)
        axis.set(title=f"Read from the projection; grey: from the {reference}", ylabel="accuracy or R², %")
        legend(figure, axis, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 and of ResNet-20's weights")
    parser.add_argument("--checkpoint", type=Path, help="ResNet-20's weights, if they lie elsewhere")
    parser.add_argument("--output", type=Path, default=Path("outputs/anisotropic_images"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="variants to run")
    arguments = parser.parse_args()
    common = ["--data-dir", str(arguments.data)]
    common += ["--checkpoint", str(arguments.checkpoint)] if arguments.checkpoint else []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    for seed in arguments.seeds:
        for name, runs in found.items():
            words = [*VARIANTS[name], *common, "--seed", str(seed)]
            runs.append(carried_out("anisotropic_images", words, folder_of(arguments.output, name, seed)))
    for kind, post_hoc in (("Trained here", False), ("Projection of frozen features", True)):
        names = [name for name in found if name.startswith("post-hoc") == post_hoc]
        if not names:
            continue
        minutes = [one["made"]["seconds"] / 60 for name in names for one in found[name]]
        print(f"{kind}, {len(arguments.seeds)} seeds, {spread(minutes, 1)} minutes a run, {sum(minutes):.0f} in all:\n")
        print("\n".join(table(found, names)) + "\n")
        file, reference = ("post_hoc.png", "backbone") if post_hoc else ("trained.png", "untrained projection")
        draw(arguments.output / file, found, names, reference)
        for reference in names[:-1]:
            print(gains(found, reference, names[-1]) + "\n")


if __name__ == "__main__":
    main()
