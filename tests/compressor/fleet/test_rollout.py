from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.fleet.rollout import ENDS, STANDS, TABLE, Rollout, Said, Signal, Stand, State, advance, sent, stand

VERSIONS = {"w1": 3, "w2": 5}


def rollout(state: State = State.RUNNING, *, since: float = 0.0) -> Rollout:
    return Rollout(VERSIONS, state, since, deadline_s=100.0, soak_s=50.0)


def said(w1: str, w2: str) -> dict[str, Said]:
    return {"w1": Said(3, w1), "w2": Said(5, w2)}


def test_every_state_answers_every_signal_and_ends_stay_ends() -> None:
    assert set(TABLE) == set(State)
    for state, row in TABLE.items():
        assert set(row) == set(Signal)
        if state in ENDS:
            assert set(row.values()) == {state}


def test_a_draft_waits_until_the_documents_are_out() -> None:
    draft = rollout(State.DRAFT)
    assert advance(draft, said("committed", "committed"), now=1000.0).state is State.DRAFT
    assert sent(draft, now=5.0).state is State.RUNNING
    assert sent(rollout(State.HALTED), now=5.0).state is State.HALTED


def test_a_running_rollout_soaks_when_every_device_committed() -> None:
    assert advance(rollout(), said("committed", "selftest"), now=10.0).state is State.RUNNING
    after = advance(rollout(), said("committed", "committed"), now=10.0)
    assert (after.state, after.since) == (State.SOAKING, 10.0)
    assert advance(after, said("committed", "committed"), now=59.0).state is State.SOAKING
    assert advance(after, said("committed", "committed"), now=60.0).state is State.COMPLETED


@pytest.mark.parametrize("bad", ["rejected", "failed", "rolling_back", "rolled_back", "quarantined"])
def test_one_device_that_fails_halts_it_with_the_reason(bad: str) -> None:
    words = {"w1": Said(3, "committed"), "w2": Said(5, bad, "golden_mismatch")}
    after = advance(rollout(), words, now=1.0)
    assert after.state is State.HALTED
    assert f"w2 {bad} (golden_mismatch)" in after.text


def test_a_device_that_falls_back_while_soaking_halts_it() -> None:
    assert advance(rollout(State.SOAKING), said("committed", "rolled_back"), now=1.0).state is State.HALTED


def test_silence_until_the_deadline_halts_it() -> None:
    assert advance(rollout(), {"w1": Said(3, "committed")}, now=99.0).state is State.RUNNING
    after = advance(rollout(), {"w1": Said(3, "committed")}, now=100.0)
    assert after.state is State.HALTED
    assert "w2 not done" in after.text


def test_an_operator_halts_it_and_nothing_goes_on_after() -> None:
    halted = advance(rollout(), said("committed", "committed"), now=1.0, halt=True)
    assert halted.state is State.HALTED
    assert advance(halted, said("committed", "committed"), now=1e6) is halted


def test_states_of_other_versions_do_not_count() -> None:
    assert stand(3, Said(2, "failed")) is Stand.WAITING
    assert stand(3, None) is Stand.WAITING
    assert stand(3, Said(4, "failed")) is Stand.OVERTAKEN
    assert stand(3, Said(3, "a state of tomorrow")) is Stand.BUSY


def test_every_update_state_of_the_device_is_known() -> None:
    from agent.decisions.updates import State as Update

    assert {state.value for state in Update} <= set(STANDS)


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STANDS)), st.sampled_from(sorted(STANDS)), st.floats(0, 60)), max_size=20
    )
)
def test_no_history_completes_with_a_device_that_failed(history: list[tuple[str, str, float]]) -> None:
    now, current = 0.0, rollout()
    for w1, w2, later in history:
        now += later
        current = advance(current, said(w1, w2), now=now)
        if Stand.BAD in (STANDS[w1], STANDS[w2]):
            assert current.state in ENDS
