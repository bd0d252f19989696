import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.admin import MAX_HEAD_BYTES, Admin
from agent.contract.errors import UnknownModel
from agent.sockets import listen_unix


class Desk:
    def __init__(self) -> None:
        self.pins: dict[str, str] = {}

    def status(self) -> dict[str, Any]:
        return {"pins": self.pins}

    def metrics(self) -> str:
        return "up 1\n"

    def pin(self, service: str, engine: str) -> dict[str, Any]:
        if service != "wrist":
            raise UnknownModel(f"there is no service '{service}'", hint="There is: wrist.")
        self.pins[service] = engine
        return {"pinned": engine}

    def unpin(self, service: str) -> dict[str, Any]:
        self.pins.pop(service, None)
        return {"pinned": None}

    def renew(self) -> dict[str, Any]:
        return {"generation": 7}


def ask(folder: Path, *requests: bytes) -> list[tuple[int, str]]:
    """Status and body of each answer, each asked on a connection of its own."""

    async def conversation() -> list[tuple[int, str]]:
        listener = listen_unix(folder / "admin.sock", mode=0o600)
        assert stat.S_IMODE((folder / "admin.sock").stat().st_mode) == 0o600
        admin = Admin(listener, Desk())
        await admin.start()
        answers = []
        for request in requests:
            reader, writer = await asyncio.open_unix_connection(folder / "admin.sock")
            writer.write(request)
            if request.endswith(b"cut"):
                writer.write_eof()
            raw = (await asyncio.wait_for(reader.read(), 60)).decode()
            writer.close()
            head, _, body = raw.partition("\r\n\r\n")
            answers.append((int(head.split()[1]) if head else 0, body))
        await admin.stop()
        return answers

    return asyncio.run(conversation())


def post(target: str, document: object) -> bytes:
    body = json.dumps(document).encode()
    return f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_status_and_metrics_are_read_and_pins_set(tmp_path: Path) -> None:
    pin, status, unpin, after, metrics = ask(
        tmp_path,
        post("/pin", {"service": "wrist", "engine": "a"}),
        get("/status"),
        post("/unpin", {"service": "wrist"}),
        get("/status"),
        get("/metrics"),
    )
    [renewed] = ask(tmp_path / "again", post("/generation", {}))
    assert (renewed[0], json.loads(renewed[1])) == (200, {"generation": 7})
    assert (pin[0], json.loads(pin[1])) == (200, {"pinned": "a"})
    assert json.loads(status[1]) == {"pins": {"wrist": "a"}}
    assert unpin[0] == 200
    assert json.loads(after[1]) == {"pins": {}}
    assert metrics == (200, "up 1\n")


@pytest.mark.parametrize(
    ("request_bytes", "status", "says"),
    [
        (get("/nothing"), 404, "try /status"),
        (get("/pin"), 405, "not for /pin"),
        (get("/generation"), 405, "not for /generation"),
        (post("/pin", {"service": "x", "engine": "a"}), 400, "no service 'x'. There is: wrist."),
        (post("/pin", {"service": "wrist"}), 400, "engine"),
        (post("/pin", [1]), 400, "object"),
        (b"POST /pin HTTP/1.1\r\nContent-Length: 3\r\n\r\n{{{", 400, "not JSON"),
        (b"POST /pin HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413, "too large"),
        (b"POST /pin HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "number"),
        (b"hello\r\n\r\n", 400, "not an HTTP"),
        (b"GET /" + b"x" * 2 * MAX_HEAD_BYTES, 413, "too large"),
        (b"GET /status HT cut", 0, ""),
    ],
)
def test_bad_requests_are_answered_in_words(tmp_path: Path, request_bytes: bytes, status: int, says: str) -> None:
    ((answered, body),) = ask(tmp_path, request_bytes)
    assert answered == status
    assert says in body
