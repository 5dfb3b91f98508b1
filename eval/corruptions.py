"""Fifteen ways in which a picture goes wrong, at five severities, for images of any size: what `eval.shift` measures.

The kinds are those of Hendrycks & Dietterich (ICLR 2019, arXiv 1903.12261), made here from their definitions with NumPy,
SciPy and Pillow; numbers on these images are not to be compared with numbers on the published ImageNet-C files. What
differs: lengths are shares of the image's shorter side; frost is made by a procedure instead of from photographs; glass
shows each pixel a random one nearby instead of swapping neighbours in turn; an elastic transform has no affine part.

How severe a level is depends on the image's size where it must. Lengths (blurs, displacements) mean the same at every size
as shares of the side. Amplitudes do not: an average over many pixels sees through noise, so small pictures get weaker
noise, weather and compression. Each such kind has two ladders, one near the published levels for CIFAR-10-C (32 pixels)
and one near those for ImageNet-C (224); in between the level is interpolated geometrically in the logarithm of the side,
and beyond the ends it stays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from ..adapters.errors import DataError, OptionError, suggest
from ..adapters.images import to_pil
from . import corruptions_optics as optics
from . import corruptions_weather as weather

SMALL, LARGE = 32, 224
SEVERITIES = (1, 2, 3, 4, 5)
VERSION = 1
"""Part of the key of stored features: raised whenever a corruption comes out differently."""
Levels = tuple[float, float, float, float, float]
ImageLike = TypeVar("ImageLike", Image.Image, np.ndarray)


@dataclass(frozen=True)
class Ladder:
    """One kind: `apply(image float [H,W,C] in 0..1, amount, generator)` and its amounts, mildest first.

    `small` is for a shorter side of 32 pixels, `large` for 224; without `large` the amounts are shares of that side and
    reach `apply` in pixels.
    """

    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    small: Levels
    large: Levels | None = None

    def amount(self, severity: int, side: int) -> float:
        """The amount at a severity for an image of that shorter side."""
        low = self.small[severity - 1]
        if self.large is None:
            return low * side
        place = min(max(math.log(side / SMALL) / math.log(LARGE / SMALL), 0.0), 1.0)
        return low ** (1 - place) * self.large[severity - 1] ** place


def gaussian_noise(x: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    return x + deviation * generator.standard_normal(x.shape, dtype=np.float32)


def shot_noise(x: np.ndarray, photons: float, generator: np.random.Generator) -> np.ndarray:
    """Photon counts of a sensor on which a white pixel collects `photons` on average."""
    return generator.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """That share of the values becomes 0 or 1, either as likely."""
    drawn = generator.random(x.shape)
    return np.where(drawn < share, drawn < share / 2, x)


KINDS: dict[str, Ladder] = {
    "gaussian_noise": Ladder(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Ladder(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Ladder(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Ladder(optics.defocus_blur, (0.025, 0.031, 0.038, 0.045, 0.052)),
    "glass_blur": Ladder(optics.glass_blur, (0.012, 0.017, 0.023, 0.029, 0.036)),
    "motion_blur": Ladder(optics.motion_blur, (0.020, 0.030, 0.042, 0.055, 0.070)),
    "zoom_blur": Ladder(optics.zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26), (1.11, 1.16, 1.21, 1.26, 1.31)),
    "snow": Ladder(weather.snow, (0.03, 0.06, 0.10, 0.14, 0.18), (0.06, 0.12, 0.18, 0.24, 0.30)),
    "frost": Ladder(weather.frost, (0.25, 0.35, 0.45, 0.55, 0.65), (0.45, 0.55, 0.65, 0.75, 0.85)),
    "fog": Ladder(weather.fog, (0.2, 0.5, 0.75, 1.0, 1.5), (1.0, 1.5, 2.0, 2.5, 3.0)),
    "brightness": Ladder(weather.brightness, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Ladder(weather.contrast, (0.75, 0.50, 0.40, 0.30, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Ladder(optics.elastic_transform, (0.008, 0.013, 0.019, 0.026, 0.034)),
    "pixelate": Ladder(optics.pixelate, (0.95, 0.90, 0.85, 0.75, 0.65), (0.60, 0.50, 0.40, 0.30, 0.25)),
    "jpeg_compression": Ladder(optics.jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""The kinds by name. Amounts: standard deviation; photons of a white pixel; share of values; radius; displacement; length;
largest zoom; share of pixels under a flake; opacity; thickness; value added; factor; displacement; share of the side kept;
JPEG quality."""


def corrupt(image: ImageLike, kind: str, severity: int, seed: int = 0) -> ImageLike:
    """The image gone wrong in one way, of the same size, mode and type.

    Args:
        image: PIL image (grey stays grey, other modes become RGB), or uint8 array [H,W], [H,W,1] or [H,W,3].
        kind: a name of `KINDS`.
        severity: 1 to 5; 0 gives the image back as it is.
        seed: with it, the image's pixels, the kind and the severity fix every draw: the same image is corrupted the
            same way in any batch, order and process.

    Raises OptionError for an unknown kind or severity, DataError for other arrays.
    """
    check_corruption(kind, severity)
    if isinstance(image, Image.Image):
        grey = image if image.mode == "L" else to_pil(image)
        return grey if not severity else Image.fromarray(_corrupted(np.asarray(grey), kind, severity, seed))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise DataError(
            f"an image of {image.dtype} {list(image.shape)} was given; expected a PIL image, or uint8 [H,W], [H,W,1] or "
            "[H,W,3]: corruptions work on pictures before any preprocessing"
        )
    return image if not severity else _corrupted(image, kind, severity, seed)


def check_corruption(kind: str, severity: int) -> None:
    """Raises OptionError for an unknown kind, and for a severity other than 0 to 5."""
    if kind not in KINDS:
        raise OptionError(f"corruption {kind!r} is unknown: {suggest(kind, KINDS)}")
    if severity not in (0, *SEVERITIES):
        raise OptionError(f"severity={severity!r} was given; expected a whole number from 0 (as it is) to 5")


def _corrupted(pixels: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    ladder = KINDS[kind]
    key = hashlib.sha256(f"{seed}/{kind}/{severity}/{pixels.shape}/".encode())
    key.update(np.ascontiguousarray(pixels).data)
    generator = np.random.default_rng(int.from_bytes(key.digest()[:16], "little"))
    x = (pixels if pixels.ndim == 3 else pixels[:, :, None]).astype(np.float32) / 255
    made = ladder.apply(x, ladder.amount(severity, min(x.shape[:2])), generator)
    return np.rint(np.clip(made, 0, 1) * 255).astype(np.uint8).reshape(pixels.shape)
