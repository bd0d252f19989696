"""Requests that skip the parser: when they do, and that nothing else changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.attempt import Ended
from agent.contract.plan import EngineKind, EnginePlan, TensorPlan
from agent.contract.tensors import HEADER_LENGTH
from agent.express import Left
from agent.frontend.plans import MAX_PLANS, MAX_PLANS_OF_A_SIZE, Plan, PlanCache
from agent.frontend.server import Connection
from agent.observation import Outcome
from tests.models import LENGTH, engine_plan, floor_plan, model, save, service_plan, window
from tests.wires import Side, Wire, message

TOLD = 200.0  # a window shifted by this makes a troubled engine do its worst


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    one = make_side(tmp_path)
    yield one
    one.close()


def make_side(folder: Path, *, trouble: str = "", **options: float) -> Side:
    engines = (engine_plan(folder, "wrist", trouble=trouble), engine_plan(folder, "wrist-accel", scale=2.0))
    return Side(service_plan(*engines, floor_plan()), cached=True, **options)


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 60))  # type: ignore[arg-type]


def ask(connection: Connection, wire: Wire, data: bytes) -> bytes:
    wire.sent = b""
    with np.errstate(invalid="ignore", over="ignore"):
        connection.data_received(data)
    return wire.sent


def express_served(side: Side, wire: Wire, x: np.ndarray) -> bool:
    """Whether the plan for this message answers it by itself."""
    plan = side.server.plans.find(message(x))
    assert plan is not None
    assert plan.serve is not None
    return plan.serve(message(x), time.monotonic_ns(), wire.write) is None


def test_a_request_that_came_twice_needs_no_parser_any_more(side: Side) -> None:
    connection, wire = side.connect()
    answers = [ask(connection, wire, message(window(seed=seed))) for seed in (1, 2, 3, 1)]
    assert len(side.server.plans) == 1
    assert answers[3] == answers[0] != answers[1]
    assert express_served(side, wire, window())
    assert [record["outcome"] for record in side.records()] == ["0"] * 5
    assert side.serving.statistics()["requests"] == 5
    assert side.serving.statistics()["rows"] == 5
    other, other_wire = side.connect()
    assert ask(other, other_wire, message(window())) == answers[0]
    assert other._plan is connection._plan


def test_a_value_that_changes_with_every_request_makes_no_plan(side: Side) -> None:
    connection, wire = side.connect()
    for time_s in range(5):
        data = message(window(), parameters={"binary_data_output": True, "ew_time_s": time_s})
        assert b" 200 OK" in ask(connection, wire, data)
    assert len(side.server.plans) == 0


def test_another_preferred_engine_answers_the_very_next_request(side: Side) -> None:
    connection, wire = side.connect()
    for _ in range(3):
        ask(connection, wire, message(window()))
    side.serving.prefer("wrist", "wrist-accel", "drift")
    for _ in range(3):
        answer = ask(connection, wire, message(window()))
        assert b'"ew_served_by":"wrist-accel"' in answer
        assert b'"ew_reason":"switched: drift"' in answer
    assert [record["engine"] for record in side.records()] == ["0"] * 3 + ["1"] * 3
    assert express_served(side, wire, window())  # it was made anew
    assert len(side.server.plans) == 1


@pytest.mark.parametrize(("trouble", "code"), [("nan", "non_finite"), ("raise", "engine_failed")])
def test_what_an_engine_cannot_answer_is_answered_by_the_next(tmp_path: Path, trouble: str, code: str) -> None:
    side = make_side(tmp_path, trouble=trouble)
    connection, wire = side.connect()
    for _ in range(3):
        ask(connection, wire, message(window()))
    answer = ask(connection, wire, message(window(TOLD)))
    assert f'"ew_reason":"failover: wrist {code}"'.encode() in answer
    assert [trouble.code for trouble in side.serving.take_troubles()] == [code]
    assert b'"ew_served_by":"wrist"' in ask(connection, wire, message(window()))
    assert [record["outcome"] for record in side.records()] == ["0", "0", "0", str(int(Outcome.FAILED_OVER)), "0"]
    side.close()


def test_a_run_ended_at_its_limit_is_not_begun_anew_but_answered_by_the_next_engine(tmp_path: Path) -> None:
    side = make_side(tmp_path, trouble="slow", stuck_after_s=0.5)
    connection, wire = side.connect()
    parameters = {"binary_data_output": True, "ew_deadline_ms": 100_000}
    for _ in range(3):
        ask(connection, wire, message(window(), parameters=parameters))
    plan = connection._plan
    assert plan is not None
    assert b'"ew_reason":"failover: wrist stuck"' in ask(
        connection, wire, message(window(TOLD), parameters=parameters)
    )
    assert [trouble.code for trouble in side.serving.take_troubles()] == ["stuck"]
    assert b'"ew_reason":"active"' in ask(connection, wire, message(window(), parameters=parameters))
    assert plan.serve is not None
    left = plan.serve(message(window(TOLD), parameters=parameters), time.monotonic_ns(), wire.write)
    assert isinstance(left, Ended)
    assert left.late == "stuck"
    side.close()


def test_an_end_order_that_comes_too_late_does_not_count_against_the_run_it_meets(side: Side) -> None:
    connection, wire = side.connect()
    for _ in range(3):
        ask(connection, wire, message(window()))
    side.serving._watch.options.terminate = True  # as the watchdog does, one run too late
    assert b'"ew_reason":"active"' in ask(connection, wire, message(window()))
    assert side.serving.take_troubles() == []
    assert express_served(side, wire, window())


def test_a_model_with_a_thread_of_its_own_skips_the_parser_too(tmp_path: Path) -> None:
    async def story() -> None:
        side = make_side(tmp_path, inline_us=0.0)
        connection, wire = side.connect()
        answers = []
        for seed in (1, 2, 3, 1):
            ask(connection, wire, message(window(seed=seed)))
            while not wire.sent:  # noqa: ASYNC110 - a wire has no events
                await asyncio.sleep(0.001)
            answers.append(wire.sent)
        assert len(side.server.plans) == 1
        assert connection._plan is not None
        assert connection._plan.serve is None
        assert answers[3] == answers[0] != answers[1]
        assert side.server.buffered_bytes == 0
        side.close()

    run(story)


def test_answers_of_a_draining_server_end_the_connection(side: Side) -> None:
    connection, wire = side.connect()
    for _ in range(3):
        ask(connection, wire, message(window()))
    side.server.draining = True
    assert b"Connection: close" in ask(connection, wire, message(window()))
    assert wire.closed


def test_a_guard_finding_is_told_as_ever(side: Side) -> None:
    connection, wire = side.connect()
    for _ in range(3):
        ask(connection, wire, message(window()))
    dead = window()
    dead[:, :, 2] = 0
    assert b'"ew_guard":"dead:gx"' in ask(connection, wire, message(dead))
    plan = side.server.plans.find(message(dead))
    assert plan is not None
    assert plan.serve is not None
    assert plan.serve(message(dead), 0, wire.write) is Left.ODD


# --- JSON ----------------------------------------------------------------------------------------------------
def text(x: np.ndarray, size: int = 1500) -> bytes:
    """A JSON request whose body has this many bytes, so that all share a plan."""
    tensor = {"name": "window", "datatype": "FP32", "shape": [1, LENGTH, 3], "data": x.ravel().tolist()}
    return post("wrist", json.dumps({"inputs": [tensor]}).encode().ljust(size))


def post(service: str, document: bytes, numbers: bytes = b"") -> bytes:
    split = f"{HEADER_LENGTH}: {len(document)}\r\n" if numbers else ""
    size = len(document) + len(numbers)
    head = f"POST /v2/models/{service}/infer HTTP/1.1\r\nHost: x\r\n{split}Content-Length: {size}\r\n\r\n"
    return head.encode() + document + numbers


def dead() -> np.ndarray:
    x = window()
    x[:, :, 2] = 0
    return x


@pytest.mark.parametrize("odd", [dead(), window(TOLD)])
def test_what_was_told_of_one_request_is_not_told_of_the_next(tmp_path: Path, odd: np.ndarray) -> None:
    side = make_side(tmp_path, trouble="nan")
    connection, wire = side.connect()
    told = [ask(connection, wire, text(odd)) for _ in range(3)]
    assert b"ew_guard" in told[2] or b"failover" in told[2]
    plain = [ask(connection, wire, text(window())) for _ in range(3)]
    assert [b"ew_guard" in answer or b"failover" in answer for answer in plain] == [False] * 3
    assert len(set(plain)) == 1
    plan = side.server.plans.find(text(window()))
    assert plan is not None
    assert plan.serve is not None
    assert plan.serve(text(window()), time.monotonic_ns(), wire.write) is None
    side.close()


# --- models of other shapes ------------------------------------------------------------------------------------
PAIR, WHOLE = (-1, 2), (1, 2)


def sums(folder: Path) -> Side:
    """The service `sums`: an output of one row for any number of rows of two inputs."""
    names, shape = ("x", "y"), ["rows", 2]
    graph = model(
        [
            helper.make_node("Add", ["x", "y"], ["z"]),
            helper.make_node("ReduceMax", ["z"], ["largest"], axes=[0], keepdims=1),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info("largest", TensorProto.FLOAT, list(WHOLE))],
    )
    digest = save(graph, folder / "sums.onnx")
    engine = EnginePlan(
        engine="sums", version=1, digest="5" * 64, kind=EngineKind.ONNX, model_path=str(folder / "sums.onnx"),
        model_sha256=digest, inputs=tuple(TensorPlan(name, "FP32", PAIR) for name in names),
        outputs=(TensorPlan("largest", "FP32", WHOLE),),
    )  # fmt: skip
    return Side(service_plan(engine, service="sums", guard=None, labels=(), label_output=""), cached=True)


def described(name: str, x: np.ndarray, *, binary: bool) -> dict[str, object]:
    how = {"parameters": {"binary_data_size": x.nbytes}} if binary else {"data": x.ravel().tolist()}
    return {"name": name, "datatype": "FP32", "shape": list(x.shape), **how}


def summed(x: np.ndarray, y: np.ndarray, binary: tuple[bool, bool]) -> bytes:
    tensors = [described("x", x, binary=binary[0]), described("y", y, binary=binary[1])]
    document = {"inputs": tensors, "parameters": {"binary_data_output": any(binary)}}
    numbers = b"".join(array.tobytes() for array, told in zip((x, y), binary, strict=True) if told)
    return post("sums", json.dumps(document).encode(), numbers)


@pytest.mark.parametrize("binary", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rows", [1, 3])
def test_however_the_inputs_come_the_answer_stays(tmp_path: Path, rows: int, binary: tuple[bool, bool]) -> None:
    side = sums(tmp_path)
    connection, wire = side.connect()
    x, y = (np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) + begin for begin in (1, 10))
    answers = [ask(connection, wire, summed(x, y, binary)) for _ in range(4)]
    assert b" 200 OK" in answers[0]
    assert len(set(answers)) == 1
    assert [record["rows"] for record in side.records() if record["row"] == "0"] == [str(rows)] * 4
    side.close()


def test_a_bug_on_the_short_way_is_told_and_costs_an_answer_not_more(side: Side) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async def story() -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(type(context["exception"])))
        connection, wire = side.connect()
        data = message(window())
        side.server.plans.keep(Plan(data[:100], len(data), 1, fail, lambda *_: None, lambda: False))
        answer = ask(connection, wire, data)
        assert answer.startswith(b"HTTP/1.1 500")
        assert b"Connection: close" in answer
        assert told == [ZeroDivisionError]

    run(story)


# --- the cache -----------------------------------------------------------------------------------------------
def plan(name: str, size_bytes: int) -> Plan:
    return Plan(name.encode(), size_bytes, 1, None, lambda *_: None, lambda: False)


def test_a_message_is_found_by_its_beginning_and_its_size() -> None:
    cache = PlanCache()
    first, second = plan("POST a", 10), plan("POST b", 10)
    cache.keep(first)
    cache.keep(second)
    assert cache.find(b"POST a1234") is first
    assert cache.find(b"POST b1234") is second
    assert cache.find(b"POST b12345") is None
    assert cache.find(b"POST c1234") is None
    assert cache.find_prefix(b"POST a") is first
    renewed = plan("POST a", 10)
    cache.keep(renewed)
    assert cache.find(b"POST a1234") is renewed
    assert len(cache) == 2


def test_the_least_recently_found_plans_are_forgotten() -> None:
    cache = PlanCache()
    for number in range(MAX_PLANS + 10):
        cache.keep(plan(f"{number:04}", 100 + number))
        assert cache.find(b"0000" + bytes(96)) is not None
    assert len(cache) == MAX_PLANS
    assert cache.find(b"0001" + bytes(97)) is None
    assert sum(len(plans) for plans in cache._by_size.values()) == MAX_PLANS


def test_of_one_size_only_some_plans_are_kept() -> None:
    cache = PlanCache()
    for number in range(50):
        cache.keep(plan(f"{number:04}", 10))
    assert len(cache) == MAX_PLANS_OF_A_SIZE
    assert cache.find(b"0049......") is not None
