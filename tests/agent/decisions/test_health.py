"""Health falls at once and rises one step at a time."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.decisions.health import TABLE, Condition, Health, Signal, State, restarted, shifted, start, step

RANK = {State.UNKNOWN: 0, State.HEALTHY: 0, State.DEGRADED: 1, State.FAILING: 2}
SETTLE_S = 10.0


def walk(*conditions: tuple[float, Condition]) -> list[State]:
    health, states = start(0.0), []
    for now_s, condition in conditions:
        health = step(health, condition, now_s, settle_s=SETTLE_S)
        states.append(health.state)
    return states


def test_every_state_answers_every_signal() -> None:
    assert set(TABLE) == set(State)
    assert all(set(row) == set(Signal) for row in TABLE.values())


def test_every_state_can_be_reached_from_every_other() -> None:
    for origin in State:
        reached = {origin}
        for _ in State:
            reached |= {after for state in reached for after in TABLE[state].values()}
        assert reached == set(State)


def test_one_bad_moment_is_enough_to_fall() -> None:
    assert walk((1, Condition.CLEAN), (2, Condition.BROKEN)) == [State.HEALTHY, State.FAILING]
    assert walk((1, Condition.CLEAN), (2, Condition.IMPAIRED)) == [State.HEALTHY, State.DEGRADED]


def test_failing_needs_two_quiet_times_to_become_healthy() -> None:
    states = walk((0, Condition.BROKEN), *((float(now), Condition.CLEAN) for now in range(1, 31)))
    assert states[9] is State.FAILING
    assert states[10] is State.DEGRADED
    assert states[19] is State.DEGRADED
    assert states[20] is State.HEALTHY


def test_failing_becomes_degraded_while_something_is_still_wrong() -> None:
    assert walk((0, Condition.BROKEN), (5, Condition.IMPAIRED), (10, Condition.IMPAIRED))[1:] == [
        State.FAILING,
        State.DEGRADED,
    ]


def test_nothing_served_is_unknown_not_healthy() -> None:
    assert walk((100, Condition.NO_DATA)) == [State.UNKNOWN]


def test_a_restart_forgets() -> None:
    failing = step(start(0.0), Condition.BROKEN, 1.0, settle_s=SETTLE_S)
    assert restarted(failing, 2.0).state is State.UNKNOWN
    assert restarted(start(0.0), 2.0) == start(0.0)


def test_a_clock_that_is_set_does_not_heal() -> None:
    failing = step(start(0.0), Condition.BROKEN, 1.0, settle_s=SETTLE_S)
    moved = shifted(failing, -1e9)
    assert step(moved, Condition.CLEAN, 2.0 - 1e9, settle_s=SETTLE_S).state is State.FAILING


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.sampled_from(Condition)), max_size=60))
def test_no_walk_rises_sooner_than_one_settle_time_per_step(moves: list[tuple[float, Condition]]) -> None:
    health, now_s, rises_s = start(0.0), 0.0, []
    for after_s, condition in moves:
        now_s += after_s
        before: Health = health
        health = step(before, condition, now_s, settle_s=SETTLE_S)
        if RANK[health.state] < RANK[before.state]:
            rises_s.append(now_s)
            assert RANK[before.state] - RANK[health.state] == 1
    assert all(later - earlier >= SETTLE_S for earlier, later in pairwise(rises_s))
