"""The hub of the tests, asked by the real client: what it must do before tests can rest on it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .conftest import Child
from .server import HubServer
from .server_store import Entry, git_id, tree_ids

PUSH = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(sys.argv[1], exist_ok=True)
info = api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2], commit_message="push")
print(json.dumps({"oid": info.oid, "url": info.commit_url}))
"""


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path.joinpath(name.replace("__", ".")).write_bytes(content)
    return path


def test_ids_are_those_of_git(hub_server: HubServer, tmp_path: Path) -> None:
    contents = {"a.txt": b"one\n", "a/b": b"two", "a/c/d": b"", "a-b/x": b"three", "ab": b"\x00"}
    files = {name.replace("a.txt", "z.txt"): content for name, content in contents.items()}
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name, content in files.items():
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(name).write_bytes(content)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("-c", "core.autocrlf=false", "add", ".")
    entries = {name: Entry(git_id("blob", content), len(content)) for name, content in files.items()}
    ids = tree_ids(entries)
    assert ids[""] == git("write-tree")
    assert sorted(ids) == ["", "a", "a-b", "a/c"]
    assert ids["a/c"] == git("rev-parse", f"{ids['']}:a/c")


def test_a_second_push_of_the_same_content_makes_no_blob(hub_server: HubServer, child: Child, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", README__md=b"# hi", model__safetensors=b"w" * 5000, config__json=b"{}")
    first = child(PUSH, ["org/m", folder])
    stored = len(hub_server.store.stored)
    assert first["url"] == f"{hub_server.url}/org/m/commit/{first['oid']}"
    second = child(PUSH, ["org/m", folder])
    assert second["oid"] == first["oid"]
    assert len(hub_server.store.stored) == stored == 4  # three files and .gitattributes
    assert len(hub_server.asked("^PUT ")) == 1
    assert hub_server.asked("^PUT ")[0].token == ""  # the storage does not get to see the token
