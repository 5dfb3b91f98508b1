"""The hub of the tests, asked by the real client: what it must do before tests can rest on it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from .conftest import Child
from .server import HubServer
from .server_store import Entry, git_id, tree_ids

# How often it tries again, and which classes its errors have, is asserted of today's client.
of_client_2 = pytest.mark.skipif(
    int(version("huggingface-hub").partition(".")[0]) < 2, reason="needs huggingface-hub 2.x"
)

# Children that only need the client import nothing else, and wait for nothing when they are to try again and again.
PUSH = """
import json, sys, time
time.sleep = lambda seconds: None
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


REVISIONS = """
import json
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, snapshot_download
api, repo = HfApi(), "org/m"
api.create_repo(repo)
def push(changes, **more):
    operations = [CommitOperationAdd(name, content) for name, content in changes.items()]
    return api.create_commit(repo, operations, commit_message="push", **more)
one = push({"a.txt": b"one", "w/x.safetensors": b"1" * 999}).oid
api.create_tag(repo, tag="v1.0", tag_message="the first")
api.create_branch(repo, branch="dev")
two = push({"a.txt": b"two"}, parent_commit=one).oid
dev = push({"b.txt": b"dev"}, revision="dev").oid
pull = push({"c.txt": b"pull"}, create_pr=True)
moves = [CommitOperationCopy("a.txt", "copy.txt"), CommitOperationCopy("w/x.safetensors", "w/y.safetensors"),
         CommitOperationDelete("a.txt")]
three = api.create_commit(repo, moves, commit_message="move").oid
four = api.delete_folder("w", repo).oid
def content(revision):
    folder = Path(snapshot_download(repo, revision=revision))
    return {str(p.relative_to(folder)): p.read_text()[:5] for p in sorted(folder.rglob("*")) if p.is_file()}
revisions = [one, two, three, four, "main", "v1.0", "dev", pull.pr_revision, one[:12]]
refs = api.list_repo_refs(repo, include_pull_requests=True)
tree = [(type(row).__name__, row.path) for row in api.list_repo_tree(repo, revision=three)]
deep = list(api.list_repo_tree(repo, recursive=True, expand=True, revision=three))
print(json.dumps({
    "ids": [one, two, dev, pull.oid, three, four], "files": [content(r) for r in revisions], "pr": pull.pr_num,
    "refs": {r.ref: r.target_commit for r in refs.branches + refs.tags + refs.pull_requests},
    "log": [[c.commit_id, c.title, c.authors] for c in api.list_repo_commits(repo)],
    "tree": tree, "deep": {r.path: r.last_commit.oid for r in deep if hasattr(r, "size")},
    "lfs": [r.lfs.size for r in api.get_paths_info(repo, ["w/x.safetensors", "none"], revision=one)],
    "info": api.model_info(repo, revision="v1.0", files_metadata=True).siblings[2].lfs.sha256,
}))
"""


def test_branches_tags_commits_and_pull_requests(hub_server: HubServer, child: Child) -> None:
    got = child(REVISIONS)
    one, two, dev, pull, three, four = got["ids"]
    x = {"w/x.safetensors": "11111"}
    at_one, at_two = {"a.txt": "one"} | x, {"a.txt": "two"} | x
    at_three = {"copy.txt": "two", "w/y.safetensors": "11111"} | x
    at_four = {"copy.txt": "two"}
    by_revision = [at_one, at_two, at_three, at_four, at_four, at_one, at_one | {"b.txt": "dev"}]
    by_revision += [at_two | {"c.txt": "pull"}, at_one]
    assert [{k: v for k, v in files.items() if k != ".gitattributes"} for files in got["files"]] == by_revision
    named = {"refs/heads/main": four, "refs/heads/dev": dev, "refs/tags/v1.0": one, "refs/pr/1": pull}
    assert got["refs"] == named
    assert got["pr"] == 1
    assert [row[0] for row in got["log"]][:-1] == [four, three, two, one]
    assert got["log"][-1][1:] == ["initial commit", ["owner"]]
    assert got["tree"] == [["RepoFile", ".gitattributes"], ["RepoFile", "copy.txt"], ["RepoFolder", "w"]]
    assert (got["deep"]["w/x.safetensors"], got["deep"]["w/y.safetensors"]) == (one, three)
    assert got["lfs"] == [999]
    assert got["info"] == hub_server.store.repositories["model", "org/m"].commits[one].files["w/x.safetensors"].sha256


ERRORS = """
import json
from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download
def name(act, *arguments, **more):
    try:
        act(*arguments, **more)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, response.status_code if response is not None else None]
    return ["none", None]
api = {who: HfApi(token=token) for who, token in
       {"owner": "hf_owner", "stranger": "hf_stranger", "nobody": False, "wrong": "hf_wrong"}.items()}
own = api["owner"]
head = own.model_info("org/m").sha
own.create_tag("org/m", tag="v1")
got = {
    "no repository": name(own.model_info, "org/none"),
    "no repository, file": name(own.hf_hub_download, "org/none", "a.txt"),
    "no revision": name(own.hf_hub_download, "org/m", "a.txt", revision="v9"),
    "no revision, info": name(own.model_info, "org/m", revision="v9"),
    "no file": name(own.hf_hub_download, "org/m", "none.txt"),
    "repository there": name(own.create_repo, "org/m"),
    "tag there": name(own.create_tag, "org/m", tag="v1"),
    "no start": name(own.create_branch, "org/m", branch="b", revision="v9"),
    "onto a tag": name(own.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="org/m", revision="v1"),
    "broken card": name(own.upload_file, path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md", repo_id="org/m"),
    "delete none": name(own.create_commit, "org/m", [CommitOperationDelete("none.txt")], commit_message="x"),
}
own.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/m", parent_commit=head)
got["stale parent"] = name(own.upload_file, path_or_fileobj=b"y", path_in_repo="x", repo_id="org/m", parent_commit=head)
for who, one in api.items():
    got |= {
        f"private, {who}": name(one.model_info, "org/private"),
        f"private file, {who}": name(one.hf_hub_download, "org/private", "a.txt", local_dir=f"here/{who}"),
        f"gated file, {who}": name(one.hf_hub_download, "org/gated", "a.txt", local_dir=f"here/{who}"),
        f"gated info, {who}": name(one.model_info, "org/gated"),
        f"push, {who}": name(one.upload_file, path_or_fileobj=b"x", path_in_repo=f"{who}.txt", repo_id="org/m"),
        f"create, {who}": name(one.create_repo, "org/new", private=True),
        f"whoami, {who}": one.whoami()["name"] if who in ("owner", "stranger") else name(one.whoami),
    }
suggest = api["stranger"].upload_file(path_or_fileobj=b"other", path_in_repo="x", repo_id="org/m", create_pr=True)
got["suggested"] = suggest.pr_revision
own.delete_repo("org/new")
got["deleted"] = name(own.model_info, "org/new")
got["sees"] = {who: sorted(m.id for m in api[who].list_models()) for who in ("owner", "stranger", "nobody")}
print(json.dumps(got))
"""


@of_client_2
def test_errors_are_those_the_client_has_classes_for(hub_server: HubServer, child: Child, tmp_path: Path) -> None:
    hub_server.store.add("org/m", {"a.txt": b"a"})
    hub_server.store.add("org/private", {"a.txt": b"a"}, private=True)
    hub_server.store.add("org/gated", {"a.txt": b"a"}, gated="manual")
    got = child(ERRORS.replace('f"here', f'f"{tmp_path}'))
    missing, none = "RepositoryNotFoundError", ["none", None]
    assert got["no repository"] == got["no repository, file"] == got["deleted"] == [missing, 404]
    assert got["no revision"] == got["no revision, info"] == got["no start"] == ["RevisionNotFoundError", 404]
    assert got["no file"] == got["delete none"] == ["RemoteEntryNotFoundError", 404]
    assert got["repository there"] == got["tag there"] == ["HfHubHTTPError", 409]
    assert got["onto a tag"] == ["BadRequestError", 400]
    assert got["broken card"] == ["ValueError", None]
    assert got["stale parent"] == ["HfHubHTTPError", 412]
    for what in ("private", "private file"):
        answers = [got[f"{what}, {who}"] for who in ("owner", "stranger", "nobody")]
        assert answers == [none, [missing, 404], [missing, 401]]
    assert [got[f"gated file, {who}"] for who in ("owner", "stranger", "nobody")] == [
        none,
        ["GatedRepoError", 403],
        ["GatedRepoError", 401],
    ]
    assert got["gated info, nobody"] == none
    assert [got[f"push, {who}"][1] for who in ("owner", "stranger", "nobody", "wrong")] == [None, 403, 401, 401]
    assert [got[f"create, {who}"][1] for who in ("owner", "stranger", "nobody", "wrong")] == [None, 403, 401, 401]
    assert (got["whoami, owner"], got["whoami, stranger"], got["whoami, wrong"][1]) == ("owner", "stranger", 401)
    assert got["suggested"] == "refs/pr/1"
    assert got["sees"]["owner"] == ["org/gated", "org/m", "org/private"]
    assert got["sees"]["stranger"] == got["sees"]["nobody"] == ["org/gated", "org/m"]


FIND = """
import json, sys
from huggingface_hub import HfApi, HfFileSystem, ModelCard
api, fs = HfApi(), HfFileSystem()
found = [sorted(m.id for m in api.list_models(**ask)) for ask in json.loads(sys.argv[1])]
one = next(iter(api.list_models(filter="kappa", search="One", cardData=True, full=True)))
card = ModelCard.load("org/one")
card.data.tags.append("edited")
card.push_to_hub("org/one")
with fs.open("org/one/w.safetensors", block_size=1000) as file:
    file.seek(5000)
    part = file.read(3).decode()
pages = list(api.list_repo_tree("org/many", expand=True, repo_type="dataset"))
print(json.dumps({
    "found": found, "tags": one.tags, "card": one.card_data.to_dict(), "library": one.library_name, "sha": one.sha,
    "edited": api.model_info("org/one").card_data.tags, "text": card.text.strip(), "part": part,
    "names": fs.ls("org/one", detail=False), "glob": fs.glob("datasets/org/many/f1?.txt"),
    "old": fs.cat_file(f"hf://org/one@{one.sha}/README.md").decode()[:3], "pages": len(pages),
    "datasets": [d.id for d in api.list_datasets(author="org")],
}))
"""
CARD = """---
library_name: posthoc
base_model: timm/{base}
tags: [{tag}, uncertainty]
license: apache-2.0
pipeline_tag: image-classification
---
# Hello
"""


@of_client_2
def test_models_are_found_by_tags_and_read_by_card_and_file_system(hub_server: HubServer, child: Child) -> None:
    weights = bytes(8000).replace(b"\0", b"w")[:5000] + b"abc" + b"w" * 3000
    for repo_id, base, tag in [("org/one", "a", "kappa"), ("org/two", "b", "kappa"), ("me/three", "a", "loss")]:
        card = CARD.format(base=base, tag=tag).encode()
        hub_server.store.add(repo_id, {"README.md": card, "w.safetensors": weights, "adapter_config.json": b"{}"})
    hub_server.store.add("org/bare", {"a.txt": b"a"})
    hub_server.store.add("org/hidden", {"README.md": CARD.encode()}, private=True, members={"stranger"})
    hub_server.store.add("org/many", {f"f{i}.txt": b"%d" % i for i in range(60)}, kind="dataset")
    asks: list[dict[str, Any]] = [
        {"filter": "posthoc"},
        {"filter": ["posthoc", "kappa"]},
        {"filter": "base_model:timm/a"},
        {"filter": "base_model:adapter:timm/a", "author": "me"},
        {"filter": ["kappa", "loss"]},
        {"author": "org"},
        {"search": "TW"},
        {"filter": "posthoc", "limit": 2},
        {"pipeline_tag": "image-classification", "filter": "license:apache-2.0"},
        {"author": "or"},
    ]
    got = child(FIND, [json.dumps(asks)])
    everyone = ["me/three", "org/one", "org/two"]
    found = got["found"]
    assert found[:3] == [everyone, ["org/one", "org/two"], ["me/three", "org/one"]]
    assert found[3:7] == [["me/three"], [], ["org/bare", "org/one", "org/two"], ["org/two"]]
    assert len(found[7]) == 2
    assert found[8:] == [everyone, []]
    assert {"posthoc", "kappa", "safetensors", "base_model:timm/a", "license:apache-2.0"} <= set(got["tags"])
    assert got["card"]["base_model"] == "timm/a"
    assert got["library"] == "posthoc"
    assert got["edited"] == ["kappa", "uncertainty", "edited"]
    assert (got["text"], got["part"], got["old"]) == ("# Hello", "abc", "---")
    assert len(hub_server.asked("GET /storage/.*")) > 0
    assert max(asked.sent for asked in hub_server.asked("GET /storage/")) <= 2000  # it read a part, not the file
    assert sorted(got["names"])[1:] == ["org/one/README.md", "org/one/adapter_config.json", "org/one/w.safetensors"]
    assert got["glob"] == [f"datasets/org/many/f1{i}.txt" for i in range(10)]
    assert got["pages"] == 61  # pages of 50
    assert got["datasets"] == ["org/many"]


def test_two_pushes_at_once_are_both_kept(hub_server: HubServer, child: Child, tmp_path: Path) -> None:
    folders = [
        folder_of(tmp_path / n, **{f"{n}__txt": n.encode(), f"{n}__bin": n.encode() * 9}) for n in ("one", "two")
    ]
    hub_server.slow(0.05)
    with ThreadPoolExecutor(2) as pool:
        ids = [got["oid"] for got in pool.map(lambda folder: child(PUSH, ["org/m", folder]), folders)]
    repository = hub_server.store.repositories["model", "org/m"]
    head = hub_server.protocol.commit(repository, "main")
    assert set(head.files) == {".gitattributes", "one.txt", "one.bin", "two.txt", "two.bin"}
    assert {commit.oid for commit in repository.history(head)[:2]} == set(ids)


TRY = """
import hashlib, json, time
time.sleep = lambda seconds: None
from pathlib import Path
from huggingface_hub import hf_hub_download
try:
    path = Path(hf_hub_download("org/m", "model.safetensors"))
    print(json.dumps(hashlib.sha256(path.read_bytes()).hexdigest()))
except Exception as error:
    print(json.dumps({"error": type(error).__name__}))
"""


@of_client_2
def test_an_upload_that_dies_leaves_nothing_and_the_next_completes(
    hub_server: HubServer, child: Child, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "f", model__safetensors=b"w" * 300_000)
    hub_server.drop_upload(100_000, times=None)
    with pytest.raises(AssertionError, match=r"httpx2?\.|ConnectionError|WriteError|ReadError|RemoteProtocolError"):
        child(PUSH, ["org/m", folder])
    dropped = hub_server.asked("^PUT")
    assert len(dropped) == 6  # the client tries again five times
    assert {(asked.status, asked.received) for asked in dropped} == {(0, 100_000)}
    assert len(hub_server.store.stored) == 1
    assert len(hub_server.store.repositories["model", "org/m"].commits) == 1

    hub_server.calm()
    hub_server.drop_upload(100_000)
    hub_server.answer(500, "batch")
    hub_server.answer(429, "^PUT", Retry_After="0")
    oid = child(PUSH, ["org/m", folder])["oid"]
    assert oid == hub_server.store.repositories["model", "org/m"].branches["main"]
    assert [asked.status for asked in hub_server.asked("^PUT")[6:]] == [0, 429, 200]
    assert [asked.status for asked in hub_server.asked("batch")[-2:]] == [500, 200]
    assert len(hub_server.store.stored) == 2


@of_client_2
def test_a_download_that_dies_is_resumed_and_one_that_fails_leaves_no_file(hub_server: HubServer, child: Child) -> None:
    content = b"".join(b"%06d" % i for i in range(2_000_000))  # the client keeps pieces of 10 MiB
    hub_server.store.add("org/m", {"model.safetensors": content})
    digest = hashlib.sha256(content).hexdigest()
    # within the first piece: with one piece kept, the rest would come in a request that ends before it is dropped
    hub_server.drop_download(1_000_000, times=None, hard=True)
    assert "error" in child(TRY)
    assert not list(child.home.glob("hub/models--org--m/snapshots/*/*"))

    hub_server.calm()
    hub_server.drop_download(11_000_000)
    before = len(hub_server.log)
    assert child(TRY) == digest
    reads = [asked for asked in hub_server.log[before:] if asked.path.startswith("/storage/")]
    assert [(asked.status, asked.sent) for asked in reads] == [(0, 11_000_000), (206, len(content) - 10 * 1024**2)]

    hub_server.stop()
    assert child(TRY) == digest  # from the cache
    hub_server.start()
    assert child(TRY, HF_HUB_CACHE=str(child.home / "other")) == digest
