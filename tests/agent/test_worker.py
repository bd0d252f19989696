"""A real worker process: start, protocol, failover, preference, drain, death, and what it must not import."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.channel import Frame, encode
from agent.client import Client
from agent.contract.errors import (
    DeadlineExceeded,
    Disconnected,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    UnknownModel,
)
from agent.contract.plan import (
    Drained,
    EnginePlan,
    EngineTrouble,
    GuardPlan,
    Placement,
    Prefer,
    Ready,
    RuntimePlan,
    Serve,
    Start,
    WorkerPlan,
)
from agent.engine.prepare import cpu_features
from agent.engine.runtime import runtime_version
from agent.modelcache import Entry, Key, ModelCache
from agent.observation import Outcome
from agent.worker import EXIT_STUCK
from tests.models import (
    engine_plan,
    expected_probability,
    floor_plan,
    guard_plan,
    hungry,
    save,
    service_plan,
    window,
    worker_plan,
)
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system
TOLD = 200.0
FORBIDDEN = ("pydantic", "paho", "tuf", "psutil", "sqlite3", "agent.drift", "torch", "onnx")


def plan_of(folder: Path, trouble: str = "", **changes: Any) -> WorkerPlan:
    wrist = engine_plan(folder, "wrist", version=3, trouble=trouble)
    accel = engine_plan(folder, "wrist-accel", scale=2.0)
    return worker_plan(service_plan(wrist, accel, floor_plan(), **changes))


def known_as_slow(engine: EnginePlan, folder: Path) -> EnginePlan:
    """An engine that is said to take a second a row: a run before it leaves it half of the time, not 20 ms."""
    runtime = replace(engine.runtime, cache_folder=str(folder))
    folder.mkdir()
    key = Key(engine.model_sha256, runtime_version(), cpu_features(), (), runtime.threads, runtime.spin)
    assert ModelCache(folder).keep(key, Entry(1, 1e6, 1e6))
    return replace(engine, runtime=runtime)


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    with Sockets(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sockets, RunningWorker]]:
    """One worker for all tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("worker")
    with Sockets(folder) as sockets, RunningWorker(sockets, plan_of(folder)).serve() as worker:
        yield sockets, worker


@pytest.fixture(params=["unix", "tcp"])
def client(request: pytest.FixtureRequest, stage: tuple[Sockets, RunningWorker]) -> Iterator[Client]:
    sockets, _ = stage
    with Client(sockets.unix_address if request.param == "unix" else sockets.tcp_address) as opened:
        yield opened


# --- answers -------------------------------------------------------------------------------------------------
def test_an_answer_says_who_gave_it_and_why(client: Client) -> None:
    x = window(rows=3)
    answer = client.infer("wrist", {"window": x}, request_id="r-7")
    np.testing.assert_allclose(answer.outputs["probability"], expected_probability(x), atol=1e-6)
    assert list(answer.outputs) == ["probability"]
    assert (answer.model, answer.version, answer.request_id) == ("wrist", "3", "r-7")
    assert (answer.served_by, answer.reason, answer.guard) == ("wrist", "active", "")
    assert len(answer.parameters["ew_artifact"]) == 64


def test_a_version_and_a_subset_of_outputs_can_be_asked_for(client: Client) -> None:
    answer = client.infer("wrist", {"window": window()}, version="3", outputs=["probability"])
    assert list(answer.outputs) == ["probability"]


def test_health_metadata_and_index(client: Client) -> None:
    assert client.live()
    assert client.ready()
    assert client.ready("wrist")
    assert not client.ready("ankle")
    assert client.metadata()["name"] == "edgewarden"
    assert client.metadata("wrist") == {
        "name": "wrist", "versions": ["3"], "platform": "onnxruntime_onnx",
        "inputs": [{"name": "window", "datatype": "FP32", "shape": [-1, 16, 3]}],
        "outputs": [{"name": "probability", "datatype": "FP32", "shape": [-1, 4]}],
        "parameters": {"labels": ["PEN", "ABD", "FEL", "IR"]},
    }  # fmt: skip
    assert client.models() == [{"name": "wrist", "version": "3", "state": "READY", "reason": "active"}]


def test_statistics_count_rows_and_requests(client: Client) -> None:
    before = client.statistics("wrist")["model_stats"][0]
    client.infer("wrist", {"window": window(rows=5)})
    after = client.statistics("wrist")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]


@pytest.mark.parametrize(
    ("model", "inputs", "options", "kind", "words"),
    [
        ("wrist", {"window": window()[:, :9]}, {}, InvalidRequest,
         r"input 'window' must have shape \[-1, 16, 3\], \[1, 9, 3\] was given"),
        ("wrist", {"window": window().astype(np.float64)}, {}, InvalidRequest, "must be FP32, FP64 was given"),
        ("wrist", {"other": window()}, {}, InvalidRequest, "takes the inputs window"),
        ("wrist", {"window": window()}, {"outputs": ["ew_view_channels"]}, InvalidRequest, "has no output"),
        ("wrist", {"window": window() * np.nan}, {}, InvalidRequest, "NaN or infinity in channel ax, ay, gx"),
        ("wrist", {"window": window()}, {"version": "9"}, UnknownModel, "has no version 9"),
        ("wrist", {"window": window()}, {"deadline_ms": -1.0}, InvalidRequest, "ew_deadline_ms"),
        ("ankle", {"window": window()}, {}, UnknownModel, "there is no model 'ankle'"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_told_in_our_own_errors(
    client: Client, model: str, inputs: dict[str, Any], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        client.infer(model, inputs, **options)
    assert client.live()  # on the same connection


# --- the wire ------------------------------------------------------------------------------------------------
def ask(
    sockets: Sockets, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any], Any]:
    """One exchange through the standard library's client."""
    connection = http.client.HTTPConnection("127.0.0.1", sockets.port, timeout=30)
    payload = body if isinstance(body, bytes) or body is None else json.dumps(body)
    connection.request(method, path, payload, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    document = json.loads(response.read())
    connection.close()
    return response.status, dict(response.headers), document


def json_input(x: np.ndarray) -> dict[str, Any]:
    return {"name": "window", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}


def test_json_in_and_out(stage: tuple[Sockets, RunningWorker]) -> None:
    x = window(rows=2)
    status, headers, document = ask(
        stage[0], "POST", "/v2/models/wrist/infer", {"id": "a", "inputs": [json_input(x)]}
    )  # fmt: skip
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert (document["id"], document["model_name"], document["model_version"]) == ("a", "wrist", "3")
    [output] = document["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("probability", "FP32", [2, 4])
    np.testing.assert_allclose(output["data"], expected_probability(x).ravel(), atol=1e-6)
    assert document["parameters"]["ew_served_by"] == "wrist"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 200),
        ("GET", "/v2/", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/models/wrist", 200),
        ("GET", "/v2/models/wrist/ready", 200),
        ("GET", "/v2/models/wrist/config", 200),
        ("GET", "/v2/models/wrist/stats", 200),
        ("GET", "/v2/models/stats", 200),
        ("GET", "/v2/models/wrist/versions/3", 200),
        ("GET", "/v2/models/wrist/versions/3/ready", 200),
        ("GET", "/v2/models/wrist/versions/3/config?x=1", 200),
        ("GET", "/v2/models/wrist/versions/4/ready", 404),
        ("POST", "/v2/repository/index", 200),
        ("POST", "/v2/repository/models/wrist/load", 403),
        ("POST", "/v2/repository/models/wrist/unload", 403),
        ("GET", "/v2/models/ankle", 404),
        ("GET", "/v2/models/wrist/weights", 404),
        ("GET", "/v2/models/wrist/versions", 404),
        ("GET", "/metrics", 404),
        ("GET", "/", 404),
        ("GET", "/v2/models/..%2f..%2fetc", 404),
        ("POST", "/v2/models/ankle/infer", 404),
        ("GET", "/v2/models/wrist/infer", 405),
        ("DELETE", "/v2/models/wrist", 405),
        ("GET", "/v2/repository/index", 405),
    ],
)
def test_every_path_has_its_status(stage: tuple[Sockets, RunningWorker], method: str, path: str, status: int) -> None:
    body = {"inputs": [json_input(window())]} if method == "POST" else None
    given, headers, document = ask(stage[0], method, path, body)
    assert given == status
    if status != 200:
        assert list(document) == ["error"]
        assert document["error"]
    if status == 405:
        assert headers["Allow"] in ("GET, HEAD", "POST")


def test_the_model_configuration_is_the_one_known_clients_read(stage: tuple[Sockets, RunningWorker]) -> None:
    _, _, document = ask(stage[0], "GET", "/v2/models/wrist/config")
    assert document["input"] == [{"name": "window", "data_type": "TYPE_FP32", "dims": [16, 3]}]
    assert document["output"] == [{"name": "probability", "data_type": "TYPE_FP32", "dims": [4]}]
    assert document["max_batch_size"] == 4096
    assert document["parameters"]["labels"]["string_value"] == "PEN,ABD,FEL,IR"


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"", {}, "JSON cannot be read"),
        (b"[]", {}, "JSON cannot be read"),
        (b"[" * 100_000, {}, "JSON cannot be read"),
        (b'{"inputs": "x"}', {}, "JSON cannot be read"),
        (b'{"inputs": [1]}', {}, "described by a JSON object"),
        (b'{"inputs": []}', {}, "takes the inputs window"),
        (b'{"inputs": [], "id": 5}', {}, "JSON cannot be read"),
        (b"\xff\xfe{}", {}, "JSON cannot be read"),
        (b'{"inputs": [NaN]}', {}, "NaN and infinity have no JSON form: send the tensors as binary data"),
        (b"{}", {"Inference_Header_Content_Length": "3"}, "up to the body's 2"),
        (b"{}", {"Inference_Header_Content_Length": "x"}, "must be a number"),
        (b"{}", {"Inference_Header_Content_Length": "9" * 30}, "must be a number"),
        ({"inputs": [json_input(window()), json_input(window())]}, {}, "given twice"),
        ({"inputs": [json_input(window(rows=4097)[:, :1, :1]) | {"shape": [4097, 16, 3]}]}, {}, "not 4097"),
        ({"inputs": [json_input(window()[:, :1]) | {"data": ["never looked at"]}]}, {}, "must have shape"),
        ({"inputs": [json_input(window())], "parameters": {"ew_deadline_ms": "soon"}}, {}, "must be a number"),
        ({"inputs": [json_input(window())], "parameters": {"ew_time_s": True}}, {}, "must be a number"),
        ({"inputs": [json_input(window())], "outputs": [{"name": "probability",
          "parameters": {"classification": 2}}]}, {}, "classification"),
        ({"inputs": [json_input(window())], "outputs": [{"name": "probability",
          "parameters": {"shared_memory_region": "r"}}]}, {}, "shared_memory_region"),
    ],
)  # fmt: skip
def test_malformed_bodies_are_400_with_a_reason(
    stage: tuple[Sockets, RunningWorker], body: Any, headers: dict[str, str], words: str
) -> None:
    status, _, document = ask(stage[0], "POST", "/v2/models/wrist/infer", body, **headers)
    assert status == 400
    assert words in document["error"]


@pytest.mark.parametrize(("model", "header"), [("nosuch", {}), ("wrist", {}), ("wrist", {"length": "8000000"})])
def test_too_much_json_is_refused_unread_and_says_what_to_do(
    stage: tuple[Sockets, RunningWorker], model: str, header: dict[str, str]
) -> None:
    head = b'{"inputs":[{"name":"window","datatype":"FP32","shape":[4000000],"data":['
    body = (head + b"0," * 4_000_000).ljust(9_000_000)
    headers = {"Inference_Header_Content_Length": header["length"]} if header else {}
    before = stage[1].statistics()["resident_bytes"]
    status, _, document = ask(stage[0], "POST", f"/v2/models/{model}/infer", body[:8_100_000], **headers)
    assert (status, "Send the tensors as binary data" in document["error"]) == (413, True)
    assert stage[1].statistics()["resident_bytes"] < before + 4e6


def test_no_request_so_far_was_a_bug(stage: tuple[Sockets, RunningWorker]) -> None:
    numbers = stage[1].statistics()
    assert numbers["bugs"] == 0
    assert numbers["requests"] > 0
    assert numbers["resident_bytes"] > 1e6
    assert numbers["cpu_s"] > 0


# --- what the agent process sees -----------------------------------------------------------------------------
def test_observations_reach_the_ring_with_view_and_data_time(tmp_path: Path, sockets: Sockets) -> None:
    x = window(rows=2)
    with RunningWorker(sockets, plan_of(tmp_path)).serve() as worker, Client(sockets.unix_address) as client:
        client.infer("wrist", {"window": x}, time_s=12.5)
        assert worker.statistics()["observations"] == 2  # also: written before this frame was answered
        records = sockets.ring.read()
    assert records["data_time_s"].tolist() == [12.5, 12.5]
    assert records["predicted"].tolist() == expected_probability(x).argmax(axis=1).tolist()
    np.testing.assert_allclose(records["view"][:, :3], x.mean(axis=1), atol=1e-6)


def test_ready_reports_every_engine_and_a_wrong_golden_answer(tmp_path: Path, sockets: Sockets) -> None:
    bad = engine_plan(tmp_path, "wrist", wrong=0.5)
    plan = worker_plan(service_plan(bad, engine_plan(tmp_path, "wrist-accel"), floor_plan()), generation=9)
    with RunningWorker(sockets, plan).serve() as worker, Client(sockets.unix_address) as client:
        assert worker.ready.generation == 9
        assert worker.ready.pid == worker.process.pid
        assert [(e.engine, e.golden_ok, e.error_code) for e in worker.ready.engines] == [
            ("wrist", False, "golden"), ("wrist-accel", True, ""), ("wrist-floor", True, "")
        ]  # fmt: skip
        answer = client.infer("wrist", {"window": window()})
        assert (answer.served_by, answer.reason) == ("wrist-accel", "switched: wrist is not usable")


def test_nothing_usable_is_not_ready_and_asks_to_come_back(tmp_path: Path, sockets: Sockets) -> None:
    plan = worker_plan(service_plan(engine_plan(tmp_path, "wrist", wrong=0.5)))
    with RunningWorker(sockets, plan).serve(), Client(sockets.unix_address) as client:
        assert client.live()
        assert not client.ready()
        with pytest.raises(Overloaded, match="no engine of 'wrist' is usable"):
            client.infer("wrist", {"window": window()})
        status, headers, _ = ask(sockets, "GET", "/v2/health/ready")
        assert (status, headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize(
    ("trouble", "code", "deadline_ms"),
    [("raise", "engine_failed", 60_000.0), ("nan", "non_finite", 60_000.0), ("slow", "deadline_exceeded", 800.0)],
)
def test_a_failing_engine_is_replaced_within_the_request_and_told(
    tmp_path: Path, sockets: Sockets, trouble: str, code: str, deadline_ms: float
) -> None:
    x = window(TOLD)
    plan = worker_plan(service_plan(
        engine_plan(tmp_path, "wrist", trouble=trouble),
        known_as_slow(engine_plan(tmp_path, "wrist-accel", scale=2.0), tmp_path / "cache"), floor_plan(),
    ))  # fmt: skip
    with RunningWorker(sockets, plan).serve() as worker, Client(sockets.unix_address) as client:
        for _ in range(3):
            answer = client.infer("wrist", {"window": x}, deadline_ms=deadline_ms)
            assert (answer.served_by, answer.reason) == ("wrist-accel", f"failover: wrist {code}")
            np.testing.assert_allclose(answer.outputs["probability"], expected_probability(x, 2.0), atol=1e-5)
        count = 0
        while count < 3:
            told = worker.expect(EngineTrouble)
            assert (told.service, told.engine, told.code) == ("wrist", "wrist", code)
            count += told.count
        assert count == 3
        assert client.infer("wrist", {"window": window()}).served_by == "wrist"
        worker.statistics()  # answered after the record was written
        assert sockets.ring.read()["outcome"].tolist() == [Outcome.FAILED_OVER] * 3 + [Outcome.OK]


def test_errors_of_the_last_engine_have_their_status(tmp_path: Path, sockets: Sockets) -> None:
    one = worker_plan(
        service_plan(engine_plan(tmp_path, "a", trouble="raise"), service="raises"),
        service_plan(engine_plan(tmp_path, "b", trouble="slow"), service="hangs"),
    )
    with RunningWorker(sockets, one).serve(), Client(sockets.tcp_address) as client:
        with pytest.raises(EngineFailed, match="engine 'a' failed"):
            client.infer("raises", {"window": window(TOLD)})
        with pytest.raises(DeadlineExceeded, match="engine 'b' missed its deadline: not done with 1 row after"):
            client.infer("hangs", {"window": window(TOLD)}, deadline_ms=100.0)


def test_a_preference_holds_from_its_acknowledgement_on(tmp_path: Path, sockets: Sockets) -> None:
    with RunningWorker(sockets, plan_of(tmp_path)).serve() as worker, Client(sockets.unix_address) as client:
        worker.prefer("wrist-accel", "gyro dead")
        answer = client.infer("wrist", {"window": window()})
        assert (answer.served_by, answer.version, answer.reason) == ("wrist-accel", "1", "switched: gyro dead")
        worker.prefer("wrist")
        assert client.infer("wrist", {"window": window()}).served_by == "wrist"
        worker.send(Prefer("wrist", "nobody", "x"))
        told = worker.expect(EngineTrouble)
        assert (told.engine, told.code) == ("nobody", "unknown_model")


# --- how engines are run --------------------------------------------------------------------------------------
def test_an_engine_too_large_for_its_limit_is_refused_and_the_chain_serves(tmp_path: Path, sockets: Sockets) -> None:
    path = tmp_path / "hungry.onnx"
    wrist = replace(
        engine_plan(tmp_path, "wrist", view=False), model_path=str(path), model_sha256=save(hungry(300), path),
        golden_path="", runtime=RuntimePlan(memory_bytes=100_000_000),
    )  # fmt: skip
    plan = worker_plan(service_plan(wrist, engine_plan(tmp_path, "wrist-accel", view=False), floor_plan()))
    with RunningWorker(sockets, plan).serve() as worker, Client(sockets.unix_address) as client:
        refused, *others = worker.ready.engines
        assert (refused.engine, refused.error_code) == ("wrist", "too_large")
        assert "more than the 100 MB of memory" in refused.error
        assert [loaded.error for loaded in others] == ["", ""]
        answer = client.infer("wrist", {"window": window()})
        assert (answer.served_by, answer.reason) == ("wrist-accel", "switched: wrist is not usable")
        assert worker.statistics()["resident_bytes"] < 200e6


@pytest.mark.parametrize("placement", list(Placement))
def test_wherever_it_runs_the_answer_is_the_same(tmp_path: Path, sockets: Sockets, placement: Placement) -> None:
    plan = plan_of(tmp_path, placement=placement)
    with RunningWorker(sockets, plan).serve() as worker, Client(sockets.unix_address) as client:
        where = {loaded.placement for loaded in worker.ready.engines if loaded.threads}
        assert where == {"thread" if placement is Placement.THREAD else "inline"}
        x = window()
        given = client.infer("wrist", {"window": x}).outputs["probability"]
        np.testing.assert_allclose(given, expected_probability(x), atol=1e-6)


def test_a_worker_stays_on_its_cpus(tmp_path: Path, sockets: Sockets) -> None:
    mine = sorted(os.sched_getaffinity(0))
    for wanted, expected in (((mine[-1],), {mine[-1]}), ((), set(mine)), ((4095,), set(mine))):
        with RunningWorker(sockets, replace(plan_of(tmp_path), cpus=wanted)) as worker:
            assert os.sched_getaffinity(worker.process.pid) == expected


def test_the_next_worker_loads_the_graphs_that_the_first_one_kept(tmp_path: Path, sockets: Sockets) -> None:
    plan, runtime = plan_of(tmp_path), RuntimePlan(control_flow=("If",), cache_folder=str(tmp_path / "models"))
    (service,) = plan.services
    engines = tuple(replace(engine, runtime=runtime) for engine in service.engines)
    plan = replace(plan, services=(replace(service, engines=engines),))
    answers = []
    for cached in (False, True):
        with RunningWorker(sockets, plan).serve() as worker, Client(sockets.unix_address) as client:
            assert [loaded.cached for loaded in worker.ready.engines] == [cached, cached, False]
            answers.append(client.infer("wrist", {"window": window()}).outputs["probability"].tobytes())
    assert answers[0] == answers[1]


# --- the end of a worker -------------------------------------------------------------------------------------
@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.THREAD])
def test_a_kernel_that_takes_no_orders_costs_the_worker_and_the_next_one_serves(
    tmp_path: Path, sockets: Sockets, placement: Placement
) -> None:
    plan = replace(plan_of(tmp_path, trouble="deaf", placement=placement), stuck_after_s=0.2)
    with RunningWorker(sockets, plan).serve() as worker:
        with Client(sockets.unix_address) as client, pytest.raises(Disconnected):
            client.infer("wrist", {"window": window(TOLD)}, deadline_ms=60_000.0)
        assert worker.wait() == EXIT_STUCK
    with RunningWorker(sockets, plan).serve(), Client(sockets.unix_address) as client:
        assert client.infer("wrist", {"window": window()}).served_by == "wrist"


def test_after_a_kill_the_next_worker_answers_whoever_waits(tmp_path: Path, sockets: Sockets) -> None:
    plan = plan_of(tmp_path)
    answers: list[str] = []
    failures: list[Exception] = []
    asked = threading.Event()

    def keep_asking() -> None:
        with Client(sockets.unix_address, retry_once=True) as client:
            for number in range(200):
                try:
                    answers.append(client.infer("wrist", {"window": window(seed=number)}).served_by)
                except Exception as error:  # noqa: BLE001 - the test shows whatever it was
                    failures.append(error)
                if number == 50:
                    asked.set()

    with RunningWorker(sockets, plan).serve() as first:
        thread = threading.Thread(target=keep_asking)
        thread.start()
        assert asked.wait(30)
        first.kill()
    with RunningWorker(sockets, replace(plan, generation=2)).serve():
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    assert answers == ["wrist"] * 200
    records = sockets.ring.read()
    assert (np.diff(records["sequence"].astype(int)) == 1).all()  # the second generation went on counting
    assert sockets.ring.statistics()["gaps"] == 0


def test_without_a_retry_a_dropped_connection_is_an_error(tmp_path: Path, sockets: Sockets) -> None:
    with RunningWorker(sockets, plan_of(tmp_path)).serve() as worker, Client(sockets.unix_address) as client:
        client.infer("wrist", {"window": window()})
        worker.kill()
        with pytest.raises(Disconnected):
            client.infer("wrist", {"window": window()})


def test_draining_ends_with_zero_and_leaves_the_sockets_to_the_next(tmp_path: Path, sockets: Sockets) -> None:
    plan = plan_of(tmp_path)
    with Client(sockets.unix_address, retry_once=True) as client:
        with RunningWorker(sockets, plan).serve() as worker:
            client.infer("wrist", {"window": window()})
            worker.drain()
            assert worker.expect(Drained) == Drained(1)
            assert worker.wait() == 0
            assert worker.stderr() == ""
        assert sockets.path.exists()
        with RunningWorker(sockets, plan).serve():
            client.infer("wrist", {"window": window()})
            assert client.retries == 1


def test_a_worker_ends_when_the_agent_process_is_gone(tmp_path: Path, sockets: Sockets) -> None:
    with RunningWorker(sockets, plan_of(tmp_path)).serve() as worker:
        worker.channel.close()
        assert worker.wait() == 0
        assert worker.stderr() == ""


def test_a_terminated_worker_drains_first(tmp_path: Path, sockets: Sockets) -> None:
    with RunningWorker(sockets, plan_of(tmp_path)).serve() as worker, Client(sockets.unix_address) as client:
        client.infer("wrist", {"window": window()})
        worker.process.terminate()
        assert worker.expect(Drained) == Drained(1)
        assert worker.wait() == 0
        assert worker.stderr() == ""


def test_a_plan_that_cannot_be_served_ends_the_worker_with_a_sentence(tmp_path: Path, sockets: Sockets) -> None:
    plan = plan_of(tmp_path, guard=GuardPlan("window", guard_plan().channels[:2]))
    code, errors = run_alone(sockets, Start(plan))
    assert code == 2
    assert errors.startswith("worker: the guard of 'wrist' names 2 channels of input 'window'")


def test_descriptors_that_are_none_end_the_worker_with_a_sentence() -> None:
    command = [sys.executable, "-m", "agent.worker", "--channel-fd", "900", "--ring-fd", "901"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "worker: a descriptor cannot be used: Bad file descriptor.\n")


def test_nobody_is_served_before_serve(tmp_path: Path, sockets: Sockets) -> None:
    with RunningWorker(sockets, plan_of(tmp_path)) as worker, Client(sockets.unix_address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceeded):
            client.live()
        worker.serve()
        with Client(sockets.unix_address) as patient:
            assert patient.live()


@pytest.mark.parametrize("frame", [Prefer("wrist", "wrist", ""), Serve(), Ready(1, 1, ())])
def test_frames_out_of_order_end_the_worker_with_a_sentence(sockets: Sockets, frame: Any) -> None:
    code, errors = run_alone(sockets, frame)
    assert code == 3
    assert errors.startswith("worker: a worker was")


def run_alone(sockets: Sockets, frame: Frame) -> tuple[int, str]:
    """Exit code and stderr of a worker that is sent this frame first."""
    ours, theirs = socket.socketpair()
    arguments = ["--channel-fd", str(theirs.fileno()), "--ring-fd", str(sockets.ring_fd)]
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.worker", *arguments],
        pass_fds=(theirs.fileno(), sockets.ring_fd),
        stderr=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    ours.sendall(encode(frame))
    _, errors = process.communicate(timeout=60)
    ours.close()
    assert "Traceback" not in errors
    return process.returncode, errors


def test_a_worker_imports_nothing_heavy(tmp_path: Path, sockets: Sockets) -> None:
    # -X importtime names every module that is loaded, also those loaded while serving
    worker = RunningWorker(sockets, plan_of(tmp_path), options=["-X", "importtime"])
    lines: list[str] = []
    assert worker.process.stderr is not None
    drain = threading.Thread(target=lambda: lines.extend(line.decode() for line in worker.process.stderr))
    drain.start()
    with worker:
        worker.serve()
        with Client(sockets.unix_address) as client:
            client.infer("wrist", {"window": window()})
            client.metadata("wrist")
        worker.drain()
        worker.expect(Drained)
        assert worker.wait() == 0
        drain.join()
    loaded = {line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")}
    assert "onnxruntime" in loaded
    heavy = {name for name in loaded for bad in FORBIDDEN if name == bad or name.startswith(bad + ".")}
    assert heavy == set()


def test_a_worker_serves_without_uvloop(tmp_path: Path, sockets: Sockets) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "uvloop.py").write_text("raise ImportError\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(shadow)
    try:
        worker = RunningWorker(sockets, plan_of(tmp_path)).serve()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    with worker, Client(sockets.unix_address) as client:
        assert client.infer("wrist", {"window": window()}).served_by == "wrist"
        worker.drain()
        assert worker.wait() == 0
        assert worker.stderr() == ""
