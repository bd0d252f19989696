"""What the monitor makes of records: outcomes, latency, broken sensors, drift, telemetry."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from agent.contract import messages
from agent.contract.messages import DriftWindow, LatencySketch
from agent.decisions.budget import LatencyBudget
from agent.decisions.events import (
    AlarmCleared,
    AlarmKind,
    AlarmRaised,
    DriftPersists,
    EngineFailed,
    EngineServed,
    Event,
    Level,
)
from agent.drift import Claim, MomentWindow, Reference
from agent.drift.counters import CLEAR_ROWS
from agent.monitor import (
    DRIFT_ROWS_AT_ONCE,
    DRIFT_ROWS_PER_S,
    GUARD_ROWS_AT_ONCE,
    GUARD_ROWS_PER_S,
    DeviceMonitor,
    Monitor,
    MonitorPlan,
)
from agent.observation import NO_ENGINE, RECORD, Observation, Outcome, RingReader, RingWriter, create_ring
from agent.sketch import LogSketch
from compressor.reference import build_reference
from tests.agent.drift.conftest import CHANNELS, GROUPS, NO_GUARD, RegimeStream, witnessed_reference

ENGINES = ("wrist", "wrist-accel", "wrist-floor")
OK, ERROR, DEADLINE = Outcome.OK, Outcome.ERROR, Outcome.DEADLINE


@pytest.fixture(scope="module")
def stream() -> RegimeStream:
    return RegimeStream()


@pytest.fixture(scope="module")
def reference(stream: RegimeStream) -> Reference:
    return build_reference(stream.rows(8, seed=1), stream.names, guard=NO_GUARD, held_out=stream.rows(8, seed=2))


def monitor(reference: Reference | None = None, **changes: Any) -> Monitor:
    about: dict[str, Any] = {
        "service": "wrist", "index": 0, "engines": ENGINES, "channels": CHANNELS, "groups": GROUPS, "classes": 2,
        "view": "channels",
    }  # fmt: skip
    return Monitor(MonitorPlan(**{**about, **changes}), reference)


def records(count: int = 1, first: int = 0, **fields: Any) -> np.ndarray:
    """`count` equal records of answered single-row requests; `fields` may be arrays of that length."""
    made = np.zeros(count, RECORD)
    for name, value in {"rows": 1, "predicted": -1, "latency_us": 100.0, **fields}.items():
        made[name] = value
    made["sequence"] = np.arange(first, first + count)
    return made


def viewed(features: np.ndarray, predicted: np.ndarray, **fields: Any) -> np.ndarray:
    made = records(len(features), predicted=predicted, view_width=features.shape[1], **fields)
    made["view"][:, : features.shape[1]] = features
    return made


def alarms(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, AlarmRaised | AlarmCleared)]


# --- engines -----------------------------------------------------------------------------------------------
def test_answers_and_failures_come_as_runs_in_the_order_they_happened() -> None:
    batch = np.concatenate(
        [
            records(3),
            records(1, outcome=Outcome.FAILED_OVER, engine=1),
            records(2),
            records(2, outcome=ERROR, engine=255),
        ]
    )
    assert monitor().observe(batch) == [
        EngineServed("wrist", "wrist", 3),
        EngineFailed("wrist", "wrist", "engine_failed", 1),
        EngineServed("wrist", "wrist", 2),
        EngineFailed("wrist", "wrist", "engine_failed", 2),
        EngineServed("wrist", "wrist-accel", 1),
    ]


def test_a_floor_that_is_asked_first_has_not_failed() -> None:
    assert monitor().observe(records(2, outcome=Outcome.FLOOR, engine=2, first_engine=2)) == [
        EngineServed("wrist", "wrist-floor", 2)
    ]


def test_a_floor_that_is_asked_last_means_the_first_failed() -> None:
    assert monitor().observe(records(1, outcome=Outcome.FLOOR, engine=2)) == [
        EngineFailed("wrist", "wrist", "engine_failed", 1),
        EngineServed("wrist", "wrist-floor", 1),
    ]


def test_a_deadline_missed_in_the_queue_is_not_the_engines_fault() -> None:
    queued = records(1, outcome=DEADLINE, engine=NO_ENGINE, latency_us=1e6, queue_us=9e5)
    slow = records(1, outcome=DEADLINE, engine=NO_ENGINE, latency_us=1e6, queue_us=1e3)
    assert monitor().observe(queued) == []
    assert monitor().observe(slow) == [EngineFailed("wrist", "wrist", "deadline_exceeded", 1)]


@pytest.mark.parametrize("outcome", [Outcome.REFUSED_BY_GUARD, Outcome.OVERLOADED])
def test_a_refused_request_says_nothing_of_an_engine(outcome: Outcome) -> None:
    assert monitor().observe(records(3, outcome=outcome, engine=NO_ENGINE, first_engine=NO_ENGINE)) == []


def test_a_batch_of_many_rows_is_one_request() -> None:
    batch = records(4, row=np.arange(4), rows=4)
    watched = monitor()
    assert watched.observe(batch) == [EngineServed("wrist", "wrist", 1)]
    assert watched.statistics()["counters"] == {"requests": 1, "rows": 4, "ok": 1}


def test_records_of_other_services_are_not_its_business() -> None:
    watched = monitor()
    assert watched.observe(records(5, service=1, outcome=ERROR)) == []
    assert watched.statistics()["counters"] == {}


def test_an_engine_number_outside_the_plan_is_ignored() -> None:
    assert monitor().observe(records(1, engine=77, first_engine=77)) == []


# --- latency -----------------------------------------------------------------------------------------------
def test_latency_over_the_budget_is_raised_once_and_cleared_once() -> None:
    watched = monitor(latency_p95_us=1000.0)
    raised = alarms(watched.observe(records(300, latency_us=2000.0)))
    (alarm,) = raised
    assert isinstance(alarm, AlarmRaised)
    assert (alarm.kind, alarm.engine, alarm.level) == (AlarmKind.LATENCY, "wrist", Level.HARMFUL)
    assert alarm.numbers["over"] == alarm.numbers["of_last"] == LatencyBudget.RAISE_OVER
    assert alarm.numbers["p95_us"] == pytest.approx(2000.0, rel=0.02)
    assert alarm.text == "wrist: 30 of the last 30 requests took longer than the 1000 us that 95 % should keep"
    assert alarms(watched.observe(records(1000))) == [AlarmCleared("wrist", AlarmKind.LATENCY, engine="wrist")]


def test_after_a_switch_only_the_new_engines_requests_are_judged() -> None:
    watched = monitor(latency_p95_us=1000.0)
    watched.observe(records(29, latency_us=2000.0))
    watched.restart_windows("wrist-accel")
    assert alarms(watched.observe(records(100, latency_us=2000.0))) == []
    (alarm,) = alarms(watched.observe(records(100, latency_us=2000.0, engine=1, first_engine=1)))
    assert isinstance(alarm, AlarmRaised)
    assert alarm.engine == "wrist-accel"


def test_a_switch_forgets_a_raised_latency_alarm_silently() -> None:
    watched = monitor(latency_p95_us=1000.0)
    watched.observe(records(100, latency_us=2000.0))
    watched.restart_windows("wrist-accel")
    assert alarms(watched.observe(records(1000, engine=1, first_engine=1))) == []


def test_missed_deadlines_count_as_over_the_budget() -> None:
    watched = monitor(latency_p95_us=1000.0)
    assert len(alarms(watched.observe(records(30, outcome=DEADLINE, engine=NO_ENGINE, latency_us=1.0)))) == 1


def test_without_a_budget_no_latency_is_an_alarm() -> None:
    assert alarms(monitor().observe(records(1000, latency_us=1e9))) == []


def test_latency_is_kept_per_engine_that_answered() -> None:
    watched = monitor()
    watched.observe(
        np.concatenate([records(10), records(5, latency_us=900.0, outcome=Outcome.FAILED_OVER, engine=1)])
    )
    latency = watched.statistics()["latency"]
    assert (latency["wrist"]["count"], latency["wrist-accel"]["count"]) == (10, 5)
    assert latency["wrist-accel"]["p95_us"] == pytest.approx(900.0, rel=0.02)
    assert latency["wrist-floor"]["p95_us"] is None


def test_a_latency_that_is_no_number_is_left_out() -> None:
    watched = monitor()
    watched.observe(records(2, latency_us=[np.nan, 100.0]))
    assert watched.statistics()["latency"]["wrist"]["count"] == 1


# --- sensors -----------------------------------------------------------------------------------------------
def test_a_channel_dead_for_three_windows_is_named_once_with_its_delay_and_cleared_once() -> None:
    watched = monitor()
    assert alarms(watched.observe(records(50))) == []
    assert alarms(watched.observe(records(2, dead_bits=0b100))) == []
    (alarm,) = alarms(watched.observe(records(10, dead_bits=0b100)))
    assert isinstance(alarm, AlarmRaised)
    assert (alarm.kind, alarm.level, alarm.channels) == (AlarmKind.DEAD, Level.BROKEN_INPUT, ("gx",))
    assert alarm.numbers["delay_windows"] == 3.0
    assert alarms(watched.observe(records(CLEAR_ROWS - 1))) == []
    assert alarms(watched.observe(records(1))) == [AlarmCleared("wrist", AlarmKind.DEAD, ("gx",))]
    assert alarms(watched.observe(records(100))) == []


def delays(watched: Monitor, batch: np.ndarray) -> list[float | None]:
    return [alarm.numbers.get("delay_windows") for alarm in alarms(watched.observe(batch))]  # type: ignore[union-attr]


def test_the_delay_counts_from_the_first_odd_row_of_this_fault_not_of_an_older_one() -> None:
    watched = monitor()
    assert delays(watched, np.concatenate([records(2, dead_bits=1), records(490)])) == []
    assert delays(watched, records(3, dead_bits=1)) == [3.0]


def test_a_clean_row_in_between_does_not_hide_the_first_odd_one() -> None:
    bits = np.array([1, 0, 1, 0, 0, 1], np.uint64)
    assert delays(monitor(), records(6, range_bits=bits)) == [6.0]


def test_of_a_fault_that_lasts_only_the_rows_that_change_something_are_followed() -> None:
    watched = monitor()
    batch = records(DRIFT_ROWS_AT_ONCE, dead_bits=1)
    found = [event for _ in range(20) for event in alarms(watched.observe(batch))]
    assert len(found) == 1
    assert "rows_unguarded" not in watched.statistics()["counters"]


def test_guard_bits_that_change_all_the_time_are_followed_at_a_bounded_rate() -> None:
    watched = monitor()
    flicker = np.arange(1000) % 2 * 4
    for tick in range(40):  # 1000 rows every 50 ms: 20,000 a second
        watched.observe(records(1000, range_bits=flicker.astype(np.uint64), arrival_ns=tick * 50_000_000))
    skipped = watched.statistics()["counters"]["rows_unguarded"]
    assert 40_000 - skipped == pytest.approx(GUARD_ROWS_AT_ONCE + GUARD_ROWS_PER_S * 39 * 0.05, rel=0.05)
    assert watched.statistics()["guards"] == {"range": ["gx"]}
    watched.observe(records(8, arrival_ns=10**11))
    assert watched.statistics()["guards"] == {}


def test_skipped_rows_do_not_hide_a_fault_that_stays() -> None:
    watched = monitor()
    rng = np.random.default_rng(3)
    while "rows_unguarded" not in watched.statistics()["counters"]:  # until the allowance is spent
        watched.observe(records(1000, range_bits=rng.integers(0, 64, 1000).astype(np.uint64)))
    watched.observe(records(100, dead_bits=1))
    (alarm,) = [one for one in alarms(watched.observe(records(100, dead_bits=1, arrival_ns=10**9)))
                if isinstance(one, AlarmRaised)]  # fmt: skip
    assert (alarm.kind, alarm.channels) == (AlarmKind.DEAD, ("ax",))


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("dead_bits", AlarmKind.DEAD),
        ("stuck_bits", AlarmKind.STUCK),
        ("scale_bits", AlarmKind.SCALE),
        ("not_finite_bits", AlarmKind.NOT_FINITE),
        ("range_bits", AlarmKind.RANGE),
    ],
)
def test_every_guard_bit_becomes_its_alarm(field: str, kind: AlarmKind) -> None:
    found = alarms(monitor().observe(records(8, **{field: 0b100})))
    assert [(one.kind, one.channels) for one in found if isinstance(one, AlarmRaised)] == [(kind, ("gx",))]


def test_inputs_a_guard_refused_still_count_for_the_guard() -> None:
    batch = records(8, outcome=Outcome.REFUSED_BY_GUARD, engine=NO_ENGINE, not_finite_bits=1)
    assert [alarm.kind for alarm in alarms(monitor().observe(batch))] == [AlarmKind.NOT_FINITE]


def test_an_overloaded_request_is_no_clean_window() -> None:
    watched = monitor()
    watched.observe(records(3, dead_bits=1))
    assert alarms(watched.observe(records(100, outcome=Outcome.OVERLOADED))) == []


def test_one_odd_window_is_no_alarm() -> None:
    watched = monitor()
    for _ in range(20):
        assert alarms(watched.observe(np.concatenate([records(1, dead_bits=7), records(20)]))) == []


def test_every_row_of_a_batch_is_judged() -> None:
    assert len(alarms(monitor().observe(records(3, row=np.arange(3), rows=3, stuck_bits=2)))) == 1


def moving(count: int, seed: int = 0, **fields: Any) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(count, 4))
    return viewed(features, np.zeros(count), **fields)


def kinds(events: list[Event]) -> list[tuple[AlarmKind, bool]]:
    return [(one.kind, isinstance(one, AlarmRaised)) for one in alarms(events)]  # type: ignore[union-attr]


def test_inputs_that_repeat_raise_an_alarm_of_the_whole_input_and_are_counted() -> None:
    watched = monitor(repeats=True)
    assert kinds(watched.observe(moving(50))) == []
    (alarm,) = alarms(watched.observe(np.repeat(moving(1, seed=1), 20)))
    assert isinstance(alarm, AlarmRaised)
    assert (alarm.kind, alarm.level, alarm.channels) == (AlarmKind.REPEATED, Level.BROKEN_INPUT, ())
    assert alarm.numbers["delay_windows"] == 8.0
    assert watched.statistics()["guards"] == {"repeated": []}
    assert watched.statistics()["counters"]["rows_repeated"] == 19
    again = monitor(repeats=True)
    again.restore(json.loads(json.dumps(watched.state())))
    assert kinds(again.announce()) == [(AlarmKind.REPEATED, True)]
    assert kinds(again.observe(moving(8, seed=2))) == [(AlarmKind.REPEATED, False)]


def test_a_table_may_repeat_and_what_a_guard_explains_is_no_repetition() -> None:
    frozen = np.repeat(moving(1), 50)
    assert kinds(monitor().observe(frozen)) == []
    frozen["dead_bits"] = 0b1
    frozen["not_finite_bits"] = (1 << len(CHANNELS)) - 2
    found = kinds(monitor(repeats=True).observe(frozen))
    assert {kind for kind, _ in found} == {AlarmKind.DEAD, AlarmKind.NOT_FINITE}


def test_a_frozen_buffer_with_one_dead_channel_is_both() -> None:
    frozen = np.repeat(moving(1, dead_bits=1), 50)
    assert {kind for kind, _ in kinds(monitor(repeats=True).observe(frozen))} == {AlarmKind.DEAD, AlarmKind.REPEATED}


def test_data_at_another_rate_raise_an_alarm_and_a_batch_of_rows_at_one_time_does_not() -> None:
    timed = {"data_time_s": 1e9 + np.arange(100) * 0.64, "arrival_ns": np.arange(100)}
    assert kinds(monitor(hop_s=1.28).observe(records(100, **timed))) == [(AlarmKind.RATE, True)]
    assert kinds(monitor(hop_s=0.64).observe(records(100, **timed))) == []
    assert kinds(monitor().observe(records(100, **timed))) == []
    assert kinds(monitor(hop_s=1.28).observe(records(100, **timed, rows=4))) == []


def test_two_clients_in_turn_are_told_apart() -> None:
    timed = {"data_time_s": 1e9 + np.arange(100) * 0.64, "arrival_ns": np.arange(100)}
    assert kinds(monitor(hop_s=1.28).observe(records(100, **timed, source=np.arange(100) % 2 + 1))) == []


def test_the_followed_view_is_found_among_others_of_each_engine(stream: RegimeStream, reference: Reference) -> None:
    rows = stream.rows(4, seed=3)
    width = rows.features.shape[1]
    plain = viewed(rows.features, rows.predicted)
    beside = viewed(np.column_stack([np.full((len(plain), 5), 9.0), rows.features]), rows.predicted, engine=1)
    alone, moved = monitor(reference), monitor(reference, view_at=(0, 5, -1))
    alone.observe(plain)
    moved.observe(beside)
    assert moved.statistics()["drift"]["rows"] == alone.statistics()["drift"]["rows"] == len(plain)
    assert moved.take_window()["drift"][0]["sums"] == alone.take_window()["drift"][0]["sums"]
    moved.observe(viewed(rows.features, rows.predicted, engine=2))
    assert moved.statistics()["drift"]["rows"] == len(plain)
    assert beside["view_width"][0] == width + 5


def test_outputs_are_a_view_the_monitor_makes_and_classes_are_counted() -> None:
    generator = np.random.default_rng(1)
    labels, confidence = generator.integers(0, 2, 400), generator.uniform(0.5, 1.0, 400)
    about = dict.fromkeys(("confidence", "entropy"), confidence)
    watched = monitor(outputs_reference(), of_outputs=True, view="outputs")
    watched.observe(records(400, predicted=labels, **about))
    (part,) = watched.take_window()["drift"]
    assert part["rows"] == 400
    assert part["sums"][2:] == [int((labels == one).sum()) * 1024 for one in range(2)]
    assert watched.statistics()["classes"] == [int((labels == one).sum()) for one in range(2)]


def outputs_reference() -> Reference:
    """About confidence, entropy and two classes; watched only."""
    return Reference(
        features=("confidence", "entropy", "class.walk", "class.rest"), channels=(), groups={},
        labels=("walk", "rest"), channel_of=np.full(4, -1, np.int16), centre=np.zeros(4, np.float32),
        scale=np.ones(4, np.float32), class_share=np.full(2, 0.5, np.float32), rows=1000,
        guard=NO_GUARD, claim=Claim(0, 0, 0, 0, 0, 0.95, ""),
    )  # fmt: skip


def test_odd_rows_are_counted_by_channel() -> None:
    watched = monitor()
    watched.observe(np.concatenate([records(5, range_bits=0b101), records(2, dead_bits=0b1), records(3)]))
    names = [CHANNELS[0], CHANNELS[2]]
    odd = {name: counts for name, counts in watched.statistics()["odd_rows"].items() if counts}
    assert odd == {"out_of_range": dict.fromkeys(names, 5), "dead": {names[0]: 2}}


# --- drift -------------------------------------------------------------------------------------------------
def dead_gx(features: np.ndarray) -> np.ndarray:
    dead = features.copy()
    dead[:, 8:12] = (0.0, -9.2, -9.2, -9.2)
    return dead


def test_known_regimes_are_quiet_and_a_broken_channel_is_named_with_evidence(
    stream: RegimeStream, reference: Reference
) -> None:
    watched = monitor(reference)
    rows = stream.rows(20, seed=5)
    assert alarms(watched.observe(viewed(rows.features, rows.predicted))) == []
    (alarm,) = alarms(watched.observe(viewed(dead_gx(rows.features), rows.predicted)))
    assert isinstance(alarm, AlarmRaised)
    assert (alarm.kind, alarm.level, alarm.channels[0]) == (AlarmKind.DRIFT, Level.DRIFT, "gx")
    assert alarm.numbers["evidence"] >= 1.0
    assert alarm.numbers["delay_windows"] == alarm.numbers["rows_since_change"]
    json.dumps(alarm.numbers)
    cleared = alarms(watched.observe(viewed(rows.features, rows.predicted)))
    assert cleared == [AlarmCleared("wrist", AlarmKind.DRIFT, alarm.channels)]


def test_a_drift_that_lasts_is_said_once_more_with_what_else_is_wrong(
    stream: RegimeStream, reference: Reference
) -> None:
    watched = monitor(reference)
    rows = stream.rows(20, seed=12)
    broken = rows.features.copy()
    broken[:, 8:12] = (0.0, -9.2, -9.2, -9.2)
    events = watched.observe(viewed(broken, rows.predicted, dead_bits=1 << 2))
    (persists,) = (event for event in events if isinstance(event, DriftPersists))
    assert (persists.windows, persists.single_channel, persists.channels[0]) == (64, "gx", "gx")
    assert (persists.guards, persists.reference) == (("dead:gx",), reference.digest())


def test_a_drift_is_explained_in_the_channels_unit_with_the_time_of_its_change(
    stream: RegimeStream, reference: Reference
) -> None:
    watched = monitor(reference, units={"gx": "rad/s"})
    assert watched.statistics()["explanation"] == {}
    rows = stream.rows(20, seed=12)
    moved = rows.features.copy()
    moved[:, reference.features.index("gx.mean")] += 12.0
    batch = np.concatenate([viewed(rows.features, rows.predicted), viewed(moved, rows.predicted)])
    batch["arrival_ns"] = np.arange(len(batch)) * 1_000_000_000
    batch["data_time_s"] = 1000.0 + np.arange(len(batch))
    events = watched.observe(batch)
    (alarm,) = alarms(events)
    told = messages.DriftExplanation.model_validate(alarm.explanation)
    first = told.features[0]
    assert (first.feature, first.unit) == ("gx.mean", "rad/s")
    assert first.shift == pytest.approx(12.0, abs=3.0)
    assert 1000.0 + len(rows) - 4 <= told.changed_at_s <= 1000.0 + len(rows)  # a mark every fourth row
    assert told.changed_ago_s == pytest.approx(told.rows, abs=4)
    (persists,) = (event for event in events if isinstance(event, DriftPersists))
    assert persists.explanation["rows"] > told.rows
    standing = messages.DriftExplanation.model_validate(watched.statistics()["explanation"])
    assert standing.rows >= len(rows)
    said = messages.Event(device="d" * 64, boot="b", seq=1, at=0.0, severity="warning", kind="drift", text=alarm.text,
                 numbers=alarm.numbers, details={"explanation": alarm.explanation})  # fmt: skip
    assert len(said.encode()) < 4096


def test_a_lasting_drift_is_said_once_also_when_rows_that_are_not_finite_follow(
    stream: RegimeStream, reference: Reference
) -> None:
    watched = monitor(reference)
    rows = stream.rows(20, seed=12)
    broken = viewed(dead_gx(rows.features), rows.predicted)
    lost = viewed(np.full_like(rows.features[:5], np.nan), rows.predicted[:5])
    said = [
        event
        for row in range(150)
        for batch in (broken[row : row + 1], lost)
        for event in watched.observe(batch)
        if isinstance(event, DriftPersists)
    ]
    assert len(said) == 1


def test_records_without_a_view_are_not_judged_for_drift(stream: RegimeStream, reference: Reference) -> None:
    watched = monitor(reference)
    watched.observe(records(100))
    assert watched.statistics()["drift"]["rows"] == 0


def test_more_rows_than_can_be_followed_are_thinned_and_counted(stream: RegimeStream, reference: Reference) -> None:
    watched = monitor(reference)
    rows = stream.rows(2 * DRIFT_ROWS_AT_ONCE // 16, seed=5)
    watched.observe(viewed(rows.features, rows.predicted))
    assert watched.statistics()["drift"]["rows"] == DRIFT_ROWS_AT_ONCE
    assert watched.statistics()["counters"]["rows_thinned"] == DRIFT_ROWS_AT_ONCE
    assert watched.take_window()["drift"][0]["rows"] == 2 * DRIFT_ROWS_AT_ONCE


def test_the_regime_monitor_follows_a_busy_service_at_a_bounded_rate(
    stream: RegimeStream, reference: Reference
) -> None:
    watched, rows = monitor(reference), stream.rows(60, seed=5)
    for tick in range(40):  # 960 rows every 50 ms: 19,200 a second
        watched.observe(viewed(rows.features, rows.predicted, arrival_ns=tick * 50_000_000))
    seconds = 39 * 0.05
    followed = watched.statistics()["drift"]["rows"]
    assert followed == pytest.approx(DRIFT_ROWS_AT_ONCE + DRIFT_ROWS_PER_S * seconds, rel=0.1)


# --- telemetry ---------------------------------------------------------------------------------------------
def test_windows_are_valid_messages_and_start_anew(stream: RegimeStream, reference: Reference) -> None:
    watched = monitor(reference)
    rows = stream.rows(2, seed=5)
    watched.observe(viewed(rows.features, rows.predicted, dead_bits=0b100, scale_bits=0b011), gaps=4)
    part = watched.take_window()
    (latency,) = (LatencySketch(**fields) for fields in part["latency"])
    assert LogSketch.from_fields(latency.model_dump()).count == 32
    (drift,) = (DriftWindow(**fields) for fields in part["drift"])
    assert (drift.rows, drift.first, drift.last, drift.reference) == (32, 0, 31, reference.digest())
    assert drift.counters == {"dead:gx": 32, "scale:accel": 32, "gap": 4}
    assert drift.classes == [16, 16]
    expected = MomentWindow.empty(reference.fixed_point(), classes=2).add(
        rows.features.astype(np.float32).astype(np.float64), rows.predicted
    )
    assert (tuple(drift.sums), tuple(drift.squares)) == (expected.sums, expected.squares)
    assert part["counters"] == {"gaps": 4, "requests": 32, "rows": 32, "ok": 32, "rows_dead": 32, "rows_scale": 32}
    assert watched.take_window() == {"counters": {}, "latency": [], "drift": []}
    assert watched.statistics()["counters"]["requests"] == 32


def test_a_row_that_is_not_finite_is_counted_once(stream: RegimeStream, reference: Reference) -> None:
    watched = monitor(reference)
    rows = stream.rows(1, seed=5)
    features = rows.features.copy()
    features[:2, 0] = np.nan
    bits = np.array([1, 0, 1, *[0] * 13])  # bit and NaN; NaN alone; bit alone (it was imputed)
    watched.observe(viewed(features, rows.predicted, not_finite_bits=bits))
    (drift,) = watched.take_window()["drift"]
    assert drift["counters"] == {"not_finite": 3}
    assert drift["rows"] == 14


def test_two_windows_merge_to_the_one_of_all_rows(stream: RegimeStream, reference: Reference) -> None:
    rows = stream.rows(4, seed=6)
    batch = viewed(rows.features, rows.predicted)
    halves, whole = monitor(reference), monitor(reference)
    halves.observe(batch[:20])
    (first,) = halves.take_window()["drift"]
    halves.observe(batch[20:])
    (second,) = halves.take_window()["drift"]
    whole.observe(batch)
    (all_rows,) = whole.take_window()["drift"]
    assert [a + b for a, b in zip(first["sums"], second["sums"], strict=True)] == all_rows["sums"]
    assert (first["first"], second["last"]) == (all_rows["first"], all_rows["last"])


def test_it_reads_what_a_ring_delivers() -> None:
    ring = create_ring(16)
    writer, reader = RingWriter(ring), RingReader(ring)
    for _ in range(5):
        writer.write(Observation(arrival_ns=1, latency_us=50.0, engine=0, first_engine=0, dead_bits=4))
    events = monitor().observe(reader.read())
    assert isinstance(events[0], EngineServed)
    assert [alarm.kind for alarm in alarms(events)] == [AlarmKind.DEAD]
    writer.close()
    reader.close()


# --- restarts ----------------------------------------------------------------------------------------------
def test_a_restart_continues_announces_what_is_raised_and_clears_it_later(
    stream: RegimeStream, reference: Reference
) -> None:
    before, rows = monitor(reference), stream.rows(20, seed=5)
    before.observe(viewed(dead_gx(rows.features), rows.predicted, dead_bits=0b100))
    after = monitor(reference)
    after.restore(json.loads(json.dumps(before.state())))
    announced = after.announce()
    assert {(event.kind, event.channels[0]) for event in announced if isinstance(event, AlarmRaised)} == {
        (AlarmKind.DEAD, "gx"),
        (AlarmKind.DRIFT, "gx"),
    }
    cleared = alarms(after.observe(viewed(rows.features, rows.predicted)))
    assert {event.kind for event in cleared} == {AlarmKind.DEAD, AlarmKind.DRIFT}


def test_a_state_of_other_channels_starts_anew() -> None:
    before = monitor()
    before.observe(records(8, dead_bits=1))
    after = monitor(channels=("one",), groups={"one": "only"})
    after.restore(before.state())
    after.restore({})
    assert after.announce() == []


# --- the device --------------------------------------------------------------------------------------------
def test_heat_reaches_every_service_once_and_ends_once() -> None:
    device = DeviceMonitor(("wrist", "other"), power_w=0.0, temperature_c=80.0, memory_bytes=0.0)
    hot = [device.observe(power_w=99.0, temperature_c=90.0, memory_bytes=1e9) for _ in range(10)]
    found = [event for events in hot for event in events]
    assert [(event.service, event.kind) for event in found if isinstance(event, AlarmRaised)] == [
        ("wrist", AlarmKind.THERMAL),
        ("other", AlarmKind.THERMAL),
    ]
    assert isinstance(found[0], AlarmRaised)
    assert found[0].text == "thermal: 90 °C is over the limit of 80 °C"
    assert found[0].numbers == {"value": 90.0, "limit": 80.0, "samples": 3.0}
    cool = [device.observe(power_w=None, temperature_c=60.0, memory_bytes=None) for _ in range(20)]
    assert [event for events in cool for event in events] == [
        AlarmCleared("wrist", AlarmKind.THERMAL),
        AlarmCleared("other", AlarmKind.THERMAL),
    ]
    assert not any(device.statistics().values())


def test_a_device_that_says_nothing_raises_nothing() -> None:
    device = DeviceMonitor(("wrist",), power_w=1.0, temperature_c=1.0, memory_bytes=1.0)
    for _ in range(10):
        assert device.observe(power_w=None, temperature_c=None, memory_bytes=None) == []


# --- harm --------------------------------------------------------------------------------------------------
WITNESSED = ("wrist", "wrist-accel", "wrist-gyro", "wrist-floor")


@pytest.fixture(scope="module")
def judge(stream: RegimeStream) -> Reference:
    return witnessed_reference(stream)


def harmed(stream: RegimeStream, rows: int = 60, first: int = 0) -> np.ndarray:
    """Rows whose accelerometer left every regime; the first engine's class changes every second row."""
    features = stream.rows(8, seed=5).features[:rows].copy()
    features[:, :8] += 40.0
    return viewed(features, np.arange(rows) // 2 % 2, arrival_ns=np.arange(first, first + rows), first=first)


def said(asked: np.ndarray, engine: int, predicted: np.ndarray) -> np.ndarray:
    """What a witness says of `asked`."""
    return records(
        len(asked), arrival_ns=asked["arrival_ns"], engine=engine, outcome=Outcome.SHADOW, predicted=predicted
    )


def quiet(stream: RegimeStream) -> np.ndarray:
    rows = stream.rows(4, seed=4)
    return viewed(rows.features, rows.predicted, arrival_ns=-1 - np.arange(len(rows)))


def test_harm_is_raised_with_the_engine_to_switch_to_and_ends_with_the_drift(
    stream: RegimeStream, judge: Reference
) -> None:
    one = monitor(judge, engines=WITNESSED, accuracy={"wrist-gyro": 0.9})
    one.observe(quiet(stream))
    assert one.witnesses == ()
    rows = harmed(stream)
    (drift,) = alarms(one.observe(rows[:20]))
    assert drift.kind is AlarmKind.DRIFT
    assert one.witnesses == ("wrist-accel", "wrist-gyro")
    events: list[Event] = []
    for row in np.split(rows[20:], 40):
        both = np.concatenate([row, said(row, 1, 1 - row["predicted"]), said(row, 2, 1 - row["predicted"])])
        events += alarms(one.observe(both))
    (harm,) = events
    assert isinstance(harm, AlarmRaised)
    assert (harm.kind, harm.level, harm.better) == (AlarmKind.HARM, Level.HARMFUL, "wrist-gyro")
    assert harm.numbers["disagreement"] == 1.0
    assert harm.numbers["gain_at_least"] == pytest.approx(0.8)
    assert one.witnesses == ()
    back = [one.observe(quiet(stream)) for _ in range(4)]
    kinds = [(type(event), event.kind) for event in alarms([event for part in back for event in part])]
    assert kinds == [(AlarmCleared, AlarmKind.DRIFT), (AlarmCleared, AlarmKind.HARM)]


def test_records_may_come_in_any_batches(stream: RegimeStream, judge: Reference) -> None:
    rows = harmed(stream)
    told = np.concatenate([np.concatenate([row, said(row, 2, 1 - row["predicted"])]) for row in np.split(rows, 60)])
    found = []
    for size in (1, 7, 120):
        one = monitor(judge, engines=WITNESSED)
        events = alarms(one.observe(quiet(stream)))
        for start in range(0, len(told), size):
            events += alarms(one.observe(told[start : start + size]))
        found.append(events)
    assert found[0] == found[1] == found[2]
    assert [event.kind for event in found[0]] == [AlarmKind.DRIFT, AlarmKind.HARM]


def test_what_witnesses_say_is_no_request_of_anybody(stream: RegimeStream, judge: Reference) -> None:
    one = monitor(judge, engines=WITNESSED)
    assert one.observe(said(harmed(stream, 5), 1, np.zeros(5))) == []
    window = one.take_window()
    assert window["counters"] == {"rows_witnessed": 5}
    assert window["latency"] == []


def test_another_engine_is_not_judged_by_the_first_ones_reference(stream: RegimeStream, judge: Reference) -> None:
    one = monitor(judge, engines=WITNESSED)
    one.observe(quiet(stream))
    one.restart_windows("wrist-accel")
    rows = harmed(stream)
    rows["engine"] = 1
    told = np.concatenate([np.concatenate([row, said(row, 2, 1 - row["predicted"])]) for row in np.split(rows, 60)])
    assert [event.kind for event in alarms(one.observe(told))] == [AlarmKind.DRIFT]
    assert one.witnesses == ()


def test_harm_is_announced_again_after_a_restart(stream: RegimeStream, judge: Reference) -> None:
    one = monitor(judge, engines=WITNESSED)
    one.observe(quiet(stream))
    rows = harmed(stream)
    for row in np.split(rows, 60):
        one.observe(np.concatenate([row, said(row, 2, 1 - row["predicted"])]))
    other = monitor(judge, engines=WITNESSED)
    other.restore(json.loads(json.dumps(one.state())))
    again = [(event.kind, event.better) for event in other.announce() if isinstance(event, AlarmRaised)]
    assert again == [(AlarmKind.DRIFT, ""), (AlarmKind.HARM, "wrist-gyro")]
