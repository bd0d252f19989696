"""The update table: total, every walk ends, power cuts at every step, deadlines, what is never tried again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.decisions.lifecycle import (
    BUSY,
    MAX_QUARANTINED,
    MAX_STEPS,
    POISONED,
    RESTING,
    TABLE,
    Lifecycle,
    Limits,
    Row,
    Signal,
)
from agent.decisions.updates import (
    CandidateFailed,
    Choice,
    Commit,
    DesiredArrived,
    Effect,
    Fetch,
    PersistUpdate,
    Report,
    Restarted,
    Rollback,
    RollbackAsked,
    SelfTest,
    State,
    StepDone,
    StepFailed,
    Swap,
    Target,
    Tick,
    Update,
    UpdateCommand,
    UpdateEvent,
    Verify,
    encode,
    load_update,
)

FACTORY = {"wrist": Choice({"wrist": "0" * 64, "wrist-floor": "f" * 64}, ("wrist", "wrist-floor"))}


def selection(digit: str) -> dict[str, Choice]:
    return {"wrist": Choice({"wrist": digit * 64, "wrist-floor": "f" * 64}, ("wrist", "wrist-floor"))}


def target(version: int, digit: str = "a", **fields: Any) -> Target:
    return Target(version, selection(digit), "http://repository", **fields)


class Walk:
    """Drives a lifecycle the way an agent does: persists, remembers the last effect, may lose everything else."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.now_s = 1000.0
        self.durable = json.dumps(Update(installed=FACTORY).document())
        self.life = Lifecycle(self.limits, load_update(json.loads(self.durable)))
        self.effects: list[Effect] = []
        self.reports: list[Report] = []
        self.pointer = FACTORY  # what the device would serve

    def tell(self, event: UpdateEvent, *, after_s: float = 0.0) -> tuple[UpdateCommand, ...]:
        self.now_s += after_s
        commands = self.life.handle(event, self.now_s)
        for command in commands:
            self._execute(command)
        return commands

    def _execute(self, command: UpdateCommand) -> None:
        encode(command)
        match command:
            case PersistUpdate(state):
                self.durable = json.dumps(state)
            case Report():
                self.reports.append(command)
            case _:
                self.effects.append(command)
                if isinstance(command, Swap):
                    self.pointer = command.target.services
                if isinstance(command, Rollback):
                    self.pointer = command.to

    def done(self, **fields: Any) -> None:
        self.tell(StepDone(self.life.update.ticket, **fields))

    def failed(self, code: str, **fields: Any) -> None:
        self.tell(StepFailed(self.life.update.ticket, code, **fields))

    def power_cut(self) -> None:
        self.life = Lifecycle(self.limits, load_update(json.loads(self.durable)))
        self.tell(Restarted())

    @property
    def state(self) -> State:
        return self.life.update.state


def walk_to(state: State) -> Walk:
    """A walk whose update has just reached `state`."""
    walk = Walk()
    if state is State.IDLE:
        return walk
    walk.tell(DesiredArrived(target(1)))
    path = {State.FETCHING: 0, State.VERIFIED: 1, State.SELFTEST: 2, State.PROBATION: 3}
    for _ in range(path.get(state, 3)):
        walk.done()
    match state:
        case State.COMMITTED:
            walk.done()
            walk.tell(Tick(), after_s=60)
        case State.ROLLING_BACK:
            walk.tell(CandidateFailed("crashed"))
        case State.ROLLED_BACK:
            walk.tell(CandidateFailed("crashed"))
            walk.done()
    assert walk.state is state
    return walk


def test_the_table_answers_every_signal_in_every_state() -> None:
    assert set(TABLE) == set(State)
    assert all(set(row) == set(Signal) for row in TABLE.values())


def test_every_state_can_be_reached_and_left() -> None:
    for start in State:
        seen, edge = {start}, {start}
        while edge:
            edge = {row.state for state in edge for row in TABLE[state].values()} - seen
            seen |= edge
        assert State.COMMITTED in seen
        assert start is State.IDLE or State.ROLLED_BACK in seen
    reached = {row.state for row in (row for rows in TABLE.values() for row in rows.values())}
    assert reached | {State.IDLE} == set(State)


def test_every_busy_state_answers_failure_deadline_and_restart_with_a_move_or_its_effect() -> None:
    for state in BUSY:
        for signal in (Signal.RESTARTED, Signal.DEADLINE):
            assert TABLE[state][signal] != Row(state), (state, signal)
        assert TABLE[state][Signal.GIVEN_UP].state is not state or state is State.ROLLING_BACK


def test_nothing_leads_from_a_resting_state_to_a_busy_one_but_a_rollback() -> None:
    for state in RESTING:
        assert {row.state for row in TABLE[state].values()} & BUSY <= {State.ROLLING_BACK}


def test_a_good_update_takes_eight_persisted_steps_and_is_reported_at_each() -> None:
    walk = Walk()
    walk.tell(DesiredArrived(target(7)))
    walk.done(moved_bytes=1234)
    walk.done()
    walk.done()
    assert walk.pointer == selection("a")
    walk.done()
    assert walk.tell(Tick(), after_s=59.9) == ()
    walk.tell(Tick(), after_s=0.2)
    assert [type(effect) for effect in walk.effects] == [Fetch, Verify, SelfTest, Swap, Commit]
    assert [report.state for report in walk.reports] == [
        State.PLANNED, State.FETCHING, State.VERIFIED, State.STAGED, State.SELFTEST, State.PROBATION, State.COMMITTED
    ]  # fmt: skip
    assert walk.reports[-1] == Report(7, State.COMMITTED, "", "", 1, 1234)
    assert walk.life.update.steps == 8
    assert walk.life.update.installed == selection("a")
    assert walk.life.update.previous == FACTORY


def test_each_effect_comes_after_the_state_it_belongs_to_was_persisted() -> None:
    walk = Walk()
    commands = walk.tell(DesiredArrived(target(1)))
    for _ in range(4):
        persisted = None
        for command in commands:
            if isinstance(command, PersistUpdate):
                persisted = command.state
            elif not isinstance(command, Report):
                assert persisted is not None
                assert persisted["ticket"] == command.ticket
        commands = walk.tell(StepDone(walk.life.update.ticket))


@pytest.mark.parametrize("state", [State.FETCHING, State.VERIFIED, State.SELFTEST, State.PROBATION])
def test_power_cut_in_a_busy_state_repeats_its_effect_and_still_commits(state: State) -> None:
    walk = walk_to(state)
    before = type(walk.effects[-1])
    walk.power_cut()
    assert walk.state is state
    assert type(walk.effects[-1]) is before
    while walk.state is not State.COMMITTED:
        walk.done()
        walk.tell(Tick(), after_s=61)
    assert walk.life.update.installed == selection("a")


@given(cuts=st.lists(st.integers(0, 5), min_size=12, max_size=12))
@settings(max_examples=60, deadline=None)
def test_power_cuts_anywhere_leave_the_old_or_the_new_selection(cuts: list[int]) -> None:
    walk = Walk()
    walk.tell(DesiredArrived(target(1)))
    for count in cuts:
        for _ in range(count):
            walk.power_cut()
        if walk.state in BUSY:
            walk.done()
        walk.tell(Tick(), after_s=61)
        assert walk.pointer in (FACTORY, selection("a"))
        assert walk.life.update.steps <= MAX_STEPS
    assert walk.state in RESTING
    assert walk.pointer == walk.life.update.installed


def test_a_model_whose_trial_takes_the_agent_down_twice_is_quarantined() -> None:
    walk = walk_to(State.SELFTEST)
    walk.power_cut()
    walk.power_cut()
    assert walk.state is State.QUARANTINED
    assert walk.reports[-1].code == "crashed"
    assert walk.life.update.quarantined == ("a" * 64,)


def test_a_crash_loop_on_probation_goes_back_to_the_previous_selection() -> None:
    walk = walk_to(State.PROBATION)
    for _ in range(3):
        walk.power_cut()
    assert walk.state is State.ROLLING_BACK
    assert walk.pointer == FACTORY
    walk.done()
    assert walk.state is State.ROLLED_BACK
    assert walk.life.update.quarantined == ("a" * 64,)


def test_a_rollback_survives_any_number_of_power_cuts_without_a_further_step() -> None:
    walk = walk_to(State.ROLLING_BACK)
    steps = walk.life.update.steps
    for _ in range(50):
        walk.power_cut()
        assert isinstance(walk.effects[-1], Rollback)
    assert walk.life.update.steps == steps
    walk.done()
    assert walk.state is State.ROLLED_BACK


def test_a_rollback_that_fails_or_hangs_is_asked_for_again_and_never_left() -> None:
    walk = walk_to(State.ROLLING_BACK)
    walk.failed("disk_full")
    assert walk.state is State.ROLLING_BACK
    count = len(walk.effects)
    walk.tell(Tick(), after_s=120)
    assert len(walk.effects) == count + 1
    walk.tell(Tick(), after_s=60)
    assert len(walk.effects) == count + 1


@pytest.mark.parametrize("code", ["unavailable", "disk_full", "metadata_stale", "clock_unknown", "corrupt"])
def test_a_passing_trouble_is_deferred_with_growing_pauses_then_given_up_for_a_while(code: str) -> None:
    walk = Walk()
    walk.tell(DesiredArrived(target(1)))
    waits = []
    while walk.state is State.FETCHING:
        walk.failed(code)
        if walk.state is State.DEFERRED:
            waits.append(walk.life.update.retry_at_s - walk.now_s)
            walk.tell(Tick(), after_s=waits[-1])
    assert walk.state is State.FAILED
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0]
    assert walk.reports[-1].code == code
    assert walk.life.update.steps <= MAX_STEPS
    assert walk.tell(Tick(), after_s=899) == ()
    walk.tell(Tick(), after_s=1)
    assert walk.state is State.FETCHING
    assert walk.life.update.tries == 1


@pytest.mark.parametrize(
    "code", ["not_approved", "malformed", "downgrade", "below_minimum", "incompatible", "too_large"]
)
def test_what_may_not_be_installed_is_rejected_at_once_and_for_good(code: str) -> None:
    walk = walk_to(State.FETCHING)
    walk.failed(code, text="x" * 2000)
    assert walk.state is State.REJECTED
    assert walk.reports[-1].code == code
    assert len(walk.reports[-1].text) == 500
    assert walk.tell(Tick(), after_s=1e6) == ()
    assert walk.pointer == FACTORY


def test_what_is_not_trusted_is_rejected_at_once_and_looked_at_again_after_a_rest() -> None:
    walk = walk_to(State.FETCHING)
    walk.failed("untrusted")
    assert walk.state is State.REJECTED
    assert walk.tell(Tick(), after_s=899) == ()
    walk.tell(Tick(), after_s=2)
    assert walk.state is State.FETCHING
    walk.failed("untrusted")
    assert walk.tell(Tick(), after_s=1799) == ()


def test_a_model_with_wrong_golden_answers_is_quarantined_and_never_tried_again() -> None:
    walk = walk_to(State.SELFTEST)
    walk.failed("golden_mismatch", digests=("a" * 64,))
    assert walk.state is State.QUARANTINED
    walk.tell(DesiredArrived(target(2)))
    assert walk.state is State.REJECTED
    assert walk.reports[-1].code == "quarantined"
    walk.tell(DesiredArrived(target(3, "b")))
    assert walk.state is State.FETCHING


@pytest.mark.parametrize("code", sorted(POISONED))
@pytest.mark.parametrize("state", [State.FETCHING, State.VERIFIED])
def test_before_the_candidate_ran_no_failure_condemns_it(state: State, code: str) -> None:
    walk = walk_to(state)
    walk.failed(code)
    assert walk.state is State.DEFERRED
    assert walk.life.update.quarantined == ()
    walk.tell(Tick(), after_s=10)
    assert walk.state is State.FETCHING


@pytest.mark.parametrize("code", sorted(POISONED))
@pytest.mark.parametrize(("state", "after"), [
    (State.SELFTEST, State.QUARANTINED), (State.PROBATION, State.ROLLING_BACK)
])  # fmt: skip
def test_where_the_candidate_ran_its_failure_condemns_it(state: State, after: State, code: str) -> None:
    walk = walk_to(state)
    walk.failed(code)
    assert walk.state is after
    assert walk.life.update.quarantined == ("a" * 64,)


def test_a_trial_killed_from_outside_condemns_nothing_and_the_update_is_tried_again() -> None:
    walk = walk_to(State.SELFTEST)
    walk.failed("killed")
    assert (walk.state, walk.life.update.quarantined) == (State.DEFERRED, ())
    walk.tell(Tick(), after_s=10.0)
    for _ in ("fetched", "verified", "tested", "swapped"):
        walk.done()
    walk.tell(Tick(), after_s=60.0)
    assert walk.state is State.COMMITTED


def test_a_trial_that_is_killed_again_and_again_ends_in_a_state_that_says_so_and_rests() -> None:
    walk = walk_to(State.SELFTEST)
    while walk.state is not State.FAILED:
        walk.failed("killed")
        walk.tell(Tick(), after_s=160.0)
        while walk.state in {State.FETCHING, State.VERIFIED}:
            walk.done()
    assert (walk.reports[-1].code, walk.life.update.quarantined) == ("killed", ())
    assert walk.life.update.steps <= MAX_STEPS


def test_only_new_digests_can_be_blamed() -> None:
    walk = walk_to(State.SELFTEST)
    walk.failed("golden_mismatch", digests=("f" * 64,))  # the installed floor, named by mistake
    assert walk.life.update.quarantined == ("a" * 64,)


def test_trouble_on_probation_rolls_back_and_quarantines() -> None:
    walk = walk_to(State.PROBATION)
    walk.done()
    walk.tell(CandidateFailed("engine_failed", "3 of 20 requests failed"))
    assert walk.state is State.ROLLING_BACK
    assert walk.pointer == FACTORY
    walk.done()
    assert walk.reports[-1].code == "engine_failed"
    assert walk.life.update.quarantined == ("a" * 64,)


def test_a_swap_that_fails_for_lack_of_room_rolls_back_without_blaming_the_model() -> None:
    walk = walk_to(State.PROBATION)
    walk.failed("disk_full")
    walk.done()
    assert walk.state is State.ROLLED_BACK
    assert walk.life.update.quarantined == ()


def test_a_swap_that_never_answers_rolls_back_at_its_deadline() -> None:
    walk = walk_to(State.PROBATION)
    walk.tell(Tick(), after_s=120)
    assert walk.state is State.ROLLING_BACK
    assert walk.reports[-1].code == "deadline"


@pytest.mark.parametrize("state", [State.FETCHING, State.VERIFIED, State.SELFTEST])
def test_a_later_document_supersedes_an_unfinished_update(state: State) -> None:
    walk = walk_to(state)
    old = walk.life.update.ticket
    walk.tell(DesiredArrived(target(2, "b")))
    assert [report.state for report in walk.reports[-3:]] == [State.SUPERSEDED, State.PLANNED, State.FETCHING]
    assert [report.version for report in walk.reports[-3:]] == [1, 2, 2]
    assert walk.tell(StepDone(old)) == ()
    assert walk.state is State.FETCHING


def test_a_document_that_comes_during_probation_waits_for_its_end() -> None:
    walk = walk_to(State.PROBATION)
    walk.done()
    walk.tell(DesiredArrived(target(2, "b")))
    walk.tell(DesiredArrived(target(3, "c")))
    assert walk.state is State.PROBATION
    walk.power_cut()
    walk.done()
    walk.tell(Tick(), after_s=61)
    assert [report.state for report in walk.reports[-3:]] == [State.COMMITTED, State.PLANNED, State.FETCHING]
    assert walk.life.update.target == target(3, "c")


def test_the_same_or_an_older_document_of_one_director_changes_nothing() -> None:
    walk = walk_to(State.COMMITTED)
    assert walk.tell(DesiredArrived(target(1))) == ()
    walk.tell(DesiredArrived(target(5, "b")))
    walk.tell(DesiredArrived(target(4, "c")))
    assert walk.life.update.target == target(5, "b")


def test_a_new_director_key_starts_its_own_count() -> None:
    walk = Walk()
    walk.tell(DesiredArrived(target(2**53 - 1, director="stolen")))
    walk.tell(DesiredArrived(target(1, "b", director="fresh")))
    assert walk.life.update.target == target(1, "b", director="fresh")


def test_what_runs_already_is_committed_without_work() -> None:
    walk = Walk()
    walk.tell(DesiredArrived(Target(3, FACTORY, "http://repository")))
    assert walk.effects == []
    assert walk.reports[-1] == Report(3, State.COMMITTED, "", "", 0, 0)
    assert walk.life.update.previous is None


def test_an_operator_goes_back_once_and_the_retained_document_does_not_undo_it() -> None:
    walk = walk_to(State.COMMITTED)
    walk.tell(RollbackAsked("it smells"))
    assert walk.pointer == FACTORY
    walk.done()
    assert walk.state is State.ROLLED_BACK
    assert walk.tell(RollbackAsked()) == ()
    assert walk.tell(DesiredArrived(target(1))) == ()
    walk.tell(DesiredArrived(target(2)))
    assert walk.reports[-1].code == "quarantined"


def test_an_operator_stops_an_update_before_the_swap() -> None:
    walk = walk_to(State.SELFTEST)
    walk.tell(RollbackAsked("not today"))
    assert walk.state is State.REJECTED
    assert walk.pointer == FACTORY


def test_rollback_without_anything_to_go_back_to_is_ignored() -> None:
    assert Walk().tell(RollbackAsked()) == ()


def test_the_directors_own_deadline_ends_all_tries() -> None:
    walk = Walk()
    walk.tell(DesiredArrived(target(1, deadline_s=100.0)))
    walk.failed("unavailable")
    walk.tell(Tick(), after_s=101)
    assert walk.state is State.FAILED
    assert walk.reports[-1].code == "deadline"
    assert walk.tell(Tick(), after_s=1e7) == ()
    assert walk.life.next_check_s() is None


def test_a_download_that_hangs_is_deferred_at_its_deadline_and_its_late_answer_ignored() -> None:
    walk = walk_to(State.FETCHING)
    ticket = walk.life.update.ticket
    walk.tell(Tick(), after_s=3600)
    assert walk.state is State.DEFERRED
    assert walk.tell(StepDone(ticket)) == ()


def test_a_clock_set_back_does_not_stretch_a_deadline() -> None:
    walk = walk_to(State.FETCHING)
    walk.now_s -= 1e9
    walk.tell(Tick())
    walk.tell(Tick(), after_s=3600)
    assert walk.state is State.DEFERRED


def test_a_clock_set_forward_costs_no_time() -> None:
    walk = walk_to(State.FETCHING)
    walk.now_s += 1e9
    walk.life.clock_set(1e9)
    assert walk.tell(Tick()) == ()


def test_the_next_check_is_when_time_alone_changes_something() -> None:
    walk = walk_to(State.PROBATION)
    assert walk.life.next_check_s() == walk.now_s + 120
    walk.done()
    assert walk.life.next_check_s() == walk.now_s + 60
    assert walk_to(State.COMMITTED).life.next_check_s() is None


def test_the_list_of_quarantined_digests_is_bounded_and_keeps_the_newest() -> None:
    walk = Walk()
    for number in range(MAX_QUARANTINED + 5):
        digest = f"{number:064x}"
        choice = Choice({"wrist": digest}, ("wrist",))
        walk.tell(DesiredArrived(Target(number + 1, {"wrist": choice}, "http://r")))
        walk.done()
        walk.done()
        walk.failed("golden_mismatch")
    quarantined = walk.life.update.quarantined
    assert len(quarantined) == MAX_QUARANTINED
    assert quarantined[-1] == f"{MAX_QUARANTINED + 4:064x}"


def test_the_state_survives_json() -> None:
    walk = walk_to(State.PROBATION)
    walk.tell(DesiredArrived(target(2, "b")))
    assert load_update(json.loads(json.dumps(walk.life.update.document()))) == walk.life.update


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        load_update({"state": "dancing"})


_CODES = ["unavailable", "corrupt", "disk_full", "untrusted", "golden_mismatch", "crashed", "odd"]
_WALKS = st.lists(
    st.one_of(
        st.tuples(st.just("done"), st.just("")),
        st.tuples(st.sampled_from(["failed", "late", "candidate"]), st.sampled_from(_CODES)),
        st.tuples(st.sampled_from(["cut", "undo", "tick", "long", "year"]), st.just("")),
        st.tuples(st.just("desired"), st.sampled_from("abc")),
    ),
    max_size=60,
)


@given(steps=_WALKS)
@settings(max_examples=250, deadline=None)
def test_random_walks_stay_within_their_steps_and_never_serve_neither(steps: list[tuple[str, str]]) -> None:
    walk = Walk()
    versions = 0
    ever = [FACTORY, *(selection(digit) for digit in "abc")]
    for kind, detail in steps:
        match kind:
            case "done":
                walk.done(moved_bytes=1)
            case "failed":
                walk.failed(detail)
            case "late":
                walk.tell(StepFailed(walk.life.update.ticket - 1, detail))
            case "candidate":
                walk.tell(CandidateFailed(detail))
            case "cut":
                walk.power_cut()
            case "undo":
                walk.tell(RollbackAsked())
            case "desired":
                versions += 1
                walk.tell(DesiredArrived(target(versions, detail)))
            case _:
                walk.tell(Tick(), after_s={"tick": 1.0, "long": 200.0, "year": 3e7}[kind])
        update = walk.life.update
        assert update.steps <= MAX_STEPS
        assert walk.pointer in ever
        if update.state not in {State.PROBATION, State.ROLLING_BACK}:
            assert walk.pointer == update.installed
        durable = load_update(json.loads(walk.durable))
        assert replace(durable, since_s=0.0) == replace(update, since_s=0.0)  # a repeated rollback only waits anew
    _settle(walk)


def _settle(walk: Walk) -> None:
    """Left alone in a world that works, every walk comes to rest."""
    for _ in range(2 * MAX_STEPS):
        if walk.state in RESTING and walk.life.next_check_s() is None and walk.life.update.waiting is None:
            return
        if walk.state in BUSY:
            walk.done()
            walk.tell(Tick(), after_s=61)
        else:
            walk.tell(Tick(), after_s=walk.limits.max_rest_s)
    raise AssertionError(f"still {walk.state}")


@pytest.mark.parametrize(
    ("window_s", "hour", "opens"),
    [((7200.0, 14400.0), 1, False), ((7200.0, 14400.0), 3, True), ((82800.0, 7200.0), 23, True),
     ((82800.0, 7200.0), 1, True), ((82800.0, 7200.0), 12, False), (None, 12, True)],
)  # fmt: skip
def test_what_is_staged_waits_for_its_window(
    window_s: tuple[float, float] | None,
    hour: int,
    opens: bool,  # noqa: FBT001 - what the table says
) -> None:
    now_s = 20_000 * 86_400.0 + hour * 3600.0
    life = Lifecycle(Limits(window_s=window_s), Update(installed=FACTORY))
    commands: tuple[UpdateCommand, ...] = life.handle(DesiredArrived(target(1)), now_s)
    while isinstance(commands[-1], Fetch | Verify):
        commands = life.handle(StepDone(commands[-1].ticket), now_s)
    assert life.update.state is (State.SELFTEST if opens else State.STAGED)
    if window_s is not None and not opens:
        life.handle(Tick(), now_s - now_s % 86_400.0 + window_s[0] + 86_400.0)
        assert life.update.state is State.SELFTEST
