"""A small classifier from scratch on small images, by the library's own training loop: a backbone where none is at hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.errors import DataError
from ..adapters.training import TrainOptions, TrainResult, epochs_for, step_generator, train

STEPS, SHIFT, HELD_OUT = 2000, 2, 0.1


def as_input(images: np.ndarray) -> Tensor:
    """uint8 images [N, H, W] or [N, H, W, C] as float32 [N, C, H, W] in -1..1. Raises DataError for others."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise DataError(f"uint8 images [N, H, W] or [N, H, W, C] are expected; given {images.dtype} {images.shape}")
    pixels = torch.from_numpy(np.array(images))
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1.0


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image [B, C, H, W] moved by up to `most` pixels in both directions; what comes in repeats the border."""
    count, _, height, width = images.shape
    down, right = (torch.randint(2 * most + 1, (count, 1), generator=generator) - most for _ in range(2))
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    place = torch.arange(count)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[place, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


class _ClassifierStep(nn.Module):
    def __init__(self, network: nn.Module, images: np.ndarray, label: Tensor, shift: int) -> None:
        super().__init__()
        self.network, self.images, self.label, self.shift = network, images, label, shift

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        x = as_input(self.images[rows.numpy()])
        if self.training and self.shift:
            x = shifted(x, self.shift, generator)
        device = next(self.network.parameters()).device
        return functional.cross_entropy(self.network(x.to(device)), self.label[rows].to(device))


@dataclass
class ClassifierOptions:
    """Of `train_classifier`: optimiser steps, largest shift in pixels, share of the images held out, peak learning rate."""

    steps: int = STEPS
    shift: int = SHIFT
    held_out: float = HELD_OUT
    lr: float = 3e-3


def train_classifier(
    network: nn.Module,
    images: np.ndarray,
    label: np.ndarray,
    *,
    classifier: ClassifierOptions | None = None,
    options: TrainOptions | None = None,
) -> TrainResult:
    """Train `network` (images [B, C, H, W] in -1..1 -> logits) by cross-entropy; it ends at its best held-out loss.

    images: uint8 [N, H, W] or [N, H, W, C]; label: int [N]. The images held out are drawn by `options.seed`. Resumes, and
    runs on several processes, as every fit does. Raises DataError for images or labels that do not fit.
    """
    settings, options = classifier or ClassifierOptions(), options or TrainOptions(batch_size=128)
    as_input(images[:1])
    target = torch.from_numpy(np.asarray(label, dtype=np.int64))
    if target.shape != (len(images),):
        raise DataError(f"{len(images)} images need as many labels; given {tuple(target.shape)}")
    order = torch.randperm(len(images), generator=step_generator(options.seed, 1)).numpy()
    held_out, rows = np.split(order, [max(1, round(settings.held_out * len(order)))])
    step = _ClassifierStep(network, images, target, settings.shift)
    unused = step_generator(options.seed, 0)  # without a shift nothing is drawn

    def evaluate() -> float:
        losses = [(len(part), step(part, unused)) for part in torch.from_numpy(held_out).split(512)]
        return sum(count * float(loss) for count, loss in losses) / len(held_out)

    return train(
        step,
        np.sort(rows),
        evaluate,
        name="classifier",
        options=options,
        epochs=options.epochs or epochs_for(len(rows), options.batch_size, settings.steps, lowest=2),
        lr=options.lr or settings.lr,
        key=f"{settings}",
        weight_decay=5e-4,
    )
