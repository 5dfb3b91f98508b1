"""The tables of the recipe cifar10h in docs/recipes.md: losses, variants and parametrizations, over all five folds.

    python benchmarks/cifar10h.py resnet20 --data-dir DATA --output runs/cifar10h

DATA holds CIFAR-10, CIFAR-10H's votes and the weights of ResNet-20 and 56 (`shared/data`). Runs that are there already are
read, not repeated; one that was killed goes on. Writes and prints table.md.

`families` trains four families of networks from random weights, with kappa from a network and from the norm: two hours of a
core. A kappa is called useful there where the intervals of both judgements stay clear of what knows nothing: its rank
correlation with the votes' entropy above 0, and above .5 the AUROC of whether an image's nearest neighbour is of another class.

Settings were chosen on some of the images (`CHOSEN_ON`); a column has the correlations on all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from recipe_runs import carried_out
from tyro.conf import Positional

from posthoc.adapters.files import replace_file
from posthoc.eval.ambiguity import ambiguity_table
from posthoc.recipes.cifar10h_data import five_sets, fold_rows, load_cifar10h
from posthoc.recipes.cifar10h_report import ENTROPY

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
        "post-hoc, HIB": "--preset posthoc hib --every 25 --backbone resnet56",
        "fine-tuned, MCInfoNCE": "--preset mcinfonce --backbone resnet56",
        "fine-tuned, HIB": "--preset hib --backbone resnet56",
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
CHOSEN_ON = ((1, 0), (1, 2), (0, 0))
"""Seeds and folds whose validation rows settings were chosen on."""
FREE = (ENTROPY, "energy", "1/feature-norm")
METRICS = {
    "human_spearman": "votes' entropy",
    "elsewhere": "the same, images nothing was chosen on",
    "error_auroc": "AUROC, neighbour of another class",
    "useful": "useful",
    "crop_spearman": "1 - crop fraction",
    "recall_at_1": "recall@1",
    "map_at_r": "MAP@R",
    "crop_recall_at_1": "recall@1, crops",
}
INTERVALS = ("human_spearman", "error_auroc")
Row = dict[str, Any]


@dataclass
class Options:
    """Which parts, from what data, and where to."""

    parts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PART")] = ("resnet20", "resnet56")
    """resnet20, resnet56, families"""
    data_dir: Path = Path("../shared/data")
    """folder of images, votes and weights"""
    output: Path = Path("runs/cifar10h")
    """folder of the runs and of table.md"""


def elsewhere(stored: Mapping[str, np.ndarray], votes: np.ndarray) -> dict[str, Row]:
    """By score of a run (its scores.npz): rank correlation with the votes' entropy, and the paired difference from the
    entropy's, on those of its images that nothing was chosen on."""
    chosen = [fold_rows(five_sets(len(votes), seed), fold)[1] for seed, fold in CHOSEN_ON]
    other = ~np.isin(stored["rows"], np.concatenate(chosen))
    scores = {name: u[other, 0] for name, u in stored.items() if u.ndim == 2 and u.shape[1] == 2}
    found = ambiguity_table(scores, votes=votes[stored["rows"][other]], reference=ENTROPY)
    return {name: row["human_spearman"] for name, row in found.as_dict()["scores"].items()}


def figures(one: Row, name: str, other: Row) -> Row:
    """What a run found about one score, by metric."""
    scores = [table["scores"] for table in one["tables"]]
    row = {**scores[0][name], "elsewhere": other}
    if len(scores) > 2:  # there are right and wrong neighbours
        row["error_auroc"] = scores[2][name]["error_auroc"]
        clear = row["human_spearman"]["low"] > 0 and row["error_auroc"]["low"] > 0.5
        row["useful"] = "yes" if clear else "no"
    return row


def shown(row: Row, metric: str) -> str:
    """Value, with its interval where that is judged, and the paired difference with its interval where there is one."""
    cell = row.get(metric, "-")
    if isinstance(cell, str):
        return cell
    text = f"{cell['value']:.3f}"
    if metric in INTERVALS:
        text += f" [{cell['low']:.3f}, {cell['high']:.3f}]"
    if (minus := cell.get("minus_reference")) is not None:
        text += f" ({minus['value']:+.3f} [{minus['low']:+.3f}, {minus['high']:+.3f}])"
    return text


def table(runs: Mapping[str, Row], others: Mapping[str, Mapping[str, Row]]) -> str:
    """A row for each run, and those of the scores that cost nothing from the first of them. others: of `elsewhere`, by run."""
    head = ["", *METRICS.values(), "credible sets: coverage, share", "training, s"]
    lines = [head, ["---"] * len(head)]
    first = next(iter(runs))
    for name in FREE:
        if name in runs[first]["tables"][0]["scores"]:
            embedding = runs[first]["tables"][1]["scores"]["backbone's features"]
            row = figures(runs[first], name, others[first][name]) | embedding
            lines.append([name, *(shown(row, metric) for metric in METRICS), "", ""])
    for name, one in runs.items():
        own = next(score for score in one["tables"][0]["scores"] if score not in FREE)
        row = figures(one, own, others[name][own]) | one["tables"][1]["scores"]["embedding"]
        sets = one.get("credible_sets")
        both = (
            "" if sets is None else ", ".join(f"{sets['nominal'][key]:.3f}" for key in ("coverage", "share_of_gallery"))
        )
        seconds = f"{sum(fold['seconds'] for fold in one['folds']):.0f}"
        lines.append([f"**{name}**", *(shown(row, metric) for metric in METRICS), both, seconds])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(options: Options) -> None:
    text, votes = [], load_cifar10h(options.data_dir).votes
    for part in options.parts:
        runs, others = {}, {}
        for name, words in PARTS[part].items():
            folder = options.output / part / name.translate(PLAIN)
            runs[name] = carried_out("cifar10h", [*words.split(), "--data-dir", str(options.data_dir)], folder)
            others[name] = elsewhere(dict(np.load(folder / "scores.npz")), votes)
        text.append(f"### {part}\n\n{table(runs, others)}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    replace_file(options.output / "table.md", "\n".join(text).encode())
    print("\n".join(text))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
