"""Image sets by name (cifar10, dtd, ...), found in a folder of data in the layout that their own download has.

    posthoc eval ood --id cifar10 --ood tiny-imagenet dtd --model adapter/ --data-dir data/

Nothing is downloaded. A set is looked for in DATA and in DATA/NAME, where DATA is --data-dir, else $POSTHOC_DATA, else
`~/.cache/posthoc/data`. Evaluation reads the test part (of Tiny ImageNet, whose test images have no labels, and of COCO the
validation part), `--train` the training part. Labels are there where the set has them.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..adapters.errors import DataError, PosthocError
from ..adapters.source_base import Source
from . import dataset_cifar as cifar
from . import dataset_readers as readers

KIND = "named data set"
"""What `Source.describe` and the manifest of stored features call the kind of these sources."""


class Layout(NamedTuple):
    """How a set may lie in its folder: what is opened to evaluate and to train (None: not in this layout), and by what."""

    test: str
    train: str | None
    read: Callable[[Path, bool], Source]


@dataclass(frozen=True)
class Named:
    """The layouts of a set, the most usual first, and how to get one of them; `{root}` stands for the folder of data."""

    layouts: tuple[Layout, ...]
    fetch: str


def _idx(folder: str) -> tuple[Layout, ...]:
    return tuple(
        Layout(f"{folder}t10k-images-idx3-ubyte{end}", f"{folder}train-images-idx3-ubyte{end}", readers.idx)
        for end in ("", ".gz")
    )


SETS: dict[str, Named] = {
    "cifar10": Named(
        (
            Layout("cifar-10-batches-py/test_batch", "cifar-10-batches-py/data_batch_1", cifar.tokens),
            Layout("cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-bin/data_batch_1.bin", cifar.binary),
            Layout("cifar10.npz", "cifar10.npz", cifar.npz),
        ),
        "torchvision.datasets.CIFAR10({root!r}, download=True)",
    ),
    "cifar100": Named(
        (
            Layout("cifar-100-python/test", "cifar-100-python/train", cifar.tokens),
            Layout("cifar-100-binary/test.bin", "cifar-100-binary/train.bin", cifar.binary),
        ),
        "torchvision.datasets.CIFAR100({root!r}, download=True)",
    ),
    "svhn": Named(
        (Layout("test_32x32.mat", "train_32x32.mat", readers.svhn),),
        "torchvision.datasets.SVHN({root!r}, split='test', download=True)",
    ),
    "tiny-imagenet": Named(
        (
            Layout("tiny-imagenet-200/val", "tiny-imagenet-200/train", readers.tiny_folder),
            Layout("tiny_imagenet_val.parquet", None, readers.tiny_parquet),
        ),
        "unpack tiny-imagenet-200.zip, the archive of Stanford's course CS231n, there",
    ),
    "lsun": Named(
        (
            Layout("test_lmdb", "bedroom_train_lmdb", readers.lsun),
            Layout("lsun/test", None, readers.unlabelled),
        ),
        "download.py of LSUN's authors (github fyu/lsun) fetches test_lmdb.zip, which is read with the package lmdb; "
        "lsun/test is a folder of images",
    ),
    "celeba": Named(
        (Layout("celeba/list_eval_partition.txt", "celeba/list_eval_partition.txt", readers.celeba),),
        "torchvision.datasets.CelebA({root!r}, download=True)",
    ),
    "coco": Named(
        (
            Layout("val2017", "train2017", readers.unlabelled),
            Layout("images/val2017", "images/train2017", readers.unlabelled),
        ),
        "unpack COCO's val2017.zip there",
    ),
    "dtd": Named(
        (
            Layout("dtd/dtd/labels/test1.txt", "dtd/dtd/labels/train1.txt", readers.dtd),
            Layout("dtd/labels/test1.txt", "dtd/labels/train1.txt", readers.dtd),
            Layout("dtd_textures_600_256px.parquet", None, readers.parquet),
        ),
        "torchvision.datasets.DTD({root!r}, split='test', download=True)",
    ),
    "notmnist": Named(
        (
            Layout("notmnist-t10k-images-idx3-ubyte.gz", None, readers.idx),
            Layout("notMNIST_small", "notMNIST_large", readers.letters),
        ),
        "unpack notMNIST_small.tar.gz of Y. Bulatov there, or give letters in MNIST's file format",
    ),
    "cars196": Named(
        (
            Layout(
                "stanford_cars/cars_test_annos_withlabels.mat",
                "stanford_cars/devkit/cars_train_annos.mat",
                readers.cars,
            ),
        ),
        "its first address is gone; lay a copy of Stanford Cars (cars_train, cars_test, devkit, "
        "cars_test_annos_withlabels.mat) as torchvision.datasets.StanfordCars({root!r}) says",
    ),
    "mnist": Named(_idx("MNIST/raw/"), "torchvision.datasets.MNIST({root!r}, download=True)"),
    "fashion-mnist": Named(_idx("FashionMNIST/raw/"), "torchvision.datasets.FashionMNIST({root!r}, download=True)"),
    "omniglot": Named(
        (
            Layout("omniglot-py/images_evaluation", "omniglot-py/images_background", readers.omniglot_folder),
            Layout("omniglot_8_alphabets.parquet", "omniglot_8_alphabets.parquet", readers.omniglot_parquet),
        ),
        "torchvision.datasets.Omniglot({root!r}, background=False, download=True)",
    ),
}
"""Every set that has a name."""


_looking_in: ContextVar[Path | None] = ContextVar("looking_in", default=None)


@contextlib.contextmanager
def looking_in(data_dir: str | Path | None) -> Iterator[None]:
    """While the block runs, sets are looked for in `data_dir`; None leaves the place as it is."""
    token = _looking_in.set(_looking_in.get() if data_dir is None else Path(data_dir))
    try:
        yield
    finally:
        _looking_in.reset(token)


def default_data_dir() -> Path:
    """The folder of `looking_in`, else `$POSTHOC_DATA`, else `~/.cache/posthoc/data`."""
    return _looking_in.get() or Path(os.environ.get("POSTHOC_DATA") or Path.home() / ".cache" / "posthoc" / "data")


def open_named(name: str, split: str = "test", data_dir: str | Path | None = None) -> Source:
    """The images of a set of `SETS`, its `describe()` naming the set.

    split: "train", or anything else for the images to evaluate on (other names of splits are those of hub sets, which may
    be compared with a named one). data_dir: None means `default_data_dir()`.

    Raises DataError: unknown name, files that are not there (saying which are expected where, and how to get them), and
    files that are damaged or hold something else.
    """
    if name not in SETS:
        raise DataError(f"there is no set {name!r}{_near(name)}; the names are {', '.join(SETS)}")
    layout, path = _find(name, Path(data_dir or default_data_dir()).expanduser(), split == "train")
    return _opened(name, layout, path, split == "train")


def is_named(place: str | Path) -> bool:
    """Whether a place that a command was given is the name of a set: a file or folder of that name wins."""
    return str(place) in SETS and not Path(place).exists()


def check_there(place: str | Path, split: str = "test") -> None:
    """Raises DataError for the name of a set that is not there, and for a word that is nearly a name; opens nothing.

    Such a word is hardly a data set on the hub; it is left alone if it is a file or folder, or has a slash or a point.
    """
    word = str(place)
    if is_named(word):
        _find(word, default_data_dir().expanduser(), split == "train")
    elif not Path(place).expanduser().exists() and not set("/\\.") & set(word) and _near(word):
        raise DataError(f"there is no set {word!r}{_near(word)}. A data set on the hub is given as ORGANISATION/NAME")


def _find(name: str, root: Path, train: bool) -> tuple[Layout, Path]:
    for layout in SETS[name].layouts:
        wanted = layout.train if train else layout.test
        for base in (root, root / name):
            if wanted is not None and (base / wanted).exists():
                return layout, base / wanted
    raise DataError(_not_there(name, root, train))


def _near(word: str) -> str:
    found = difflib.get_close_matches(word.lower().replace("_", "-").replace(" ", "-"), SETS, n=1, cutoff=0.8)
    return f"; did you mean {found[0]!r}?" if found else ""


def _opened(name: str, layout: Layout, path: Path, train: bool) -> Source:
    try:
        source = layout.read(path, train)
    except PosthocError as error:
        raise DataError(f"{name} cannot be read from {path}: {error}. Fetch it again") from error
    except Exception as error:  # readers of .mat, .npz, parquet and LMDB raise nearly anything for a damaged file
        raise DataError(
            f"{name} cannot be read from {path} ({type(error).__name__}: {error}). Fetch it again"
        ) from error
    source.name, source.kind, source.split = name, KIND, "train" if train else "test"
    return source


def _not_there(name: str, root: Path, train: bool) -> str:
    entry = SETS[name]
    expected = [layout.train if train else layout.test for layout in entry.layouts]
    places = ", or ".join(place for place in expected if place)
    return (
        f"the {'training' if train else 'test'} images of {name} are not in {root}. Expected there, or in "
        f"{root / name}: {places}. To get them: {entry.fetch.format(root=str(root))}. Or name the folder that has them "
        "with --data-dir or $POSTHOC_DATA, or give a folder of images or a data set on the hub (ORGANISATION/NAME) instead"
    )
