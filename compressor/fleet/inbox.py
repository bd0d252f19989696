"""Turns what arrived at a topic into plain values, or refuses it with a stable code. Believes nothing.

Sizes, types, ranges and the sums' own arithmetic are checked here, once; behind this door everything is trusted
to be finite and bounded. What a device claims may still be a lie: that is for the planner's quorum.
Leaves to others: who may speak (`Roster`), storing, counting.

Codes of a refusal: topic, foreign_device, unknown_device, too_large, malformed, unsupported_version, out_of_bounds,
quota.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from agent.contract import messages
from agent.contract.errors import ContractError, UnsupportedVersion
from agent.contract.topics import IDENTIFIER, VERSION
from agent.sketch import LogSketch

MAX_COUNT = 1 << 53  # exact in JSON and in a database
MAX_ROWS = 10_000_000  # of one drift window
MAX_FEATURES = 512
MAX_CLASSES = 4096
MAX_NAMES = 256  # counters, gauges, numbers, channels of one message
MAX_NAME = 64
MAX_TEXT = 2000
MAX_DETAIL_BYTES = 16 * 1024
MAX_KEPT = 16  # boots that a device may speak of in its presence
MAX_PARTS = 64  # drift windows or sketches in one telemetry message
LATEST_S = 4.2e9  # wall times beyond the year 2100 are nonsense
ERRORS = (0.001, 0.2)  # relative errors of sketches that are accepted
_BOOT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}|")


@dataclass(frozen=True, slots=True)
class Key:
    device: str
    boot: str
    seq: int


@dataclass(frozen=True, slots=True)
class EventSeen:
    key: Key
    at: float
    severity: str
    about: str  # the event's kind: drift, sensor, fallback...
    service: str
    text: str
    channels: tuple[str, ...]
    numbers: dict[str, float]
    details: dict[str, Any]
    kind: str = "ev"


@dataclass(frozen=True, slots=True)
class TelemetrySeen:
    """`windows`, `sketches`: fields of the tables of these names. `vitals`: what the status page shows."""

    key: Key
    at: float
    windows: tuple[dict[str, Any], ...]
    sketches: tuple[dict[str, Any], ...]
    vitals: dict[str, Any]
    kind: str = "tm"


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """`kept_from`: boot -> no message below this number will come any more."""

    device: str
    boot: str
    state: str
    reason: str
    kept_from: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BirthSeen:
    device: str
    boot: str
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReportedSeen:
    device: str
    boot: str
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplySeen:
    """The answer to a command: `id` is what the command's body called itself."""

    device: str
    op: str
    id: str
    ok: bool
    code: str
    text: str


Seen = EventSeen | TelemetrySeen | StatusSeen | BirthSeen | ReportedSeen | ReplySeen


@dataclass(frozen=True, slots=True)
class Refused:
    """`key`: its place in the device's sequence, as far as it can be read: nobody shall wait for it."""

    device: str  # "" when the topic names none
    code: str
    text: str
    key: Key | None = None


@dataclass(slots=True)
class Roster:
    """Who may speak. `quota`: messages a device may send in a day of the host's clock; 0 = no limit."""

    fleet: str
    prefix: str
    known: Callable[[str], bool]
    quota: int = 0
    _day: int = -1
    _sent: dict[str, int] = field(default_factory=dict)

    def admits(self, device: str, now_s: float) -> bool:
        """Count one message of a known device; False when its day's quota is used up."""
        day = int(now_s // 86_400)
        if day != self._day:
            self._day, self._sent = day, {}
        self._sent[device] = self._sent.get(device, 0) + 1
        return not self.quota or self._sent[device] <= self.quota


QUEUED = ("tm", "ev")  # what a device counts and keeps until it is settled

M = TypeVar("M", messages.Status, messages.Birth, messages.Reported, messages.Telemetry, messages.Event)


class _OutOfBounds(ValueError):
    """A well-formed message says something impossible."""


def read(topic: str, payload: bytes, roster: Roster, *, now_s: float) -> Seen | Refused:
    """One message, checked."""
    head, device, tail = _split(topic, roster)
    if head != f"{roster.prefix}/{VERSION}/{roster.fleet}" or not IDENTIFIER.fullmatch(device):
        return Refused("", "topic", f"no topic of this fleet: {topic[:120]!r}")
    if not roster.known(device):
        return Refused("", "unknown_device", f"'{device}' is not enrolled")
    answer = _judged(device, tail, payload, roster, now_s)
    if isinstance(answer, Refused) and tail.partition("/")[0] in QUEUED:
        return replace(answer, key=_place(device, payload))
    return answer


def _judged(device: str, tail: str, payload: bytes, roster: Roster, now_s: float) -> Seen | Refused:
    if not roster.admits(device, now_s):
        return Refused(device, "quota", f"more than {roster.quota} messages today")
    if len(payload) > messages.MAX_MESSAGE_BYTES:
        return Refused(device, "too_large", f"{len(payload)} bytes on {tail}")
    try:
        return _parse(device, tail, payload)
    except UnsupportedVersion as error:
        return Refused(device, "unsupported_version", str(error)[:MAX_TEXT])
    except _OutOfBounds as error:
        return Refused(device, "out_of_bounds", f"{tail}: {error}"[:MAX_TEXT])
    except _Foreign as error:
        return Refused(device, "foreign_device", str(error)[:MAX_TEXT])
    except (ContractError, ValidationError, ValueError, OverflowError, RecursionError) as error:
        return Refused(device, "malformed", f"{tail}: {' '.join(str(error).split())}"[:MAX_TEXT])


def _place(device: str, payload: bytes) -> Key | None:
    """Where a refused message stood in its sender's sequence; None = it does not say."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    match document:
        case {"boot": str(boot), "seq": int(seq)} if _BOOT.fullmatch(boot) and 1 <= seq <= MAX_COUNT:
            return Key(device, boot, int(seq))
    return None


class _Foreign(ValueError):
    """A message speaks for another device than its topic."""


def _split(topic: str, roster: Roster) -> tuple[str, str, str]:
    depth = roster.prefix.count("/") + 3
    parts = topic.split("/")
    if len(parts) < depth + 2:
        return "", "", ""
    return "/".join(parts[:depth]), parts[depth], "/".join(parts[depth + 1 :])


def _parse(device: str, tail: str, payload: bytes) -> Seen | Refused:
    kind, _, rest = tail.partition("/")
    match kind:
        case "status":
            status = _own(device, messages.Status.decode(payload))
            kept = _kept(status.kept_from)
            return StatusSeen(device, _boot(status.boot), status.state, status.reason[:MAX_TEXT], kept)
        case "birth":
            birth = _own(device, messages.Birth.decode(payload))
            return BirthSeen(device, _boot(birth.boot), _document(birth))
        case "reported":
            reported = _own(device, messages.Reported.decode(payload))
            _check_reported(reported)
            return ReportedSeen(device, _boot(reported.boot), _document(reported))
        case "tm":
            return _telemetry(_own(device, messages.Telemetry.decode(payload)))
        case "ev":
            return _event(_own(device, messages.Event.decode(payload)))
        case "res":
            return _reply(device, rest, payload)
        case _:
            return Refused(device, "topic", f"nothing is expected on .../{tail[:120]}")


def _own(device: str, message: M) -> M:
    if message.device != device:
        raise _Foreign(f"a message of '{device}' speaks for '{message.device[:60]}'")
    if not (math.isfinite(message.at) and 0 <= message.at < LATEST_S):
        raise _OutOfBounds(f"at is {message.at}")
    if message.v < 1:
        raise _OutOfBounds(f"v is {message.v}")
    return message


def _boot(boot: str) -> str:
    if not _BOOT.fullmatch(boot):
        raise _OutOfBounds("boot is not 1 to 64 plain characters")
    return boot


def _kept(kept_from: dict[str, int]) -> dict[str, int]:
    if len(kept_from) > MAX_KEPT or not all(1 <= seq <= MAX_COUNT for seq in kept_from.values()):
        raise _OutOfBounds(f"kept_from has more than {MAX_KEPT} boots or a number that is not 1 to 2^53")
    return {_boot(boot): seq for boot, seq in kept_from.items()}


def _document(message: messages.Message) -> dict[str, Any]:
    """What the message said, as JSON of bounded size."""
    return _bounded(message.model_dump(mode="json"), MAX_DETAIL_BYTES * 2)


def _bounded(document: dict[str, Any], most: int) -> dict[str, Any]:
    size = len(json.dumps(document, allow_nan=False))
    if size > most:
        raise _OutOfBounds(f"details of {size} bytes, at most {most} are kept")
    return document


def _check_reported(reported: messages.Reported) -> None:
    for name in ("desired_version", "attempt", "moved_bytes"):
        if not 0 <= getattr(reported, name) <= MAX_COUNT:
            raise _OutOfBounds(f"{name} is not 0 to 2^53")
    if len(reported.update_state) > MAX_NAME or len(reported.code) > MAX_NAME:
        raise _OutOfBounds("update_state or code is too long")


def _key(envelope: messages.Envelope) -> Key:
    if not 1 <= envelope.seq <= MAX_COUNT:
        raise _OutOfBounds("seq is not 1 to 2^53")
    return Key(envelope.device, _boot(envelope.boot), envelope.seq)


def _name(text: str) -> str:
    if len(text) > MAX_NAME or not text.isprintable():
        raise _OutOfBounds("a name is longer than 64 characters or not printable")
    return text


def _identifier(text: str) -> str:
    if text and not IDENTIFIER.fullmatch(text):
        raise _OutOfBounds(f"'{text[:60]}' is no service or engine")
    return text


def _numbers(numbers: dict[str, float]) -> dict[str, float]:
    if len(numbers) > MAX_NAMES:
        raise _OutOfBounds(f"{len(numbers)} numbers")
    if not all(math.isfinite(value) for value in numbers.values()):
        raise _OutOfBounds("a number is not finite")
    return {_name(name): value for name, value in numbers.items()}


def _event(event: messages.Event) -> EventSeen:
    if len(event.channels) > MAX_NAMES:
        raise _OutOfBounds(f"{len(event.channels)} channels")
    return EventSeen(
        key=_key(event),
        at=event.at,
        severity=event.severity,
        about=_name(event.kind)[:36],
        service=_identifier(event.service),
        text=event.text[:MAX_TEXT],
        channels=tuple(_name(channel) for channel in event.channels),
        numbers=_numbers(event.numbers),
        details=_bounded(event.details, MAX_DETAIL_BYTES),
    )


def _telemetry(telemetry: messages.Telemetry) -> TelemetrySeen:
    if max(len(telemetry.drift), len(telemetry.latency)) > MAX_PARTS:
        raise _OutOfBounds(f"more than {MAX_PARTS} windows or sketches in one message")
    vitals = {
        "health": {_identifier(name): _name(state) for name, state in telemetry.health.items()},
        "gauges": {_name(name): value for name, value in telemetry.gauges.items()
                   if value is None or math.isfinite(value)},
        "counters": {_name(name): _count(value) for name, value in telemetry.counters.items()},
        "power": telemetry.power.model_dump(mode="json") if telemetry.power else None,
    }  # fmt: skip
    return TelemetrySeen(
        key=_key(telemetry),
        at=telemetry.at,
        windows=tuple(_window(window) for window in telemetry.drift),
        sketches=tuple(_sketch(sketch) for sketch in telemetry.latency),
        vitals=_bounded(vitals, MAX_DETAIL_BYTES * 2),
    )


def _count(value: int) -> int:
    if not 0 <= value <= MAX_COUNT:
        raise _OutOfBounds("a count is not 0 to 2^53")
    return value


def _window(window: messages.DriftWindow) -> dict[str, Any]:
    """Fields of the table `window`. The sums must be possible for so many clipped rows."""
    width = len(window.sums)
    if not (0 < width <= MAX_FEATURES and len(window.squares) == width and len(window.classes) <= MAX_CLASSES):
        raise _OutOfBounds("a drift window has no, too many or unequal features")
    if not (
        0 < window.rows <= MAX_ROWS and 0 < window.clip <= 1000 and 0 <= window.first <= window.last <= MAX_COUNT
    ):
        raise _OutOfBounds("rows, clip, first or last of a drift window")
    if not _DIGEST.fullmatch(window.reference):
        raise _OutOfBounds("the reference of a drift window is not a digest")
    _check_sums(window)
    if sum(map(_count, window.classes)) > window.rows or len(window.counters) > MAX_NAMES:
        raise _OutOfBounds("a drift window counts more than its rows")
    body = {
        "first": window.first, "last": window.last, "clip": window.clip, "fraction_bits": window.fraction_bits,
        "sums": window.sums, "squares": window.squares, "classes": window.classes,
        "counters": {_name(name): _count(value) for name, value in window.counters.items()},
    }  # fmt: skip
    return {
        "service": _identifier(window.service), "view": _name(window.view), "reference": window.reference,
        "rows": window.rows, "body": body,
    }  # fmt: skip


def _check_sums(window: messages.DriftWindow) -> None:
    most = math.ceil(window.clip * (1 << window.fraction_bits))
    for total, square in zip(window.sums, window.squares, strict=True):
        # the second is Cauchy and Schwarz: no rows have a larger sum for these squares
        if not (0 <= square <= window.rows * most * most and total * total <= window.rows * square):
            raise _OutOfBounds("the sums of a drift window are impossible")


def _sketch(sketch: messages.LatencySketch) -> dict[str, Any]:
    """Fields of the table `sketch`."""
    if not ERRORS[0] <= sketch.relative_error <= ERRORS[1]:
        raise _OutOfBounds(f"relative_error is {sketch.relative_error}")
    for value in (sketch.count, sketch.total_us, sketch.minimum_us, sketch.maximum_us):
        _count(value)
    fields = sketch.model_dump(include={"relative_error", "count", "total_us", "minimum_us", "maximum_us", "buckets"})
    body = LogSketch.from_fields(fields).fields()
    return {"service": _identifier(sketch.service), "engine": _identifier(sketch.engine), "body": body}


def _reply(device: str, op: str, payload: bytes) -> ReplySeen:
    document = json.loads(payload)
    if not isinstance(document, dict):
        raise _OutOfBounds("a reply is not an object")
    json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored
    if document.get("device", device) != device:
        raise _Foreign(f"a reply of '{device}' speaks for '{str(document['device'])[:60]}'")
    return ReplySeen(
        device=device,
        op=op[:36],
        id=str(document.get("id", ""))[:MAX_NAME],
        ok=document.get("ok") is True,
        code=str(document.get("code", ""))[:MAX_NAME],
        text=str(document.get("text", ""))[:MAX_TEXT],
    )
