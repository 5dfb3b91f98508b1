"""Runs of the recipe `lam`: whole, killed, by two processes, as the paper's code; its options."""

from __future__ import annotations

import json
import runpy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posthoc.recipes import lam
from posthoc.recipes.lam import PRESETS, LamConfig
from posthoc.recipes.lam_methods import METHODS
from posthoc.recipes.options import parse

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two
from .recipe_data import write_idx

SIZE = (1, 28, 28)
SOME = "deterministic mc-dropout ensemble pfe hib post-hoc-euclidean-full online-arccos-fixed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten kinds of coarse patterns in the place of FashionMNIST, noise in that of MNIST."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    kinds = np.kron(rng.integers(0, 200, (10, 7, 7)), np.ones((4, 4), int))
    for name, count in (("train", 300), ("t10k", 80)):
        label = np.arange(count) % 10
        noisy = kinds[label] + rng.normal(0, 30, (count, 28, 28))
        write_idx(folder / "FashionMNIST/raw", name, noisy.clip(0, 255).astype(np.uint8), label)
        write_idx(folder / "MNIST/raw", name, rng.integers(0, 256, (40, 28, 28), np.uint8), np.arange(40) % 10)
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    tiny = "--train-images 128 --test-images 60 --epochs 2 --batch-size 32 --samples 4 --members 2 --dim 4"
    tiny += " --curvature-images 64 --dropout 0.3 --methods"
    return ["--data-dir", str(folder), "--output", output, *tiny.split(), *SOME.split(), *more]


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    """A run that nothing disturbed."""
    results("lam", words(folder, "unbroken"), folder)
    return folder / "unbroken"


def test_a_run_judges_every_method_on_images_that_had_no_part_in_it(unbroken: Path) -> None:
    found = json.loads((unbroken / "results.json").read_text())
    assert list(found["methods"]) == SOME.split()
    assert found["images"] == {"train": 128, "validation": 30, "test": 60, "mnist": 40}
    trainings = {"deterministic", "mc-dropout", "member-1", "pfe", "hib", "online-arccos-fixed"}
    assert set(found["training_seconds"]) == set(metrics(unbroken)) == trainings
    assert [record["step"] for record in records(unbroken, "deterministic")] == [4, 8]
    for name, row in found["methods"].items():
        assert {"mAP@5", "mAP@20", "recall@1", "vote ECE", "AUSC"} <= set(row)
        assert ("AUROC mnist" in row) == ("AUPR mnist" in row) == (name != "deterministic")
    own, posterior = (found["methods"][name] for name in ("deterministic", "post-hoc-euclidean-full"))
    assert own["vote ECE"] == pytest.approx(1 - own["recall@1"])
    assert posterior["mAP@5"] == pytest.approx(own["mAP@5"], abs=0.2)
    assert 0 <= found["reports"]["post-hoc-euclidean-full"]["negative_curvature"] <= 1
    assert found["reports"]["online-arccos-fixed"]["prior_precision"] > 0
    assert (unbroken / "lam.png").stat().st_size


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(folder: Path, unbroken: Path) -> None:
    line = words(folder, "broken")
    kill_at_checkpoint("lam", line, folder, "mc-dropout/checkpoint.pt")
    again = results("lam", [*line, "--resume"], folder)
    first = json.loads((unbroken / "results.json").read_text())
    assert metrics(folder / "broken") == metrics(unbroken)
    assert [again[name] for name in ("methods", "reports")] == [first[name] for name in ("methods", "reports")]


def test_two_processes_agree_with_one(folder: Path, unbroken: Path) -> None:
    """The contrastive losses are of all processes' images, dropout's masks of global rows, and so is the online curvature."""
    two = results_of_two("lam", words(folder, "two"), folder)
    for name in metrics(unbroken):
        for i, (one, other) in enumerate(zip(records(unbroken, name), records(folder / "two", name), strict=True)):
            near = 1e-2 if i else 1e-4  # later rounding decides which triplets at the margin are mined
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=near), name
    alone = json.loads((unbroken / "results.json").read_text())
    for part in ("methods", "reports"):
        for name, figures in alone[part].items():
            for figure, value in figures.items():
                assert two[part][name][figure] == pytest.approx(value, rel=0.02, abs=0.02), (name, figure)


def test_reference_is_the_papers_code(folder: Path) -> None:
    more = "--reference --epochs 1 --optimizer rmsprop --schedule exponential --max-triplets 50 --memory 0.9"
    variants = ["post-hoc-arccos-full", "online-arccos-positives"]
    line = [*words(folder, "reference", *more.split()), "--methods", "ensemble", "hib", *variants, "--dropout", "0.05"]
    found = results("lam", line, folder)
    for name in variants:
        row = found["methods"][name]
        assert found["reports"][name]["prior_precision"] == 1.0
        assert row["reference mAP@5"] == pytest.approx(row["mAP@5"]), "every test image has its like"
        assert row["reference AUSC"] == pytest.approx(row["AUSC"] * 98 / 99, abs=0.02)
        assert row["reference AUPR mnist"] == pytest.approx(row["AUPR mnist"], abs=0.05)
    checkpoint = folder / "reference/online-arccos-positives/checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)["module"]
    least = 0.9**4 * 128  # what is left of the number of images it begins with, after four steps
    assert float(state["objective.posterior.curvature_weight"].min()) >= least * (1 - 1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--preset smok", "did you mean 'smoke'"),
        ("--methods post-hoc-arccos-fix", "did you mean 'post-hoc-arccos-fixed'"),
        ("--batch-size 40", "multiple of 16"),
        ("--batch-size 512", "a batch of 512 rows was asked for and there are 128 images"),
        ("--held-out 1.5", "share between 0 and 1"),
        ("--margin -1", "margin=-1.0"),
        ("--samples 1", "2 or more"),
        ("--train-images 0", "--train-images 0 was given"),
        ("--ood mnst", "--ood mnst was given"),
        ("--ood svhn", "svhn are not in"),
        ("--dataset cub200", "give --dataset cub200 a timm network"),
        ("--network resnet17", "resnet17"),
        ("--network wide --checkpoint x.pth", "no weights of its own"),
        ("--dataset msls --network resnet18", "--prior-precision"),
        ("--prior-precision 0", "--prior-precision 0.0 was given"),
        ("--online-precision inf", "--online-precision inf was given; expected a number above 0"),
        ("--lr nan", "--lr nan was given"),
        ("--weight-decay -1", "--weight-decay -1.0 was given; expected 0 or more"),
        ("--weight-decay nan", "--weight-decay nan was given"),
        ("--kl-weight -1", "--kl-weight -1.0 was given; expected 0 or more"),
        ("--kl-weight inf", "--kl-weight inf was given"),
        ("--hessian-start -5", "--hessian-start -5.0 was given; expected 0 or more"),
        ("--hessian-start nan", "--hessian-start nan was given"),
        ("--margin nan", "margin=nan"),
        ("--memory nan", "--memory nan was given"),
        ("--dropout -0.1", "--dropout -0.1 was given"),
        ("--members 3 --methods hib", "--members 3 was given; it is read with --methods ensemble"),
        ("--members 5 --methods hib", "--dropout 0.3 was given; it is read with --methods mc-dropout"),
        (
            "--online-precision 9 --members 5 --dropout 0.05 --methods post-hoc-arccos-full",
            "--online-precision 9.0 was given; it is read with an online variant of --methods",
        ),
        ("--size 64", "--size 64 was given; it is read with --dataset cub200, lfw or msls"),
    ],
)
def test_bad_options_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        lam.main([*words(folder, str(tmp_path / "bad")), *more.split()])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("posthoc: ")
    assert message in shown


def test_what_a_size_sets_is_no_mistake() -> None:
    config = parse("lam", LamConfig, PRESETS, None, ["--preset", "smoke", "--methods", "deterministic", "hib"])
    assert config.members == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    config = parse("lam", LamConfig, PRESETS, None, ["--preset", preset, "--seed", "3"])
    assert config.seed == 3
    laid_on_another = preset.endswith(("online", "others", "deterministic"))
    assert config.reference == (preset.startswith("paper") and not laid_on_another)
    if preset in METHODS:
        for other in ("smoke", "paper"):
            on_it = parse("lam", LamConfig, PRESETS, None, ["--preset", other, preset])
            assert on_it.methods == ("deterministic", preset)


def test_the_papers_configs_are_presets() -> None:
    """spec/lam.md section 8: batch, epochs, lr times batch, margin, latent, miners, memory, most triplets, weight decay, start;
    section 10: what CIFAR-10's code tells apart."""
    known = {
        ("paper",): (256, 20, 0.256, 0.7, 3, "all", None, 0.999, 5000, 1e-5, None),
        ("paper", "paper-online"): (64, 20, 0.064, 0.7, 3, "all", None, 0.999, 5000, 1e-5, None),
        ("paper-cifar10",): (256, 20, 2.56e-3, 0.7, 16, "all", None, 0.999, 5000, 1e-5, None),
        ("paper-cifar10", "paper-cifar10-online"): (256, 40, 2.56e-3, 0.7, 16, "all", "hard", 0.999, 5000, 1e-5, None),
        ("paper-cub200",): (64, 20, 1.92e-5, 1.0, 2048, "semihard", "all", 0.9997, 30, 1e-5, 1e6),
        ("paper-cub200", "paper-cub200-others"): (
            *(64, 20, 1.92e-5, 1.0, 2048, "semihard", None, 0.995, 30, 1e-5, None),
        ),
        ("paper-lfw",): (64, 200, 1.92e-5, 1.0, 2048, "semihard", None, 0.995, 30, 1e-5, None),
        ("paper-msls",): (64, 20, 1.92e-5, 0.1, 2048, "all", "semihard", 0.99999, 10, 1e-6, 1e6),
        ("paper-msls", "paper-msls-deterministic"): (
            *(64, 30, 6.4e-6, 0.1, 2048, "all", None, 0.99999, 10, 1e-5, 1e6),
        ),
    }
    for names, (batch, epochs, lr, margin, dim, miner, hessian, memory, most, decay, start) in known.items():
        config = parse("lam", LamConfig, PRESETS, None, ["--preset", *names])
        assert (config.batch_size, config.epochs, config.margin, config.dim) == (batch, epochs, margin, dim)
        assert (config.miner, config.hessian_miner, config.memory) == (miner, hessian, memory)
        assert (config.max_triplets, config.weight_decay, config.hessian_start) == (most, decay, start)
        assert config.lr == pytest.approx(lr)
        assert (config.optimizer, config.dropout) == ("rmsprop", 0.05)
        assert config.kl_weight == (1e-4 if config.dataset == "cifar10" else 1e-6)
        assert config.ood == (("svhn",) if config.dataset == "cifar10" else None)
        online = {name for name in config.methods if name.startswith("online")}
        if config.dataset in ("cub200", "msls"):  # whose online variants have configs of their own
            arccos = config.hessian_miner is not None
            assert online == {"online-arccos-fixed"} if arccos else "online-arccos-fixed" not in online


def test_the_benchmark_runs_two_seeds_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one core each; the wall clock stands there, and with --wide every depth."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/lam.py"))
    figures = {"mAP@5", "mAP@10", "mAP@20", "recall@1", "recall@5", "recall@10", "recall@20", "vote ECE", "AUSC"}
    rows = {"deterministic": figures, "hib": {*figures, "AUROC mnist", "AUPR mnist"}}
    methods = {name: dict.fromkeys(row, 0.5) for name, row in rows.items()}
    meeting, threads = threading.Barrier(2, timeout=60), []

    def carried_out(recipe: str, words: list[str], folder: Path, cores: int) -> dict[str, Any]:
        meeting.wait()  # breaks unless two are there
        threads.append(cores)
        return {
            "methods": methods, "made": {"seconds": 90.0}, "config": {"samples": 32, "members": 5},
            "images": {"train": 300, "validation": 30, "test": 60, "mnist": 20},
        }  # fmt: skip

    benchmark["main"].__globals__["carried_out"] = carried_out
    line = ["--data-dir", "data", "--output", str(tmp_path), "--seeds", "0", "1"]
    benchmark["main"](line)
    printed = capsys.readouterr().out
    assert threads == [1, 1]
    assert "minutes of wall clock in all, 2 runs at a time of 1 core(s) each" in printed
    assert "| mAP@5 | mAP@10 | recall@1 | vote ECE |" in printed
    assert "Votes are of 32 draws, of the ensemble's 5 members" in printed
    assert "for AUPR mnist 0.250" in printed
    (tmp_path / "default-0").mkdir()
    (tmp_path / "default-0/config.json").write_text("{}")
    benchmark["main"]([*line, "--wide"])
    printed = capsys.readouterr().out
    assert "wall clock" not in printed, "some of it was done before"
    columns = "mAP@5 | mAP@10 | mAP@20 | recall@1 | recall@5 | recall@10 | recall@20 | vote ECE | AUSC | AUROC mnist"
    assert f"| method | {columns} | AUPR mnist |" in printed
