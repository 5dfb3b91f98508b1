"""Presets as they are shipped: each alone is a run that two processes can share, and each recipe's smoke learns.

The smokes take about 25 s each on one core that is theirs.
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


@pytest.fixture
def cifar10() -> None:
    for split in ("train", "test"):
        try:
            check_there("cifar10", split)
        except DataError as error:
            pytest.skip(f"the smoke needs CIFAR-10 in $POSTHOC_DATA, where shared/data/get_data.py builds it: {error}")


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
