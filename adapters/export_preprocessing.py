"""The preprocessing of a backbone in words that need neither posthoc nor torch: a resize, a crop, a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from .backbone import Backbone

TO_TENSOR = 3  # the place of the step that divides by 255
LEVEL = 1 / 255  # a rounding of one of 256 levels, before the division by std


def describe_preprocessing(backbone: Backbone) -> dict[str, Any]:
    """What a PIL image goes through before the network, JSON-able; `preprocess` follows it.

    "complete" says whether the description is all there is to it, which was tried on images: a transform of other steps
    than a resize, a centred crop, the division by 255 and a normalisation is only named. Of the resize's rules, "shorter side"
    and "exact" are torchvision's, "cover" and "contain" timm's: see `resized`.
    """
    known = backbone.preprocessing
    told: dict[str, Any] = {"complete": False, "colour": "RGB", "resize": None, "interpolation": None, "crop": None}
    told |= {"divide_by": 255, "mean": known.get("mean"), "std": known.get("std")}
    steps = _steps(backbone.transform)
    if steps is not None:
        told |= steps
        told["complete"] = _reproduces(backbone, told)
    if not told["complete"]:
        told["transform"] = known.get("transform") or (None if backbone.transform is None else repr(backbone.transform))
    return told


def preprocess(image: Image.Image, told: dict[str, Any]) -> np.ndarray:
    """A PIL RGB image as the network takes it, float32 [3,H,W], by a complete description."""
    if told["resize"] is not None:
        kernel = Image.Resampling[told["interpolation"].upper()]
        image = image.resize(resized(image.size, **told["resize"]), kernel)
    if told["crop"] is not None:
        image = _cropped(image, told["crop"]["size"], tuple(told["crop"]["fill"]))
    pixels = np.asarray(image, dtype=np.float32) / told["divide_by"]
    normalised = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
    return normalised.transpose(2, 0, 1)


def resized(size: tuple[int, int], rule: str, to: list[int]) -> tuple[int, int]:
    """Width and height after a resize to `to` (height, width; one number for "shorter side")."""
    width, height = size
    if rule == "exact":
        return to[1], to[0]
    if rule == "shorter side":
        short = min(width, height)
        return to[0] * width // short, to[0] * height // short
    pick = min if rule == "cover" else max
    ratio = pick(height / to[0], width / to[1])
    return round(width / ratio), round(height / ratio)


def _cropped(image: Image.Image, size: list[int], fill: tuple[int, ...]) -> Image.Image:
    """The middle of an image, [height, width]; where it is smaller, in the middle of the colour `fill`."""
    height, width = max(size[0], image.height), max(size[1], image.width)
    if (height, width) != (image.height, image.width):
        canvas = Image.new("RGB", (width, height), fill)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = canvas
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


def _steps(transform: Any) -> dict[str, Any] | None:
    """The description by the names of torchvision's and timm's steps; None for others, or in another order."""
    told: dict[str, Any] = {}
    done = 0
    for step in getattr(transform, "transforms", [transform]):
        name = type(step).__name__
        place, found = _step(name, step)
        if place <= done:
            return None
        done, told = place, told | found
    return {"mean": [0.0] * 3, "std": [1.0] * 3} | told if done >= TO_TENSOR else None


def _step(name: str, step: Any) -> tuple[int, dict[str, Any]]:
    """Place of a step in the order resize, crop, to tensor, normalise (0: unknown), and what it adds."""
    if name == "Resize" and getattr(step, "max_size", None) is None:
        size = _pair(step.size, single=True)
        rule = "shorter side" if len(size) == 1 else "exact"
        return 1, {"resize": {"rule": rule, "to": size}, "interpolation": _filter(step.interpolation)}
    if name == "ResizeKeepRatio" and step.longest in (0.0, 1.0):
        rule = "contain" if step.longest else "cover"
        return 1, {"resize": {"rule": rule, "to": _pair(step.size)}, "interpolation": _filter(step.interpolation)}
    if name in ("CenterCrop", "CenterCropOrPad"):
        fill = getattr(step, "fill", 0)
        return 2, {"crop": {"size": _pair(step.size), "fill": [fill] * 3 if isinstance(fill, int) else list(fill)}}
    if name in ("ToTensor", "MaybeToTensor"):
        return TO_TENSOR, {}
    if name == "Normalize":
        return 4, {part: [float(value) for value in getattr(step, part)] for part in ("mean", "std")}
    return 0, {}


def _pair(size: Any, single: bool = False) -> list[int]:
    numbers = [int(size)] if isinstance(size, int) else [int(value) for value in size]
    return numbers if single or len(numbers) == 2 else numbers * 2


def _filter(interpolation: Any) -> str:
    return str(getattr(interpolation, "value", interpolation)).lower()


def _reproduces(backbone: Backbone, told: dict[str, Any]) -> bool:
    """Whether following the description gives what the transform gives, on noise of three shapes."""
    rng = np.random.default_rng(0)
    transform = backbone.require_transform()
    for height, width in ((256, 321), (97, 64), (40, 40)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            with torch.no_grad():
                expected = transform(image).numpy()
            found = preprocess(image, told)
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        if found.shape != expected.shape or np.abs(found - expected).max() > 1.01 * LEVEL / min(told["std"]):
            return False
    return True
