"""When witnesses say that a drift does harm: rows, runs and deadlines counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.drift import Finding, HarmMonitor, Reference, Witness, dump_reference, load_reference
from agent.drift.harm import MOST_ROWS, QUIET_ROWS, H
from compressor.reference import WitnessRows, build_reference
from tests.agent.drift.conftest import NO_GUARD, RegimeStream

GYRO, ACCEL = "wrist-gyro", "wrist-accel"


class Device:
    """Follows known rows of the stream; `far`: columns that are moved away from every regime."""

    def __init__(self, reference: Reference, stream: RegimeStream, accuracy: dict[str, float] | None = None) -> None:
        self.harm = HarmMonitor(reference, accuracy)
        self.rows = stream.rows(64, seed=3).features
        self.number = 0

    def live(self, count: int = QUIET_ROWS, *, drifts: bool = False, far: slice | None = None) -> Finding | None:
        for _ in range(count):
            found = self.row(0, {}, drifts=drifts, far=far)
        return found

    def row(
        self, predicted: int, told: dict[str, int], *, drifts: bool = True, far: slice | None = None
    ) -> Finding | None:
        row = self.rows[self.number % len(self.rows)].copy()
        if far is not None:
            row[far] += 50.0
        self.number += 1
        ended = self.harm.follow(row, predicted, self.number, evidence=float(drifts), drifts=drifts)
        return ended or (self.harm.hear(self.number, told) if told else None)

    def disagree(
        self, rows: int, *engines: str, run: int = 2, far: slice | None = None
    ) -> tuple[int, Finding | None]:
        """Rows until harm is found (all, None: it was not); the serving engine changes its class every `run` rows."""
        for number in range(1, rows + 1):
            predicted = number // run % 2
            found = self.row(predicted, dict.fromkeys(engines, 1 - predicted), far=far)
            if found:
                return number, found
        return rows, None


@pytest.fixture
def device(witnessed: Reference, stream: RegimeStream) -> Device:
    return Device(witnessed, stream, {GYRO: 0.9})


def test_nobody_is_asked_while_nothing_drifts(device: Device) -> None:
    device.live()
    assert device.harm.wanted == ()
    device.row(0, {}, drifts=True)
    assert device.harm.wanted == (ACCEL, GYRO)


def test_witnesses_are_asked_from_the_first_suspicion_on_and_judge_when_it_is_a_drift(device: Device) -> None:
    device.live()
    device.harm.follow(device.rows[0], 0, "first", evidence=0.2, drifts=False)
    assert device.harm.wanted == (ACCEL, GYRO)
    for number in range(8):
        predicted = number // 2 % 2
        device.harm.follow(device.rows[0], predicted, number, evidence=0.2, drifts=False)
        assert device.harm.hear(number, {GYRO: 1 - predicted}) is None
    assert device.harm.statistics()[f"harm:{GYRO}"] > 1.0
    rows, found = device.disagree(20, GYRO)
    assert (rows, found is not None) == (8, True)  # the drift's first rows


def test_a_suspicion_that_passes_is_forgotten(device: Device) -> None:
    device.live()
    device.harm.follow(device.rows[0], 0, "first", evidence=0.2, drifts=False)
    device.harm.hear("first", {GYRO: 1})
    device.live(1)
    assert device.harm.wanted == ()
    assert f"harm:{GYRO}" not in device.harm.statistics()


def test_a_quiet_witness_that_keeps_disagreeing_speaks_of_harm(device: Device) -> None:
    device.live(QUIET_ROWS)
    device.row(0, {}, drifts=True)
    rows, found = device.disagree(40, GYRO)
    # D gains 0.75 a row, at most 1.2 in a run of two: over 4 within the fourth run, when 8 rows were heard at last
    assert found is not None
    assert (rows, found.engine, found.kind, found.raised) == (8, GYRO, "harm", True)
    assert found.numbers["disagreement"] == 1.0
    assert found.numbers["gain_at_least"] == pytest.approx(2 * 0.9 + 1.0 - 2)
    assert found.numbers["quietness"] < 0.5
    assert device.harm.harmful == GYRO
    assert device.harm.wanted == ()


def test_one_exercise_that_both_see_differently_is_not_harm(device: Device) -> None:
    device.live()
    device.row(0, {}, drifts=True)
    assert device.disagree(64, GYRO, run=1000) == (64, None)


def test_a_witness_whose_own_inputs_left_their_regimes_is_not_believed(device: Device) -> None:
    device.live()
    device.row(0, {}, drifts=True, far=slice(8, 12))
    _, found = device.disagree(64, ACCEL, GYRO, far=slice(8, 12))  # the gyro's features
    assert found is not None
    assert found.engine == ACCEL


def test_a_witness_is_believed_after_its_quiet_rows_only(device: Device) -> None:
    device.live(QUIET_ROWS - 20)
    device.row(0, {}, drifts=True)
    rows, found = device.disagree(64, GYRO)
    assert found is not None
    assert rows == 19  # with the one that raised it the 40th


def test_what_was_not_said_by_the_deadline_is_not_said_any_more(device: Device) -> None:
    device.live()
    device.row(0, {}, drifts=True)
    for _ in range(MOST_ROWS):
        assert device.row(1, {GYRO: 1}) is None
    assert device.harm.wanted == ()
    assert device.disagree(200, GYRO) == (200, None)


def test_harm_ends_with_the_drift_and_the_next_drift_is_judged_anew(device: Device) -> None:
    device.live()
    device.row(0, {}, drifts=True)
    device.disagree(40, GYRO)
    ended = device.live(1)
    assert ended is not None
    assert (ended.kind, ended.raised, ended.engine) == ("harm", False, GYRO)
    assert device.harm.harmful == ""
    assert device.live(QUIET_ROWS) is None
    device.row(0, {}, drifts=True)
    rows, found = device.disagree(40, GYRO)
    assert (rows, found is not None) == (8, True)


def test_the_quietest_of_those_that_speak_is_the_one(witnessed: Reference, stream: RegimeStream) -> None:
    names = []
    for far in (slice(0, 1), slice(8, 9)):  # one wild row of a witness: louder, below half
        device = Device(witnessed, stream)
        device.live(QUIET_ROWS - 1)
        row = device.rows[device.number].copy()
        row[far] += 50.0
        device.harm.follow(row, 0, "loud", evidence=0.0, drifts=False)
        device.row(0, {}, drifts=True)
        _, found = device.disagree(64, ACCEL, GYRO)
        assert found is not None
        names.append(found.engine)
    assert names == [GYRO, ACCEL]


def test_what_is_said_of_unknown_rows_or_by_strangers_is_not_heard(device: Device) -> None:
    device.live()
    device.row(0, {}, drifts=True)
    for number in range(64):
        assert device.harm.hear(f"never-{number}", {GYRO: 1}) is None
    assert device.disagree(64, "wrist-floor") == (64, None)
    assert device.harm.statistics()["heard"] == 64.0


def test_rows_of_another_engine_are_no_evidence_against_the_serving_one(device: Device) -> None:
    device.live()
    device.row(0, {}, drifts=True)
    for _ in range(64):
        assert device.row(-1, {GYRO: 1}) is None


def test_a_restart_keeps_quietness_and_what_was_said(device: Device, witnessed: Reference) -> None:
    device.live()
    device.row(0, {}, drifts=True)
    device.disagree(40, GYRO)
    other = HarmMonitor(witnessed)
    other.restore(device.harm.state())
    assert other.harmful == GYRO
    assert other.statistics()[f"quietness:{GYRO}"] == device.harm.statistics()[f"quietness:{GYRO}"]
    ended = other.follow(device.rows[0], 0, 1, evidence=0.0, drifts=False)
    assert ended is not None
    assert ended.engine == GYRO


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=80))
def test_evidence_rises_by_no_more_than_the_cap_in_a_run(
    witnessed: Reference, stream: RegimeStream, rows: list[tuple[int, int]]
) -> None:
    device = Device(witnessed, stream)
    device.live(2)
    device.row(0, {}, drifts=True)
    begun, run = 0.0, -1
    for predicted, said in rows:
        before = device.harm.statistics()[f"harm:{GYRO}"] * H
        if predicted != run:
            begun, run = before, predicted
        device.row(predicted, {GYRO: said})
        after = device.harm.statistics()[f"harm:{GYRO}"] * H
        assert after >= 0.0
        assert after <= begun + 1.2 + 1e-9


def test_witnesses_are_written_and_read_as_they_are(witnessed: Reference) -> None:
    read = load_reference(dump_reference(witnessed))
    assert [one.engine for one in read.witnesses] == [ACCEL, GYRO]
    assert read.digest() == witnessed.digest()
    assert read.witnesses[1].regimes.columns.tolist() == [8, 9, 10, 11]


def test_disagreement_is_per_class_the_serving_engine_says(stream: RegimeStream) -> None:
    rows = stream.rows(8, seed=1)
    said = rows.predicted.copy()
    ones = np.flatnonzero(rows.predicted == 1)
    said[ones[: len(ones) // 4]] = 0
    reference = build_reference(
        rows, stream.names, guard=NO_GUARD, held_out=stream.rows(8, seed=2),
        witnesses=[WitnessRows(GYRO, (8, 9, 10, 11), said)],
    )  # fmt: skip
    assert reference.witnesses[0].disagreement.tolist() == [0.0, 0.25]


def test_disagreement_that_the_reference_knows_is_expected(witnessed: Reference, stream: RegimeStream) -> None:
    """With 0.75 expected nothing rises: 1 - (0.75 + 0.25) = 0."""
    one = witnessed.witnesses[1]
    used_to = Witness(one.engine, one.regimes, np.full(2, 0.75, np.float32))
    device = Device(replace(witnessed, witnesses=(used_to,)), stream)
    device.live()
    device.row(0, {}, drifts=True)
    assert device.disagree(64, GYRO) == (64, None)
