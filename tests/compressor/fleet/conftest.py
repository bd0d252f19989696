from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from agent import clock
from scripts.story.broker import OPERATOR, Broker

FLEET = "demo"
DEVICES = ("w1", "w2", "w3")
NOW = 1_764_000_000.0


def wait_until(true: Callable[[], Any], *, timeout_s: float = 10.0) -> Any:
    """What `true()` returned once it was something; polls, because several threads are involved."""
    deadline = clock.monotonic_s() + timeout_s
    while not (found := true()):
        assert clock.monotonic_s() < deadline, "waited in vain"
        clock.sleep(0.01)
    return found


@dataclass
class Device:
    """A device as the broker sees it: publishes what a test wants and keeps what it hears."""

    port: int
    id: str
    password: str
    user: str = ""
    heard: queue.Queue[tuple[str, bytes]] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=f"test-{self.id}", protocol=MQTTv5)
        self.client.username_pw_set(self.user or self.id, self.password)
        self.client.on_connect = lambda *_: self.client.subscribe(f"{self.base}/#", qos=1)
        self.client.on_message = lambda _c, _d, message: self.heard.put((message.topic, message.payload))
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()

    @property
    def base(self) -> str:
        return f"ew/1/{FLEET}/{self.id}"

    def send(self, tail: str, document: Any, *, retain: bool = False) -> None:
        """Publish and wait until the broker has it."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.client.publish(f"{self.base}/{tail}", body, qos=1, retain=retain).wait_for_publish(5)

    def event(self, seq: int, kind: str = "drift", *, boot: str = "b1", **fields: Any) -> None:
        document = {
            "device": self.id, "boot": boot, "seq": seq, "at": NOW, "severity": "warning", "kind": kind,
            "service": "wrist", "text": f"{kind} {seq}",
        }  # fmt: skip
        self.send(f"ev/warning/{kind}", document | fields)

    def next(self, tail: str, *, timeout_s: float = 10.0) -> bytes:
        """The next payload on a topic of this device; others are skipped."""
        while True:
            topic, payload = self.heard.get(timeout=timeout_s)
            if topic == f"{self.base}/{tail}":
                return payload

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("broker"), FLEET, DEVICES)
    broker.prepare()
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def device(broker: Broker) -> Iterator[Callable[[str], Device]]:
    made = []

    def make(name: str) -> Device:
        made.append(Device(broker.port, name, broker.users[name]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "host"


__all__ = ["DEVICES", "FLEET", "NOW", "OPERATOR", "Device", "wait_until"]
