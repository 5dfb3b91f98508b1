"""The hub's protocol, request by request: what `huggingface_hub` asks, and what is answered from a store.

Here is what all answers share: routing, users and what they may see, errors, and the description of a repository. The
addresses are in server_repositories.py and server_files.py, one function each; its `route` says which. Errors are
answered as the hub does: a status, a sentence in JSON, and the header X-Error-Code where the client has an exception
class for the error.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from .server_store import Commit, Entry, Repository, Store, tags_of

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
PAGE = 1000  # entries of a list's page
SECRET = secrets.token_bytes()  # signs the addresses of the storage, which knows no user


@dataclass
class Request:
    method: str
    target: str  # path and query as sent
    headers: Mapping[str, str]
    body: bytes
    base: str  # the hub's own address
    storage: str  # the address of the storage of large files, another origin than the hub, as with the real one

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def first(self, name: str) -> str:
        return self.query.get(name, [""])[0]

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        named = {"X-Error-Code": code} if code else {}
        self.headers = {**named, "X-Error-Message": message, **{k.replace("_", "-"): v for k, v in headers.items()}}


Handler = Callable[["Protocol", Request, dict[str, str]], Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
REPO = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kinds>models|datasets|spaces)/{REPO}"
PAGES = rf"/(?P<kinds>datasets/|spaces/|){REPO}"


def route(methods: str, pattern: str) -> Callable[[Handler], Handler]:
    """Answer these methods at this path; named groups of the pattern are the handler's `at`."""

    def register(handler: Handler) -> Handler:
        ROUTES.append((methods, re.compile(pattern), handler))
        return handler

    return register


def as_json(value: Any, status: int = 200, **headers: str) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def signature(sha256: str) -> str:
    return hashlib.sha256(SECRET + sha256.encode()).hexdigest()


def page(request: Request, rows: list[Any], size: int = PAGE) -> Response:
    """One page of a list, with the address of the next in the header `Link`."""
    start = int(request.first("cursor") or 0)
    if start + size >= len(rows):
        return as_json(rows[start:])
    query = urlencode(request.query | {"cursor": [str(start + size)]}, doseq=True)
    return as_json(rows[start : start + size], Link=f'<{request.base}{request.path}?{query}>; rel="next"')


class Protocol:
    def __init__(self, store: Store) -> None:
        self.store = store

    def answer(self, request: Request) -> Response:
        """Answer a request; one at a time, so that a commit is all or nothing for everybody else."""
        try:
            for methods, pattern, handler in ROUTES:
                if request.method in methods.split() and (match := pattern.fullmatch(request.path)):
                    at = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    with self.store.lock:
                        return handler(self, request, at)
            raise HubError(404, f"{request.method} {request.path} is no address of this hub")
        except HubError as error:
            return as_json({"error": error.message}, error.status, **error.headers)
        except (KeyError, TypeError, ValueError) as error:
            return as_json({"error": f"malformed request: {error!r}"}, 400)

    def user(self, request: Request) -> str | None:
        """Whose token came with the request, None without one."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.store.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.store.users.get(token)

    def repository(self, request: Request, at: Mapping[str, str], write: bool = False) -> Repository:
        """The repository an address names, if the user may see it, and with `write`, change it."""
        kind = KINDS.get(at["kinds"].rstrip("/"), "model")
        user, found = self.user(request), self.store.repositories.get((kind, at["id"]))
        if found is None or (found.private and user not in found.members):
            # What one may not see does not exist; without a token the answer is to log in first.
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and user not in found.members:
            raise HubError(403, f"Forbidden: pass `create_pr=1` as a query parameter to change {found.id}")
        return found

    def readable(self, request: Request, at: Mapping[str, str]) -> Commit:
        """The commit an address names, if the user may read its files."""
        repository, user = self.repository(request, at), self.user(request)
        if repository.gated and user not in repository.granted:
            restricted = f"Access to {repository.kind} {repository.id} is restricted"
            if user is None:
                raise HubError(401, f"{restricted}. Please log in.", "GatedRepo")
            raise HubError(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
        return self.commit(repository, at.get("revision", "main"))

    @staticmethod
    def commit(repository: Repository, revision: str) -> Commit:
        if (found := repository.find(revision)) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def info(self, request: Request, repository: Repository, commit: Commit, part: str = "all") -> dict[str, Any]:
        """What is known of a repository; `part`: "all", "full" (no card), or "short" (a list's entry)."""
        card, tags = self.store.card(commit), tags_of(self.store.card(commit), commit.files)
        first = repository.history(commit)[-1]
        row: dict[str, Any] = {"_id": first.oid[:24], "id": repository.id, "private": repository.private}
        row |= {"likes": 0, "downloads": 0, "tags": tags, "createdAt": date(first.date)}
        if repository.kind == "model":
            row |= {"modelId": repository.id}
            row |= {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
        if part != "short":
            row |= {"author": repository.id.partition("/")[0], "sha": commit.oid, "lastModified": date(commit.date)}
            row |= {"gated": repository.gated, "disabled": False}
            row["siblings"] = [self.sibling(p, e, request.flag("blobs")) for p, e in sorted(commit.files.items())]
        if (part == "all" or request.flag("cardData")) and card:
            row["cardData"] = card
            row |= {"model-index": card["model-index"]} if "model-index" in card else {}
        wanted = request.query.get("expand", []) + request.query.get("expand[]", [])
        return {name: value for name, value in row.items() if not wanted or name in ("_id", "id", *wanted)}

    @staticmethod
    def sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": path}
        if blobs:
            row |= {"size": entry.size, "blobId": entry.oid}
        if blobs and entry.sha256:
            row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        return row
