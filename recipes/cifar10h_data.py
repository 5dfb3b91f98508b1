"""CIFAR-10's test images with the labels people gave them, the five sets they are split into, and their crops.

The images come from a folder (`posthoc.eval.datasets`), from torchvision (`--download`) or from a data set of the hub; the
votes from a .npy file of CIFAR-10H (Peterson et al., ICCV 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..adapters.data import open_source
from ..adapters.errors import DataError, OptionError
from ..adapters.perturbations import center_crop
from ..adapters.source_base import LABEL_COLUMNS, Source
from ..adapters.source_loader import load_image
from ..adapters.training_loop import step_generator
from ..eval.ambiguity import read_votes
from ..eval.datasets import default_data_dir, open_named
from .classifier import shifted

Labels = Literal["soft", "hard", "train-hard"]
SETS = 5
LEAST_ROWS = 20 * SETS
"""Images that can be split into so many sets to train on."""
CLASSES = 10
FILES = ("cifar10h-probs.npy", "cifar10h-counts.npy")
WHERE_VOTES = f"{' or '.join(FILES)}, which are in the folder data of github.com/jcpeterson/cifar-10h"
AGREEMENT = 0.9
"""Least share of the images whose most frequent vote is their label: it is .992 in CIFAR-10H."""
SMALLEST = 0.25
"""Of the sides of a crop, as a share of the image's."""
PADDED = 4
"""Pixels by which an augmented image moves at most."""
SPLIT, FRACTION, STORED_CROP = 200, 201, 202  # places of the random numbers


@dataclass(frozen=True)
class CifarH:
    """Images uint8 [N,32,32,3]; votes float32 [N,C], shares of the people who saw that class; label int64 [N], the most
    frequent vote, which is what the paper counts as the class."""

    images: np.ndarray
    votes: np.ndarray

    @property
    def label(self) -> np.ndarray:
        return self.votes.argmax(1).astype(np.int64)


def load_cifar10h(
    data_dir: Path | None, labels: Path | None = None, images: str = "cifar10", rows: int | None = None
) -> CifarH:
    """The test images and their votes.

    Args:
        data_dir: folder of both, None means `default_data_dir()`. labels: the votes' file, where it lies elsewhere.
        images: "cifar10", or a data set of the hub in the test set's order.
        rows: only the first so many images.

    Raises DataError: nothing there (saying what goes where), a file that does not fit, votes in another order than images.
    """
    folder = Path(data_dir or default_data_dir()).expanduser()
    path = _find_votes(folder, labels)
    source = open_images(folder, images, "test")
    pixels = as_pixels(source)
    votes = read_votes(path, len(pixels), CLASSES).astype(np.float32)
    label = class_labels(source)
    if label is not None:
        _check_order(path, votes, label)
    return CifarH(pixels[:rows], votes[:rows])


def load_training(data_dir: Path, images: str = "cifar10") -> tuple[np.ndarray, np.ndarray]:
    """The training images uint8 [M,32,32,3] and their classes int [M]. Raises DataError: not there, or without classes."""
    source = open_images(data_dir, images, "train")
    label = class_labels(source)
    if label is None:
        raise DataError(
            f"{source.name} has no classes of its training images in a column {' or '.join(LABEL_COLUMNS)}: give --train-on "
            "soft or hard, or other --images"
        )
    return as_pixels(source), label


def fetch_cifar10(folder: Path) -> None:
    """Let torchvision fetch CIFAR-10 into the folder, if it is not there. Raises DataError."""
    import torchvision

    try:
        torchvision.datasets.CIFAR10(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"--download: CIFAR-10 could not be fetched into {folder}: {error}") from error


def open_images(folder: Path, images: str, split: str) -> Source:
    """The images of one split, by name or from the hub. Raises DataError."""
    return open_named("cifar10", split, folder) if images == "cifar10" else open_source(images, split)


def as_pixels(source: Source) -> np.ndarray:
    """uint8 [N,32,32,3]. Raises DataError for images of another size."""
    pixels = getattr(source, "images", None)
    if pixels is None:
        pixels = [np.asarray(load_image(one.image)) for one in source.stream()]
    for row, one in enumerate(pixels):
        if one.dtype != np.uint8 or one.shape != (32, 32, 3):
            raise DataError(
                f"{source.name}: images of 32 x 32 px are expected; that of row {row} is {one.dtype} {list(one.shape)}"
            )
    return np.asarray(pixels)


def class_labels(source: Source) -> np.ndarray | None:
    """The class of each image, int [N]; None where the source has no classes."""
    for name in LABEL_COLUMNS:
        try:
            label = source.column(name)
        except DataError:
            continue
        return label if label.ndim == 1 and label.dtype.kind in "iu" else None
    return None


def _check_order(path: Path, votes: np.ndarray, label: np.ndarray) -> None:
    agree = float((votes.argmax(1) == label).mean())
    if agree < AGREEMENT:
        raise DataError(
            f"{path}: the most frequent vote is the image's label for {agree:.1%} of the images; at least {AGREEMENT:.0%} are "
            "expected: the order of the rows (the test set's) or of the columns (airplane, automobile, bird, cat, deer, dog, "
            "frog, horse, ship, truck) differs. Give the file as it is published, or images in the test set's order"
        )


def _find_votes(folder: Path, labels: Path | None) -> Path:
    if labels is not None:
        if not labels.is_file():
            raise DataError(f"--labels {labels} was given, and there is no such file; expected {WHERE_VOTES}")
        return labels
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"the votes of CIFAR-10H are not in {folder}: expected {WHERE_VOTES}. Lay one there, name the file with --labels, or "
        "another folder with --data-dir"
    )


def five_sets(rows: int, seed: int) -> list[np.ndarray]:
    """Row numbers in five disjoint random sets, of equal size up to one row. Raises DataError for fewer than 100 rows.

    The paper's own sets are stored index lists that are not in this package: these are others.
    """
    if rows < LEAST_ROWS:
        raise DataError(f"{rows} images cannot be split into {SETS} sets to train on: at least {LEAST_ROWS} are needed")
    order = torch.randperm(rows, generator=step_generator(seed, SPLIT)).numpy()
    return [np.sort(part) for part in np.array_split(order, SETS)]


def fold_rows(sets: list[np.ndarray], fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to train on (three sets), to validate on and to test on (one each), as in the paper for its seed `fold`."""
    if not 0 <= fold < SETS:
        raise OptionError(f"fold {fold} was given; expected 0 to {SETS - 1}")
    turned = [sets[(fold + k) % SETS] for k in range(SETS)]
    return np.sort(np.concatenate(turned[:3])), turned[3], turned[4]


def one_hot(label: np.ndarray, classes: int) -> np.ndarray:
    """float32 [N, C]."""
    return np.eye(classes, dtype=np.float32)[label]


def crop_fractions(rows: int, seed: int, place: int = FRACTION) -> np.ndarray:
    """One fraction for each image, uniform on 0.25 to 1, float64 [N]."""
    drawn = torch.rand(rows, generator=step_generator(seed, place), dtype=torch.float64).numpy()
    return SMALLEST + (1 - SMALLEST) * drawn


def cropped(images: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Each image's centre, enlarged to the image's size again: uint8 [N,32,32,3]."""
    return np.stack(
        [np.asarray(center_crop(Image.fromarray(x), float(f))) for x, f in zip(images, fractions, strict=True)]
    )


class ImageInputs:
    """Images as the network takes them: whole (or mirrored), cropped by the stored fractions, or as a step sees them."""

    def __init__(self, images: np.ndarray, crops: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.images, self.crops = images, crops
        self.mean, self.std = (255 * torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))

    def whole(self, rows: np.ndarray, crop: bool = False, mirrored: bool = False) -> Tensor:
        """float32 [B,3,32,32]."""
        pixels = (self.crops if crop else self.images)[rows]
        return self._normalised(pixels[:, :, ::-1] if mirrored else pixels)

    def training(self, rows: Tensor, crops: float, augment: bool, generator: torch.Generator) -> Tensor:
        """A share `crops` of the rows as random centre crops; all moved and mirrored at random if `augment`."""
        pixels = self.images[rows.numpy()]
        share = torch.rand(len(rows), 2, generator=generator).numpy()
        taken = np.flatnonzero(share[:, 0] < crops)
        if len(taken):
            pixels = pixels.copy()
            pixels[taken] = cropped(pixels[taken], SMALLEST + (1 - SMALLEST) * share[taken, 1])
        x = self._normalised(pixels)
        if augment:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            x = shifted(x, PADDED, generator)
        return x.contiguous(memory_format=torch.channels_last)

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
        return (x - self.mean) / self.std


class FeatureInputs:
    """Stored features in the place of images: whole, of the crops, and of other crops to train on."""

    def __init__(self, features: np.ndarray, crops: np.ndarray, training_crops: np.ndarray) -> None:
        self.features, self.crops, self.training_crops = (
            torch.from_numpy(np.array(x, dtype=np.float32)) for x in (features, crops, training_crops)
        )

    def whole(self, rows: np.ndarray, crop: bool = False, mirrored: bool = False) -> Tensor:
        """float32 [B, D]; there are none of mirrored images."""
        return (self.crops if crop else self.features)[torch.from_numpy(rows)]

    def training(self, rows: Tensor, crops: float, augment: bool, generator: torch.Generator) -> Tensor:
        """A share `crops` of the rows as stored crops; features cannot be augmented."""
        taken = torch.rand(len(rows), generator=generator) < crops
        return torch.where(taken[:, None], self.training_crops[rows], self.features[rows])


Inputs = ImageInputs | FeatureInputs
