"""Prior knowledge of each training image, by name, and what the kernel makes of it.

| `--prior` | rows | labels |
|---|---|---|
| FILE.npz | its `prior`, after its `labels`, and `names` if it has them, are found to be the set's own | as the file says |
| attributes | what people said about the image, without what are the classes | annotations |
| attributes:GROUP[,GROUP] | these groups of it | annotations; seen where a group is the classes |
| labels | one-hot classes | seen |
| vae | mean code of an autoencoder trained on the same images | not seen |
| a network, such as tf_efficientnet_lite0 | its embedding, from the feature store | seen by its classifier; unknown without one |
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import timm
import torch

from ..adapters.errors import DataError, OptionError, suggest
from ..adapters.losses.decoupled_uniformity import DecoupledUniformity
from ..adapters.losses.kernels import smoothing
from ..eval.datasets import SETS, default_data_dir
from ..eval.feature_file import check_writable, order_of, write_npz
from .decoupled_uniformity_data import Sets
from .image_sets import Chosen
from .running import Run
from .small_image_networks import DEPTHS
from .tau_posthoc import KNOWN, frozen_backbone
from .vae import codes, small, train_vae

if TYPE_CHECKING:
    from .decoupled_uniformity import UniformityConfig

WORDS = ("attributes", "labels", "vae")
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths, in median distances, that the diagnostic looks at."""
SAME = 1e-6
"""Of the largest value: rows that differ by no more are one to float32."""
Seen = bool | Literal["annotations"] | None
"""Whether labels had a part in a prior; None: unknown. Annotations: people looked at each image, and named no class."""


@dataclass
class Prior:
    """Prior knowledge that was asked for.

    Attributes:
        made_from: what its rows are made from besides the images. seen_labels: whether a label had a part in them.
        make: its rows float32 [N, P], of the images that are trained on. holds_classes: whether they are the very classes that
            are judged. about: what else is told of it.
    """

    name: str
    made_from: np.ndarray | str
    seen_labels: Seen
    make: Callable[[], np.ndarray]
    holds_classes: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        return {
            "name": self.name, "seen_labels": self.seen_labels, "holds_classes": self.holds_classes, **self.about,
        }  # fmt: skip


@dataclass(frozen=True)
class FrozenNetwork:
    """A frozen network by name, as `frozen_backbone` takes it."""

    backbone: str
    checkpoint: Path | None
    random_weights: bool
    data_dir: Path | None
    seed: int


def open_prior(config: UniformityConfig, run: Run, sets: Sets) -> Prior | None:
    """The prior by the options; nothing is trained or extracted yet.

    Raises OptionError for a name that there is not, or that this set does not have; DataError for a file that does not fit the
    set; BackboneError for a network without its weights.
    """
    name = config.prior
    if name is None:
        return None
    word, _, groups = name.partition(":")
    if name.endswith(".npz"):
        return _of_file(name, config, sets)
    if word == "attributes":
        return _of_attributes(config, groups, sets)
    if name == "labels":
        if sets.label.ndim != 1:
            raise OptionError(f"--prior labels: the labels of {config.dataset} are not known for every image")
        rows = np.eye(int(sets.label.max()) + 1, dtype=np.float32)[sets.label[sets.rows]]
        return Prior(name, sets.label, True, lambda: rows, holds_classes=True)
    if name == "vae":
        return _of_vae(config, run, sets)
    if name in DEPTHS or name in KNOWN or timm.is_model(name) or name.startswith("hf-hub:"):
        return _of_network(name, config, run, sets)
    known = [*WORDS, *DEPTHS, *KNOWN, *timm.list_models()]
    raise OptionError(f"--prior {name!r} is neither a file .npz nor a known name; {suggest(name, known)}")


def is_network(name: str | None) -> bool:
    """Whether a prior by that name is a network's embedding."""
    return name is not None and not name.endswith(".npz") and name.partition(":")[0] not in WORDS


def check_apart(rows: np.ndarray, name: str, cosine: bool = False) -> None:
    """Raises DataError where a prior, float32 [N, P], tells the kernel no two images apart: all centroids would be one."""
    seen = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12) if cosine else rows
    if not seen.size or (seen.max(0) - seen.min(0)).max() <= SAME * np.abs(seen).max():
        raise DataError(
            f"--prior {name}: its rows {list(rows.shape)} tell no two images apart: every image would be averaged with all "
            "others alike, and the loss be 0"
        )


def _of_file(name: str, config: UniformityConfig, sets: Sets) -> Prior:
    folder = Path(config.data_dir or default_data_dir()).expanduser()
    path = next((one for one in (Path(name).expanduser(), folder / name) if one.is_file()), None)
    if path is None:
        how = f"`posthoc features MODEL {config.dataset} --npz FILE` writes one"
        if config.dataset not in SETS:
            how = "`write_prior` (docs/recipes.md) writes one of your own rows, and a network's name needs none"
        raise DataError(f"--prior {name}: there is no such file, nor {folder / name}; {how}")
    rows, seen, checked = read_prior(path, sets.label, order_of(sets.source))
    return Prior(path.name, rows, seen, lambda: rows[sets.rows], about={"order_checked_by": checked})


def write_prior(path: Path, rows: np.ndarray, sets: Sets, seen_labels: bool | None = None) -> None:
    """A file for --prior of what you know of a set's training images: rows [N, P] in the order of `sets.source`.

    seen_labels: whether labels had a part in them; None: unknown. Raises OptionError, DataError for a name without .npz, a
    file that cannot be written, and rows that `read_prior` would not take.
    """
    known = {} if seen_labels is None else {"seen_labels": np.array(seen_labels)}
    check_writable(path)
    _values(path, rows, sets.label)
    write_npz(path, {"prior": np.asarray(rows, np.float32), "labels": sets.label, **order_of(sets.source), **known})


def read_prior(
    path: Path, label: np.ndarray, order: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, bool | None, Literal["labels", "names", "fingerprint"]]:
    """The rows float32 [N, P] of a file in the paper's format, whether it says that labels had a part in them, and by what
    their order was checked.

    Keys `prior` [N, P], [N] or [N, V, P], of which the first view is taken, and `labels`, which must be the set's own `label`
    [N]; those do not tell images of a class apart. Where the file has what `order` has (`eval.feature_file.order_of`), that
    must be the same too. Raises DataError where something does not fit, naming the first such row.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ("prior", "labels", "seen_labels", "names", "fingerprint")
            found = {key: file[key] for key in file.files if key in keys}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz of arrays: {error}") from error
    missing = {"prior", "labels"} - set(found)
    if missing:
        raise DataError(f"{path} has no {' and no '.join(sorted(missing))}; expected the keys prior and labels")
    _check_same(path, "labels", found["labels"], label)
    checked: Literal["labels", "names", "fingerprint"] = "labels"
    if "names" in found and "names" in order:
        checked = "names"
        _check_same(path, checked, found[checked], order[checked])
    elif "fingerprint" in found and "fingerprint" in order:
        checked = "fingerprint"
        if str(found[checked]) != str(order[checked]):
            raise DataError(f"{path}: its images are others than the set's, or in another order: make it again")
    seen = found.get("seen_labels")
    return _values(path, found["prior"], label), None if seen is None else bool(seen), checked


def _check_same(path: Path, what: str, there: np.ndarray, here: np.ndarray) -> None:
    if there.shape != here.shape:
        raise DataError(
            f"{path}: {what} are {there.dtype} {list(there.shape)}; expected {list(here.shape)}, as the set's training images "
            "have"
        )
    differ = (there != here) & ~((there != there) & (here != here))  # NaN is itself
    rows = np.flatnonzero(np.asarray(differ).reshape(len(here), -1).any(1))
    if len(rows):
        row = rows[0]
        raise DataError(
            f"{path}: {what} of {len(rows)} of {len(here)} rows are not the set's, first row {row} ({there[row]} there, "
            f"{here[row]} here): the rows are in another order, or of another set"
        )


def _values(path: Path, rows: np.ndarray, label: np.ndarray) -> np.ndarray:
    fits = rows.ndim in (1, 2, 3) and rows.dtype.kind in "fiub" and len(rows) == len(label) and rows.size
    if not fits:
        raise DataError(
            f"{path}: prior is {rows.dtype} {list(rows.shape)}; expected numbers [{len(label)}, P], one row for each training "
            "image of the set, and P at least 1"
        )
    values = (rows[:, 0] if rows.ndim == 3 else rows).reshape(len(rows), -1).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: prior is not finite in row {int(np.argmin(np.isfinite(values).all(1)))}")
    return values


def _of_attributes(config: UniformityConfig, groups: str, sets: Sets) -> Prior:
    if sets.attributes is None:
        raise OptionError(f"--prior attributes: {config.dataset} has none; omniglot, cub200 and utzappos have")
    said = sets.attributes()
    classes = [group for group in said.groups() if said.are_classes(group, sets.label)]
    found = said.of_groups(groups.split(",") if groups else [one for one in said.groups() if one not in classes])
    rows, chosen = found.values[sets.rows], found.groups()
    holds = any(group in classes for group in chosen)
    seen: Seen = True if holds else "annotations"
    return Prior(str(config.prior), found.values, seen, lambda: rows, holds, {"groups": sorted(chosen)})


def _of_vae(config: UniformityConfig, run: Run, sets: Sets) -> Prior:
    def make() -> np.ndarray:
        pixels, others = (small(images, run.device) for images in (sets.train, sets.held_out))  # files are read once
        model, seen = train_vae(run, pixels, others, config.batch_size, config.vae_epochs, config.vae_dim)
        if not seen["dimensions_used"]:
            raise DataError("--prior vae: no dimension of the codes says anything of an image: give more --vae-epochs")
        prior.about["vae"] = seen
        return codes(model, pixels)

    prior = Prior("vae", "vae", False, make)
    return prior


def _of_network(name: str, config: UniformityConfig, run: Run, sets: Sets) -> Prior:
    asked = FrozenNetwork(name, config.checkpoint, config.random_weights, config.data_dir, config.seed)
    backbone = frozen_backbone(asked).to(run.device)
    seen = False if config.random_weights else True if backbone.num_classes else None

    def make() -> np.ndarray:
        features = backbone.extract(Chosen(sets.source, sets.rows), cache_dir=config.cache_dir)
        return np.array(features.embedding, np.float32)

    described = backbone.describe()
    about = {key: described[key] for key in ("name", "weights", "embedding_dim")}
    return Prior(name, backbone.fingerprint(), seen, make, about={"network": about})


def smoother(rows: np.ndarray, loss: DecoupledUniformity, images: int) -> dict[str, Any]:
    """What the loss' kernel does to `images` rows, evenly spread, of a prior float32 [N, P]; and at other widths of it."""
    assert loss.kernel is not None
    some = torch.from_numpy(rows[np.linspace(0, len(rows) - 1, images).astype(int)])
    found = smoothing(some, loss.kernel, loss.sigma, loss.ridge)
    told: dict[str, Any] = {"images": images, "dimensions": rows.shape[1], "of": loss.kernel, **asdict(found)}
    if loss.kernel == "rbf":
        widths = [multiple * found.median_distance for multiple in MULTIPLES]
        told["by_sigma"] = [
            {"sigma": width, "diagonal": smoothing(some, "rbf", width, loss.ridge).diagonal} for width in widths
        ]
    return told
