"""The tables of the recipe cifar10h in docs/recipes.md: losses, variants and parametrizations, over all five folds.

    python benchmarks/cifar10h.py resnet20 --data-dir DATA --output runs/cifar10h

DATA holds CIFAR-10, CIFAR-10H's votes and the weights of ResNet-20 and 56 (`shared/data`). Runs that are there already are
read, not repeated; one that was killed goes on. Writes and prints table.md. `families` trains four families of networks
from random weights, with kappa from a network and from the norm: one to two hours of a core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from recipe_runs import carried_out
from tyro.conf import Positional

from posthoc.adapters.files import replace_file

FAMILIES = ("resnet18", "vgg11_bn", "vit_tiny_patch16_224", "convnext_atto")
PARTS: dict[str, dict[str, str]] = {
    "resnet20": {
        "fine-tuned, ELK": "--preset default",
        "fine-tuned, soft cross-entropy": "--preset soft-cross-entropy",
        "post-hoc, ELK": "--preset posthoc",
        "post-hoc, MCInfoNCE": "--preset posthoc mcinfonce --every 25",
        "post-hoc, HIB": "--preset posthoc hib --every 25",
        "post-hoc, ELK, kappa = norm": "--preset posthoc --parametrization norm",
        "post-hoc, MCInfoNCE, kappa = norm": "--preset posthoc mcinfonce --every 25 --parametrization norm",
        "post-hoc, soft cross-entropy": "--preset posthoc soft-cross-entropy",
        "fine-tuned, MCInfoNCE": "--preset mcinfonce",
        "fine-tuned, HIB": "--preset hib",
    },
    "resnet56": {
        "fine-tuned, ELK": "--preset default --backbone resnet56",
        "fine-tuned, soft cross-entropy": "--preset soft-cross-entropy --backbone resnet56",
        "post-hoc, ELK": "--preset posthoc --backbone resnet56",
        "post-hoc, MCInfoNCE": "--preset posthoc mcinfonce --every 25 --backbone resnet56",
    },
    "families": {
        f"{name}, kappa = {kind}": f"--scratch --train-on train-hard --folds 0 --steps 400 --every 200 --lr 1e-3 "
        f"--backbone {name} --parametrization {kind}"
        for name in FAMILIES
        for kind in ("network", "norm")
    },
}
PLAIN = str.maketrans(" ", "-", ",=")
"""Names of runs as names of folders."""
METRICS = {
    "human_spearman": "votes' entropy",
    "crop_spearman": "1 - crop fraction",
    "recall_at_1": "recall@1",
    "map_at_r": "MAP@R",
    "crop_recall_at_1": "recall@1, crops",
}


@dataclass
class Options:
    """Which parts, from what data, and where to."""

    parts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PART")] = ("resnet20", "resnet56")
    """resnet20, resnet56, families"""
    data_dir: Path = Path("../shared/data")
    """folder of images, votes and weights"""
    output: Path = Path("runs/cifar10h")
    """folder of the runs and of table.md"""


def shown(cell: dict[str, Any] | None) -> str:
    """Value, and the paired difference with its interval where there is one."""
    if cell is None:
        return "-"
    text = f"{cell['value']:.3f}"
    if (minus := cell.get("minus_reference")) is not None:
        text += f" ({minus['value']:+.3f} [{minus['low']:+.3f}, {minus['high']:+.3f}])"
    return text


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each run, and those of the scores that cost nothing from the first of them."""
    head = ["", *METRICS.values(), "credible sets: coverage, share", "training, s"]
    lines = [head, ["---"] * len(head)]
    first = next(iter(runs.values()))
    free = [name for name in first["tables"][0]["scores"] if name in ("entropy", "energy", "1/feature-norm")]
    for name in free:
        cells = first["tables"][0]["scores"][name] | first["tables"][1]["scores"].get("backbone's features", {})
        plain = {metric: {"value": cell["value"]} for metric, cell in cells.items()}
        lines.append([name, *(shown(plain.get(metric)) for metric in METRICS), "", ""])
    for name, one in runs.items():
        own = next(score for score in one["tables"][0]["scores"] if score not in free)
        cells = one["tables"][0]["scores"][own] | one["tables"][1]["scores"]["embedding"]
        sets = one.get("credible_sets")
        both = (
            "" if sets is None else ", ".join(f"{sets['nominal'][key]:.3f}" for key in ("coverage", "share_of_gallery"))
        )
        row = [shown(cells.get(metric)) for metric in METRICS]
        lines.append([f"**{name}**", *row, both, f"{sum(fold['seconds'] for fold in one['folds']):.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(options: Options) -> None:
    text = []
    for part in options.parts:
        runs = {
            name: carried_out(
                "cifar10h",
                [*words.split(), "--data-dir", str(options.data_dir)],
                options.output / part / name.translate(PLAIN),
            )
            for name, words in PARTS[part].items()
        }
        text.append(f"### {part}\n\n{table(runs)}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    replace_file(options.output / "table.md", "\n".join(text).encode())
    print("\n".join(text))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
