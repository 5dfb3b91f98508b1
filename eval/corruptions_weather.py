"""Corruptions by weather and light: float images [H,W,C] in 0..1."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .corruptions_optics import filtered, trail

ICE = (0.86, 0.94, 1.0)
"""Colour of frost, red, green, blue: a cold white."""
LUMA = (0.299, 0.587, 0.114)


def plasma(height: int, width: int, exponent: float, generator: np.random.Generator) -> np.ndarray:
    """A cloud [H,W] from 0 to 1: noise whose amplitude falls as 1 / frequency^exponent, so it looks alike at every scale."""
    shape = (2 * height, 2 * width)  # a quarter of a field that repeats itself, so that no edge matches the other
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.standard_normal(shape)) / frequency**exponent
    return _stretched(np.fft.irfft2(spectrum, shape)[:height, :width])


def snow(x: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Flakes over about that share of the pixels, blurred as they fall, before a scene that is itself lighter and paler."""
    height, width, _ = x.shape
    flake = max(1.0, 0.012 * min(height, width))
    few = (math.ceil(height / flake), math.ceil(width / flake))
    drops = generator.standard_normal(few).astype(np.float32)
    drops = np.asarray(Image.fromarray(drops).resize((width, height), Image.Resampling.BILINEAR))
    flakes = np.clip((drops - np.quantile(drops, 1 - share)) / drops.std() * 2, 0, 1)[:, :, None]
    fall = generator.uniform(np.pi / 4, 3 * np.pi / 4)
    flakes = np.clip(1.5 * filtered(flakes.astype(np.float32), trail(flake, fall)), 0, 1)
    grey = x if x.shape[2] == 1 else x @ np.asarray(LUMA, np.float32)[:, None]
    pale = np.maximum(x, 0.5 + 0.5 * grey)
    return (1 - share) * x + share * pale + flakes


def frost(x: np.ndarray, opacity: float, generator: np.random.Generator) -> np.ndarray:
    """Ice on the pane, up to that opacity: needles in a few directions, thicker in patches and towards the edge.

    A procedure stands where Hendrycks & Dietterich lay photographs of frosted windows over the image.
    """
    height, width, channels = x.shape
    side = min(height, width)
    noise = generator.standard_normal((height, width, 1)).astype(np.float32)
    angles = generator.uniform(0, np.pi) + np.arange(3) * np.pi / 3  # ice crystals have six sides
    lines = [np.abs(filtered(noise, trail(max(1.0, 0.05 * side), angle))) for angle in angles]
    needles = _stretched(np.max(lines, axis=0)[:, :, 0])
    rows, columns = (np.abs(np.linspace(-1, 1, n)) for n in (height, width))
    patches = _stretched(plasma(height, width, 1.7, generator) + 0.6 * np.maximum(rows[:, None], columns))
    cover = opacity * np.clip(0.35 + 0.4 * patches + 0.5 * needles, 0, 1)[:, :, None]
    colour = np.asarray(ICE if channels == 3 else (1.0,), np.float32)
    return (1 - cover) * x + cover * colour * (0.55 + 0.45 * needles[:, :, None])


def fog(x: np.ndarray, thickness: float, generator: np.random.Generator) -> np.ndarray:
    """A cloud is added, and the sum scaled back to the image's brightest value."""
    brightest = x.max()
    cloud = plasma(x.shape[0], x.shape[1], 2.0, generator)[:, :, None]
    return (x + thickness * cloud) * (brightest / (brightest + thickness))


def brightness(x: np.ndarray, added: float, generator: np.random.Generator) -> np.ndarray:
    """The value of HSV, the largest of a pixel's channels, is raised; hue and saturation stay."""
    value = x.max(2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: np.ndarray, factor: float, generator: np.random.Generator) -> np.ndarray:
    """Every channel is drawn together around its mean over the image."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _stretched(field: np.ndarray) -> np.ndarray:
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, np.finfo(field.dtype).tiny)
