"""Blur, occlusion and crop: sizes, amounts, repeatability, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from posthoc import PosthocError
from posthoc.adapters.perturbations import (
    BLUR_SEVERITIES,
    CROP_FRACTIONS,
    OCCLUSION_SEVERITIES,
    blur,
    center_crop,
    occlude,
)

MODES = ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK"]


def noise(size=(40, 24), mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def array(image):
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("mode", MODES)
def test_size_and_mode_are_kept(mode):
    image = noise(mode=mode)
    kept = "RGB" if mode in ("P", "1", "CMYK") else mode
    for changed in (blur(image, 0.1), occlude(image, 0.5), center_crop(image, 0.5)):
        assert changed.size == image.size
        assert changed.mode == kept
        assert not np.array_equal(array(changed), array(image.convert(kept)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_no_amount_changes_nothing(mode):
    image = noise(mode=mode)
    for same in (blur(image, 0.0), occlude(image, 0.0), center_crop(image, 1.0)):
        assert np.array_equal(array(same), array(image))


def test_the_given_image_is_left_alone():
    image = noise()
    before = array(image).copy()
    blur(image, 0.2), occlude(image, 0.6), center_crop(image, 0.3)
    assert np.array_equal(array(image), before)


@pytest.mark.parametrize("pixels", [1.0, 2.0, 4.0])
def test_blur_is_a_gaussian_of_that_many_source_pixels(pixels):
    image = noise((96, 64), "L")
    ours = array(blur(image, pixels / 64))
    exact = gaussian_filter(array(image), pixels, mode="nearest")
    inner = np.s_[16:-16, 16:-16]  # Pillow approximates by three box blurs and treats the edge in its own way
    assert np.abs(ours[inner] - exact[inner]).max() < 0.06 * np.ptp(array(image))
    assert ours[inner].std() == pytest.approx(exact[inner].std(), rel=0.1)


def test_detail_falls_with_every_step_of_the_blur_ladder():
    image = noise((64, 64), "L")
    detail = [np.abs(np.diff(array(blur(image, s)), axis=0)).mean() for s in BLUR_SEVERITIES]
    assert np.all(np.diff(detail) < 0)


@pytest.mark.parametrize("severity", OCCLUSION_SEVERITIES[1:])
def test_occlusion_covers_its_share_with_the_mean_colour(severity):
    image = noise((64, 32))
    changed = array(occlude(image, severity, torch.Generator().manual_seed(3)))
    mean = np.round(array(image).mean((0, 1)))
    covered = (changed == mean).all(-1)
    assert covered.sum() == round(64 * severity) * round(32 * severity)
    rows, columns = np.nonzero(covered)
    assert np.ptp(rows) + 1 == round(32 * severity)
    assert np.ptp(columns) + 1 == round(64 * severity)


def test_occlusion_of_everything_leaves_one_colour():
    assert len(np.unique(array(occlude(noise(), 1.0)).reshape(-1, 3), axis=0)) == 1


def test_the_place_follows_the_generator_and_not_the_global_state():
    image = noise((64, 64))
    state = torch.get_rng_state()
    places = [array(occlude(image, 0.3, torch.Generator().manual_seed(s))) for s in (0, 0, 1, 2, 3)]
    assert np.array_equal(places[0], places[1])
    assert len({p.tobytes() for p in places}) > 2
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(array(occlude(image, 0.3)), places[0])  # no generator: seed 0


def test_places_spread_over_the_image():
    image = noise((32, 32), "L")
    generator = torch.Generator().manual_seed(0)
    hit = np.zeros((32, 32))
    for _ in range(300):
        hit += array(occlude(image, 0.25, generator)) != array(image)
    assert hit[0].sum() > 0
    assert hit[-1].sum() > 0
    assert hit[:, 0].sum() > 0
    assert hit[:, -1].sum() > 0


def test_the_crop_is_the_middle_enlarged():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    for fraction in CROP_FRACTIONS[1:]:
        changed = array(center_crop(ramp, fraction))[32, 8:-8]
        assert np.ptp(changed) / 47 == pytest.approx(4 * fraction, rel=0.03)  # the ramp is stretched by 1 / fraction
        assert changed.mean() == pytest.approx(126, abs=0.5)  # and still centred


@pytest.mark.parametrize(
    ("call", "wrong"),
    [(blur, -0.1), (blur, float("nan")), (blur, float("inf")), (occlude, 1.1), (occlude, -0.1), (center_crop, 0.0),
     (center_crop, 1.5), (center_crop, float("nan"))],
)  # fmt: skip
def test_amounts_out_of_range_are_refused(call, wrong):
    with pytest.raises(PosthocError, match="expected a number"):
        call(noise(), wrong)
