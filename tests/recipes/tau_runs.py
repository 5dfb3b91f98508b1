"""Images, options and words that the tests of the recipe tau share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from posthoc.recipes.tau_options import TauConfig
from posthoc.recipes.view_batches import Images

from .recipe_data import write_digits, write_idx

TINY = "--dataset fashion-mnist --data-dir data --width 8 --hidden 32 --dim 16 --batch-size 64"
SMALL = [*TINY.split(), "--probe-images", "300", "--ood-images", "50", "--throughput-steps", "0"]
SHORT = [*SMALL, "--train-images", "300", "--epochs", "3", "--output"]
FROZEN = "--backbone resnet20 --random-weights --dataset fashion-mnist --data-dir data --cache-dir store --views 2"


def some_images(count: int, size: int = 8) -> Images:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    return Images(pixels, np.arange(count) % 5)


def small(**options: Any) -> TauConfig:
    return TauConfig(**{"width": 8, "hidden": 16, "dim": 6, "batch_size": 32, **options})


def make_folder(place: Path) -> Path:
    """1,400 digits of 16 x 16 px, 397 others to test, and 100 of noise in MNIST's place."""
    write_digits(place / "data")
    noise = np.random.default_rng(1).integers(0, 256, (100, 16, 16), dtype=np.uint8)
    write_idx(place / "data" / "MNIST" / "raw", "t10k", noise, np.arange(100) % 10)
    return place
