"""What the protocol's handler does before and after serving, in this process and without sockets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import clock
from agent.contract.errors import DeadlineExceeded, Overloaded, ServingError
from agent.contract.plan import EngineKind, EnginePlan, TensorPlan
from agent.frontend.openinference import OpenInference, body_limit
from agent.frontend.server import MAX_JSON_BYTES, HttpRequest, HttpResponse
from agent.lineup import Lineup, load_lineup
from agent.observation import RingWriter, create_ring
from agent.serving import Service, Serving
from tests.models import PROBABILITY, WINDOW, engine_plan, service_plan

MIB = 1024 * 1024
ROW_BYTES = 16 * 3 * 4


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[OpenInference]:
    with serving(tmp_path) as handler:
        yield handler


@contextmanager
def serving(tmp_path: Path, *, inline_us: float = 1e9) -> Iterator[OpenInference]:
    plan = service_plan(engine_plan(tmp_path, "wrist", version=3))
    ring_fd = create_ring()
    serving = Serving(
        [Service(0, plan, load_lineup(plan)[0])], RingWriter(ring_fd), stuck_after_s=5, on_unstoppable=lambda: None,
        inline_us=inline_us,
    )  # fmt: skip
    try:
        yield OpenInference(serving)
    finally:
        serving.close()
        os.close(ring_fd)


def answers(handler: OpenInference, path: str, body: bytes) -> list[HttpResponse]:
    """Everything that was replied to one request."""
    told: list[HttpResponse] = []
    handler.handle(HttpRequest("POST", path, {}, body, clock.monotonic_ns()), told.append)
    return told


def text(response: HttpResponse) -> str:
    document = json.loads(b"".join(response.parts))
    error: str = document["error"]
    return error


@pytest.mark.parametrize("path", ["http://x/v2/repository/index", "HTTP://[::1]:80/v2/repository/index?a=/"])
def test_a_path_may_come_as_a_whole_address(handler: OpenInference, path: str) -> None:
    [response] = answers(handler, path, b"")
    assert response.status == 200


@pytest.mark.parametrize(
    "path",
    ["/v2/models/nosuch/infer", "/v2/models/wrist/versions/9/infer", "http://x/v2/models/wrist/versions/9/infer"],
)
def test_a_model_that_is_not_served_is_told_before_the_body_is_looked_at(handler: OpenInference, path: str) -> None:
    [response] = answers(handler, path, b"this is no JSON")
    assert response.status == 404


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"name": "other"}, "takes the inputs window, given was 'other'"),
        ({"datatype": "FP64"}, "must be FP32, FP64 was given"),
        ({"shape": [1, 5, 3]}, "must have shape [-1, 16, 3], [1, 5, 3] was given"),
        ({"shape": [4097, 16, 3]}, "a request has 1 to 4096 rows, not 4097"),
    ],
)
def test_an_input_that_does_not_fit_is_told_before_its_data_are_looked_at(
    handler: OpenInference, described: dict[str, object], words: str
) -> None:
    given = {"name": "window", "datatype": "FP32", "shape": [1, 16, 3], "data": ["no number"]} | described
    [response] = answers(handler, "/v2/models/wrist/infer", json.dumps({"inputs": [given]}).encode())
    assert (response.status, words in text(response)) == (400, True)


@pytest.mark.parametrize("name", ["ew_deadline_ms", "ew_time_s", "timeout"])
@pytest.mark.parametrize("value", [10**400, -(10**4000), "1", True, [1]], ids=range(5))
def test_a_parameter_that_is_no_number_of_any_use_is_told(handler: OpenInference, name: str, value: object) -> None:
    document = {"inputs": [{"name": "window", "datatype": "FP32", "shape": [1, 16, 3], "data": [0] * 48}]}
    [response] = answers(
        handler, "/v2/models/wrist/infer", json.dumps(document | {"parameters": {name: value}}).encode()
    )
    assert (response.status, text(response)) == (400, f"parameter {name} must be a number.")


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", retry_after_s=7), 503, "7"),
        (Overloaded("yours", retry_after_s=3, status=429), 429, "3"),
        (DeadlineExceeded("late"), 504, None),
    ],
)
def test_an_overload_says_whose_it_is_and_when_to_come_back(
    handler: OpenInference, monkeypatch: pytest.MonkeyPatch, error: ServingError, status: int, retry_after: str | None
) -> None:
    monkeypatch.setattr(handler._serving, "submit", lambda _request, done, _ended: done(error))
    given = {"name": "window", "datatype": "FP32", "shape": [1, 16, 3], "data": [0.0] * 48}
    [response] = answers(handler, "/v2/models/wrist/infer", json.dumps({"inputs": [given]}).encode())
    assert (response.status, response.headers.get("Retry-After")) == (status, retry_after)


def test_health_and_metadata_are_answered_while_the_queue_is_full(handler: OpenInference) -> None:
    service = handler._serving.service("wrist")
    for _ in range(service.plan.queue_limit):
        service.admission.enter("somebody")
    told: list[HttpResponse] = []
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/wrist", "/v2/models/wrist/stats"):
        handler.handle(HttpRequest("GET", path, {}, b"", clock.monotonic_ns()), told.append)
    assert [response.status for response in told] == [200] * 4


def test_a_full_queue_refuses_by_the_head_alone_and_counts_it(tmp_path: Path) -> None:
    with serving(tmp_path, inline_us=0.0) as handler:
        service = handler._serving.service("wrist")
        asked = ("POST", "/v2/models/wrist/infer", "me", clock.monotonic_ns())
        assert handler.refuse(*asked) is None
        for _ in range(service.plan.queue_limit):
            service.admission.enter("somebody")
        response = handler.refuse(*asked)
        assert response is not None
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert "requests waiting" in text(response)
        assert handler.refuse("POST", "/v2/models/wrist/versions/3/infer", *asked[2:]) is not None
        assert handler._serving.statistics()["overloaded"] == 2
        assert handler.refuse("GET", *asked[1:]) is None
        assert handler.refuse("POST", "/v2/models/nosuch/infer", *asked[2:]) is None
        assert handler.refuse("POST", "/v2/repository/index", *asked[2:]) is None


def test_a_service_without_a_queue_refuses_nobody_by_the_head(handler: OpenInference) -> None:
    service = handler._serving.service("wrist")
    for _ in range(service.plan.queue_limit):
        service.admission.enter("somebody")
    assert handler.refuse("POST", "/v2/models/wrist/infer", "me", clock.monotonic_ns()) is None


def service_of(*inputs: TensorPlan) -> Service:
    plan = EnginePlan("a", 1, "d" * 64, EngineKind.ONNX, inputs=inputs, outputs=(PROBABILITY,))
    return Service(0, service_plan(plan, guard=None), Lineup(()))


@pytest.mark.parametrize(
    ("inputs", "configured_bytes", "limit_bytes"),
    [
        ([(WINDOW,)], 64 * MIB, 4096 * ROW_BYTES + MAX_JSON_BYTES),
        ([(WINDOW,)], 100_000, 100_000),
        ([(WINDOW, TensorPlan("state", "FP64", (2, 4)))], 64 * MIB, 4096 * ROW_BYTES + 64 + MAX_JSON_BYTES),
        ([(TensorPlan("flag", "BOOL", ()),)], 64 * MIB, 1 + MAX_JSON_BYTES),
        ([(WINDOW,), (TensorPlan("big", "FP32", (-1, 1024)),)], 64 * MIB, 16 * MIB + MAX_JSON_BYTES),
        ([(TensorPlan("long", "FP32", (-1, -1)),)], 64 * MIB, 64 * MIB),
        ([(TensorPlan("text", "BYTES", (-1, 1)),)], 64 * MIB, 64 * MIB),
    ],
)
def test_no_larger_body_is_read_than_a_request_can_need(
    inputs: list[tuple[TensorPlan, ...]], configured_bytes: int, limit_bytes: int
) -> None:
    assert body_limit([service_of(*tensors) for tensors in inputs], configured_bytes) == limit_bytes
