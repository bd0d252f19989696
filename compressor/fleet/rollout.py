"""How far an update got in its cohort: one literal table. Pure; time is an argument.

    draft -> running -> soaking -> completed
                 \\          \\--> halted
                  `-----------> halted

A rollout halts by itself when a device refuses, fails or undoes the update, when a device stays silent until the
deadline, or when an operator asks. Nothing halted goes on. Thin form: one cohort, the canary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class State(StrEnum):
    DRAFT = "draft"  # decided; the desired documents are not out yet
    RUNNING = "running"
    SOAKING = "soaking"  # every device committed; watched for a while
    COMPLETED = "completed"
    HALTED = "halted"


class Signal(StrEnum):
    SENT = "sent"  # every desired document is stored and on its way
    ALL_COMMITTED = "all-committed"
    BAD = "bad"  # a device refused, failed or undid it
    SILENT = "silent"  # a device did not get through before the deadline
    SOAKED = "soaked"
    HALT = "halt"  # an operator


class Stand(StrEnum):
    """What one device says of the version it was given."""

    WAITING = "waiting"  # has not mentioned this version yet
    BUSY = "busy"
    COMMITTED = "committed"
    BAD = "bad"
    OVERTAKEN = "overtaken"  # a later document came first: not ours to judge


_D, _R, _S, _C, _H = State.DRAFT, State.RUNNING, State.SOAKING, State.COMPLETED, State.HALTED
_CELLS: Final = {
    #   sent all-committed bad silent soaked halt
    _D: (_R, _D,           _D, _D,    _D,    _H),
    _R: (_R, _S,           _H, _H,    _R,    _H),
    _S: (_S, _S,           _H, _S,    _C,    _H),
    _C: (_C, _C,           _C, _C,    _C,    _C),
    _H: (_H, _H,           _H, _H,    _H,    _H),
}  # fmt: skip
TABLE: Final = {state: dict(zip(Signal, cells, strict=True)) for state, cells in _CELLS.items()}
ENDS: Final = frozenset({State.COMPLETED, State.HALTED})

STANDS: Final[dict[str, Stand]] = {
    "idle": Stand.WAITING, "planned": Stand.BUSY, "fetching": Stand.BUSY, "verified": Stand.BUSY,
    "staged": Stand.BUSY, "selftest": Stand.BUSY, "shadow": Stand.BUSY, "probation": Stand.BUSY,
    "deferred": Stand.BUSY, "committed": Stand.COMMITTED, "superseded": Stand.OVERTAKEN, "rejected": Stand.BAD,
    "failed": Stand.BAD, "rolling_back": Stand.BAD, "rolled_back": Stand.BAD, "quarantined": Stand.BAD,
}  # fmt: skip
"""Update state of a device -> what it means here. A state of a later agent counts as busy: the deadline decides."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one device reported last: of which desired version, in which update state and why."""

    version: int
    state: str
    code: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """`versions`: device -> the version of the desired document it was given. Times: wall seconds."""

    versions: Mapping[str, int]
    state: State
    since: float
    deadline_s: float
    soak_s: float
    text: str = ""


def stand(version: int, said: Said | None) -> Stand:
    """Where one device is with `version`."""
    if said is None or said.version < version:
        return Stand.WAITING
    if said.version > version:
        return Stand.OVERTAKEN
    return STANDS.get(said.state, Stand.BUSY)


def advance(rollout: Rollout, said: Mapping[str, Said], *, now: float, halt: bool = False) -> Rollout:
    """The rollout after one look at everything; unchanged when nothing follows."""
    stands = {device: stand(version, said.get(device)) for device, version in rollout.versions.items()}
    for signal, text in _signals(rollout, stands, said, now=now, halt=halt):
        following = TABLE[rollout.state][signal]
        if following is not rollout.state:
            return replace(rollout, state=following, since=now, text=text)
    return rollout


def sent(rollout: Rollout, *, now: float) -> Rollout:
    """The desired documents are out."""
    following = TABLE[rollout.state][Signal.SENT]
    text = f"offered to {', '.join(sorted(rollout.versions))}"
    return rollout if following is rollout.state else replace(rollout, state=following, since=now, text=text)


def _signals(
    rollout: Rollout, stands: Mapping[str, Stand], said: Mapping[str, Said], *, now: float, halt: bool
) -> list[tuple[Signal, str]]:
    """Everything that is true now, the gravest first."""
    age_s = now - rollout.since
    bad = sorted(device for device, where in stands.items() if where is Stand.BAD)
    late = sorted(device for device, where in stands.items() if where in {Stand.WAITING, Stand.BUSY})
    found = []
    if halt:
        found.append((Signal.HALT, "an operator halted it"))
    if bad:
        reasons = ", ".join(f"{device} {said[device].state} ({said[device].code or 'no code'})" for device in bad)
        found.append((Signal.BAD, f"halted: {reasons}"))
    if late and age_s >= rollout.deadline_s:
        found.append((Signal.SILENT, f"halted: {', '.join(late)} not done after {age_s:.0f} s"))
    if stands and not bad and not late:
        found.append(
            (Signal.ALL_COMMITTED, f"all {len(stands)} devices committed; watched for {rollout.soak_s:.0f} s")
        )
    if age_s >= rollout.soak_s and not bad and not late:
        found.append((Signal.SOAKED, f"{len(stands)} devices run it, none fell back"))
    return found
