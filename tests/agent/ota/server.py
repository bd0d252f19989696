"""A real HTTP server over a folder that can be told to misbehave, and remembers what it was asked and sent."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path


@dataclass
class Fault:
    """What happens to paths that contain `on`; `times` counts down, -1 = for ever."""

    on: str = ""
    times: int = -1
    status: int = 0  # answer this instead
    cut_after: int | None = None  # close after so many body bytes of this answer
    extra: bytes = b""  # sent after the file, in the announced length too
    announce: int | None = None  # lie about Content-Length
    ignore_range: bool = False
    endless: bool = False
    body: bytes | None = None  # other bytes than the file's
    silent: bool = False  # no answer at all until the client goes


@dataclass
class Asked:
    path: str
    start: int
    status: int
    sent: int = 0


@dataclass
class Server:
    folder: Path
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def fault_for(self, path: str) -> Fault:
        for fault in self.faults:
            if fault.on in path and fault.times != 0:
                fault.times -= 1
                return fault
        return Fault()

    def sent(self, part: str = "") -> int:
        """Body bytes sent for paths with `part`."""
        return sum(asked.sent for asked in self.asked if part in asked.path)


class _Pool(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    server: Server

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: _Pool

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Silence."""

    def do_GET(self) -> None:
        world = self.server.server
        fault = world.fault_for(self.path)
        if fault.silent:
            self.connection.settimeout(20)
            with contextlib.suppress(OSError):
                self.connection.recv(1)
            return
        file = world.folder / self.path.lstrip("/")
        body = fault.body if fault.body is not None else file.read_bytes() if file.is_file() else None
        status = fault.status or (404 if body is None else 200)
        start = 0
        if status == 200 and "Range" in self.headers and not fault.ignore_range:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(body or b"") else 416
        asked = Asked(self.path, start, status)
        world.asked.append(asked)
        self._answer(fault, asked, (body or b"") if status in {200, 206} else b"nothing here")

    def _answer(self, fault: Fault, asked: Asked, body: bytes) -> None:
        total = len(body) + len(fault.extra)
        self.send_response(asked.status)
        if asked.status == 206:
            self.send_header("Content-Range", f"bytes {asked.start}-{total - 1}/{fault.announce or total}")
        if not fault.endless:
            self.send_header("Content-Length", str(fault.announce or total - asked.start))
        self.end_headers()
        data = (body + fault.extra)[asked.start :]
        if fault.cut_after is not None:
            data = data[: fault.cut_after]
        asked.sent += len(data)
        self.wfile.write(data)
        while fault.endless:
            self.wfile.write(b"x" * 65536)
            asked.sent += 65536


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder on a free port."""
    with _Pool(("127.0.0.1", 0), _Handler) as pool:
        pool.server = Server(folder, f"http://127.0.0.1:{pool.server_address[1]}")
        thread = threading.Thread(target=pool.serve_forever, kwargs={"poll_interval": 0.02}, name="test-server")
        thread.start()
        try:
            yield pool.server
        finally:
            pool.shutdown()
            thread.join()
