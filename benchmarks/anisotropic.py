"""The tables of the recipe `anisotropic`: what its runs reach, what the loss alone would reach, and steps per second.

    python benchmarks/anisotropic.py --output outputs/anisotropic >tables.md
    python benchmarks/anisotropic.py --output outputs/anisotropic --runs default linear --seeds 0 1 2 3 4
    python benchmarks/anisotropic.py --only speed

A run that is in --output is not computed again, and one that was stopped goes on. The runs of four dimensions take one to four
minutes each on one core, those of ten half an hour, the other tables up to two minutes each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_runs import carried_out, spread
from torch import Tensor, nn
from torch.nn import functional

from posthoc.adapters.distributed import Launch
from posthoc.adapters.losses import AnInfoNCE
from posthoc.recipes.anisotropic import AnisotropicConfig, Contrast
from posthoc.recipes.anisotropic_process import AHEAD, Conditional, Pairs, mixing, precisions, uniform_directions
from posthoc.recipes.encoders import mlp

RUNS = {
    "default": "",
    "linear": "--preset linear",
    "smoke": "--preset smoke",
    "default-2000": "--steps 2000",
    "linear-2000": "--preset linear --steps 2000",
    "infonce": "--preset infonce --steps 2000",
    "infonce-linear": "--preset infonce linear --steps 2000",
    "hard-negatives": "--preset hard-negatives --steps 2000",
    "ensemble": "--preset ensemble --steps 2000",
    "shell": "--preset shell",
    "n10": "--preset n10 --steps 30000 --every 1000",
    "n10-linear": "--preset n10 linear --lr-precision 0.2 --steps 30000 --every 1000",
}
"""Runs by name, which is also that of the folder, and their words on the command line."""
LONG = ("n10", "n10-linear")
"""Runs of the first seed only."""
MILESTONES = (6000, 10_000, 20_000, 30_000)
"""Steps of the runs of ten dimensions that stand beside the reference's logs."""
TABLES = ("runs", "loss", "sampling", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/anisotropic"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables to make")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="rows of the first table")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="the n10 runs take the first alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run and of the timing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "runs" in arguments.only:
        runs(arguments.output, arguments.runs, arguments.seeds, arguments.threads)
    if "loss" in arguments.only:
        loss_alone()
    if "sampling" in arguments.only:
        sampling()
    if "speed" in arguments.only:
        speed()


def runs(output: Path, names: Sequence[str], seeds: Sequence[int], threads: int) -> None:
    """The first table, a row as soon as its runs are there; then those of ten dimensions on their way, and the time of all."""
    heads = "run,seeds,steps,s,R² held out,R² in-sample,MCC,Lambda learned,true,worst"
    print(f"| {heads.replace(',', ' | ')} |" + "\n|" + "---|" * len(heads.split(",")))
    spent: list[float] = []
    for name in names:
        found = []
        for seed in seeds[:1] if name in LONG else seeds:
            words = [*RUNS[name].split(), "--seed", str(seed)]
            found.append(carried_out("anisotropic", words, output / f"{name}-{seed}", threads))
        spent += [one["made"]["seconds"] for one in found]
        print(row(RUNS[name] or name, found), flush=True)
    for name in LONG:
        if name in names:
            milestones(output / f"{name}-{seeds[0]}" / "train" / "metrics.jsonl")
    print(f"\n{len(spent)} runs, {sum(spent) / 60:.0f} minutes in all")


def row(name: str, found: list[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds; the precisions, in their order, are means, the error is the worst."""
    config, precision = found[0]["config"], [one["precision"] for one in found]
    scores = (spread([one["latents"][score]["mean"] for one in found], 4) for score in ("r2_held_out", "r2", "mcc"))
    learned = np.mean([one["learned"] for one in precision], 0)
    numbers = (
        "; ".join(" ".join(f"{v:.1f}" for v in line) for line in each) for each in (learned, precision[0]["expected"])
    )
    cells = [
        name,
        " ".join(str(one["config"]["seed"]) for one in found),
        config["steps"],
        f"{np.mean([config['steps'] / one['steps_per_second'] for one in found]):.0f}",
        *scores,
        *numbers,
        # infonce has one temperature: there is no error of each dimension's
        "" if config["loss"] == "infonce" else f"{max(one['worst_relative_error'] for one in precision):.1%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def milestones(metrics: Path) -> None:
    """A run on its way, by the 4,096 latents of its evaluations."""
    print("\n| step | R² in-sample | R² held out | MCC | Lambda learned |\n|---|---|---|---|---|")
    for record in map(json.loads, metrics.read_text().splitlines()):
        if record["step"] in MILESTONES:
            learned = sorted(value for key, value in record.items() if key.startswith("precision_0_"))
            scores = " | ".join(f"{record[name]:.4f}" for name in ("r2", "r2_held_out", "mcc"))
            print(f"| {record['step']} | {scores} | {' '.join(f'{v:.1f}' for v in learned)} |")


def loss_alone(rows: int = 256, steps: int = 700) -> None:
    """What precision the loss finds when the latents themselves are the embeddings: no encoder is in its way."""
    print("\n| n | layout | sampler | beta | form | Lambda learned from the true latents |\n|---|---|---|---|---|---|")
    cases = [
        (n, layout, s, 0.0, False) for n in (4, 10) for layout in ("bimodal", "linear") for s in ("exact", "shell")
    ]
    cases += [(10, "bimodal", "shell", 0.0, True), (4, "bimodal", "exact", 1.0, False)]
    for n, layout, sampler, beta, reference in cases:
        true = precisions(layout, n, 5.0, 25.0)[0]
        conditional, generator = Conditional(true, sampler), torch.Generator().manual_seed(0)
        loss = AnInfoNCE(n, 10.0, beta, reference)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            z = uniform_directions(rows, n, generator)
            value = loss(z.float(), conditional.sample(z, generator).float())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        learned = " ".join(f"{v:.2f}" for v in loss.precision.sort().values.tolist())
        form = "paper's code" if reference else "symmetric"
        print(f"| {n} | {layout} | {sampler} | {beta:g} | {form} | {learned} |", flush=True)


def sampling(rows: int = 32_000) -> None:
    """Share of proposals that are kept, and CPU microseconds of a positive, after a first draw of as many."""
    print("\n| n | Lambda | exact | shell (threshold .1) |\n|---|---|---|---|")
    for n in (4, 10):
        for layout in ("bimodal", "linear"):
            cells = []
            for sampler in ("exact", "shell"):
                conditional = Conditional(precisions(layout, n, 5.0, 25.0)[0], sampler)
                generator = torch.Generator().manual_seed(0)
                z = uniform_directions(rows, n, generator)
                conditional.sample(z, generator)
                start = time.process_time()
                conditional.sample(z, generator)
                cells.append(f"{conditional.acceptance:.3f}, {1e6 * (time.process_time() - start) / rows:.1f} µs")
            print(f"| {n} | {layout} | {' | '.join(cells)} |", flush=True)


class PlainLoss(nn.Module):
    """The loss as one would write it down: three matrices, their off-diagonals gathered, softplus in every term."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(0.1 * torch.randn(dim))

    def similarity(self, u: Tensor, v: Tensor) -> Tensor:
        of_u = (u**2 * functional.softplus(self.raw)).sum(-1)[:, None]
        of_v = (v**2 * functional.softplus(self.raw)).sum(-1)
        return (u * functional.softplus(self.raw)) @ v.T - of_u / 2 - of_v / 2

    def forward(self, h1: Tensor, h2: Tensor) -> Tensor:
        a, b = functional.normalize(h1, dim=-1), functional.normalize(h2, dim=-1)
        n = len(a)
        other = ~torch.eye(n, dtype=torch.bool)
        positive = -((a - b) ** 2 * functional.softplus(self.raw)).sum(-1)[:, None] / 2
        rows = []
        for u in (a, b):
            negatives = [self.similarity(*pair)[other].view(n, n - 1) for pair in ((u, u), (a, b))]
            rows.append(torch.cat([positive, *negatives], 1).logsumexp(1) - positive[:, 0])
        return torch.cat(rows).mean()


class PlainStep(nn.Module):
    """The encoder sees one view after the other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = mlp([dim, 10 * dim, *[50 * dim] * 4, 10 * dim, dim])
        self.loss = PlainLoss(dim)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.loss(self.encoder(x1), self.encoder(x2))


class PlainPairs:
    """Inputs of a step, drawn at that step: latents, positives by shell rejection, and the mixing of both."""

    def __init__(self, precision: np.ndarray, network: nn.Module, rows: int, threshold: float = 0.1) -> None:
        self.precision, self.network, self.rows, self.threshold = precision, network, rows, threshold
        self.rng = np.random.default_rng(0)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        z = self.rng.normal(size=(self.rows, len(self.precision)))
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        found, missing = np.zeros_like(z), np.arange(self.rows)
        while len(missing):
            noise = self.rng.normal(size=(len(missing), len(self.precision)))
            proposed = z[missing] + noise / np.sqrt(self.precision)
            length = np.linalg.norm(proposed, axis=1)
            kept = np.abs(length - 1) < self.threshold
            found[missing[kept]] = proposed[kept] / length[kept, None]
            missing = missing[~kept]
        return self.network(torch.from_numpy(z).float()), self.network(torch.from_numpy(found).float())


def speed() -> None:
    print("\n| n | batch | side | sampling ms | loss ms | step ms | steps / s |\n|---|---|---|---|---|---|---|")
    for n, batch, rounds in ((4, 256, 60), (10, 256, 40), (10, 1000, 15)):
        true = precisions("bimodal", n, 5.0, 25.0)
        network = mixing(n, 3, torch.Generator().manual_seed(0))
        contrast = Contrast(AnisotropicConfig(dim=n))
        ours = parts(contrast, contrast.loss, Pairs(true, network, batch, Launch(0, 1), (0,)), n, batch)
        module = PlainStep(n)
        plain = parts(module, module.loss, PlainPairs(true[0].numpy(), network, batch), n, batch)
        for side, found in measured({"ours": ours, "straightforward": plain}, rounds).items():
            whole = found["sampling"] + found["rest"]
            cells = " | ".join(f"{1e3 * value:.1f}" for value in (found["sampling"], found["loss"], whole))
            print(f"| {n} | {batch} | {side} | {cells} | {1 / whole:.1f} |", flush=True)


def parts(
    module: nn.Module, loss: nn.Module, pairs: Callable[[int], tuple[Tensor, Tensor]], n: int, batch: int
) -> dict[str, Callable[[], object]]:
    """What is timed of one side: data, loss with its gradients (of both views), and a step that has its data."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    h = [torch.randn(batch, n, requires_grad=True) for _ in range(2)]
    place, x = count(), pairs(0)

    def rest() -> None:
        optimizer.zero_grad()
        module(*x).backward()
        optimizer.step()

    return {"sampling": lambda: pairs(next(place)), "loss": lambda: loss(*h).backward(), "rest": rest}


def measured(sides: dict[str, dict[str, Callable[[], object]]], rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of one call of each part: the mean of sampling, which draws 32 steps at once, medians of the others.

    Both sides take turns, so that whatever else the machine does slows both.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 2):
        for side, works in sides.items():
            for part, work in works.items():
                start = time.process_time()
                for _ in range(AHEAD if part == "sampling" else 1):
                    work()
                if turn >= 2:
                    each = (time.process_time() - start) / (AHEAD if part == "sampling" else 1)
                    spent.setdefault((side, part), []).append(each)
    return {side: {part: statistics.median(spent[side, part]) for part in works} for side, works in sides.items()}


if __name__ == "__main__":
    main()
