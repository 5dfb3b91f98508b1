"""SimCLR's augmentations of a whole batch at once, on any device, and what was done to each image.

    done = draw(Augmentation(), len(images), images.shape[1:], generator)
    views = augment(images, done)                 # [B, C, H, W] in 0..1
    parameters = done.table()                     # {"x": [B], "scale": [B], "flip": [B], ...}
    views = change(crops, done)                   # where images of many sizes were cropped one by one (`crop`)

The numbers are drawn on the CPU by the caller's generator, so that every device sees the same views. The pixels are those
of torchvision's functions on one image, and the numbers are distributed as those of its transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.errors import OptionError

TRIES = 10
"""Boxes that are tried for a crop before it becomes the largest one in the middle, as in torchvision."""
MOST_SIGMA = 16.0
REACH = 4
"""Standard deviations at which the blur's weights end."""
LUMA = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Augmentation:
    """How strongly images are altered; the values are SimCLR's for CIFAR-10 (Chen et al., arXiv 2002.05709, B.9).

    Attributes:
        scale: lowest and highest share of the image's area in a crop. ratio: lowest and highest width over height.
        flip, jitter, grayscale, blur: probabilities.
        brightness, contrast, saturation: a factor is drawn from 1 - this to 1 + this. hue: a turn from -this to this, in
            whole circles.
        sigma: lowest and highest standard deviation of the blur, in pixels of the view.
        rotation: a turn is drawn from -this to this, in degrees; corners that come in are black.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    rotation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "brightness", "contrast", "saturation"):
            _within(name, getattr(self, name), 1.0)
        _within("hue", self.hue, 0.5)
        _within("rotation", self.rotation, 180.0)
        for name, (low, high), most in (
            ("scale", self.scale, 1.0),
            ("ratio", self.ratio, math.inf),
            ("sigma", self.sigma, MOST_SIGMA),
        ):
            if not 0.0 < low <= high <= most:
                raise OptionError(
                    f"Augmentation: {name}={low}, {high} was given; expected 0 < lowest <= highest <= {most}"
                )


@dataclass(frozen=True)
class Parameters:
    """What is done to each of B images, on the CPU.

    Attributes:
        shape: (C, H, W) of the images. box: int64 [B, 4], the crop's top, left, height, width in pixels.
        flip, jitter, gray: bool [B]. colour: float32 [B, 4], the factors of brightness, contrast and saturation and the
            turn of the hue, 1, 1, 1, 0 where there is no jitter. order: int64 [B, 4], which of the four comes first, second...
        sigma: float32 [B], of the blur in pixels of the view; 0: none. turn: float32 [B], degrees against the clock.
    """

    shape: tuple[int, int, int]
    box: Tensor
    flip: Tensor
    jitter: Tensor
    colour: Tensor
    order: Tensor
    gray: Tensor
    sigma: Tensor
    turn: Tensor

    def __len__(self) -> int:
        return len(self.box)

    def table(self) -> dict[str, Tensor]:
        """The parameters as numbers, float64 [B] each.

        x, y: where the crop's middle lies, from -1 (left, top) to 1. scale, ratio: logarithms of the share of the area and
        of width over height. flip, grayscale: 0 or 1. brightness, contrast, saturation (factors), hue. Grey images have
        neither saturation, hue nor grayscale. sigma: where there is any blur; rotation (degrees): where there is any.
        """
        channels, height, width = self.shape
        top, left, tall, wide = self.box.double().unbind(1)
        found = {
            "x": (2.0 * left + wide) / width - 1.0,
            "y": (2.0 * top + tall) / height - 1.0,
            "scale": (tall * wide / (height * width)).log(),
            "ratio": (wide / tall).log(),
            "flip": self.flip.double(),
            "brightness": self.colour[:, BRIGHTNESS].double(),
            "contrast": self.colour[:, CONTRAST].double(),
        }
        if channels == 3:
            found["saturation"] = self.colour[:, SATURATION].double()
            found["hue"] = self.colour[:, HUE].double()
            found["grayscale"] = self.gray.double()
        if bool((self.sigma > 0).any()):
            found["sigma"] = self.sigma.double()
        if bool(self.turn.any()):
            found["rotation"] = self.turn.double()
        return found


def draw(augmentation: Augmentation, count: int, shape: Sequence[int], generator: torch.Generator) -> Parameters:
    """What to do to `count` images of `shape` (C, H, W), drawn by a generator on the CPU.

    Raises OptionError for images that have neither one channel nor three.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise OptionError(f"images of shape {tuple(shape)} were given; expected (1, H, W) or (3, H, W)")

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    box = _boxes(augmentation, count, height, width, generator)
    flip, jitter, gray = (chance(p) for p in (augmentation.flip, augmentation.jitter, augmentation.grayscale))
    reach = torch.tensor([augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue])
    rest = torch.tensor([1.0, 1.0, 1.0, 0.0])
    moved = reach * (2.0 * torch.rand(count, 4, generator=generator) - 1.0)
    order = torch.rand(count, 4, generator=generator).argsort(1)
    sigma = torch.zeros(count)
    if augmentation.blur:
        low, high = augmentation.sigma
        sigma = torch.where(chance(augmentation.blur), low + (high - low) * torch.rand(count, generator=generator), 0.0)
    turn = torch.zeros(count)
    if augmentation.rotation:
        turn = augmentation.rotation * (2.0 * torch.rand(count, generator=generator) - 1.0)
    colour = rest + torch.where(jitter[:, None], moved, 0.0)
    return Parameters((channels, height, width), box, flip, jitter, colour, order, gray, sigma, turn)


def join(parts: Sequence[Parameters]) -> Parameters:
    """The parameters of several batches as those of one batch: of images of one shape or, for `change`, of any shapes."""
    columns = [f.name for f in fields(Parameters) if f.name != "shape"]
    return Parameters(parts[0].shape, *(torch.cat([getattr(part, name) for part in parts]) for name in columns))


def augment(images: Tensor, done: Parameters, size: tuple[int, int] | None = None) -> Tensor:
    """Views [B, C, *size] in 0..1 of float images [B, C, H, W] in 0..1, on their device; `size` None: as the images.

    The crop is resized bilinearly with antialiasing, then flipped, then turned, then its colours are changed, then it is made
    grey, then blurred.
    Raises OptionError for images that the parameters are not of.
    """
    if tuple(images.shape) != (len(done), *done.shape):
        raise OptionError(f"parameters of {len(done)} images {done.shape} were given, and images {tuple(images.shape)}")
    with torch.autocast(images.device.type, enabled=False):  # an autocast around it would round crops
        views = _crop(images, done, size or (images.shape[2], images.shape[3]))
    return change(views, done)


def crop(image: Tensor, done: Parameters, size: tuple[int, int]) -> Tensor:
    """The crop of one image, uint8 [C, H, W], as `augment` resizes and flips it, uint8 [C, *size]. Takes the box alone."""
    top, left, tall, wide = done.box[0].tolist()
    box = image[None, :, top : top + tall, left : left + wide]
    view = functional.interpolate(box, size, mode="bilinear", antialias=True)[0]
    return view.flip(2) if done.flip[0] else view


def change(views: Tensor, done: Parameters) -> Tensor:
    """Crops [B, C, h, w] in 0..1 with what `augment` does to them afterwards: turned, in other colours, grey, blurred.

    They are overwritten.
    """
    with torch.autocast(views.device.type, enabled=False):  # an autocast around it would round colours
        return _changed(views, done)


def _changed(views: Tensor, done: Parameters) -> Tensor:
    if bool(done.turn.any()):
        views = _turned(views, done.turn.to(views))
    changed: list[tuple[int, Callable[[Tensor, Tensor], Tensor]]] = [(BRIGHTNESS, _brightness), (CONTRAST, _contrast)]
    if done.shape[0] == 3:
        changed += [(SATURATION, _saturation), (HUE, _hue)]
    for place in range(4):
        for which, change in changed:
            rows = torch.nonzero(done.jitter & (done.order[:, place] == which))[:, 0]
            if len(rows):
                amount = done.colour[rows, which].to(views)[:, None, None, None]
                rows = rows.to(views.device)
                views[rows] = change(views[rows], amount)
    if done.shape[0] == 3:
        rows = torch.nonzero(done.gray)[:, 0].to(views.device)
        views[rows] = luma(views[rows]).expand(-1, 3, -1, -1)
    rows = torch.nonzero(done.sigma)[:, 0]
    if len(rows):
        height, width = views.shape[2:]
        down = _gaussians(done.sigma[rows], height).to(views)
        across = down if width == height else _gaussians(done.sigma[rows], width).to(views)
        rows = rows.to(views.device)
        views[rows] = _both_ways(down, views[rows], across)
    return views


def luma(images: Tensor) -> Tensor:
    """The grey value [B, 1, H, W] of images [B, C, H, W]; of grey images the images themselves."""
    if images.shape[1] == 1:
        return images
    return sum(share * images[:, i : i + 1] for i, share in enumerate(LUMA))  # type: ignore[return-value]


def _boxes(augmentation: Augmentation, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Crops int64 [B, 4]: of `TRIES` random shapes the first that fits, at a random place."""
    low, high = augmentation.scale
    area = (low + (high - low) * torch.rand(count, TRIES, generator=generator)) * (height * width)
    short, long = (math.log(r) for r in augmentation.ratio)
    ratio = (short + (long - short) * torch.rand(count, TRIES, generator=generator)).exp()
    place = torch.rand(count, 2, generator=generator)
    tall, wide = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first = fits.int().argmax(1, keepdim=True)  # the first of the largest
    tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
    top = (place[:, 0] * (height - tall + 1)).long()
    left = (place[:, 1] * (width - wide + 1)).long()
    box = torch.stack([top, left, tall, wide], 1)
    return torch.where(fits.any(1, keepdim=True), box, torch.tensor(_middle(augmentation.ratio, height, width)))


def _middle(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    tall, wide = height, width
    if width / height < ratio[0]:
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _crop(images: Tensor, done: Parameters, size: tuple[int, int]) -> Tensor:
    top, left, tall, wide = done.box.to(images).unbind(1)
    down = _tents(top, tall, images.shape[2], size[0])
    across = _tents(left, wide, images.shape[3], size[1])
    across = torch.where(done.flip.to(images.device)[:, None, None], across.flip(1), across)
    return _both_ways(down, images, across)


def _both_ways(down: Tensor, images: Tensor, across: Tensor) -> Tensor:
    """Images [B, C, H, W] with their lines weighted by `down` [B, h, H] and `across` [B, w, W]: [B, C, h, w]."""
    lines = images.flatten(1, 2) @ across.mT.contiguous()  # all channels in one product, which takes half the time
    return down[:, None] @ lines.unflatten(1, images.shape[1:3])


def _turned(views: Tensor, degrees: Tensor) -> Tensor:
    """Views [B, C, H, W], each turned about its middle against the clock (bilinear)."""
    height, width = views.shape[2:]
    sine, cosine = (degrees * (math.pi / 180.0)).sin(), (degrees * (math.pi / 180.0)).cos()
    rest = torch.zeros_like(sine)
    across = torch.stack([cosine, -sine * height / width, rest], 1)
    down = torch.stack([sine * width / height, cosine, rest], 1)
    grid = functional.affine_grid(torch.stack([across, down], 1), list(views.shape), align_corners=False)
    return functional.grid_sample(views, grid, align_corners=False)


def _tents(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights [B, size, pixels] of a line's pixels in each of `size` new ones that divide start..start + length evenly.

    Linear interpolation; where the line shrinks the tents are as wide as a new pixel, which is the antialiasing of PIL.
    """
    step = (length / size)[:, None]
    middle = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step
    pixel = torch.arange(pixels, device=start.device) + 0.5
    weight = (1.0 - (pixel - middle[..., None]).abs() / step.clamp(min=1.0)[..., None]).clamp(min=0.0)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(2, keepdim=True)


def _gaussians(sigma: Tensor, pixels: int) -> Tensor:
    """Weights [B, pixels, pixels] of a line's pixels in each blurred one; what lies beyond an end is the mirrored line."""
    distance = torch.arange(pixels + 1)
    share = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance <= REACH * sigma[:, None])
    share[:, pixels] = 0.0  # so far that nothing comes from there
    i, j = torch.arange(pixels)[:, None], torch.arange(pixels)
    left = torch.where(j > 0, i + j, pixels)  # from a pixel's mirror image beyond the left end; the end itself has none
    right = torch.where(j < pixels - 1, 2 * (pixels - 1) - i - j, pixels)
    apart = torch.stack([(i - j).abs(), left, right]).clamp(max=pixels)
    # whole rows of numbers are taken together, one for each image, which is what takes little time
    weight = share.T.contiguous()[apart.flatten()].view(3, pixels, pixels, len(sigma)).sum(0)
    weight = weight.permute(2, 0, 1).contiguous()
    return weight / weight.sum(2, keepdim=True)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0.0, 1.0)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, factor).clamp(0.0, 1.0)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x), x, factor).clamp(0.0, 1.0)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Colours turned by a share of the circle: in HSV the value and the chroma stay, the hue moves."""
    red, green, blue = x.split(1, 1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    ahead = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    first = torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))
    sector = ahead / torch.where(chroma > 0, chroma, 1.0) + first + 6.0 * turn
    channel = torch.tensor([5.0, 3.0, 1.0], device=x.device, dtype=x.dtype)[:, None, None]
    k = sector + channel
    k = k - 6.0 * (k / 6.0).floor()
    return value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)


def _within(name: str, value: float, most: float) -> None:
    if not 0.0 <= value <= most:
        raise OptionError(f"Augmentation: {name}={value} was given; expected a number from 0 to {most:g}")
