"""The command line on a folder of real digits: fit, predict, info, check, cache."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import posthoc
from posthoc.adapters.score_table import write_table
from posthoc.cli import main

NAME = "test_vit"  # 0.4 M parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    root = tmp_path_factory.mktemp("digits")
    for i in np.flatnonzero(digits.target < 3)[:90]:
        at = root / ("zero", "one", "two")[digits.target[i]]
        at.mkdir(exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((64, 64)).save(at / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(NAME, pretrained=False)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(module.state_dict(), path)
    return path


def test_a_folder_is_fitted_scored_and_described(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, table = tmp_path / "adapter", tmp_path / "scores.csv"
    fit = ["fit", NAME, str(folder), "--checkpoint", str(weights), "--head", "kappa", "loss", "--output", str(adapter)]
    main([*fit, "--epochs", "1", "--batch-size", "32", "--validation", "0.3"])
    main(
        ["predict", str(adapter), str(folder), "--checkpoint", str(weights), "--output", str(table), "--abstain", "0.8"]
    )
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 90
    assert list(rows[0]) == ["path", "label", "uncertainty", "percentile", "abstain"]
    assert all(Path(r["path"]).parent.name == r["label"] for r in rows)
    assert all(float(r["uncertainty"]) > 0 and 0 <= float(r["percentile"]) <= 100 for r in rows)
    assert {r["abstain"] for r in rows} <= {"True", "False"}
    capsys.readouterr()
    main(["info", str(adapter)])
    told = capsys.readouterr().out
    assert NAME in told
    assert "kappa (aleatoric)" in told
    assert "held-out scores: q05" in told
    main(["cache"])
    assert "90 rows" in capsys.readouterr().out


def test_parquet_is_written_too_and_a_warning_is_one_line(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, table = tmp_path / "adapter", tmp_path / "scores.parquet"
    fit = ["fit", NAME, str(folder), "--checkpoint", str(weights), "--head", "loss", "--output", str(adapter)]
    main([*fit, "--epochs", "1", "--batch-size", "32"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["preprocessing"]["mean"] = [0.0, 0.0, 0.0]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as on a command line; in tests they are errors
        main(["predict", str(adapter), str(folder), "--checkpoint", str(weights), "--output", str(table)])
    told = [line for line in capsys.readouterr().err.splitlines() if "another preprocessing" in line]
    assert len(told) == 1
    assert told[0].startswith("posthoc: warning: ")
    assert pyarrow.parquet.read_table(table).column_names == ["path", "label", "uncertainty", "percentile"]


def test_check_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", NAME])
    told = capsys.readouterr().out
    assert "embedding_dim" in told
    assert "head" in told


@pytest.mark.parametrize("arguments", [["check", "resnet5O"], ["info", "./no-such-folder"]])
def test_our_errors_are_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("posthoc: ")


@pytest.mark.parametrize(
    "command",
    ["fit", "predict", "eval", "eval ood", "eval calibration", "eval selective", "features", "info", "check", "cache"],
)
def test_every_help_teaches_by_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert f"Example: posthoc {command}" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(posthoc.PosthocError, match="cannot write"):
        write_table(tmp_path / "file" / "table.csv", {"a": [1]})


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_is_whole_or_not_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / "made" / name
    columns = {"path": ["a,b", 'c"d', "é"], "uncertainty": [0.1, 1e-300, 2.0]}
    for _ in range(2):
        write_table(path, columns)
        assert [one.name for one in path.parent.iterdir()] == [name]
    if path.suffix == ".parquet":
        assert pyarrow.parquet.read_table(path).to_pydict() == columns
    else:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        assert [row["path"] for row in rows] == columns["path"]
        assert [float(row["uncertainty"]) for row in rows] == columns["uncertainty"]


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.split() == ["posthoc", posthoc.__version__]
