"""adapter_config.json and the files beside it: what is written is read back, what is damaged is named."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posthoc.adapters import files
from posthoc.adapters.card import render_card
from posthoc.adapters.config import AdapterConfig, BackboneConfig, HeadConfig, WeightsConfig
from posthoc.adapters.errors import AdapterError, PosthocError


def example(weights: WeightsConfig | None = None) -> AdapterConfig:
    return AdapterConfig(
        backbone=BackboneConfig("timm", "resnet18.a1_in1k", {"embedding": "a" * 64}, 512, 512, 1000, "pretrained"),
        heads=[
            HeadConfig("kappa", "aleatoric", "embedding", 10, {"projection": 16, "calibrate": True}, {"rows": 10}),
            HeadConfig("loss", "decision", "embedding", 10, {}, {"rows": 10, "median": 0.5}, {"seconds": 1.5}),
        ],
        weights=weights or WeightsConfig(100, "b" * 64),
        preprocessing={"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406]},
        data={"kind": "folder", "rows": 100},
        fit={"seed": 0, "positives": "labels"},
        versions={"posthoc": "0.1.0"},
    )


def test_what_is_written_is_read_back() -> None:
    assert AdapterConfig.from_json(example().to_json()) == example()


def changed(*path: Any, to: Any = None, drop: bool = False) -> str:
    raw = json.loads(example().to_json())
    at = raw
    for step in path[:-1]:
        at = at[step]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (example().to_json()[:200], "not valid JSON.*truncated"),
        ("[1]", "expected one JSON object"),
        ("{" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
        ('{"schema_version": NaN}', "NaN is not a JSON number"),
        ('{"schema_version": 1, "schema_version": 1}', "stands twice"),
        (changed("schema_version", to=2), "schema_version is 2, this posthoc reads 1 .*upgrade"),
        (changed("schema_version", to=True), "schema_version is True"),
        (changed("schema_version", drop=True), "schema_version is None"),
        (changed("wieghts", to=1), "unknown field 'wieghts': did you mean 'weights'"),
        (changed("backbone", "embeding_dim", to=1), "did you mean 'embedding_dim'"),
        (changed("weights", drop=True), "weights are missing"),
        (changed("backbone", "embedding_dim", to="512"), "embedding_dim holds '512', expected an int"),
        (changed("backbone", "embedding_dim", to=10**12), "embedding_dim is 1000000000000, expected 1 to"),
        (changed("backbone", "embedding_dim", to=-1), "embedding_dim is -1"),
        (changed("backbone", "num_classes", to=-1), "num_classes is -1"),
        (changed("backbone", "source", to="pickle"), "backbone source 'pickle'"),
        (changed("backbone", "name", to="hf-hub:someone/else"), "is not a timm name"),
        (changed("backbone", "name", to="local-dir:/etc"), "is not a timm name"),
        (changed("backbone", "revision", to="../.."), "is not a revision name"),
        (changed("backbone", "fingerprints", "embedding", to="xyz"), "is not a sha256 name"),
        (changed("backbone", "fingerprints", to=[]), "expected a dict"),
        (changed("weights", "sha256", to="b" * 63), "is not a sha256 name"),
        (changed("heads", to=[]), "names no head"),
        (changed("heads", to={}), "heads holds {}, expected a list"),
        (changed("heads", 1, "name", to="kappa"), "stands twice among kappa, kappa"),
        (changed("heads", 1, "name", to="os.system"), "is not a head name"),
        (changed("heads", 1, "scope", to="logits"), "scope 'logits', which has no fingerprint"),
        (changed("heads", 0, "options", "projection", to=10**9), "option projection of head 'kappa' is 1000000000"),
    ],
)
def test_a_config_that_is_not_right_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        AdapterConfig.from_json(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_exchanged_value_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    raw = json.loads(example().to_json())
    places: list[tuple[Any, Any]] = []

    def walk(at: Any) -> None:
        for key in at if isinstance(at, dict) else range(len(at)):
            places.append((at, key))
            if isinstance(at[key], dict | list):
                walk(at[key])

    walk(raw)
    at, key = data.draw(st.sampled_from(places))
    at[key] = data.draw(VALUES)
    with contextlib.suppress(PosthocError):
        again = AdapterConfig.from_json(json.dumps(raw))
        assert AdapterConfig.from_json(again.to_json()) == again


def test_values_json_cannot_hold_are_refused() -> None:
    broken = dataclasses.replace(example(), fit={"value": float("nan")})
    with pytest.raises(AdapterError, match="cannot hold"):
        broken.to_json()


TENSORS = {"kappa.weight": torch.arange(6.0).reshape(2, 3), "loss.count": torch.tensor(3)}


def written(folder: Path) -> Path:
    return files.write_adapter(folder, TENSORS, example, render_card)


def test_files_come_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = written(tmp_path / "deep" / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter.safetensors", "adapter_config.json"]
    config = files.read_config(folder)
    tensors = files.read_weights(folder, config.weights)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_writing_over_an_adapter_replaces_it(tmp_path: Path) -> None:
    written(tmp_path)
    files.write_adapter(tmp_path, {"a": torch.zeros(1)}, example, render_card)
    assert files.read_weights(tmp_path, files.read_config(tmp_path).weights).keys() == {"a"}


def truncate(folder: Path) -> None:
    path = folder / files.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-5])


def tamper(folder: Path) -> None:
    path = folder / files.WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def no_safetensors(folder: Path) -> None:
    _with_weights(folder, b"\xff" * 64)


def not_finite(folder: Path) -> None:
    files.write_adapter(folder, {"a": torch.tensor([1.0, float("inf")])}, example, render_card)


def _with_weights(folder: Path, content: bytes) -> None:
    (folder / files.WEIGHTS_NAME).write_bytes(content)
    config = example(WeightsConfig(len(content), hashlib.sha256(content).hexdigest()))
    (folder / files.CONFIG_NAME).write_text(config.to_json())


def no_weights(folder: Path) -> None:
    (folder / files.WEIGHTS_NAME).unlink()


def no_config(folder: Path) -> None:
    (folder / files.CONFIG_NAME).unlink()


def huge_config(folder: Path) -> None:
    (folder / files.CONFIG_NAME).write_bytes(b" " * (files.MAX_CONFIG_BYTES + 1))


def binary_config(folder: Path) -> None:
    (folder / files.CONFIG_NAME).write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (tamper, "was changed after it was written"),
        (no_safetensors, "is not a safetensors file"),
        (not_finite, "'a' holds values that are not finite"),
        (no_weights, "adapter.safetensors is missing"),
        (no_config, "adapter_config.json is missing"),
        (huge_config, "more than any adapter needs"),
        (binary_config, "cannot be read as text"),
    ],
)
def test_damaged_files_are_each_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    written(tmp_path)
    damage(tmp_path)
    with pytest.raises(AdapterError, match=message):
        files.read_weights(tmp_path, files.read_config(tmp_path).weights)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AdapterError, match="cannot write the adapter"):
        written(tmp_path / "file" / "adapter")


def test_the_card_states_the_facts() -> None:
    card = render_card(example())
    for fact in (
        "resnet18.a1_in1k",
        "a" * 64,
        "kappa",
        "aleatoric",
        "posthoc.load(",
        "base_model: timm/resnet18.a1_in1k",
    ):
        assert fact in card
    own = dataclasses.replace(
        example(), backbone=BackboneConfig("module", "Tiny", {"embedding": "a" * 64}, 8, 8, 0, "as given")
    )
    assert "backbone=your_model" in render_card(own)
    assert "base_model" not in render_card(own)
