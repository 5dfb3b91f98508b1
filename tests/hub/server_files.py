"""The hub's addresses for files: lists of them, their contents, uploads to the storage of large files, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, urlencode

from .server_protocol import (
    API,
    PAGE,
    PAGES,
    PREFIXES,
    HubError,
    Protocol,
    Request,
    Response,
    as_json,
    date,
    page,
    route,
    signature,
)
from .server_store import Commit, Entry, Repository, tree_ids

# What files there are.


def described(repository: Repository, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    entry = commit.files[path]
    row: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    if expand:
        last = repository.last_change(commit, path)
        row["lastCommit"] = {"id": last.oid, "title": last.title, "date": date(last.date)}
    return row


def listed(repository: Repository, commit: Commit, paths: Iterable[str], expand: bool) -> list[dict[str, Any]]:
    """The rows of those paths that are files or folders of the commit."""
    folders = tree_ids(commit.files)
    rows = []
    for path in paths:
        if path in commit.files:
            rows.append(described(repository, commit, path, expand))
        elif path in folders:
            rows.append({"type": "directory", "oid": folders[path], "size": 0, "path": path})
    return rows


@route("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
def tree(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """A folder's files and folders; with `recursive` all that is below it."""
    repository = hub.repository(request, at)
    commit = hub.commit(repository, at["revision"])
    top, folders, expand = at.get("path", "").strip("/"), tree_ids(commit.files), request.flag("expand")
    if top not in folders:
        raise HubError(404, f"{top} does not exist on {at['revision']}", "EntryNotFound", X_Repo_Commit=commit.oid)
    below = [p for p in [*folders, *commit.files] if p and (not top or p.startswith(f"{top}/"))]
    if not request.flag("recursive"):
        below = [path for path in below if path.rpartition("/")[0] == top]
    return page(request, listed(repository, commit, sorted(below), expand), 50 if expand else PAGE)


@route("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """The rows of some paths; those that do not exist are left out. The client sends a form."""
    repository = hub.repository(request, at)
    form = parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    return as_json(listed(repository, hub.commit(repository, at["revision"]), form.get("paths", []), expand))


# Their contents.


@route("GET HEAD", rf"{PAGES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """A file's content, or for a large file a redirection to the storage. HEAD tells commit, size and id before."""
    commit = hub.readable(request, at)
    entry = commit.files.get(at["path"])
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.key}"'}
    if entry.sha256 is None:
        return ranged(request, hub.store.contents[entry.key], headers)
    query = urlencode({"name": at["path"], "signature": signature(entry.sha256)})
    headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return Response(302, headers={**headers, "Location": f"{request.storage}/storage/{entry.sha256}?{query}"})


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the part of it that the header `Range` asks for: how a broken download is resumed."""
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if match is None or match.groups() == ("", ""):
        return Response(200, content, headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(len(content), int(last) + 1) if first and last else len(content)
    if start >= stop:
        raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{len(content)}")
    return Response(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


# Uploads: first ask how each file is to be sent, then send the large ones to the storage, then commit.


@route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
def preupload(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """For each file: "lfs" or "regular", and the id of what is there, so that the client leaves out what is unchanged."""
    repository = hub.repository(request, at, write=not request.flag("create_pr"))
    commit = hub.commit(repository, at["revision"])
    rows = []
    for asked in request.json()["files"]:
        path, sample = asked["path"], base64.b64decode(asked["sample"])
        lfs = hub.store.is_lfs(commit, path, asked["size"], sample)
        row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in commit.files:
            row["oid"] = commit.files[path].key
        rows.append(row)
    return as_json({"files": rows, "commitOid": commit.oid})


@route("POST", rf"{PAGES}\.git/info/lfs/objects/batch")
def lfs_batch(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """Where to send each large content and where to say that it has arrived; no `actions` for one that is there."""
    hub.repository(request, at)
    if hub.user(request) is None:
        raise HubError(401, "Invalid username or password.")
    rows = []
    for asked in request.json()["objects"]:
        oid = asked["oid"]
        row: dict[str, Any] = {"oid": oid, "size": asked["size"]}
        if oid not in hub.store.contents:
            upload = f"{request.storage}/storage/{oid}?signature={signature(oid)}"
            verify = f"{request.base}/{at['kinds']}{at['id']}.git/info/lfs/verify"
            row["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        rows.append(row)
    return as_json({"transfer": "basic", "objects": rows})


@route("PUT GET HEAD", r"/storage/(?P<sha256>[0-9a-f]{64})")
def storage(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """The storage of large contents: whoever has a signed address may read or write that one content."""
    sha256 = at["sha256"]
    if request.first("signature") != signature(sha256):
        raise HubError(403, "the address is not signed")
    if request.method == "PUT":
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, f"the content sent is not that of {sha256}")
        hub.store.keep(sha256, request.body)
        return Response()
    if sha256 not in hub.store.contents:
        raise HubError(404, "no such content")
    return ranged(request, hub.store.contents[sha256], {"ETag": f'"{sha256}"'})


@route("POST", rf"{PAGES}\.git/info/lfs/verify")
def lfs_verify(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    hub.repository(request, at)
    asked = request.json()
    if len(hub.store.contents.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, f"the content {asked['oid']} of {asked['size']} bytes has not arrived")
    return as_json({})


@route("POST", rf"{API}/commit/(?P<revision>[^/]+)")
def commit(hub: Protocol, request: Request, at: dict[str, str]) -> Response:
    """All changes of a push at once, a JSON line each, onto a branch or (`create_pr`) as a new pull request from it."""
    as_pull = request.flag("create_pr")
    repository, author = hub.repository(request, at, write=not as_pull), hub.user(request)
    if author is None:
        raise HubError(401, "Invalid username or password.")
    parent, reference = hub.commit(repository, at["revision"]), repository.reference(at["revision"])
    header, *changes = (json.loads(line) for line in request.body.split(b"\n") if line.strip())
    if not parent.oid.startswith(header["value"].get("parentCommit") or ""):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    number = len(repository.pulls) + 1
    if as_pull:
        reference = (repository.pulls, number)
    elif reference is None:
        raise HubError(400, f"{at['revision']} is not a branch: one cannot commit to a tag or a commit")
    files = dict(parent.files)
    for change in changes:
        apply(hub, files, change["key"], change["value"])
    title, message = header["value"]["summary"], header["value"].get("description", "")
    made = hub.store.commit(repository, parent, files, title, message, author, reference)
    page_url = f"{request.base}/{PREFIXES[repository.kind]}{repository.id}"
    answer: dict[str, Any] = {"success": True, "commitOid": made.oid, "commitUrl": f"{page_url}/commit/{made.oid}"}
    if as_pull:
        answer["pullRequestUrl"] = f"{page_url}/discussions/{number}"
    return as_json(answer)


def apply(hub: Protocol, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
    """One line of a commit. Copies are made by the client: it sends the content, or the id of the large one, again."""
    path = value["path"]
    if any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise HubError(400, f"{path!r} is no path inside a repository")
    if key == "file":
        files[path] = hub.store.keep_regular(base64.b64decode(value["content"], validate=True))
    elif key == "lfsFile":
        if value["oid"] not in hub.store.contents:
            raise HubError(400, f"the LFS pointer {path} points to a content that does not exist")
        files[path] = hub.store.lfs_entry(value["oid"])
    elif key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
        if not gone:
            raise HubError(404, f"A {key[7:].lower()} with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"a commit has no lines {key!r}")
