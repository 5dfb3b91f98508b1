"""Pulling an adapter with the real hub client, from a small hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from posthoc.adapters import files
from posthoc.adapters.card import render_card
from posthoc.adapters.config import AdapterConfig, BackboneConfig, HeadConfig, WeightsConfig

OLD, NEW = "1" * 40, "2" * 40


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


@dataclass
class Hub:
    """Repositories as {id: {revision: {path: content}}}; `gated` ids answer 403; `asked` keeps every request."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    moves_after: int | None = None

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repo, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.asked.append(f"{repo}@{revision}/{name}")
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.commits.get(revision, revision)
        if commit not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = self.repos[repo][commit].get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        if self.moves_after is not None and revision == "main":
            self.moves_after -= 1
            if self.moves_after == 0:
                self.commits["main"] = NEW  # somebody pushes right after the config was sent
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def _reply(self, body: bool) -> None:
        status, headers, content = self.hub.answer(self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._reply(False)

    def do_GET(self) -> None:
        self._reply(True)

    def log_message(self, *arguments: Any) -> None:
        pass


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


def pull_in_child(asks: list[tuple[str, str | None]], endpoint: str, home: Path, **more: str) -> list[dict[str, Any]]:
    """The client reads its environment when it is imported, so it is asked in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "none", **more}
    command = [sys.executable, "-c", CHILD, json.dumps(asks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def adapter_files(folder: Path, value: float) -> dict[str, bytes]:
    files.write_adapter(folder, {"kappa.a": torch.tensor([value])}, config_of, render_card)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pull_fetches_three_files_of_one_commit_and_names_what_is_wrong(hub: tuple[Hub, str], tmp_path: Path) -> None:
    server, endpoint = hub
    old, new = adapter_files(tmp_path / "old", 1.0), adapter_files(tmp_path / "new", 2.0)
    extra = {"pytorch_model.bin": b"not to be fetched"}
    server.repos = {
        "org/good": {OLD: old | extra, NEW: new},
        "org/cardless": {OLD: {name: old[name] for name in (files.CONFIG_NAME, files.WEIGHTS_NAME)}},
        "org/other": {OLD: {"config.json": b"{}"}},
        "org/weightless": {OLD: {files.CONFIG_NAME: old[files.CONFIG_NAME]}},
        "org/broken": {OLD: old | {files.CONFIG_NAME: b"{"}},
    }
    server.commits = {"main": OLD, "v2": NEW}
    server.gated = {"org/gated"}
    server.moves_after = 2 + 1  # its size, its address, its content
    three = [files.CARD_NAME, files.WEIGHTS_NAME, files.CONFIG_NAME]
    asks = [
        ("org/good", None),
        ("org/good", "v2"),
        ("org/cardless", OLD),
        ("org/missing", None),
        ("org/good", "v3"),
        ("org/other", OLD),
        ("org/weightless", OLD),
        ("org/broken", OLD),
        ("org/gated", None),
        ("org/../x", None),
    ]
    got = dict(zip(map(tuple, asks), pull_in_child(asks, endpoint, tmp_path / "home"), strict=True))

    # All of one commit, though main moved on after the first file; nothing but the adapter's files.
    assert got["org/good", None] == {"commit": OLD, "files": sorted(three)}
    assert got["org/good", "v2"] == {"commit": NEW, "files": sorted(three)}
    assert got["org/cardless", OLD]["files"] == sorted(three[1:])
    assert "there is no adapter 'org/missing'" in got["org/missing", None]["error"]
    assert "'org/good' has no revision 'v3'" in got["org/good", "v3"]["error"]
    assert "has no adapter_config.json" in got["org/other", OLD]["error"]
    assert "has no adapter.safetensors" in got["org/weightless", OLD]["error"]
    assert "not valid JSON" in got["org/broken", OLD]["error"]
    assert "gated" in got["org/gated", None]["error"]
    assert "is not a hub id" in got["org/../x", None]["error"]
    assert not any("pytorch_model" in ask for ask in server.asked)
    assert not any("org/broken" in ask and files.WEIGHTS_NAME in ask for ask in server.asked)

    # Without a connection (the client retries a refused one for half a minute, so it is told) the cache answers for
    # what it has, and the error says so for what it has not.
    cached, missing = pull_in_child(
        [("org/good", None), ("org/new", None)], endpoint, tmp_path / "home", HF_HUB_OFFLINE="1"
    )
    assert cached["commit"] == OLD
    assert "cannot be reached" in missing["error"]
