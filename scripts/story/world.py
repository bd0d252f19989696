"""The real things the story is told with: a broker, an agent with its worker, an independent subscriber."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import clock
from scripts.story.acts import Acts
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber

FLEET = "demo"
DEVICE = "wrist-1"
SERVICE = "wrist"
PROMISED_LOOP_S = 300.0  # from the first report of new wearers to their update committed
SHAKY = "wrist-shaky"  # a second service whose first engine is the faulty test artifact


class StoryError(RuntimeError):
    """Something the story relies on did not happen; the message says what and where to look."""


def wait_until(true: Callable[[], bool], what: str, *, timeout_s: float = 120.0) -> float:
    """Seconds until `true()` held. Raises: StoryError after `timeout_s`."""
    started = clock.monotonic_s()
    while not true():
        if clock.monotonic_s() - started > timeout_s:
            raise StoryError(f"waited {timeout_s:.0f} s in vain for this: {what}")
        clock.sleep(0.02)
    return clock.monotonic_s() - started


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self.path))


def _get(path: Path, target: str) -> tuple[int, bytes]:
    connection = _UnixConnection(path)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def admin_status(path: Path) -> dict[str, Any]:
    """What `edgewarden-agent status --json` shows of the agent behind an admin socket."""
    code, body = _get(path, "/status")
    if code != 200:
        raise StoryError(f"the admin socket answered {code}: {body[:200]!r}")
    document: dict[str, Any] = json.loads(body)
    return document


@dataclass
class World:
    """Everything that runs; `close` ends it all by process id, whatever happened."""

    folder: Path  # what stays for reading: configuration, logs
    artifacts: Path  # holds wrist/, its fallbacks, and wrist-floor/
    faulty: Path
    wearers: tuple[str, ...] = ()  # further devices of the fleet
    short: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ew-")))  # socket paths must be short
    agent: subprocess.Popen[bytes] | None = None
    acts: Acts = field(default_factory=Acts)  # what a person would have typed

    def __post_init__(self) -> None:
        self.broker = Broker(self.short / "broker", FLEET, (DEVICE, *self.wearers), hosts=("host",))
        self.serve_socket = self.short / "serve.sock"
        self.admin_socket = self.short / "admin.sock"
        self.config = self.folder / "agent.toml"

    def start(self) -> None:
        """Broker, subscriber, agent; returns when the first request would be answered."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.broker.prepare()
        self.broker.start()
        self.subscriber = Subscriber(self.broker.port, OPERATOR, self.broker.users[OPERATOR], FLEET, acts=self.acts)
        self.subscriber.start()
        state = self.folder / "state"
        if state.exists():
            shutil.rmtree(state)
        self.config.write_text(self._configuration(state))
        (self.folder / "device.toml").write_text(self._for_trying(state))
        with (self.folder / "agent.log").open("wb") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._ready, f"the agent serves (its log: {self.folder / 'agent.log'})")

    def _for_trying(self, state: Path) -> str:
        """The same device without a broker, its sockets beside the file: for a person to run after the story."""
        return f"""# Written by scripts/quickstart, to try the agent by hand.
[device]
id = "{DEVICE}"
fleet = "{FLEET}"

[state]
folder = "{state.name}-tried"

[serving]
unix = "serve.sock"

[[service]]
name = "{SERVICE}"
artifact = "{self.artifacts / "wrist"}"
fallbacks = [{self._fallbacks()}]
floor = "{self.artifacts / "wrist-floor"}"
"""

    def _fallbacks(self) -> str:
        return ", ".join(f'"{self.artifacts / f"wrist-{name}"}"' for name in ("accel", "gyro", "norm"))

    def _configuration(self, state: Path) -> str:
        chain = self._fallbacks()
        return f"""# Written by scripts/quickstart. `edgewarden-agent check-config --config FILE` explains every key.
[device]
id = "{DEVICE}"
fleet = "{FLEET}"

[state]
folder = "{state}"

[clock]
source = "data"    # dwell and probation follow the timestamps of the recordings, not this machine's clock

[serving]
unix = "{self.serve_socket}"

[[service]]
name = "{SERVICE}"
artifact = "{self.artifacts / "wrist"}"
fallbacks = [{chain}]
floor = "{self.artifacts / "wrist-floor"}"

[[service]]
name = "{SHAKY}"
artifact = "{self.faulty}"
fallbacks = ["{self.artifacts / "wrist"}"]
floor = "{self.artifacts / "wrist-floor"}"

[fallback]
dwell_s = 120
probation_s = 60

[telemetry]
interval_s = 2

[admin]
socket = "{self.admin_socket}"

[link]
enabled = true
host = "127.0.0.1"
port = {self.broker.port}
username = "{DEVICE}"
password_file = "{self.broker.password_file(DEVICE)}"
"""

    def _ready(self) -> bool:
        if self.agent is not None and self.agent.poll() is not None:
            tail = (self.folder / "agent.log").read_text()[-600:]
            raise StoryError(f"the agent ended with exit code {self.agent.returncode}: {tail}")
        try:
            return _get(self.serve_socket, "/v2/health/ready")[0] == 200
        except OSError:
            return False

    def status(self) -> dict[str, Any]:
        return admin_status(self.admin_socket)

    def close(self) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGTERM)
            try:
                self.agent.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.agent.kill()
                self.agent.wait()
        self.agent = None
        if hasattr(self, "subscriber"):
            self.subscriber.stop()
        self.broker.stop()
        shutil.rmtree(self.short, ignore_errors=True)


def machine_load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())
