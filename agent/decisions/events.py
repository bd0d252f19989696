"""The closed sets of what can happen (Event) and what can be decided (Command). JSON form in `encode`/`decode`.

Times are seconds of the decision clock: the wall clock, or the newest timestamp of the data when the agent is
configured so (`clock.source = "data"`). Plain frozen dataclasses; nothing here knows of processes or files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class AlarmKind(StrEnum):
    DEAD = "dead"  # a channel no longer moves (sd ~ 0)
    STUCK = "stuck"  # a channel repeats one value
    SCALE = "scale"  # a sensor group changed its unit or gain grossly
    NOT_FINITE = "not_finite"  # NaN or infinity above the tolerated share
    RANGE = "range"  # values outside the allowed range above the tolerated share
    REPEATED = "repeated"  # inputs repeat bit for bit: a buffer nobody fills
    RATE = "rate"  # data come at another rate than the model's windows
    DRIFT = "drift"  # the monitor's view left the reference; reports, never switches
    HARM = "harm"  # a drift makes the serving engine wrong, says an engine with other inputs
    LATENCY = "latency"
    POWER = "power"
    THERMAL = "thermal"
    MEMORY = "memory"
    ENGINE = "engine"  # an engine fails requests


UNNAMED = frozenset({AlarmKind.REPEATED, AlarmKind.RATE})
"""Faults of the whole input, which name no channel."""
BROKEN_INPUT = UNNAMED | {
    AlarmKind.DEAD, AlarmKind.STUCK, AlarmKind.SCALE, AlarmKind.NOT_FINITE, AlarmKind.RANGE
}  # fmt: skip


class Level(StrEnum):
    OK = "ok"
    WATCH = "watch"
    DRIFT = "drift"
    HARMFUL = "harmful"
    BROKEN_INPUT = "broken-input"


# --- events ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class AlarmRaised:
    service: str
    kind: AlarmKind
    level: Level
    channels: tuple[str, ...] = ()  # the first named is the most suspicious
    engine: str = ""
    text: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    better: str = ""  # of harm: the engine that says so, and that should serve instead
    explanation: dict[str, Any] = field(default_factory=dict)  # of drift: `DriftExplanation` of the contract


@dataclass(frozen=True, slots=True)
class AlarmCleared:
    service: str
    kind: AlarmKind
    channels: tuple[str, ...] = ()
    engine: str = ""


@dataclass(frozen=True, slots=True)
class DriftPersists:
    """An open drift alarm has lasted `windows` windows. `guards`: what else is wrong, as "dead:gx". `single_channel`:
    the one channel that carries it, "" when it is several or nobody's fault. `reference`: its digest.
    """

    service: str
    windows: int
    channels: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    single_channel: str = ""
    reference: str = ""
    explanation: dict[str, Any] = field(default_factory=dict)  # as of now, see AlarmRaised


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """Requests of `service` that `engine` could not answer since the last such event."""

    service: str
    engine: str
    code: str
    count: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class EngineServed:
    """`count` requests were answered by `engine` since the last such event (health counts both sides)."""

    service: str
    engine: str
    count: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """`usable`: engines per service that loaded and answered their golden inputs."""

    generation: int
    usable: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class WorkerLost:
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; nothing else did."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """An operator wants `engine` and nothing else, until unpinned."""

    service: str
    engine: str


@dataclass(frozen=True, slots=True)
class Unpinned:
    service: str


@dataclass(frozen=True, slots=True)
class AgentStarted:
    """A new agent process took over the saved state: nobody serves yet, no alarm is known."""


Event = (
    AlarmRaised
    | AlarmCleared
    | EngineFailed
    | EngineServed
    | WorkerReady
    | WorkerLost
    | Tick
    | Pinned
    | Unpinned
    | AgentStarted
    | DriftPersists
)


# --- commands ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Activate:
    """Let `engine` answer first. `reason` is a sentence; `why` a short stable code."""

    service: str
    engine: str
    why: str
    reason: str


@dataclass(frozen=True, slots=True)
class RestartWindows:
    """A switch happened: per-engine statistics start anew."""

    service: str
    engine: str


@dataclass(frozen=True, slots=True)
class Publish:
    severity: str
    kind: str
    text: str
    service: str = ""
    channels: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartWorker:
    """A new generation is wanted now, or once `not_before` (decision clock) has passed."""

    not_before: float
    reason: str


@dataclass(frozen=True, slots=True)
class Persist:
    """The supervisor's state must be durable before what follows is executed."""

    state: dict[str, Any]


Command = Activate | RestartWindows | Publish | StartWorker | Persist

_EVENTS = {
    kind.__name__: kind
    for kind in (
        AlarmRaised, AlarmCleared, EngineFailed, EngineServed, WorkerReady, WorkerLost, Tick, Pinned, Unpinned,
        AgentStarted, DriftPersists,
    )
}  # fmt: skip


def encode(item: Event | Command) -> dict[str, Any]:
    """One JSON object, tagged with the type's name: what the recorder writes."""
    return {"type": type(item).__name__, **asdict(item)}


def decode_event(document: dict[str, Any]) -> Event:
    """The event `encode` wrote. Raises: KeyError, TypeError on a foreign document."""
    fields = dict(document)
    kind = _EVENTS[fields.pop("type")]
    if "channels" in fields:
        fields["channels"] = tuple(fields["channels"])
    if "guards" in fields:
        fields["guards"] = tuple(fields["guards"])
    if "kind" in fields:
        fields["kind"] = AlarmKind(fields["kind"])
    if "level" in fields:
        fields["level"] = Level(fields["level"])
    if "usable" in fields:
        fields["usable"] = {name: tuple(engines) for name, engines in fields["usable"].items()}
    event: Event = kind(**fields)
    return event
