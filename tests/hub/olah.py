"""A git repository served read-only by `olah`, a real hub server in a process of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CONFIG = """
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{folder}/cache"
hf-scheme = "http"
hf-netloc = "127.0.0.1:9"
hf-lfs-netloc = "127.0.0.1:9"
mirrors-path = ["{folder}/mirrors"]

[accessibility]
offline = true
"""


def command() -> str:
    """The `olah-cli` beside this Python or on the PATH; skips the test where there is none."""
    beside = shutil.which("olah-cli", path=str(Path(sys.executable).parent))
    if found := beside or shutil.which("olah-cli"):
        return found
    pytest.skip("needs olah-cli: `pip install olah==0.5.4`, here or in an environment on the PATH")


@contextmanager
def serve(repositories: dict[str, Path], folder: Path) -> Iterator[str]:
    """Serve git working copies as models under these ids; yields the address. `folder` holds its settings and cache.

    What olah lacks: `model_info` without a revision (401) and everything that writes (405).
    """
    olah = command()
    for repo_id, working_copy in repositories.items():
        place = folder / "mirrors" / "models" / repo_id
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(working_copy.resolve())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / "olah.toml"
    settings.write_text(CONFIG.format(port=port, folder=folder))
    with (folder / "olah.log").open("w") as log:
        process = subprocess.Popen([olah, "-c", str(settings)], cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not listens(port):
            assert process.poll() is None, (folder / "olah.log").read_text()
            assert time.monotonic() < deadline, "olah did not start in 120 s"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
