"""One test per row of the decision table, then the properties that hold for every situation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.fleet.planner import (
    CONDITIONS,
    TABLE,
    Ask,
    Attempt,
    Decision,
    Facts,
    Kind,
    Limits,
    Outcome,
    Pattern,
    Report,
    Situation,
    plan,
)

DEVICES = ("w1", "w2", "w3")
V1 = "11" * 32
LIMITS = Limits(quorum=2, persisted_windows=64, patience_s=60, collect_s=300)


def novel(device: str, **changes: object) -> Report:
    fields = {
        "device": device, "drifting": True, "channels": ("ax", "gy"), "persisted_windows": 64, "reference": V1,
        "rows": 128, "shift": 1.5, "age_s": 100.0,
    }  # fmt: skip
    return Report(**(fields | changes))


def broken(device: str, *guards: str) -> Report:
    return Report(device=device, guards=guards or ("dead:gx",), age_s=100.0)


def situation(*reports: Report, **changes: object) -> Situation:
    fields = {
        "cohort": "canary", "service": "wrist", "devices": DEVICES, "reports": reports, "asks": {}, "attempts": (),
        "budget_left": 1, "limits": LIMITS,
    }  # fmt: skip
    return Situation(**(fields | changes))


def only(decisions: tuple[Decision, ...]) -> Decision:
    assert len(decisions) == 1
    return decisions[0]


EVERYBODY = tuple(novel(device) for device in DEVICES)
DELIVERED = dict.fromkeys(DEVICES, Ask.DELIVERED)


def test_nothing_reported_means_nothing_decided() -> None:
    assert plan(situation()) == ()


def test_one_broken_channel_of_one_device_is_maintenance_and_no_training() -> None:
    decision = only(plan(situation(broken("w2"))))
    assert (decision.row, decision.kind, decision.devices) == ("local-fault", Kind.MAINTENANCE, ("w2",))
    assert "dead:gx on w2 only (1 of 3 devices)" in decision.reason


def test_one_drifting_channel_of_one_device_is_maintenance_too() -> None:
    decision = only(plan(situation(novel("w1", single_channel=True, channels=("gz",)))))
    assert (decision.row, decision.devices) == ("local-fault", ("w1",))
    assert "drift:gz" in decision.reason


def test_drift_that_does_not_last_is_noted() -> None:
    decision = only(plan(situation(novel("w1", persisted_windows=20))))
    assert (decision.row, decision.kind) == ("drift-without-harm", Kind.NOTE)
    assert "20 windows, below the 64" in decision.reason


def test_a_first_report_waits_for_others() -> None:
    decision = only(plan(situation(novel("w1", age_s=5.0))))
    assert (decision.row, decision.kind) == ("first-report", Kind.WATCH)


def test_thin_evidence_asks_the_device_for_recordings() -> None:
    decision = only(plan(situation(novel("w1"))))
    assert (decision.row, decision.kind, decision.devices) == ("thin-evidence", Kind.ASK_SAMPLES, ("w1",))


@pytest.mark.parametrize("lie", [{"rows": 10}, {"shift": 0.01}])
def test_evidence_that_contradicts_the_event_does_not_count(lie: dict[str, float]) -> None:
    decision = only(plan(situation(novel("w1"), novel("w2", **lie))))
    assert (decision.row, decision.kind) == ("thin-evidence", Kind.ASK_SAMPLES)
    assert "Not counted: w2" in decision.reason
    assert (decision.numbers["supported"], decision.numbers["doubtful"]) == (1, 1)


def test_a_device_that_invents_what_it_drifts_from_is_not_asked() -> None:
    decision = only(plan(situation(novel("w1", known=False))))
    assert (decision.row, decision.kind) == ("unknown-model", Kind.WATCH)
    decision = only(plan(situation(novel("w1"), novel("w2", rows=0, known=False))))
    assert (decision.row, decision.devices) == ("thin-evidence", ("w1",))


def test_one_device_never_starts_a_training_even_when_its_recordings_are_here() -> None:
    decision = only(plan(situation(novel("w1"), asks={"w1": Ask.DELIVERED}, last_ask_age_s=1e6)))
    assert (decision.row, decision.kind) == ("under-quorum", Kind.WATCH)


def test_the_same_change_on_most_devices_asks_for_recordings() -> None:
    decision = only(plan(situation(broken("w1", "scale:accel"), broken("w3", "scale:accel"))))
    assert (decision.row, decision.kind, decision.devices) == ("common-change", Kind.ASK_SAMPLES, ("w1", "w3"))


def test_the_same_change_on_most_devices_is_regenerated_from_their_recordings() -> None:
    same = [broken(device, "scale:accel") for device in DEVICES]
    decision = only(plan(situation(*same, asks=DELIVERED, last_ask_age_s=9.0)))
    assert (decision.row, decision.kind, decision.devices) == ("regenerate-common", Kind.REGENERATE, DEVICES)


def test_a_common_change_is_regenerated_once() -> None:
    same = [broken(device, "scale:accel") for device in DEVICES]
    done = Attempt(frozenset(DEVICES), frozenset({V1}), Outcome.DONE)
    assert only(plan(situation(*same, asks=DELIVERED, attempts=(done,)))).row == "answered"


def test_a_new_population_is_asked_for_enrolment_recordings() -> None:
    decision = only(plan(situation(*EVERYBODY)))
    assert (decision.row, decision.kind, decision.devices) == ("new-population", Kind.ASK_ENROLMENT, DEVICES)
    assert decision.numbers["largest_shift"] == 1.5
    assert "no guard and no single channel" in decision.reason


def test_a_device_that_joins_later_is_asked_alone() -> None:
    decision = only(plan(situation(*EVERYBODY, asks={"w1": Ask.DELIVERED, "w2": Ask.OPEN})))
    assert (decision.row, decision.devices) == ("new-population", ("w3",))


def test_outstanding_recordings_are_waited_for() -> None:
    asks = {"w1": Ask.DELIVERED, "w2": Ask.OPEN, "w3": Ask.DELIVERED}
    decision = only(plan(situation(*EVERYBODY, asks=asks, last_ask_age_s=1e6)))
    assert (decision.row, decision.kind) == ("collecting", Kind.WAIT_SAMPLES)
    assert "2 of 3 recordings" in decision.reason


def test_devices_that_may_still_join_are_waited_for_until_the_time_is_over() -> None:
    two = EVERYBODY[:2]
    asks = {"w1": Ask.DELIVERED, "w2": Ask.DELIVERED}
    assert only(plan(situation(*two, asks=asks, last_ask_age_s=10.0))).row == "collecting"
    decision = only(plan(situation(*two, asks=asks, last_ask_age_s=301.0)))
    assert (decision.row, decision.devices) == ("regenerate", ("w1", "w2"))


def test_recordings_that_cannot_be_had_call_for_a_person() -> None:
    asks = {"w1": Ask.FAILED, "w2": Ask.FAILED, "w3": Ask.DELIVERED}
    decision = only(plan(situation(*EVERYBODY, asks=asks, last_ask_age_s=1.0)))
    assert (decision.row, decision.kind) == ("no-recordings", Kind.WAIT_SAMPLES)


def test_a_spent_budget_makes_the_regeneration_wait() -> None:
    decision = only(plan(situation(*EVERYBODY, asks=DELIVERED, budget_left=0)))
    assert (decision.row, decision.kind) == ("budget-spent", Kind.WAIT_BUDGET)


def test_a_new_population_with_recordings_is_regenerated() -> None:
    decision = only(plan(situation(*EVERYBODY, asks=DELIVERED, last_ask_age_s=3.0)))
    assert (decision.row, decision.kind, decision.devices) == ("regenerate", Kind.REGENERATE, DEVICES)


def test_an_operator_can_hold_it_back() -> None:
    decision = only(plan(situation(*EVERYBODY, asks=DELIVERED, held=True)))
    assert (decision.row, decision.kind) == ("held", Kind.WATCH)


def test_a_running_regeneration_is_waited_for() -> None:
    running = Attempt(frozenset(DEVICES), frozenset({V1}), Outcome.RUNNING)
    decision = only(plan(situation(*EVERYBODY, asks=DELIVERED, attempts=(running,))))
    assert (decision.row, decision.kind) == ("running", Kind.WAIT_RUNNING)


def test_a_failed_regeneration_is_not_repeated_from_the_same_recordings() -> None:
    failed = Attempt(frozenset(DEVICES), frozenset({V1}), Outcome.FAILED)
    assert only(plan(situation(*EVERYBODY, asks=DELIVERED, attempts=(failed,)))).row == "failed-before"
    of_two = replace(failed, devices=frozenset({"w1", "w2"}))
    assert only(plan(situation(*EVERYBODY, asks=DELIVERED, attempts=(of_two,)))).row == "regenerate"


def test_a_halted_regeneration_is_repeated_once_and_then_left_to_a_person() -> None:
    halted = Attempt(frozenset(DEVICES), frozenset({V1}), Outcome.HALTED)
    rows = [only(plan(situation(*EVERYBODY, asks=DELIVERED, attempts=(halted,) * n))).row for n in (0, 1, 2)]
    assert rows == ["regenerate", "regenerate", "failed-before"]


def test_what_a_regeneration_answered_is_not_acted_on_again() -> None:
    done = Attempt(frozenset(DEVICES), frozenset({V1}), Outcome.DONE)
    assert only(plan(situation(*EVERYBODY, asks=DELIVERED, attempts=(done,)))).row == "answered"
    again = [novel(device, reference="22" * 32) for device in DEVICES]
    assert only(plan(situation(*again, attempts=(done,)))).row == "new-population"


def test_a_stranger_to_the_cohort_is_not_counted() -> None:
    assert plan(situation(novel("somebody"), broken("else"))) == ()


def test_a_broken_sensor_beside_a_new_population_is_two_decisions() -> None:
    decisions = plan(situation(novel("w1"), novel("w2"), broken("w3")))
    assert [(decision.row, decision.devices) for decision in decisions] == [
        ("local-fault", ("w3",)),
        ("new-population", ("w1", "w2")),
    ]


# --- every situation -------------------------------------------------------------------------------------------
BOOL = st.booleans()
FACTS = st.builds(Facts, pattern=st.sampled_from(Pattern), **dict.fromkeys(CONDITIONS, BOOL))
REPORT = st.builds(
    Report,
    device=st.sampled_from((*DEVICES, "stranger")),
    guards=st.sampled_from([(), ("dead:gx",), ("scale:accel", "dead:gx")]),
    drifting=BOOL,
    channels=st.sampled_from([(), ("ax",), ("ax", "gy")]),
    single_channel=BOOL,
    persisted_windows=st.sampled_from([0, 63, 64, 500]),
    harmful=BOOL,
    reference=st.sampled_from(["", V1, "22" * 32]),
    rows=st.sampled_from([0, 63, 64, 1000]),
    shift=st.sampled_from([0.0, 0.05, 2.0]),
    age_s=st.sampled_from([0.0, 1e5]),
    known=BOOL,
)
SITUATIONS = st.builds(
    Situation,
    cohort=st.just("canary"),
    service=st.just("wrist"),
    devices=st.just(DEVICES),
    reports=st.lists(REPORT, max_size=4, unique_by=lambda report: report.device).map(tuple),
    asks=st.dictionaries(st.sampled_from(DEVICES), st.sampled_from(Ask)),
    attempts=st.lists(
        st.builds(Attempt, devices=st.frozensets(st.sampled_from(DEVICES)), references=st.just(frozenset({V1})),
                  outcome=st.sampled_from(Outcome)), max_size=2).map(tuple),
    budget_left=st.integers(0, 2),
    limits=st.just(LIMITS),
    last_ask_age_s=st.sampled_from([None, 0.0, 1e6]),
    held=BOOL,
)  # fmt: skip


@given(FACTS)
def test_every_case_meets_a_row(facts: Facts) -> None:
    assert any(row.fits(facts) for row in TABLE)


def test_no_row_is_out_of_reach() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    import itertools

    met = set()
    for pattern in Pattern:
        for values in itertools.product([False, True], repeat=len(CONDITIONS)):
            facts = Facts(pattern=pattern, **dict(zip(CONDITIONS, values, strict=True)))
            met.add(next(row.name for row in TABLE if row.fits(facts)))
    assert met == {row.name for row in TABLE}


@given(SITUATIONS)
def test_a_training_always_has_quorum_evidence_budget_and_no_rival(case: Situation) -> None:
    for decision in plan(case):
        assert decision.reason
        assert "{" not in decision.reason
        assert set(decision.devices) <= set(DEVICES)
        if decision.kind is Kind.REGENERATE:
            assert decision.numbers["supported"] >= LIMITS.quorum
            assert len(decision.devices) >= LIMITS.quorum
            assert case.budget_left > 0
            assert not case.held
            assert all(attempt.outcome is not Outcome.RUNNING for attempt in case.attempts)


@given(SITUATIONS, REPORT)
def test_one_lying_device_alone_never_causes_a_training(case: Situation, lie: Report) -> None:
    honest_quiet = replace(case, reports=(replace(lie, device="w1"),), asks=DELIVERED)
    assert all(decision.kind is not Kind.REGENERATE for decision in plan(honest_quiet))
