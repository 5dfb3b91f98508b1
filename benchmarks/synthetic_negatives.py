"""MCInfoNCE's negatives, summed or averaged: what the true posteriors are worth to it, and which concentrations it wants.

    python benchmarks/synthetic_negatives.py --output runs/negatives.md

On the controlled experiment's process (d = 10, kappa 16 to 32), whose means are given: the loss of the true posteriors at
several inverse temperatures, of which 20 is the true one; and the concentrations that training finds beside the true means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from posthoc.adapters.distributed import Launch
from posthoc.adapters.files import replace_file
from posthoc.adapters.training import warmup_cosine
from posthoc.adapters.training_loop import Plan, run_plan, step_generator
from posthoc.recipes.encoders import RangedConcentration, VmfEncoder, mlp
from posthoc.recipes.running import seeded_module
from posthoc.recipes.synthetic import PRESETS, SyntheticConfig, SyntheticStep, make_criterion
from posthoc.recipes.synthetic_process import Process, make_process
from posthoc.recipes.synthetic_report import Truth, final_figures

TEMPERATURES = (14.0, 17.0, 20.0, 23.0, 26.0)
NEGATIVES = (1, 4, 8, 32)
BATCHES, STEPS, ROWS = 80, 1000, 2000


@dataclass
class Options:
    """Seed, samples and where the tables go."""

    seed: int = 4
    samples: int = 64
    """of the loss, for each posterior"""
    output: Path = Path("negatives.md")


def step_for(
    process: Process, encoder: VmfEncoder, options: Options, negatives: int, weight: float | None
) -> SyntheticStep:
    preset = {**PRESETS["default"], "negatives": negatives, "negative_weight": weight, "samples": options.samples}
    config = SyntheticConfig(seed=options.seed, **preset)
    return SyntheticStep(encoder, make_criterion(config), process, config, Launch(0, 1))


@torch.no_grad()
def loss_of_truth(process: Process, options: Options, negatives: int, weight: float | None, tau: float) -> float:
    """The mean loss of the true posteriors, on the same batches for every setting of as many negatives."""
    step = step_for(process, process.encoder, options, negatives, weight)
    step.criterion.fixed_concentration = tau
    return float(np.mean([float(step(0, i, negatives)) for i in range(BATCHES)]))


def found_beside_true_means(
    process: Process, options: Options, negatives: int, weight: float | None
) -> dict[str, float]:
    """Figures of concentrations trained beside the true means."""
    net = seeded_module(lambda: mlp([process.config.inputs, 64, 64, 64, 1]), options.seed, 1)
    encoder = VmfEncoder(process.encoder.mean, RangedConcentration(net))
    encoder.calibrate(process.images_alone(ROWS, step_generator(options.seed, 2)), 16.0, 32.0)
    step = step_for(process, encoder, options, negatives, weight)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(STEPS, 0.05))
    plan = Plan(f"{negatives} negatives", STEPS, STEPS, lambda i: (1, i, negatives), dict, progress=True)
    run_plan(step, optimizer, schedule, plan)
    truth = Truth.of(process, ROWS, step_generator(options.seed, 3))
    return final_figures(encoder, truth, step_generator(options.seed, 4))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    process = make_process(SyntheticConfig(seed=options.seed).process())
    lines = ["| negatives | " + " | ".join(f"tau {tau:g}" for tau in TEMPERATURES) + " |", "|" + " --- |" * 6]
    cases = [(m, weight) for m in NEGATIVES for weight in (1.0, None) if m > 1 or weight]
    for negatives, weight in cases:
        name = f"{negatives}, {'summed' if weight else 'averaged'}"
        values = [loss_of_truth(process, options, negatives, weight, tau) for tau in TEMPERATURES]
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    lines += ["", "| negatives | kappa / true | rank correlation | coverage |", "|" + " --- |" * 4]
    for negatives, weight in cases:
        found = found_beside_true_means(process, options, negatives, weight)
        figures = [f"{found[name]:.3f}" for name in ("kappa_ratio", "kappa_spearman", "coverage")]
        lines.append(f"| {negatives}, {'summed' if weight else 'averaged'} | " + " | ".join(figures) + " |")
    replace_file(options.output, ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
