"""How well a service is: unknown -> healthy <-> degraded -> failing. Worse at once, better one step at a time.

    health = step(health, Condition.IMPAIRED, now_s, settle_s=15.0)

The caller says what is true now (Condition); this module turns it into a Signal and looks the next state up:

| state    | no data | clean   | impaired | unbroken | settled  | broken  | restarted |
|----------|---------|---------|----------|----------|----------|---------|-----------|
| unknown  | unknown | healthy | degraded | degraded | healthy  | failing | unknown   |
| healthy  | healthy | healthy | degraded | degraded | healthy  | failing | unknown   |
| degraded | degraded| degraded| degraded | degraded | healthy  | failing | unknown   |
| failing  | failing | failing | failing  | degraded | degraded | failing | unknown   |

`unbroken`: not broken for `settle_s`; `settled`: clean for `settle_s`. Pure; knows nothing of alarms or engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never


class State(StrEnum):
    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    FAILING = "failing"


class Condition(StrEnum):
    """What is true now. The supervisor says which facts make which."""

    NO_DATA = "no-data"  # nothing served yet, nothing known to be wrong
    CLEAN = "clean"
    IMPAIRED = "impaired"  # answers are given, something is wrong
    BROKEN = "broken"  # no model answers


class Signal(StrEnum):
    NO_DATA = "no-data"
    CLEAN = "clean"
    IMPAIRED = "impaired"
    UNBROKEN = "unbroken"
    SETTLED = "settled"
    BROKEN = "broken"
    RESTARTED = "restarted"


U, H, D, F = State.UNKNOWN, State.HEALTHY, State.DEGRADED, State.FAILING
TABLE: Final[dict[State, dict[Signal, State]]] = {
    state: dict(zip(Signal, row, strict=True))
    for state, row in {
        # no data, clean, impaired, unbroken, settled, broken, restarted
        U: (U, H, D, D, H, F, U),
        H: (H, H, D, D, H, F, U),
        D: (D, D, D, D, H, F, U),
        F: (F, F, F, D, D, F, U),
    }.items()
}


@dataclass(frozen=True, slots=True)
class Health:
    """`broken_s`, `impaired_s`: when the condition was last that bad (impaired counts broken)."""

    state: State = State.UNKNOWN
    since_s: float = 0.0
    broken_s: float = 0.0
    impaired_s: float = 0.0


def start(now_s: float) -> Health:
    return Health(State.UNKNOWN, now_s, now_s, now_s)


def step(health: Health, condition: Condition, now_s: float, *, settle_s: float) -> Health:
    """The next health. A step up starts the waiting for the next step up anew."""
    signal = _signal(health, condition, now_s, settle_s)
    after = TABLE[health.state][signal]
    broken_s, impaired_s = health.broken_s, health.impaired_s
    if condition is Condition.BROKEN:
        broken_s = now_s
    if condition in {Condition.BROKEN, Condition.IMPAIRED} or (health.state is F and after is D):
        impaired_s = now_s
    since_s = health.since_s if after is health.state else now_s
    return Health(after, since_s, broken_s, impaired_s)


def restarted(health: Health, now_s: float) -> Health:
    """A new agent process knows nothing yet."""
    after = TABLE[health.state][Signal.RESTARTED]
    return start(now_s) if after is not health.state else health


def shifted(health: Health, by_s: float) -> Health:
    """The same health on a clock that was set by `by_s`: elapsed times stay as they are."""
    return Health(health.state, health.since_s + by_s, health.broken_s + by_s, health.impaired_s + by_s)


def _signal(health: Health, condition: Condition, now_s: float, settle_s: float) -> Signal:
    match condition:
        case Condition.NO_DATA:
            return Signal.NO_DATA
        case Condition.BROKEN:
            return Signal.BROKEN
        case Condition.IMPAIRED:
            return Signal.UNBROKEN if now_s - health.broken_s >= settle_s else Signal.IMPAIRED
        case Condition.CLEAN:
            return Signal.SETTLED if now_s - health.impaired_s >= settle_s else Signal.CLEAN
        case _:
            assert_never(condition)
