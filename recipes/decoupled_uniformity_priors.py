"""Prior knowledge of each training image, by name, and what the kernel makes of it.

| `--prior` | rows | labels |
|---|---|---|
| FILE.npz | its `prior`, after its `labels` are found to be the set's own, in order | as the file says |
| attributes, attributes:GROUP[,GROUP] | what people said about the image | seen |
| labels | one-hot classes | seen |
| vae | mean code of an autoencoder trained on the same images | not seen |
| a network, such as tf_efficientnet_lite0 | its embedding, from the feature store | seen by its classifier; unknown without one |
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch

from ..adapters.errors import DataError, OptionError, suggest
from ..adapters.losses.decoupled_uniformity import DecoupledUniformity
from ..adapters.losses.kernels import smoothing
from ..eval.datasets import default_data_dir
from .decoupled_uniformity_data import Sets
from .image_sets import Chosen
from .running import Run
from .small_image_networks import DEPTHS
from .tau_posthoc import KNOWN, frozen_backbone
from .vae import codes, train_vae

if TYPE_CHECKING:
    from .decoupled_uniformity import UniformityConfig

WORDS = ("attributes", "labels", "vae")
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths, in median distances, that the diagnostic looks at."""


@dataclass
class Prior:
    """Prior knowledge that was asked for.

    Attributes:
        made_from: what its rows are made from besides the images. seen_labels: whether a label had a part in them; None: unknown.
        about: what else is told of it. make: its rows float32 [N, P], of the images that are trained on.
    """

    name: str
    made_from: np.ndarray | str
    seen_labels: bool | None
    make: Callable[[], np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        return {"name": self.name, "seen_labels": self.seen_labels, **self.about}


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
        return Prior(name, sets.label, True, lambda: rows)
    if name == "vae":
        return _of_vae(config, run, sets)
    if name in DEPTHS or name in KNOWN or timm.is_model(name) or name.startswith("hf-hub:"):
        return _of_network(name, config, run, sets)
    known = [*WORDS, *DEPTHS, *KNOWN, *timm.list_models()]
    raise OptionError(f"--prior {name!r} is neither a file .npz nor a known name; {suggest(name, known)}")


def _of_file(name: str, config: UniformityConfig, sets: Sets) -> Prior:
    folder = Path(config.data_dir or default_data_dir()).expanduser()
    path = next((one for one in (Path(name).expanduser(), folder / name) if one.is_file()), None)
    if path is None:
        raise DataError(
            f"--prior {name}: there is no such file, nor {folder / name}; `posthoc features MODEL DATA --npz FILE` writes one"
        )
    rows, seen = read_prior(path, sets.label)
    return Prior(path.name, rows, seen, lambda: rows[sets.rows])


def read_prior(path: Path, label: np.ndarray) -> tuple[np.ndarray, bool | None]:
    """The rows float32 [N, P] of a file in the paper's format, and whether it says that labels had a part in them.

    Keys `prior` [N, P], [N] or [N, V, P], of which the first view is taken, and `labels`, which must be the set's own `label`
    [N]. Raises DataError where something does not fit, naming the first such row.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files if key in ("prior", "labels", "seen_labels")}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz of arrays: {error}") from error
    missing = {"prior", "labels"} - set(found)
    if missing:
        raise DataError(f"{path} has no {' and no '.join(sorted(missing))}; expected the keys prior and labels")
    rows, own = found["prior"], found["labels"]
    fits = rows.ndim in (1, 2, 3) and rows.dtype.kind in "fiub" and len(rows) == len(label)
    if not fits or own.shape != label.shape:
        raise DataError(
            f"{path}: prior is {rows.dtype} {list(rows.shape)} and labels {list(own.shape)}; expected numbers "
            f"[{len(label)}, P] and {list(label.shape)}, one row for each training image of the set"
        )
    alike = np.stack([own == label, (own != own) & (label != label)]).any(0)  # NaN is itself
    same = np.asarray(alike).reshape(len(label), -1).all(1)
    if not same.all():
        row = int(np.argmin(same))
        raise DataError(
            f"{path}: labels of {int((~same).sum())} of {len(label)} rows are not the set's, first row {row} ({own[row]} there, "
            f"{label[row]} here): the rows are in another order, or of another set"
        )
    values = (rows[:, 0] if rows.ndim == 3 else rows).reshape(len(rows), -1).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: prior is not finite in row {int(np.argmin(np.isfinite(values).all(1)))}")
    return values, bool(found["seen_labels"]) if "seen_labels" in found else None


def _of_attributes(config: UniformityConfig, groups: str, sets: Sets) -> Prior:
    if sets.attributes is None:
        raise OptionError(f"--prior attributes: {config.dataset} has none; omniglot, cub200 and utzappos have")
    found = sets.attributes().of_groups(groups.split(",") if groups else [])
    rows = found.values[sets.rows]
    kinds = sorted({name.split(":", 1)[0] for name in found.names})
    return Prior(str(config.prior), found.values, True, lambda: rows, {"groups": kinds})


def _of_vae(config: UniformityConfig, run: Run, sets: Sets) -> Prior:
    def make() -> np.ndarray:
        model, seen = train_vae(run, sets.train, sets.held_out, config.batch_size, config.vae_epochs, config.vae_dim)
        prior.about["vae"] = seen
        return codes(model, sets.train, run.device)

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
    return Prior(name, backbone.fingerprint(), seen, make, {"network": about})


def smoother(rows: np.ndarray, loss: DecoupledUniformity, images: int) -> dict[str, Any]:
    """What the loss' kernel does to `images` rows, evenly spread, of a prior float32 [N, P]; and at other widths of it."""
    assert loss.kernel is not None
    some = torch.from_numpy(rows[np.linspace(0, len(rows) - 1, images).astype(int)])
    found = smoothing(some, loss.kernel, loss.sigma, loss.ridge)
    told: dict[str, Any] = {"images": images, "dimensions": rows.shape[1], **asdict(found)}
    if loss.kernel == "rbf":
        widths = [multiple * found.median_distance for multiple in MULTIPLES]
        told["by_sigma"] = [
            {"sigma": width, "diagonal": smoothing(some, "rbf", width, loss.ridge).diagonal} for width in widths
        ]
    return told
