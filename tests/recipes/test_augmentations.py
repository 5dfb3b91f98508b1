"""Augmentations of a batch against torchvision's of one image, and the distribution of what is drawn."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as reference

from posthoc.adapters.errors import OptionError
from posthoc.recipes.augmentations import Augmentation, Parameters, augment, change, crop, draw, join, luma

HALVES = (slice(0, 100), slice(100, 200))
ALTERED = (
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
)


def one_by_one(images: Tensor, done: Parameters, size: tuple[int, int]) -> Tensor:
    """The same by torchvision, an image at a time."""
    views = []
    for i, image in enumerate(images):
        view = reference.resized_crop(image, *done.box[i].tolist(), list(size), antialias=True)
        if done.flip[i]:
            view = reference.horizontal_flip(view)
        if done.jitter[i]:
            for which in done.order[i].tolist():
                if which < 2 or len(image) == 3:
                    view = ALTERED[which](view, float(done.colour[i, which]))
        views.append(reference.rgb_to_grayscale(view, 3) if done.gray[i] and len(image) == 3 else view)
    return torch.stack(views)


@pytest.mark.parametrize(("channels", "size"), [(3, (24, 20)), (3, (40, 33)), (3, (7, 9)), (1, (24, 20))])
def test_every_view_is_torchvisions(channels: int, size: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.rand(60, channels, 24, 20, generator=generator)
    images[:5] = (images[:5] * 2).round() / 2  # flat colours: equal channels, no chroma
    done = draw(Augmentation(hue=0.5), 60, images.shape[1:], generator)
    views = augment(images, done, size)
    assert views.shape == (60, channels, *size)
    torch.testing.assert_close(views, one_by_one(images, done, size), atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_many_sizes_are_cropped_alone_and_changed_together(channels: int, generator: torch.Generator) -> None:
    """As `augment` does it with each whole image, but for the crop's 8 bits."""
    how, size = Augmentation(grayscale=0.3, blur=0.5, rotation=20.0), (16, 12)
    images = [
        torch.randint(0, 256, (channels, 20 + i, 40 - i), generator=generator, dtype=torch.uint8) for i in range(24)
    ]
    done = [draw(how, 1, image.shape, generator) for image in images]
    crops = torch.stack([crop(image, one, size) for image, one in zip(images, done, strict=True)])
    assert (crops.dtype, crops.shape) == (torch.uint8, (24, channels, *size))
    no = torch.zeros(1, dtype=torch.bool)
    still = [replace(one, jitter=no, gray=no, sigma=torch.zeros(1), turn=torch.zeros(1)) for one in done]
    for image, one, view in zip(images, still, crops, strict=True):
        assert (255 * augment(image[None] / 255, one, size)[0] - view).abs().max() < 1.01
    views = change(crops / 255.0, join(done))
    wanted = [change(view[None] / 255.0, one)[0] for view, one in zip(crops, done, strict=True)]
    torch.testing.assert_close(views, torch.stack(wanted))
    whole = torch.cat([augment(image[None] / 255, one, size) for image, one in zip(images, done, strict=True)])
    assert (views - whole).abs().mean() < 1 / 255


def test_what_is_done_depends_on_the_row_alone(generator: torch.Generator) -> None:
    images = torch.rand(16, 3, 12, 12, generator=generator)
    parts = [draw(Augmentation(), 8, (3, 12, 12), torch.Generator().manual_seed(i)) for i in (0, 1)]
    whole = augment(images, join(parts))
    apart = torch.cat([augment(images[:8], parts[0]), augment(images[8:], parts[1])])
    torch.testing.assert_close(whole, apart)
    again = draw(Augmentation(), 8, (3, 12, 12), torch.Generator().manual_seed(1))
    assert torch.equal(augment(images[8:], again), apart[8:])


def test_nothing_is_done_where_nothing_is_asked_for(generator: torch.Generator) -> None:
    images = torch.rand(8, 3, 10, 14, generator=generator)
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.4, 1.4), flip=0.0, jitter=0.0, grayscale=0.0)
    done = draw(still, 8, images.shape[1:], generator)
    torch.testing.assert_close(augment(images, done), images)
    table = done.table()
    for name, rest in {"x": 0.0, "y": 0.0, "scale": 0.0, "flip": 0.0, "brightness": 1.0, "hue": 0.0}.items():
        assert (table[name] == rest).all(), name


def test_boxes_are_distributed_as_torchvisions(generator: torch.Generator) -> None:
    """Of both kinds: a wide range of shapes, and one that always fails, so that the middle is taken."""
    for scale, ratio, count in (((0.08, 1.0), (3 / 4, 4 / 3), 2000), ((0.9, 1.0), (2.0, 3.0), 20)):
        done = draw(Augmentation(scale=scale, ratio=ratio), count, (3, 32, 32), generator)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = [
                transforms.RandomResizedCrop.get_params(torch.empty(3, 32, 32), scale, ratio) for _ in range(count)
            ]
        theirs = torch.tensor(drawn).double()
        ours = done.box.double()
        for moment in (torch.mean, torch.std):
            # five standard errors of either
            assert (moment(ours, 0) - moment(theirs, 0)).abs().max() < 5 * 10 / math.sqrt(count)
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, :2] + ours[:, 2:] <= 32).all()
    assert ours.unique(dim=0).tolist() == [[8, 0, 16, 32]]  # no such box fits: ratio 2 in the middle


def test_colours_are_drawn_in_their_ranges(generator: torch.Generator) -> None:
    done = draw(Augmentation(brightness=0.3, hue=0.2), 5000, (3, 8, 8), generator)
    table = done.table()
    on = done.jitter.numpy().astype(bool)
    assert table["flip"].mean() == pytest.approx(0.5, abs=0.04)
    assert on.mean() == pytest.approx(0.8, abs=0.03)
    assert table["grayscale"].mean() == pytest.approx(0.2, abs=0.03)
    for name, middle, reach in (("brightness", 1, 0.3), ("contrast", 1, 0.4), ("saturation", 1, 0.4), ("hue", 0, 0.2)):
        assert (table[name][~on] == middle).all()
        moved = table[name][on]
        assert moved.min() == pytest.approx(middle - reach, abs=0.01)
        assert moved.max() == pytest.approx(middle + reach, abs=0.01)
        assert moved.mean() == pytest.approx(middle, abs=0.02)
    assert sorted(done.order.unique(dim=0).tolist()) == sorted(
        [a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4) if len({a, b, c, d}) == 4
    )


def test_the_table_says_where_the_crop_lies() -> None:
    done = draw(Augmentation(), 3, (1, 20, 40), torch.Generator().manual_seed(0))
    done.box[:] = torch.tensor([[0, 0, 10, 10], [10, 30, 10, 10], [5, 0, 10, 40]])
    table = done.table()
    assert table["x"].tolist() == [-0.75, 0.75, 0.0]
    assert table["y"].tolist() == [-0.5, 0.5, 0.0]
    assert table["scale"].exp().tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 2])
    assert table["ratio"].exp().tolist() == pytest.approx([1, 1, 4])
    assert set(table) == {"x", "y", "scale", "ratio", "flip", "brightness", "contrast"}  # of a grey image


def test_blur_is_torchvisions(generator: torch.Generator) -> None:
    """Where its kernel ends at four standard deviations, as ours does."""
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.4, 1.4), flip=0.0, jitter=0.0, grayscale=0.0, blur=0.5)
    images = torch.rand(200, 3, 20, 28, generator=generator)
    done = draw(still, 200, (3, 20, 28), generator)
    blurred = done.sigma > 0
    assert blurred.double().mean() == pytest.approx(0.5, abs=0.15)
    assert done.sigma[blurred].min() == pytest.approx(0.1, abs=0.1)
    assert done.sigma[blurred].max() == pytest.approx(2.0, abs=0.1)
    assert torch.equal(done.table()["sigma"], done.sigma.double())
    done.sigma[:3] = torch.tensor([0.5, 1.0, 2.0])
    done.sigma[3] = 0.0
    views = augment(images, done)
    for row, size in enumerate((5, 9, 17)):
        theirs = reference.gaussian_blur(images[row], [size, size], [done.sigma[row].item()] * 2)
        torch.testing.assert_close(views[row], theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(views[3], images[3])
    parts = [Parameters(done.shape, *(getattr(done, f.name)[part] for f in fields(done)[1:])) for part in HALVES]
    halves = torch.cat([augment(images[part], one) for part, one in zip(HALVES, parts, strict=True)])
    assert torch.equal(halves, views)


def test_grey_values_are_torchvisions(generator: torch.Generator) -> None:
    images = torch.rand(4, 3, 5, 6, generator=generator)
    torch.testing.assert_close(luma(images), reference.rgb_to_grayscale(images))
    assert torch.equal(luma(images[:, :1]), images[:, :1])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(OptionError, match=r"scale=0\.0, 1\.0"):
        Augmentation(scale=(0.0, 1.0))
    with pytest.raises(OptionError, match=r"flip=1\.5"):
        Augmentation(flip=1.5)
    with pytest.raises(OptionError, match=r"hue=0\.7"):
        Augmentation(hue=0.7)
    with pytest.raises(OptionError, match=r"\(4, 8, 8\)"):
        draw(Augmentation(), 2, (4, 8, 8), torch.Generator())
    done = draw(Augmentation(), 2, (3, 8, 8), torch.Generator())
    with pytest.raises(OptionError, match=r"2 images \(3, 8, 8\)"):
        augment(torch.rand(3, 3, 8, 8), done)


def test_turns_are_torchvisions(generator: torch.Generator) -> None:
    images = torch.rand(12, 3, 20, 26, generator=generator)
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.3, 1.3), flip=0.0, jitter=0.0, grayscale=0.0, rotation=45.0)
    done = draw(still, 12, images.shape[1:], generator)
    views = augment(images, done)
    bilinear = transforms.InterpolationMode.BILINEAR
    for image, view, degrees in zip(images, views, done.turn.tolist(), strict=True):
        torch.testing.assert_close(view, reference.rotate(image, degrees, bilinear), atol=1e-4, rtol=0)
    assert done.turn.min() < -10
    assert done.turn.max() > 10
    assert done.turn.abs().max() <= 45
    assert torch.equal(done.table()["rotation"], done.turn.double())
    with pytest.raises(OptionError, match=r"rotation=200\.0"):
        Augmentation(rotation=200.0)
