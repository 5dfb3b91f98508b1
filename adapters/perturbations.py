"""Three ways to make an image harder to read by a known amount: blur, occlusion, crop.

PIL image in, PIL image of the same size out. Every amount is a LENGTH AS A SHARE OF THE SIDE of the source
image, so the same ladder means the same on an 8 px digit and on a 500 px photo: a severity of k source pixels on an
image of n pixels is k / n. Severity 0 (crop fraction 1) gives back the image as it is.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageFilter, ImageStat

from .errors import OptionError

BLUR_SEVERITIES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Standard deviations of the Gaussian over the shorter side: up to 1 px on 8 px, 4 px on 32 px, 28 px on 224 px."""
OCCLUSION_SEVERITIES = (0.0, 0.25, 0.375, 0.5, 0.625)
"""Sides of the patch over the image's sides; the patch covers the square of it: 0, 6, 14, 25, 39 % of the area."""
CROP_FRACTIONS = (1.0, 0.8125, 0.625, 0.4375, 0.25)
"""Sides of the central crop over the image's sides, from the whole image to a quarter of each side."""


def blur(image: Image.Image, severity: float) -> Image.Image:
    """Gaussian blur.

    Args:
        image: any PIL image; modes other than L, LA, RGB and RGBA become RGB.
        severity: standard deviation as a share of the shorter side, >= 0.

    Raises OptionError for a negative or non-finite severity.
    """
    _check("blur severity", severity, 0.0, float("inf"))
    image = _unpacked(image)
    return image.filter(ImageFilter.GaussianBlur(severity * min(image.size))) if severity else image


def occlude(image: Image.Image, severity: float, generator: torch.Generator | None = None) -> Image.Image:
    """Cover one patch, in a random place, with the image's mean colour.

    Args:
        image: any PIL image; modes other than L, LA, RGB and RGBA become RGB.
        severity: sides of the patch as a share of the image's sides, 0 to 1, rounded to whole pixels; it covers
            about severity^2 of the area.
        generator: where the place is drawn from (two uniform numbers, whatever the severity: the same state of the
            generator puts larger patches in the same relative place). None: a generator seeded with 0.

    Raises OptionError for a severity outside 0..1.
    """
    _check("occlusion severity", severity, 0.0, 1.0)
    image = _unpacked(image).copy()
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    place = torch.rand(2, generator=generator).tolist()
    size = [round(severity * side) for side in image.size]
    left, top = (round(p * (side - s)) for p, side, s in zip(place, image.size, size, strict=True))
    if all(size):
        colour = tuple(round(mean) for mean in ImageStat.Stat(image).mean)
        image.paste(colour if len(colour) > 1 else colour[0], (left, top, left + size[0], top + size[1]))
    return image


def center_crop(image: Image.Image, fraction: float) -> Image.Image:
    """The middle of the image, resized back to its size (bicubic; the cut may fall between pixels).

    Args:
        image: any PIL image; modes other than L, LA, RGB and RGBA become RGB.
        fraction: sides of what is kept as a share of the image's sides, above 0 and up to 1.

    Raises OptionError for a fraction outside (0, 1].
    """
    _check("crop fraction", fraction, 0.0, 1.0, above=True)
    image = _unpacked(image)
    if fraction == 1:
        return image
    width, height = image.size
    x, y = width * (1 - fraction) / 2, height * (1 - fraction) / 2
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(x, y, width - x, height - y))


def _unpacked(image: Image.Image) -> Image.Image:
    """Palettes cannot be averaged and Pillow blurs only 8 bits; a backbone sees all of these as RGB anyway."""
    return image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")


def _check(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
        bounds = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
        raise OptionError(f"{name}={value} was given; expected a number {bounds}")
