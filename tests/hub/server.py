"""A hub on loopback for tests: the protocol of server_protocol.py over HTTP, with switches for trouble and a log.

It listens at two ports: the hub itself (`url`), and the storage of large files, which is another origin as with the
real hub, so that a client that sends its token there would be seen in the log.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from . import server_files, server_repositories  # noqa: F401  (they register their addresses)
from .server_protocol import Protocol, Request, Response
from .server_store import Store

CHUNK = 64 * 1024
READS = r"^GET .*/(resolve|storage)/"


@dataclass
class Asked:
    """A request as it was answered; status 0: the connection was dropped."""

    method: str
    path: str  # with its query, unquoted
    token: str
    received: int  # bytes of the body
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass
class Trouble:
    """What goes wrong with a request whose "METHOD path" the regular expression `where` is found in."""

    what: str  # "status", "upload", "download" or "slow"
    where: str
    times: float
    amount: float = 0  # status, bytes, or seconds
    headers: dict[str, str] = field(default_factory=dict)
    hard: bool = True  # a dropped connection is reset; else it is closed after what was sent


class Dropped(ConnectionError):
    """The connection is to end here."""

    hard = True


class HubServer:
    """`store` holds the repositories, `log` every request; `after_each`, if set, is called after each is answered."""

    def __init__(self) -> None:
        self.store = Store()
        self.protocol = Protocol(self.store)
        self.log: list[Asked] = []
        self.after_each: Callable[[Asked], None] | None = None
        self.failures: list[str] = []  # errors of the server itself: a test's fixture checks that there are none
        self._troubles: list[Trouble] = []
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._ports = [0, 0]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        """Listen, at the same ports as before a `stop`."""
        self._listeners = [Listener(self, port) for port in self._ports]
        self._ports = [listener.server_port for listener in self._listeners]
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and cut every open connection."""
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
            listener.cut()
        self._listeners = []

    def asked(self, where: str) -> list[Asked]:
        """The requests so far whose "METHOD path" a regular expression is found in."""
        return [asked for asked in list(self.log) if re.search(where, f"{asked.method} {asked.path}")]

    # Trouble. `times` requests are hit (None: all), those whose "METHOD path" `where` is found in.

    def answer(self, status: int, where: str = "", times: int | None = 1, **headers: str) -> None:
        """Answer with an error's status instead."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._add(Trouble("status", where, times or float("inf"), status, named))

    def drop_upload(self, after: int, where: str = "^PUT", times: int | None = 1) -> None:
        """Cut the connection when `after` bytes of a longer body have arrived; nothing of it is kept."""
        self._add(Trouble("upload", where, times or float("inf"), after))

    def drop_download(self, after: int, where: str = READS, times: int | None = 1, hard: bool = False) -> None:
        """Announce the whole body, send `after` bytes of a longer one, and cut the connection.

        The client resumes a connection that is closed (5 times, 1 s apart, if nothing arrives); it gives up at once on
        one that is reset (`hard`; then fewer bytes than `after` may arrive).
        """
        self._add(Trouble("download", where, times or float("inf"), after, hard=hard))

    def slow(self, seconds: float, where: str = "", times: int | None = None) -> None:
        """Wait before each 64 KiB that is read or written, and once before an answer without a body."""
        self._add(Trouble("slow", where, times or float("inf"), seconds))

    def calm(self) -> None:
        """No more trouble."""
        with self._lock:
            self._troubles.clear()

    def _add(self, trouble: Trouble) -> None:
        with self._lock:
            self._troubles.append(trouble)

    def take(self, what: str, line: str, size: int = sys.maxsize) -> Trouble | None:
        """The trouble of this sort that a request is in, used up by once; a drop needs a body longer than its bytes."""
        with self._lock:
            for trouble in self._troubles:
                fits = trouble.what == what and trouble.times > 0 and re.search(trouble.where, line)
                if fits and (what in ("status", "slow") or size > trouble.amount):
                    trouble.times -= 1
                    return trouble
        return None


class Listener(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self.connections):
            reset(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | ValueError):  # a client that went away; ValueError: of a cut socket
            self.hub.failures.append(repr(error))


def reset(connection: socket.socket) -> None:
    """End a connection as a dying server does: at once, whatever is still on its way."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it had ended by itself


class Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def serve(self) -> None:
        hub, line = self.server.hub, f"{self.command} {unquote(self.path)}"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        asked = Asked(self.command, unquote(self.path), token, 0)
        hub.log.append(asked)
        slow = hub.take("slow", line)
        self.pause = slow.amount if slow else 0.0
        try:
            body = self.read_body(line, asked)
            response = self.answer(line, body)
            self.write(line, response, asked)
        except Dropped as dropped:
            asked.status = 0
            self.close_connection = True
            if dropped.hard:
                reset(self.connection)
        if hub.after_each:
            hub.after_each(asked)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self, line: str, asked: Asked) -> bytes:
        parts: list[bytes] = []
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                parts += self.read_part(size, asked, None)
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        drop = self.server.hub.take("upload", line, size)
        parts = self.read_part(size, asked, int(drop.amount) if drop else None)
        return b"".join(parts)

    def read_part(self, size: int, asked: Asked, drop_after: int | None) -> list[bytes]:
        parts, left = [], size if drop_after is None else drop_after
        while left:
            time.sleep(self.pause)
            part = self.rfile.read(min(left, CHUNK))
            if not part:
                raise Dropped  # the client went away
            parts.append(part)
            left -= len(part)
            asked.received += len(part)
        if drop_after is not None:
            raise Dropped
        return parts

    def answer(self, line: str, body: bytes) -> Response:
        hub = self.server.hub
        if trouble := hub.take("status", line):
            return Response(int(trouble.amount), b'{"error": "trouble"}', dict(trouble.headers))
        headers = {name.title(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body, hub.url, hub.storage)
        try:
            return hub.protocol.answer(request)
        except Exception as error:
            hub.failures.append(f"{line}: {error!r}")
            raise Dropped from error

    def write(self, line: str, response: Response, asked: Asked) -> None:
        asked.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command == "HEAD" or not response.body:
            time.sleep(self.pause)
            return
        drop = self.server.hub.take("download", line, len(response.body))
        body = response.body[: int(drop.amount)] if drop else response.body
        for start in range(0, len(body), CHUNK):
            time.sleep(self.pause)
            self.wfile.write(body[start : start + CHUNK])
            asked.sent += len(body[start : start + CHUNK])
        if drop:
            dropped = Dropped()
            dropped.hard = drop.hard
            raise dropped

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
