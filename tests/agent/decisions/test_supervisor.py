"""Stories of one service: what breaks, who answers then, and how it comes back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from agent.contract.errors import StateUnreadable
from agent.decisions.events import (
    Activate,
    AgentStarted,
    AlarmKind,
    DriftPersists,
    EngineFailed,
    EngineServed,
    Persist,
    Pinned,
    Publish,
    RestartWindows,
    StartWorker,
    Tick,
    Unpinned,
    WorkerLost,
    WorkerReady,
    decode_event,
    encode,
)
from agent.decisions.fallback import Limits
from agent.decisions.service import switching
from agent.decisions.supervisor import Supervisor
from tests.agent.decisions.wrist import DOCUMENT, ENGINES, GYRO, Story, card, cleared, policy, raised, row

DEAD, STUCK, SCALE = AlarmKind.DEAD, AlarmKind.STUCK, AlarmKind.SCALE


def failed(count: int = 1, engine: str = "wrist") -> EngineFailed:
    return EngineFailed("wrist", engine, "engine_failed", count, "it raised")


def loaded(generation: int, *engines: str) -> WorkerReady:
    return WorkerReady(generation, {"wrist": engines or ENGINES})


# --- broken input ------------------------------------------------------------------------------------------
def test_a_dead_gyro_switches_heals_and_returns_through_probation() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    assert (story.serving, story.phase, story.health) == ("wrist-accel", "fallback", "degraded")
    story.live(30.0)
    story.do(cleared(DEAD, *GYRO))
    story.live(89.0)
    assert story.phase == "fallback"
    story.live(2.0)
    assert (story.serving, story.phase) == ("wrist", "probation")
    story.live(61.0)
    assert (story.serving, story.phase) == ("wrist", "preferred")
    story.live(16.0)
    assert story.health == "healthy"
    assert story.steps() == ["switched", "probation", "returned"]


def test_a_switch_is_written_then_done_then_told() -> None:
    commands = Story().started().do(raised(DEAD, *GYRO))
    kinds = [type(command) for command in commands]
    assert kinds[0] is Persist
    assert kinds.index(Activate) < kinds.index(RestartWindows)
    sensor, switch = (command for command in commands if isinstance(command, Publish) and command.kind != "health")
    assert (sensor.kind, sensor.channels, sensor.severity) == ("sensor", GYRO, "warning")
    assert switch.kind == "fallback"
    assert switch.channels == GYRO
    assert (
        switch.text
        == "wrist -> wrist-accel: gx gy gz dead: wrist-accel 0.90, wrist 0.55 (row 'gyro_off' of the card)"
    )
    assert switch.numbers["accuracy_from"] == 0.55
    assert switch.numbers["accuracy_to"] == 0.90
    assert switch.numbers["dwell_s"] == 120.0
    assert switch.numbers["delay_windows"] == 3.0
    assert switch.details == {
        "step": "switched", "from": "wrist", "to": "wrist-accel", "why": "fault", "phase": "fallback"
    }  # fmt: skip


def test_a_fault_under_which_nothing_is_better_is_told_and_changes_nothing() -> None:
    story = Story().started()
    commands = story.do(raised(STUCK, "ax"))
    assert (story.serving, story.phase, story.health) == ("wrist", "preferred", "degraded")
    (sensor,) = (one for one in commands if isinstance(one, Publish) and one.kind == "sensor")
    assert "stays" in sensor.details["decision"]


def test_drift_is_published_and_never_switches() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.DRIFT, "gx"))
    story.live(3600.0, step_s=10.0)
    assert (story.serving, story.phase, story.health) == ("wrist", "preferred", "degraded")
    assert [one.severity for one in story.published("drift")] == ["warning"]
    assert story.steps() == []


def test_a_lasting_drift_is_published_with_what_a_host_plans_from() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.DRIFT, "gx"))
    story.do(DriftPersists("wrist", 64, ("gx", "ax"), ("dead:gx",), "gx", "ab" * 32))
    said = story.published("drift")[-1]
    assert said.details["persisted_windows"] == 64
    assert said.details["guards"] == ["dead:gx"]
    assert said.details["single_channel"] is True
    assert said.details["reference"] == "ab" * 32
    assert story.serving == "wrist"


def test_drift_that_stays_open_does_not_keep_the_preferred_engine_away() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.DRIFT, "gx"))
    story.do(raised(DEAD, *GYRO))
    story.do(cleared(DEAD, *GYRO))
    story.live(200.0)
    assert story.phase == "preferred"


def test_the_return_waits_for_the_fault_to_end() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    story.live(3600.0, step_s=10.0)
    assert story.phase == "fallback"
    story.do(cleared(DEAD, *GYRO))
    story.live(16.0)
    assert story.phase == "probation"


def test_the_return_waits_for_traffic() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    story.do(cleared(DEAD, *GYRO))
    story.do(Tick(), after_s=3600.0)
    assert story.phase == "fallback"
    story.serve(8)
    assert story.phase == "probation"
    story.do(Tick(), after_s=3600.0)
    assert story.phase == "probation"
    story.serve(8)
    assert story.phase == "preferred"


def test_another_fault_that_does_not_hurt_the_preferred_engine_does_not_keep_it_away() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    story.do(raised(STUCK, "ax"))  # the card: wrist .91 under it
    story.do(cleared(DEAD, *GYRO))
    story.live(200.0)
    assert story.serving == "wrist"


def test_a_fault_in_probation_goes_back_for_twice_as_long() -> None:
    story = Story().started()
    dwells = []
    for _ in range(3):
        story.do(raised(DEAD, *GYRO))
        dwells.append(story.supervisor.status("wrist")["dwell_s"])
        story.do(cleared(DEAD, *GYRO))
        while story.phase == "fallback":
            story.live(1.0, count=8)
    assert dwells == [120.0, 240.0, 480.0]
    assert story.steps() == ["switched", "probation", "return-failed", "probation", "return-failed", "probation"]
    story.live(61.0)
    story.do(raised(DEAD, *GYRO))
    assert story.supervisor.status("wrist")["dwell_s"] == 120.0


def test_a_fault_that_spreads_is_one_switch() -> None:
    story = Story().started()
    story.do(raised(DEAD, "gx"))
    story.do(raised(DEAD, "gx", "gy"))
    story.do(raised(DEAD, *GYRO))
    assert story.steps() == ["switched"]
    assert len(story.published("sensor")) == 3


def test_the_same_alarm_again_says_nothing() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    assert story.do(raised(DEAD, *GYRO)) == ()


def test_an_alarm_that_loses_channels_is_over_when_the_last_one_heals() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    story.do(cleared(DEAD, "gx", "gy"))
    assert story.supervisor.status("wrist")["alarms"][0]["channels"] == ["gz"]
    story.do(cleared(DEAD, "gz"))
    assert story.supervisor.status("wrist")["alarms"] == []


def test_clearing_what_was_never_raised_says_nothing() -> None:
    assert Story().started().do(cleared(DEAD, "gx")) == ()


def test_values_out_of_range_are_told_and_do_not_switch() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.RANGE, "gx"))
    assert (story.serving, story.steps()) == ("wrist", [])
    assert [one.kind for one in story.published("sensor")] == ["sensor"]


@pytest.mark.parametrize("kind", [AlarmKind.REPEATED, AlarmKind.RATE])
def test_faults_of_the_whole_input_are_told_and_switch_only_where_the_card_has_a_row(kind: AlarmKind) -> None:
    story = Story().started()
    story.do(raised(kind))
    assert (story.serving, story.steps()) == ("wrist", [])
    assert len(story.published("sensor")) == 1
    story.do(raised(DEAD, *GYRO))  # which they do not hide
    assert story.serving == "wrist-accel"
    story.do(cleared(kind))
    known = DOCUMENT | {"faults": [*DOCUMENT["faults"], row("other", kind.value, (), 0.4, 0.8, 0.14)]}
    of_card = policy(card=card(known), switching=switching(card(known)))
    story = Story(of_card).started()
    story.do(raised(kind))
    assert story.serving == "wrist-accel"


def test_an_alarm_on_a_fallback_starts_the_quiet_time_anew() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    story.live(110.0)
    story.do(cleared(DEAD, *GYRO))
    story.live(10.0)
    story.do(raised(STUCK, "ax"))  # harmless to the preferred engine, but the sensors are not quiet
    story.live(14.0)
    assert story.phase == "fallback"
    story.live(2.0)
    assert story.phase == "probation"


# --- engines -----------------------------------------------------------------------------------------------
def test_an_engine_that_fails_three_of_its_last_twenty_requests_is_left() -> None:
    story = Story().started()
    story.do(failed())
    story.serve(5)
    story.do(failed())
    assert (story.serving, story.health) == ("wrist", "degraded")
    story.serve(5)
    story.do(failed())
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    switch = story.published("fallback")[0]
    assert switch.text.startswith("wrist -> wrist-accel: wrist failed 3 of its last 20 requests (engine_failed)")
    assert switch.details["why"] == "engine_failed"


def test_rare_failures_never_switch() -> None:
    story = Story().started()
    for _ in range(100):
        story.do(failed())
        story.serve(19)
    assert story.steps() == []


def test_the_first_failure_is_told_once() -> None:
    story = Story().started()
    story.do(failed())
    story.serve(1)
    story.do(failed())
    assert [one.severity for one in story.published("engine")] == ["notice"]


def test_one_failure_in_probation_is_enough() -> None:
    story = Story().started()
    story.do(failed(3))
    story.live(121.0)
    assert story.phase == "probation"
    story.do(failed())
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    assert story.supervisor.status("wrist")["dwell_s"] == 240.0


def test_when_every_model_fails_the_floor_answers_and_health_is_failing() -> None:
    story = Story().started()
    story.do(failed(3))
    story.do(failed(3, "wrist-accel"))
    assert (story.serving, story.health) == ("wrist-floor", "failing")
    assert story.published("fallback")[-1].severity == "error"
    story.live(121.0)
    assert (story.serving, story.phase) == ("wrist", "probation")


def test_without_a_floor_the_last_engine_keeps_serving() -> None:
    two = ("wrist", "wrist-accel")
    story = Story(policy(card=card(engines=two))).started()
    story.do(failed(3))
    story.do(failed(3, "wrist-accel"))
    assert story.serving == "wrist-accel"
    assert story.health == "failing"
    story.live(500.0)
    assert story.serving == "wrist"


def test_an_engine_that_did_not_load_is_replaced_until_a_worker_has_it() -> None:
    story = Story()
    story.do(AgentStarted())
    commands = story.do(loaded(1, "wrist-accel", "wrist-floor"))
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    assert any(isinstance(one, Publish) and one.details.get("missing") == ["wrist"] for one in commands)
    story.live(500.0)
    assert story.phase == "fallback"
    story.do(loaded(2))
    assert story.phase == "probation"


def test_a_worker_without_any_engine_is_a_critical_event_not_a_crash() -> None:
    story = Story()
    story.do(AgentStarted())
    story.do(WorkerReady(1, {}))
    assert (story.serving, story.health) == ("wrist", "failing")
    assert story.published("engine")[0].severity == "critical"


# --- budgets -----------------------------------------------------------------------------------------------
def test_latency_over_budget_goes_to_a_cheaper_engine_and_the_alarm_ends_with_the_switch() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.LATENCY, engine="wrist"))
    assert (story.serving, story.supervisor.status("wrist")["alarms"]) == ("wrist-accel", [])
    assert [one.details["raised"] for one in story.published("health") if "raised" in one.details] == [True, False]
    story.live(121.0)
    assert story.phase == "probation"


def test_a_latency_alarm_about_an_engine_that_was_left_is_ignored() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.LATENCY, engine="wrist-accel"))
    assert story.steps() == []


def test_heat_keeps_the_preferred_engine_away_and_steps_down_once_per_dwell() -> None:
    four = (*ENGINES[:2], "wrist-tiny", "wrist-floor")
    story = Story(policy(card=card(engines=four))).started()
    story.do(raised(AlarmKind.THERMAL))
    assert story.serving == "wrist-accel"
    story.live(121.0)
    assert story.serving == "wrist-tiny"
    story.live(1000.0)
    assert story.serving == "wrist-tiny"
    story.do(cleared(AlarmKind.THERMAL))
    story.live(16.0)
    assert story.phase == "probation"
    assert [one.kind for one in story.published("power")] == ["power", "power"]


def test_pressure_without_a_cheaper_engine_changes_nothing() -> None:
    story = Story(policy(card=card(costs={"wrist": 5.0, "wrist-accel": 9.0}))).started()
    story.do(raised(AlarmKind.POWER))
    assert (story.serving, story.health) == ("wrist", "degraded")


def test_an_engine_left_for_latency_comes_back_through_probation_only() -> None:
    story = Story().started()
    story.do(raised(AlarmKind.LATENCY, engine="wrist"))
    story.do(raised(STUCK, "ax"))  # the card: wrist .91, wrist-accel .70
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    story.live(121.0)
    assert (story.serving, story.phase) == ("wrist", "probation")


# --- operators ---------------------------------------------------------------------------------------------
def test_a_pinned_engine_stays_whatever_happens_until_it_is_released() -> None:
    story = Story().started()
    story.do(Pinned("wrist", "wrist"))
    story.do(raised(DEAD, *GYRO))
    story.do(failed(10))
    story.live(1000.0, step_s=10.0)
    assert (story.serving, story.phase) == ("wrist", "pinned")
    story.do(Unpinned("wrist"))
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    assert story.steps() == ["pinned", "unpinned", "switched"]


def test_a_pin_moves_at_once_and_a_second_pin_moves_again() -> None:
    story = Story().started()
    story.do(Pinned("wrist", "wrist-accel"))
    story.do(Pinned("wrist", "wrist-floor"))
    assert (story.serving, story.health) == ("wrist-floor", "healthy")
    story.do(Unpinned("wrist"))
    assert (story.serving, story.phase) == ("wrist", "preferred")


def test_a_pinned_engine_that_is_not_loaded_is_waited_for() -> None:
    story = Story().started()
    story.do(Pinned("wrist", "wrist-accel"))
    story.do(loaded(2, "wrist", "wrist-floor"))
    assert (story.serving, story.phase) == ("wrist", "pinned")
    story.do(loaded(3))
    assert story.serving == "wrist-accel"


def test_a_pin_to_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    story = Story().started()
    (answer,) = story.do(Pinned("wrist", "wirst"))
    assert isinstance(answer, Publish)
    assert "wrist, wrist-accel, wrist-floor" in answer.text
    assert story.phase == "preferred"


# --- workers -----------------------------------------------------------------------------------------------
def test_a_lost_worker_is_replaced_at_once_and_the_engine_stays() -> None:
    story = Story().started()
    commands = story.do(WorkerLost(1, "killed by signal 9"))
    assert [one.not_before for one in commands if isinstance(one, StartWorker)] == [story.now_s]
    assert story.health == "degraded"
    commands = story.do(loaded(2))
    assert Activate("wrist", "wrist", "started", "wrist is the preferred engine") in commands
    assert story.serving == "wrist"
    story.live(80.0)
    assert story.health == "healthy"


def test_a_crash_loop_steps_down_to_the_floor_with_growing_pauses() -> None:
    story = Story().started()
    for generation in range(1, 6):
        story.do(WorkerLost(generation, "signal 11"), after_s=0.1)
    assert [round(pause, 1) for pause in story.starts()] == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0]
    assert story.serving == "wrist-floor"
    assert story.supervisor.lineup("wrist") == ("wrist-floor",)
    assert story.health == "failing"


def test_a_crash_loop_is_remembered_by_the_next_agent() -> None:
    story = Story().started()
    for generation in (1, 2, 3):
        story.do(WorkerLost(generation, "signal 11"))
    saved = json.loads(json.dumps(story.supervisor.state()))
    again = Story(supervisor=Supervisor([policy()], saved), now_s=story.now_s + 1.0)
    (start,) = (one for one in again.do(AgentStarted()) if isinstance(one, StartWorker))
    assert start.not_before - again.now_s == 1.0
    assert again.serving == "wrist-accel"
    assert again.supervisor.lineup("wrist") == ("wrist-accel", "wrist-floor")


def after_a_crash_loop() -> Story:
    story = Story().started()
    for generation in (1, 2, 3):
        story.do(WorkerLost(generation, "signal 11"))
    story.do(loaded(4, "wrist-accel", "wrist-floor"))
    return story


def test_an_engine_left_out_after_a_crash_loop_is_loaded_again_after_its_stay() -> None:
    story = after_a_crash_loop()
    story.live(121.0)
    reasons = [one.reason for _, one in story.said if isinstance(one, StartWorker)]
    assert reasons[-1] == "load wrist again"
    assert reasons.count("load wrist again") == 1
    assert story.supervisor.lineup("wrist") == ENGINES
    story.do(loaded(5))
    assert (story.serving, story.phase) == ("wrist", "probation")


def test_a_replacement_that_dies_while_loading_doubles_the_stay_and_keeps_the_serving_worker() -> None:
    story = after_a_crash_loop()
    story.live(121.0)
    commands = story.do(WorkerLost(5, "signal 11"))
    assert not [one for one in commands if isinstance(one, StartWorker)]
    status = story.supervisor.status("wrist")
    assert (status["serving"], status["phase"], status["dwell_s"]) == ("wrist-accel", "fallback", 240.0)
    assert story.supervisor.lineup("wrist") == ("wrist-accel", "wrist-floor")
    story.live(239.0)
    assert len([1 for _, one in story.said if isinstance(one, StartWorker) and "again" in one.reason]) == 1
    story.live(3.0)
    assert len([1 for _, one in story.said if isinstance(one, StartWorker) and "again" in one.reason]) == 2


def test_a_worker_lost_in_probation_counts_against_the_engine_on_probation() -> None:
    story = Story().started()
    story.do(raised(DEAD, *GYRO))
    story.do(cleared(DEAD, *GYRO))
    story.live(121.0)
    assert story.phase == "probation"
    story.do(WorkerLost(1, "signal 11"))
    assert (story.serving, story.phase) == ("wrist-accel", "fallback")
    assert story.supervisor.status("wrist")["dwell_s"] == 240.0


def test_losing_a_worker_that_had_handed_over_is_no_loss() -> None:
    story = Story().started()
    story.do(loaded(2))
    assert story.do(WorkerLost(1, "late news")) == ()


# --- restarts, clocks, replays -----------------------------------------------------------------------------
PHASES = ("preferred", "fallback", "probation", "pinned")


def in_phase(phase: str) -> Story:
    story = Story().started()
    if phase in {"fallback", "probation"}:
        story.do(raised(DEAD, *GYRO))
    if phase == "probation":
        story.do(cleared(DEAD, *GYRO))
        story.live(121.0, step_s=11.0, count=20)
    if phase == "pinned":
        story.do(Pinned("wrist", "wrist-accel"))
    return story


@pytest.mark.parametrize("phase", PHASES)
def test_a_restart_keeps_the_phase_and_the_engine(phase: str) -> None:
    story = in_phase(phase)
    assert story.phase == phase
    serving = story.serving
    story.restart()
    assert (story.phase, story.serving) == (phase, serving)


def test_a_restart_on_a_fallback_does_not_return_while_the_fault_is_raised_again() -> None:
    story = in_phase("fallback").restart()
    story.do(raised(DEAD, *GYRO))
    story.live(1000.0, step_s=10.0)
    assert story.phase == "fallback"


def test_a_restart_on_a_fallback_returns_when_the_fault_is_gone() -> None:
    story = in_phase("fallback").restart()
    story.live(121.0)
    assert story.phase == "probation"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "event",
    [
        *(raised(kind, "gx") for kind in AlarmKind),
        *(cleared(kind, "gx") for kind in AlarmKind),
        raised(AlarmKind.LATENCY, engine="wrist"),
        failed(20),
        failed(1, "nobody"),
        EngineServed("wrist", "wrist", 5),
        EngineServed("wrist", "nobody", 5),
        EngineServed("wrist", "wrist", 0),
        loaded(9),
        loaded(9, "wrist-floor"),
        WorkerReady(9, {}),
        WorkerLost(0, "gone"),
        WorkerLost(1, "gone"),
        WorkerLost(9, "gone"),
        Tick(),
        Pinned("wrist", "wrist-floor"),
        Pinned("wrist", "nobody"),
        Unpinned("wrist"),
        AgentStarted(),
        DriftPersists("wrist", 64, ("gx",), ("dead:gx",), "gx", "ab"),
        raised(DEAD, "gx", service="unknown"),
        Unpinned("unknown"),
    ],
    ids=repr,
)
def test_every_phase_answers_every_event_and_somebody_serves(phase: str, event: Any) -> None:
    story = in_phase(phase)
    story.do(decode_event(json.loads(json.dumps(encode(event)))), after_s=1.0)
    usable = story.supervisor.status("wrist")["usable"]
    assert story.serving in (usable or ENGINES)
    story.do(Tick(), after_s=1.0)


def test_a_clock_set_back_keeps_elapsed_times_and_a_dwell_still_ends() -> None:
    story = in_phase("fallback")
    story.do(cleared(DEAD, *GYRO))
    story.live(60.0)
    story.now_s -= 1e6
    story.live(58.0)
    assert story.phase == "fallback"
    story.live(3.0)
    assert story.phase == "probation"


def test_the_same_events_give_the_same_commands() -> None:
    def replay() -> list[Any]:
        story = in_phase("probation")
        story.do(failed(2))
        story.do(WorkerLost(1, "x"))
        return story.said

    assert replay() == replay()


def test_served_requests_alone_are_not_worth_a_write() -> None:
    story = Story().started()
    before = len([1 for _, one in story.said if isinstance(one, Persist)])
    story.live(600.0)
    assert len([1 for _, one in story.said if isinstance(one, Persist)]) == before


def test_a_flapping_sensor_for_a_day_is_a_handful_of_switches() -> None:
    story = Story().started()
    for _ in range(86_400 // 240):
        story.do(raised(DEAD, *GYRO), after_s=120.0)
        story.serve(20)
        story.do(cleared(DEAD, *GYRO), after_s=120.0)
        story.serve(20)
        story.do(Tick())
    # every failed return doubles the stay: 120 s, 240 s, ... a day
    assert len(story.activated()) <= 2 * math.log2(86_400 / 120) + 4


def test_two_faults_that_take_turns_do_not_make_the_engines_take_turns() -> None:
    story = Story().started()
    for _ in range(3):
        story.do(raised(DEAD, *GYRO), after_s=1.0)
        story.do(cleared(DEAD, *GYRO), after_s=1.0)
        story.do(raised(DEAD, "ax"), after_s=1.0)
        story.do(cleared(DEAD, "ax"), after_s=1.0)
    assert len(story.steps()) <= 2


# --- several services, configuration, files ----------------------------------------------------------------
def test_services_do_not_disturb_each_other() -> None:
    story = Story(policy(), policy(service="other")).started()
    story.do(raised(DEAD, *GYRO, service="other"))
    assert story.supervisor.serving("wrist") == "wrist"
    assert story.supervisor.serving("other") == "wrist-accel"


def test_events_of_unknown_services_are_counted_and_ignored() -> None:
    story = Story().started()
    assert story.do(raised(DEAD, "gx", service="who")) == ()
    assert story.supervisor.statistics()["ignored"] == 1


def test_a_service_whose_engine_is_no_longer_configured_starts_anew() -> None:
    story = in_phase("fallback")
    fewer = policy(card=card(engines=("wrist", "wrist-floor")))
    assert Supervisor([fewer], story.supervisor.state()).serving("wrist") == "wrist"


def test_before_the_first_event_the_preferred_engine_serves() -> None:
    supervisor = Supervisor([policy()])
    assert supervisor.serving("wrist") == "wrist"
    assert supervisor.lineup("wrist") == ENGINES
    assert supervisor.health("wrist").value == "unknown"
    assert supervisor.status("wrist")["phase"] == "preferred"


@pytest.mark.parametrize("damage", [{"version": 99}, {"services": {"wrist": {}}}, {"workers": None}, {"now_s": "x"}])
def test_a_damaged_state_is_refused_with_a_hint(damage: dict[str, Any]) -> None:
    state = {**Story().started().supervisor.state(), **damage}
    with pytest.raises(StateUnreadable) as caught:
        Supervisor([policy()], state)
    assert caught.value.hint


def test_the_state_is_complete_in_every_phase() -> None:
    for story in map(in_phase, PHASES):
        twin = Supervisor([policy()], json.loads(json.dumps(story.supervisor.state())))
        assert twin.state() == story.supervisor.state()
        assert twin.status("wrist") == story.supervisor.status("wrist")


def test_a_dwell_of_zero_returns_as_soon_as_it_is_quiet() -> None:
    story = Story(policy(limits=Limits(0.0, 0.0))).started()
    story.do(raised(SCALE, *GYRO))
    story.do(cleared(SCALE, *GYRO))
    story.live(20.0)
    assert story.phase == "preferred"
