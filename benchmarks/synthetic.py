"""The tables of the controlled experiment in docs/recipes.md: losses over seeds, and the exact against the paper's sampler.

    python benchmarks/synthetic.py losses samplers variants --output runs/synthetic --jobs 2

Runs that are there already are read, not repeated; `--jobs` of them go at a time, with one thread each. Writes table.md:
for each case mean and standard deviation over seeds, and below them the figures and the minutes of each seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from recipe_runs import carried_out, spread
from tyro.conf import Positional

from posthoc.adapters.files import replace_file

COLUMNS = {
    "cosines_spearman": "cosines, rank corr.",
    "cosines_mae": "cosines, mean abs. error",
    "kappa_spearman": "kappa, rank corr.",
    "proxy_spearman": "paper's proxy, rank corr.",
    "kappa_ratio": "kappa / true, median",
    "coverage": "coverage of 95 % caps",
    "coverage_of_the_true_posteriors": "the same of the true posteriors",
}
SEEDS, SAMPLER_SEEDS = (4, 5, 6, 7, 8), (4, 5, 6)
_DIMENSIONS = "--input-dim {d} --latent-dim {d} --encoder-dim {d} --steps 4000 --kappa-steps 1500"
SAMPLERS = {
    "both exact": "--no-antithetic",  # the paper's sampler has independent draws
    "paper's in the loss": "--reference",
    "paper's in process and loss": "--sampler paper --reference",
}
Case = tuple[str, Sequence[str], tuple[int, ...]]
"""Name of a row, words of the command line, seeds."""
PARTS: dict[str, tuple[Case, ...]] = {
    "losses": (
        ("MCInfoNCE", (), SEEDS),
        # presets that do not collapse, found with seed 1; the paper's powers, which do, once
        ("HIB", ("--preset", "hib"), SEEDS),
        ("ELK", ("--preset", "elk"), SEEDS),
        ("ELK, power 20 as in the paper", ("--loss", "elk"), SEEDS[:1]),
        ("HIB, a=1, b=0 as in the paper", ("--loss", "hib"), SEEDS[:1]),
    ),
    "samplers": tuple(
        (f"d = {d}, {name}", (*_DIMENSIONS.format(d=d).split(), *words.split()), SAMPLER_SEEDS)
        for d in (10, 16, 32)
        for name, words in SAMPLERS.items()
    ),
    "variants": tuple(
        (name, words.split(), (4,))
        for name, words in {
            **{
                name: f"--preset {name}"
                for name in (
                    *("clear", "injective", "2d", "gaussian", "laplace", "shared-backbone"),
                    *("samples-1", "samples-4", "samples-64"),
                )
            },
            **{f"encoder of {d} dimensions": f"--encoder-dim {d}" for d in (4, 16)},
            **{
                f"dim-{d}, batch and samples of the default": f"--preset dim-{d} --batch-size 128 --samples 16"
                for d in (16, 32)
            },
            "negatives averaged, as in the paper": "--negative-weight None",
        }.items()
    ),
}


@dataclass
class Options:
    """Which parts, where to, and how many runs at a time."""

    parts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PART")] = tuple(PARTS)
    """losses, samplers, variants"""
    output: Path = Path("runs/synthetic")
    """folder of the runs and of table.md"""
    jobs: int = 2
    """runs at a time, one thread each"""


def rows(name: str, seeds: Sequence[int], runs: list[dict[str, Any]]) -> list[str]:
    """A case's line over its seeds, and where there are several one for each."""
    several = [(f"{name}, seed {seed}", [run]) for seed, run in zip(seeds, runs, strict=True)] if len(runs) > 1 else []
    return [_row(*line) for line in ((name, runs), *several)]


def _row(name: str, runs: list[dict[str, Any]]) -> str:
    cells = [name]
    for column in COLUMNS:
        values = [run["figures"][column] for run in runs if column in run["figures"]]
        cells.append(spread(values, 3) if values else "-")
    minutes = spread([sum(run["training_seconds"].values()) / 60 for run in runs], 1)
    return "| " + " | ".join([*cells, f"{len(runs)}", minutes]) + " |"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    head = ["", *COLUMNS.values(), "seeds", "training, minutes"]
    lines = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for part in options.parts:
            waiting = {
                name: [
                    pool.submit(
                        carried_out,
                        "synthetic",
                        (*words, "--seed", str(seed)),
                        options.output / f"{part}-{name}-{seed}".replace(" ", ""),
                        1,
                    )
                    for seed in seeds
                ]
                for name, words, seeds in PARTS[part]
            }
            lines += [f"### {part}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
            for name, _, seeds in PARTS[part]:
                lines += rows(name, seeds, [one.result() for one in waiting[name]])
            lines.append("")
    replace_file(options.output / "table.md", "\n".join(lines).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
