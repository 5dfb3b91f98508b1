"""A hub on loopback, and Python scripts in processes of their own that talk to it with the real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from . import olah
from .server import HubServer


class Child:
    """Runs scripts with the hub's address in their environment: the client reads it once, when it is imported.

    All scripts of a test share a cache (`home`), so a second one is the same user's next session.
    """

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home

    def environment(self, **more: str | None) -> dict[str, str]:
        """The owner's token unless HF_TOKEN is given; None takes a variable away."""
        own: dict[str, str | None] = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        own |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_TOKEN": "hf_owner", "NO_PROXY": "127.0.0.1"}
        own |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        return {name: value for name, value in (own | more).items() if value is not None}

    def start(
        self, script: str | Path, argv: Sequence[object] = (), **environment: str | None
    ) -> subprocess.Popen[str]:
        """Start a script (its source, or a file); the caller waits for it, or ends it."""
        source = [str(script)] if isinstance(script, Path) else ["-c", script]
        command = [sys.executable, *source, *map(str, argv)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(**environment), stdout=pipe, stderr=pipe, text=True)

    def __call__(self, script: str | Path, argv: Sequence[object] = (), **environment: str | None) -> Any:
        """Run a script to its end and return what the last line it printed says in JSON."""
        with self.start(script, argv, **environment) as process:
            try:
                out, err = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1])


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """An empty hub."""
    server = HubServer()
    yield server
    server.stop()
    assert server.failures == []


@pytest.fixture
def child(hub_server: HubServer, tmp_path: Path) -> Child:
    """Runs scripts against `hub_server`."""
    return Child(hub_server.url, tmp_path / "hf-home")


@pytest.fixture
def olah_server(tmp_path: Path) -> Iterator[Callable[[Path, str], Child]]:
    """`olah_server(git_working_copy, "org/name")` serves it with the real olah and returns what runs scripts against it."""
    with ExitStack() as running:

        def serve(working_copy: Path, repo_id: str) -> Child:
            folder = tmp_path / "olah" / repo_id
            folder.mkdir(parents=True)
            url = running.enter_context(olah.serve({repo_id: working_copy}, folder))
            return Child(url, folder / "hf-home")

        yield serve
