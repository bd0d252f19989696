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
from agent.watchdog import Watch, Watchdog
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


class Hesitant(RunControl):
    """An end order that is on its way for as long as it is held up."""

    def __init__(self) -> None:
        super().__init__()
        self.on_its_way, self.go = threading.Event(), threading.Event()

    def stop(self) -> None:
        self.on_its_way.set()
        self.go.wait(30)
        super().stop()


class Asking:
    """An engine that answers whether its run was told to end, once the order has had every chance to come."""

    inputs: tuple[TensorPlan, ...] = ()
    outputs: tuple[TensorPlan, ...] = ()
    warm_us = p95_us = 0.0
    example = None

    def __init__(self, order: threading.Thread) -> None:
        self.order = order

    def run(self, feeds: object, wanted: object = (), *, control: RunControl | None = None) -> dict[str, np.ndarray]:
        del feeds, wanted
        self.order.join(30)
        assert control is not None
        return {"stopped": np.array(control.stopped)}


def test_a_late_end_order_for_a_short_way_run_never_reaches_the_strict_run_behind_it() -> None:
    dog, control = Watchdog(600.0, lambda: None), Hesitant()
    watch = Watch(dog, control)
    now_ns = clock.monotonic_ns()
    watch.begin(now_ns, now_ns)
    order = threading.Thread(target=watch.end_if_late, args=(now_ns + 1,))
    order.start()
    assert control.on_its_way.wait(30)
    watch.started_ns = 0  # it ended by itself meanwhile, without the lock
    answers: list[dict[str, np.ndarray]] = []
    far_ns = now_ns + 600 * 10**9
    strict = threading.Thread(target=lambda: answers.append(watch.run(Asking(order), {}, far_ns)))
    strict.start()
    control.go.set()
    strict.join(30)
    assert [bool(answer["stopped"]) for answer in answers] == [False]
    dog.close()
