"""Random and mutated bytes against a real worker: never a crash, never a 200 for what is no sound request."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.client import Client
from tests.models import LENGTH, engine_plan, floor_plan, service_plan, window, worker_plan
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
ROW_BYTES = LENGTH * 3 * 4


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sockets, RunningWorker]]:
    folder = tmp_path_factory.mktemp("fuzz")
    plan = worker_plan(service_plan(engine_plan(folder, "wrist"), floor_plan()), max_body_bytes=100_000)
    with Sockets(folder) as sockets, RunningWorker(sockets, plan).serve() as worker:
        yield sockets, worker
        assert worker.statistics()["bugs"] == 0
        with Client(sockets.unix_address) as client:
            assert client.infer("wrist", {"window": window()}).served_by == "wrist"


def exchange(sockets: Sockets, raw: bytes) -> bytes:
    """Everything the worker says to these bytes until it closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(sockets.path))
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while chunk := sock.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        return answer


def statuses(answer: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\nContent-Length", answer)


def binary_request(document: bytes, data: bytes) -> bytes:
    size = len(document) + len(data)
    lengths = b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(document), size)
    return b"POST /v2/models/wrist/infer HTTP/1.1\r\nHost: x\r\n" + lengths + document + data


def sound_request() -> bytes:
    tensor = {
        "name": "window", "datatype": "FP32", "shape": [1, LENGTH, 3], "parameters": {"binary_data_size": ROW_BYTES}
    }  # fmt: skip
    return binary_request(json.dumps({"inputs": [tensor]}).encode(), window().tobytes())


@QUICK
@given(st.binary(max_size=300))
def test_random_bytes_never_get_a_200(stage: tuple[Sockets, RunningWorker], raw: bytes) -> None:
    assert b"200" not in statuses(exchange(stage[0], raw))


@QUICK
@given(st.binary(max_size=200), st.sampled_from([b"GET", b"POST", b"PUT", b"OPTIONS"]))
def test_random_bytes_behind_a_request_line_never_get_a_200(
    stage: tuple[Sockets, RunningWorker], raw: bytes, method: bytes
) -> None:
    answer = exchange(stage[0], method + b" /v2/models/wrist/infer HTTP/1.1\r\nHost: x\r\n" + raw)
    assert b"200" not in statuses(answer)


@QUICK
@given(st.binary(max_size=300))
def test_random_bodies_are_400(stage: tuple[Sockets, RunningWorker], body: bytes) -> None:
    head = b"POST /v2/models/wrist/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert statuses(exchange(stage[0], head + body)) == [b"400"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@QUICK
@given(inputs=JSON, outputs=JSON, parameters=JSON, data=st.binary(max_size=ROW_BYTES))
def test_random_documents_are_400(
    stage: tuple[Sockets, RunningWorker], inputs: object, outputs: object, parameters: object, data: bytes
) -> None:
    document = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters}).encode()
    assert statuses(exchange(stage[0], binary_request(document, data))) == [b"400"]


@QUICK
@given(
    shape=st.lists(st.integers(-2, 2**70) | st.sampled_from([1, LENGTH, 3]), max_size=5),
    size=st.integers(-1, 2**70) | st.just(ROW_BYTES),
    datatype=st.sampled_from(["FP32", "FP16", "BYTES", "INT8", "BOOL", "FP99"]),
    length=st.integers(0, ROW_BYTES + 8) | st.just(ROW_BYTES),
)
def test_a_200_needs_exactly_the_declared_tensor(
    stage: tuple[Sockets, RunningWorker], shape: list[int], size: int, datatype: str, length: int
) -> None:
    tensor = {"name": "window", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    raw = binary_request(json.dumps({"inputs": [tensor]}).encode(), window().tobytes().ljust(length, b"\0")[:length])
    fits = (shape, size, datatype, length) == ([1, LENGTH, 3], ROW_BYTES, "FP32", ROW_BYTES)
    assert statuses(exchange(stage[0], raw)) == [b"200" if fits else b"400"]


@QUICK
@given(
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    cut=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_a_damaged_request_gets_an_answer_or_an_end_but_breaks_nothing(
    stage: tuple[Sockets, RunningWorker], place: float, value: int, cut: float | None
) -> None:
    raw = bytearray(sound_request())
    raw[int(place * len(raw))] = value
    if cut is not None:
        raw = raw[: int(cut * len(raw))]
    for status in statuses(exchange(stage[0], bytes(raw))):
        assert status in {b"200", b"400", b"404", b"405", b"408", b"413", b"415", b"505"}
    assert statuses(exchange(stage[0], sound_request())) == [b"200"]


@QUICK
@given(st.lists(st.integers(1, 200), max_size=8))
def test_how_a_request_is_cut_into_packets_does_not_matter(
    stage: tuple[Sockets, RunningWorker], cuts: list[int]
) -> None:
    raw = sound_request()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(stage[0].path))
        at = 0
        for cut in cuts:
            sock.sendall(raw[at : at + cut])
            at += cut
        sock.sendall(raw[at:])
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    assert statuses(answer) == [b"200"]


def test_sixty_four_byte_floats_smuggled_as_thirty_two_are_refused(stage: tuple[Sockets, RunningWorker]) -> None:
    data = struct.pack("<96d", *np.ravel(window(rows=2)).tolist()[:96])
    tensor = {"name": "window", "datatype": "FP32", "shape": [2, LENGTH, 3], "parameters": {"binary_data_size": 768}}
    raw = binary_request(json.dumps({"inputs": [tensor]}).encode(), data)
    assert statuses(exchange(stage[0], raw)) == [b"400"]
