import asyncio
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.clock import wall_s
from agent.conductor import Conductor, DecisionClock
from agent.config import AgentConfig
from agent.contract.messages import Telemetry
from agent.contract.plan import WorkerPlan
from agent.intake import READ_AT_ONCE, Intake, Records
from agent.journal import Journal, text_style
from agent.observation import RECORD, Observation, RingWriter
from agent.parts import Parts, build_parts


def records(*times_s: float):
    made = np.zeros(len(times_s), RECORD)
    made["data_time_s"] = times_s
    return made


def test_the_clock_of_the_data_moves_with_it_and_never_back() -> None:
    clock = DecisionClock("data", 5.0)
    assert clock.now_s() == 5.0
    seen = [(part["data_time_s"].tolist(), clock.now_s()) for part in clock.slices(records(10.1, 10.9, 11.2, 3.0))]
    assert seen == [([10.1, 10.9], 10.9), ([11.2], 11.2), ([3.0], 11.2)]


def test_records_without_a_time_do_not_move_it() -> None:
    clock = DecisionClock("data", 5.0)
    assert [len(part) for part in clock.slices(records(np.nan, np.nan))] == [2]
    assert clock.now_s() == 5.0
    assert [len(part) for part in clock.slices(records())] == [0]


def test_a_timestamp_far_ahead_does_not_move_it_for_ever() -> None:
    clock = DecisionClock("data", 0.0)
    list(clock.slices(records(1e9, 1e9 + 1)))  # the first is believed
    list(clock.slices(records(4e9, 1e9 + 2, np.inf, *[4e9] * 10, 1e9 + 3, *[4e9] * 10)))
    assert clock.now_s() == 1e9 + 3
    assert clock.ignored == 21
    list(clock.slices(records(1e9 + 86_000)))
    assert clock.now_s() == 1e9 + 86_000


def test_a_request_of_many_rows_is_one_witness_of_its_time() -> None:
    clock = DecisionClock("data", 0.0)
    batch = records(*[4e9] * 64)
    batch["row"] = np.arange(64)
    list(clock.slices(np.concatenate([records(1e9), batch])))
    assert (clock.now_s(), clock.ignored) == (1e9, 1)


def test_data_after_days_without_any_moves_it_again() -> None:
    clock = DecisionClock("data", 0.0)
    list(clock.slices(records(1e9)))
    for row in range(20):
        list(clock.slices(records(1e9 + 3 * 86_400 + row)))
    assert clock.now_s() == 1e9 + 3 * 86_400 + 19
    assert clock.ignored == 15


def test_a_restart_believes_the_first_timestamp_again() -> None:
    clock = DecisionClock("data", 1e9)
    list(clock.slices(records(1e9 + 30 * 86_400)))
    assert clock.now_s() == 1e9 + 30 * 86_400


def test_the_wall_clock_takes_batches_as_they_come() -> None:
    clock = DecisionClock("wall", 0.0)
    assert [len(part) for part in clock.slices(records(1.0, 2.0, 3.0))] == [3]
    assert clock.now_s() > 1e9


class Busy(Intake):
    """An intake whose worker writes more than one read takes, before each of the first 50 reads."""

    def __init__(self, plan: WorkerPlan) -> None:
        super().__init__([tuple(engine.engine for engine in service.engines) for service in plan.services])
        self.writer = RingWriter(self.open(plan))
        self.reads = 0

    def read(self, now_ns: int | None = None) -> tuple[Records, int]:
        self.reads += 1
        if self.reads <= 50:
            for _ in range(READ_AT_ONCE + 10):
                self.writer.write(Observation(arrival_ns=1, engine=0, first_engine=0))
        return super().read(now_ns)


@contextlib.contextmanager
def conducting(artifacts: dict[str, Path], folder: Path, **sections: object) -> Iterator[tuple[Conductor, Parts]]:
    """A conductor with its parts, that has begun nothing."""
    service = {"name": "wrist", "artifact": artifacts["wrist"], "fallbacks": [artifacts["wrist-accel"]]}
    config = AgentConfig.model_validate(
        {"state": {"folder": folder}, "serving": {"unix": "", "tcp": "127.0.0.1:0"}, "service": [service], **sections}
    )
    parts = build_parts(config, folder / "agent.toml", Journal(io.StringIO(), style=text_style), {})
    try:
        yield Conductor(parts, {}), parts
    finally:
        parts.close()


def test_a_worker_that_writes_faster_than_is_read_leaves_the_loop_time_for_other_things(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    async def story() -> None:
        with conducting(artifacts, tmp_path) as (conductor, parts):
            parts.intake.close_all()
            parts.intake = busy = Busy(WorkerPlan(1, tuple(one.plan for one in parts.blueprints)))
            conductor.read_observations()
            assert busy.reads == 1
            turns = 0
            while busy.reads < 50 or busy.statistics()["behind"]:
                turns += 1
                await asyncio.sleep(0)
                if not busy.in_arrears:
                    conductor.read_observations()  # the next beat
            assert turns >= 40
            numbers = busy.statistics()
            assert numbers["read"] + numbers["gaps"] + numbers["skipped"] == 50 * (READ_AT_ONCE + 10)
            assert numbers["skipped"] > 0
            assert parts.monitors["wrist"].statistics()["counters"]["requests"] == 50 * (READ_AT_ONCE + 10)
            busy.writer.close()

    asyncio.run(story())


def test_telemetry_counts_what_happened_in_its_window(artifacts: dict[str, Path], tmp_path: Path) -> None:
    async def story() -> None:
        with conducting(artifacts, tmp_path, link={"enabled": True}) as (conductor, parts):
            for faults in (2, 2, 5):
                conductor.faults = faults
                conductor.send_telemetry()
            rows = parts.outbox.take(10, skip_ids=(), skip_topics=(), now=wall_s())
            counters = [Telemetry.decode(row.body).counters for row in rows]
            assert [one["agent.faults"] for one in counters] == [2, 0, 3]
            assert {one["outbox.dropped"] for one in counters} == {one["ring.gaps"] for one in counters} == {0}

    asyncio.run(story())


def test_a_worker_that_is_wanted_while_the_same_is_loading_is_that_one(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        with conducting(artifacts, tmp_path) as (conductor, parts):
            try:
                conductor._start_worker()
                conductor._start_worker()  # the one that serves was lost meanwhile
                assert conductor.generations.incoming == 1
                monkeypatch.setattr(parts.supervisor, "lineup", lambda _service: ("wrist-accel",))
                conductor._start_worker()  # other engines are to be loaded now
                assert conductor.generations.incoming == 2
                assert conductor.renew() == 3  # asked for: files may have changed
                assert conductor.generations.incoming == 3
            finally:
                await conductor.end()

    asyncio.run(story())
