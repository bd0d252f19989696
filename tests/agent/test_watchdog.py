"""The watchdog ends late runs, tells of those that cannot be ended, and sleeps while nothing runs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from agent import clock
from agent.contract.errors import EngineFailed
from agent.contract.plan import TensorPlan
from agent.engine import RunControl
from agent.lineup import load_lineup
from agent.watchdog import Watchdog
from tests.models import engine_plan, service_plan, window

TOLD = 200.0  # a window shifted by this makes a troubled engine do its worst


class Deaf:
    """An engine whose run takes no orders, until the test lets it go."""

    inputs: tuple[TensorPlan, ...] = ()
    outputs: tuple[TensorPlan, ...] = ()
    warm_us = p95_us = 0.0

    def __init__(self) -> None:
        self.released = threading.Event()

    def run(self, feeds: object, wanted: object = (), *, control: RunControl | None = None) -> dict[str, np.ndarray]:
        del feeds, wanted, control
        self.released.wait(30)
        return {}


def test_a_run_that_ignores_its_end_is_reported_as_unstoppable() -> None:
    engine = Deaf()
    dog = Watchdog(-0.9, engine.released.set)  # fatal 0.1 s after the start
    dog.watch().run(engine, {}, clock.monotonic_ns())
    assert engine.released.is_set()
    dog.close()


def test_a_loop_without_end_is_ended_at_its_limit(tmp_path: Path) -> None:
    engine = load_lineup(service_plan(engine_plan(tmp_path, "wrist", trouble="slow")))[0].seats[0].engine
    unstoppable: list[str] = []
    dog = Watchdog(600.0, lambda: unstoppable.append("stuck"))
    watch = dog.watch()
    for _ in range(2):  # and the engine can be used again
        with pytest.raises(EngineFailed, match="was ended"):
            watch.run(engine, {"window": window(TOLD)}, clock.monotonic_ns() + 50_000_000)
        assert watch.run(engine, {"window": window()}, clock.monotonic_ns() + 60_000_000_000)
    assert unstoppable == []
    dog.close()


def test_the_watchdog_sleeps_while_nothing_runs_and_wakes_for_a_run(tmp_path: Path) -> None:
    engine = load_lineup(service_plan(engine_plan(tmp_path, "wrist", trouble="slow")))[0].seats[0].engine
    dog = Watchdog(5.0, lambda: None)
    watch = dog.watch()
    while not dog.asleep:
        clock.sleep(0.01)
    with pytest.raises(EngineFailed, match="was ended"):
        watch.run(engine, {"window": window(TOLD)}, clock.monotonic_ns() + 50_000_000)
    dog.close()
