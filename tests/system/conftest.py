"""Real processes: an agent with its worker, a private mosquitto, and artifacts made once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from agent import clock
from agent.asking import ask
from agent.contract.errors import NotRunning
from scripts.story.broker import OPERATOR, Broker

FLEET, DEVICE = "test", "bench-1"
PATIENT = {"EDGEWARDEN_WORKER__MISSED_PINGS": "30"}  # a worker that gets no time on a busy machine is not hung
WAIT_S = 120.0  # only what never comes takes so long; a slow machine may need a good part of it


def wait_until(true: Callable[[], Any], what: str, *, within_s: float = WAIT_S) -> Any:
    """The first true answer. Fails the test when it does not come."""
    end_s = clock.monotonic_s() + within_s
    while not (answer := true()):
        assert clock.monotonic_s() < end_s, f"waited {within_s:.0f} s in vain for: {what}"
        clock.sleep(0.02)
    return answer


class Agent:
    """One agent process; its log is kept for the messages of failed tests."""

    def __init__(self, folder: Path, artifacts: dict[str, Path]) -> None:
        self.folder = folder
        self.artifacts = artifacts
        self.serve = folder / "serve.sock"
        self.admin = folder / "admin.sock"
        self.state = folder / "state"
        self.log = folder / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.write()

    @property
    def address(self) -> str:
        return f"unix:{self.serve}"

    def write(self, extra: str = "", *, active: str = "wrist", fallbacks: tuple[str, ...] = ("wrist-accel",)) -> Path:
        """Write agent.toml; `extra` is more TOML at its end."""
        chain = ", ".join(f'"{self.artifacts[name]}"' for name in fallbacks)
        text = f"""
[device]
id = "{DEVICE}"
fleet = "{FLEET}"
[state]
folder = "{self.state}"
[serving]
unix = "{self.serve}"
[admin]
socket = "{self.admin}"
[[service]]
name = "wrist"
artifact = "{self.artifacts[active]}"
fallbacks = [{chain}]
floor = "{self.artifacts["wrist-floor"]}"
deadline_ms = 20000.0
{extra}
"""
        self.config = self.folder / "agent.toml"
        self.config.write_text(text)
        return self.config

    def link_to(self, broker: Broker, *, interval_s: float = 0.5) -> str:
        """TOML of a link to the private broker."""
        return f"""
[telemetry]
interval_s = {interval_s}
[link]
enabled = true
host = "127.0.0.1"
port = {broker.port}
username = "{DEVICE}"
password_file = "{broker.password_file(DEVICE)}"
"""

    def spawn(self, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *options, "-m", "agent", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **PATIENT, **(environment or {})},
            )  # fmt: skip
        return self.process

    def start(self, *options: str) -> None:
        """Spawn, and wait until its worker serves."""
        self.spawn(*options)
        wait_until(self._serves, "the agent serves")

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return bool(self.status()["worker"]["phase"] == "serving")
        except NotRunning:
            return False

    def status(self) -> dict[str, Any]:
        return ask(self.admin, "/status")

    def service(self) -> dict[str, Any]:
        service: dict[str, Any] = self.status()["services"][0]
        return service

    def wait(self) -> int:
        """The exit code of a process that ends by itself."""
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def stop(self) -> int | None:
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One `edgewarden-agent` command with this agent's configuration."""
        return subprocess.run(
            [sys.executable, "-m", "agent", arguments[0], "--config", str(self.config), *arguments[1:]],
            capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip


@pytest.fixture
def short() -> Iterator[Path]:
    """A 0700 folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ew-") as folder:
        yield Path(folder)


@pytest.fixture
def agent(short: Path, artifacts: dict[str, Path]) -> Iterator[Agent]:
    agent = Agent(short, artifacts)
    yield agent
    with contextlib.suppress(subprocess.TimeoutExpired):
        agent.stop()


@pytest.fixture
def broker(short: Path) -> Iterator[Broker]:
    """A running mosquitto: loopback, passwords, one ACL line per device."""
    broker = Broker(short / "broker", FLEET, (DEVICE,))
    broker.prepare()
    broker.start()
    yield broker
    broker.stop()


class Load:
    """Clients that ask without pause until told to stop; counts what they saw."""

    def __init__(self, address: str, inputs: Any, *, clients: int = 3) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self.retries = 0
        self.longest_s = 0.0
        self._address, self._inputs = address, inputs
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, name=f"load-{number}") for number in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        from agent.client import Client
        from agent.contract.errors import EdgewardenError

        with Client(self._address, retry_once=True) as client:
            while not self._stop.is_set():
                started_s = clock.monotonic_s()
                try:
                    client.infer("wrist", {"window": self._inputs})
                    failure = ""
                except EdgewardenError as error:
                    failure = error.sentence()
                with self._lock:
                    self.answered += not failure
                    self.failed += [failure] if failure else []
                    self.longest_s = max(self.longest_s, clock.monotonic_s() - started_s)
            with self._lock:
                self.retries += client.retries


__all__ = ["DEVICE", "FLEET", "OPERATOR", "Agent", "Load", "wait_until"]
