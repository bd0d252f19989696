from dataclasses import replace

import numpy as np
import pytest

from agent.contract.plan import WorkerPlan
from agent.intake import READ_AT_ONCE, RECORDS_PER_S, SAVED_RECORDS, Intake
from agent.monitor import Monitor, MonitorPlan
from agent.observation import NO_ENGINE, Observation, Outcome, RingWriter
from tests.models import engine_plan, floor_plan, service_plan

LINEUP = ("wrist", "wrist-accel", "wrist-floor")


@pytest.fixture
def plans(tmp_path):
    engines = {name: engine_plan(tmp_path, name) for name in LINEUP[:2]} | {"wrist-floor": floor_plan()}

    def make(generation, names):
        return WorkerPlan(generation, (service_plan(*(engines[name] for name in names)),))

    return make


def test_overlapping_generations_are_numbered_in_one_sequence(plans) -> None:
    intake = Intake([LINEUP], slots=16)
    old, new = RingWriter(intake.open(plans(1, LINEUP))), RingWriter(intake.open(plans(2, LINEUP)))
    for writer in (old, new, old):
        writer.write(Observation(arrival_ns=1, engine=0, first_engine=0))
    records, gaps = intake.read()
    assert records["sequence"].tolist() == [0, 1, 2]
    assert gaps == 0
    new.write(Observation(arrival_ns=2))
    assert intake.statistics() == {"read": 3, "gaps": 0, "skipped": 0, "behind": 1, "rings": 2}
    assert intake.read()[0]["sequence"].tolist() == [3]
    for writer in (old, new):
        writer.close()
    intake.close_all()


def test_a_lineup_with_an_engine_left_out_keeps_the_configured_numbers(plans) -> None:
    intake = Intake([LINEUP], slots=16)
    writer = RingWriter(intake.open(plans(1, ("wrist-accel", "wrist-floor"))))
    writer.write(Observation(arrival_ns=1, engine=0, first_engine=0))
    writer.write(Observation(arrival_ns=1, engine=1, first_engine=0))
    writer.write(Observation(arrival_ns=1, engine=NO_ENGINE, first_engine=NO_ENGINE))
    records, _ = intake.read()
    assert records["engine"].tolist() == [1, 2, NO_ENGINE]
    assert records["first_engine"].tolist() == [1, 1, NO_ENGINE]
    writer.close()
    intake.close_all()


def test_what_an_ended_worker_left_is_read_before_its_ring_goes(plans) -> None:
    intake = Intake([LINEUP], slots=16)
    writer = RingWriter(intake.open(plans(1, LINEUP)))
    writer.write(Observation(arrival_ns=1))
    writer.close()
    intake.close(1)
    assert len(intake.read()[0]) == 1
    assert len(intake.read()[0]) == 0
    assert intake.statistics()["rings"] == 0


def test_overwritten_observations_are_counted_once(plans) -> None:
    intake = Intake([LINEUP], slots=4)
    writer = RingWriter(intake.open(plans(1, LINEUP)))
    for _ in range(10):
        writer.write(Observation(arrival_ns=1))
    records, gaps = intake.read()
    assert (len(records), gaps) == (4, 6)
    assert intake.read()[1] == 0
    assert intake.statistics()["gaps"] == 6
    assert np.all(np.diff(records["sequence"]) == 1)
    writer.close()
    intake.close_all()


def test_what_waits_is_taken_in_by_a_bounded_number_of_reads(plans) -> None:
    intake = Intake([LINEUP], slots=4096)
    assert intake.reads_behind() == 1
    writer = RingWriter(intake.open(plans(1, LINEUP)))
    for _ in range(5000):  # more than there are slots
        writer.write(Observation(arrival_ns=1))
    assert intake.reads_behind() == 5
    writer.close()
    intake.close(1)
    assert sum(len(intake.read()[0]) for _ in range(intake.reads_behind())) == 4096
    assert intake.statistics()["rings"] == 0
    intake.close_all()


def test_what_a_replaced_engine_still_answers_counts_as_answered_by_none(plans, tmp_path) -> None:
    intake = Intake([LINEUP], slots=16)
    old = RingWriter(intake.open(plans(1, LINEUP)))
    successor = replace(engine_plan(tmp_path / "new", "wrist", version=2), digest="2" * 64)
    new = RingWriter(intake.open(WorkerPlan(2, (service_plan(successor, floor_plan()),))))
    intake.renumber([(successor, floor_plan())])
    for writer in (old, new):
        writer.write(Observation(arrival_ns=1, engine=0, first_engine=0))
        writer.write(Observation(arrival_ns=1, engine=2 if writer is old else 1, first_engine=0))
    records, _ = intake.read()
    assert records["engine"].tolist() == [NO_ENGINE, 1, 0, 1]  # the floor is the same one
    assert records["first_engine"].tolist() == [NO_ENGINE, NO_ENGINE, 0, 0]
    for writer in (old, new):
        writer.close()
    intake.close_all()


def test_above_the_budget_the_oldest_records_are_left_out_and_every_request_is_counted(plans) -> None:
    intake = Intake([LINEUP], slots=4096)
    writer = RingWriter(intake.open(plans(1, ("wrist-accel", "wrist-floor"))))
    monitor = Monitor(MonitorPlan("wrist", 0, LINEUP))
    read = lost = number = 0
    for beat in range(40):  # 1000 records every 50 ms: 20,000 a second
        for _ in range(1000):
            number += 1
            writer.write(Observation(arrival_ns=number, engine=0, first_engine=0, latency_us=50.0, rows=2))
        for _ in range(intake.reads_behind()):
            records, gaps = intake.read(beat * 50_000_000)
            monitor.count(intake.take_tallies())
            monitor.observe(records, gaps=gaps, counted=True)
            assert len(records) == 0 or records["arrival_ns"][-1] == number  # the newest are read
            read, lost = read + len(records), lost + gaps
    assert read == pytest.approx(SAVED_RECORDS + RECORDS_PER_S * 39 * 0.05, abs=1)
    assert read + lost == number
    assert intake.statistics()["skipped"] == lost
    assert monitor.statistics()["counters"] == {"requests": 40_000, "rows": 80_000, "ok": 40_000, "gaps": lost}
    latency = monitor.statistics()["latency"]["wrist-accel"]
    assert (latency["count"], latency["total_us"]) == (40_000, 2_000_000)
    assert latency["p50_us"] == pytest.approx(50.0, rel=0.02)
    writer.close()
    intake.close_all()


def test_a_few_records_wait_for_the_next_beat_and_a_lot_does_not(plans) -> None:
    intake = Intake([LINEUP], slots=4096)
    assert not intake.in_arrears
    writer = RingWriter(intake.open(plans(1, LINEUP)))
    for waiting, arrears in ((READ_AT_ONCE - 1, False), (2 * READ_AT_ONCE, True)):
        for _ in range(waiting):
            writer.write(Observation(arrival_ns=1))
        assert intake.in_arrears is arrears
        while intake.in_arrears:
            intake.read()
    for _ in range(SAVED_RECORDS):  # more than may be read now
        writer.write(Observation(arrival_ns=1))
    intake.read()
    while intake.in_arrears:
        intake.read()
    writer.close()
    intake.close_all()


def test_requests_of_a_worker_that_ended_are_counted_to_the_last(plans) -> None:
    intake = Intake([LINEUP], slots=16)
    writer = RingWriter(intake.open(plans(1, LINEUP)))
    for _ in range(100):
        writer.write(Observation(arrival_ns=1, engine=2, outcome=Outcome.FLOOR))
    writer.close()
    intake.close(1)
    for _ in range(intake.reads_behind()):
        intake.read()
    [(service, tally)] = intake.take_tallies()
    assert (service, tally.by_outcome()[Outcome.FLOOR]) == (0, 100)
    assert intake.take_tallies() == []
    intake.close_all()
