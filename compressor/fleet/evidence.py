"""What the fleet's reports add up to: standing alarms per device, and sums merged exactly. Pure.

Drift windows and latency sketches are integers, so pooling a cohort gives bit for bit what one device that saw
all the rows would have sent, in any order. Leaves to the planner what to make of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from agent.contract.errors import MalformedMessage
from agent.drift.windows import FixedPoint, MomentWindow
from agent.sketch import LogSketch

ALARMS = ("drift", "sensor")  # kinds of events that say what the input is like


class EventRow(Protocol):
    """A row of the table `event`."""

    @property
    def device(self) -> str: ...
    @property
    def received_at(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def service(self) -> str: ...
    @property
    def channels(self) -> list[str]: ...
    @property
    def details(self) -> dict[str, Any]: ...


class WindowRow(Protocol):
    """A row of the table `window`."""

    @property
    def service(self) -> str: ...
    @property
    def view(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def body(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """What one device says of one service's input at the moment.

    `guards`: broken inputs such as "dead:gx". `persisted_windows`: for how long a drift has lasted, in windows.
    """

    device: str
    service: str
    guards: tuple[str, ...] = ()
    drifting: bool = False
    channels: tuple[str, ...] = ()
    single_channel: bool = False
    harmful: bool = False
    persisted_windows: int = 0
    reference: str = ""
    since: float = 0.0  # when the host first heard of what now stands
    heard: float = 0.0  # and when it last heard of it


@dataclass(slots=True)
class _Open:
    """Alarms of one device and service while its events are read in order."""

    guards: dict[str, float] = field(default_factory=dict)  # "dead:gx" -> since
    drift: EventRow | None = None
    drift_since: float = 0.0
    harmful: bool = False


def standing(events: Iterable[EventRow]) -> list[Standing]:
    """events: oldest first. One entry per device and service that has an alarm open."""
    opened: dict[tuple[str, str], _Open] = {}
    for event in events:
        if event.kind in ALARMS:
            _follow(opened.setdefault((event.device, event.service), _Open()), event)
    return [_standing(key, alarms) for key, alarms in opened.items() if alarms.guards or alarms.drift is not None]


def _follow(alarms: _Open, event: EventRow) -> None:
    raised = event.details.get("raised", True) is not False
    if event.details.get("alarm") == "harm":
        alarms.harmful = raised
        return
    if event.kind == "drift":
        if raised and alarms.drift is None:
            alarms.drift_since = event.received_at
        alarms.drift = event if raised else None
        alarms.harmful = alarms.harmful and raised
        return
    alarm = str(event.details.get("alarm", "sensor"))[:36]
    for name in [f"{alarm}:{channel}" for channel in event.channels] or [alarm]:
        if raised:
            alarms.guards.setdefault(name, event.received_at)
        else:
            alarms.guards.pop(name, None)


def _standing(key: tuple[str, str], alarms: _Open) -> Standing:
    details = alarms.drift.details if alarms.drift is not None else {}
    named = details.get("guards")
    listed = {str(name)[:64] for name in named[:64]} if isinstance(named, list) else set()
    starts = [*alarms.guards.values(), *([alarms.drift_since] if alarms.drift is not None else [])]
    return Standing(
        device=key[0],
        service=key[1],
        guards=tuple(sorted({*alarms.guards, *listed})),
        drifting=alarms.drift is not None,
        channels=tuple(alarms.drift.channels) if alarms.drift is not None else (),
        single_channel=details.get("single_channel") is True,
        harmful=alarms.drift is not None and (alarms.harmful or details.get("level") == "harmful"),
        persisted_windows=_whole(details.get("persisted_windows")),
        reference=str(details.get("reference", ""))[:64],
        since=min(starts),
        heard=max([*alarms.guards.values(), *([alarms.drift.received_at] if alarms.drift is not None else [])]),
    )


def _whole(value: object) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9
    return int(value) if whole else 0  # type: ignore[call-overload]


# --- drift windows ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Pool:
    """Which windows may be added: same view of the same reference, same fixed point."""

    service: str
    view: str
    reference: str
    clip: float
    fraction_bits: int
    width: int
    classes: int


def moment_window(row: WindowRow) -> tuple[Pool, MomentWindow]:
    """A stored window in units of the reference's standard deviations: centre 0, scale 1."""
    body = row.body
    width, classes = len(body["sums"]), len(body["classes"])
    fixed = FixedPoint((0.0,) * width, (1.0,) * width, float(body["clip"]), int(body["fraction_bits"]))
    window = MomentWindow(
        fixed, row.rows, tuple(body["sums"]), tuple(body["squares"]), tuple(body["classes"]), dict(body["counters"])
    )
    return Pool(row.service, row.view, row.reference, fixed.clip, fixed.fraction_bits, width, classes), window


def merge_windows(rows: Iterable[WindowRow]) -> dict[Pool, MomentWindow]:
    """Everything that may be added, added."""
    merged: dict[Pool, MomentWindow] = {}
    for row in rows:
        pool, window = moment_window(row)
        merged[pool] = merged[pool].merge(window) if pool in merged else window
    return merged


@dataclass(frozen=True, slots=True)
class Shift:
    """The feature whose mean moved farthest, in standard deviations of the reference, over `rows` rows."""

    rows: int
    feature: int
    size: float
    reference: str


def largest_shift(newest: Sequence[WindowRow], *, reference: str, enough_rows: int) -> Shift | None:
    """Over a device's newest windows, going back until `enough_rows` rows. `reference` empty: the newest's.

    newest: newest first. None when there is no window of that reference.
    """
    chosen, count = [], 0
    for row in newest:
        reference = reference or row.reference
        if row.reference == reference and count < enough_rows:
            chosen.append(row)
            count += row.rows
    shifts = [_shift(pool, window) for pool, window in merge_windows(chosen).items() if window.rows]
    return max(shifts, key=lambda shift: shift.size, default=None)


def _shift(pool: Pool, window: MomentWindow) -> Shift:
    means = np.abs(window.mean())
    feature = int(means.argmax())
    return Shift(rows=window.rows, feature=feature, size=float(means[feature]), reference=pool.reference)


# --- latency ---------------------------------------------------------------------------------------------------
def merge_sketches(rows: Iterable[Mapping[str, Any]]) -> dict[str, LogSketch]:
    """Latency per engine. rows: engine and body of the table `sketch`; sketches of another error are left out."""
    merged: dict[str, LogSketch] = {}
    for row in rows:
        try:
            sketch = LogSketch.from_fields(row["body"])
        except MalformedMessage:
            continue  # written by an older version with other rules
        held = merged.setdefault(row["engine"], LogSketch(sketch.relative_error))
        if held.relative_error == sketch.relative_error:
            held.merge(sketch)
    return merged
