"""Random walks: whatever happens in whatever order, somebody serves, and switching stays within its bounds."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.decisions.events import (
    Activate,
    AgentStarted,
    AlarmKind,
    DriftPersists,
    EngineFailed,
    EngineServed,
    Event,
    Pinned,
    Publish,
    Tick,
    Unpinned,
    WorkerLost,
    WorkerReady,
)
from agent.decisions.fallback import Limits
from agent.decisions.supervisor import Supervisor
from tests.agent.decisions.wrist import ACCEL, ENGINES, GYRO, Story, cleared, policy, raised

LIMITS = Limits(dwell_s=120.0, probation_s=60.0, max_dwell_s=3600.0)
channels = st.lists(st.sampled_from(ACCEL + GYRO), min_size=1, max_size=3, unique=True).map(tuple)
engines = st.sampled_from((*ENGINES, "nobody"))
FAULTS = (AlarmKind.DEAD, AlarmKind.STUCK, AlarmKind.SCALE, AlarmKind.NOT_FINITE)


def alarms(kinds: Any) -> st.SearchStrategy[Event]:
    return st.builds(lambda kind, names: raised(kind, *names), kinds, channels) | st.builds(cleared, kinds)


traffic: st.SearchStrategy[Event] = st.builds(EngineServed, st.just("wrist"), engines, st.integers(0, 50)) | st.just(
    Tick()
)
latency = st.builds(lambda engine: raised(AlarmKind.LATENCY, engine=engine), st.sampled_from(ENGINES))
trouble: st.SearchStrategy[Event] = st.one_of(
    st.builds(EngineFailed, st.just("wrist"), engines, st.just("engine_failed"), st.integers(0, 5)),
    st.builds(WorkerLost, st.integers(0, 6), st.just("signal 11")),
    st.builds(
        WorkerReady,
        st.integers(1, 6),
        st.builds(lambda some: {"wrist": tuple(some)}, st.sets(st.sampled_from(ENGINES))),
    ),
    st.builds(Pinned, st.just("wrist"), engines),
    st.just(Unpinned("wrist")),
    st.just(AgentStarted()),
    st.just(DriftPersists("wrist", 64, ("gx",))),
)
pauses = st.sampled_from([0.0, 1.0, 20.0, 130.0, 5000.0])
anything = st.lists(st.tuples(pauses, alarms(st.sampled_from(AlarmKind)) | latency | traffic | trouble), max_size=60)
sensors = st.lists(st.tuples(pauses, alarms(st.sampled_from(FAULTS)) | traffic), max_size=120)


def serves(supervisor: Supervisor) -> bool:
    usable = supervisor.status("wrist")["usable"]
    return supervisor.serving("wrist") in (usable or ENGINES) and bool(supervisor.lineup("wrist"))


@settings(max_examples=200, deadline=None)
@given(anything)
def test_somebody_serves_after_every_event(walk: list[tuple[float, Event]]) -> None:
    story = Story(policy(limits=LIMITS))
    for after_s, event in walk:
        story.do(event, after_s=after_s)
        assert serves(story.supervisor)


@settings(max_examples=100, deadline=None)
@given(anything, st.integers(0, 60))
def test_a_saved_state_continues_as_if_nothing_had_happened(walk: list[tuple[float, Event]], at: int) -> None:
    whole, cut = Story(policy(limits=LIMITS)), Story(policy(limits=LIMITS))
    for number, (after_s, event) in enumerate(walk):
        if number == at:
            cut.supervisor = Supervisor(cut.policies, json.loads(json.dumps(cut.supervisor.state())))
        assert whole.do(event, after_s=after_s) == cut.do(event, after_s=after_s)


@settings(max_examples=100, deadline=None)
@given(sensors)
def test_the_preferred_engine_is_tried_at_most_once_per_dwell(walk: list[tuple[float, Event]]) -> None:
    story = Story(policy(limits=LIMITS)).started()
    for after_s, event in walk:
        story.do(event, after_s=after_s)
    moves = [
        (at, one.details["step"]) for at, one in story.said if isinstance(one, Publish) and one.kind == "fallback"
    ]
    left_s = None
    for at, step in moves:
        if step in {"switched", "return-failed", "moved"}:
            left_s = at
        elif step == "probation":
            assert left_s is not None
            assert at - left_s >= LIMITS.dwell_s


@settings(max_examples=100, deadline=None)
@given(sensors)
def test_within_one_stay_each_new_faulty_channel_moves_at_most_once(walk: list[tuple[float, Event]]) -> None:
    story = Story(policy(limits=LIMITS)).started()
    for after_s, event in walk:
        story.do(event, after_s=after_s)
    moved = 0
    for step in story.steps():
        moved = moved + 1 if step == "moved" else 0
        assert moved <= len(FAULTS) * len(ACCEL + GYRO)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(pauses, alarms(st.just(AlarmKind.DRIFT)) | traffic), max_size=100))
def test_drift_alone_never_activates_anything(walk: list[tuple[float, Event]]) -> None:
    story = Story(policy(limits=LIMITS)).started()
    before = len(story.activated())
    for after_s, event in walk:
        assert not [one for one in story.do(event, after_s=after_s) if isinstance(one, Activate)]
    assert len(story.activated()) == before


@settings(max_examples=100, deadline=None)
@given(anything)
def test_a_quiet_day_later_the_preferred_engine_serves(walk: list[tuple[float, Event]]) -> None:
    story = Story(policy(limits=LIMITS))
    for after_s, event in walk:
        story.do(event, after_s=after_s)
    story.do(Unpinned("wrist"))
    for kind in AlarmKind:
        for engine in ("", *ENGINES):
            story.do(cleared(kind, engine=engine))
    for generation in (11, 12, 13):  # the second and third stand for reloads that were asked for
        story.do(WorkerReady(generation, {"wrist": ENGINES}), after_s=7200.0)
        story.serve(20)
        story.live(300.0, step_s=20.0)
    assert (story.serving, story.phase, story.health) == ("wrist", "preferred", "healthy")
