"""The options of the recipe `tau`, its presets, and which options which part of it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..adapters.errors import OptionError
from .options import Preset, check_below_one, check_counts, check_least, check_positive, usual
from .pretraining import PretrainingConfig
from .pretraining_networks import SMALL
from .small_image_networks import DEPTHS
from .tau_scores import NEIGHBOURS

Kind = Literal["tau", "simclr", "tau-moco", "moco", "hib", "supervised"]


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
        check_least(self, 2, "passes", "dim")  # of one dimension all cosines are 1 or -1
        check_least(self, NEIGHBOURS, "probe_images")
        check_below_one(self, "dropout", "momentum")
        if self.include_positive and self.reference:
            raise OptionError("--include-positive and --reference were given; the released configurations leave it out")


OF_A_HEAD = ("backbone", "checkpoint", "random_weights", "positives", "views", "test_images", "cache_dir")
OF_BOTH = (
    "output", "seed", "resume", "dataset", "data_dir", "train_images", "ood_images", "epochs", "lr", "batch_size",
    "reference", "temperature", "gather",
)  # fmt: skip
"""Options that a head on a frozen network reads; a pretraining reads all but `OF_A_HEAD`."""


def check_part(config: TauConfig) -> None:
    """Raises OptionError for options that the part of the recipe which is asked for does not read: of a whole command line,
    since presets are laid on one another."""
    other = [one.name for one in fields(config) if getattr(config, one.name) != one.default]
    if config.backbone is None:
        why = "options of a head on a frozen network: name the network with --backbone, or leave them out"
        refuse(config, [name for name in other if name in OF_A_HEAD], why)
        check_read(config)
        return
    refuse(
        config,
        [name for name in other if name not in OF_A_HEAD + OF_BOTH],
        f"options of a pretraining: a head on a frozen network (--backbone {config.backbone}) has none of them",
    )
    if "temperature" in other and not config.reference:
        raise OptionError(
            f"--temperature {config.temperature} was given; a head chooses its own t by blur, but with --reference"
        )


def check_read(config: TauConfig) -> None:
    """Raises OptionError for options of a pretraining that nothing would read beside the others.

    What a size sets is no mistake: `paper` has MoCo's queue and the projection of every method.
    """
    small, method = config.network == SMALL, config.method
    queued = method in ("moco", "tau-moco")
    for names, read, of in (
        (("include_positive",), method == "tau", "--method tau"),
        (("queue", "momentum"), queued, "--method moco or tau-moco"),
        (
            ("gather",),
            method in ("tau", "simclr", "hib"),
            "--method tau, simclr or hib; a queue has all processes' keys",
        ),
        (("samples",), method == "hib", "--method hib"),
        (("temperature",), method not in ("hib", "supervised"), "a contrast: --method tau, simclr, tau-moco or moco"),
        (("hidden", "dim"), method != "supervised", "a projection, which --method supervised has none of"),
        (("passes",), config.dropout > 0, "--dropout"),
        (("width",), small, f"--network {SMALL}"),
        (("stem",), not small and config.network not in DEPTHS, "a timm network"),
    ):
        given = [name for name in names if getattr(config, name) not in usual(TauConfig, name, PRESETS)]
        refuse(config, [] if read else given, f"only read with {of}")


def refuse(config: TauConfig, names: Sequence[str], why: str) -> None:
    """Raises OptionError that names these options, if there are any."""
    if names:
        raise OptionError(f"{', '.join(as_given(name, getattr(config, name)) for name in names)}: {why}")


def as_given(name: str, value: Any) -> str:
    """An option as words of a command line."""
    flag = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"


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
    "paper-moco": {"method": "moco", "lr": 1e-3},
    "paper-ensemble": {"method": "simclr", "members": 5, "lr": 1e-3},
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
    "smoke-head": {
        "train_images": 400, "test_images": 300, "ood_images": 100, "views": 2, "epochs": 20, "batch_size": 64,
    },
    "views": {"positives": "views"},
    "labels": {"positives": "labels"},
}  # fmt: skip
