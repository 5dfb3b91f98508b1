"""What recipes share that pretrain a network on views of images: their options, the training, and its throughput.

images, held_out, test = open_images(config)
batches = ViewBatches(images, augmentation(config), config.batch_size, config.seed, run.launch, run.device)
module = ...                      # takes what `batch(step)` gives, answers with the loss
history = pretrain(run, module, batches, batches.rows.each, optimizer, watch)
measured = throughput(run, module, batches)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.errors import DataError
from ..adapters.source_arrays import ArraySource
from ..adapters.source_base import Source
from ..adapters.source_loader import load_image
from ..adapters.training_loop import History, Plan, Record, run_plan
from ..eval.datasets import open_named
from .augmentations import Augmentation
from .image_sets import Chosen, shaped
from .options import RecipeConfig, check_below_one, check_counts, check_least, check_positive
from .pretraining_networks import CIFARS, SMALL, Norm, Stem
from .running import Run, scheduled
from .view_batches import Images, images_of

ORDER = 501  # place of the random numbers
HELD_OUT = 1000
"""Training images that nothing is trained on; of few images a tenth."""
ROUNDS = 3
"""How often each kind of batch is timed; the fastest counts, which others disturbed least."""
Batch = Callable[[int], tuple[Any, ...]]


@dataclass(kw_only=True)
class PretrainingConfig(RecipeConfig):
    """The options of a pretraining."""

    dataset: str = "cifar10"
    """square images by the name of their set, such as cifar10, cifar100 or fashion-mnist; for a frozen network also a folder"""
    data_dir: Path | None = None
    """folder of the data; default: $POSTHOC_DATA"""
    network: str = SMALL
    """small (for two cores), resnet20, resnet56, or a timm network, such as resnet18"""
    stem: Stem = "cifar"
    """of a timm network on images of up to 64 px: cifar (3x3, stride 1, no max-pool; of a ViT or ConvNeXt small patches), which
    ResNets, EfficientNets, MobileNets and VGG can have; or own"""
    width: int = 32
    """of small's first layer; its feature has eight times as many dimensions"""
    norm: Norm = "group"
    """group, or batch: on several processes BatchNorm trains on GPUs only, by the statistics of all"""
    hidden: int = 512
    """width of the projection's hidden layer"""
    dim: int = 128
    """dimensions of the projection that the loss sees"""
    batch_size: int = 128
    """images a step, several views of each, over all processes; a multiple of 32"""
    epochs: int = 4
    """passes over the training images"""
    every: int = 1
    """epochs between two looks at held-out images, and checkpoints"""
    lr: float = 1e-3
    """peak learning rate"""
    weight_decay: float = 1e-4
    """of AdamW; not of biases and normalisation"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises; then it falls as a cosine"""
    smallest_crop: float = 0.2
    """least share of an image's area in a view"""
    blur: float = 0.5
    """probability of a Gaussian blur, of .1 to 2 pixels"""
    train_images: int | None = None
    """only so many training images: the first ones, and for a frozen network evenly spread ones"""
    gather: bool = True
    """whether the loss contrasts the images of all processes; else each process's own, which changes the result"""
    compile: bool = False
    """whether torch.compile builds the encoder, which pays on a GPU"""
    probe_images: int | None = None
    """training images that linear evaluation, neighbours and scores look at; default: all"""
    throughput_steps: int = 10
    """steps that the throughput is measured on, on a GPU 30 or more; 0: it is not"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "epochs", "every", "hidden", "dim", "width", "batch_size", "train_images", "probe_images")
        check_least(self, 0, "weight_decay", "throughput_steps")
        check_positive(self, "lr")
        check_below_one(self, "warmup")
        augmentation(self)


def augmentation(config: PretrainingConfig) -> Augmentation:
    """How views are made. Raises OptionError for shares and probabilities that are none."""
    return Augmentation(scale=(config.smallest_crop, 1.0), blur=config.blur)


def open_images(config: PretrainingConfig) -> tuple[Images, Images, Images]:
    """Training images, held-out ones and the set's test images.

    Raises DataError for data that are not there, not small and square, or too few for a batch.
    """
    source, other = (open_named(config.dataset, split, config.data_dir) for split in ("train", "test"))
    order = np.arange(len(source))
    if not isinstance(source, ArraySource):  # folders are sorted by class
        order = np.random.default_rng(ORDER).permutation(order)
    train, test = in_memory(source, order[: config.train_images]), in_memory(other, np.arange(len(other)))
    if train.pixels.shape[2] != train.pixels.shape[3] or train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(f"the images of {config.dataset} are {list(train.pixels.shape[1:])}; expected square ones")
    kept = trained_on(len(train), config.batch_size)
    return train.first(kept), train.rows(np.arange(kept, len(train))), test


def in_memory(source: Source, rows: np.ndarray) -> Images:
    """Those images of a labelled set, int64 [n], and their labels: an array's as they are, files' in colour.

    Raises DataError for files that are not small squares, by the size of the first one, or have no labels.
    """
    if isinstance(source, ArraySource):
        return images_of(source).rows(rows)
    height, width = np.asarray(load_image(source.item(0).image)).shape[:2]
    label = np.asarray(source.column("label"))
    if width != height or width > CIFARS or label.dtype.kind not in "iu":
        raise DataError(
            f"{source.name} cannot be pretrained on: its first image has {width} x {height} px and its labels are {label.dtype}; "
            f"expected labelled square images of up to {CIFARS} px, such as cifar10 or tiny-imagenet"
        )
    return Images(shaped(Chosen(source, rows), 3, width), label[rows].astype(np.int64))


def trained_on(count: int, batch_size: int) -> int:
    """How many of so many training images are trained on. Raises DataError where they are fewer than a batch."""
    kept = count - min(HELD_OUT, count // 10)
    if kept < batch_size:
        raise DataError(
            f"{count} training images are there, of which {kept} are trained on: fewer than a batch of {batch_size}; give more "
            "--train-images, or a smaller --batch-size"
        )
    return kept


def adamw(module: nn.Module, config: PretrainingConfig) -> torch.optim.Optimizer:
    """AdamW; biases, normalisation and single numbers do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


class Ahead:
    """Batches that a thread makes while the network is busy with the ones before: the same ones, since each depends on its
    step alone."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.thread = batch, ThreadPoolExecutor(1)
        self.coming: tuple[int, Future[tuple[Any, ...]]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()

    def __call__(self, step: int) -> tuple[Any, ...]:
        ready = self.coming
        if ready is None or ready[0] != step:
            ready = step, self.thread.submit(self.batch, step)
        found = ready[1].result()
        self.prepare(step + 1)
        return found

    def prepare(self, step: int) -> None:
        """Begins to make the batch of that step."""
        self.coming = step, self.thread.submit(self.batch, step)

    def wait(self) -> None:
        """Until the batch that is being made is there."""
        if self.coming is not None:
            self.coming[1].result()


def pretrain(
    run: Run, module: nn.Module, batch: Batch, each: int, optimizer: torch.optim.Optimizer,
    watch: Callable[[], Record], name: str = "train", least: float = 0.0,
) -> History:  # fmt: skip
    """Train `module` for the epochs of the run's options, with warm-up and cosine.

    Args:
        batch: what the module's forward takes at a step; its answer is the loss. each: steps of an epoch.
        watch: figures at the end of a round, the same in every process. least: where the cosine ends, a share of the peak.
    """
    config: Any = run.config
    steps = config.epochs * each
    with Ahead(batch) as batches:
        plan = Plan(
            name=name,
            steps=steps,
            every=config.every * each,
            batch=batches,
            evaluate=watch,
            folder=run.folder,
            signature=f"{run.signature} {name}",
            observe=run.observe(name, steps),
        )
        return run_plan(module, optimizer, scheduled("cosine", optimizer, steps, config.warmup, least), plan)


def throughput(run: Run, module: nn.Module, batch: Batch) -> dict[str, Any]:
    """Images a second of the training loop, and of the same loop on random tensors that are there already.

    The module is the same afterwards. `share`: the first over the second; what is missing of 1 is what batches cost. Every
    process must call this. {} where the run's options ask for no measurement.
    """
    config: Any = run.config
    steps = config.throughput_steps
    if not steps:
        return {}
    state = copy.deepcopy(module.state_dict())
    still = tuple(torch.rand_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch(0))
    best = {"training": 0.0, "random_tensors": 0.0}

    def images_per_second(source: Batch, count: int, ahead: Ahead | None = None) -> float:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
        plan = Plan("throughput", count, count, source, dict, progress=False)
        seconds = run_plan(module, optimizer, None, plan).seconds
        start = time.perf_counter()
        if ahead is not None:
            ahead.wait()  # for as many batches as were taken, since the first one was there before
        return count * config.batch_size / (seconds + time.perf_counter() - start)

    images_per_second(lambda _: still, 1)  # the first step sets up memory and kernels
    for _ in range(ROUNDS):
        with Ahead(batch) as batches:
            batches.prepare(0)
            batches.wait()
            best["training"] = max(best["training"], images_per_second(batches, steps, batches))
        best["random_tensors"] = max(best["random_tensors"], images_per_second(lambda _: still, steps))
    module.load_state_dict(state)
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device)
    rounded = {f"{name}_images_per_second": round(value, 1) for name, value in best.items()}
    return {**rounded, "share": round(best["training"] / best["random_tensors"], 3), "device": device}


def told_throughput(rates: Mapping[str, Any]) -> list[str]:
    """What `throughput` measured as lines of Markdown; none where nothing was."""
    if not rates:
        return []
    plain = rates["random_tensors_images_per_second"]
    return [
        "",
        f"{rates['training_images_per_second']:g} images/s, {plain:g} on random tensors: {rates['share']:.0%}, {rates['device']}",
    ]


def own_view_found(first: Tensor, second: Tensor) -> float:
    """Share of images [N, D] whose other view [N, D] is the most similar (cosine) of all N."""
    cosine = functional.normalize(first.float(), dim=1) @ functional.normalize(second.float(), dim=1).T
    return float((cosine.argmax(1) == torch.arange(len(cosine), device=cosine.device)).double().mean())
