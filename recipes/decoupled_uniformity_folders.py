"""ImageNet-100, CUB-200, UT-Zappos50K and CheXpert in the folders that their own archives unpack to, with their attributes.

Nothing is downloaded: where something is missing, the error says what is expected where and how to get it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapters.errors import DataError, OptionError, suggest
from ..adapters.source_arrays import IMAGE_ENDINGS
from .lam_folders import check_files, find_folder, read_classes, read_lines, read_pairs, read_table

CLASSES = 100
"""Of ImageNet-100."""
TRAINED_ON = 0.7
"""Share of UT-Zappos50K's images; the paper's numbers of images are these, its list of them is not published with the data."""
SPLIT = 700  # place of the random numbers
HEALTHY, DEVICES = "No Finding", "Support Devices"
PATHOLOGIES = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", DEVICES,
)  # fmt: skip
"""CheXpert's labels, beside the one of healthy images."""


@dataclass(frozen=True)
class Attributes:
    """What people have said about each image: float32 [N, P], and each column's name, GROUP:VALUE."""

    values: np.ndarray
    names: tuple[str, ...]

    def of_groups(self, groups: Sequence[str]) -> Attributes:
        """The columns of some groups, all where none is named. Raises OptionError for a group that there is not."""
        own = [name.split(":", 1)[0] for name in self.names]
        for group in groups:
            if group not in own:
                raise OptionError(f"--prior attributes:{group}: there is no such group; {suggest(group, set(own))}")
        chosen = [i for i, group in enumerate(own) if not groups or group in groups]
        return Attributes(self.values[:, chosen], tuple(self.names[i] for i in chosen))

    def groups(self) -> list[str]:
        """Every group once, in the order of the columns."""
        return list(dict.fromkeys(name.split(":", 1)[0] for name in self.names))

    def are_classes(self, group: str, label: np.ndarray) -> bool:
        """Whether a group is the classes, int64 [N], by another name: two images have the same values just where they are of
        one class."""
        value = np.unique(self.of_groups([group]).values, axis=0, return_inverse=True)[1].reshape(-1)
        pairs = len(np.unique(np.stack([value, label]), axis=1).T)
        return pairs == len(np.unique(value)) == len(np.unique(label))


@dataclass(frozen=True)
class LabelledFiles:
    """Image files and their labels: int64 [N], or float32 [N, L] of 0, 1 and NaN. attributes: reads those of all N."""

    paths: list[Path]
    label: np.ndarray
    base: Path
    attributes: Callable[[], Attributes] | None = None


def read_imagenet100(root: Path) -> tuple[LabelledFiles, LabelledFiles]:
    """`imagenet100/train/WNID/` and `imagenet100/val/WNID/`; or all of ImageNet there, and imagenet100.txt with 100 WNIDs."""
    folder = find_folder(
        root, "imagenet100", "train",
        "lay ImageNet's folders train and val there, of the 100 classes, or of all with a file imagenet100.txt beside them "
        "that has one WordNet id of the 100 on each line (the list is the paper's, from contrastive multiview coding)",
    )  # fmt: skip
    listed = folder / "imagenet100.txt"
    if listed.is_file():
        names = sorted({line.split()[0] for line in read_lines(listed) if line.strip()})
    else:
        names = sorted(
            one.name for one in (folder / "train").iterdir() if one.is_dir() and not one.name.startswith(".")
        )
    if len(names) != CLASSES:
        raise DataError(f"{folder} has {len(names)} classes; expected {CLASSES}: list their WordNet ids in {listed}")
    parts = [_of_classes(folder / split, names) for split in ("train", "val")]
    return parts[0], parts[1]


def _of_classes(folder: Path, names: Sequence[str]) -> LabelledFiles:
    paths, label = [], []
    for number, name in enumerate(names):
        if not (folder / name).is_dir():
            raise DataError(f"{folder / name} is not there: one folder for each class is expected, in train and in val")
        found = sorted(one for one in (folder / name).iterdir() if one.suffix.lower() in IMAGE_ENDINGS)
        paths += found
        label += [number] * len(found)
    check_files(paths, folder)
    return LabelledFiles(paths, np.array(label, np.int64), folder)


def read_cub(root: Path) -> tuple[LabelledFiles, LabelledFiles]:
    """All 200 species, split as train_test_split.txt says: `CUB_200_2011/` with images.txt, image_class_labels.txt, images/.

    Attributes, 312 of an image: attributes/image_attribute_labels.txt, and attributes.txt that names them.
    """
    folder = find_folder(
        root, "CUB_200_2011", "images.txt", "unpack CUB_200_2011.tgz of Caltech's data repository there"
    )
    names, split = (dict(read_pairs(folder / name)) for name in ("images.txt", "train_test_split.txt"))
    label = read_classes(folder / "image_class_labels.txt")
    if not names or set(names) != set(label) or set(names) != set(split):
        raise DataError(
            f"{folder}: images.txt, image_class_labels.txt and train_test_split.txt do not name the same images"
        )
    wrong = next((key for key, mark in split.items() if mark not in ("0", "1")), None)
    if wrong is not None:
        raise DataError(
            f"{folder / 'train_test_split.txt'}, line '{wrong} {split[wrong]}': expected 0 or 1 behind the image's"
        )
    parts = []
    for mark in ("1", "0"):
        keys = [key for key in names if split[key] == mark]
        paths = [folder / "images" / names[key] for key in keys]
        check_files(paths, folder)
        number = np.array([label[key] - 1 for key in keys], np.int64)
        parts.append(LabelledFiles(paths, number, folder, lambda keys=keys: _cub_attributes(folder, keys)))  # type: ignore[misc]
    return parts[0], parts[1]


def _cub_attributes(folder: Path, keys: Sequence[str]) -> Attributes:
    named = [place / "attributes.txt" for place in (folder / "attributes", folder, folder.parent)]
    found = next((path for path in named if path.is_file()), None)
    if found is None:
        raise DataError(f"{named[0]} is not there, nor {named[2]}: unpack the archive again")
    words = dict(read_pairs(found))
    column = {key: place for place, key in enumerate(words)}
    row = {key: place for place, key in enumerate(keys)}
    values = np.full((len(keys), len(column)), np.nan, np.float32)
    said, known = folder / "attributes" / "image_attribute_labels.txt", {"0": 0.0, "1": 1.0}
    for number, line in enumerate(read_lines(said), 1):
        cells = line.split(None, 3)  # some lines have a column too many, behind these
        if len(cells) < 3 or cells[1] not in column or cells[2] not in known:
            raise DataError(
                f"{said}, line {number}: {line[:60]!r}; expected an image, an attribute of {found.name}, 0 or 1: unpack the "
                "archive again"
            )
        if cells[0] in row:
            values[row[cells[0]], column[cells[1]]] = known[cells[2]]
    if np.isnan(values).any():
        raise DataError(
            f"{folder}: {int(np.isnan(values).any(1).sum())} images lack attributes: unpack the archive again"
        )
    return Attributes(values, tuple(word.replace("::", ":", 1) for word in words.values()))


def read_utzappos(root: Path) -> tuple[LabelledFiles, LabelledFiles]:
    """`ut-zap50k-images/CATEGORY/SUBCATEGORY/BRAND/CID.jpg`, `ut-zap50k-data/meta-data-bin.csv`; classes: 21 subcategories.

    A fixed random `TRAINED_ON` share trains. Attributes: the binary columns, but not Category and SubCategory, which are the
    classes. The paper has 126; how many are left is not checked here.
    """
    folder = find_folder(
        root, "ut-zap50k", "ut-zap50k-data/meta-data-bin.csv",
        "unpack ut-zap50k-images.zip and ut-zap50k-data.zip of UT Zappos50K there",
    )  # fmt: skip
    images = next(
        (one for one in (folder / "ut-zap50k-images", folder / "ut-zap50k-images-square") if one.is_dir()), None
    )
    if images is None:
        raise DataError(f"{folder / 'ut-zap50k-images'} is not there: unpack ut-zap50k-images.zip there")
    paths = sorted(one for one in images.glob("*/*/*/*") if one.suffix.lower() in IMAGE_ENDINGS)
    check_files(paths, images)
    label = np.unique(["/".join(one.relative_to(images).parts[:2]) for one in paths], return_inverse=True)[1]
    order = np.random.default_rng(SPLIT).permutation(len(paths))
    cut = int(TRAINED_ON * len(paths))
    parts = []
    for rows in (np.sort(order[:cut]), np.sort(order[cut:])):
        own = [paths[i] for i in rows]
        parts.append(LabelledFiles(own, label[rows], images, lambda own=own: _zappos_attributes(folder, own)))  # type: ignore[misc]
    return parts[0], parts[1]


def _zappos_attributes(folder: Path, paths: Sequence[Path]) -> Attributes:
    table = folder / "ut-zap50k-data" / "meta-data-bin.csv"
    found = {row["CID"]: row for row in read_table(table, ("CID",))}
    columns = [name for name in next(iter(found.values())) if not name.startswith(("CID", "Category.", "SubCategory."))]
    keys = [path.stem.replace(".", "-") for path in paths]
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(f"{table}: {len(missing)} of {len(keys)} images have no row, first {missing[0]}")
    known = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
    values = np.array([[known.get(found[key][name], np.nan) for name in columns] for key in keys], np.float32)
    if np.isnan(values).any():
        row, place = np.argwhere(np.isnan(values))[0]
        word = found[keys[row]][columns[place]]
        raise DataError(f"{table}, CID {keys[row]}: {columns[place]} is {word!r}; expected 0 or 1")
    return Attributes(values, tuple(name.replace(".", ":", 1) for name in columns))


def read_chexpert(root: Path) -> tuple[LabelledFiles, LabelledFiles]:
    """`CheXpert-v1.0-small/` with train.csv and valid.csv, which is tested on; labels float32 [N, 13] (`PATHOLOGIES`).

    1 and 0 as they are, uncertain (-1) and unmentioned ones NaN, but of images without a finding all 0 save support devices.
    """
    name = next(
        (one for one in ("CheXpert-v1.0", "CheXpert-v1.0-small") if (root / one).is_dir()), "CheXpert-v1.0-small"
    )
    folder = find_folder(
        root, name, "train.csv", "register with Stanford's AIMI for CheXpert and unpack its archive there"
    )
    parts = []
    for split in ("train", "valid"):
        table = folder / f"{split}.csv"
        rows = read_table(table, ("Path", HEALTHY, *PATHOLOGIES))
        paths = [folder / Path(*Path(row["Path"]).parts[1:]) for row in rows]
        check_files(paths, folder)
        label = np.stack([_findings(row, table) for row in rows])
        parts.append(LabelledFiles(paths, label, folder))
    return parts[0], parts[1]


def _findings(row: dict[str, str], table: Path) -> np.ndarray:
    known = {"1": 1.0, "0": 0.0, "-1": np.nan, "": np.nan}
    said = {name: row[name].strip().removesuffix(".0") for name in (HEALTHY, *PATHOLOGIES)}
    wrong = next((name for name, word in said.items() if word not in known), None)
    if wrong is not None:
        raise DataError(f"{table}, {row['Path']}: {wrong} is {row[wrong]!r}; expected 1, 0, -1 or nothing")
    values = [known[said[name]] for name in PATHOLOGIES]
    if said[HEALTHY] == "1":
        values = [value if name == DEVICES else 0.0 for name, value in zip(PATHOLOGIES, values, strict=True)]
    return np.array(values, np.float32)
