"""The table of stays: every signal answered, the dwell kept, doubled, capped and reset."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.decisions.fallback import (
    TABLE,
    Limits,
    Phase,
    Signal,
    Stay,
    next_check_s,
    next_dwell_s,
    proven,
    rested,
    shifted,
    start,
    step,
)

LIMITS = Limits(dwell_s=120.0, probation_s=60.0, max_dwell_s=1000.0)


def go(stay: Stay, signal: Signal, now_s: float, engine: str = "b", limits: Limits = LIMITS) -> Stay:
    return step(stay, signal, now_s, limits, engine=engine, why="test", reason="because")


def test_every_phase_answers_every_signal() -> None:
    assert set(TABLE) == set(Phase)
    assert all(set(row) == set(Signal) for row in TABLE.values())


def test_every_phase_can_be_reached_from_every_other() -> None:
    for origin in Phase:
        reached = {origin}
        for _ in Phase:
            reached |= {row.phase for phase in reached for row in TABLE[phase].values()}
        assert reached == set(Phase)


def test_trouble_always_leads_to_another_engine_and_never_back_to_preferred() -> None:
    assert {phase: row[Signal.TROUBLE].phase for phase, row in TABLE.items()} == {
        Phase.PREFERRED: Phase.FALLBACK,
        Phase.FALLBACK: Phase.FALLBACK,
        Phase.PROBATION: Phase.FALLBACK,
        Phase.PINNED: Phase.PINNED,
    }
    assert all(row[Signal.TROUBLE].moves for row in TABLE.values())


def test_the_way_back_leads_through_probation_only() -> None:
    into_preferred = {
        (phase, signal)
        for phase, rows in TABLE.items()
        for signal, row in rows.items()
        if row.phase is Phase.PREFERRED and phase is not Phase.PREFERRED
    }
    assert into_preferred == {(Phase.PROBATION, Signal.PROVEN), (Phase.PINNED, Signal.UNPIN)}


def test_a_failed_return_doubles_the_next_stay_up_to_the_cap_and_a_proven_one_resets_it() -> None:
    stay, dwells = go(start("a", 0.0, LIMITS), Signal.TROUBLE, 0.0), []
    for _ in range(6):
        stay = go(go(stay, Signal.SETTLED, 0.0, "a"), Signal.TROUBLE, 0.0)
        dwells.append(stay.dwell_s)
    assert dwells == [240.0, 480.0, 960.0, 1000.0, 1000.0, 1000.0]
    assert go(go(stay, Signal.SETTLED, 0.0, "a"), Signal.PROVEN, 0.0, "a").dwell_s == 120.0


def test_an_engine_that_cannot_be_loaded_again_doubles_the_stay_too() -> None:
    stay = go(start("a", 0.0, LIMITS), Signal.TROUBLE, 5.0)
    refused = go(stay, Signal.REFUSED, 200.0)
    assert (refused.phase, refused.dwell_s, refused.since_s) == (Phase.FALLBACK, 240.0, 200.0)


def test_a_dwell_of_zero_still_grows() -> None:
    limits = Limits(dwell_s=0.0)
    stay = go(go(start("a", 0.0, limits), Signal.TROUBLE, 0.0), Signal.SETTLED, 0.0)
    assert go(stay, Signal.TROUBLE, 0.0, limits=limits).dwell_s == 1.0


def test_a_cap_below_the_configured_dwell_does_not_shorten_it() -> None:
    limits = Limits(dwell_s=120.0, max_dwell_s=10.0)
    stay = go(go(start("a", 0.0, limits), Signal.TROUBLE, 0.0), Signal.SETTLED, 0.0)
    assert next_dwell_s(stay, Signal.TROUBLE, limits) == 120.0


def test_only_a_fallback_rests_and_only_a_probation_is_proven() -> None:
    preferred = start("a", 0.0, LIMITS)
    fallback = go(preferred, Signal.TROUBLE, 10.0)
    probation = go(fallback, Signal.SETTLED, 130.0, "a")
    assert [rested(stay, 130.0) for stay in (preferred, fallback, probation)] == [False, True, False]
    assert [proven(stay, 190.0, LIMITS) for stay in (preferred, fallback, probation)] == [False, False, True]
    assert not rested(fallback, 129.9)
    assert not proven(probation, 189.9, LIMITS)
    assert [next_check_s(stay, LIMITS) for stay in (preferred, fallback, probation)] == [None, 130.0, 190.0]


def test_a_restart_in_probation_begins_it_anew_and_changes_nothing_else() -> None:
    fallback = go(start("a", 0.0, LIMITS), Signal.TROUBLE, 10.0)
    probation = go(fallback, Signal.SETTLED, 130.0, "a")
    assert go(probation, Signal.RESTART, 180.0, "a").since_s == 180.0
    assert go(fallback, Signal.RESTART, 180.0, "x") == fallback


def test_elapsed_time_survives_a_clock_that_is_set() -> None:
    stay = go(start("a", 0.0, LIMITS), Signal.TROUBLE, 1e9)
    assert not rested(shifted(stay, -9e8), 1e8 + 119.0)
    assert rested(shifted(stay, -9e8), 1e8 + 120.0)


@given(st.lists(st.sampled_from(Signal), max_size=100))
def test_the_dwell_stays_between_its_limits_on_every_walk(signals: list[Signal]) -> None:
    stay = start("a", 0.0, LIMITS)
    for now_s, signal in enumerate(signals):
        stay = go(stay, signal, float(now_s))
        assert LIMITS.dwell_s <= stay.dwell_s <= LIMITS.max_dwell_s
