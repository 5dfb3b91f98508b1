"""Images in: whatever a user holds becomes PIL RGB, or a batch ready for the backbone; and the augmentation for views."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from .errors import DataError

if TYPE_CHECKING:
    from .backbone import Backbone

Transform = Callable[[Image.Image], Tensor]
_ACCEPTED = "PIL images, uint8 images ([B,H,W,3], [B,H,W], [H,W,3], [B,3,H,W]) or preprocessed floats [B,3,H,W]"


def to_pil(image: Any) -> Image.Image:
    """One image as PIL RGB.

    PIL images of any mode, or uint8 / uint16 / bool arrays and tensors [H,W], [H,W,1|3|4] or [1|3|4,H,W]. 16-bit grey is scaled by
    its full range (65535 becomes 255); transparent images are composited on white; the orientation tag of a photo is not
    applied (as in torchvision and timm). Raises DataError for anything else, float images included.
    """
    return _pil_to_rgb(image) if isinstance(image, Image.Image) else _array_to_rgb(_as_numpy(image))


def _as_numpy(image: Any) -> np.ndarray:
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray) and not hasattr(image, "__array__"):
        raise DataError(f"an image of type {type(image).__name__} was given; expected {_ACCEPTED}.")
    return np.asarray(image)


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow opens 16-bit grey files as I;16 or, in older versions, as I
        return _array_to_rgb(_sixteen_bits(np.asarray(image)))
    if image.mode == "F":
        raise DataError(
            "a PIL image of mode 'F' (float) has no known range; scale it to 0..255 and convert it to 'L' first."
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_bits(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(
            f"a 32-bit integer image with values {values.min()}..{values.max()} was given; expected 16-bit grey (0..65535)."
        )
    return np.round(values.astype(np.float64) / 257.0).astype(np.uint8)


def _array_to_rgb(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint16:
        array = _sixteen_bits(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shaped or array.dtype != np.uint8 or array.size == 0:
        raise DataError(
            f"an image array of shape {array.shape} and dtype {array.dtype} was given; expected uint8 [H,W], [H,W,3] or [3,H,W]. "
            "Scale float images to 0..255 and convert them to uint8, or pass them preprocessed as a float batch [B,3,H,W]."
        )
    return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def split_images(images: Any) -> list[Any]:
    """A batch of PIL or uint8 images as a list of single images for `to_pil`. Raises DataError where that is ambiguous."""
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return list(images)
    array = _as_numpy(images)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        return [array]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        raise DataError(
            f"a uint8 array of shape {array.shape} is either {array.shape[0]} grey images or one image with channels first; "
            "give [B,H,W,1] for grey images, [1,C,H,W] for one image."
        )
    if array.ndim in (3, 4):
        return list(array)
    raise DataError(f"an array of shape {array.shape} was given; expected {_ACCEPTED}.")


def is_ready(images: Any) -> bool:
    """Whether these are float images, that is to say already preprocessed."""
    if isinstance(images, Tensor):
        return images.is_floating_point()
    if isinstance(images, list | tuple) and images:
        return all(isinstance(image, Tensor) and image.is_floating_point() for image in images)
    return isinstance(images, np.ndarray) and images.dtype.kind == "f"


def ready_batch(images: Any) -> Tensor:
    """Float images as one tensor [B,C,H,W]; a single [C,H,W] becomes a batch of one. Raises DataError for unequal sizes."""
    if isinstance(images, list | tuple):
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(f"float images of different shapes {sorted(shapes)} were given; a batch needs one shape.")
        images = torch.stack(list(images))
    batch = torch.as_tensor(images)
    return batch[None] if batch.ndim == 3 else batch


def check_ready(batch: Tensor, preprocessing: dict[str, Any]) -> None:
    """Checks float images against what the backbone expects.

    DataError for a wrong shape, for a size other than a fixed one, and for NaN or infinity; UserWarning when every value is in
    [0, 1] although the preprocessing normalises. While compiling or exporting only the shape is checked.
    """
    channels, *size = preprocessing.get("input_size", (3,))
    if batch.ndim != 4 or batch.shape[1] != channels:
        raise DataError(
            f"float images of shape {tuple(batch.shape)} were given; floats are taken as preprocessed, [B,{channels},H,W]. "
            "Give uint8 or PIL images to have them preprocessed."
        )
    if preprocessing.get("fixed_input_size") and list(batch.shape[2:]) != list(size):
        raise DataError(
            f"images of {batch.shape[2]}x{batch.shape[3]} pixels were given; this backbone takes {size[0]}x{size[1]} only. "
            "Resize them, or give PIL or uint8 images, which are resized by the backbone's own preprocessing."
        )
    if torch.compiler.is_compiling() or batch.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(batch.detach()))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("the images contain NaN or infinite values; look at how they were read and normalised.")
    if 0.0 <= low < high <= 1.0 and normalises(preprocessing):
        warnings.warn(
            f"float images are taken as preprocessed, but all values lie in [{low:.3g}, {high:.3g}] while this backbone expects "
            f"normalised images (mean {preprocessing['mean']}, std {preprocessing['std']}): the normalisation seems to be missing. "
            "Normalise them, or give uint8 or PIL images.",
            UserWarning,
            stacklevel=3,
        )


def normalises(preprocessing: dict[str, Any]) -> bool:
    """Whether a mean or a standard deviation is known that moves images out of [0, 1]."""
    mean, std = preprocessing.get("mean"), preprocessing.get("std")
    return bool(mean and std) and (any(value != 0 for value in mean or ()) or any(value != 1 for value in std or ()))


def apply_transform(transform: Transform, images: Sequence[Any]) -> Tensor:
    """[B,3,H,W]: every image as PIL RGB through `transform`. Raises DataError if that does not give equal tensors [3,H,W]."""
    if not images:
        raise DataError("an empty list of images was given.")
    tensors = [transform(to_pil(image)) for image in images]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or tensor.shape != tensors[0].shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DataError(
                f"the transform gave {found}; it must turn a PIL image into a float tensor [3,H,W] of one size."
            )
    return torch.stack(tensors)


def simclr_augmentation(size: int) -> transforms.Compose:
    """SimCLR's augmentation of a PIL image: crop to `size` pixels, flip, colour jitter, grey, blur (Chen et al. 2020, appendix A).

    Crop of 20 to 100 % of the area; jitter (.4, .4, .4, .1) with probability .8; grey with .2; blur (kernel a tenth of `size`,
    sigma .1 to 2) with .5. The randomness is that of torch's global generator: fork and seed it to repeat a view.
    """
    kernel = max(3, size // 10 | 1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(kernel, (0.1, 2.0))], p=0.5),
        ]
    )


def augmented_transform(backbone: Backbone) -> Transform:
    """PIL -> [3,H,W]: `simclr_augmentation` at the backbone's input size, then the backbone's own transform, whatever it is.

    Holds no weights, so it can be sent to DataLoader workers. Raises BackboneError if the backbone has no transform.
    """
    transform = backbone.require_transform()
    return transforms.Compose([to_pil, simclr_augmentation(int(backbone.preprocessing["input_size"][-1])), transform])


def transform_settings(transform: Transform, output: Tensor, timm_settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a user's own transform, as far as they can be told: the size it gives, and mean and std of a Normalize step."""
    settings: dict[str, Any] = {
        "transform": repr(transform) if "object at 0x" not in repr(transform) else type(transform).__qualname__,
        "input_size": list(output.shape[1:]),
        "fixed_input_size": bool(timm_settings.get("fixed_input_size")),
    }
    for step in getattr(transform, "transforms", [transform]):
        if type(step).__name__ == "Normalize":
            settings["mean"] = [float(value) for value in step.mean]
            settings["std"] = [float(value) for value in step.std]
    return settings
