"""One request through guard, lineup and ring, in this process and without HTTP."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent import clock
from agent.contract.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)
from agent.contract.plan import EngineKind, EnginePlan, GuardPolicy, ServicePlan, TensorPlan
from agent.decisions.events import EngineFailed as EngineFault
from agent.engine import RunControl
from agent.engine.tuning import Times
from agent.lineup import Lineup, Seat, load_lineup
from agent.monitor import Monitor, MonitorPlan
from agent.observation import MAX_ROWS, NO_ENGINE, Outcome, RingReader, RingWriter, create_ring
from agent.serving import Answer, Request, Service, Serving
from tests.models import (
    PROBABILITY,
    WINDOW,
    engine_plan,
    expected_probability,
    floor_plan,
    guard_plan,
    model,
    save,
    service_plan,
    window,
)

Story = Callable[["Stage"], Awaitable[None]]
THREAD = 0.0  # as inline_us: every request goes through the queue and the service's thread
TOLD = 200.0  # a window shifted by this makes a troubled engine do its worst


class Stage:
    """A Serving over one service, with the ring's other end."""

    def __init__(self, plan: ServicePlan, ring_fd: int, stuck_after_s: float = 5.0, inline_us: float = 1e6) -> None:
        lineup, _ = load_lineup(plan)
        self.service = Service(0, plan, lineup)
        self.unstoppable: list[str] = []
        self.troubled = 0
        self.serving = Serving(
            [self.service], RingWriter(ring_fd), stuck_after_s=stuck_after_s,
            on_unstoppable=lambda: self.unstoppable.append("stuck"), on_trouble=self._count,
            inline_us=inline_us,
        )  # fmt: skip
        self.ring = RingReader(ring_fd)

    def submit(self, x: np.ndarray, **options: Any) -> asyncio.Future[Answer | ServingError]:
        future: asyncio.Future[Answer | ServingError] = asyncio.get_running_loop().create_future()
        request = Request("wrist", {"window": x}, clock.monotonic_ns(), **options)
        self.serving.submit(request, future.set_result)
        return future

    async def ask(self, x: np.ndarray, **options: Any) -> Answer:
        reply = await self.submit(x, **options)
        if isinstance(reply, ServingError):
            raise reply
        return reply

    def _count(self) -> None:
        self.troubled += 1


@pytest.fixture
def ring_fd() -> Iterator[int]:
    fd = create_ring()
    yield fd
    os.close(fd)


def play(plan: ServicePlan, ring_fd: int, story: Story, **options: Any) -> None:
    async def scene() -> None:
        stage = Stage(plan, ring_fd, **options)
        try:
            await asyncio.wait_for(story(stage), 60)
        finally:
            stage.serving.close()

    asyncio.run(scene())


def patient(stage: Stage) -> None:
    """The second engine counts as slow: a run before it leaves it half of the time, not the 20 ms of a quick one.

    A busy machine takes those 20 ms away, and then the floor answers.
    """
    stage.service.lineup.seats[1].engine.times = Times(1e6, 1e6)  # type: ignore[attr-defined]


def outputs(answer: Answer) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.array for tensor in answer.outputs}


def three(folder: Path, trouble: str = "", **changes: Any) -> ServicePlan:
    engines: list[EnginePlan] = [
        engine_plan(folder, "wrist", version=3, trouble=trouble),
        engine_plan(folder, "wrist-accel", scale=2.0),
        floor_plan(),
    ]
    return service_plan(*engines, **changes)


def test_a_good_request_is_answered_by_the_active_engine(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        x = window(rows=2)
        answer = await stage.ask(x)
        assert (answer.engine, answer.version, answer.reason, answer.guard) == ("wrist", "3", "active", "")
        np.testing.assert_allclose(outputs(answer)["probability"], expected_probability(x), atol=1e-6)

    play(three(tmp_path), ring_fd, story)


def test_hidden_views_are_never_in_an_answer_and_cannot_be_asked_for(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        assert list(outputs(await stage.ask(window()))) == ["probability"]
        with pytest.raises(InvalidRequest, match="no output 'ew_view_channels', only probability"):
            await stage.ask(window(), outputs=("ew_view_channels",))

    play(three(tmp_path), ring_fd, story)


def test_every_row_leaves_a_record_with_view_class_and_entropy(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        x = window(rows=3)
        await stage.ask(x, data_time_s=77.5)
        records = stage.ring.read()
        expected = expected_probability(x)
        assert records["row"].tolist() == [0, 1, 2]
        assert set(records["rows"].tolist()) == {3}
        assert set(records["outcome"].tolist()) == {Outcome.OK}
        assert set(records["data_time_s"].tolist()) == {77.5}
        assert (records["latency_us"] > 0).all()
        assert records["predicted"].tolist() == expected.argmax(axis=1).tolist()
        np.testing.assert_allclose(records["confidence"], expected.max(axis=1), rtol=1e-5)
        np.testing.assert_allclose(records["entropy"], -(expected * np.log(expected)).sum(axis=1), rtol=1e-5)
        assert set(records["view_width"].tolist()) == {3}
        np.testing.assert_allclose(records["view"][:, :3], x.mean(axis=1), atol=1e-6)

    play(three(tmp_path), ring_fd, story)


def test_a_large_batch_leaves_a_bounded_number_of_records(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        await stage.ask(window(rows=MAX_ROWS + 36))
        records = stage.ring.read()
        assert len(records) == MAX_ROWS
        assert set(records["rows"].tolist()) == {MAX_ROWS + 36}
        assert stage.service.counters.rows == MAX_ROWS + 36

    play(three(tmp_path), ring_fd, story)


# --- failover ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("trouble", "code"), [("raise", "engine_failed"), ("nan", "non_finite")])
def test_the_same_request_is_answered_by_the_next_engine(
    tmp_path: Path, ring_fd: int, trouble: str, code: str
) -> None:
    async def story(stage: Stage) -> None:
        x = window(TOLD)
        answer = await stage.ask(x)
        assert (answer.engine, answer.reason) == ("wrist-accel", f"failover: wrist {code}")
        np.testing.assert_allclose(outputs(answer)["probability"], expected_probability(x, 2.0), atol=1e-5)
        [record] = stage.ring.read()
        assert (record["outcome"], record["engine"], record["first_engine"]) == (Outcome.FAILED_OVER, 1, 0)
        assert stage.troubled == 1
        [told] = stage.serving.take_troubles()
        assert (told.service, told.engine, told.code, told.count) == ("wrist", "wrist", code, 1)
        assert stage.serving.take_troubles() == []
        assert (await stage.ask(window())).engine == "wrist"

    play(three(tmp_path, trouble), ring_fd, story)


@pytest.mark.parametrize("inline_us", [1e6, THREAD])
def test_a_run_past_its_deadline_is_ended_and_the_next_engine_answers_in_time(
    tmp_path: Path, ring_fd: int, inline_us: float
) -> None:
    async def story(stage: Stage) -> None:
        patient(stage)
        answer = await stage.ask(window(TOLD), deadline_ms=800.0)
        assert (answer.engine, answer.reason) == ("wrist-accel", "failover: wrist deadline_exceeded")
        assert [trouble.code for trouble in stage.serving.take_troubles()] == ["deadline_exceeded"]
        assert (await stage.ask(window())).engine == "wrist"  # the engine that was ended works again

    play(three(tmp_path, "slow"), ring_fd, story, inline_us=inline_us)


@pytest.mark.parametrize(("rows", "warm_us", "blamed"), [(8, 20_000.0, False), (8, 100.0, True), (1, 20_000.0, True)])
def test_a_deadline_too_short_for_so_many_rows_is_no_failure_of_the_engine(
    tmp_path: Path, ring_fd: int, rows: int, warm_us: float, *, blamed: bool
) -> None:
    async def story(stage: Stage) -> None:
        patient(stage)
        stage.service.lineup.seats[0].engine.times = Times(warm_us, warm_us)  # type: ignore[attr-defined]
        answer = await stage.ask(window(TOLD, rows=rows))
        assert (answer.engine, answer.reason) == ("wrist-accel", "failover: wrist deadline_exceeded")
        assert stage.ring.read()["first_engine"][0] == (0 if blamed else NO_ENGINE)
        [trouble] = stage.serving.take_troubles()
        assert trouble.text.startswith(f"engine 'wrist' missed its deadline: not done with {rows} row")

    play(three(tmp_path, "slow", deadline_ms=800.0), ring_fd, story)


def test_a_bad_value_in_a_channel_the_serving_engine_does_not_read_is_answered(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        x = window()
        x[0, 3, 2] = math.nan
        with pytest.raises(InvalidRequest, match="NaN or infinity in channel gx"):
            await stage.ask(x)
        stage.serving.prefer("wrist", "wrist-accel", "gx is not finite")
        answer = await stage.ask(x)
        assert (answer.engine, answer.guard) == ("wrist-accel", "not_finite:gx")
        x[0, 3, 0] = math.nan
        with pytest.raises(InvalidRequest, match="in channel ax"):
            await stage.ask(x)

    plan = three(tmp_path)
    accel = replace(plan.engines[1], reads=("ax", "ay"))
    play(replace(plan, engines=(plan.engines[0], accel, plan.engines[2])), ring_fd, story)


def test_a_stuck_run_is_ended_long_before_a_generous_deadline(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        answer = await stage.ask(window(TOLD), deadline_ms=600_000.0)
        assert answer.reason == "failover: wrist stuck"
        assert stage.unstoppable == []

    play(three(tmp_path, "slow"), ring_fd, story, stuck_after_s=0.5)


def test_when_all_models_fail_the_floor_answers_and_is_marked(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        answer = await stage.ask(window(TOLD, rows=2))
        assert (answer.engine, answer.reason) == ("wrist-floor", "failover: wrist engine_failed")
        np.testing.assert_allclose(outputs(answer)["probability"], [[0.1, 0.2, 0.3, 0.4]] * 2)
        record = stage.ring.read()[0]
        assert (record["outcome"], record["engine"], record["view_width"]) == (Outcome.FLOOR, 1, 0)
        assert record["predicted"] == 3

    play(service_plan(engine_plan(tmp_path, "wrist", trouble="raise"), floor_plan()), ring_fd, story)


def test_the_floor_answers_even_after_the_deadline_was_used_up(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        answer = await stage.ask(window(TOLD), deadline_ms=100.0)
        assert (answer.engine, answer.reason) == ("wrist-floor", "failover: wrist deadline_exceeded")

    play(service_plan(engine_plan(tmp_path, "wrist", trouble="slow"), floor_plan()), ring_fd, story)


def test_a_floor_that_is_configured_to_refuse_refuses(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(Overloaded, match="only the floor is left"):
            await stage.ask(window(TOLD))
        [record] = stage.ring.read()
        assert (record["outcome"], record["engine"], record["first_engine"]) == (Outcome.ERROR, NO_ENGINE, NO_ENGINE)
        assert stage.serving.statistics()["errors"] == 1
        assert stage.serving.statistics()["floor"] == 0

    plan = service_plan(engine_plan(tmp_path, "wrist", trouble="raise"), floor_plan(), floor_status=503)
    play(plan, ring_fd, story)


def test_a_refused_floor_is_a_failure_of_the_engine_that_was_tried_first(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        for seed in range(4):  # the first one alone might be the request's fault
            with pytest.raises(Overloaded):
                await stage.ask(window(TOLD, seed=seed))
        plan = MonitorPlan("wrist", 0, ("wrist", "wrist-floor"), (), {})
        monitor = Monitor(plan)
        assert monitor.observe(stage.ring.read()) == [EngineFault("wrist", "wrist", "engine_failed", 3)]
        assert monitor.statistics()["counters"]["error"] == 4

    plan = service_plan(engine_plan(tmp_path, "wrist", trouble="nan"), floor_plan(), floor_status=503)
    play(plan, ring_fd, story)


def test_a_floor_that_refuses_because_it_is_first_is_an_error_and_nobodys_failure(
    tmp_path: Path, ring_fd: int
) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.prefer("wrist", "wrist-floor", "nothing else works")
        with pytest.raises(Overloaded, match="only the floor is left"):
            await stage.ask(window())
        [record] = stage.ring.read()
        assert (record["outcome"], record["first_engine"]) == (Outcome.ERROR, NO_ENGINE)

    play(three(tmp_path, floor_status=503), ring_fd, story)


def test_without_a_floor_the_last_failure_is_the_answer(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(EngineFailed, match="engine 'wrist' failed"):
            await stage.ask(window(TOLD))
        assert stage.ring.read()["outcome"].tolist() == [Outcome.ERROR]

    play(service_plan(engine_plan(tmp_path, "wrist", trouble="raise")), ring_fd, story)


def test_without_a_floor_a_run_past_the_deadline_is_a_deadline_error(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(DeadlineExceeded):
            await stage.ask(window(TOLD), deadline_ms=50.0)
        assert stage.ring.read()["outcome"].tolist() == [Outcome.DEADLINE]

    play(service_plan(engine_plan(tmp_path, "wrist", trouble="slow")), ring_fd, story)


def test_an_empty_lineup_asks_to_come_back(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        assert not stage.service.ready
        with pytest.raises(Overloaded, match="no engine of 'wrist' is usable"):
            await stage.ask(window())

    play(service_plan(engine_plan(tmp_path, "wrist", wrong=1.0)), ring_fd, story)


def test_a_preference_holds_from_the_next_request_on(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.serving.prefer("wrist", "wrist-accel", "gyro dead")
        answer = await stage.ask(window())
        assert (answer.engine, answer.reason) == ("wrist-accel", "switched: gyro dead")
        [record] = stage.ring.read()
        assert (record["outcome"], record["engine"], record["first_engine"]) == (Outcome.OK, 1, 1)
        stage.serving.prefer("wrist", "wrist", "")
        assert (await stage.ask(window())).reason == "active"
        with pytest.raises(UnknownModel):
            stage.serving.prefer("wrist", "nobody", "")

    play(three(tmp_path), ring_fd, story)


# --- guard ---------------------------------------------------------------------------------------------------
def test_a_dead_channel_is_served_told_and_recorded(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        x = window(rows=2)
        x[1, :, 2] = 0
        answer = await stage.ask(x)
        assert answer.guard == "dead:gx"
        assert stage.ring.read()["dead_bits"].tolist() == [0, 0b100]

    play(three(tmp_path), ring_fd, story)


def test_what_the_guard_refuses_reaches_no_engine(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        x = window()
        x[0, 3, 1] = math.nan
        with pytest.raises(InvalidRequest, match="NaN or infinity in channel ay"):
            await stage.ask(x)
        [record] = stage.ring.read()
        assert (record["outcome"], record["engine"], record["not_finite_bits"]) == (
            Outcome.REFUSED_BY_GUARD, 255, 0b010
        )  # fmt: skip

    play(three(tmp_path), ring_fd, story)


def test_an_imputed_input_is_what_the_engine_sees(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        x, repaired = window(), window()
        x[0, 3, 1], repaired[0, 3, 1] = math.nan, -0.25
        answer = await stage.ask(x)
        assert answer.guard == "not_finite:ay"
        np.testing.assert_allclose(outputs(answer)["probability"], expected_probability(repaired), atol=1e-6)

    play(three(tmp_path, guard=guard_plan(not_finite=GuardPolicy.IMPUTE)), ring_fd, story)


def test_a_service_without_a_guard_serves(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        assert (await stage.ask(window() * 0)).guard == ""

    play(three(tmp_path, guard=None), ring_fd, story)


# --- what a record is made of ---------------------------------------------------------------------------------
class Odd:
    """An engine that answers what it was given, whatever was promised."""

    warm_us = p95_us = 0.0
    example = None

    def __init__(self, **answer: np.ndarray) -> None:
        self.inputs: tuple[TensorPlan, ...] = ()
        self.outputs: tuple[TensorPlan, ...] = ()
        self.answer = answer

    def run(self, feeds: object, wanted: object = (), *, control: RunControl | None = None) -> dict[str, np.ndarray]:
        del feeds, wanted, control
        return self.answer


def odd_service(plan: EnginePlan, engine: Odd) -> Service:
    service = service_plan(plan, guard=None)
    return Service(0, service, Lineup((Seat(0, plan, engine),)))


def ask_odd(service: Service, ring_fd: int, inputs: dict[str, np.ndarray]) -> tuple[list[Any], Serving]:
    """Everything that was answered to one request."""
    serving = Serving([service], RingWriter(ring_fd), stuck_after_s=5, on_unstoppable=lambda: None)
    told: list[Any] = []
    serving.submit(Request("wrist", inputs, clock.monotonic_ns()), told.append)
    serving.close()
    return told, serving


# --- whose fault it is -----------------------------------------------------------------------------------------
def lookup(folder: Path) -> EnginePlan:
    """A row of a table of four by `index`, plus `shift`: both with rows of their own."""
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["row"]),
        helper.make_node("Add", ["row", "shift"], ["y"]),
    ]
    table = numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "table")
    inputs = [
        helper.make_tensor_value_info("index", TensorProto.INT64, ["rows"]),
        helper.make_tensor_value_info("shift", TensorProto.FLOAT, ["others", 2]),
    ]
    proto = model(nodes, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])], [table])
    return EnginePlan(
        engine="lookup", version=1, digest="a" * 64, kind=EngineKind.ONNX, model_path=str(folder / "lookup.onnx"),
        model_sha256=save(proto, folder / "lookup.onnx"),
        inputs=(TensorPlan("index", "INT64", (-1,)), TensorPlan("shift", "FP32", (-1, 2))),
        outputs=(TensorPlan("y", "FP32", (-1, 2)),),
    )  # fmt: skip


def lookup_service(folder: Path) -> Service:
    engine = lookup(folder)
    constant = replace(
        engine, engine="constant", kind=EngineKind.FLOOR, model_path="", floor_outputs={"y": [0.0, 0.0]}
    )
    plan = service_plan(engine, constant, guard=None, label_output="y", deadline_ms=60_000.0)
    return Service(0, plan, load_lineup(plan)[0])


def look_up(serving: Serving, index: list[int], shift_rows: int) -> Answer | ServingError:
    told: list[Answer | ServingError] = []
    feeds = {"index": np.array(index, np.int64), "shift": np.zeros((shift_rows, 2), np.float32)}
    serving.submit(Request("wrist", feeds, clock.monotonic_ns()), told.append)
    [reply] = told
    return reply


@pytest.fixture
def tables(tmp_path: Path, ring_fd: int) -> Iterator[Serving]:
    serving = Serving(
        [lookup_service(tmp_path)], RingWriter(ring_fd), stuck_after_s=60, on_unstoppable=lambda: None, inline_us=1e9
    )
    yield serving
    serving.close()


def faults(ring_fd: int) -> int:
    monitor = Monitor(MonitorPlan("wrist", 0, ("lookup", "constant"), (), {}))
    events = monitor.observe(RingReader(ring_fd).read())
    return sum(event.count for event in events if isinstance(event, EngineFault))


def test_inputs_of_different_lengths_that_do_not_run_are_the_callers_mistake(tables: Serving, ring_fd: int) -> None:
    for _ in range(3):
        reply = look_up(tables, [0, 1], shift_rows=3)
        assert isinstance(reply, InvalidRequest)
        assert str(reply).startswith(
            "input 'index' has 2 rows and input 'shift' has 3: a run of engine 'lookup' failed"
        )
    assert tables.statistics()["requests"] == 0  # like every request that does not fit
    assert tables.take_troubles() == []


def test_inputs_of_different_lengths_that_do_run_are_answered(tables: Serving) -> None:
    reply = look_up(tables, [0, 1], shift_rows=1)
    assert isinstance(reply, Answer)
    assert outputs(reply)["y"].tolist() == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize(
    ("asked", "blamed"),
    [
        ([[9], [9], [9], [9]], 0),  # the same nonsense again and again
        ([[9], [1], [8], [1], [7], [1], [6]], 0),  # others are answered meanwhile
        ([[9], [8], [7], [6]], 3),  # nobody is answered, whatever is asked
    ],
)
def test_nonsense_benches_no_engine_that_answers_others(
    tables: Serving, ring_fd: int, asked: list[list[int]], blamed: int
) -> None:
    for index in asked:
        reply = look_up(tables, index, shift_rows=1)
        assert isinstance(reply, Answer)
        assert reply.engine == ("lookup" if index == [1] else "constant")
    assert faults(ring_fd) == blamed
    texts = [trouble.text for trouble in tables.take_troubles()]
    assert all("out of data bounds" in text for text in texts)


class Worn(Odd):
    """An engine that was warmed, and fails at everything since."""

    example: Any = {}  # noqa: RUF012 - as every engine has it

    def run(self, feeds: object, wanted: object = (), *, control: RunControl | None = None) -> dict[str, np.ndarray]:
        del feeds, wanted, control
        raise EngineFailed("worn out")


def test_an_engine_that_fails_at_what_it_was_warmed_with_is_blamed_at_once(tmp_path: Path, ring_fd: int) -> None:
    service = lookup_service(tmp_path)
    good, constant = service.lineup.seats
    service.lineup = Lineup((replace(good, engine=Worn()), constant))
    serving = Serving([service], RingWriter(ring_fd), stuck_after_s=60, on_unstoppable=lambda: None, inline_us=1e9)
    reply = look_up(serving, [1], shift_rows=1)
    assert isinstance(reply, Answer)
    assert reply.reason == "failover: lookup engine_failed"
    assert faults(ring_fd) == 1
    serving.close()


def test_rows_are_those_of_the_free_first_axis_in_whatever_order_inputs_come(ring_fd: int) -> None:
    inputs = (TensorPlan("state", "FP32", (2, -1, 4)), TensorPlan("window", "FP32", (-1, 3)))
    plan = EnginePlan("wrist", 1, "d" * 64, EngineKind.ONNX, inputs=inputs, outputs=(PROBABILITY,))
    service = odd_service(plan, Odd(probability=np.full((3, 4), 0.25, np.float32)))
    given = {"state": np.zeros((2, 3, 4), np.float32), "window": np.zeros((3, 3), np.float32)}
    told, serving = ask_odd(service, ring_fd, given)
    assert [type(reply) for reply in told] == [Answer]
    assert RingReader(ring_fd).read()["row"].tolist() == [0, 1, 2]
    assert (service.counters.rows, serving.statistics()["unrecorded"]) == (3, 0)


def test_without_a_free_first_axis_the_label_says_how_many_rows_there_are(ring_fd: int) -> None:
    inputs = (TensorPlan("state", "FP32", (2, -1, 4)),)
    plan = EnginePlan("wrist", 1, "d" * 64, EngineKind.ONNX, inputs=inputs, outputs=(PROBABILITY,))
    service = odd_service(plan, Odd(probability=np.full((1, 4), 0.25, np.float32)))
    told, serving = ask_odd(service, ring_fd, {"state": np.zeros((2, 1, 4), np.float32)})
    assert [type(reply) for reply in told] == [Answer]
    assert RingReader(ring_fd).read()["rows"].tolist() == [1]
    assert serving.statistics()["unrecorded"] == 0


def test_a_class_number_beyond_what_a_record_holds_is_clamped(ring_fd: int) -> None:
    shares = np.zeros((1, 40_000), np.float32)
    shares[0, 39_999] = 1
    outputs = (TensorPlan("probability", "FP32", (-1, 40_000)),)
    plan = EnginePlan("wrist", 1, "d" * 64, EngineKind.ONNX, inputs=(WINDOW,), outputs=outputs)
    told, _ = ask_odd(odd_service(plan, Odd(probability=shares)), ring_fd, {"window": window()})
    assert [type(reply) for reply in told] == [Answer]
    [record] = RingReader(ring_fd).read()
    assert (record["predicted"], record["confidence"]) == (32767, 1.0)


@pytest.mark.parametrize(
    ("label", "unrecorded"),
    [(np.zeros((1, 0), np.float32), 0), (np.array([[b"cat"]], object), 1), (np.array([[1e300]]), 0)],
)
def test_an_answer_with_an_odd_label_is_given_once_and_counted(
    ring_fd: int, label: np.ndarray, unrecorded: int
) -> None:
    plan = EnginePlan("wrist", 1, "d" * 64, EngineKind.ONNX, inputs=(WINDOW,), outputs=(PROBABILITY,))
    told, serving = ask_odd(odd_service(plan, Odd(probability=label)), ring_fd, {"window": window()})
    assert [type(reply) for reply in told] == [Answer]
    assert serving.statistics()["unrecorded"] == unrecorded
    assert serving.statistics()["requests"] == 1
    assert len(RingReader(ring_fd).read()) == 1


# --- requests that do not fit --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("inputs", "options", "kind", "words"),
    [
        ({}, {}, InvalidRequest, "takes the inputs window, given were none"),
        ({"x": window()}, {}, InvalidRequest, "given were x"),
        ({"window": window()}, {"outputs": ("logits",)}, InvalidRequest, "no output 'logits'"),
        ({"window": window()}, {"version": "9"}, UnknownModel, "no version 9, it serves 3"),
        ({"window": window()}, {"deadline_ms": 0.0}, InvalidRequest, "ew_deadline_ms"),
        ({"window": window()}, {"deadline_ms": math.nan}, InvalidRequest, "ew_deadline_ms"),
        ({"window": window()}, {"service": "ankle"}, UnknownModel, "no model 'ankle', served are: wrist"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, ring_fd: int, inputs: dict[str, Any], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    async def story(stage: Stage) -> None:
        request = replace(Request("wrist", inputs, clock.monotonic_ns()), **options)
        with pytest.raises(kind, match=words):
            stage.serving.submit(request, lambda _: None)
        assert stage.serving.statistics()["requests"] == 0

    play(three(tmp_path), ring_fd, story)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (("window", "FP32", (1, 5, 3)), r"must have shape \[-1, 16, 3\], \[1, 5, 3\] was given"),
        (("window", "FP32", (16, 3)), r"\[16, 3\] was given"),
        (("window", "FP32", (0, 16, 3)), "1 to 4096 rows, not 0"),
        (("window", "FP32", (4097, 16, 3)), "1 to 4096 rows, not 4097"),
        (("window", "FP64", (1, 16, 3)), "must be FP32, FP64 was given"),
        (("x", "FP32", (1, 16, 3)), "takes the inputs window, given was 'x'"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_its_description(
    tmp_path: Path, ring_fd: int, described: tuple[str, str, tuple[int, ...]], words: str
) -> None:
    async def story(stage: Stage) -> None:
        stage.service.check_input("window", "FP32", (4096, 16, 3))
        with pytest.raises(InvalidRequest, match=words):
            stage.service.check_input(*described)

    play(three(tmp_path), ring_fd, story)


# --- load ----------------------------------------------------------------------------------------------------
def test_a_full_queue_refuses_and_serves_what_it_took(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.service.admission.service_us = 0.0  # only the count decides here
        stuck = stage.submit(window(TOLD), deadline_ms=300.0)
        accepted = [stage.submit(window(seed=n)) for n in range(3)]
        refused = stage.submit(window())
        assert refused.done()
        reply = refused.result()
        assert isinstance(reply, Overloaded)
        assert "4 requests waiting" in str(reply)
        assert stage.serving.statistics()["waiting"] == 4
        for n, future in enumerate(accepted):
            answer = await future
            assert isinstance(answer, Answer)
            np.testing.assert_allclose(
                outputs(answer)["probability"], expected_probability(window(seed=n)), atol=1e-6
            )
        await stuck
        assert stage.serving.statistics()["waiting"] == 0
        assert stage.serving.statistics()["overloaded"] == 1

    play(three(tmp_path, "slow", queue_limit=4), ring_fd, story, inline_us=THREAD)


def test_a_bug_on_the_thread_of_a_service_costs_one_answer_and_is_told(ring_fd: int) -> None:
    async def story() -> None:
        told: list[type] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(type(context["exception"])))
        plan = EnginePlan("wrist", 1, "d" * 64, EngineKind.ONNX, inputs=(WINDOW,), outputs=(PROBABILITY,))
        engine = Odd()  # its output is not there
        service = odd_service(plan, engine)
        serving = Serving(
            [service], RingWriter(ring_fd), stuck_after_s=5, on_unstoppable=lambda: None, inline_us=THREAD
        )
        replies = []
        for answer in ({}, {"probability": np.full((1, 4), 0.25, np.float32)}):
            engine.answer = answer
            reply: asyncio.Future[Answer | ServingError] = asyncio.get_running_loop().create_future()
            serving.submit(Request("wrist", {"window": window()}, clock.monotonic_ns()), reply.set_result)
            replies.append(type(await reply))
        assert replies == [EngineFailed, Answer]
        assert told == [KeyError]
        assert (service.counters.requests, serving.statistics()["waiting"]) == (2, 0)
        serving.close()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_client_with_more_than_its_share_of_a_full_queue_is_told_so(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.service.admission.service_us = 1_500_000.0
        stuck = stage.submit(window(TOLD), client="greedy", deadline_ms=60_000.0)
        held = [stage.submit(window(), client="greedy", deadline_ms=60_000.0) for _ in range(4)]
        modest = stage.submit(window(), client="modest", deadline_ms=60_000.0)
        assert not modest.done()
        refused = stage.submit(window(), client="greedy", deadline_ms=60_000.0)
        assert refused.done()
        reply = refused.result()
        assert isinstance(reply, Overloaded)
        assert reply.status == 429
        assert "6 requests waiting, 5 of them yours" in str(reply)
        assert reply.retry_after_s == 9
        await asyncio.gather(stuck, modest, *held)

    play(three(tmp_path, "slow", queue_limit=8), ring_fd, story, inline_us=THREAD, stuck_after_s=0.2)


def test_a_request_whose_turn_would_come_too_late_is_refused_at_once(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.service.admission.service_us = 50_000.0
        first = stage.submit(window(TOLD), deadline_ms=300.0)
        reply = await stage.submit(window(), deadline_ms=40.0)
        assert isinstance(reply, Overloaded)
        assert "about 50 ms of work" in str(reply)
        await first

    play(three(tmp_path, "slow"), ring_fd, story, inline_us=THREAD)


def test_a_request_that_waited_past_its_deadline_is_not_run(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        stage.service.admission.service_us = 0.0
        patient(stage)
        first = stage.submit(window(TOLD), deadline_ms=800.0)
        late = await stage.submit(window(), deadline_ms=50.0)
        assert isinstance(late, DeadlineExceeded)
        assert "waiting" in str(late)
        await first
        assert stage.ring.read()["outcome"].tolist() == [Outcome.FAILED_OVER, Outcome.DEADLINE]
        assert stage.service.admission.service_us > 10_000  # what never ran says nothing about how long a run takes

    play(three(tmp_path, "slow"), ring_fd, story, inline_us=THREAD)


def test_troubles_of_one_kind_are_counted_together(tmp_path: Path, ring_fd: int) -> None:
    async def story(stage: Stage) -> None:
        for _ in range(5):
            await stage.ask(window(TOLD))
        [told] = stage.serving.take_troubles()
        assert told.count == 5

    play(three(tmp_path, "nan"), ring_fd, story)


def test_closing_ends_what_still_runs(tmp_path: Path, ring_fd: int) -> None:
    runners: list[threading.Thread] = []

    async def story(stage: Stage) -> None:
        stage.submit(window(TOLD), deadline_ms=600_000.0)
        runner = stage.serving._runners["wrist"]
        while not runner._watch.started_ns:  # noqa: ASYNC110 - a watch has no events
            await asyncio.sleep(0.001)
        runners.append(runner._thread)

    play(three(tmp_path, "slow"), ring_fd, story, stuck_after_s=600.0, inline_us=THREAD)
    [thread] = runners
    thread.join(30)
    assert not thread.is_alive()
