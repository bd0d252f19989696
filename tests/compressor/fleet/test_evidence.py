from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agent.drift.windows import FixedPoint, MomentWindow
from agent.sketch import LogSketch
from compressor.fleet import evidence

RNG = np.random.default_rng(3)
FIXED = FixedPoint((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def event(kind: str, *, at: float = 1.0, device: str = "w1", channels: tuple[str, ...] = (), **details: Any) -> Any:
    return SimpleNamespace(
        device=device, service="wrist", kind=kind, received_at=at, channels=list(channels), details=details
    )


def stored(window: MomentWindow, reference: str = "r1") -> Any:
    """The row the database would hand out for a window of a device."""
    body = {
        "clip": window.fixed.clip, "fraction_bits": window.fixed.fraction_bits, "sums": list(window.sums),
        "squares": list(window.squares), "classes": list(window.classes), "counters": window.counters,
    }  # fmt: skip
    return SimpleNamespace(service="wrist", view="channels", reference=reference, rows=window.rows, body=body)


def rows_of(count: int, *, shift: float = 0.0) -> np.ndarray:
    """(rows, 3) in units of the reference."""
    return RNG.normal(size=(count, 3)) + np.array([0.0, shift, 0.0])


def test_windows_of_many_devices_merge_to_the_window_of_all_rows_in_any_order() -> None:
    parts = [rows_of(count) for count in (64, 10, 33)]
    labels = [RNG.integers(0, 4, len(part)) for part in parts]
    windows = [
        MomentWindow.empty(FIXED, classes=4).add(part, label, {"gap": 1})
        for part, label in zip(parts, labels, strict=True)
    ]
    whole = MomentWindow.empty(FIXED, classes=4).add(np.vstack(parts), np.concatenate(labels), {"gap": 3})
    for order in permutations(windows):
        (merged,) = evidence.merge_windows(stored(window) for window in order).values()
        assert merged == whole


def test_windows_of_different_references_are_not_mixed() -> None:
    window = MomentWindow.empty(FIXED).add(rows_of(10), np.zeros(10))
    merged = evidence.merge_windows([stored(window, "r1"), stored(window, "r2")])
    assert sorted(pool.reference for pool in merged) == ["r1", "r2"]


def test_the_largest_shift_names_feature_and_size_over_enough_rows() -> None:
    newest = [stored(MomentWindow.empty(FIXED).add(rows_of(64, shift=1.5), np.zeros(64))) for _ in range(4)]
    old = [stored(MomentWindow.empty(FIXED).add(rows_of(64), np.zeros(64))) for _ in range(4)]
    shift = evidence.largest_shift([*newest, *old], reference="r1", enough_rows=256)
    assert shift is not None
    assert (shift.rows, shift.feature) == (256, 1)
    assert shift.size == pytest.approx(1.5, abs=0.2)
    assert evidence.largest_shift(newest, reference="r2", enough_rows=256) is None
    assert evidence.largest_shift([], reference="", enough_rows=256) is None


def test_latency_sketches_merge_exactly_per_engine() -> None:
    values = RNG.lognormal(6, 1, size=(3, 200))
    sketches, whole = [], LogSketch()
    for part in values:
        sketch = LogSketch()
        sketch.add_many(part)
        sketches.append({"engine": "wrist", "body": sketch.fields()})
        whole.merge(sketch)
    foreign = LogSketch(0.05)
    foreign.add(3.0)
    merged = evidence.merge_sketches([*sketches, {"engine": "wrist", "body": foreign.fields()}])
    assert merged["wrist"].fields() == whole.fields()


def test_a_drift_stands_until_it_is_over() -> None:
    raised = event("drift", channels=("ax", "gy"), raised=True, persisted_windows=64, reference="r1")
    (found,) = evidence.standing([raised])
    assert (found.drifting, found.persisted_windows, found.reference) == (True, 64, "r1")
    assert found.channels == ("ax", "gy")
    assert evidence.standing([raised, event("drift", raised=False)]) == []


def test_a_drift_published_again_keeps_when_it_began_and_takes_the_newest_numbers() -> None:
    (found,) = evidence.standing(
        [event("drift", at=1.0, persisted_windows=0), event("drift", at=9.0, persisted_windows=64)]
    )
    assert (found.since, found.heard, found.persisted_windows) == (1.0, 9.0, 64)


def test_guards_stand_per_channel() -> None:
    dead = event("sensor", channels=("gx", "gy"), raised=True, alarm="dead")
    (found,) = evidence.standing([dead, event("sensor", channels=("gx",), raised=False, alarm="dead")])
    assert found.guards == ("dead:gy",)
    assert not found.drifting


def test_guards_named_by_a_drift_event_count_as_guards() -> None:
    (found,) = evidence.standing([event("drift", guards=["dead:gx"], persisted_windows=100)])
    assert found.guards == ("dead:gx",)


def test_nonsense_in_details_is_harmless() -> None:
    (found,) = evidence.standing(
        [event("drift", guards="dead", persisted_windows="many", reference=7, single_channel="yes", level=[1])]
    )
    assert (found.guards, found.persisted_windows, found.single_channel, found.harmful) == ((), 0, False, False)
    assert evidence.standing([event("drift", persisted_windows=float("nan"))])[0].persisted_windows == 0


def test_other_events_and_other_devices_do_not_mix() -> None:
    found = evidence.standing([event("fallback"), event("drift"), event("drift", device="w2")])
    assert sorted(entry.device for entry in found) == ["w1", "w2"]


def test_harm_marks_the_drift_it_was_said_of_and_ends_with_it() -> None:
    begun = [
        event("drift", channels=("ax",), raised=True, alarm="drift", level="drift", reference="r1"),
        event("drift", at=2.0, raised=True, alarm="harm", level="harmful", better="wrist-norm"),
    ]
    (standing,) = evidence.standing(begun)
    assert (standing.harmful, standing.channels, standing.reference) == (True, ("ax",), "r1")
    lasting = event("drift", at=3.0, channels=("ax",), raised=True, alarm="drift", level="drift")
    (standing,) = evidence.standing([*begun, lasting])
    assert standing.harmful
    over = event("drift", at=4.0, channels=("ax",), raised=False, alarm="drift", level="ok")
    assert evidence.standing([*begun, over]) == []
    again = event("drift", at=5.0, channels=("ax",), raised=True, alarm="drift", level="drift")
    (standing,) = evidence.standing([*begun, over, again])
    assert not standing.harmful
