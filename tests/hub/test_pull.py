"""Pulling an adapter with the real hub client, from a small hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from posthoc.adapters import files
from posthoc.adapters.card import render_card
from posthoc.adapters.config import AdapterConfig, BackboneConfig, HeadConfig, WeightsConfig

from .conftest import Child
from .server import Asked, HubServer


def config_of(weights: WeightsConfig) -> AdapterConfig:
    return AdapterConfig(
        backbone=BackboneConfig("module", "Tiny", {"embedding": "a" * 64}, 8, 8, 0, "as given"),
        heads=[HeadConfig("kappa", "aleatoric", "embedding", 0, {}, {"rows": 10})],
        weights=weights,
        preprocessing={},
        data={},
        fit={},
        versions={},
    )


CHILD = """
import json, sys
from posthoc.hub import pull
from posthoc.adapters.errors import PosthocError
answers = []
for repo, revision in json.loads(sys.argv[1]):
    try:
        folder = pull(repo, revision)
        answers.append({"commit": folder.name, "files": sorted(p.name for p in folder.iterdir())})
    except PosthocError as error:
        answers.append({"error": str(error), "type": type(error).__name__})
print(json.dumps(answers))
"""


def pull_in_child(asks: list[tuple[str, str | None]], child: Child, **more: str) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = child(CHILD, [json.dumps(asks)], **more)
    return answers


def adapter_files(folder: Path, value: float) -> dict[str, bytes]:
    files.write_adapter(folder, {"kappa.a": torch.tensor([value])}, config_of, render_card)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pull_fetches_three_files_of_one_commit_and_names_what_is_wrong(
    hub_server: HubServer, child: Child, tmp_path: Path
) -> None:
    store = hub_server.store
    old, new = adapter_files(tmp_path / "old", 1.0), adapter_files(tmp_path / "new", 2.0)
    first = store.add("org/good", old | {"pytorch_model.bin": b"not to be fetched"})
    second = store.add("org/good", new)
    cardless = store.add("org/cardless", {name: old[name] for name in (files.CONFIG_NAME, files.WEIGHTS_NAME)})
    other = store.add("org/other", {"config.json": b"{}"})
    weightless = store.add("org/weightless", {files.CONFIG_NAME: old[files.CONFIG_NAME]})
    broken = store.add("org/broken", old | {files.CONFIG_NAME: b"{"})
    store.add("org/gated", old, gated="manual", granted=set())
    good = store.repositories["model", "org/good"]
    good.branches["main"], good.tags["v2"] = first, second

    def push(asked: Asked) -> None:
        """Somebody pushes right after the config was sent."""
        if asked.method == "GET" and "/org/good/resolve/main/" in asked.path:
            good.branches["main"] = second

    hub_server.after_each = push
    three = [files.CARD_NAME, files.WEIGHTS_NAME, files.CONFIG_NAME]
    asks = [
        ("org/good", None),
        ("org/good", "v2"),
        ("org/cardless", cardless),
        ("org/missing", None),
        ("org/good", "v3"),
        ("org/other", other),
        ("org/weightless", weightless),
        ("org/broken", broken),
        ("org/gated", None),
        ("org/../x", None),
    ]
    got = dict(zip(map(tuple, asks), pull_in_child(asks, child), strict=True))

    # All of one commit, though main moved on after the first file; nothing but the adapter's files.
    assert got["org/good", None] == {"commit": first, "files": sorted(three)}
    assert got["org/good", "v2"] == {"commit": second, "files": sorted(three)}
    assert got["org/cardless", cardless]["files"] == sorted(three[1:])
    assert "there is no adapter 'org/missing'" in got["org/missing", None]["error"]
    assert "'org/good' has no revision 'v3'" in got["org/good", "v3"]["error"]
    assert "has no adapter_config.json" in got["org/other", other]["error"]
    assert "has no adapter.safetensors" in got["org/weightless", weightless]["error"]
    assert "not valid JSON" in got["org/broken", broken]["error"]
    assert "gated" in got["org/gated", None]["error"]
    assert "is not a hub id" in got["org/../x", None]["error"]
    assert hub_server.asked("org/good") != []
    assert hub_server.asked("pytorch_model") == []
    assert hub_server.asked(f"org/broken/.*{files.WEIGHTS_NAME}") == []

    # Without a connection (the client retries a refused one for half a minute, so it is told) the cache answers for
    # what it has, and the error says so for what it has not.
    cached, missing = pull_in_child([("org/good", None), ("org/new", None)], child, HF_HUB_OFFLINE="1")
    assert cached["commit"] == first
    assert "cannot be reached" in missing["error"]
