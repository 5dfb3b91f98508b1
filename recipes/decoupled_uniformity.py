"""Decoupled Uniformity: pretraining that spreads images apart, those less that prior knowledge calls alike.

    python -m posthoc.recipes.decoupled_uniformity --output runs/uniformity
    accelerate launch -m posthoc.recipes.decoupled_uniformity --prior vae --output runs/vae
    accelerate launch -m posthoc.recipes.decoupled_uniformity --preset omniglot attributes --output runs/omniglot

A network is pretrained on CIFAR-10 without labels: every image's views are averaged, the averages driven apart. With a prior
each average is first smoothed by a kernel over what is known of the images, so that alike ones are not driven apart. Then what
its features know of the classes is measured beside random features, and which priors have seen labels is told.

`--preset smoke` (FashionMNIST, 140 steps of 128 images, a network half as wide, t 5) takes 31 s of one core: linear
evaluation 76.2 %, with --prior vae --vae-epochs 3 77.4 % (46 s), of random features 73.0 %. Of 100 such steps the gain is 3.7
points with t 5, and 1.5 with t 2, which is the paper's and the default. A default run (764 steps of 256 images of CIFAR-10)
has not been measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm.optim
import torch
from torch import Tensor, nn

from ..adapters.errors import OptionError, PosthocError
from ..adapters.losses.decoupled_uniformity import DecoupledUniformity, alignment, uniformity
from ..adapters.training_loop import History, Record, check_statistics, step_generator
from . import running
from .augmentations import Augmentation
from .decoupled_uniformity_data import READERS, SEVERAL, Sets, load_sets
from .decoupled_uniformity_evaluation import class_worth, label_worth, projector
from .decoupled_uniformity_priors import Prior, check_apart, is_network, open_prior, smoother
from .decoupled_uniformity_report import draw, table
from .options import Preset, check_counts, check_positive, check_read
from .pretraining import PretrainingConfig, adamw, augmentation, own_view_found, pretrain, throughput
from .pretraining_evaluation import check_judged, encode, settle
from .pretraining_networks import PretrainingNetwork, image_encoder, synchronised
from .running import Run, seeded
from .view_batches import Augmented, BlockRows, Images, ViewBatches, kept

NETWORK, BATCHES = 730, 731  # places of the random numbers
GAIN = 0.01
"""How much better than random features the linear evaluation must be for --check, in shares of the test images, or mean AUC."""


@dataclass(kw_only=True)
class UniformityConfig(PretrainingConfig):
    """The options of this recipe."""

    output: Path = Path("runs/decoupled-uniformity")
    """folder of the run"""
    dataset: str = "cifar10"
    """cifar10, cifar100, fashion-mnist or another named set of small square images; omniglot; imagenet100, cub200, utzappos,
    chexpert"""
    size: int | None = None
    """pixels of a view, of imagenet100, cub200 and chexpert 224 by default, of utzappos 32; other sets have their own"""
    hidden: int = 512
    """width of the representation, which is a linear layer of the pooled feature, and of the projection's hidden layer"""
    batch_size: int = 256
    """images a step, several views of each, over all processes; a multiple of 32"""
    views: int = 2
    """views of an image that its centroid averages"""
    t: float = 2.0
    """of exp(-t distance^2)"""
    prior: str | None = None
    """what is known of each image: a FILE.npz, attributes (attributes:GROUP), labels, vae, or a network whose embedding it is,
    such as tf_efficientnet_lite0; default: nothing, and no kernel"""
    kernel: Literal["rbf", "cosine"] | None = None
    """between the rows of the prior; default: rbf"""
    sigma: float | Literal["median"] = "median"
    """width of rbf in the prior's units; median: the median distance between different rows of the batch"""
    ridge: float | None = 0.01
    """lambda of the smoother (K + lambda I)^-1 K; None: 1/sqrt(images)"""
    vae_epochs: int = 10
    """passes over the training images for --prior vae"""
    vae_dim: int = 32
    """dimensions of its code"""
    checkpoint: Path | None = None
    """weights of the prior's network (.safetensors or .pth); default: NAME.safetensors in the folder of the data, else timm's
    download"""
    random_weights: bool = False
    """random weights for it"""
    cache_dir: Path | None = None
    """where its features are stored; default: the library's store"""
    normalised: bool = True
    """whether the projection's hidden layers are normalised, as the encoder's are by --norm; the paper's are not"""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """lars: a layer's step follows its own length; biases and normalisation take plain steps"""
    lr: float = 2e-3
    """peak learning rate"""
    final_lr: float = 0.0
    """where its cosine ends"""
    momentum: float = 0.9
    """of sgd and lars"""
    weight_decay: float = 1e-4
    """not of biases and normalisation, whatever the optimizer"""
    smallest_crop: float = 0.2
    """least share of an image's area in a view"""
    blur: float = 0.0
    """probability of a Gaussian blur, of .1 to 2 pixels"""
    jitter: float = 0.4
    """strength of the colours' change: of brightness, contrast, saturation; of hue a quarter"""
    rotation: float = 0.0
    """a view is turned by up to so many degrees"""
    papers_probe: bool = False
    """also the paper's linear evaluation, of imagenet100 on features of unaugmented images; not of chexpert, whose labels are
    judged one by one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "views", "vae_epochs", "vae_dim")
        if self.size is not None:
            check_counts(self, "size")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"--momentum {self.momentum} was given; expected a number from 0 to below 1")
        if not 0 <= self.final_lr <= self.lr:
            raise OptionError(f"--final-lr {self.final_lr} was given; expected a number from 0 to --lr {self.lr}")
        if self.sigma != "median":
            check_positive(self, "sigma")
        check_read(self, uses(self), PRESETS)
        loss_of(self)
        altered(self)


def uses(config: UniformityConfig) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Options that not every run reads, whether this one does, and what reads them."""
    prior, kernel = config.prior, kernel_of(config)
    yield from (
        (("kernel", "sigma", "ridge"), prior is not None, "a --prior: the kernel compares what is known of the images"),
        (("sigma",), kernel != "cosine", "--kernel rbf, whose width it is"),
        (("vae_epochs", "vae_dim"), prior == "vae", "--prior vae"),
        (("checkpoint", "random_weights", "cache_dir"), is_network(prior), "a --prior that is a network's name"),
        (("size",), config.dataset in READERS, f"--dataset {', '.join(READERS)}"),
        (("momentum",), config.optimizer != "adamw", "--optimizer sgd or lars"),
        (("papers_probe",), config.dataset not in SEVERAL, f"sets of classes, and {config.dataset} has several labels"),
    )


def kernel_of(config: UniformityConfig) -> Literal["rbf", "cosine"] | None:
    """The kernel by the options; None without a prior."""
    return None if config.prior is None else config.kernel or "rbf"


def loss_of(config: UniformityConfig) -> DecoupledUniformity:
    """The loss by the options. Raises OptionError for numbers that it does not take."""
    return DecoupledUniformity(config.t, kernel_of(config), config.ridge, sigma=config.sigma, gather=config.gather)


def altered(config: UniformityConfig) -> Augmentation:
    """How views are made. Raises OptionError for shares and strengths that are none."""
    strength = config.jitter
    return replace(
        augmentation(config),
        brightness=strength,
        contrast=strength,
        saturation=strength,
        hue=strength / 4,
        rotation=config.rotation,
    )


PAPER: dict[str, Any] = {
    "network": "resnet18", "norm": "batch", "normalised": False, "hidden": 2048, "dim": 256, "batch_size": 256,
    "epochs": 400, "every": 20, "optimizer": "sgd", "lr": 0.3, "final_lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0,
    "warmup": 0.0, "smallest_crop": 0.08, "jitter": 0.8, "papers_probe": True,
}  # fmt: skip
"""The paper's settings, on CIFAR-10 and as they are shared by the other sets."""
LARGE: dict[str, Any] = {"optimizer": "lars", "momentum": 0.9, "weight_decay": 1e-6}

PRESETS: dict[str, Preset] = {
    "smoke": {
        "dataset": "fashion-mnist", "width": 16, "hidden": 128, "dim": 64, "batch_size": 128, "train_images": 4000, "epochs": 5,
        "t": 5.0, "probe_images": 2000, "throughput_steps": 3, "check": True,
    },
    "default": {},
    "paper": PAPER,
    "cifar10": {"dataset": "cifar10"},
    "cifar100": {"dataset": "cifar100"},
    "fashion-mnist": {"dataset": "fashion-mnist"},
    "omniglot": {"dataset": "omniglot", "epochs": 40, "every": 10},
    "imagenet100": {"dataset": "imagenet100", "network": "resnet50", "epochs": 100, "every": 5},
    "cub200": {"dataset": "cub200", "network": "resnet18", "epochs": 100, "every": 10},
    "utzappos": {"dataset": "utzappos", "epochs": 20, "every": 2},
    "chexpert": {
        "dataset": "chexpert", "network": "resnet18", "epochs": 20, "rotation": 45.0, "jitter": 0.0, "papers_probe": False,
    },
    "labels": {"prior": "labels"},
    "attributes": {"prior": "attributes"},
    "vae": {"prior": "vae"},
    "lite0": {"prior": "tf_efficientnet_lite0"},
    "vae-cosine": {"prior": "vae", "kernel": "cosine"},
    "sgd": {"optimizer": "sgd", "lr": 0.3},
    "lars": {"optimizer": "lars", "lr": 2.0},
    "per-process": {"gather": False},
    "gpu": {"network": "resnet18", "norm": "batch", "epochs": 100, "every": 20, "compile": True},
    "paper-cifar100": {**PAPER, "dataset": "cifar100"},
    "paper-imagenet100": {**PAPER, **LARGE, "dataset": "imagenet100", "network": "resnet50", "lr": 0.36},
    "paper-imagenet100-kernel": {
        **PAPER, **LARGE, "dataset": "imagenet100", "network": "resnet50", "lr": 0.36, "prior": "bigbigan.npz", "sigma": 100.0,
    },
    "paper-cub200": {**PAPER, "dataset": "cub200", "epochs": 1000, "prior": "attributes", "sigma": 20.0},
    "paper-utzappos": {**PAPER, "dataset": "utzappos", "epochs": 1000, "prior": "attributes", "sigma": 100.0},
    "paper-chexpert": {
        **PAPER, **LARGE, "dataset": "chexpert", "batch_size": 1024, "lr": 2.0, "prior": "gloria.npz", "sigma": 10.0,
        "rotation": 45.0, "jitter": 0.0, "papers_probe": False,
    },
}  # fmt: skip


class Uniform(nn.Module):
    """The loss of one step: `forward` takes this process's views [b, C, H, W], each with the same images, and their prior."""

    def __init__(self, network: PretrainingNetwork, loss: DecoupledUniformity) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, prior: Tensor | None, *views: Tensor) -> Tensor:
        projected = self.network(torch.cat(views))[1]
        return self.loss(torch.stack(projected.chunk(len(views)), 1), prior)


class Batches:
    """What `Uniform` takes at a step: what is known of the images (or None), and their views."""

    def __init__(self, views: ViewBatches, prior: np.ndarray | None) -> None:
        self.views = views
        self.prior = None if prior is None else torch.from_numpy(prior)

    def __call__(self, step: int) -> tuple[Tensor | None, *tuple[Tensor, ...]]:
        known = None if self.prior is None else self.prior[self.views.rows(step)]
        return known, *self.views(step)


def run(config: UniformityConfig) -> None:
    """Pretrain, evaluate and report.

    Raises PosthocError, if asked to check, where linear evaluation is no better than that of random features.
    """
    run = Run("decoupled_uniformity", config)
    sets = load_sets(config)
    probed = sets.train.label[: config.probe_images]
    check_judged(probed, sets.test.label, config.dataset, config.seed, config.papers_probe)
    prior = open_prior(config, run, sets)
    network, loss = make_network(config, sets), loss_of(config)
    module = synchronised(Uniform(network, loss), run.launch, run.device).to(run.device)
    check_statistics(module, run.launch.world)
    seed = step_generator(config.seed, BATCHES).initial_seed()
    views = ViewBatches(sets.train, altered(config), config.batch_size, seed, run.launch, run.device, config.views)
    run.stands_on(*sets.content(), *([] if prior is None else [prior.made_from]))
    rows, told = made(prior, loss, views.rows)  # last, when nothing can be wrong with the options: it may be a training
    pair = tuple(kept(Augmented(sets.held_out, views.how, seed, view), run.device) for view in (0, 1))
    history, before, rates = train(config, run, module, Batches(views, rows), pair)
    results: dict[str, Any] = run.launch.on_main(lambda: evaluate(config, run, sets, network))
    results = {
        **results,
        "prior": told,
        "held_out": {"before": before, "after": history.records[-1]},
        "seconds_of_training": round(history.seconds, 1),
        "throughput": rates,
        "images": {name: len(getattr(sets, name).label) for name in ("train", "held_out", "test")},
    }
    if run.launch.is_main:
        draw(config.output, history.records, results)
        print(table(results))
    run.finish(results)
    judged = "linear" if sets.labels is None else "mean_auc"
    gain = results["worth"][judged] - results["random_features"][judged]
    if config.check and gain < GAIN:
        raise PosthocError(
            f"after {config.epochs} epochs the linear evaluation is {gain:+.3f} beside that of random features; expected "
            f"{GAIN:+.3f} or more"
        )


def made(
    prior: Prior | None, loss: DecoupledUniformity, rows: BlockRows
) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    """The rows of a prior, float32 [N, P], and what is told of it and of the smoother of as many images as the loss sees."""
    if prior is None:
        return None, None
    found = prior.make()
    check_apart(found, prior.name, loss.kernel == "cosine")
    images = rows.batch_size if loss.gather else len(rows(0))
    return found, {**prior.told(), "smoother": smoother(found, loss, images)}


def train(
    config: UniformityConfig, run: Run, module: Uniform, batches: Batches, pair: tuple[Images, ...]
) -> tuple[History, Record, dict[str, Any]]:
    """Pretrain the module; its history, what its network made of held-out views before, and the throughput."""
    if config.compile:
        module.network.encoder.compile()

    def watch() -> Record:
        return watched(module.network, pair, run.device)

    module.eval()
    before = watch()
    optimizer, least = make_optimizer(module, config), config.final_lr / config.lr
    history = pretrain(run, module, batches, batches.views.rows.each, optimizer, watch, least=least)
    rates = throughput(run, module, batches)
    module.eval()
    return history, before, rates


def make_network(config: UniformityConfig, sets: Sets) -> PretrainingNetwork:
    """The network by the options, for images such as these, with random weights."""
    channels, pixels = next(sets.held_out.first(1).chunks(torch.device("cpu"))).shape[1:3]
    with seeded(config.seed, NETWORK):
        encoder = image_encoder(config.network, channels, pixels, config.norm, config.width, config.stem)
        norm = config.norm if config.normalised else None
        return PretrainingNetwork(encoder, projector(encoder.size, config.hidden, config.dim, norm))


def make_optimizer(module: nn.Module, config: UniformityConfig) -> torch.optim.Optimizer:
    """AdamW, SGD, or timm's LARS: neither weight decay nor LARS' ratio is of biases, normalisation and single numbers.

    LARS steps by lr * .001 |w| / (|g| + decay |w|); a layer of zeros, or without a gradient, by lr.
    """
    if config.optimizer == "adamw":
        return adamw(module, config)
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices: dict[str, Any] = {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay}
    vectors: dict[str, Any] = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    if config.optimizer == "lars":
        matrices["always_adapt"], vectors["always_adapt"] = True, False
        return timm.optim.Lars([matrices, vectors], lr=config.lr, momentum=config.momentum, trust_coeff=0.001)
    return torch.optim.SGD([matrices, vectors], lr=config.lr, momentum=config.momentum)


@torch.no_grad()
def watched(network: PretrainingNetwork, pair: tuple[Images, ...], device: torch.device) -> Record:
    """Of two views of held-out images: the share whose other one is found, Wang and Isola's uniformity (t = 2), the paper's
    alignment."""
    first, second = (torch.cat([network(part)[1] for part in view.chunks(device)]).float().cpu() for view in pair)
    centroids = DecoupledUniformity(gather=False).centroids(torch.stack([first, second], 1))
    return {
        "own_view_found": own_view_found(first, second),
        "uniformity": float(uniformity(centroids)),
        "alignment": float(alignment(centroids)),
    }


def evaluate(config: UniformityConfig, run: Run, sets: Sets, network: PretrainingNetwork) -> dict[str, Any]:
    """What the trained network's features are worth, and those of random weights, JSON-able."""
    probed = sets.train.first(config.probe_images or len(sets.train.label))
    found: dict[str, Any] = {}
    blank = make_network(config, sets).to(run.device)
    settle(blank, probed, run.device)
    for name, one in (("worth", network), ("random_features", blank)):
        train, test = (encode(one, images, run.device) for images in (probed, sets.test))
        if sets.labels is not None:
            found[name] = label_worth(one, train, test, sets.labels, config.seed, run.device)
        else:
            found[name] = class_worth(one, train, test, config.dataset, config.seed, config.papers_probe, run.device)
    return {**found, "parameters": sum(p.numel() for p in network.encoder.parameters())}


def main(arguments: Sequence[str] | None = None) -> None:
    """The recipe as a command."""
    running.main("decoupled_uniformity", UniformityConfig, PRESETS, run, __doc__, "--batch-size", arguments)


if __name__ == "__main__":
    main()
