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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.errors import PosthocError
from ..adapters.losses.tau import temperature
from ..adapters.training_loop import History, Record, step_generator
from ..eval.dataset_classes import CLASSES
from . import running
from .image_sets import other_sets
from .pretraining import (
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
    check_judged,
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
from .tau_options import PRESETS, TauConfig, check_part
from .tau_posthoc import run_posthoc
from .tau_report import draw, table
from .tau_scores import means, odin, uncertainties
from .view_batches import CHUNK, Augmented, Images, ViewBatches, fixed_views

NETWORK, MEMBER = 603, 604  # places of the random numbers
GAIN = 0.01
"""How much better than random features the linear evaluation must be for --check, in shares of the test images."""


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

    Raises OptionError for options that would not be read, DataError, before the training, for data that are too few to judge
    it, and PosthocError, if asked to check, where linear evaluation is no better than that of random features.
    """
    check_part(config)
    run = Run("tau", config)
    if config.backbone is not None:
        return run_posthoc(config, run)
    train, held_out, test = open_images(config)
    check_judged(train.label[: config.probe_images], test.label, config.dataset, config.seed, papers=False)
    judged = Judged(train, test, *other_sets(config.dataset, config.data_dir, config.ood_images, test))
    sets = (train, held_out, test, *judged.others.values())
    run.stands_on(*judged.others, *(array for one in sets for array in (one.pixels.numpy(), one.label)))
    members: list[Member] = []
    measured: dict[str, Any] = {}
    for number in range(config.members):
        member, rates = train_member(config, run, number, train, held_out)
        members.append(member)
        measured = measured or rates
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
