"""The hub of the tests, asked by hand: what no client sends unless something is wrong."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .server import HubServer


def fetch(
    url: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urlopen(Request(url, body, {**headers, "Authorization": "Bearer hf_owner"}, method=method)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_parts_signatures_and_paths_are_checked(hub_server: HubServer) -> None:
    url, text = hub_server.url, b"0123456789"
    commit = hub_server.store.add("org/m", {"a.txt": text, "b.bin": text})
    for name in ("a.txt", "b.bin"):
        address = f"{url}/org/m/resolve/main/{name}"
        assert fetch(address)[:2] == (200, text)
        assert fetch(address, "HEAD")[2]["Content-Length"] == "10"
        for asked, part in {"2-4": b"234", "7-": b"789", "-3": b"789", "8-99": b"89"}.items():
            status, body, headers = fetch(address, Range=f"bytes={asked}")
            assert (status, body) == (206, part)
            start = text.index(part)
            assert headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/10"
        assert fetch(address, Range="bytes=10-")[0] == 416
    status, _, headers = fetch(f"{url}/org/m/resolve/main/none", "HEAD")
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", commit)

    ask = json.dumps({"objects": [{"oid": "0" * 64, "size": 1}]}).encode()
    actions = json.loads(fetch(f"{url}/org/m.git/info/lfs/objects/batch", "POST", ask)[1])["objects"][0]["actions"]
    assert fetch(actions["upload"]["href"], "PUT", b"x")[0] == 400  # not the content of that id
    assert fetch(actions["upload"]["href"].partition("?")[0], "PUT", b"x")[0] == 403
    verify = json.dumps({"oid": "0" * 64, "size": 1}).encode()
    assert fetch(actions["verify"]["href"], "POST", verify)[0] == 404

    def push(key: str, **value: Any) -> int:
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": key, "value": value}]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        return fetch(f"{url}/api/models/org/m/commit/main", "POST", body)[0]

    assert push("file", path="../x", content="", encoding="base64") == 400
    assert push("file", path="a/.git/x", content="", encoding="base64") == 400
    assert push("file", path="x", content="!", encoding="base64") == 400
    assert push("lfsFile", path="x.bin", oid="0" * 64, size=1) == 400
    assert push("deletedFolder", path="none") == 404
    assert push("file", path="x", content="eA==", encoding="base64") == 200
    assert fetch(f"{url}/nowhere")[0] == 404


def test_slow_waits_before_every_piece(hub_server: HubServer) -> None:
    hub_server.store.add("org/m", {"a.txt": b"x" * 200_000})
    hub_server.slow(0.05, "resolve", times=1)
    start = time.monotonic()
    assert len(fetch(f"{hub_server.url}/org/m/resolve/main/a.txt")[1]) == 200_000
    assert time.monotonic() - start >= 4 * 0.05
