"""AnInfoNCE's controlled experiment: latents whose dimensions augmentations change more or less, and who recovers them.

    python -m posthoc.recipes.anisotropic --preset smoke --output runs/smoke        # try this first: under a minute
    accelerate launch -m posthoc.recipes.anisotropic --output runs/bimodal
    accelerate launch -m posthoc.recipes.anisotropic --preset n10 --output runs/n10
    python -m posthoc.recipes.anisotropic --preset images --output runs/images      # see anisotropic_images

Preset `default` takes about 70 s of one core (3 to 11 minutes of a crowded one), 0.9 GB of memory; `--preset n10 --steps 30000`
28 minutes of one core. To expect with seed 0, on latents that nothing was fitted on: R^2 .998, and for precisions of 5, 5, 25,
25 (MCC .90: latents of one precision may come out turned) 5.0, 5.1, 25.1, 25.2; `--preset linear`: R^2 .998, MCC .999, and 4.8,
12.2, 18.8, 24.7 for 5, 11.7, 18.3, 25; n10 in 30,000 steps: R^2 .997, MCC .63, and 5.5 and 22.8 to 23.0 for 5 and 25.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.errors import OptionError, PosthocError
from ..adapters.gathering import gather_rows
from ..adapters.losses import AnInfoNCE, AnInfoNCEEnsemble, NTXent
from ..adapters.training_loop import Plan, Record, run_plan, step_generator
from ..eval.identifiability import linear_r2, mean_correlation, precision_recovery, random_half
from . import running
from .anisotropic_process import Layout, Pairs, Sampler, mixing, precisions, uniform_directions
from .anisotropic_report import draw, table
from .encoders import mlp
from .options import Preset, RecipeConfig, check_counts, check_positive, presets_named
from .running import Run, scheduled, seeded_module

JUDGED, REPEATS = 4096, 10
"""Latents that the metrics look at, and how often at other ones at the end."""
LEARNT = 0.95
"""R^2 on latents not fitted on, that --check asks for."""
WARMUP = 0.02
"""Share of the steps before the cosine."""
MIXING, WEIGHTS, START, TRAINING, JUDGING = range(5)
"""Streams of random numbers."""


@dataclass(kw_only=True)
class AnisotropicConfig(RecipeConfig):
    """The options of this recipe."""

    dim: int = 4
    """dimensions n of latents and embedding: more are harder to recover, and the network is 50 n wide"""
    layout: Layout = "bimodal"
    """precisions of the positives: highest and lowest half and half, or evenly spaced between them"""
    lowest: float = 5.0
    """smallest precision: the lower, the more positives differ in that latent"""
    highest: float = 25.0
    """largest precision: the higher, the more positives agree in that latent"""
    families: int = 1
    """families of positives (bimodal only), each with its own places of the high precisions and its own learned ones:
    two or more tell latents of one precision apart"""
    sampler: Sampler = "exact"
    """how positives are drawn: from their exact density, or by the paper's shell rejection, which comes near it"""
    threshold: float = 0.1
    """half the width of the shell: thinner ones are nearer to the exact density and slower"""
    mixing_layers: int = 3
    """linear layers of the network between latents and inputs: more bend the latents more"""
    loss: Literal["aninfonce", "infonce"] = "aninfonce"
    """aninfonce learns a precision for each dimension, infonce has one temperature for all"""
    hard_negatives: float = 0.0
    """beta: AnInfoNCE's negatives are weighted by exp(beta similarity), and precisions come out divided by 1 + beta"""
    temperature: float = 1.0
    """temperature of infonce, at the start: lower ones weigh near negatives more"""
    learn_temperature: bool = True
    """let infonce learn its temperature"""
    standardize: bool = True
    """whiten the encoder's inputs and begin with embeddings all over the sphere, which learns faster; the
    paper's code does neither"""
    reference: bool = False
    """take AnInfoNCE as in the paper's code, where the second view's rows have the wrong negatives"""
    batch_size: int = 64
    """positive pairs a step over all processes, a multiple of 8: more give each row more negatives"""
    steps: int = 5000
    """optimiser steps: more bring the precisions nearer to the truth and take as much longer"""
    every: int = 250
    """steps between two evaluations and checkpoints: fewer lose less when a run is killed"""
    lr: float = 5e-3
    """learning rate (Adam) of the encoder; lower it where the loss jumps, and for more dimensions"""
    lr_precision: float | None = None
    """learning rate (Adam) of the precision, or of the temperature, before softplus or exp: how fast they can move away from
    their start; None: 0.2 of a precision, 0.05 of a temperature, which runs away at more"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """course of both learning rates: a warm-up of 2 % of the steps and a cosine to 0, or constant"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "steps", "every", "mixing_layers")
        check_positive(self, "lr", "temperature")
        if self.lr_precision is not None:
            check_positive(self, "lr_precision")
        if self.loss == "infonce" and (self.hard_negatives or self.reference or self.families > 1):
            raise OptionError("--loss infonce has no --hard-negatives, --reference or --families: they are AnInfoNCE's")
        if self.families > 1 and self.reference:
            raise OptionError("--reference knows one family of positives: leave --families at 1")
        precisions(self.layout, self.dim, self.lowest, self.highest, self.families)


PRESETS: dict[str, Preset] = {
    "smoke": {"steps": 1500, "check": True},
    "default": {},
    "bimodal": {"layout": "bimodal"},
    "linear": {"layout": "linear"},
    "n10": {"dim": 10, "batch_size": 256, "steps": 6000, "lr": 1e-3, "lr_precision": 0.05},
    "paper": {
        "dim": 10, "sampler": "shell", "standardize": False, "reference": True, "batch_size": 1000, "steps": 300_003, "lr": 1e-4,
        "lr_precision": 1e-3, "schedule": "constant",
    },
    "shell": {"sampler": "shell"},
    "exact": {"sampler": "exact"},
    "infonce": {"loss": "infonce"},
    "hard-negatives": {"hard_negatives": 1.0},
    "ensemble": {"families": 2},
}  # fmt: skip


class Contrast(nn.Module):
    """Encoder and loss: inputs of anchors and positives [N, families, n] -> the loss of all processes' rows, a scalar.

    The encoder is the paper's: six hidden layers, 10, 50, 50, 50, 50 and 10 times as wide as its input.
    Attributes: precision, learned, [families, n]; that of infonce is one over its temperature.
    """

    def __init__(self, config: AnisotropicConfig) -> None:
        super().__init__()
        n = config.dim
        self.encoder = mlp([n, 10 * n, *[50 * n] * 4, 10 * n, n])
        self.loss: NTXent | AnInfoNCE | AnInfoNCEEnsemble
        if config.loss == "infonce":
            self.loss = NTXent(config.temperature, learnable=config.learn_temperature)
        elif config.families > 1:
            self.loss = AnInfoNCEEnsemble(n, config.families, hard_negatives=config.hard_negatives)
        else:
            self.loss = AnInfoNCE(n, hard_negatives=config.hard_negatives, reference=config.reference)
        self.dim = n

    @property
    def precision(self) -> Tensor:
        if isinstance(self.loss, NTXent):
            return torch.as_tensor(1 / self.loss.temperature).detach().float().expand(1, self.dim)
        return torch.atleast_2d(self.loss.precision.detach())

    @torch.no_grad()
    def standardize(self, inputs: Tensor) -> None:
        """Begin with embeddings of these inputs [N, n] all over the sphere; a fixed first layer whitens inputs from now on.

        The mixing leaves some directions of its outputs a tenth as wide as others, which are then learned late. And a deep
        network gives nearly the same vector for all inputs at the start; seen from the origin that is a point, and
        training may have to fold the sphere, for good, to spread it. So the embeddings get mean 0, and about unit length.
        """
        mean, covariance = inputs.double().mean(0), torch.cov(inputs.double().T)
        value, vector = torch.linalg.eigh(covariance)
        whiten = nn.utils.skip_init(nn.Linear, self.dim, self.dim).requires_grad_(False)
        whiten.weight.copy_((vector * value.rsqrt()) @ vector.T)
        whiten.bias.copy_(-whiten.weight.double() @ mean)
        self.encoder.insert(0, whiten)
        found = self.encoder(inputs)
        size = (found - found.mean(0)).norm(dim=-1).mean()
        last: Any = self.encoder[-1]
        last.bias.sub_(found.mean(0)).div_(size)
        last.weight.div_(size)

    def forward(self, anchor: Tensor, positive: Tensor) -> Tensor:
        # one gathering for both views: the loss has every row of the batch among its negatives
        views = gather_rows(self.encoder(torch.stack([anchor, positive], 1)))
        pairs = [(views[:, 0, k], views[:, 1, k]) for k in range(views.shape[2])]
        return self.loss(pairs) if isinstance(self.loss, AnInfoNCEEnsemble) else self.loss(*pairs[0])


class Judge:
    """The metrics of an encoder on fresh latents, z uniform on the sphere: the same ones for every round of a training."""

    def __init__(self, module: Contrast, network: nn.Module, truth: Tensor, config: AnisotropicConfig) -> None:
        self.module, self.network, self.truth, self.config = module, network, truth, config

    def recovery(self, repeat: int = 0, mixed: bool = False) -> Record:
        """R^2 in-sample as the paper's code, R^2 on rows not fitted on, MCC; of the inputs themselves if `mixed`."""
        config, device = self.config, next(self.module.parameters()).device
        z = uniform_directions(JUDGED, config.dim, step_generator(config.seed, JUDGING, repeat))
        found = self.network(z.float())
        if not mixed:
            with torch.no_grad():
                found = functional.normalize(self.module.encoder(found.to(device)), dim=-1).cpu()
        half = random_half(JUDGED, np.random.default_rng([config.seed, repeat]))
        return {
            "r2": linear_r2(found, z),
            "r2_held_out": linear_r2(found, z, fitted=half),
            "mcc": mean_correlation(found, z)[0],
        }

    def __call__(self) -> Record:
        learned = self.module.precision.cpu()
        both = [precision_recovery(a, b) for a, b in zip(learned, self.truth, strict=True)]
        each = {f"precision_{k}_{i}": float(v) for k, one in enumerate(both) for i, v in enumerate(one.learned)}
        return {**self.recovery(), "precision_error": max(float(one.relative_error.max()) for one in both), **each}


def run(config: AnisotropicConfig) -> None:
    """Train once and report; raises PosthocError, if asked to check, where R^2 stays below `LEARNT`."""
    run = Run("anisotropic", config)
    truth = precisions(config.layout, config.dim, config.lowest, config.highest, config.families)
    network = mixing(config.dim, config.mixing_layers, step_generator(config.seed, MIXING))
    batch = Pairs(
        truth, network, config.batch_size, run.launch, (config.seed, TRAINING), config.sampler, config.threshold
    )
    module = seeded_module(lambda: Contrast(config), config.seed, WEIGHTS)
    if config.standardize:
        start = uniform_directions(JUDGED, config.dim, step_generator(config.seed, START))
        module.standardize(network(start.float()))
    lr_loss = config.lr_precision or (0.05 if config.loss == "infonce" else 0.2)
    optimizer = torch.optim.Adam(
        [
            {"params": [p for p in module.encoder.parameters() if p.requires_grad], "lr": config.lr},
            {"params": module.loss.parameters(), "lr": lr_loss},
        ]
    )
    batch(0)
    acceptance = batch.acceptance  # of the first batches: of all of them a continued run knows no more
    judge = Judge(module, network, truth / (1 + config.hard_negatives), config)
    plan = Plan(
        name="train",
        steps=config.steps,
        every=config.every,
        batch=lambda step: tuple(part.to(run.device) for part in batch(step)),
        evaluate=judge,
        folder=config.output,
        signature=run.signature,
        observe=run.observe("train", config.steps),
    )
    history = run_plan(module, optimizer, scheduled(config.schedule, optimizer, config.steps, WARMUP), plan)
    results = summary(judge, acceptance, history.records[-1], config.steps / history.seconds)
    if run.launch.is_main:
        draw(config.output, history.records, module.precision, judge.truth)
        print(table(results))
    run.finish(results)
    reached = results["latents"]["r2_held_out"]["mean"]
    if config.check and reached < LEARNT:
        raise PosthocError(f"R^2 is {reached:.3f} after {config.steps} steps; expected {LEARNT} or more")


def summary(judge: Judge, acceptance: float, last: Record, speed: float) -> dict[str, Any]:
    """What results.json says: mean and standard deviation over fresh latents, of the embedding and of the inputs."""
    found = [judge.recovery(repeat + 1) for repeat in range(REPEATS)]
    columns = {name: [one[name] for one in found] for name in found[0]}
    return {
        "latents": {name: {"mean": float(np.mean(v)), "std": float(np.std(v))} for name, v in columns.items()},
        "inputs": judge.recovery(mixed=True),
        "precision": {
            "learned": judge.module.precision.sort().values.tolist(),
            "expected": judge.truth.sort().values.tolist(),
            "worst_relative_error": last["precision_error"],
        },
        "train_loss": last["train_loss"],
        "acceptance": acceptance,
        "steps_per_second": round(speed, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The recipe as a command; preset `images` is `anisotropic_images`'s."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    named, rest = presets_named(words)
    if "images" in named:
        from . import anisotropic_images  # which needs torchvision

        others = [name for name in named if name != "images"]
        anisotropic_images.main([*(["--preset", *others] if others else []), *rest])
        return
    known = {**PRESETS, "images": {}}  # so that --help and a suggestion for a mistyped name know it
    running.main("anisotropic", AnisotropicConfig, known, run, __doc__, "--batch-size or --dim", words)


if __name__ == "__main__":
    main()
