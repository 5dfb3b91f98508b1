"""LAM: a Laplace posterior over the last layer of an embedding, trained with it or put on it afterwards, and five other ways.

    accelerate launch -m posthoc.recipes.lam --data-dir DATA --output runs/lam
    python -m posthoc.recipes.lam --preset cifar10 --data-dir DATA --output runs/lam-cifar10

The smoke preset took 44 s of one core: mAP@5 of held-out images rises from .530 to .668 (deterministic), recall@1 of test
images is .740, and the AUSC of post-hoc-euclidean-positives .894, where an embedding without uncertainty stays at .740. A
default run (nine methods, ten trainings of 780 steps) takes about 10 minutes of one idle core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..adapters.errors import OptionError, PosthocError, suggest
from ..adapters.metric_laplace import MetricPosterior
from . import running
from .lam_data import SHAPES, DataOptions, Dataset, load_sets
from .lam_methods import BASELINES, METHODS, VARIANTS, Inputs, Methods, answer, score
from .lam_report import Judged, as_results, draw, judge, table
from .lam_training import BLOCK
from .options import Preset, RecipeConfig, check_counts, check_least, check_positive, check_read
from .running import Run, row_blocks

LEARNT = 0.02
"""By how much training raises the mAP@5 of held-out images, at least, for --check."""
SOME = ("post-hoc-euclidean-positives", "post-hoc-arccos-fixed", "online-euclidean-positives", "online-arccos-fixed")
Miner = Literal["all", "semihard", "hard", "easy", "none"]


@dataclass(kw_only=True)
class LamConfig(RecipeConfig):
    """Options of Laplace metric learning and of what it is compared with."""

    output: Path = Path("runs/lam")
    """folder of the run"""
    dataset: Dataset = "fashion-mnist"
    """images; test classes are the training's (fashion-mnist, cifar10) or others (all else)"""
    data_dir: Path | None = None
    """folder of the data; default $POSTHOC_DATA, else ~/.cache/posthoc/data"""
    ood: tuple[str, ...] | None = None
    """sets of other images, by the names of `posthoc eval ood`, cub200, or other-alphabets of omniglot; default: mnist beside
    fashion-mnist, tiny-imagenet and dtd beside cifar10 (the paper's code has svhn), other-alphabets and notmnist beside omniglot,
    cars196 beside cub200, cub200 beside lfw"""
    train_images: int | None = 20_000
    """at most so many training images, evenly spaced; None: all"""
    test_images: int | None = 5000
    """at most so many test images, and of each OOD set; None: all"""
    held_out: float = 0.1
    """share of the training part that decides which epoch is kept, and the prior precision: images, or whole classes of an open
    set (omniglot: as many characters are tested on)"""
    methods: tuple[str, ...] = (*BASELINES, *SOME)
    """deterministic (always), mc-dropout, ensemble, pfe, hib, {post-hoc,online}-{euclidean,arccos}-{positives,fixed,full}"""
    network: str = "pooled"
    """pooled: three convolutions (the paper's for CIFAR-10); wide: two, with 9216 features of 28 px (its for FashionMNIST); else
    a convolutional network of timm"""
    pretrained: bool = False
    """timm's own weights"""
    checkpoint: Path | None = None
    """weights of the timm network, .safetensors or .pth"""
    size: int = 227
    """height and width of cub200, lfw and msls"""
    dim: int = 16
    """of the embedding"""
    epochs: int = 5
    """of every training"""
    batch_size: int = 128
    """images of a step, over all processes; a multiple of 16. Triplets are mined among them"""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop: the paper"""
    lr: float = 1e-3
    """learning rate; the paper's code multiplies its own by the batch size"""
    weight_decay: float = 1e-4
    """of the optimiser"""
    schedule: Literal["cosine", "exponential"] = "cosine"
    """exponential: exp(-.01) an epoch (the paper)"""
    margin: float = 0.7
    """between positives' and negatives' distances, of unit embeddings"""
    miner: Miner = "all"
    """which triplets of a batch are trained on"""
    hessian_miner: Miner | None = None
    """which ones count for the curvature; None: the same"""
    max_triplets: int | None = None
    """at most so many of a batch for the curvature, drawn at random; None: all, which costs no more"""
    curvature_images: int | None = 10_000
    """training images whose curvature a post-hoc posterior sums, scaled to all of them; None: all"""
    memory: float = 0.99
    """share of its curvature that an online posterior keeps in a step"""
    hessian_start: float | None = None
    """curvature that an online posterior begins with; None: that of 2,000 training images (reference: their number)"""
    online_precision: float | None = None
    """prior precision while an online posterior trains; None: noise of a tenth of an untrained embedding's squared length
    (reference: 1)"""
    prior_precision: float | None = None
    """of the posteriors that answer; None: by held-out votes (reference: 1). Places need a number"""
    samples: int = 32
    """draws of the weights for votes; masks of dropout; samples of PFE and HIB"""
    members: int = 5
    """networks of the ensemble"""
    dropout: float = 0.05
    """share of the channels that mc-dropout drops"""
    kl_weight: float = 1e-6
    """of HIB's divergence"""
    gather: bool = True
    """mine triplets among the images of all processes; else each among its own, as the paper's code"""
    reference: bool = False
    """as the released code: sign of arccos' cross term, curvature of all pairs as they are counted there, prior precision 1,
    answers from draws, sum of deviations as the score, ensembles in their own frames, HIB's divergence; and its metrics"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "epochs", "batch_size", "size")
        check_positive(self, "lr", "prior_precision", "online_precision")
        check_least(self, 0, "weight_decay", "kl_weight", "hessian_start")
        for name in self.methods:
            if name not in METHODS:
                raise OptionError(f"--methods {name!r} is unknown; {suggest(name, METHODS)}")
        if self.samples < 2 or self.members < 2 or self.dim < 2:
            raise OptionError(
                f"--samples {self.samples} --members {self.members} --dim {self.dim} was given; expected 2 or more of each"
            )
        for name, value in (("dropout", self.dropout), ("memory", self.memory), ("held-out", self.held_out)):
            if not 0 < value < 1:
                raise OptionError(f"--{name} {value} was given; expected a share between 0 and 1")
        for name in ("train_images", "test_images", "curvature_images", "max_triplets"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise OptionError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} was given; expected 2 or more, or None"
                )
        if self.batch_size % BLOCK:
            raise OptionError(f"--batch-size {self.batch_size} was given; expected a multiple of {BLOCK}")
        MetricPosterior(1, 2, margin=self.margin, miner=self.miner)
        laplace = any(name in VARIANTS for name in self.methods)
        if self.dataset == "msls" and laplace and self.prior_precision is None and not self.reference:
            raise OptionError(
                "--dataset msls has places, no labels to vote for: give a number with --prior-precision, such as 1"
            )
        if self.dataset not in SHAPES and self.network in ("pooled", "wide"):
            raise OptionError(
                f"--network {self.network} is for small images: give --dataset {self.dataset} a timm network"
            )
        check_read(self, uses(self), PRESETS)


def uses(config: LamConfig) -> Iterator[tuple[tuple[str], bool, str]]:
    """Options that not every run reads, but for those that presets set for methods; whether this one does, what reads them."""
    online = any(name.startswith("online") for name in config.methods)
    yield ("members",), "ensemble" in config.methods, "--methods ensemble"
    yield ("dropout",), "mc-dropout" in config.methods, "--methods mc-dropout"
    yield ("online_precision",), online, "an online variant of --methods"
    yield ("size",), config.dataset not in SHAPES, "--dataset cub200, lfw or msls"


def run(config: LamConfig) -> None:
    """Train all methods, and judge them on test images that had no part in it."""
    run = Run("lam", config)
    row_blocks(config.batch_size, BLOCK, run.launch)
    sets = load_sets(
        DataOptions(
            config.dataset, config.data_dir, config.ood, config.train_images, config.test_images, config.held_out,
            config.size, config.seed,
        )
    )  # fmt: skip
    run.stands_on(
        *(part.pictures.fingerprint() for part in sets.parts), *(one.fingerprint() for one in sets.ood.values())
    )
    methods = Methods(run, config, sets)
    methods.train()
    judged = run.launch.on_main(lambda: judge_all(methods))
    if run.launch.is_main:
        draw(run.folder / "lam.png", judged)
        print(table(as_results(judged)))
    run.finish(results(methods, judged))
    if config.check:
        check_learnt(methods)


def results(methods: Methods, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """What results.json says of a run."""
    sets, best = methods.sets, methods.best()
    train, validation, test = sets.parts
    counts = {"train": len(train), "validation": len(validation), "test": len(test)}
    return {
        "methods": as_results(judged),
        "reports": methods.reports,
        "images": counts | {name: len(images) for name, images in sets.ood.items()},
        "validation_map_at_5": {name: {"before": methods.before[name], "best": value} for name, value in best.items()},
        "training_seconds": {name: round(one.seconds, 1) for name, one in methods.histories.items()},
    }


def check_learnt(methods: Methods) -> None:
    """Raises PosthocError unless each training (but PFE's, which leaves the embedding alone) raised the held-out mAP@5."""
    for name, value in methods.best().items():
        if name != "pfe" and not value > methods.before[name] + LEARNT:
            raise PosthocError(
                f"{name}: mAP@5 of held-out images is {value:.3f} after training and {methods.before[name]:.3f} before: nothing "
                "was learned"
            )


def judge_all(methods: Methods) -> dict[str, Judged]:
    """The figures of every method, in the order of the options; one method's answers are kept at a time, which are large."""
    config, test = methods.config, methods.sets.test
    found: dict[str, Judged] = {}
    for group in methods.groups():
        inside = Inputs(group, test.pictures, methods.device)
        outside = {name: Inputs(group, one, methods.device) for name, one in methods.sets.ood.items()}
        for name, head in group.heads.items():
            others = {
                other: score(name, answer(head, one, with_samples=False), config.reference)
                for other, one in outside.items()
            }
            own = answer(head, inside, with_samples=not test.of_places)
            found[name] = judge(own, test, others, score(name, own, config.reference), config.reference)
            del own
    names = ["deterministic", *(name for name in config.methods if name != "deterministic")]
    return {name: found[name] for name in names}


_RELEASED: Preset = {
    "optimizer": "rmsprop", "schedule": "exponential", "weight_decay": 1e-5, "train_images": None, "test_images": None,
    "curvature_images": None, "samples": 100, "methods": METHODS, "reference": True, "max_triplets": 5000, "memory": 0.999,
}  # fmt: skip
_FILES: Preset = {
    "network": "resnet50", "pretrained": True, "dim": 2048, "batch_size": 64, "lr": 64 * 3e-7, "train_images": None,
    "test_images": None, "curvature_images": None, "margin": 1.0, "miner": "semihard", "epochs": 20,
    "methods": (*BASELINES[:2], *BASELINES[3:], *SOME),
}  # fmt: skip
PRESETS: dict[str, Preset] = {
    "smoke": {
        "train_images": 2048, "test_images": 500, "epochs": 3, "batch_size": 64, "samples": 8, "members": 2,
        "curvature_images": 1024, "methods": (*BASELINES, *SOME[:1], SOME[3]), "check": True,
    },
    "default": {},
    "paper": {**_RELEASED, "network": "wide", "dim": 3, "epochs": 20, "batch_size": 256, "lr": 256 * 1e-3},
    "fashion-mnist": {"dataset": "fashion-mnist"},
    "cifar10": {"dataset": "cifar10", "epochs": 10, "train_images": None},
    "omniglot": {"dataset": "omniglot", "held_out": 0.2, "epochs": 60, "train_images": None, "dim": 32},
    "cub200": {**_FILES, "dataset": "cub200", "held_out": 0.2},
    "lfw": {**_FILES, "dataset": "lfw", "epochs": 200},
    "msls": {**_FILES, "dataset": "msls", "margin": 0.1, "miner": "all", "prior_precision": 1.0,
             "methods": (*BASELINES[:2], *SOME)},
    "paper-cifar10": {**_RELEASED, "dataset": "cifar10", "network": "pooled", "dim": 16, "epochs": 20, "batch_size": 256,
                      "lr": 256 * 1e-5, "kl_weight": 1e-4, "ood": ("svhn",)},
    "paper-online": {"batch_size": 64, "lr": 64 * 1e-3},
    "paper-cifar10-online": {"epochs": 40, "hessian_miner": "hard"},
    "paper-cub200": {**_RELEASED, **_FILES, "dataset": "cub200", "max_triplets": 30, "memory": 0.9997, "hessian_start": 1e6,
                     "hessian_miner": "all", "methods": (*BASELINES[:2], *BASELINES[3:], *SOME[:2], SOME[3])},
    "paper-cub200-others": {"memory": 0.995, "hessian_start": None, "hessian_miner": None,
                            "methods": ("deterministic", SOME[2])},
    "paper-lfw": {**_RELEASED, **_FILES, "dataset": "lfw", "epochs": 200, "max_triplets": 30, "memory": 0.995},
    "paper-msls": {**_RELEASED, **_FILES, "dataset": "msls", "margin": 0.1, "miner": "all", "hessian_miner": "semihard",
                   "max_triplets": 10, "memory": 0.99999, "hessian_start": 1e6, "weight_decay": 1e-6,
                   "methods": ("deterministic", SOME[3])},
    "paper-msls-deterministic": {"epochs": 30, "lr": 64 * 1e-7, "weight_decay": 1e-5, "hessian_miner": None,
                                 "methods": (*BASELINES[:2], SOME[1])},
    "all": {"methods": METHODS},
    "no-ood": {"ood": ()},
    **{name: {"methods": ("deterministic", name), "members": LamConfig.members} for name in METHODS if name != "ensemble"},
    "ensemble": {"methods": ("deterministic", "ensemble")},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The recipe as a command."""
    running.main("lam", LamConfig, PRESETS, run, __doc__, "--batch-size or --test-images", arguments)


if __name__ == "__main__":
    main()
