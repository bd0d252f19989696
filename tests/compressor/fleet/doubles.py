"""Doubles the fleet's tests share: a device on a real broker, and stand-ins for pipeline, publisher and director."""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from agent import clock
from agent.contract.artifact import Blob, Channel, Input, Manifest, Output, Runtime, View, sha256
from agent.contract.errors import LinkError
from agent.contract.repository import manifest_path, stored_path
from compressor.fleet.means import Built, Failed
from scripts.story.subscriber import leave

FLEET = "demo"
DEVICES = ("w1", "w2", "w3")
NOW = 1_764_000_000.0
CHANNELS = ("ax", "ay", "az", "gx", "gy", "gz")
REFERENCE = {1: b"reference of version 1", 2: b"reference of version 2"}


def wait_until(true: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
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
    heard: queue.Queue[tuple[str, bytes]] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=f"test-{self.id}", protocol=MQTTv5)
        self.client.username_pw_set(self.id, self.password)
        self.client.on_connect = lambda *_: self.client.subscribe(f"{self.base}/#", qos=1)
        self.client.on_message = lambda _c, _d, message: self.heard.put((message.topic, message.payload))
        listening = threading.Event()
        self.client.on_subscribe = lambda *_: listening.set()
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()
        assert listening.wait(60)

    @property
    def base(self) -> str:
        return f"ew/1/{FLEET}/{self.id}"

    def send(self, tail: str, document: Any, *, retain: bool = False) -> None:
        """Publish and wait until the broker has it."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        sent = self.client.publish(f"{self.base}/{tail}", body, qos=1, retain=retain)
        sent.wait_for_publish(60)
        assert sent.is_published()

    def event(self, seq: int, kind: str = "drift", *, boot: str = "b1", **fields: Any) -> None:
        document = {
            "device": self.id, "boot": boot, "seq": seq, "at": NOW, "severity": "warning", "kind": kind,
            "service": "wrist", "text": f"{kind} {seq}",
        }  # fmt: skip
        self.send(f"ev/warning/{kind}", document | fields)

    def report(self, version: int, state: str, code: str = "") -> None:
        document = {
            "device": self.id, "boot": "b1", "at": NOW, "desired_version": version, "update_state": state,
            "code": code, "services": {"wrist": {"active": "wrist", "preferred": "wrist", "reason": "active",
                                                 "health": "healthy"}},
        }  # fmt: skip
        self.send("reported", document, retain=True)

    def next(self, tail: str, *, timeout_s: float = 60.0) -> bytes:
        """The next payload on a topic of this device; others are skipped."""
        while True:
            topic, payload = self.heard.get(timeout=timeout_s)
            if topic == f"{self.base}/{tail}":
                return payload

    def close(self) -> None:
        leave(self.client)


def drift_window(*, rows: int = 128, shift: float = 1.5, reference: bytes = REFERENCE[1]) -> dict[str, Any]:
    """A drift window of a contract telemetry message whose first feature moved."""
    step = round(shift * 1024)
    return {
        "service": "wrist", "view": "channels", "reference": sha256(reference), "first": 1, "last": rows,
        "rows": rows, "clip": 4.0, "fraction_bits": 10, "sums": [rows * step, 0],
        "squares": [rows * step * step, rows * 100], "classes": [], "counters": {},
    }  # fmt: skip


def telemetry(device: str, seq: int, *windows: dict[str, Any], boot: str = "b1") -> dict[str, Any]:
    return {
        "device": device, "boot": boot, "seq": seq, "at": NOW, "from_s": NOW - 2, "to_s": NOW, "counters": {},
        "drift": list(windows), "health": {"wrist": "healthy"},
    }  # fmt: skip


def recording(rows: int = 12, *, seed: int = 0, **changes: Any) -> bytes:
    """An .npz as a device uploads it."""
    rng = np.random.default_rng(seed)
    arrays = {
        "windows": rng.normal(size=(rows, 128, 6)).astype(np.float32),
        "labels": (np.arange(rows) % 7).astype(np.int8),
        "recordings": (np.arange(rows) // 6).astype(np.int8),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **(arrays | changes))
    return buffer.getvalue()


def manifest(version: int, name: str = "wrist", parent: str | None = None) -> Manifest:
    channels = [Channel(name=c, unit="g", group="accel", minimum=-16, maximum=16) for c in CHANNELS]
    reference = REFERENCE.get(version, b"reference")
    return Manifest(
        name=name, version=version, service="wrist", task="t", parent=parent,
        inputs=[Input(name="window", datatype="FP32", shape=[-1, 128, 6], channels=channels)],
        outputs=[Output(name="probability", datatype="FP32", shape=[-1, 7])], labels=list("ABCDEFG"),
        fallbacks=["wrist-accel"] if name == "wrist" else [],
        views=[View(name="channels", kind="channels", features=["ax.mean", "ax.log_sd"])],
        runtime=Runtime(opset=20, minimum="1.20", precision="float32"),
        blobs={
            "model": Blob(file="model.onnx", size=5, sha256=sha256(b"model")),
            "reference": Blob(file="reference.npz", size=len(reference), sha256=sha256(reference)),
        },
    )  # fmt: skip


def artifact_folder(folder: Path, version: int, name: str = "wrist", parent: str | None = None) -> Path:
    """A small artifact that `open_artifact` accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(manifest(version, name, parent).encode())
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "reference.npz").write_bytes(REFERENCE.get(version, b"reference"))
    return folder


class FakeTrainer:
    """Builds nothing, at once or when told; remembers what it was given."""

    def __init__(self) -> None:
        self.started: list[tuple[Path, list[str], int]] = []
        self.outcome: Built | Failed | None = None
        self.waits = False
        self.stopped = 0

    def start(self, folder: Path, recordings: Path, *, version: int, parents: Mapping[str, str]) -> None:
        self.started.append((folder, sorted(path.name for path in recordings.iterdir()), version))
        names = ("wrist", "wrist-accel")
        out = folder / "out" / "gateway"
        self.outcome = Built(tuple(artifact_folder(out / n, version, n, parents.get(n)) for n in names))

    def poll(self) -> Built | Failed | None:
        if self.waits:
            return None
        outcome, self.outcome = self.outcome, None
        return outcome

    def stop(self) -> None:
        self.stopped += 1


@dataclass
class FakePublisher:
    """Lays manifests where the catalogue looks for them; signs nothing."""

    repository: Path
    failure: Exception | None = None
    calls: int = 0
    missing: list[str] = field(default_factory=list)
    refreshed: int = 0

    def publish(self, folders: Sequence[Path]) -> list[str]:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return [self._put((folder / "manifest.json").read_bytes()) for folder in folders]

    def unapproved(self, family: str, digests: Sequence[str], devices: Sequence[str]) -> list[str]:
        assert family == "wrist"
        assert set(devices) <= set(DEVICES)
        return [digest for digest in digests if digest in self.missing or "all" in self.missing]

    def refresh_online(self) -> bool:
        self.refreshed += 1
        return False

    def _put(self, raw: bytes) -> str:
        digest = sha256(raw)
        path = self.repository / "targets" / stored_path(manifest_path("wrist", digest), digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return digest


@dataclass
class FakeDirector:
    """Signs nothing, but keeps the documents' form and names its key."""

    key: str = "first"
    failure: Exception | None = None

    def key_id(self) -> str:
        if self.failure is not None:
            raise self.failure
        return self.key

    def desired(self, **fields: Any) -> bytes:
        return json.dumps({"signed": fields, "signatures": [{"keyid": self.key_id(), "sig": ""}]}).encode()

    command = desired

    def renewed(self, envelope: Mapping[str, Any]) -> bytes:
        return self.desired(**envelope["signed"])


@dataclass
class FakeWire:
    """Remembers what would have gone to the broker."""

    retained: dict[str, bytes] = field(default_factory=dict)
    commands: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    away: bool = False
    on_command: Callable[[dict[str, Any]], None] = field(default=lambda _command: None)

    def retain(self, topic: str, body: bytes) -> None:
        self.retained[topic] = body

    def command(self, topic: str, body: bytes, *, answer_to: str, expiry_s: float) -> None:
        if self.away:
            raise LinkError("no broker at the moment")
        assert answer_to.split("/")[-2] == "res"
        assert expiry_s > 0
        self.commands.append((topic, json.loads(body)["signed"]))
        self.on_command(self.commands[-1][1])
