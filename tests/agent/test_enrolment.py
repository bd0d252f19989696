import asyncio
import json
import os
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent.chores import Chores
from agent.config import AgentConfig
from agent.contract.errors import ConfigError, StateUnreadable, Unavailable, Untrusted
from agent.contract.signed import public_bytes
from agent.enrolment import ENROLMENT, KEY, Enrolment, device_key, enrol

YES = {"fleet": "f", "device": "d", "repository": "http://h/repository"}


class Host(BaseHTTPRequestHandler):
    got: ClassVar[dict[str, Any]] = {}
    answers: ClassVar[list[tuple[int, Any]]] = [(200, YES)]

    def do_POST(self) -> None:
        type(self).got = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    Host.answers = [(200, YES)]
    with HTTPServer(("127.0.0.1", 0), Host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/enrol"
        server.shutdown()
        thread.join()


def configure(folder: Path, url: str) -> AgentConfig:
    (folder / "token").write_text("one-time-token-of-32-characters\n")
    return AgentConfig.model_validate({
        "device": {"id": "d"}, "state": {"folder": str(folder)},
        "enrolment": {"url": url, "token_file": str(folder / "token")},
    })  # fmt: skip


def test_a_device_has_one_key_that_nobody_else_can_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = public_bytes(device_key(tmp_path))
    finally:
        os.umask(before)
    assert public_bytes(device_key(tmp_path)) == first
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600
    (tmp_path / KEY).write_text("damaged")
    with pytest.raises(StateUnreadable, match="holds no key"):
        device_key(tmp_path)


def test_enrolling_says_who_we_are_and_brings_the_repository(tmp_path: Path, url: str) -> None:
    accepted = enrol(configure(tmp_path, url))
    assert (accepted.fleet, accepted.repository) == ("f", "http://h/repository")
    assert Host.got == {
        "token": "one-time-token-of-32-characters", "device": "d",
        "public_key": public_bytes(device_key(tmp_path)).hex(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((403, {"error": "used"}), Untrusted),
        ((503, {"error": "busy"}), Unavailable),
        ((200, {**YES, "device": "another"}), Unavailable),
        ((200, {**YES, "repository": "file:///etc"}), Unavailable),
        ((200, ["not", "an", "object"]), Unavailable),
    ],
)
def test_anything_but_a_yes_is_an_error(
    tmp_path: Path, url: str, answer: tuple[int, Any], kind: type[Exception]
) -> None:
    Host.answers = [answer]
    with pytest.raises(kind):
        enrol(configure(tmp_path, url))


def test_a_token_that_cannot_be_read_is_a_configuration_error(tmp_path: Path, url: str) -> None:
    config = configure(tmp_path, url)
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match=r"enrolment\.token_file"):
        enrol(config)


class Memory(dict[str, Any]):
    def value(self, name: str) -> Any:
        return self.get(name)

    def put_value(self, name: str, value: Any, *, durable: bool = False) -> None:
        assert durable
        self[name] = value


def test_it_asks_until_it_is_enrolled_and_then_never_again(tmp_path: Path, url: str) -> None:
    Host.answers = [(503, {}), (503, {}), (200, YES)]
    memory, said = Memory(), []

    async def story() -> Enrolment:
        chores = Chores("ew-test", on_fault=lambda _: None)
        enrolment = Enrolment(
            configure(tmp_path, url), memory, chores, lambda event, *, done: said.append((event.severity, done))
        )
        enrolment.begin()
        async with asyncio.timeout(60):
            while enrolment.status()["state"] != "enrolled":
                enrolment._not_before_s = 0.0  # no test waits for pauses
                enrolment.tick()
                await asyncio.sleep(0.01)
        again = Enrolment(configure(tmp_path, url), memory, chores, lambda *_: None)
        again.begin()
        return again

    again = asyncio.run(story())
    assert said == [("warning", False), ("notice", True)]  # the same trouble is told once
    assert memory[ENROLMENT]["repository"] == "http://h/repository"
    assert again.status()["state"] == "enrolled"
    assert again.repository == "http://h/repository"


def test_without_an_address_nothing_is_asked(tmp_path: Path) -> None:
    config = AgentConfig.model_validate({"device": {"id": "d"}, "state": {"folder": str(tmp_path)}})
    enrolment = Enrolment(config, Memory(), Chores("ew-test", on_fault=lambda _: None), lambda *_: None)
    enrolment.begin()
    enrolment.tick()
    assert enrolment.status()["state"] == "off"
    assert not (tmp_path / KEY).exists()
