"""The tables of the recipe lam in docs/recipes.md: every method beside a deterministic embedding, over seeds.

    python benchmarks/lam.py --data-dir DATA --output outputs/lam
    python benchmarks/lam.py --data-dir DATA --output outputs/lam --preset cifar10 all --seeds 0 1 2

DATA holds FashionMNIST and MNIST (or what the data set of --preset needs). Two seeds run at a time, on one core each (--jobs,
--threads). A run that is there is read, not repeated; one that was killed goes on. Writes and prints PRESET.md, with the wall
clock of all runs together unless some were there already; --wide adds mAP and recall at every depth. What stands behind --
goes to the recipe: `-- --epochs 2`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipe_runs import carried_out, parted, spread

from posthoc.adapters.files import replace_file
from posthoc.recipes.lam_report import columns

REFERENCE = "deterministic"


def table(runs: Sequence[dict[str, Any]], wide: bool = False) -> str:
    """Methods down, figures across."""
    methods = list(runs[0]["methods"])
    names = columns([run["methods"][method] for run in runs for method in methods], wide)
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in methods:
        rows = [run["methods"][method] for run in runs]
        cells = [spread([row[name] for row in rows], 3) if all(name in row for row in rows) else "" for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(runs: Sequence[dict[str, Any]], wide: bool = False) -> str:
    """Each method less the deterministic embedding of the same seed, in what both have."""
    names = columns([run["methods"][REFERENCE] for run in runs], wide)
    lines = [f"| less {REFERENCE}, same seed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in runs[0]["methods"]:
        if method != REFERENCE:
            pairs = [(run["methods"][method], run["methods"][REFERENCE]) for run in runs]
            cells = [spread([one[name] - other[name] for one, other in pairs], 3) for name in names]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(run: dict[str, Any]) -> str:
    """How the columns are to be read: which are better low, what stands in them without uncertainty, and chance."""
    config, images = run["config"], dict(run["images"])
    test = [images.pop(name) for name in ("train", "validation", "test")][-1]
    lines = ["Higher is better, of vote ECE lower."]
    if any("vote ECE" in row for row in run["methods"].values()):
        lines.append(
            f"Votes are of {config['samples']} draws, of the ensemble's {config['members']} members; {REFERENCE} has one vote, "
            "always sure: its vote ECE is 1 - recall@1."
        )
    lines.append(f"The AUSC of {REFERENCE} is its recall@1, and that of scores by chance is the method's own.")
    if images:
        chance = ", ".join(f"{name} {count / (count + test):.3f}" for name, count in images.items())
        lines.append(f"Chance is .5 for AUROC, and for AUPR {chance}.")
    return " ".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    own, more = parted(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the images")
    parser.add_argument("--output", type=Path, default=Path("outputs/lam"))
    parser.add_argument("--preset", nargs="+", default=["default"], help="of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="cores of a run")
    parser.add_argument("--wide", action="store_true", help="mAP and recall at every depth")
    arguments = parser.parse_args(own)
    name = "-".join(arguments.preset)
    common = ["--preset", *arguments.preset, "--data-dir", str(arguments.data_dir)]
    folders = [arguments.output / f"{name}-{seed}" for seed in arguments.seeds]
    begun = [folder for folder in folders if (folder / "config.json").exists()]

    def one(seed: int, folder: Path) -> dict[str, Any]:
        return carried_out("lam", [*common, "--seed", str(seed), *more], folder, arguments.threads)

    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(one, arguments.seeds, folders))
    minutes = spread([run["made"]["seconds"] / 60 for run in runs], 1)
    text = f"{name}, seeds {' '.join(map(str, arguments.seeds))}, {minutes} minutes a run"
    if not begun:
        text += (
            f", {(time.perf_counter() - start) / 60:.1f} minutes of wall clock in all, {arguments.jobs} runs at a time"
        )
        text += f" of {arguments.threads} core(s) each"
    text += f":\n\n{table(runs, arguments.wide)}\n\n{differences(runs, arguments.wide)}\n\n{notes(runs[0])}\n"
    replace_file(arguments.output / f"{name}.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
