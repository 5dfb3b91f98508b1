"""Presets as they are shipped: each alone is a run that two processes can share, and each recipe's smoke learns.

The smokes take about 25 s each on one core that is theirs, that of lam 45 s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import DataError
from posthoc.eval.datasets import check_there
from posthoc.recipes import (
    anisotropic,
    anisotropic_images,
    anisotropic_process,
    cifar10h,
    decoupled_uniformity,
    lam,
    lam_training,
    synthetic,
    tau,
    view_batches,
)
from posthoc.recipes.options import RecipeConfig, parse
from posthoc.recipes.running import row_blocks

from .recipe_children import records, results


class Recipe(NamedTuple):
    config: type[RecipeConfig]
    presets: dict[str, Any]
    block: Callable[[Any], int]
    """Rows of a batch that share random numbers."""


RECIPES = {
    "synthetic": Recipe(synthetic.SyntheticConfig, synthetic.PRESETS, lambda _: synthetic.BLOCK),
    "anisotropic": Recipe(
        anisotropic.AnisotropicConfig, anisotropic.PRESETS, lambda c: c.batch_size // anisotropic_process.BLOCKS
    ),
    "anisotropic_images": Recipe(
        anisotropic_images.ImagesConfig, anisotropic_images.PRESETS, lambda _: view_batches.BLOCK
    ),
    "cifar10h": Recipe(cifar10h.Cifar10HConfig, cifar10h.PRESETS, lambda c: c.block),
    "tau": Recipe(tau.TauConfig, tau.PRESETS, lambda _: view_batches.BLOCK),
    "decoupled_uniformity": Recipe(
        decoupled_uniformity.UniformityConfig, decoupled_uniformity.PRESETS, lambda _: view_batches.BLOCK
    ),
    "lam": Recipe(lam.LamConfig, lam.PRESETS, lambda _: lam_training.BLOCK),
}
ALL = [(name, preset) for name, recipe in RECIPES.items() for preset in recipe.presets]


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_a_preset_alone_is_a_run_that_two_processes_can_share(name: str, preset: str) -> None:
    kind, presets, block = RECIPES[name]
    config: Any = parse(name, kind, presets, None, ["--preset", preset, "--seed", "3"])
    assert config.seed == 3
    assert {option: getattr(config, option) for option in presets[preset]} == presets[preset]
    shares = [row_blocks(config.batch_size, block(config), Launch(rank, 2)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) >= 1


def _smoke(recipe: str, folder: Path, *more: str) -> dict[str, Any]:
    """The smoke, which checks itself, as it is shipped."""
    found = results(recipe, ["--preset", "smoke", "--output", "smoke", *more], folder)
    assert found["config"]["check"] is True
    return found


def _there(*parts: tuple[str, str]) -> None:
    """Skips a test without these sets' splits in $POSTHOC_DATA."""
    for name, split in parts:
        try:
            check_there(name, split)
        except DataError as error:
            pytest.skip(f"the smoke needs {name} in $POSTHOC_DATA, where shared/data/get_data.py puts it: {error}")


@pytest.fixture
def cifar10() -> None:
    _there(("cifar10", "train"), ("cifar10", "test"))


@pytest.fixture
def fashion_mnist() -> None:
    """And MNIST's test images, which are told from FashionMNIST's."""
    _there(("fashion-mnist", "train"), ("fashion-mnist", "test"), ("mnist", "test"))


@pytest.mark.slow
def test_synthetic_smoke(tmp_path: Path) -> None:
    found = _smoke("synthetic", tmp_path, "--cache-dir", "processes")
    start, figures = found["start"], found["figures"]
    assert start["cosines_spearman"] < 0.5  # of a random network
    assert figures["cosines_spearman"] > 0.9
    assert figures["kappa_spearman"] > start["kappa_spearman"] + 0.3
    assert figures["coverage"] == pytest.approx(0.95, abs=0.06)


@pytest.mark.slow
def test_anisotropic_smoke(tmp_path: Path) -> None:
    found = _smoke("anisotropic", tmp_path)
    assert found["inputs"]["r2_held_out"] < 0.85
    assert found["latents"]["r2_held_out"]["mean"] > 0.98
    (learned,) = found["precision"]["learned"]
    assert min(learned[2:]) / max(learned[:2]) > 1.8  # 5, 5, 25, 25 in truth


@pytest.mark.slow
@pytest.mark.usefixtures("cifar10")
def test_images_smoke(tmp_path: Path) -> None:
    found = _smoke("anisotropic_images", tmp_path)
    first, *_, last = records(tmp_path / "smoke")
    assert last["held_out_loss"] < first["held_out_loss"]
    assert found["share_of_collapse"] < 0.92
    read = found["readouts"]
    assert read["backbone"]["class"] > read["untrained backbone"]["class"] + 4  # 1,000 images: two standard errors
    assert read["backbone"]["class"] > 30  # of ten classes


@pytest.mark.slow
@pytest.mark.usefixtures("cifar10")
def test_cifar10h_smoke(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    weights = ["--labels", str(data / "cifar10h-probs.npy"), "--checkpoint", str(data / "cifar10_resnet20.safetensors")]
    found = _smoke("cifar10h", tmp_path, *weights, "--cache-dir", "features")
    ambiguity, retrieval = (table["scores"] for table in found["tables"][:2])
    learned = ambiguity["1/kappa"]
    assert learned["human_spearman"]["low"] > 0.1  # 200 images, of which no network has seen one
    assert learned["crop_spearman"]["low"] > 0.5
    (fold,) = found["folds"]
    assert fold["best"]["human_spearman"] > fold["before"]["human_spearman"] + 0.1
    assert retrieval["embedding"]["recall_at_1"]["value"] > 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("fashion_mnist")
def test_tau_smoke(tmp_path: Path) -> None:
    found = _smoke("tau", tmp_path)
    worth, random = found["worth"], found["random_features"]
    assert worth["linear"] > random["linear"] + 0.01  # 10,000 images: two standard errors
    assert worth["nearest_projection"] > random["nearest_projection"] + 0.04
    first, *_, last = records(tmp_path / "smoke")
    before = found["held_out"]["before"]
    assert last["train_loss"] < first["train_loss"] - 0.5
    assert last["own_view_found"] > 1.8 * before["own_view_found"]
    assert 0.1 < last["tau_5"] < last["tau_95"] < before["tau_5"]  # the loss brings all of them near t
    assert found["ood"]["mnist"]["scores"]["kNN"]["auroc"]["value"] > 0.75


@pytest.mark.slow
@pytest.mark.usefixtures("fashion_mnist")
def test_decoupled_uniformity_smoke(tmp_path: Path) -> None:
    found = _smoke("decoupled_uniformity", tmp_path)
    worth, random = found["worth"], found["random_features"]
    assert worth["linear"] > random["linear"] + 0.015
    assert worth["linear_representation"] > random["linear_representation"] + 0.03
    assert worth["nearest_projection"] > random["nearest_projection"] + 0.06
    before, after = found["held_out"]["before"], found["held_out"]["after"]
    assert after["uniformity"] < -1.8 < -0.4 < before["uniformity"]  # images part; -4 is as far as they can be
    assert after["own_view_found"] > 1.4 * before["own_view_found"]


@pytest.mark.slow
@pytest.mark.usefixtures("fashion_mnist")
def test_lam_smoke(tmp_path: Path) -> None:
    found = _smoke("lam", tmp_path)
    for name, value in found["validation_map_at_5"].items():
        if name != "pfe":  # which leaves the embedding alone
            assert value["best"] > value["before"] + 0.05, name
    own = found["methods"]["deterministic"]
    assert own["recall@1"] > 0.68
    assert own["vote ECE"] == pytest.approx(1 - own["recall@1"])  # one vote, always of all weight
    for name in ("post-hoc-euclidean-positives", "online-arccos-fixed"):
        one = found["methods"][name]
        assert one["vote ECE"] < own["vote ECE"] - 0.08, name
        assert one["AUSC"] > one["recall@1"] + 0.06, name  # wrong neighbours are the less certain ones
