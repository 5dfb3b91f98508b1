"""The anisotropic recipe: what it learns, that it repeats, resumes and spreads over processes, what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from posthoc.adapters.errors import OptionError, PosthocError
from posthoc.adapters.losses import AnInfoNCE, AnInfoNCEEnsemble
from posthoc.recipes import anisotropic, anisotropic_images
from posthoc.recipes.anisotropic import PRESETS, AnisotropicConfig, Contrast, main
from posthoc.recipes.anisotropic_process import uniform_directions
from posthoc.recipes.options import parse

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two

# seed 2: three matrices for the mixing are found in .2 s; of seed 0 in 12
SMALL = ["--dim", "3", "--batch-size", "64", "--layout", "linear", "--seed", "2"]
LEARNS = [*SMALL, "--steps", "180", "--every", "60", "--lr", "4e-3"]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "train/checkpoint.pt", weights_only=True)["module"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that nothing disturbed, and what it found."""
    folder = tmp_path_factory.mktemp("anisotropic")
    return folder / "run", results("anisotropic", [*LEARNS, "--output", "run"], folder)


def test_a_run_learns_and_says_so(unbroken: tuple[Path, dict[str, Any]]) -> None:
    folder, found = unbroken
    seen = records(folder)
    assert [record["step"] for record in seen] == [60, 120, 180]
    assert seen[-1]["r2_held_out"] > 0.95
    assert seen[-1]["train_loss"] < seen[0]["train_loss"]
    assert found["latents"]["r2"]["mean"] > found["inputs"]["r2"] + 0.1
    assert found["precision"]["expected"] == [[5.0, 15.0, 25.0]]
    assert found["precision"]["learned"][0] == sorted(seen[-1][f"precision_0_{i}"] for i in range(3))
    assert (folder / "recovery.png").stat().st_size > 10_000


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(
    unbroken: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, found = unbroken
    words = [*LEARNS, "--output", "run"]
    assert kill_at_checkpoint("anisotropic", words, tmp_path, "train/checkpoint.pt") != metrics(whole)
    again = results("anisotropic", [*words, "--resume"], tmp_path)
    assert metrics(tmp_path / "run") == metrics(whole)
    first, resumed = _weights(whole), _weights(tmp_path / "run")
    assert first.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in first.items())
    names = ("latents", "precision", "inputs", "acceptance")
    assert [again[name] for name in names] == [found[name] for name in names]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # few and short steps: Adam makes whole steps of gradients that are rounding errors
    words = [*SMALL, "--steps", "6", "--every", "3", "--lr", "1e-4", "--output"]
    results("anisotropic", [*words, "one"], tmp_path)
    results_of_two("anisotropic", [*words, "two"], tmp_path)
    for two, one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("names", "expected", "acceptance"),
    [
        (["hard-negatives"], [[2.5, 2.5, 12.5, 12.5]], (0.5, 1.0)),
        (["infonce"], [[5.0, 5.0, 25.0, 25.0]], (0.5, 1.0)),
        (["ensemble", "shell"], [[5.0, 5.0, 25.0, 25.0]] * 2, (0.0, 0.4)),
        (["linear", "paper"], [[5.0, 35 / 3, 55 / 3, 25.0]], (0.0, 0.4)),
    ],
    ids=["hard-negatives", "infonce", "ensemble-shell", "linear-paper"],
)
def test_variants_run(
    names: list[str], expected: list[list[float]], acceptance: tuple[float, float], tmp_path: Path
) -> None:
    words = ["--batch-size", "16", "--steps", "3", "--every", "3", "--dim", "4", "--seed", "2", "--output", "run"]
    found = results("anisotropic", ["--preset", *names, *words], tmp_path)
    assert found["precision"]["expected"] == [pytest.approx(row) for row in expected]
    assert acceptance[0] < found["acceptance"] < acceptance[1]
    learned = torch.tensor(found["precision"]["learned"])
    assert learned.shape == (len(expected), 4)
    assert (learned.unique().numel() == 1) == ("infonce" in names)


def test_the_modules_losses_are_the_librarys() -> None:
    x = torch.randn(2, 24, 2, 4, generator=torch.Generator().manual_seed(0))
    module = Contrast(AnisotropicConfig(families=2))
    views = module.encoder(x)
    expected = AnInfoNCEEnsemble(4, 2)([(views[0, :, k], views[1, :, k]) for k in range(2)])
    torch.testing.assert_close(module(x[0], x[1]), expected)
    module = Contrast(AnisotropicConfig(hard_negatives=0.5))
    views = module.encoder(x[:, :, :1])[:, :, 0]
    torch.testing.assert_close(module(x[0, :, :1], x[1, :, :1]), AnInfoNCE(4, hard_negatives=0.5)(views[0], views[1]))


def test_the_papers_encoder_has_its_parameters() -> None:
    assert sum(p.numel() for p in Contrast(AnisotropicConfig(dim=10)).encoder.parameters()) == 854_210


def test_standardized_inputs_are_white_and_embeddings_start_all_over_the_sphere() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = uniform_directions(2000, 4, generator).float() @ torch.diag(torch.tensor([3.0, 1.0, 0.1, 0.02])) + 1.0
    module = Contrast(AnisotropicConfig())
    spread = functional.normalize(module.encoder(inputs), dim=-1).mean(0).norm()
    trained = sum(p.requires_grad for p in module.encoder.parameters())
    module.standardize(inputs)
    white = module.encoder[0](inputs)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(white.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    found = module.encoder(inputs).detach()
    assert found.mean(0).norm() < 1e-3
    assert float(found.norm(dim=-1).mean()) == pytest.approx(1.0, rel=1e-3)
    assert spread > 0.99  # without it, all embeddings begin in one place
    assert functional.normalize(found, dim=-1).mean(0).norm() < 0.5
    assert sum(p.requires_grad for p in module.encoder.parameters()) == trained


def test_the_papers_setting() -> None:
    config = parse("anisotropic", AnisotropicConfig, PRESETS, None, ["--preset", "paper", "linear"])
    wanted = {
        "dim": 10, "batch_size": 1000, "steps": 300_003, "lr": 1e-4, "lr_precision": 1e-3, "threshold": 0.1,
        "mixing_layers": 3, "lowest": 5.0, "highest": 25.0, "layout": "linear", "sampler": "shell", "schedule": "constant",
        "loss": "aninfonce", "reference": True, "standardize": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--batch-size", "20"], "multiple of 8 from 16"),
        (["--steps", "0"], "--steps 0"),
        (["--lr", "-1"], "--lr -1"),
        (["--loss", "infonce", "--families", "2"], "--loss infonce has no"),
        (["--families", "2", "--reference"], "--reference"),
        (["--layout", "linear", "--families", "2"], "from 1 to 1"),
        (["--threshold", "2", "--sampler", "shell"], r"threshold=2\.0"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--output", str(tmp_path / "run")])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("posthoc: ")
    assert re.search(match, line)


def test_a_run_that_does_not_learn_says_so(tmp_path: Path) -> None:
    config = AnisotropicConfig(seed=2, batch_size=16, steps=2, check=True, output=tmp_path / "run")
    with pytest.raises(PosthocError, match=r"after 2 steps; expected 0\.95"):
        anisotropic.run(config)
    with pytest.raises(OptionError, match="holds a run already"):
        anisotropic.run(replace(config, check=False))


def test_images_are_the_other_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(anisotropic_images, "main", seen.append)
    main(["--preset", "images", "smoke", "--seed", "3"])
    main(["--preset=images", "--seed", "3"])
    assert seen == [["--preset", "smoke", "--seed", "3"], ["--seed", "3"]]
