"""CIFAR-10H: does the concentration of a learned posterior follow people's doubts about an image?

    accelerate launch -m posthoc.recipes.cifar10h --data-dir DATA --output runs/cifar10h

Took 26 minutes for the five folds with ResNet-20, on one thread of two cores that other processes used (.8 s a step of 128
images). To expect, seed 0, all 10,000 test images out of fold: Spearman of 1/kappa with the votes' entropy .399 (entropy of
the softmax .359), with what a crop cuts away .76 (1/feature-norm .59), recall@1 .889 (the backbone's features .882).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..adapters.backbone import Backbone
from ..adapters.errors import OptionError, PosthocError
from ..adapters.features import Features
from ..eval.datasets import default_data_dir
from .cifar10h_data import (
    LEAST_ROWS,
    SETS,
    STORED_CROP,
    CifarH,
    FeatureInputs,
    ImageInputs,
    Inputs,
    Labels,
    crop_fractions,
    cropped,
    fetch_cifar10,
    five_sets,
    fold_rows,
    load_cifar10h,
    load_training,
    one_hot,
)
from .cifar10h_networks import (
    Parametrization,
    PosteriorNetwork,
    SoftClassifier,
    cifar_backbone,
    features_of,
    log_kappa_range,
    statistics,
    trainable_copy,
)
from .cifar10h_report import Fold, Judged, judge
from .cifar10h_training import ELK, SOFT, Step, Watch, answer, check_distinct, check_rows, make_loss, train_fold
from .options import Preset, RecipeConfig, check_below_one, check_counts, check_least, check_paper_fit, check_positive
from .running import Run, main, row_blocks, seeded_module

NETWORK = 303  # place of the random numbers


@dataclass(kw_only=True)
class Cifar10HConfig(RecipeConfig):
    """Options of the CIFAR-10H experiment."""

    output: Path = Path("runs/cifar10h")
    """folder of the run"""
    data_dir: Path | None = None
    """folder of CIFAR-10, CIFAR-10H's votes and weights; default $POSTHOC_DATA, else ~/.cache/posthoc/data"""
    labels: Path | None = None
    """.npy file of the votes, shares or counts [10000, 10], where it is not in --data-dir"""
    images: str = "cifar10"
    """a data set of the hub in CIFAR-10's test order instead of the files in --data-dir"""
    download: bool = False
    """let torchvision fetch CIFAR-10 into --data-dir"""
    rows: int | None = None
    """only the first so many test images, for a quick try"""
    variant: Literal["finetune", "posthoc"] = "finetune"
    """train the whole network, or on its stored features"""
    backbone: str = "resnet20"
    """resnet20, resnet56, or a timm name, which gets a stem for 32 px"""
    checkpoint: Path | None = None
    """weights that were trained on CIFAR-10; those of resnet20 and 56 are looked for in --data-dir"""
    scratch: bool = False
    """begin with random weights, with GroupNorm in the place of BatchNorm"""
    train_on: Labels = "soft"
    """soft: the votes; hard: the most frequent vote; train-hard: CIFAR-10's own training images and labels"""
    loss: Literal["mcinfonce", "elk", "hib", "soft-cross-entropy"] = "elk"
    """what posteriors are trained by; soft-cross-entropy trains the classifier instead, whose entropy is then the score"""
    parametrization: Parametrization = "network"
    """kappa from a small network on the features, or from the embedding's norm (the paper)"""
    dim: int = 10
    """dimensions of the embedding: about as many as there are classes; fewer hold them apart less well"""
    kappa: float = 8.0
    """concentration of the posteriors before training; change it to what training ends at where that is far away"""
    concentration: float = 1.0
    """inverse temperature of mcinfonce, which needs about 16; power of elk's kernel: 1 is the likelihood it is, 2 makes kappas
    smaller, .5 larger"""
    hib_scale: float = 2.0
    """a of hib, P(match) = sigmoid(a cosine + b): how steeply a match depends on the angle; the preset hib has 8, the paper 2"""
    hib_shift: float = 1.0
    """b of hib, the log odds of a match at a right angle: lower where most pairs are no match; the preset hib has -2"""
    learnable: bool = False
    """whether the loss's own numbers (--concentration, or a and b of hib) are trained too"""
    pairs: Literal["all", "drawn"] = "all"
    """all: every two rows of a block, by the probability that both show one class (elk only); drawn: a positive for each
    anchor, and negatives of it (the paper)"""
    samples: int = 32
    """Monte-Carlo samples of each posterior: more of them, less noise and more time (mcinfonce and hib)"""
    antithetic: bool = True
    """mirrored draws: those samples come in opposite pairs, for less noise (not with --reference)"""
    negatives: int = 32
    """negatives drawn for each anchor, out of its block: more of them, less noise and more time; 0: positives rolled by a row"""
    symmetric: bool = True
    """also the loss of each drawn pair turned round"""
    centred: bool = True
    """begin the projection at the features' principal directions, with a bias; else at Xavier's numbers (the paper)"""
    reference: bool = False
    """the losses as in the paper's code, with its sampler or its fitted normaliser"""
    head_steps: int = 500
    """steps of the head alone, on stored features, before the whole network trains (finetune of a trained backbone only); they
    are cheap: more of them leave the whole network less to do"""
    steps: int = 300
    """steps of the optimiser in each fold, where most of the time goes; more while validation figures still rise"""
    every: int = 100
    """steps between evaluations and checkpoints; fewer lose less to a kill and choose more finely, each costs a validation"""
    batch_size: int = 128
    """anchors of a step, over all processes, a multiple of --block for each; fewer need less memory. Where pairs are drawn,
    each anchor has a positive beside it"""
    block: int = 64
    """rows that are paired with each other, or are each other's negatives: a larger block has more pairs, but fewer processes
    can share a batch"""
    lr: float = 5e-4
    """learning rate of AdamW for the backbone, which posthoc leaves as it is; lower where recall falls while it trains"""
    head_lr: float | None = 3e-3
    """learning rate for all else, which begins from nothing and bears more; None: as --lr"""
    weight_decay: float = 0.01
    """how strongly AdamW pulls weights to 0; more where validation figures fall while the training loss does too"""
    warmup: float = 0.1
    """share of the steps in which a cosine's learning rate rises; more where the first steps diverge"""
    schedule: Literal["cosine", "halved"] = "cosine"
    """halved: constant, half of it in the second half of the steps (the paper)"""
    phases: Literal[0, 1] = 0
    """1: in the first half of the steps kappa gets no gradient and negatives are rolled (the paper)"""
    clip: float | None = 1.0
    """longest gradient of a step, longer ones are cut to it; lower where the loss jumps, None: never cut"""
    augment: bool = True
    """move training images by up to 4 px and mirror them"""
    crops: float = 0.07
    """share of the training images seen as random centre crops: more where kappa shall know crops, 0 where it need not"""
    keep: Literal["human", "crop", "loss"] = "human"
    """which evaluation's state is kept, by validation rows: human, the best rank correlation with the votes' entropy; crop, the
    best with the crop fraction (the paper); loss, the lowest loss"""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """which fifths are tested: one for a quick try, all for figures of every image; the paper's seed s is fold s"""
    resamples: int = 1000
    """resamples of the bootstrap: with more of them the ends of intervals are steadier, and take longer; a resumed run may
    have others"""
    cache_dir: Path | None = None
    """where features are kept; default: the feature store's folder"""

    @property
    def trains_head_first(self) -> bool:
        """Whether the head trains on stored features before the whole network does."""
        own = self.variant == "finetune" and not self.scratch and self.train_on != "train-hard" and self.loss != SOFT
        return own and self.head_steps > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "samples", "steps", "every", "batch_size")
        check_least(self, 0, "negatives", "head_steps", "weight_decay")
        check_least(self, 2, "dim", "block", "resamples")
        check_least(self, LEAST_ROWS, "rows")
        check_positive(self, "lr", "head_lr", "kappa", "concentration", "hib_scale", "clip")
        check_below_one(self, "warmup")
        if not self.folds or not set(self.folds) <= set(range(SETS)) or len(set(self.folds)) < len(self.folds):
            raise OptionError(
                f"--folds {' '.join(map(str, self.folds))} was given; expected different numbers of 0 to 4"
            )
        if self.batch_size % self.block:
            raise OptionError(f"--batch-size {self.batch_size} was given; expected a multiple of --block {self.block}")
        if self.parametrization == "network" and self.loss != SOFT:
            log_kappa_range(self.dim, self.kappa)
        check_paper_fit(self, "dim")
        if self.pairs == "all" and self.loss != SOFT and (self.loss != ELK or self.reference or self.phases):
            own = "" if self.loss == ELK else f"--preset {self.loss}, which draws them and has the loss's numbers, or "
            raise OptionError(
                f"--pairs all --loss {self.loss} --reference {self.reference} --phases {self.phases} was given; all pairs at "
                f"once are elk's, without the paper's switches: give {own}--pairs drawn"
            )
        if not 0 <= self.crops <= 1:
            raise OptionError(f"--crops {self.crops} was given; expected a share from 0 to 1")
        if self.variant == "posthoc" and (self.scratch or self.train_on == "train-hard"):
            raise OptionError("--variant posthoc stands on a trained network's features of the test images: neither --scratch "
                              "nor --train-on train-hard go with it")  # fmt: skip


def run(config: Cifar10HConfig) -> None:
    """Train a network for each fold, score all test images by networks that have not seen them, and judge the scores."""
    run = Run("cifar10h", config)
    row_blocks(config.batch_size, config.block, run.launch)
    data_dir = Path(config.data_dir or default_data_dir()).expanduser()
    if config.download:
        run.launch.on_main(lambda: fetch_cifar10(data_dir))
    data = load_cifar10h(data_dir, config.labels, config.images, config.rows)
    backbone = cifar_backbone(config.backbone, config.checkpoint, data_dir, config.scratch, config.seed)
    check_width(config, backbone.embedding_dim)
    more = load_training(data_dir, config.images) if config.train_on == "train-hard" else ()
    run.stands_on(data.images, data.votes, backbone.fingerprint("logits"), *more)
    sets = five_sets(len(data.images), config.seed)
    if config.train_on != "train-hard":
        check_rows(min(len(fold_rows(sets, fold)[0]) for fold in config.folds), config)
    backbone.to(run.device)
    fractions = crop_fractions(len(data.images), config.seed)
    crops = cropped(data.images, fractions)
    free = None
    if not config.scratch:
        free = tuple(_extract(config, backbone, one) for one in (data.images, crops, data.images[:, :, ::-1]))
    inputs, labels, training = _inputs(config, backbone, data, crops, more)
    features = _feature_inputs(config, backbone, data, crops) if config.trains_head_first else None
    given = Given(run, config, data, backbone, fractions, inputs, features, labels, training)
    folds = [one_fold(given, fold, *fold_rows(sets, fold)) for fold in config.folds]
    judged = Judged(data, fractions, folds, free, "fine-tuned entropy" if config.loss == SOFT else "1/kappa")
    run.finish(judge(judged, run.folder, run.launch, config.resamples, config.seed))


def check_width(config: Cifar10HConfig, features: int) -> None:
    """Raises OptionError where the projection is to begin at more principal directions than the features have."""
    if config.loss != SOFT and config.centred and config.dim > features:
        raise OptionError(
            f"--dim {config.dim} was given, and {config.backbone} has {features} features, at whose principal directions the "
            f"projection begins: give --dim {features} or less, or --no-centred"
        )


@dataclass(frozen=True)
class Given:
    """What all folds share. features: stored ones, where the head trains on them first; training: rows of `inputs` that
    all folds train on, where they are no test images."""

    run: Run
    config: Cifar10HConfig
    data: CifarH
    backbone: Backbone
    fractions: np.ndarray
    inputs: Inputs
    features: FeatureInputs | None
    labels: np.ndarray
    training: np.ndarray | None


def one_fold(given: Given, fold: int, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Fold:
    """Train the network of one fold, and what it answers."""
    config, run, inputs = given.config, given.run, given.inputs
    rows = train if given.training is None else given.training
    network = _network(config, given.backbone, inputs, rows).to(run.device)
    loss = make_loss(config)
    loss = None if loss is None else loss.to(run.device)

    def watched(inputs: Inputs, options: Cifar10HConfig) -> tuple[Step, Watch]:
        step = Step(network, loss, inputs, given.labels, rows, options)
        return step, Watch(step, validation, given.data.votes, given.fractions, options)

    step, watch = watched(inputs, config)
    first = watch()
    seconds = 0.0
    if given.features is not None:
        whole, network.backbone = network.backbone, nn.Identity()
        alone = replace(config, steps=config.head_steps, every=config.head_steps)
        seconds = train_fold(run, *watched(given.features, alone), rows, fold, "-head").seconds
        network.backbone = whole
    history = train_fold(run, step, watch, rows, fold)
    best = history.records[history.best]
    if config.check and not best["human_spearman"] > max(first["human_spearman"], 0.1):
        raise PosthocError(
            f"fold {fold}: the rank correlation with the votes' entropy is {best['human_spearman']:.3f} after training and "
            f"{first['human_spearman']:.3f} before: nothing was learned"
        )
    known, tested = answer(network, inputs, validation), answer(network, inputs, test)
    check_distinct(tested, fold)
    crops = answer(network, inputs, test, crop=True)
    mirrored = None
    if isinstance(inputs, ImageInputs):
        mirrored = [answer(network, inputs, part, mirrored=True) for part in (validation, test)]
    return Fold(validation, test, first, history, seconds + history.seconds, known, tested, crops, mirrored)


def _inputs(
    config: Cifar10HConfig, backbone: Backbone, data: CifarH, crops: np.ndarray, more: tuple[np.ndarray, ...]
) -> tuple[Inputs, np.ndarray, np.ndarray | None]:
    """What networks are given, labels [N, C], and the rows to train on where they are not test images (else None).

    more: training images and their classes, where they are trained on.
    """
    images, classes = data.images, data.votes.shape[1]
    labels = data.votes if config.train_on == "soft" else one_hot(data.label, classes)
    if config.variant == "posthoc":
        return _feature_inputs(config, backbone, data, crops), labels, None
    training = None
    if more:
        pixels, label = more
        training = len(images) + np.arange(len(pixels))
        images = np.concatenate([images, pixels])
        labels = np.concatenate([labels, one_hot(label, classes)])
    return ImageInputs(images, crops, *statistics(config.backbone)), labels, training


def _feature_inputs(config: Cifar10HConfig, backbone: Backbone, data: CifarH, crops: np.ndarray) -> FeatureInputs:
    others = cropped(data.images, crop_fractions(len(data.images), config.seed, STORED_CROP))
    return FeatureInputs(*(_extract(config, backbone, one).embedding for one in (data.images, crops, others)))


def _network(config: Cifar10HConfig, backbone: Backbone, inputs: Inputs, rows: np.ndarray) -> Any:
    """A fold's network before training, the same in every process."""
    own: nn.Module = nn.Identity() if config.variant == "posthoc" else trainable_copy(backbone)
    if config.loss == SOFT:
        return SoftClassifier(own, backbone.classifier())

    def make() -> nn.Module:
        network = PosteriorNetwork(
            own,
            backbone.embedding_dim,
            config.dim,
            config.parametrization,
            config.kappa,
            config.centred,
            untrained=config.scratch,
        )
        sample = rows[:: max(1, len(rows) // 2000)]
        with torch.no_grad():
            device = backbone.device
            parts = [features_of(own, inputs.whole(part).to(device)).cpu() for part in np.array_split(sample, 16)]
        network.start(torch.cat(parts))
        return network

    return seeded_module(make, config.seed, NETWORK)


def _extract(config: Cifar10HConfig, backbone: Backbone, images: np.ndarray) -> Features:
    return backbone.extract(images, cache_dir=config.cache_dir, progress=False)


DRAWN: Preset = {"pairs": "drawn", "batch_size": 64, "block": 32}
"""As many images a step as with all pairs: each anchor has its positive beside it."""
MCINFONCE: Preset = {
    **DRAWN, "loss": "mcinfonce", "concentration": 16.0, "kappa": 38.0, "negatives": 16, "head_lr": 1e-3,
}  # fmt: skip
PAPER: Preset = {
    **MCINFONCE,
    "backbone": "resnet18",
    "parametrization": "norm",
    "centred": False,
    "dim": 8,
    "kappa": 16.0,
    "samples": 128,
    "negatives": 32,
    "symmetric": False,
    "head_steps": 0,
    "steps": 100_000,
    "every": 500,
    "batch_size": 128,
    "block": 64,
    "lr": 1e-4,
    "head_lr": None,
    "schedule": "halved",
    "phases": 1,
    "clip": None,
    "reference": True,
    "antithetic": False,
    "augment": False,
    "crops": 0.0,
    "keep": "crop",
    "folds": (0,),
}
PRESETS: dict[str, Preset] = {
    "default": {},
    "smoke": {
        "rows": 1000, "folds": (0,), "head_steps": 100, "steps": 8, "every": 4, "batch_size": 64, "block": 32, "resamples": 100,
        "check": True,
    },
    "mcinfonce": MCINFONCE,
    "hib": {**DRAWN, "loss": "hib", "kappa": 38.0, "hib_scale": 8.0, "hib_shift": -2.0, "head_lr": 1e-3},
    "soft-cross-entropy": {"loss": "soft-cross-entropy"},
    "posthoc": {"variant": "posthoc", "steps": 500, "crops": 0.0},
    "paper": PAPER,
    "paper-elk": {**PAPER, "loss": "elk", "concentration": 32.0, "kappa": 32.0, "negatives": 1, "phases": 0},
    "paper-hib": {**PAPER, "loss": "hib", "kappa": 32.0, "negatives": 0},
    "paper-hard": {**PAPER, "train_on": "hard", "dim": 16, "negatives": 0, "phases": 0},
    "paper-train-hard": {**PAPER, "train_on": "train-hard", "concentration": 64.0, "kappa": 64.0, "negatives": 0},
}  # fmt: skip


def command(arguments: Sequence[str] | None = None) -> None:
    """`python -m posthoc.recipes.cifar10h`."""
    main("cifar10h", Cifar10HConfig, PRESETS, run, __doc__, "--batch-size, --samples or --negatives", arguments)


if __name__ == "__main__":
    command()
