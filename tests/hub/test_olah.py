"""Pulling an adapter from a hub that is not ours: a git repository behind the real olah."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from posthoc.adapters import files

from .conftest import Child
from .test_pull import adapter_files, pull_in_child

READ = """
import json
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
refs = api.list_repo_refs("org/a")
print(json.dumps({
    "refs": {r.ref: r.target_commit for r in refs.branches + refs.tags},
    "files": sorted(api.list_repo_files("org/a", revision="main")),
    "one": Path(hf_hub_download("org/a", "adapter.safetensors", revision="v1")).read_bytes().hex(),
    "all": {p.name: p.read_bytes().hex() for p in Path(snapshot_download("org/a", revision="main")).iterdir()},
}))
"""


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "core.autocrlf=false"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: Path, contents: dict[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q", "-b", "main")
    for name, content in contents.items():
        folder.joinpath(name).write_bytes(content)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "adapter")
    return git(folder, "rev-parse", "HEAD")


def test_an_adapter_in_a_git_repository_is_pulled_at_main_tag_and_commit(
    olah_server: Callable[[Path, str], Child], tmp_path: Path
) -> None:
    old, new = adapter_files(tmp_path / "old", 1.0), adapter_files(tmp_path / "new", 2.0)
    repository = tmp_path / "repository"
    first = commit(repository, old)
    git(repository, "tag", "v1")
    second = commit(repository, new)
    child = olah_server(repository, "org/a")

    got = child(READ)
    assert got["refs"] == {"refs/heads/main": second, "refs/tags/v1": first}
    assert got["files"] == sorted(new)
    assert bytes.fromhex(got["one"]) == old[files.WEIGHTS_NAME]
    assert {name: bytes.fromhex(content) for name, content in got["all"].items()} == new

    asks = [("org/a", None), ("org/a", "v1"), ("org/a", first), ("org/a", "v9"), ("org/b", None)]
    main, tag, by_commit, no_revision, no_repository = pull_in_child(asks, child)
    assert main == {"commit": second, "files": sorted(new)}
    assert tag == by_commit == {"commit": first, "files": sorted(old)}
    assert "error" in no_revision
    assert "error" in no_repository
