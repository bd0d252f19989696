"""The admin socket: status, metrics and what an operator may do, over HTTP/1.1 on a Unix socket of this user (0600).

    GET /status    JSON          POST /pin    {"service": "wrist", "engine": "wrist-accel"}
    GET /metrics   Prometheus    POST /unpin  {"service": "wrist"}
                                 POST /rollback
                                 POST /generation: a new worker; answers {"generation": its number}

Small on purpose: one request per connection, bounded sizes and times. What the answers say is `Desk`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any, Protocol

from agent.contract.errors import EdgewardenError, InvalidRequest

MAX_HEAD_BYTES = 8 * 1024
MAX_BODY_BYTES = 64 * 1024
MAX_CONNECTIONS = 16
TIMEOUT_S = 10.0
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}


class Desk(Protocol):
    """Who answers. All but the first two raise EdgewardenError when what is asked for cannot be."""

    def status(self) -> dict[str, Any]: ...

    def metrics(self) -> str: ...

    def pin(self, service: str, engine: str) -> dict[str, Any]: ...

    def unpin(self, service: str) -> dict[str, Any]: ...

    def roll_back(self) -> dict[str, Any]: ...

    def renew(self) -> dict[str, Any]: ...


class Admin:
    """Serves one listening socket."""

    def __init__(self, listener: socket.socket, desk: Desk) -> None:
        self._listener = listener
        self._desk = desk
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, sock=self._listener, limit=MAX_HEAD_BYTES)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                async with asyncio.timeout(TIMEOUT_S):
                    writer.write(await self._answer(reader))
                    await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # the asker went away or is too slow: its loss
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            method, target, body = await _read_request(reader)
            return self._dispatch(method, target, body)
        except EdgewardenError as error:
            return _json(413 if "too large" in str(error) else 400, {"error": error.sentence(), "code": error.code})

    def _dispatch(self, method: str, target: str, body: bytes) -> bytes:
        match method, target:
            case "GET", "/status":
                return _json(200, self._desk.status())
            case "GET", "/metrics":
                return _response(200, "text/plain; version=0.0.4; charset=utf-8", self._desk.metrics().encode())
            case "POST", "/pin":
                document = _document(body, ("service", "engine"))
                return _json(200, self._desk.pin(document["service"], document["engine"]))
            case "POST", "/unpin":
                return _json(200, self._desk.unpin(_document(body, ("service",))["service"]))
            case "POST", "/rollback":
                return _json(200, self._desk.roll_back())
            case "POST", "/generation":
                return _json(200, self._desk.renew())
            case _, "/status" | "/metrics" | "/pin" | "/unpin" | "/rollback" | "/generation":
                return _json(405, {"error": f"{method} is not for {target}"})
            case _:
                known = "/status, /metrics, /pin, /unpin, /rollback, /generation"
                return _json(404, {"error": f"there is no {target[:60]}; try {known}"})


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """(method, target, body). Raises: InvalidRequest."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise InvalidRequest("the request's head is too large") from None
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise InvalidRequest("this is not an HTTP/1.1 request")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = headers.get("content-length", "0")
    if not length.isdigit():
        raise InvalidRequest("Content-Length must be a number")
    if int(length) > MAX_BODY_BYTES:
        raise InvalidRequest(f"the body is too large: at most {MAX_BODY_BYTES} bytes")
    return parts[0], parts[1], await reader.readexactly(int(length))


def _document(body: bytes, names: tuple[str, ...]) -> dict[str, str]:
    try:
        document = json.loads(body)
    except (ValueError, UnicodeDecodeError):
        raise InvalidRequest("the body is not JSON") from None
    if not isinstance(document, dict) or not all(isinstance(document.get(name), str) for name in names):
        raise InvalidRequest(f"the body must be an object with the text fields {', '.join(names)}")
    return document


def _json(status: int, document: dict[str, Any]) -> bytes:
    return _response(status, "application/json", json.dumps(document, allow_nan=False).encode())


def _response(status: int, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
