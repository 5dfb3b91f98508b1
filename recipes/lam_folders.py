"""CUB-200, LFW and Mapillary Street-Level Sequences in the folders that their own archives unpack to.

Nothing is downloaded: where something is missing, the error says what is expected where and how to get it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapters.errors import DataError

TEST_CITIES = ("cph", "sf")
"""MSLS's public validation cities: its own test cities have no published positions."""
APART = 1e8
"""Metres between two cities, whose coordinates in their own UTM zones may be alike."""


@dataclass(frozen=True)
class Files:
    """Image files, and labels int64 [N] or positions float64 [N, 2] in metres; `group` int64 [N] is what is held out together;
    `query` bool [N] tells queries from the database, None: every image is both."""

    paths: list[Path]
    target: np.ndarray
    group: np.ndarray
    base: Path
    query: np.ndarray | None = None

    def rows(self, chosen: np.ndarray) -> Files:
        """Those rows, int64 or bool."""
        places = np.arange(len(self.paths))[chosen]
        query = None if self.query is None else self.query[places]
        return Files([self.paths[i] for i in places], self.target[places], self.group[places], self.base, query)


def read_cub200(root: Path) -> tuple[Files, Files]:
    """Classes 1 to 100, to train on, and 101 to 200, to test on.

    `CUB_200_2011/` with images.txt, image_class_labels.txt and images/.
    """
    folder = find_folder(
        root, "CUB_200_2011", "images.txt", "unpack CUB_200_2011.tgz of Caltech's data repository there"
    )
    names = dict(read_pairs(folder / "images.txt"))
    label = read_classes(folder / "image_class_labels.txt")
    if not names or set(names) != set(label):
        raise DataError(f"{folder}: images.txt and image_class_labels.txt do not name the same images")
    number = np.array([label[key] for key in names], np.int64)
    files = _files([folder / "images" / name for name in names.values()], number - 1, number - 1, folder)
    return files.rows(number <= 100), files.rows(number > 100)


def read_lfw(root: Path) -> tuple[Files, Files]:
    """The people of peopleDevTrain.txt and of peopleDevTest.txt (a number, then lines NAME, IMAGES), `lfw_funneled/NAME/`."""
    folder = find_folder(
        root,
        "lfw-py",
        "peopleDevTrain.txt",
        "lay peopleDevTrain.txt, peopleDevTest.txt and the unpacked lfw-funneled.tgz there",
    )
    parts: list[Files] = []
    for split in ("Train", "Test"):
        lines = read_lines(folder / f"peopleDev{split}.txt")[1:]
        people = [line.split("\t") for line in lines]
        if any(len(one) != 2 or not one[1].isdigit() for one in people):
            raise DataError(f"{folder / f'peopleDev{split}.txt'}: a number, then lines of NAME<tab>IMAGES are expected")
        counts = [int(count) for _, count in people]
        paths = [
            folder / "lfw_funneled" / name / f"{name}_{i:04d}.jpg"
            for name, count in people
            for i in range(1, int(count) + 1)
        ]
        start = len(np.unique(parts[0].group)) if parts else 0
        person = start + np.repeat(np.arange(len(people)), counts)
        parts.append(_files(paths, person, person, folder))
    return parts[0], parts[1]


def read_msls(root: Path) -> tuple[Files, Files]:
    """All cities but `TEST_CITIES`, and these: `train_val/CITY/{query,database}/` with postprocessed.csv (key, easting,
    northing), images/KEY.jpg and, where panoramas are to be left out, raw.csv (key, pano)."""
    folder = find_folder(root, "train_val", "", "unpack Mapillary's msls_images_vol_*.zip and msls_metadata.zip there")
    cities = sorted(one.name for one in folder.iterdir() if (one / "database" / "postprocessed.csv").is_file())
    train = [city for city in cities if city not in TEST_CITIES]
    test = [city for city in cities if city in TEST_CITIES]
    if len(train) < 2 or not test:
        raise DataError(
            f"{folder} has the cities {', '.join(cities) or 'none'}; expected {' or '.join(TEST_CITIES)} to test on, and two "
            "others at least, of which one is held out"
        )
    return _cities(folder, train, cities), _cities(folder, test, cities)


def _cities(folder: Path, names: Sequence[str], every: Sequence[str]) -> Files:
    paths, target, group, query = [], [], [], []
    for name in names:
        number = every.index(name)
        for part in ("database", "query"):
            place = folder / name / part
            rows = read_table(place / "postprocessed.csv", ("key", "easting", "northing"))
            raw = place / "raw.csv"
            round_ones = {
                row["key"]
                for row in (read_table(raw, ("key", "pano")) if raw.is_file() else [])
                if row["pano"] == "True"
            }
            for row in rows:
                if row["key"] in round_ones:
                    continue
                paths.append(place / "images" / f"{row['key']}.jpg")
                east, north = _position(row, place / "postprocessed.csv")
                target.append((APART * number + east, north))
                group.append(number)
                query.append(part == "query")
    files = _files(paths, np.array(target), np.array(group), folder)
    return Files(files.paths, files.target, files.group, folder, np.array(query))


def _position(row: dict[str, str], path: Path) -> tuple[float, float]:
    """Easting and northing in metres. Raises DataError where they are no finite numbers."""
    try:
        east, north = float(row["easting"]), float(row["northing"])
    except ValueError:
        east = north = math.nan
    if not (math.isfinite(east) and math.isfinite(north)):
        raise DataError(
            f"{path}, key {row['key']}: easting '{row['easting']}', northing '{row['northing']}'; two numbers of metres are "
            "expected: unpack the archive again"
        )
    return east, north


def hold_out(files: Files, share: float, generator: np.random.Generator) -> tuple[Files, Files]:
    """Whole groups (classes, people, cities) apart: what is trained on, and what is held out, one group of each at least."""
    groups = generator.permutation(np.unique(files.group))
    count = min(len(groups) - 1, max(1, round(share * len(groups))))
    if count < 1:
        raise DataError(f"{files.base}: one class to train on and one to hold out are needed; there is {len(groups)}")
    held = np.isin(files.group, groups[:count])
    return files.rows(~held), files.rows(held)


def find_folder(root: Path, name: str, known: str, how: str) -> Path:
    """ROOT/NAME or ROOT itself, whichever has the file `known`. Raises DataError that says `how` to get it."""
    for folder in (root / name, root):
        if folder.is_dir() and (folder.name == name or (folder / known).is_file()) and (folder / known).exists():
            return folder
    wanted = root / name / known
    raise DataError(f"{wanted} is not there. To get it: {how}, or name the folder that holds {name} with --data-dir")


def _files(paths: list[Path], target: np.ndarray, group: np.ndarray, folder: Path) -> Files:
    check_files(paths, folder)
    return Files(paths, target, group, folder)


def check_files(paths: Sequence[Path], folder: Path) -> None:
    """Raises DataError, naming the first, for files that are not there, or where there is none."""
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{len(missing)} of {len(paths)} images, first {missing[0]}," if missing else "all images"
        raise DataError(f"{folder}: {what} are not there: unpack the archive again")


def read_lines(path: Path) -> list[str]:
    """Raises DataError where the file is not there, or no text."""
    if not path.is_file():
        raise DataError(f"{path} is not there: unpack the archive again")
    try:
        return path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text ({error}): unpack the archive again") from error


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of a number and a word. Raises DataError for others."""
    words = [line.split(None, 1) for line in read_lines(path) if line.strip()]
    if any(len(pair) != 2 for pair in words):
        raise DataError(f"{path}: lines of a number and a word are expected")
    return [(pair[0], pair[1].strip()) for pair in words]


def read_classes(path: Path) -> dict[str, int]:
    """The class, from 1, that stands behind each image's number. Raises DataError for other lines, and says which."""
    pairs = read_pairs(path)
    wrong = next((pair for pair in pairs if not pair[1].isdecimal() or int(pair[1]) < 1), None)
    if wrong is not None:
        raise DataError(f"{path}, line '{' '.join(wrong)}': expected the number of a class, from 1, behind the image's")
    return {image: int(label) for image, label in pairs}


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a .csv file. Raises DataError unless it has these columns, and a row, and every row a cell for each column."""
    reader = csv.DictReader(read_lines(path))
    head, rows = list(reader.fieldnames or ()), []
    for row in reader:
        if None in row or None in row.values():
            raise DataError(
                f"{path}, line {reader.line_num}: there is not one cell for each of the {len(head)} columns: unpack the archive "
                "again"
            )
        rows.append(row)
    if not rows or not set(columns) <= set(head):
        raise DataError(f"{path}: expected a table with the columns {', '.join(columns)}")
    return rows
