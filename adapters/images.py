"""Images in: whatever a user holds becomes PIL RGB, or a batch ready for the backbone; the augmentation for views."""

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
_ACCEPTED = "PIL or uint8 images ([B,H,W,3], [B,H,W], [H,W,3], [B,3,H,W]) or preprocessed floats [B,3,H,W]"
_CHANNELS = (1, 3, 4)


def to_pil(image: Any) -> Image.Image:
    """One image as PIL RGB.

    Takes PIL images of any mode but float, and arrays or tensors [H,W], [H,W,C] or [C,H,W] (C: 1, 3 or 4) of uint8,
    uint16 or bool. 16-bit grey is scaled by its full range (65535 becomes 255); transparent images are composited on
    white; the orientation tag of a photo is not applied (nor do torchvision and timm). Raises DataError for anything
    else.
    """
    return _pil_to_rgb(image) if isinstance(image, Image.Image) else _array_to_rgb(_as_numpy(image))


def _as_numpy(image: Any) -> np.ndarray:
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not hasattr(image, "__array__"):
        raise DataError(f"an image of type {type(image).__name__} was given; expected {_ACCEPTED}.")
    return np.asarray(image)


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow opens 16-bit grey files as I;16 or, in older versions, as I
        return _array_to_rgb(_eight_bits(np.asarray(image)))
    if image.mode == "F":
        raise DataError("a PIL image of mode 'F' (float) has no known range; scale it to 0..255 and convert it to 'L'.")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:  # LAB
        raise DataError(f"a PIL image of mode {image.mode!r} was given, which Pillow cannot convert to RGB.") from error


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(
            f"an image with values {values.min()}..{values.max()} was given; expected 16-bit grey, 0..65535."
        )
    return np.round(values / 257.0).astype(np.uint8)


def _array_to_rgb(array: np.ndarray) -> Image.Image:
    given = f"an image array of shape {array.shape} and dtype {array.dtype} was given"
    if array.ndim == 3 and array.shape[2] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint16:
        array = _eight_bits(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shaped or array.dtype != np.uint8 or array.size == 0:
        raise DataError(
            f"{given}; expected uint8 [H,W], [H,W,3] or [3,H,W]. Convert float images to uint8 (0..255), or pass them "
            "preprocessed, as a float batch [B,3,H,W]."
        )
    return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def split_images(images: Any) -> list[Any]:
    """A batch of PIL or uint8 images as single images for `to_pil`. Raises DataError where the shape is ambiguous."""
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (list, tuple)):
        return list(images)
    array = _as_numpy(images)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS):
        return [array]
    if array.ndim == 3 and array.shape[0] in _CHANNELS:
        raise DataError(
            f"an array of shape {array.shape} is either {array.shape[0]} grey images or one image with channels first; "
            "give [B,H,W,1] for grey images, [1,C,H,W] for one image."
        )
    if array.ndim in (3, 4):
        return list(array)
    raise DataError(f"an array of shape {array.shape} was given; expected {_ACCEPTED}.")


def is_ready(images: Any) -> bool:
    """Whether these are float images, that is to say already preprocessed."""
    if isinstance(images, (list, tuple)):
        return bool(images) and all(is_ready(image) for image in images)
    if isinstance(images, Tensor):
        return images.is_floating_point()
    return isinstance(images, np.ndarray) and images.dtype.kind == "f"


def ready_batch(images: Any) -> Tensor:
    """Float images as one tensor [B,C,H,W]; one image [C,H,W] is a batch of one. Raises DataError for unequal sizes."""
    if isinstance(images, (list, tuple)):
        tensors = [torch.as_tensor(image) for image in images]
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise DataError(f"float images of the shapes {shapes} were given; a batch needs one shape.")
        images = torch.stack(tensors)
    batch = torch.as_tensor(images)
    return batch[None] if batch.ndim == 3 else batch


def check_ready(batch: Tensor, preprocessing: dict[str, Any]) -> None:
    """Checks float images against what the backbone expects.

    DataError for a wrong shape, for a size other than a fixed one, for NaN and infinity; UserWarning when the values
    show that a normalisation is missing. While compiling or exporting only the shape is checked.
    """
    channels, *size = preprocessing.get("input_size") or (None,)
    if batch.ndim != 4 or channels not in (None, batch.shape[1]):
        raise DataError(
            f"float images of shape {tuple(batch.shape)} were given; floats are taken as preprocessed, "
            f"[B,{channels or 3},H,W]. Give PIL or uint8 images to have them preprocessed."
        )
    if preprocessing.get("fixed_input_size") and list(batch.shape[2:]) != size:
        raise DataError(
            f"float images of {batch.shape[2]}x{batch.shape[3]} pixels were given; this backbone takes "
            f"{size[0]}x{size[1]} only. Resize them, or give PIL or uint8 images: its own preprocessing resizes those."
        )
    if torch.compiler.is_compiling() or batch.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(batch.detach()))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("the images contain NaN or infinite values; look at how they were read and normalised.")
    mean, std = preprocessing.get("mean"), preprocessing.get("std")
    if not mean or not std or (set(mean) == {0} and set(std) == {1}):
        return
    brightest = max((1 - m) / s for m, s in zip(mean, std, strict=True))
    if 0 <= low < high <= 1 or (low >= 0 and high > 10 * max(brightest, 1)):
        warnings.warn(
            f"float images are taken as preprocessed, but all values lie in [{low:.4g}, {high:.4g}] while this "
            f"backbone expects images normalised by mean {mean} and std {std}: the normalisation seems to be missing. "
            "Normalise them, or give PIL or uint8 images.",
            UserWarning,
            stacklevel=3,
        )


def apply_transform(transform: Transform, images: Sequence[Any]) -> Tensor:
    """[B,C,H,W]: every image, as PIL RGB, through `transform`. Raises DataError if that gives no equal [C,H,W]."""
    if not images:
        raise DataError("an empty list of images was given.")
    tensors = [transform(to_pil(image)) for image in images]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DataError(f"the transform gave {found}; it must turn a PIL image into a float tensor [3,H,W].")
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise DataError(f"the transform gave images of the shapes {shapes}; a batch needs one: let it resize and crop.")
    return torch.stack(tensors)


def transform_settings(transform: Transform, made: Tensor, known: dict[str, Any]) -> dict[str, Any]:
    """What can be told of a user's own transform: its text, mean and std of a Normalize step, and the size it gives.

    made: two probe images [2,C,H,W], or one [1,C,H,W] if the size follows the image's: then height and width are None.
    """
    text = repr(transform)
    settings: dict[str, Any] = {
        "transform": getattr(transform, "__qualname__", type(transform).__qualname__) if " at 0x" in text else text,
        "input_size": list(made.shape[1:]) if len(made) == 2 else [made.shape[1], None, None],
        "fixed_input_size": bool(known.get("fixed_input_size")),
    }
    for step in getattr(transform, "transforms", [transform]):
        if type(step).__name__ == "Normalize":
            settings["mean"] = [float(value) for value in step.mean]
            settings["std"] = [float(value) for value in step.std]
    return settings


def simclr_augmentation(size: int) -> transforms.Compose:
    """SimCLR's augmentation of a PIL image, giving size x size pixels (Chen et al. 2020, appendix A).

    Crop of 20 to 100 % of the area; flip; colour jitter (.4, .4, .4, .1) with probability .8; grey with .2; blur with
    .5 (kernel of a tenth of `size`, sigma .1 to 2). Random by torch's global generator: fork and seed it to repeat a
    view.
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


class AugmentedTransform:
    """PIL -> [3,H,W]: SimCLR's augmentation, then the transform; holds no weights, so workers can have it.

    size: of the augmented image; None: the shorter side of the image itself.
    """

    def __init__(self, transform: Transform, size: int | None) -> None:
        self.transform, self.size = transform, size

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(simclr_augmentation(self.size or min(image.size))(to_pil(image)))

    def __repr__(self) -> str:
        return f"AugmentedTransform(size={self.size}, transform={self.transform!r})"


def augmented_transform(backbone: Backbone) -> AugmentedTransform:
    """`simclr_augmentation` at the backbone's input size, followed by the backbone's own transform, whatever it is.

    Raises BackboneError if the backbone has no transform.
    """
    return AugmentedTransform(backbone.require_transform(), backbone.preprocessing["input_size"][-1])
