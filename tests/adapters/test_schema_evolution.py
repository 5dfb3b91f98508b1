"""Adapters of older versions: what is stored here loads to the scores it gave, and older schemas are brought up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import posthoc
from posthoc.adapters import files
from posthoc.adapters.config import SCHEMA_VERSION, AdapterConfig
from posthoc.adapters.errors import AdapterError
from posthoc.adapters.migrations import MIGRATIONS, migrate

from .seeded import images, tiny

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(path.parent.name for path in FIXTURES.glob(f"*/{files.CONFIG_NAME}"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_stored_adapter_gives_the_scores_it_gave(name: str) -> None:
    model = posthoc.load(FIXTURES / name, backbone=tiny())
    expected = json.loads((FIXTURES / name / "scores.json").read_text())
    prediction = model(images(12, key=5)[0])
    assert set(prediction.heads) == expected.keys()
    for head, fields in expected.items():
        for field, values in fields.items():
            got = getattr(prediction[head], field)
            # a percentile is a count of held-out scores: rounding moves it by one of their steps where scores are equal
            atol = 1e-5 if field == "uncertainty" else 100 / 27 + 0.1
            torch.testing.assert_close(got, torch.tensor(values), rtol=1e-5, atol=atol)


def test_the_stored_adapters_are_there_of_every_head_and_small() -> None:
    assert len(FOLDERS) == 2
    heads = {head.name for name in FOLDERS for head in files.read_config(FIXTURES / name).heads}
    assert heads == set(posthoc.list_heads())
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 100_000


def older(**change: Any) -> str:
    """A config as an invented schema 0 had it: one head, its backbone's name under "network"."""
    raw = json.loads((FIXTURES / "schema1-laplace-probe" / files.CONFIG_NAME).read_text())
    raw["network"] = raw["backbone"].pop("name")
    (raw["head"],) = raw.pop("heads")
    return json.dumps({**raw, "schema_version": 0, **change})


def from_0(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in raw.items() if name not in ("network", "head")}
    return kept | {"backbone": {**raw["backbone"], "name": raw["network"]}, "heads": [raw["head"]]}


def test_no_step_is_registered_while_there_is_one_schema() -> None:
    assert SCHEMA_VERSION == 1
    assert MIGRATIONS == {}


def test_an_older_config_is_read_by_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    today = FIXTURES / "schema1-laplace-probe"
    (tmp_path / files.CONFIG_NAME).write_text(older())
    (tmp_path / files.WEIGHTS_NAME).write_bytes((today / files.WEIGHTS_NAME).read_bytes())
    with pytest.raises(AdapterError, match="schema_version is 0, this posthoc reads 1 "):
        posthoc.load(tmp_path, backbone=tiny())
    monkeypatch.setitem(MIGRATIONS, 0, from_0)
    assert files.read_config(tmp_path) == files.read_config(today)
    new = images(12, key=5)[0]
    expected = posthoc.load(today, backbone=tiny())(new).uncertainty
    assert torch.equal(posthoc.load(tmp_path, backbone=tiny())(new).uncertainty, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": -1}, "schema_version is -1, this posthoc reads 0 to 1"),
        ({"schema_version": -(10**18)}, "this posthoc reads 0 to 1"),
        ({"schema_version": 2}, "reads 0 to 1 .*upgrade"),
        ({"schema_version": "0"}, "reads 0 to 1"),
        ({"schema_version": 0.0}, "reads 0 to 1"),
        ({"schema_version": None}, "reads 0 to 1"),
        ({"schema_version": False}, "reads 0 to 1"),
        ({"backbone": 3}, "schema 0 cannot be read as 1 .TypeError"),
        ({"more": 3}, "unknown field 'more'"),  # what a step leaves is checked like any other config
    ],
)
def test_an_older_config_that_is_not_right_is_refused(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MIGRATIONS, 0, from_0)
    with pytest.raises(AdapterError, match=message):
        AdapterConfig.from_json(older(**change))


def test_steps_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in range(3):
        monkeypatch.setitem(MIGRATIONS, version, lambda raw, v=version: {**raw, "steps": [*raw["steps"], v]})
    assert migrate({"schema_version": 1, "steps": []}, 3, "here") == {"schema_version": 3, "steps": [1, 2]}
    assert migrate({"schema_version": 3, "steps": []}, 3, "here") == {"schema_version": 3, "steps": []}
