"""What a model hub keeps: contents under git's ids, repositories with their history, and who may see and write them.

Everything is in memory. Ids are those git gives: a regular file is a git blob; a large file (LFS) is a git blob that
holds a pointer, and its content is kept apart under its SHA-256; folders and commits are git trees and commits.
"""

from __future__ import annotations

import fnmatch
import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

# The suffixes of large files, as in the .gitattributes that the hub puts into every new repository.
LFS = "arrow bin ckpt gz h5 joblib model npy npz onnx parquet pickle pkl pt pth safetensors tar zip"
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS.split()).encode()
REGULAR_AT_MOST = 10 * 1024**2  # bytes: what is larger goes to LFS, whatever its name


def git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit: git's id (for LFS: of the pointer), the content's size, and for LFS its SHA-256."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def key(self) -> str:
        """Under which the store keeps the content."""
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        return len(pointer(self.sha256 or "", self.size))


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_ids(files: Mapping[str, Entry]) -> dict[str, str]:
    """Git's id of every folder; "" is the root."""
    inside: dict[str, list[tuple[str, str, str]]] = {"": []}
    for path, entry in files.items():
        folder, _, name = path.rpartition("/")
        inside.setdefault(folder, []).append((name, "100644", entry.oid))
        while folder:
            folder = folder.rpartition("/")[0]
            inside.setdefault(folder, [])
    ids: dict[str, str] = {}
    for folder in sorted(inside, key=lambda path: path.count("/") + bool(path), reverse=True):  # the deepest first
        children = sorted(inside[folder], key=lambda child: child[0] + "/" * (child[1] == "40000"))
        rows = (f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, mode, oid in children)
        ids[folder] = git_id("tree", b"".join(rows))
        if folder:
            above, _, name = folder.rpartition("/")
            inside[above].append((name, "40000", ids[folder]))
    return ids


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: int  # seconds since 1970
    files: Mapping[str, Entry]


@dataclass
class Repository:
    """`members` may write and see it when it is private; `granted` may read the files of a gated one."""

    kind: str  # "model", "dataset" or "space"
    id: str
    private: bool = False
    gated: bool | str = False  # or "auto", "manual"
    members: set[str] = field(default_factory=set)
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)

    def reference(self, revision: str) -> tuple[dict[Any, str], Any] | None:
        """Where a branch or pull request of this name is written, None if there is none."""
        if revision.startswith("refs/pr/") and revision[8:].isdigit():
            number = int(revision[8:])
            return (self.pulls, number) if number in self.pulls else None
        name = revision.removeprefix("refs/heads/")
        return (self.branches, name) if name in self.branches else None

    def find(self, revision: str) -> Commit | None:
        """The commit a branch, pull request, tag or (shortened) commit id stands for."""
        if reference := self.reference(revision):
            return self.commits[reference[0][reference[1]]]
        if oid := self.tags.get(revision.removeprefix("refs/tags/")):
            return self.commits[oid]
        found = [c for oid, c in self.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and those before it, the newest first."""
        commits = [commit]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file the content it has."""
        last = commit
        for older in self.history(commit)[1:]:
            if older.files.get(path) != commit.files[path]:
                break
            last = older
        return last


class Store:
    """All repositories; `stored` lists the ids of contents in the order in which uploads added them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.contents: dict[str, bytes] = {}
        self.stored: list[str] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users = {"hf_owner": "owner", "hf_stranger": "stranger"}  # token -> name; the owner is in every namespace

    def keep(self, key: str, content: bytes) -> None:
        if key not in self.contents:
            self.contents[key] = content
            self.stored.append(key)

    def keep_regular(self, content: bytes) -> Entry:
        entry = Entry(git_id("blob", content), len(content))
        self.keep(entry.oid, content)
        return entry

    def lfs_entry(self, sha256: str) -> Entry:
        """The entry of a large file whose content has arrived (KeyError if it has not)."""
        size = len(self.contents[sha256])
        return Entry(git_id("blob", pointer(sha256, size)), size, sha256)

    def keep_lfs(self, content: bytes) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        self.keep(sha256, content)
        return self.lfs_entry(sha256)

    def read(self, commit: Commit, path: str) -> bytes:
        return self.contents[commit.files[path].key]

    def is_lfs(self, commit: Commit, path: str, size: int, sample: bytes) -> bool:
        """Whether a new file goes to LFS: by .gitattributes, because it is large, or because it is binary."""
        attributes = self.read(commit, ".gitattributes").decode() if ".gitattributes" in commit.files else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        fits = any(fnmatch.fnmatch(path if "/" in p else path.rpartition("/")[2], p) for p in patterns)
        return size > 0 and (fits or size > REGULAR_AT_MOST or b"\0" in sample)

    def create(self, kind: str, repo_id: str, owner: str = "owner", private: bool = False) -> Repository:
        """A new repository as the hub makes it: with a first commit that says which files go to LFS."""
        repository = Repository(kind, repo_id, private, members={owner}, granted={owner})
        with self.lock:
            self.repositories[kind, repo_id] = repository
            files = {".gitattributes": self.keep_regular(GITATTRIBUTES)}
            self.commit(repository, None, files, "initial commit", author=owner)
        return repository

    def commit(
        self,
        repository: Repository,
        parent: Commit | None,
        files: Mapping[str, Entry],
        title: str,
        message: str = "",
        author: str = "owner",
        to: tuple[dict[Any, str], Any] | None = None,
    ) -> Commit:
        """Write a commit of all `files` and move a reference (None: main) to it."""
        date = int(time.time())
        above = f"parent {parent.oid}\n" if parent else ""
        who = f"{author} <{author}@localhost> {date} +0000"
        text = f"tree {tree_ids(files)['']}\n{above}author {who}\ncommitter {who}\n\n{title}\n\n{message}"
        oid = git_id("commit", text.encode())
        commit = Commit(oid, parent.oid if parent else None, title, message, author, date, dict(files))
        repository.commits[oid] = commit
        references, name = to or (repository.branches, "main")
        references[name] = oid
        return commit

    def add(self, repo_id: str, files: Mapping[str, bytes], *, kind: str = "model", **settings: Any) -> str:
        """What a push of `files` to main leaves, without a request; `settings` are fields of Repository.

        Returns the commit's id. The repository is made if there is none.
        """
        with self.lock:
            repository = self.repositories.get((kind, repo_id)) or self.create(kind, repo_id)
            for name, value in settings.items():
                setattr(repository, name, value)
            parent = repository.commits[repository.branches["main"]]
            entries = dict(parent.files)
            for path, content in files.items():
                lfs = self.is_lfs(parent, path, len(content), content[:512])
                entries[path] = self.keep_lfs(content) if lfs else self.keep_regular(content)
            return self.commit(repository, parent, entries, "add files").oid

    def card(self, commit: Commit) -> dict[str, Any]:
        """The metadata block of README.md; empty where there is none that can be read."""
        text = self.read(commit, "README.md").decode(errors="replace") if "README.md" in commit.files else ""
        try:
            return card_metadata(text) or {}
        except yaml.YAMLError:
            return {}


def card_metadata(text: str) -> dict[str, Any] | None:
    """The YAML between the two lines `---` a card starts with (None if there is none); yaml.YAMLError if it is broken."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return None
    end = [line.strip() for line in lines].index("---", 1)
    data = yaml.safe_load("\n".join(lines[1:end]))
    return data if isinstance(data, dict) else None


def tags_of(card: Mapping[str, Any], files: Mapping[str, Entry]) -> list[str]:
    """The tags the hub searches: the card's own, and those it derives from the card's other fields and the files."""

    def listed(name: str) -> list[str]:
        value = card.get(name) or []
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]

    relation = card.get("base_model_relation") or ("adapter" if "adapter_config.json" in files else "finetune")
    tags = listed("library_name") + listed("pipeline_tag") + listed("tags") + listed("language")
    tags += ["safetensors"] * any(path.endswith(".safetensors") for path in files)
    tags += ["model-index"] * ("model-index" in card)
    tags += [f"dataset:{name}" for name in listed("datasets")]
    tags += [f"base_model:{name}" for name in listed("base_model")]
    tags += [f"base_model:{relation}:{name}" for name in listed("base_model")]
    tags += [f"license:{name}" for name in listed("license")]
    return list(dict.fromkeys(tags))
