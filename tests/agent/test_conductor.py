import asyncio
import io
from pathlib import Path

import numpy as np

from agent.conductor import Conductor, DecisionClock
from agent.config import AgentConfig
from agent.contract.plan import WorkerPlan
from agent.intake import READ_AT_ONCE, Intake, Records
from agent.journal import Journal, text_style
from agent.observation import RECORD, Observation, RingWriter
from agent.parts import build_parts


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

    def read(self) -> tuple[Records, int]:
        self.reads += 1
        if self.reads <= 50:
            for _ in range(READ_AT_ONCE + 10):
                self.writer.write(Observation(arrival_ns=1, engine=0, first_engine=0))
        return super().read()


def test_a_worker_that_writes_faster_than_is_read_leaves_the_loop_time_for_other_things(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    async def story() -> None:
        service = {"name": "wrist", "artifact": artifacts["wrist"], "fallbacks": [artifacts["wrist-accel"]]}
        config = AgentConfig.model_validate(
            {"state": {"folder": tmp_path}, "serving": {"unix": "", "tcp": "127.0.0.1:0"}, "service": [service]}
        )
        parts = build_parts(config, tmp_path / "agent.toml", Journal(io.StringIO(), style=text_style), {})
        parts.intake.close_all()
        parts.intake = busy = Busy(WorkerPlan(1, tuple(one.plan for one in parts.blueprints)))
        try:
            conductor = Conductor(parts, {})
            conductor.read_observations()
            assert busy.reads == 1
            turns = 0
            while busy.statistics()["behind"]:
                turns += 1
                await asyncio.sleep(0)
            assert turns >= 50
            written = 50 * (READ_AT_ONCE + 10)
            assert busy.statistics()["read"] + busy.statistics()["gaps"] == written
            assert parts.monitors["wrist"].statistics()["counters"]["requests"] == busy.statistics()["read"]
        finally:
            busy.writer.close()
            parts.close()

    asyncio.run(story())
