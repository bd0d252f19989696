"""Says what happened in the contract's words: presence, birth, reported, telemetry and events.

Queued messages get their sequence number from the outbox; retained documents go to the link. Without a link
nothing is queued: there is nobody to tell. What is worth saying is decided elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from agent import VERSION
from agent.clock import wall_s
from agent.contract.messages import FORMAT, MAX_MESSAGE_BYTES, Birth, Event, Reported, Status, Telemetry
from agent.contract.topics import Topics
from agent.decisions.events import Publish
from agent.link import Link
from agent.outbox import Outbox, Priority
from agent.sensors.device import DeviceInfo

CAPABILITIES = ("serve", "drift", "fallback", "guard", "power", "outbox")  # of every agent
MAX_TEXT = 500
MAX_PARTS = 64  # drift windows or sketches in one telemetry message: a host takes no more
HEAD_BYTES = 1024  # what stands around the fields of a telemetry message, generously


class Reporter:
    """The device's voice. Owned by the event loop."""

    def __init__(self, topics: Topics, outbox: Outbox, link: Link | None) -> None:
        self._topics = topics
        self._outbox = outbox
        self._link = link
        self._status: Status | None = None
        self._counts = dict.fromkeys(("events", "telemetry", "parts_left_out"), 0)

    def presence(self, state: Literal["online", "offline"], reason: str) -> None:
        self._status = Status(
            device=self._topics.device, boot=self._outbox.boot, state=state, reason=reason, at=wall_s()
        )
        self._announce(self._topics.status, self._status.encode())

    def presence_again(self) -> None:
        """Say it once more: somebody new listens."""
        if self._status is not None:
            self._status = self._status.model_copy(update={"at": wall_s()})
            self._announce(self._topics.status, self._status.encode())

    def gaps(self, kept_from: Mapping[str, int]) -> None:
        """The host waits for messages that will never come: say with the presence, per boot, what still may."""
        if kept_from and self._status is not None and kept_from != self._status.kept_from:
            self._status = self._status.model_copy(update={"kept_from": dict(kept_from)})
            self._announce(self._topics.status, self._status.encode())

    def birth(
        self, info: DeviceInfo, *, runtime: str, artifacts: Mapping[str, str], capabilities: Iterable[str] = ()
    ) -> None:
        """What this device is and carries; `artifacts`: engine -> manifest digest; `capabilities`: further ones."""
        document = Birth(
            device=self._topics.device,
            boot=self._outbox.boot,
            at=wall_s(),
            agent=VERSION,
            runtime=runtime,
            machine=info.machine,
            system=info.system,
            cpu_flags=list(info.cpu_flags),
            memory_bytes=info.memory_bytes,
            capabilities=[*CAPABILITIES, *capabilities],
            artifacts=dict(artifacts),
        )
        self._announce(self._topics.birth, document.encode())

    def reported(self, services: Mapping[str, Mapping[str, Any]], update: Mapping[str, Any] | None = None) -> None:
        """What runs now; `update`: how far the last desired document got, as in `messages.Reported`."""
        head = {"device": self._topics.device, "boot": self._outbox.boot, "at": wall_s()}
        document = Reported.model_validate({**head, "services": _finite(services), **(update or {})})
        self._announce(self._topics.reported, document.encode())

    def answer(self, op: str, fields: Mapping[str, Any], correlation: bytes) -> None:
        """Answer a command."""
        if self._link is not None:
            document = {"v": FORMAT, "device": self._topics.device, "op": op, "at": wall_s(), **_finite(fields)}
            body = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
            self._link.answer(self._topics.response(op), body, correlation)

    def event(self, said: Publish, *, decision_time_s: float) -> None:
        """Queue one event; all but plain information is an alarm in the outbox's eyes."""
        priority = Priority.TELEMETRY if said.severity == "info" else Priority.ALARM
        details = _finite({**said.details, "decision_time_s": decision_time_s})
        at = wall_s()

        def build(seq: int) -> bytes:
            return Event(
                device=self._topics.device,
                boot=self._outbox.boot,
                seq=seq,
                at=at,
                severity=said.severity,  # type: ignore[arg-type]  # checked by the model
                kind=said.kind,
                service=said.service,
                text=said.text[:MAX_TEXT],
                channels=list(said.channels),
                numbers=_finite(said.numbers),
                details=details,
            ).encode()

        self._queue(priority, self._topics.event(said.severity, said.kind), build, at)
        self._counts["events"] += 1

    def telemetry(self, *, from_s: float, to_s: float, fields: Mapping[str, Any]) -> None:
        """Queue one window; `fields` as in `messages.Telemetry`. What a message cannot hold becomes several, the last
        with the counters and gauges; a part too large for any is left out and counted.
        """
        messages, left_out = _messages(_finite(fields))
        self._counts["parts_left_out"] += left_out
        for part in messages:
            self._telemetry({**part, "from_s": from_s, "to_s": to_s}, at=to_s)

    def statistics(self) -> dict[str, int]:
        return dict(self._counts)

    # --- inside ---------------------------------------------------------------------------------------------
    def _telemetry(self, fields: Mapping[str, Any], *, at: float) -> None:
        def build(seq: int) -> bytes:
            message = {"device": self._topics.device, "boot": self._outbox.boot, "seq": seq, "at": at}
            return Telemetry.model_validate({"counters": {}, **message, **fields}).encode()

        self._queue(Priority.TELEMETRY, self._topics.telemetry, build, at)
        self._counts["telemetry"] += 1

    def _announce(self, topic: str, body: bytes) -> None:
        if self._link is not None:
            self._link.announce(topic, body)

    def _queue(self, priority: Priority, topic: str, build: Any, at: float) -> None:
        if self._link is not None:
            self._outbox.put(priority, topic, build, at=at)
            self._link.pump()


def add_up(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Windows of all services (name, `Monitor.take_window()`) as the lists and counters of one telemetry message."""
    counters: dict[str, int] = {}
    latency: list[Any] = []
    drift: list[Any] = []
    for service, part in parts:
        counters |= {f"{service}.{name}": count for name, count in part["counters"].items()}
        latency += part["latency"]
        drift += part["drift"]
    return {"counters": counters, "latency": latency, "drift": drift}


def _messages(fields: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Fields of as few telemetry messages as hold all windows and sketches; and how many are too large for any."""
    lists = {name: fields[name] for name in ("drift", "latency") if fields.get(name)}
    head = {name: value for name, value in fields.items() if name not in lists}
    room = MAX_MESSAGE_BYTES - HEAD_BYTES - _size(head)
    filled: list[dict[str, Any]] = []
    current: dict[str, list[Any]] = {}
    left, left_out = room, 0
    for name, part in ((name, part) for name, parts in lists.items() for part in parts):
        size = _size(part)
        if size > room:
            left_out += 1
            continue
        if size > left or len(current.get(name, ())) >= MAX_PARTS:
            filled.append(current)
            current, left = {}, room
        current.setdefault(name, []).append(part)
        left -= size
    return [*filled, {**head, **current}], left_out


def _size(document: Any) -> int:
    """Bytes of JSON with a comma."""
    return len(json.dumps(document)) + 1


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: unknown numbers are left out of tables."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items() if not _is_unknown(inner)}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _is_unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
