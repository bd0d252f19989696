"""Who answers first, and for how long: preferred -> fallback -> probation of the preferred -> preferred.

    stay = step(stay, Signal.TROUBLE, now_s, limits, engine="wrist-accel", why="fault", reason="...")

| phase     | trouble     | settled   | refused     | proven       | pin    | unpin        | restart          |
|-----------|-------------|-----------|-------------|--------------|--------|--------------|------------------|
| preferred | fallback    | -         | -           | -            | pinned | -            | -                |
| fallback  | fallback    | probation | fallback x2 | -            | pinned | -            | -                |
| probation | fallback x2 | -         | -           | preferred x1 | pinned | -            | probation (anew) |
| pinned    | pinned      | -         | -           | -            | pinned | preferred x1 | -                |

`-`: nothing changes. `x2`: the next stay is twice as long, up to `max_dwell_s`. `x1`: as long as configured again.

- trouble: there is a reason to leave the serving engine and a better one to go to (supervisor and `choice`).
- settled: what caused the switch is gone for a while, and the stay lasted its dwell (`rested`).
- refused: the preferred engine could not even be loaded for its probation.
- proven: the preferred engine served its probation without trouble.
- Only `fallback` has a minimum stay; leaving `preferred` or `probation` is immediate, so a fault costs no waiting.

Pure values; chooses no engine and knows no alarms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

DEFAULT_DWELL_S = 120.0  # about 94 windows of the demo: longer than the 64 within which its slow faults show
DEFAULT_PROBATION_S = 60.0  # half a dwell: every guard (3 to 8 windows) and 9 of 10 drift delays fit in
DEFAULT_MAX_DWELL_S = 86_400.0  # one day: a device tries its best model at least once a day
SHORTEST_DOUBLED_S = 1.0  # what a dwell of zero doubles to, so that it grows at all


class Phase(StrEnum):
    PREFERRED = "preferred"
    FALLBACK = "fallback"
    PROBATION = "probation"
    PINNED = "pinned"


class Signal(StrEnum):
    TROUBLE = "trouble"
    SETTLED = "settled"
    REFUSED = "refused"
    PROVEN = "proven"
    PIN = "pin"
    UNPIN = "unpin"
    RESTART = "restart"


class Dwell(StrEnum):
    """What a step does to the length of the next stay."""

    KEEP = "keep"
    DOUBLE = "double"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Row:
    """`moves`: the clock of the phase starts anew and the engine given to `step` serves."""

    phase: Phase
    moves: bool
    dwell: Dwell = Dwell.KEEP


@dataclass(frozen=True, slots=True)
class Limits:
    dwell_s: float = DEFAULT_DWELL_S
    probation_s: float = DEFAULT_PROBATION_S
    max_dwell_s: float = DEFAULT_MAX_DWELL_S


@dataclass(frozen=True, slots=True)
class Stay:
    """`engine` answers first since `since_s`. `dwell_s`: how long a stay on a fallback lasts at least, now."""

    phase: Phase
    engine: str
    since_s: float
    dwell_s: float
    why: str = "started"
    reason: str = ""


_PREFERRED, _FALLBACK, _PROBATION, _PINNED = Phase.PREFERRED, Phase.FALLBACK, Phase.PROBATION, Phase.PINNED
TABLE: Final[dict[Phase, dict[Signal, Row]]] = {
    _PREFERRED: {
        Signal.TROUBLE: Row(_FALLBACK, moves=True),
        Signal.SETTLED: Row(_PREFERRED, moves=False),
        Signal.REFUSED: Row(_PREFERRED, moves=False),
        Signal.PROVEN: Row(_PREFERRED, moves=False),
        Signal.PIN: Row(_PINNED, moves=True),
        Signal.UNPIN: Row(_PREFERRED, moves=False),
        Signal.RESTART: Row(_PREFERRED, moves=False),
    },
    _FALLBACK: {
        Signal.TROUBLE: Row(_FALLBACK, moves=True),
        Signal.SETTLED: Row(_PROBATION, moves=True),
        Signal.REFUSED: Row(_FALLBACK, moves=True, dwell=Dwell.DOUBLE),
        Signal.PROVEN: Row(_FALLBACK, moves=False),
        Signal.PIN: Row(_PINNED, moves=True),
        Signal.UNPIN: Row(_FALLBACK, moves=False),
        Signal.RESTART: Row(_FALLBACK, moves=False),
    },
    _PROBATION: {
        Signal.TROUBLE: Row(_FALLBACK, moves=True, dwell=Dwell.DOUBLE),
        Signal.SETTLED: Row(_PROBATION, moves=False),
        Signal.REFUSED: Row(_PROBATION, moves=False),
        Signal.PROVEN: Row(_PREFERRED, moves=True, dwell=Dwell.RESET),
        Signal.PIN: Row(_PINNED, moves=True),
        Signal.UNPIN: Row(_PROBATION, moves=False),
        Signal.RESTART: Row(_PROBATION, moves=True),
    },
    _PINNED: {
        Signal.TROUBLE: Row(_PINNED, moves=True),
        Signal.SETTLED: Row(_PINNED, moves=False),
        Signal.REFUSED: Row(_PINNED, moves=False),
        Signal.PROVEN: Row(_PINNED, moves=False),
        Signal.PIN: Row(_PINNED, moves=True),
        Signal.UNPIN: Row(_PREFERRED, moves=True, dwell=Dwell.RESET),
        Signal.RESTART: Row(_PINNED, moves=False),
    },
}


def start(engine: str, now_s: float, limits: Limits) -> Stay:
    return Stay(_PREFERRED, engine, now_s, limits.dwell_s, "started", f"{engine} is the preferred engine")


def step(stay: Stay, signal: Signal, now_s: float, limits: Limits, *, engine: str, why: str, reason: str) -> Stay:
    """The next stay; `engine`, `why` and `reason` are taken when the row moves."""
    row = TABLE[stay.phase][signal]
    dwell_s = _dwell_s(stay.dwell_s, row.dwell, limits)
    if not row.moves:
        return replace(stay, phase=row.phase, dwell_s=dwell_s)
    return Stay(row.phase, engine, now_s, dwell_s, why, reason)


def rested(stay: Stay, now_s: float) -> bool:
    """A fallback served its minimum stay."""
    return stay.phase is _FALLBACK and now_s - stay.since_s >= stay.dwell_s


def proven(stay: Stay, now_s: float, limits: Limits) -> bool:
    """The preferred engine served its probation."""
    return stay.phase is _PROBATION and now_s - stay.since_s >= limits.probation_s


def next_dwell_s(stay: Stay, signal: Signal, limits: Limits) -> float:
    """How long the stay that `signal` begins will last at least."""
    return _dwell_s(stay.dwell_s, TABLE[stay.phase][signal].dwell, limits)


def next_check_s(stay: Stay, limits: Limits) -> float | None:
    """When time alone may change this stay; None = never."""
    if stay.phase is _FALLBACK:
        return stay.since_s + stay.dwell_s
    return stay.since_s + limits.probation_s if stay.phase is _PROBATION else None


def shifted(stay: Stay, by_s: float) -> Stay:
    """The same stay on a clock that was set by `by_s`: elapsed times stay as they are."""
    return replace(stay, since_s=stay.since_s + by_s)


def _dwell_s(dwell_s: float, change: Dwell, limits: Limits) -> float:
    longest_s = max(limits.max_dwell_s, limits.dwell_s)
    match change:
        case Dwell.KEEP:
            return dwell_s
        case Dwell.DOUBLE:
            return min(max(2.0 * dwell_s, SHORTEST_DOUBLED_S), longest_s)
        case Dwell.RESET:
            return limits.dwell_s
