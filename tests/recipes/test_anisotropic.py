"""The anisotropic recipe: what it learns, that it repeats, resumes and spreads over processes, what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from posthoc.adapters.errors import OptionError, PosthocError
from posthoc.adapters.losses import AnInfoNCE, AnInfoNCEEnsemble
from posthoc.recipes import anisotropic
from posthoc.recipes.anisotropic import PRESETS, AnisotropicConfig, Contrast, main
from posthoc.recipes.anisotropic_process import uniform_directions
from posthoc.recipes.running import parse

SMALL = ["--dim", "3", "--batch-size", "64", "--steps", "180", "--every", "60", "--lr", "4e-3", "--layout", "linear"]
PROGRAM = """
import os, signal, sys
from posthoc.recipes import anisotropic

rounds, judged = 0, anisotropic.Judge.__call__

def killed_in_round_3(self):
    global rounds
    rounds += 1
    if rounds == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return judged(self)

anisotropic.Judge.__call__ = killed_in_round_3
anisotropic.main(sys.argv[1:])
"""


def _records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train/metrics.jsonl").read_text().splitlines()]


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "train/checkpoint.pt", weights_only=True)["module"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anisotropic") / "run"
    main([*SMALL, "--output", str(folder)])
    return folder


def test_a_run_learns_and_says_so(unbroken: Path) -> None:
    records, results = _records(unbroken), _results(unbroken)
    assert [record["step"] for record in records] == [60, 120, 180]
    assert records[-1]["r2_held_out"] > 0.9
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert results["latents"]["r2"]["mean"] > results["inputs"]["r2"]
    assert results["precision"]["expected"] == [[5.0, 15.0, 25.0]]
    assert results["precision"]["learned"][0] == sorted(results["precision"]["learned"][0])
    assert results["made"]["processes"] == 1
    assert (unbroken / "recovery.png").stat().st_size > 10_000
    assert json.loads((unbroken / "config.json").read_text())["dim"] == 3


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(unbroken: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--output", str(tmp_path / "run")]
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(_records(tmp_path / "run")) == 2
    main([*words, "--resume"])
    assert _records(tmp_path / "run") == _records(unbroken)
    whole, resumed = _weights(unbroken), _weights(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for name in ("latents", "precision", "inputs"):
        assert _results(tmp_path / "run")[name] == _results(unbroken)[name]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # few and short steps: Adam makes whole steps of gradients that are rounding errors
    words = ["--dim", "3", "--batch-size", "64", "--steps", "6", "--every", "3", "--lr", "1e-4"]
    main([*words, "--output", str(tmp_path / "one")])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "posthoc.recipes.anisotropic", *words, "--output", "two"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert _results(tmp_path / "two")["made"]["processes"] == 2
    for two, one in zip(_records(tmp_path / "two"), _records(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert done.stdout.count("Lambda learned") == 1


@pytest.mark.parametrize(
    "names",
    [["hard-negatives"], ["infonce"], ["ensemble", "shell"], ["linear", "paper"]],
    ids=lambda names: "-".join(names),
)
def test_variants_run(names: list[str], tmp_path: Path) -> None:
    words = ["--batch-size", "16", "--steps", "3", "--every", "3", "--dim", "4", "--output", str(tmp_path / "run")]
    main(["--preset", *names, *words])
    learned = torch.tensor(_results(tmp_path / "run")["precision"]["learned"])
    assert learned.shape == (2 if "ensemble" in names else 1, 4)
    assert (learned > 0).all()
    if "infonce" in names:
        assert learned.unique().numel() == 1
        assert float(learned[0, 0]) == pytest.approx(1.0, rel=0.2)
    if "hard-negatives" in names:
        assert _results(tmp_path / "run")["precision"]["expected"] == [[2.5, 2.5, 12.5, 12.5]]


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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name: str) -> None:
    config = parse("anisotropic", AnisotropicConfig, PRESETS, None, ["--preset", name])
    assert all(getattr(config, key) == value for key, value in PRESETS[name].items())


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
        (["--batch-size", "8"], "multiple of 8 from 16"),
        (["--steps", "0"], "--steps 0"),
        (["--lr", "-1"], "--lr -1"),
        (["--loss", "infonce", "--families", "2"], "--loss infonce has no"),
        (["--families", "2", "--reference"], "--reference"),
        (["--layout", "linear", "--families", "2"], "from 1 to 1"),
        (["--dim", "1"], "1 dimensions"),
        (["--preset", "bimodl"], "bimodal"),
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
    config = AnisotropicConfig(batch_size=16, steps=2, check=True, output=tmp_path / "run")
    with pytest.raises(PosthocError, match=r"after 2 steps; expected 0\.95"):
        anisotropic.run(config)
    with pytest.raises(OptionError, match="holds a run already"):
        anisotropic.run(replace(config, check=False))


def test_images_are_the_other_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    from posthoc.recipes import anisotropic_images

    seen: list[Any] = []
    monkeypatch.setattr(anisotropic_images, "main", seen.append)
    main(["--preset", "images", "smoke", "--seed", "3"])
    main(["--preset=images", "--seed", "3"])
    assert seen == [["--preset", "smoke", "--seed", "3"], ["--seed", "3"]]
