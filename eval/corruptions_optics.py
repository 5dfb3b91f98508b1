"""Corruptions of lens, glass, motion and storage: float images [H,W,C] in 0..1, lengths in pixels."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.signal import fftconvolve

SMOOTHNESS = 0.07
"""Standard deviation of the Gaussian that smooths elastic displacements, as a share of the shorter side."""


def filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`x` [H,W,C] under an odd-sized kernel; beyond the edge the image is mirrored."""
    tall, wide = (n // 2 for n in kernel.shape)
    padded = np.pad(x, ((tall, tall), (wide, wide), (0, 0)), mode="symmetric")
    return fftconvolve(padded, kernel[:, :, None].astype(x.dtype), mode="valid", axes=(0, 1))


def moved(x: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Each pixel shows what lies `down` and `right` [H,W] of it, interpolated linearly; the image is mirrored at its edge."""
    rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]
    place = np.stack([rows + down, columns + right])
    return np.stack([map_coordinates(x[:, :, c], place, order=1, mode="reflect") for c in range(x.shape[2])], axis=2)


def disc(radius: float) -> np.ndarray:
    """A disc as a kernel with the sum 1: the area of it that falls on each pixel, on a grid eight times as fine."""
    half, fine = max(1, math.ceil(radius - 0.5)), 8
    place = (np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = place[:, None] ** 2 + place**2 <= radius**2
    kernel = inside.reshape(2 * half + 1, fine, 2 * half + 1, fine).sum((1, 3))
    return kernel / kernel.sum()


def trail(deviation: float, angle: float) -> np.ndarray:
    """A kernel with the sum 1: half a Gaussian along a line from the middle, cut off at two standard deviations."""
    length = 2 * deviation
    along = np.linspace(0, length, 4 * math.ceil(length) + 1)
    half = math.ceil(length) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    rows, columns = half + along * math.sin(angle), half + along * math.cos(angle)
    weight = np.exp(-(along**2) / (2 * deviation**2))
    for down in (0, 1):  # each point is shared out among the four pixels around it
        for right in (0, 1):
            row, column = np.floor(rows).astype(int) + down, np.floor(columns).astype(int) + right
            np.add.at(kernel, (row, column), weight * (1 - np.abs(row - rows)) * (1 - np.abs(column - columns)))
    return kernel / kernel.sum()


def defocus_blur(x: np.ndarray, radius: float, generator: np.random.Generator) -> np.ndarray:
    """A point becomes a disc."""
    return filtered(x, disc(radius))


def glass_blur(x: np.ndarray, reach: float, generator: np.random.Generator) -> np.ndarray:
    """Frosted glass: slightly blurred, each pixel shows one at random up to `reach` away, and slightly blurred again."""
    soft = (reach / 4, reach / 4, 0)
    down, right = generator.uniform(-reach, reach, (2, *x.shape[:2]))
    return gaussian_filter(moved(gaussian_filter(x, soft), down, right), soft)


def motion_blur(x: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """The camera moves in a direction at most 45 degrees off the horizontal."""
    return filtered(x, trail(deviation, generator.uniform(-np.pi / 4, np.pi / 4)))


def zoom_blur(x: np.ndarray, largest: float, generator: np.random.Generator) -> np.ndarray:
    """The mean of the image at zooms from 1 to `largest`, as many as move its border by less than two pixels a step."""
    height, width, channels = x.shape
    steps = max(3, math.ceil((largest - 1) * max(height, width) / 2 / 2) + 1)
    image, total = _as_image(x), np.zeros(x.shape, np.float32)
    for zoom in np.linspace(1, largest, steps):
        cut = [(side - side / zoom) / 2 for side in (width, height)]
        box = (cut[0], cut[1], width - cut[0], height - cut[1])
        total += _as_floats(image.resize((width, height), Image.Resampling.BILINEAR, box=box), channels)
    return total / steps


def elastic_transform(x: np.ndarray, distance: float, generator: np.random.Generator) -> np.ndarray:
    """Regions are stretched and squeezed: smooth random displacements whose root mean square is `distance`."""
    smooth = SMOOTHNESS * min(x.shape[:2])
    field = gaussian_filter(generator.standard_normal((2, *x.shape[:2])), (0, smooth, smooth), mode="reflect")
    down, right = field * (distance / np.sqrt((field**2).sum(0).mean()))
    return moved(x, down, right)


def pixelate(x: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Each side is reduced to that share of its pixels (means of boxes) and enlarged again without smoothing."""
    height, width, channels = x.shape
    few = (max(1, round(width * share)), max(1, round(height * share)))
    blocks = _as_image(x).resize(few, Image.Resampling.BOX)
    return _as_floats(blocks.resize((width, height), Image.Resampling.NEAREST), channels)


def jpeg_compression(x: np.ndarray, quality: float, generator: np.random.Generator) -> np.ndarray:
    """Written as JPEG of that quality (rounded) and read again."""
    stored = io.BytesIO()
    _as_image(x).save(stored, "JPEG", quality=round(quality))
    with Image.open(stored) as image:
        return _as_floats(image, x.shape[2])


def _as_image(x: np.ndarray) -> Image.Image:
    pixels = np.rint(x * 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if x.shape[2] == 1 else pixels)


def _as_floats(image: Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(image, dtype=np.float32) / 255
    return pixels[:, :, None] if channels == 1 else pixels
