"""TaU: does the temperature that a contrastive loss learns for each image say how uncertain its representation is?

    python -m posthoc.recipes.tau --output runs/tau
    accelerate launch -m posthoc.recipes.tau --method simclr --output runs/simclr
    python -m posthoc.recipes.tau --preset efficientnet-lite0 --output runs/lite0

A network is pretrained on CIFAR-10 without labels, by SimCLR or MoCo with a temperature for each image, by either without, or by
a baseline; then what its features know of the classes, and how well its scores tell other sets, are measured. Or the library's
temperature head is fitted on a frozen pretrained network.

A step of the default (128 images, two views) takes .3 s of one core, 4 epochs about 8 minutes. To expect of 340 steps of a
network half as wide (--width 16 --train-images 12000 --probe-images 6000 --ood-images 500): linear evaluation 43.1 %, of random
features 32.5 %; AUROC of the temperature .91 against MNIST, of kNN .08. `--preset smoke` takes 26 s of one core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.errors import OptionError, PosthocError
from ..adapters.losses.tau import temperature
from ..adapters.training_loop import History, Record, step_generator
from ..eval.dataset_classes import CLASSES
from . import running
from .image_sets import other_sets
from .options import Preset, check_counts, check_positive
from .pretraining import (
    PretrainingConfig,
    adamw,
    augmentation,
    open_images,
    own_view_found,
    pretrain,
    throughput,
)
from .pretraining_evaluation import (
    Encoded,
    certainty_grid,
    encode,
    ood_tables,
    picture_of,
    save_scores,
    settle,
    worth,
)
from .pretraining_networks import PretrainingNetwork, image_encoder, projection_head, synchronised
from .running import Run, seeded
from .tau_methods import UNCERTAIN, Batches, Method, make_method, with_dropout
from .tau_posthoc import run_posthoc
from .tau_report import draw, table
from .tau_scores import means, odin, uncertainties
from .view_batches import CHUNK, Augmented, Images, ViewBatches, fixed_views

Kind = Literal["tau", "simclr", "tau-moco", "moco", "hib", "supervised"]
NETWORK, MEMBER = 603, 604  # places of the random numbers
GAIN = 0.01
"""How much better than random features the linear evaluation must be for --check, in shares of the test images."""


@dataclass(kw_only=True)
class TauConfig(PretrainingConfig):
    """The options of this recipe."""

    output: Path = Path("runs/tau")
    """folder of the run"""
    method: Kind = "tau"
    """simclr or moco with temperatures (tau, tau-moco) or without; hib: Gaussian posteriors; supervised: by labels"""
    temperature: float = 0.1
    """t; of tau and tau-moco the lowest temperature"""
    include_positive: bool = False
    """whether tau's denominator has the positive pair too; without it the loss has no lower bound"""
    reference: bool = False
    """the loss as released: view-1's temperature in both numerators, 1e-6 in plain SimCLR's denominator; adds its kNN score.
    On a frozen network: one linear layer, t as given, and images of one class stay negatives"""
    queue: int = 4096
    """keys that moco keeps"""
    momentum: float = 0.99
    """share of itself that moco's second network keeps in a step"""
    dropout: float = 0.0
    """probability of dropping a channel, in training and in the passes that are scored; 0: none"""
    ood_images: int = 2000
    """at most so many images of each other set"""
    passes: int = 10
    """passes with dropout that an image is scored by"""
    members: int = 1
    """networks that are trained; the spread of several, aligned, is a score"""
    samples: int = 4
    """samples of a posterior of hib"""
    papers_probe: bool = False
    """also the paper's optimiser of the linear evaluation, on features of unaugmented images, and its nearest neighbour, by two
    augmented views of each training image"""
    backbone: str | None = None
    """a frozen pretrained network on which only a temperature head is fitted: a timm name, resnet20 or resnet56 (CIFAR-10's), or
    simclr, byol or clip"""
    checkpoint: Path | None = None
    """its weights (.safetensors or .pth); default: NAME.safetensors in the folder of the data, else timm's download"""
    random_weights: bool = False
    """random weights for it, to try the run"""
    positives: Literal["views", "labels"] = "views"
    """what the head takes as pairs"""
    views: int = 4
    """stored views of each image for the head"""
    test_images: int | None = None
    """at most so many test images that it scores; default: all"""
    cache_dir: Path | None = None
    """where its features are stored; default: the library's store"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "queue", "members", "samples", "views", "ood_images")
        check_positive(self, "temperature")
        if self.passes < 2:
            raise OptionError(f"--passes {self.passes} was given; expected 2 or more")
        for name in ("dropout", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} was given; expected a number from 0 to below 1")
        if self.include_positive and self.method != "tau":
            raise OptionError(f"--include-positive is an option of --method tau; {self.method} was given")
        if self.include_positive and self.reference:
            raise OptionError("--include-positive and --reference were given; the released configurations leave it out")


OF_A_HEAD = ("backbone", "checkpoint", "random_weights", "positives", "views", "test_images", "cache_dir")
OF_BOTH = (
    "output", "seed", "resume", "dataset", "data_dir", "train_images", "ood_images", "epochs", "lr", "batch_size",
    "reference", "temperature",
)  # fmt: skip
"""Options that a head on a frozen network reads; a pretraining reads all but `OF_A_HEAD`."""


def check_part(config: TauConfig) -> None:
    """Raises OptionError for options that the part of the recipe which is asked for does not read: of a whole command line,
    since presets are laid on one another."""
    other = [one.name for one in fields(config) if getattr(config, one.name) != one.default]
    if config.backbone is None:
        wrong = [name for name in other if name in OF_A_HEAD]
        which = "of a head on a frozen network: name the network with --backbone, or leave them out"
    else:
        wrong = [name for name in other if name not in OF_A_HEAD + OF_BOTH]
        which = f"of a pretraining: a head on a frozen network (--backbone {config.backbone}) has none of them"
    if wrong:
        given = ", ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in wrong)
        raise OptionError(f"{given}: options {which}")
    if config.backbone is not None and "temperature" in other and not config.reference:
        raise OptionError(
            f"--temperature {config.temperature} was given; a head chooses its own t by blur, but with --reference"
        )


PAPER: dict[str, Any] = {
    "network": "resnet18", "norm": "batch", "hidden": 512, "dim": 128, "batch_size": 128, "epochs": 200, "every": 10,
    "lr": 1e-4, "weight_decay": 0.0, "queue": 65536, "momentum": 0.999, "papers_probe": True, "throughput_steps": 50,
}  # fmt: skip
"""The released configurations of TaU. Their LARS and weight decay had no effect (docs/recipes.md), so there are none here."""

HEAD: dict[str, Any] = {"epochs": 6, "batch_size": 512}
"""About 500 steps on 50,000 images; 70 epochs are as many on 4,000."""

PRESETS: dict[str, Preset] = {
    "smoke": {
        "dataset": "fashion-mnist", "width": 16, "hidden": 128, "dim": 32, "train_images": 3500, "epochs": 5,
        "lr": 2e-3, "probe_images": 2000, "ood_images": 300, "throughput_steps": 3, "check": True,
    },
    "default": {},
    "paper": PAPER,
    "paper-simclr": {"method": "simclr", "lr": 1e-3},
    "cifar10": {"dataset": "cifar10"},
    "fashion-mnist": {"dataset": "fashion-mnist"},
    "tau": {"method": "tau"},
    "tau-moco": {"method": "tau-moco"},
    "moco": {"method": "moco"},
    "hib": {"method": "hib"},
    "mc-dropout": {"method": "simclr", "dropout": 0.5},
    "mc-dropout-supervised": {"method": "supervised", "dropout": 0.5},
    "ensemble": {"method": "simclr", "members": 5},
    "supervised": {"method": "supervised"},
    "reference": {"reference": True},
    "gpu": {
        "network": "resnet18", "norm": "batch", "epochs": 100, "every": 20, "batch_size": 512, "compile": True,
        "throughput_steps": 50,
    },
    **{name: {"backbone": name, **HEAD} for name in ("resnet50", "simclr", "byol", "clip", "resnet20", "resnet56")},
    **{
        f"efficientnet-lite{k}": {"backbone": f"tf_efficientnet_lite{k}", **HEAD, "train_images": 4000, "epochs": 70}
        for k in range(3)
    },
    "views": {"positives": "views"},
    "labels": {"positives": "labels"},
}  # fmt: skip


@dataclass
class Judged:
    """What networks are evaluated on: training and test images, other sets with notes, and ODIN of each set, if asked for."""

    train: Images
    test: Images
    others: dict[str, Images]
    notes: dict[str, str]
    live: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Member:
    """One trained network, how its training went, and what was watched of it before."""

    method: Method
    history: History
    before: Record


def run(config: TauConfig) -> None:
    """Pretrain, evaluate and report; or fit a temperature head on a frozen network.

    Raises OptionError for options that would not be read, and PosthocError, if asked to check, where linear evaluation is no
    better than that of random features.
    """
    check_part(config)
    run = Run("tau", config)
    if config.backbone is not None:
        return run_posthoc(config, run)
    train, held_out, test = open_images(config, run)
    members: list[Member] = []
    measured: dict[str, Any] = {}
    for number in range(config.members):
        member, rates = train_member(config, run, number, train, held_out)
        members.append(member)
        measured = measured or rates
    judged = Judged(train, test, *other_sets(config.dataset, config.data_dir, config.ood_images, test))
    if config.method == "supervised":
        named = {config.dataset: test, **judged.others}
        judged.live = odin(members[0].method.network, named, run.device, config.output / "features")
    results = run.launch.on_main(lambda: evaluate(config, run, members, judged))
    results = {**results, "throughput": measured}
    if run.launch.is_main:
        draw(config.output, [member.history.records for member in members], results)
        print(table(results))
    run.finish(results)
    gain = results["worth"]["linear"] - results["random_features"]["linear"]
    if config.check and gain < GAIN:
        raise PosthocError(
            f"after {config.epochs} epochs the linear evaluation is {gain:+.3f} beside that of random features; expected "
            f"{GAIN:+.3f} or more"
        )
    return None


def train_member(
    config: TauConfig, run: Run, number: int, train: Images, held_out: Images
) -> tuple[Member, dict[str, Any]]:
    """Train one network from weights of its own, on batches of its own; and its throughput, of the first one."""
    network = make_network(config, train, number)
    with seeded(config.seed, NETWORK, number, 1):
        method = make_method(network, config)
    method = synchronised(method, run.launch, run.device).to(run.device)
    if config.compile:
        network.encoder.compile()
    seed = step_generator(config.seed, MEMBER, number).initial_seed()
    supervised = config.method == "supervised"
    views = ViewBatches(
        train, augmentation(config), config.batch_size, seed, run.launch, run.device, 1 if supervised else 2
    )
    batches = Batches(views, train, supervised, network)
    pair = fixed_views(held_out, augmentation(config), seed, run.device)

    def watch() -> Record:
        return watched(method.network, config, pair, held_out)

    method.eval()
    with torch.no_grad():
        before = watch()
    name = "train" if config.members == 1 else f"train{number}"
    history = pretrain(run, method, batches, views.rows.each, adamw(method, config), watch, name)
    rates = throughput(run, method, batches) if number == 0 else {}
    method.eval()
    return Member(method, history, before), rates


def make_network(config: TauConfig, train: Images, number: int = 0) -> PretrainingNetwork:
    """The network by the options, for images such as these, with the random weights of a member."""
    channels, pixels = train.pixels.shape[1], train.pixels.shape[2]
    dim = config.dim + (config.method in UNCERTAIN)
    with seeded(config.seed, NETWORK, number):
        encoder = image_encoder(config.network, channels, pixels, config.norm, config.width, config.stem)
        if config.dropout:
            with_dropout(encoder.network, config.dropout)
        if config.method == "supervised":
            return PretrainingNetwork(encoder, nn.Linear(encoder.size, int(train.label.max()) + 1))
        return PretrainingNetwork(encoder, projection_head(encoder.size, config.hidden, dim, config.norm))


def watched(network: PretrainingNetwork, config: TauConfig, pair: tuple[Tensor, ...], held_out: Images) -> Record:
    """Of held-out images: the share whose other view is found, or that are classified rightly; and their temperatures."""
    first, second = (torch.cat([network(part)[1] for part in view.split(CHUNK)]).float().cpu() for view in pair)
    if config.method == "supervised":
        return {"held_out_accuracy": float((first.argmax(1).numpy() == held_out.label).mean())}
    dim = config.dim
    record = {"own_view_found": own_view_found(first[:, :dim], second[:, :dim])}
    if config.method in ("tau", "tau-moco"):
        tau = temperature(first[:, -1], config.temperature)
        low, middle, high = torch.quantile(tau, torch.tensor([0.05, 0.5, 0.95])).tolist()
        record |= {"tau_5": low, "tau_50": middle, "tau_95": high}
    return record


def evaluate(config: TauConfig, run: Run, members: Sequence[Member], judged: Judged) -> dict[str, Any]:
    """Everything that is asked of the trained networks, JSON-able; pictures of images go into the run's folder."""
    first, notes = members[0], judged.notes
    networks = [member.method.network for member in members]
    probed = judged.train.first(config.probe_images or len(judged.train))
    training = [encode(network, probed, run.device) for network in networks]
    encoded = encode(networks[0], judged.test, run.device)
    blank = make_network(config, judged.train).to(run.device)
    settle(blank, probed, run.device)
    blanks = (encode(blank, probed, run.device), encode(blank, judged.test, run.device))
    known = {
        "worth": worth_of(config, networks[0], probed, training[0], encoded, run.device),
        "random_features": worth_of(config, blank, probed, *blanks, run.device),
    }
    inside, outside = scored(config, networks, training, encoded, judged, run.device)
    save_scores(config.output / "scores", {config.dataset: inside, **outside})
    draw_ends(config, judged.test, inside)
    return {
        "method": config.method,
        **known,
        "held_out": {"before": first.before, "after": first.history.records[-1]},
        "ood": ood_tables(inside, outside, config.seed, notes),
        "not_read": {name: why for name, why in notes.items() if name not in judged.others},
        "scores": {name: _five_numbers(score) for name, score in inside.items()},
        "seconds_of_training": [round(member.history.seconds, 1) for member in members],
        "parameters": sum(p.numel() for p in networks[0].encoder.parameters()),
    }


def scored(
    config: TauConfig, networks: Sequence[PretrainingNetwork], training: Sequence[Encoded], test: Encoded,
    judged: Judged, device: torch.device,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:  # fmt: skip
    """Every score of the set's own test images, and of each other set's images."""
    inside = uncertainties(networks, training, judged.test, config, device)
    outside = {
        name: uncertainties(networks, training, images, config, device, test=test)
        for name, images in judged.others.items()
    }
    for name, score in judged.live.items():
        (inside if name == config.dataset else outside[name])["ODIN"] = score
    return inside, outside


def worth_of(
    config: TauConfig, network: PretrainingNetwork, probed: Images, train: Encoded, test: Encoded, device: torch.device
) -> dict[str, float]:
    """What a network's features are worth; with --papers-probe also by augmented views of the training images."""
    views = None
    if config.papers_probe:
        augmented = [Augmented(probed, augmentation(config), config.seed, view) for view in (0, 1)]
        views = [means(encode(network, one, device).projection, config) for one in augmented]
    return worth(_mean_only(train, config), _mean_only(test, config), config.seed, views, device)


def draw_ends(config: TauConfig, test: Images, scores: Mapping[str, np.ndarray]) -> None:
    """The most and the least certain test images by the method's own scores, or by neighbours where it has none."""
    own = [name for name in scores if name not in ("kNN", "1/feature-norm")] or ["kNN"]
    shown, words = {name: scores[name] for name in own}, CLASSES.get(config.dataset)
    certainty_grid(config.output / "certainty.png", picture_of(test), test.label, shown, words)


def _mean_only(one: Encoded, config: TauConfig) -> Encoded:
    return Encoded(one.feature, means(one.projection, config), one.label)


def _five_numbers(score: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(score, (0.0, 0.25, 0.5, 0.75, 1.0))]


def main(arguments: Sequence[str] | None = None) -> None:
    """The recipe as a command."""
    running.main("tau", TauConfig, PRESETS, run, __doc__, "--batch-size", arguments)


if __name__ == "__main__":
    main()
