"""Corruptions: closed forms where there are any, and on real pictures order of severity, determinism, shapes."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter
from sklearn.datasets import load_digits, load_sample_images

from posthoc.adapters.errors import DataError, OptionError
from posthoc.eval import corruptions_optics as optics
from posthoc.eval import corruptions_weather as weather
from posthoc.eval.corruptions import KINDS, LARGE, SEVERITIES, SMALL, corrupt


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """uint8 [12, 28, 28], grey."""
    images = (load_digits().images[:12] * 255 / 16).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((28, 28), Image.Resampling.BICUBIC)) for one in images])


@pytest.fixture(scope="module")
def photos() -> dict[int, np.ndarray]:
    """By side, pieces of two photographs, uint8 [N, side, side, 3]."""
    pieces = [
        Image.fromarray(photo).crop((x, 60, x + 300, 360))
        for photo in load_sample_images().images
        for x in (0, 170, 340)
    ]
    return {
        side: np.stack([np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) for p in pieces])
        for side in (32, 224)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["digits", 32, 224])
def test_a_higher_severity_is_farther_from_the_original_on_average(kind, which, digits, photos):
    images = digits if which == "digits" else photos[which][: 6 if which == 32 else 2]
    if which == 32:
        images = np.concatenate([images] + [np.rot90(images, k, (1, 2)) for k in (1, 2, 3)])
    away = [
        np.mean([np.abs(corrupt(one, kind, s).astype(float) - one).mean() for one in images]) for s in (0, *SEVERITIES)
    ]
    assert away[0] == 0
    assert away[1] > 0
    assert np.all(np.diff(away) > (-0.35 if kind == "fog" else 0)), away  # the weight of a cloud hangs on the cloud


@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_type_are_kept(kind, digits, photos):
    rgb = photos[32][0]
    for image in (digits[0], digits[0][:, :, None], rgb, rgb[:, :25]):
        made = corrupt(image, kind, 3)
        assert made.dtype == np.uint8
        assert made.shape == image.shape
    for mode in ("L", "RGB"):
        made = corrupt(Image.fromarray(rgb).convert(mode), kind, 3)
        assert (made.mode, made.size) == (mode, (32, 32))
    np.testing.assert_array_equal(corrupt(Image.fromarray(rgb), kind, 3), corrupt(rgb, kind, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_black_white_and_tiny_images_stay_finite_pictures(kind):
    for level in (0, 255):
        for shape in ((8, 8), (28, 31, 3)):
            made = corrupt(np.full(shape, level, np.uint8), kind, 5)
            assert made.shape == shape


def test_severity_0_gives_the_image_back(photos):
    image = photos[32][0]
    assert corrupt(image, "fog", 0) is image
    palette = Image.fromarray(image).convert("P")
    assert corrupt(palette, "fog", 0).mode == "RGB"


def test_draws_hang_on_image_kind_severity_and_seed_alone(photos):
    first, second = photos[32][:2]
    made = corrupt(first, "gaussian_noise", 3)
    noise = made.astype(int) - first
    corrupt(second, "snow", 1)
    np.testing.assert_array_equal(corrupt(first.copy(), "gaussian_noise", 3), made)
    np.testing.assert_array_equal(corrupt(np.asfortranarray(first), "gaussian_noise", 3), made)
    for other in (corrupt(first, "gaussian_noise", 3, seed=1), corrupt(first, "gaussian_noise", 4)):
        assert abs(np.corrcoef((other.astype(int) - first).ravel(), noise.ravel())[0, 1]) < 0.1
    other = corrupt(second, "gaussian_noise", 3).astype(int) - second
    assert abs(np.corrcoef(other.ravel(), noise.ravel())[0, 1]) < 0.1


def test_another_process_corrupts_the_same_way():
    code = (
        "import numpy as np, hashlib; from posthoc.eval.corruptions import KINDS, corrupt; "
        "image = np.random.default_rng(0).integers(0, 256, (28, 30, 3), dtype=np.uint8); "
        "print(hashlib.sha256(b''.join(corrupt(image, k, 2).tobytes() for k in KINDS)).hexdigest())"
    )
    image = np.random.default_rng(0).integers(0, 256, (28, 30, 3), dtype=np.uint8)
    here = hashlib.sha256(b"".join(corrupt(image, kind, 2).tobytes() for kind in KINDS)).hexdigest()
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == here
    )


def test_noise_has_the_moments_it_should_have():
    grey = np.full((224, 224, 3), 128, np.uint8)
    for severity in (1, 3):  # far from the ends, where values are cut off
        noise = corrupt(grey, "gaussian_noise", severity).astype(float) / 255 - 128 / 255
        assert noise.std() == pytest.approx(KINDS["gaussian_noise"].large[severity - 1], rel=0.01)
        assert abs(noise.mean()) < 0.002
    shot = corrupt(grey, "shot_noise", 1).astype(float) / 255
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 / 60), rel=0.02)
    assert shot.mean() == pytest.approx(128 / 255, abs=0.002)
    impulse = corrupt(grey, "impulse_noise", 4)
    assert np.isin(impulse, (0, 128, 255)).all()
    assert (impulse != 128).mean() == pytest.approx(0.17, abs=0.003)
    assert (impulse == 255).sum() / (impulse != 128).sum() == pytest.approx(0.5, abs=0.02)


def test_brightness_raises_the_value_of_hsv_and_contrast_draws_to_the_mean(photos):
    image = photos[224][0]
    x = image / 255
    raised = corrupt(image, "brightness", 2).astype(float) / 255
    np.testing.assert_allclose(raised.max(2), np.minimum(x.max(2) + 0.2, 1), atol=0.003)
    before, after = (
        np.asarray(Image.fromarray(one).convert("HSV")).astype(int)
        for one in (image, np.rint(raised * 255).astype(np.uint8))
    )
    bright = (before[:, :, 1] > 60) & (before[:, :, 2] > 60)
    turned = np.abs(before[:, :, 0] - after[:, :, 0])[bright]
    assert np.quantile(np.minimum(turned, 256 - turned), 0.99) <= 3
    flat = corrupt(image, "contrast", 3).astype(float) / 255
    mean = x.mean((0, 1))
    np.testing.assert_allclose(flat, (x - mean) * 0.2 + mean, atol=0.003)
    grey = image[:, :, 0]
    np.testing.assert_array_equal(corrupt(grey, "brightness", 2), np.minimum(grey + 51.0, 255).round().astype(np.uint8))


def test_jpeg_is_pillows_and_pixelate_is_a_mean_of_blocks(photos, digits):
    image = photos[224][0]
    for one, quality in ((image, 25), (digits[0], 80)):
        stored = io.BytesIO()
        Image.fromarray(one).save(stored, "JPEG", quality=quality)
        np.testing.assert_array_equal(corrupt(one, "jpeg_compression", 1), np.asarray(Image.open(stored)))
    blocks = image.reshape(112, 2, 112, 2, 3).mean((1, 3))
    np.testing.assert_allclose(corrupt(image, "pixelate", 2), np.kron(blocks, np.ones((2, 2, 1))), atol=1)


def test_blur_kernels_have_the_mass_area_and_direction_they_should_have():
    for radius in (0.3, 0.8, 2.5, 7.0):
        kernel = optics.disc(radius)
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel.T)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1])
        half = len(kernel) // 2
        places = np.arange(-half, half + 1)
        variance = (kernel.sum(0) * places**2).sum()
        if radius > 1:  # r^2 / 4 along an axis; pixels of width 1 move it by at most 1/12
            assert variance == pytest.approx(radius**2 / 4, abs=0.15)
    assert optics.disc(0.3)[1, 1] == 1
    for angle in (0.0, 0.6, -0.7):
        kernel = optics.trail(6.0, angle)
        half = len(kernel) // 2
        rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
        down, right = (kernel * rows).sum(), (kernel * columns).sum()
        assert kernel.sum() == pytest.approx(1)
        assert np.arctan2(down, right) == pytest.approx(angle, abs=1e-6)
        t = np.linspace(0, 12, 2001)
        weight = np.exp(-(t**2) / 72)
        assert np.hypot(down, right) == pytest.approx((t * weight).sum() / weight.sum(), rel=0.03)


def test_filtering_is_a_convolution_with_a_mirrored_edge(photos):
    x = photos[32][0] / 255
    kernel = gaussian_filter(np.eye(7), 1.0)
    kernel[2, 5] += 1
    expected = np.stack([convolve(x[:, :, c], kernel, mode="reflect") for c in range(3)], axis=2)
    np.testing.assert_allclose(optics.filtered(x, kernel), expected, atol=1e-10)


def test_moving_by_whole_pixels_is_a_shift_and_elastic_displacement_is_as_long_as_asked(monkeypatch):
    x = np.random.default_rng(0).random((20, 24, 2))
    moved = optics.moved(x, np.full((20, 24), 2.0), np.full((20, 24), -3.0))
    np.testing.assert_allclose(moved[:-2, 3:], x[2:, :-3], atol=1e-12)
    seen = []
    monkeypatch.setattr(optics, "moved", lambda x, down, right: seen.append((down, right)) or x)
    optics.elastic_transform(np.zeros((64, 80, 1)), 1.7, np.random.default_rng(0))
    optics.glass_blur(np.zeros((64, 80, 1)), 2.0, np.random.default_rng(0))
    (down, right), (d, r) = seen
    assert np.sqrt((down**2 + right**2).mean()) == pytest.approx(1.7)
    assert np.abs(np.diff(down, axis=0)).max() < 1.0  # smooth
    assert max(np.abs(d).max(), np.abs(r).max()) <= 2
    assert d.std() == pytest.approx(2 / np.sqrt(3), rel=0.02)


def test_zoom_blur_keeps_the_middle_and_a_flat_image(photos):
    flat = np.full((33, 33, 3), 90, np.uint8)
    for kind in ("zoom_blur", "defocus_blur", "motion_blur", "glass_blur", "elastic_transform", "pixelate", "contrast"):
        np.testing.assert_array_equal(corrupt(flat, kind, 5), flat)
    rows, columns = np.mgrid[-16:17, -16:17]
    cone = (255 - 10 * np.hypot(rows, columns)).clip(0).astype(np.uint8)
    away = np.abs(corrupt(cone, "zoom_blur", 5).astype(int) - cone)
    assert away[16, 16] <= 6
    assert away[16, 28] > 8


def test_plasma_falls_off_with_frequency_as_asked():
    power = []
    for seed in range(8):
        cloud = weather.plasma(128, 128, 1.5, np.random.default_rng(seed))
        assert (cloud.min(), cloud.max()) == (0, 1)
        window = np.hanning(128)[:, None] * np.hanning(128)
        power.append(np.abs(np.fft.fft2((cloud - cloud.mean()) * window)) ** 2 / cloud.var())
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    band = (frequency > 0.05) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(np.mean(power, axis=0)[band]), 1)[0]
    assert slope == pytest.approx(-3.0, abs=0.25)  # amplitude 1 / f^1.5


def test_amounts_go_from_the_small_ladder_to_the_large_one():
    noise, blur = KINDS["gaussian_noise"], KINDS["defocus_blur"]
    assert noise.amount(1, SMALL) == noise.amount(1, 8) == pytest.approx(0.04)
    assert noise.amount(5, LARGE) == noise.amount(5, 500) == pytest.approx(0.38)
    assert noise.amount(5, round(np.sqrt(SMALL * LARGE))) == pytest.approx(np.sqrt(0.10 * 0.38), rel=0.02)
    assert blur.amount(3, 100) == pytest.approx(3.8)
    for ladder in KINDS.values():
        for levels in (ladder.small, ladder.large or ladder.small):
            assert len(set(levels)) == 5
            assert list(levels) in (sorted(levels), sorted(levels, reverse=True))


def test_real_photos_of_the_shared_folder_come_out_at_their_own_size(shared: Path):
    from posthoc.adapters.data import open_source
    from posthoc.adapters.source_loader import load_image

    source = open_source(shared / "data/tiny_imagenet_val.parquet")
    image = load_image(source.item(5).image)
    for kind in KINDS:
        made = corrupt(image, kind, 5)
        assert made.size == image.size == (64, 64)
        assert np.abs(np.asarray(made).astype(int) - np.asarray(image)).mean() > 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((8, 8), np.uint8), "foog", 1), OptionError, "'foog' is unknown.*fog"),
        ((np.zeros((8, 8), np.uint8), "fog", 6), OptionError, "severity=6"),
        ((np.zeros((8, 8)), "fog", 1), DataError, "float64"),
        ((np.zeros((8, 8, 4), np.uint8), "fog", 1), DataError, r"\[8, 8, 4\]"),
        ((np.zeros((0, 8), np.uint8), "fog", 1), DataError, r"\[0, 8\]"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        corrupt(*arguments)
