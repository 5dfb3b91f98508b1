"""MCInfoNCE's controlled experiment: does the loss find the true posteriors, up to a rotation?

    accelerate launch -m posthoc.recipes.synthetic --preset smoke --output runs/smoke      # try this first: half a minute
    accelerate launch -m posthoc.recipes.synthetic --output runs/synthetic --seed 4

The default takes 7 to 8 minutes on one core of a shared machine (41 steps a second for the means, 26 for the
concentrations), 1.2 GB of memory, and some seconds once for the process. To expect over seeds 4 to 8: rank correlations
with the truth of .985 +- .013 (pairwise cosines) and .871 +- .057 (concentrations), and .931 +- .022 of the latents in the
encoder's 95 % caps. docs/recipes.md says what limits them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.distributed import Launch
from ..adapters.errors import OptionError, PosthocError
from ..adapters.losses import ExpectedLikelihoodKernel, HedgedInstance, MCInfoNCE
from ..adapters.training_loop import History, Plan, run_plan, step_generator
from ..adapters.vmf import VonMisesFisher
from .encoders import VmfEncoder, paper_encoder
from .options import Preset, RecipeConfig, check_counts, check_paper_fit, check_positive
from .running import Run, main, row_blocks, scheduled, seeded_module
from .synthetic_process import CALIBRATION, Batches, Family, Process, ProcessConfig, make_process
from .synthetic_report import Truth, draw_plots, final_figures, round_figures, table

BLOCK = 64
"""Rows of a batch that share a generator: so many rows, or a multiple, are a process's share."""
WARMUP = 0.05
"""Share of the steps before the cosine."""
ENCODER, FIXED, TRAINING = 100, 101, 102  # places of the random numbers, beyond those of the process


@dataclass(kw_only=True)
class SyntheticConfig(RecipeConfig):
    """Options of the controlled experiment."""

    output: Path = Path("runs/synthetic")
    """folder of the run"""
    loss: Literal["mcinfonce", "elk", "hib"] = "mcinfonce"
    """MCInfoNCE, the expected likelihood kernel, or hedged instance embeddings"""
    input_dim: int = 10
    """D of the images x, uniform on [0, 1]^D"""
    latent_dim: int = 10
    """d of the true latents on the sphere S^(d-1)"""
    encoder_dim: int = 10
    """d of the encoder's posteriors"""
    family: Family = "vmf"
    """of the true posteriors: vmf, gaussian or laplace (the last two projected on the sphere)"""
    kappa_low: float = 16.0
    """smallest true concentration"""
    kappa_high: float = 32.0
    """largest true concentration; inf: no ambiguity at all"""
    kappa_positive: float = 20.0
    """how near to its latent an image's positives lie: the concentration of that match"""
    spread: float = 0.5
    """a process is accepted when some pair of its means has a cosine below this"""
    process_width: int = 10
    """width of the hidden layers of the process's networks; wider ones make smoother posteriors"""
    process_hidden: int = 1
    """layers between the first and the last of the process's mean network; more of them bend the means more"""
    shared_backbone: bool = False
    """whether concentrations, true and learned, are functions of the mean direction"""
    acceptance: Literal["exact", "paper"] = "exact"
    """constant of the positives' acceptance; paper: its fit, 1.65 nats off at d = 10"""
    sampler: Literal["exact", "paper"] = "exact"
    """of the process; paper: its sampler, which misses its concentration above 10 dimensions unless kappa >> d"""
    encoder_kappa_low: float = 16.0
    """smallest concentration of the encoder at the start"""
    encoder_kappa_high: float = 32.0
    """largest concentration of the encoder at the start"""
    encoder_width: int = 0
    """width of the encoder's hidden layers; 0: the paper's, 10, 50 and 10 times what a network gives out, which is slower"""
    encoder_hidden: int = 6
    """layers between the encoder's first and last"""
    samples: int = 128
    """Monte-Carlo samples of the loss for each posterior: more of them, less noise and more time"""
    concentration: float | None = None
    """inverse temperature of mcinfonce, power of elk's kernel; None: --kappa-positive, as in the paper"""
    antithetic: bool = True
    """whether those samples come in mirrored pairs, for less noise (exact sampler only)"""
    reference: bool = False
    """the loss as in the paper's code, with its sampler or its fitted normaliser"""
    negatives: int = 16
    """for each anchor of the concentrations' half phases; 0: the positives of other rows"""
    mean_negatives: int = 0
    """for each anchor of the means' half phases"""
    negative_weight: float | None = None
    """of each negative in mcinfonce; 1 is least at the truth, None (1 over their number, the paper's) with one negative only"""
    hib_scale: float = 1.0
    """a of hib, P(match) = sigmoid(a cosine + b): 20 with b = -8 does not collapse here, the paper's 1 and 0 do"""
    hib_shift: float = 0.0
    """b of hib"""
    learnable: bool = False
    """whether the loss's concentration (a and b of hib) is trained too"""
    phases: int = 1
    """rounds of training first the means, then the concentrations; 0: both at once, for twice the steps"""
    steps: int = 50_000
    """optimiser steps of each half of a phase; most of the time goes here"""
    kappa_steps: int | None = None
    """of the concentrations' half; None: as many as of the means'"""
    batch_size: int = 128
    """rows of a step, over all processes: a multiple of 64 for each"""
    lr: float = 1e-4
    """learning rate of Adam; lower it where cosines fall again"""
    schedule: Literal["halved", "cosine"] = "halved"
    """halved: the paper's steps; cosine: a rise over a twentieth of the steps, then down to 0, in each half phase"""
    every: int = 500
    """steps between evaluations and checkpoints"""
    eval_rows: int = 2000
    """images of an evaluation: all their pairs are compared"""
    cache_dir: Path | None = None
    """where processes are kept; default: a folder of the feature store"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa_steps is not None and self.kappa_steps < 1:
            raise OptionError(f"--kappa-steps {self.kappa_steps} was given; expected at least 1")
        check_counts(self, "input_dim", "encoder_hidden", "samples", "steps", "batch_size", "every")
        if (
            self.encoder_dim < 2
            or min(self.negatives, self.mean_negatives) < 0
            or self.phases < 0
            or self.encoder_width < 0
        ):
            raise OptionError(
                f"--encoder-dim {self.encoder_dim} --negatives {self.negatives} --mean-negatives {self.mean_negatives} --phases "
                f"{self.phases} --encoder-width {self.encoder_width} was given; expected 2 dimensions or more, none negative"
            )
        if self.concentration is not None:
            check_positive(self, "concentration")
        check_paper_fit(self, "encoder_dim")
        if self.eval_rows < 2 * self.latent_dim + 4:
            raise OptionError(f"--eval-rows {self.eval_rows} was given; expected {2 * self.latent_dim + 4} or more")
        if not 0 < self.encoder_kappa_low <= self.encoder_kappa_high or not 0 < self.lr < math.inf:
            raise OptionError(
                f"--encoder-kappa-low {self.encoder_kappa_low} --encoder-kappa-high {self.encoder_kappa_high} --lr {self.lr} "
                "was given; expected 0 < low <= high and a positive lr"
            )

    def process(self) -> ProcessConfig:
        return ProcessConfig(
            inputs=self.input_dim,
            dim=self.latent_dim,
            family=self.family,
            lowest=self.kappa_low,
            highest=self.kappa_high,
            spread=self.spread,
            hidden=self.process_hidden,
            width=self.process_width,
            shared=self.shared_backbone,
            positive=self.kappa_positive,
            constant=self.acceptance,
            sampler=self.sampler,
            seed=self.seed,
        )


class SyntheticStep(nn.Module):
    """The loss of this process's share of one fresh batch, as a module that the training loop trains."""

    def __init__(
        self, encoder: VmfEncoder, criterion: nn.Module, process: Process, config: SyntheticConfig, launch: Launch
    ) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder, criterion
        self.position, self.blocks = (config.seed, TRAINING), row_blocks(config.batch_size, BLOCK, launch)
        # no module, as the process is no part of what is trained and stored
        self.batches = Batches(process, self.blocks, BLOCK, self.position)

    def forward(self, stage: int, step: int, negatives: int) -> Tensor:
        drawn = self.batches(stage, step, negatives)
        # the networks see all images at once; the loss goes block by block, each with its own random numbers
        if negatives and isinstance(self.criterion, ExpectedLikelihoodKernel):  # which draws none: all blocks at once
            (parts,) = zip(*self._encode(drawn, len(drawn[0])), strict=True)
            return self.criterion(*parts)
        places = [(*self.position, stage, step, block, 1) for block in self.blocks]
        generators = [step_generator(*place, device=drawn[0].device) for place in places]
        losses = [self._loss(*block) for block in zip(*self._encode(drawn, BLOCK), generators, strict=True)]
        return torch.stack(losses).mean()

    def _encode(self, drawn: Sequence[Tensor | None], block: int) -> list[list[Any]]:
        """The posteriors of each block, for anchors, positives and negatives; None for those that are not there."""
        images = [x for x in drawn if x is not None]
        sizes = [x[..., 0].numel() for x in images]
        found = self.encoder(torch.cat([x.flatten(0, -2) for x in images]))
        means, kappas = found.mean_direction.split(sizes), found.concentration.split(sizes)
        posteriors: list[list[Any]] = [
            _in_blocks(mean.unflatten(0, x.shape[:-1]), kappa.unflatten(0, x.shape[:-1]), block)
            for x, mean, kappa in zip(images, means, kappas, strict=True)
        ]
        return [*posteriors, *[[None] * len(posteriors[0])] * (3 - len(posteriors))]

    def _loss(self, anchor: Any, positive: Any, negatives: Any, generator: torch.Generator) -> Tensor:
        if isinstance(self.criterion, ExpectedLikelihoodKernel):  # exact: nothing to draw
            return self.criterion(anchor, positive, negatives)
        return self.criterion(anchor, positive, negatives, generator)


def _in_blocks(mean: Tensor, kappa: Tensor, block: int) -> list[VonMisesFisher]:
    blocks = zip(mean.split(block), kappa.split(block), strict=True)
    return [VonMisesFisher(mu, size, validate_args=False) for mu, size in blocks]


def make_criterion(config: SyntheticConfig) -> nn.Module:
    """The loss of the options."""
    concentration = config.concentration or config.kappa_positive
    if config.loss == "elk":
        return ExpectedLikelihoodKernel(concentration, config.learnable, reference=config.reference)
    drawn: dict[str, Any] = {"antithetic": config.antithetic, "reference": config.reference}
    if config.loss == "hib":
        return HedgedInstance(config.hib_scale, config.hib_shift, config.samples, config.learnable, **drawn)
    return MCInfoNCE(concentration, config.samples, config.learnable, negative_weight=config.negative_weight, **drawn)


@dataclass(frozen=True)
class Stage:
    """A training with its own optimiser: what is trained, for how many steps, and how many phases lie before it.

    rate: the learning rate it begins with, as a share of the option's.
    """

    name: str
    trained: tuple[str, ...]
    steps: int
    rate: float
    negatives: int


def stages(config: SyntheticConfig) -> list[Stage]:
    """The half phases: means, then concentrations if they are finite; or both at once."""
    kappa_steps = config.steps if config.kappa_steps is None else config.kappa_steps
    whole = config.steps + kappa_steps
    if not config.phases:
        return [Stage("joint", ("mean", "concentration"), whole, 1.0, config.negatives)]
    found = []
    for phase in range(config.phases):
        # "halved" goes on where the half phase before has ended: half the rate for each whole phase
        halved = [(phase * whole + before) / whole for before in (0, config.steps)]
        rate = [0.5**one if config.schedule == "halved" else 1.0 for one in halved]
        found.append(Stage(f"phase-{phase + 1}-mean", ("mean",), config.steps, rate[0], config.mean_negatives))
        if math.isfinite(config.encoder_kappa_high):
            found.append(Stage(f"phase-{phase + 1}-kappa", ("concentration",), kappa_steps, rate[1], config.negatives))
    return found


def _train(run: Run, config: SyntheticConfig, step: SyntheticStep, number: int, truth: Truth) -> History:
    """One stage; a finished one is only read back."""
    stage = stages(config)[number]
    parts = {"mean": step.encoder.mean, "concentration": step.encoder.concentration}
    step.requires_grad_(False)
    for part in (*(parts[name] for name in stage.trained), step.criterion):
        part.requires_grad_(True)
    if math.isinf(config.encoder_kappa_high):  # it has no part in the loss
        step.encoder.concentration.requires_grad_(False)
    trained = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr * stage.rate)
    plan = Plan(
        name=stage.name,
        steps=stage.steps,
        every=config.every,
        batch=lambda i: (number, i, stage.negatives),
        evaluate=lambda: round_figures(step.encoder, truth),
        folder=run.folder,
        signature=run.signature,
        observe=run.observe(stage.name, stage.steps),
    )
    return run_plan(step, optimizer, scheduled(config.schedule, optimizer, stage.steps, WARMUP), plan)


def run(config: SyntheticConfig) -> dict[str, Any]:
    """The whole experiment; returns what results.json holds under `figures`."""
    run = Run("synthetic", config)
    row_blocks(config.batch_size, BLOCK, run.launch)  # before a process is built
    run.launch.on_main(lambda: make_process(config.process(), config.cache_dir) and None)
    process = make_process(config.process(), config.cache_dir).to(run.device)  # stored by now, where disks are shared
    encoder = seeded_module(
        lambda: paper_encoder(
            config.input_dim, config.encoder_dim, config.encoder_width, config.encoder_hidden, config.shared_backbone
        ),
        config.seed,
        ENCODER,
    )
    inputs = process.images_alone(CALIBRATION, step_generator(config.seed, ENCODER, 1))
    encoder.to(run.device)
    encoder.calibrate(inputs, config.encoder_kappa_low, config.encoder_kappa_high)
    truth = Truth.of(process, config.eval_rows, step_generator(config.seed, FIXED))
    step = SyntheticStep(encoder, make_criterion(config).to(run.device), process, config, run.launch)
    start = round_figures(encoder, truth)
    histories = {stage.name: _train(run, config, step, i, truth) for i, stage in enumerate(stages(config))}
    figures = final_figures(encoder, truth, step_generator(config.seed, FIXED, 1))
    seconds = {name: round(history.seconds, 1) for name, history in histories.items()}
    run.launch.on_main(lambda: draw_plots(run.folder, encoder, truth, start, histories))
    run.launch.on_main(lambda: print(table(start, figures)))
    parameters = {name: float(value) for name, value in step.criterion.named_parameters()}
    run.finish({"figures": figures, "start": start, "training_seconds": seconds, "loss_parameters": parameters})
    if config.check and not figures["cosines_spearman"] > start["cosines_spearman"] + 0.1:
        raise PosthocError(
            f"nothing was learnt: the rank correlation of cosines went from {start['cosines_spearman']:.3f} to "
            f"{figures['cosines_spearman']:.3f}"
        )
    return figures


_OURS: Preset = {"encoder_width": 64, "encoder_hidden": 2, "schedule": "cosine", "lr": 2e-3, "batch_size": 128,
                 "samples": 16, "negatives": 32, "mean_negatives": 4, "negative_weight": 1.0}  # fmt: skip
PRESETS: dict[str, Preset] = {
    "smoke": {**_OURS, "steps": 150, "every": 50, "eval_rows": 500, "check": True},
    "default": {**_OURS, "steps": 16_000, "kappa_steps": 1500},
    "paper": {"eval_rows": 10_000, "acceptance": "paper", "sampler": "paper", "reference": True,
              "antithetic": False},
    "ambiguous": {"batch_size": 512, "samples": 512, "negatives": 32},
    "clear": {"kappa_low": 64.0, "kappa_high": 128.0},
    "injective": {"kappa_low": math.inf, "kappa_high": math.inf},
    "elk": {"loss": "elk", "concentration": 1.0},
    "hib": {"loss": "hib", "hib_scale": 20.0, "hib_shift": -8.0},
    "paper-elk": {"loss": "elk", "phases": 0, "negatives": 1},
    "paper-hib": {"loss": "hib", "phases": 0, "negatives": 0},
    "2d": {"input_dim": 2, "latent_dim": 2, "encoder_dim": 2, "negatives": 1, "mean_negatives": 1, "steps": 4096},
    "gaussian": {"family": "gaussian"},
    "laplace": {"family": "laplace"},
    "shared-backbone": {"shared_backbone": True},
}  # fmt: skip
"""Sizes (smoke, default, paper), and what is laid on a size: elk and hib as they do not collapse on default, and the paper's
scripts."""


def _script(batch_size: int, samples: int, negatives: int, **options: Any) -> Preset:
    return {"batch_size": batch_size, "samples": samples, "negatives": negatives, **options}


PRESETS |= {f"encoder-{d}": _script(512, 512, 32, encoder_dim=d) for d in (4, 8, 16)}
PRESETS |= {
    "encoder-32": _script(512, 512, 8, encoder_dim=32),
    "encoder-64": _script(512, 256, 8, encoder_dim=64),
    "encoder-128": _script(256, 256, 8, encoder_dim=128),
}
PRESETS |= {f"samples-{s}": {"samples": s} for s in (1, 4, 16, 64, 256)}
PRESETS |= {
    f"dim-{d}": _script(256, 256, 32 if d < 64 else 8, **dict.fromkeys(("input_dim", "latent_dim", "encoder_dim"), d))
    for d in (10, 16, 32, 40, 48, 56, 64, 128)
}


def command(arguments: Sequence[str] | None = None) -> None:
    """The recipe as a command."""
    main(
        "synthetic",
        SyntheticConfig,
        PRESETS,
        run,
        __doc__,
        "--batch-size, --negatives, --samples or --eval-rows",
        arguments,
    )


if __name__ == "__main__":
    command()
