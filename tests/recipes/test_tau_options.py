"""The options, presets and benchmark of the recipe tau."""

from __future__ import annotations

import os
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.splits import row_uniform
from posthoc.recipes import tau, tau_options
from posthoc.recipes.options import parse
from posthoc.recipes.pretraining_evaluation import check_judged
from posthoc.recipes.tau_options import TauConfig

from .tau_runs import SMALL, make_folder, some_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tau"))


@pytest.mark.parametrize("preset", tau.PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    options = tau.PRESETS[preset]
    size = "default" if set(options) & set(tau_options.OF_A_HEAD) else "paper"
    config = parse("tau", TauConfig, tau.PRESETS, None, ["--preset", size, preset, "--seed", "1337"])
    assert config.seed == 1337
    assert {key: getattr(config, key) for key in options} == options
    if preset not in ("labels", "smoke-head"):  # which are a head's, and name no network
        tau.check_part(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--members 3 --papers-probe", "--members 3, --papers-probe: options of a pretraining"),
        ("--method simclr", r"--method simclr: options of a pretraining: a head .* \(--backbone resnet20\)"),
        ("--dropout 0.5", "--dropout 0.5"),
        ("--check", "--check: options"),
        ("--width 16", "--width 16"),
        ("--tracker wandb", "--tracker"),
        ("--temperature 0.05", r"--temperature 0\.05 was given; a head chooses its own t by blur"),
    ],
)  # fmt: skip
def test_a_head_refuses_what_it_would_not_read(words: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, ["--preset", "resnet20", *words.split()]))


@pytest.mark.parametrize("words", ["--positives labels", "--views 3", "--test-images 5", "--cache-dir x"])
def test_a_pretraining_refuses_what_it_would_not_read(words: str) -> None:
    with pytest.raises(OptionError, match=f"{words}: options of a head on a frozen network"):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, words.split()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method simclr --include-positive", "--include-positive: only read with --method tau"),
        ("--method simclr --queue 7 --momentum 0.5", "--queue 7, --momentum 0.5: only read with --method moco"),
        ("--method moco --no-gather", "--no-gather: only read with --method tau, simclr or hib"),
        ("--samples 3", "--samples 3: only read with --method hib"),
        ("--method supervised --temperature .5", "--temperature 0.5: only read with a contrast"),
        ("--method supervised --dim 16", "--dim 16: only read with a projection"),
        ("--method simclr --passes 4", "--passes 4: only read with --dropout"),
        ("--network resnet18 --width 5", "--width 5: only read with --network small"),
        ("--stem own", "--stem own: only read with a timm network"),
        ("--network resnet20 --stem own", "--stem own: only read with a timm network"),
    ],
)  # fmt: skip
def test_options_that_nothing_reads_are_refused(words: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, words.split()))


def test_what_a_size_sets_is_no_mistake() -> None:
    for words in ("paper supervised", "smoke supervised", "smoke tau-moco", "smoke --network resnet18", "paper hib"):
        tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, ["--preset", *words.split()]))


def test_options_that_both_read_are_no_refusals() -> None:
    words = "--reference --no-gather --temperature 0.05 --epochs 3 --lr 0.1 --batch-size 64 --train-images 9 --seed 4"
    config = parse("tau", TauConfig, tau.PRESETS, None, ["--preset", "clip", *words.split()])
    tau.check_part(config)
    assert (config.temperature, config.batch_size) == (0.05, 64)
    tau.check_part(parse("tau", TauConfig, tau.PRESETS, None, ["--preset", "labels", "--backbone", "resnet20"]))
    names = {one.name for one in fields(TauConfig)}
    assert names >= {*tau_options.OF_A_HEAD, *tau_options.OF_BOTH}


@pytest.mark.parametrize(
    ("words", "count", "processes"),
    [
        ("methods --mixed-precision bf16", 13, 1),
        ("methods --preset gpu --only TaU", 1, 1),
        ("methods --paper", 13, 1),
        ("frozen", 20, 1),
        ("gather", 4, 2),
        ("frozen -- --train-images 900", 20, 1),
    ],
)
def test_the_benchmarks_runs_are_configs(
    words: str, count: int, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every variant's options are those of a run, and no two variants' are the same."""
    place = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(place))
    benchmark = runpy.run_path(str(place / "tau.py"))
    seen: list[TauConfig] = []
    measured = {"worth": {"linear": 0.5}, "random_features": {"linear": 0.4}, "throughput": {}, "ood": {}}

    def carried_out(
        recipe: str, options: list[str], folder: Path, threads: int | None, processes: int
    ) -> dict[str, Any]:
        seen.append(parse(recipe, TauConfig, tau.PRESETS, None, options))
        tau.check_part(seen[-1])
        ran.append(processes)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return {**measured, "made": {"seconds": 60.0}}

    ran: list[int] = []
    benchmark["main"].__globals__["carried_out"] = carried_out
    part, *rest = words.split()
    monkeypatch.setattr("sys.argv", ["tau.py", part, "--data", "data", "--output", "o", "--seeds", "3", *rest])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    benchmark["main"]()
    assert len({repr(config) for config in seen}) == len(seen) == count
    assert set(ran) == {processes}
    assert {config.seed for config in seen} == {3}
    assert {config.train_images for config in seen} <= ({900} if "900" in words else {None, 4000})
    assert "only" in words or (tmp_path / f"o/cifar10-{part}.md").read_text().startswith("cifar10, seeds 3, 1.0 ")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("bf16" if "bf16" in words else "no")
    if "gpu" in words:
        assert (seen[0].network, seen[0].compile) == ("resnet18", True)
    if "paper" in words:
        plain = [config for config in seen if config.method in ("simclr", "moco") and config.dropout == 0]
        assert len(plain) == 5
        assert {config.lr for config in plain} == {1e-3}
        assert {config.lr for config in seen if config not in plain} == {1e-4}
    if words == "gather":
        assert sorted(config.gather for config in seen) == [False, False, True, True]


def test_what_cannot_work_is_said_before_it_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for wrong, said in (
        ({"temperature": 0.0}, r"--temperature 0\.0"),
        ({"passes": 1}, "--passes 1"),
        ({"dropout": 1.0}, r"--dropout 1\.0"),
        ({"dim": 1}, "--dim 1"),
        ({"probe_images": 9}, "--probe-images 9"),
        ({"include_positive": True, "reference": True}, "--include-positive and --reference"),
    ):
        options: Any = wrong
        with pytest.raises(OptionError, match=said):
            TauConfig(**options)

    def refused(*words: str, common: list[str] = SMALL) -> str:
        with pytest.raises(SystemExit) as exit:
            tau.main([*common, *words])
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert "--checkpoint x: options of a head on a frozen network" in refused("--checkpoint", "x", "--output", "b")
    assert "of a pretraining" in refused("--backbone", "resnet20", "--random-weights", "--output", "b")
    assert not (folder / "b").exists()
    assert "fewer than a batch of 64" in refused("--train-images", "70", "--output", "a")
    seed = next(seed for seed in range(99) if (row_uniform(np.arange(10), seed) > 0.2).all())
    with monkeypatch.context() as patch:
        patch.setattr(tau, "train_member", None)
        ten = ["10" if word == "300" else word for word in SMALL]
        few = refused("--seed", str(seed), "--output", "d", common=ten)
    assert "0 of 10 images that are probed are held out" in few
    label = some_images(64).label
    check_judged(label, label, "some", 0, papers=False)
    with pytest.raises(DataError, match="of one class: give more --probe-images"):
        check_judged(np.zeros(64, np.int64), label, "some", 0, papers=False)
    worse = refused("--train-images", "100", "--epochs", "1", "--lr", "1e-9", "--check", "--output", "c")
    assert "beside that of random features; expected +0.010 or more" in worse
