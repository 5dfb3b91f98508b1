"""The tables of the recipe `anisotropic`: what its runs reach, what the loss alone would reach, and steps per second.

    python benchmarks/anisotropic.py --output outputs/anisotropic >tables.md
    python benchmarks/anisotropic.py --output outputs/anisotropic --only speed

A run that is in --output is not computed again, and one that was stopped goes on. The runs of four dimensions take a few
minutes each on one core, n10 a quarter of an hour, the other tables two minutes each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from posthoc.adapters.distributed import Launch
from posthoc.adapters.losses import AnInfoNCE
from posthoc.recipes.anisotropic import AnisotropicConfig, Contrast
from posthoc.recipes.anisotropic_process import AHEAD, Conditional, Pairs, mixing, precisions, uniform_directions
from posthoc.recipes.encoders import mlp

RUNS = (
    "default", "linear", "infonce", "infonce linear", "hard-negatives", "ensemble", "shell", "n10", "n10 linear",
)  # fmt: skip
TABLES = ("runs", "loss", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/anisotropic"))
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="presets of each run, several as one word in quotes")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "runs" in arguments.only:
        runs(arguments.output, arguments.runs, arguments.seeds)
    if "loss" in arguments.only:
        loss_alone()
    if "speed" in arguments.only:
        speed()


def runs(output: Path, presets: list[str], seeds: list[int]) -> None:
    print(
        "| presets | seed | steps | seconds | R² held out | R² in-sample | MCC | Lambda learned | Lambda expected | worst |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for words in presets:
        for seed in seeds:
            folder = output / words.replace(" ", "+") / str(seed)
            if not (folder / "results.json").exists():
                command = ["-m", "posthoc.recipes.anisotropic", "--preset", *words.split(), "--seed", str(seed)]
                command += ["--output", str(folder), "--resume"]
                subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
            print(row(words, json.loads((folder / "results.json").read_text())), flush=True)


def row(words: str, found: dict[str, Any]) -> str:
    config, latents, precision = found["config"], found["latents"], found["precision"]
    scores = (f"{latents[name]['mean']:.4f}" for name in ("r2_held_out", "r2", "mcc"))
    numbers = (
        "; ".join(" ".join(f"{v:.1f}" for v in line) for line in precision[name]) for name in ("learned", "expected")
    )
    seconds = f"{config['steps'] / found['steps_per_second']:.0f}"
    cells = [
        words,
        config["seed"],
        config["steps"],
        seconds,
        *scores,
        *numbers,
        f"{precision['worst_relative_error']:.1%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


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
