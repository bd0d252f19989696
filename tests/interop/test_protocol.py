"""The Open Inference Protocol as we promise it, byte by byte against a real worker.

Nothing of ours is on the client's side here: requests are written out, answers are read with the standard library.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pytest

from agent import VERSION
from tests.interop.graphs import KINDS, ODD, ragged, scalars, service, types
from tests.models import worker_plan
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system
MAX_BODY_BYTES = 200_000
DTYPES = {
    "BOOL": "?", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "<u1", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False], "INT8": [-128, 127], "INT16": [-(2**15), 2**15 - 1], "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1], "UINT8": [0, 255], "UINT16": [0, 2**16 - 1], "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1], "FP16": [0.5, -65504.0], "FP32": [1.5, -(2.0**100)], "FP64": [0.1, -1e300],
    "BYTES": ["", "ü 0/\"\u0000end"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sockets, RunningWorker]]:
    folder = tmp_path_factory.mktemp("protocol")
    graphs = {"types": types(), "ragged": ragged(), "scalars": scalars()}
    services = [service(folder, name, graph) for name, graph in graphs.items()]
    plan = worker_plan(*services, max_body_bytes=MAX_BODY_BYTES)
    with Sockets(folder) as sockets, RunningWorker(sockets, plan) as worker:
        assert [loaded.error for loaded in worker.ready.engines] == ["", "", ""]
        worker.serve()
        yield sockets, worker
        assert worker.statistics()["bugs"] == 0


@pytest.fixture
def wire(stage: tuple[Sockets, RunningWorker]) -> Iterator[Wire]:
    with Wire(stage[0]) as opened:
        yield opened


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = dict(response.headers)
        self.body = response.read()
        self.binary = b""
        if "Inference-Header-Content-Length" in self.headers:
            length = int(self.headers["Inference-Header-Content-Length"])
            self.body, self.binary = self.body[:length], self.body[length:]

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    def outputs(self) -> dict[str, Any]:
        """Flat lists of values, from JSON or binary data."""
        found, at = {}, 0
        for item in self.document["outputs"]:
            size = item.get("parameters", {}).get("binary_data_size")
            data = item.get("data")
            if size is not None:
                data = unpack(item["datatype"], self.binary[at : at + size])
                at += size
            found[item["name"]] = data
        assert at == len(self.binary)
        return found


class Wire:
    """One connection, to which bytes are written as they are."""

    def __init__(self, sockets: Sockets) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(sockets.path))
        self._file = self.socket.makefile("rb")

    def say(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def hear(self, method: str = "POST") -> Answer:
        response = http.client.HTTPResponse(_Kept(self._file), method=method)  # type: ignore[arg-type]
        response.begin()
        answer = Answer(response)
        response.close()
        return answer

    def ended(self) -> bool:
        return self._file.read(1) == b""

    def get(self, path: str) -> Answer:
        self.say(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return self.hear()

    def infer(self, name: str, document: Any, binary: bytes = b"", *, headers: str = "") -> Answer:
        self.say(infer(name, document, binary, headers=headers))
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()


class _Kept:
    """Gives http.client the same buffered file for every response of a connection."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def makefile(self, *_: Any) -> Any:
        return _Unclosed(self._file)


class _Unclosed:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        pass


def infer(name: str, document: Any, binary: bytes = b"", *, headers: str = "", version: str = "1.1") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    lengths = f"Content-Length: {len(text) + len(binary)}\r\n"
    lengths += f"Inference-Header-Content-Length: {len(text)}\r\n" if binary else ""
    start = f"POST /v2/models/{name}/infer HTTP/{version}\r\nHost: x\r\n{headers}{lengths}\r\n"
    return start.encode() + text + binary


def pack(kind: str, values: Sequence[Any]) -> bytes:
    if kind != "BYTES":
        return np.array(values, DTYPES[kind]).tobytes()
    texts = [one if isinstance(one, bytes) else one.encode() for one in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def unpack(kind: str, data: bytes) -> list[Any]:
    if kind != "BYTES":
        return list(np.frombuffer(data, DTYPES[kind]).tolist())
    texts = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        texts.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return texts


def described(name: str, kind: str, shape: Sequence[int], **rest: Any) -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": list(shape), **rest}


def every_type(*, binary: Sequence[str]) -> tuple[list[dict[str, Any]], bytes]:
    """The inputs of `types`: those in `binary` as binary data, the others as JSON."""
    inputs, data = [], b""
    for kind, values in VALUES.items():
        if kind in binary:
            part = pack(kind, values)
            data += part
            rest: dict[str, Any] = {"parameters": {"binary_data_size": len(part)}}
        else:
            rest = {"data": values}
        inputs.append(described(f"{ODD} {kind}", kind, [1, 2], **rest))
    return inputs, data


X = described("x", "FP32", [1, 3], data=[1, 2, 3])


# --- what it says about itself -------------------------------------------------------------------------------
def test_the_server_says_what_it_is(wire: Wire) -> None:
    extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
    assert wire.get("/v2").document == {"name": "edgewarden", "version": VERSION, "extensions": extensions}


def test_a_model_describes_its_tensors_with_free_axes_scalars_and_odd_names(wire: Wire) -> None:
    assert wire.get("/v2/models/ragged").document == {
        "name": "ragged", "versions": ["2"], "platform": "onnxruntime_onnx",
        "inputs": [described("x", "FP32", [-1, -1])],
        "outputs": [described("twice", "FP32", [-1, -1]), described("count", "INT64", [])],
    }  # fmt: skip
    told = wire.get("/v2/models/types").document
    assert told["inputs"] == [described(f"{ODD} {kind}", kind, [-1, 2]) for kind in KINDS]
    assert told["outputs"] == [described(f"{kind}:out", kind, [-1, 2]) for kind in KINDS]


def test_the_configuration_has_the_public_clients_form(wire: Wire) -> None:
    config = wire.get("/v2/models/types/config").document
    assert config["max_batch_size"] > 0  # so that dims leave the rows out
    by_name = {tensor["name"]: tensor for tensor in config["output"]}
    assert by_name["BYTES:out"] == {"name": "BYTES:out", "data_type": "TYPE_STRING", "dims": [2]}
    assert by_name["FP16:out"]["data_type"] == "TYPE_FP16"
    config = wire.get("/v2/models/ragged/config").document
    assert config["max_batch_size"] == 0  # `count` has no rows
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, -1]}]
    assert {"name": "count", "data_type": "TYPE_INT64", "dims": []} in config["output"]


def test_statistics_count_what_was_answered_and_what_was_not(wire: Wire) -> None:
    before = wire.get("/v2/models/ragged/stats").document["model_stats"][0]
    wire.infer("ragged", {"inputs": [described("x", "FP32", [2, 1], data=[1, 2])]})
    after = wire.get("/v2/models/ragged/versions/2/stats").document["model_stats"][0]
    assert (after["name"], after["version"]) == ("ragged", "2")
    assert after["inference_count"] - before["inference_count"] == 2
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_stats"].keys() == {
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
    }  # fmt: skip
    every = wire.get("/v2/models/stats").document["model_stats"]
    assert [one["name"] for one in every] == ["types", "ragged", "scalars"]


def test_the_repository_index_lists_every_model(wire: Wire) -> None:
    wire.say(b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    assert wire.hear().document == [
        {"name": name, "version": "2", "state": "READY", "reason": "active"}
        for name in ("types", "ragged", "scalars")
    ]


# --- tensors -------------------------------------------------------------------------------------------------
def test_every_datatype_travels_as_binary_data_both_ways(wire: Wire) -> None:
    inputs, data = every_type(binary=list(KINDS))
    answer = wire.infer("types", {"inputs": inputs, "parameters": {"binary_data_output": True}}, data)
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.outputs() == {f"{kind}:out": VALUES[kind] for kind in KINDS}
    for item in answer.document["outputs"]:
        kind = item["datatype"]
        size = len(pack(kind, VALUES[kind]))
        assert item == described(f"{kind}:out", kind, [1, 2], parameters={"binary_data_size": size})


def test_every_datatype_but_fp16_travels_as_json_both_ways(wire: Wire) -> None:
    inputs, data = every_type(binary=["FP16"])
    wanted = [{"name": f"{kind}:out"} for kind in KINDS if kind != "FP16"]
    answer = wire.infer("types", {"inputs": inputs, "outputs": wanted}, data)
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    assert "Inference-Header-Content-Length" not in answer.headers
    assert answer.outputs() == {f"{kind}:out": VALUES[kind] for kind in KINDS if kind != "FP16"}


def test_both_forms_mix_within_a_request_and_within_an_answer(wire: Wire) -> None:
    inputs, data = every_type(binary=["FP16", "INT64", "BYTES"])
    wanted = [
        {"name": "BYTES:out", "parameters": {"binary_data": True}}, {"name": "INT8:out"},
        {"name": "FP16:out", "parameters": {"binary_data": True}},
    ]  # fmt: skip
    answer = wire.infer("types", {"inputs": inputs, "outputs": wanted}, data)
    assert answer.status == 200, answer.body
    assert answer.outputs() == {name: VALUES[name[:-4]] for name in ("BYTES:out", "INT8:out", "FP16:out")}
    assert len(answer.binary) == len(pack("BYTES", VALUES["BYTES"])) + 4
    outputs = [{"name": "INT8:out", "parameters": {"binary_data": False}}, {"name": "FP32:out"}]
    answer = wire.infer(
        "types", {"inputs": inputs, "outputs": outputs, "parameters": {"binary_data_output": True}}, data
    )
    assert ["data" in item for item in answer.document["outputs"]] == [True, False]


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (4, 7), (2, 0)])
@pytest.mark.parametrize("binary", [True, False])
def test_free_axes_take_any_length(wire: Wire, shape: tuple[int, int], *, binary: bool) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32)
    rest: dict[str, Any] = {"parameters": {"binary_data_size": x.nbytes}} if binary else {"data": x.tolist()}
    document = {"inputs": [described("x", "FP32", shape, **rest)], "parameters": {"binary_data_output": binary}}
    answer = wire.infer("ragged", document, x.tobytes() if binary else b"")
    assert answer.status == 200, answer.body
    assert [item["shape"] for item in answer.document["outputs"]] == [list(shape), []]
    assert answer.outputs() == {"twice": (2 * x).tolist(), "count": [x.size]}


def test_nested_lists_are_read_row_by_row(wire: Wire) -> None:
    answer = wire.infer("ragged", {"inputs": [described("x", "FP32", [2, 2], data=[[1, 2], [3, 4]])]})
    assert answer.outputs()["twice"] == [2, 4, 6, 8]


@pytest.mark.parametrize("binary", [True, False])
def test_scalars_have_the_empty_shape(wire: Wire, *, binary: bool) -> None:
    values, data = {"a": 5.0, "b": 1.5}, b""
    inputs = []
    for name, number in values.items():
        rest: dict[str, Any] = {"parameters": {"binary_data_size": 4}} if binary else {"data": [number]}
        data += pack("FP32", [number]) if binary else b""
        inputs.append(described(name, "FP32", [], **rest))
    answer = wire.infer("scalars", {"inputs": inputs, "parameters": {"binary_data_output": binary}}, data)
    assert answer.status == 200, answer.body
    assert answer.document["outputs"][0]["shape"] == []
    assert answer.outputs() == {"difference": [3.5]}


def test_inputs_and_outputs_may_come_in_any_order(wire: Wire) -> None:
    inputs = [described("b", "FP32", [], data=[1]), described("a", "FP32", [], data=[3])]
    assert wire.infer("scalars", {"inputs": inputs}).outputs() == {"difference": [2.0]}
    wanted = [{"name": "count"}, {"name": "twice"}]
    answer = wire.infer("ragged", {"inputs": [X], "outputs": wanted})
    assert [item["name"] for item in answer.document["outputs"]] == ["count", "twice"]


@pytest.mark.parametrize("request_id", ["1", "", "ünïcode \"'\\/ \u2028", "x" * 300])
def test_a_request_id_is_echoed(wire: Wire, request_id: str) -> None:
    document = wire.infer("ragged", {"id": request_id, "inputs": [X]}).document
    assert document.get("id", "") == request_id
    assert "id" not in wire.infer("ragged", {"inputs": [X]}).document


def test_what_a_request_says_beyond_the_protocol_is_left_alone(wire: Wire) -> None:
    document = {"inputs": [{**X, "note": 1}], "parameters": {"priority": 3, "sequence_id": 4}, "more": [{}]}
    assert wire.infer("ragged", document).status == 200


def test_a_model_may_be_named_in_percent_encoding_and_with_its_version(wire: Wire) -> None:
    assert wire.infer("%72agged", {"inputs": [X]}).status == 200
    assert wire.infer("ragged/versions/2", {"inputs": [X]}).document["model_version"] == "2"


# --- exact error bodies --------------------------------------------------------------------------------------
WRONG: list[tuple[str, Any, bytes, int, str]] = [
    ("ankle", {"inputs": []}, b"", 404, "there is no model 'ankle', served are: types, ragged, scalars."),
    ("ragged/versions/9", {"inputs": [X]}, b"", 404, "'ragged' has no version 9, it serves 2."),
    ("ragged", {"inputs": []}, b"", 400, "'ragged' takes the inputs x, given were none."),
    ("ragged", {"inputs": [X, X]}, b"", 400, "input 'x' is given twice."),
    ("ragged", {"inputs": [{**X, "name": "y"}]}, b"", 400, "'ragged' takes the inputs x, given was 'y'."),
    ("ragged", {"inputs": [{**X, "datatype": "FP64"}]}, b"", 400, "input 'x' must be FP32, FP64 was given."),
    ("ragged", {"inputs": [{**X, "shape": [3]}]}, b"", 400,
     "input 'x' must have shape [-1, -1], [3] was given. -1 stands for any length."),
    ("ragged", {"inputs": [{**X, "shape": [1, 4]}]}, b"", 400, "'x' [1, 4] needs 4 values, 3 were sent."),
    ("ragged", {"inputs": [{**X, "shape": [1, -3]}]}, b"", 400,
     "'x' needs a shape: a list of at most 8 whole numbers, none negative."),
    ("ragged", {"inputs": [{**X, "data": [1, "2", 3]}]}, b"", 400, "'x' is FP32 and cannot hold text."),
    ("ragged", {"inputs": [{**X, "data": [1, 2, 1e39]}]}, b"", 400, "'x' holds a number that does not fit FP32."),
    ("ragged", {"inputs": [{**X, "parameters": {"binary_data_size": 12}}]}, b"", 400,
     "'x' has both JSON and binary data."),
    ("ragged", {"inputs": [described("x", "FP32", [1, 3])]}, b"", 400,
     "'x' has neither a data list nor binary data."),
    ("ragged", {"inputs": [described("x", "FP32", [1, 3], parameters={"binary_data_size": 12})]}, b"1234", 400,
     "'x' announces 12 bytes of binary data, 4 are left in the body."),
    ("ragged", {"inputs": [described("x", "FP32", [1, 3], parameters={"binary_data_size": 4})]}, b"1234", 400,
     "'x' of FP32 [1, 3] needs 12 bytes, 4 were sent."),
    ("ragged", {"inputs": [X]}, b"1234", 400, "4 bytes of binary data belong to no tensor."),
    ("ragged", {"inputs": [X], "outputs": [{"name": "z"}]}, b"", 400,
     "'ragged' has no output 'z', only twice, count."),
    ("ragged", {"inputs": [X], "outputs": [{"name": "count"}, {"name": "count"}]}, b"", 400,
     "output 'count' is asked for twice."),
    ("ragged", {"inputs": [X], "outputs": [{"name": "twice", "parameters": {"classification": 2}}]}, b"", 400,
     "output 'twice' asks for classification, which is not offered here."),
    ("ragged", {"inputs": [X], "parameters": {"ew_deadline_ms": "soon"}}, b"", 400,
     "parameter ew_deadline_ms must be a number."),
    ("ragged", {"inputs": [X], "parameters": {"ew_deadline_ms": 0}}, b"", 400,
     "ew_deadline_ms must be above 0 and at most 3600000."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "document", "binary", "status", "text"), WRONG)
def test_an_error_is_a_status_and_exactly_one_text_and_the_connection_stays(
    wire: Wire, name: str, document: Any, binary: bytes, status: int, text: str
) -> None:
    answer = wire.infer(name, document, binary)
    assert (answer.status, answer.document) == (status, {"error": text})
    assert answer.headers["Content-Type"] == "application/json"
    assert wire.infer("ragged", {"inputs": [X]}).status == 200


def test_fp16_has_no_json_form_in_either_direction(wire: Wire, stage: tuple[Sockets, RunningWorker]) -> None:
    before = stage[1].statistics()["ok"]
    inputs, data = every_type(binary=[kind for kind in KINDS if kind != "FP16"])
    answer = wire.infer("types", {"inputs": inputs}, data)
    text = f"'{ODD} FP16' is FP16, which has no JSON form. Send it as binary data."
    assert (answer.status, answer.document) == (400, {"error": text})
    inputs, data = every_type(binary=list(KINDS))
    answer = wire.infer("types", {"inputs": inputs, "outputs": [{"name": "FP16:out"}]}, data)
    text = "'FP16:out' is FP16, which has no JSON form. Ask for binary data."
    assert (answer.status, answer.document) == (400, {"error": text})
    assert stage[1].statistics()["ok"] == before  # what is refused was not answered


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/models/types", "/v2/models/types/config"])
def test_head_is_answered_like_get_without_the_body(wire: Wire, path: str) -> None:
    whole = wire.get(path)
    wire.say(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = wire.hear("HEAD")
    assert (head.status, head.headers, head.body) == (whole.status, whole.headers, b"")
    assert int(head.headers["Content-Length"]) == len(whole.body)
    assert wire.get(path).body == whole.body  # and nothing of the body came behind


def test_head_is_no_way_to_ask_for_inference(wire: Wire) -> None:
    wire.say(b"HEAD /v2/models/ragged/infer HTTP/1.1\r\nHost: x\r\n\r\n")
    head = wire.hear("HEAD")
    assert (head.status, head.headers["Allow"]) == (405, "POST")


def test_bytes_that_are_no_text_are_refused_and_not_changed(wire: Wire) -> None:
    """The runtime's strings are UTF-8: passing something else on would answer a question nobody asked."""
    inputs, data = every_type(binary=list(KINDS))
    good = pack("BYTES", VALUES["BYTES"])
    bad = pack("BYTES", [b"", b"\xff\xfe".ljust(len(good) - 8, b"!")])
    answer = wire.infer(
        "types", {"inputs": inputs, "parameters": {"binary_data_output": True}}, data.replace(good, bad)
    )
    text = f"element 1 of '{ODD} BYTES' is not UTF-8."
    assert (answer.status, answer.document) == (400, {"error": text})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"inputs": {}}', b'{"inputs": [], "id": 5}', b"\xff"])
def test_a_document_that_is_none_is_a_400(wire: Wire, text: bytes) -> None:
    answer = wire.infer("ragged", text)
    assert answer.status == 400
    assert list(answer.document) == ["error"]
    assert answer.document["error"].startswith("the request's JSON cannot be read")
    assert wire.get("/v2/health/live").status == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999", " ", "0x10"])
def test_a_json_length_that_is_none_is_a_400(wire: Wire, length: str) -> None:
    answer = wire.infer("ragged", {"inputs": [X]}, headers=f"Inference-Header-Content-Length: {length}\r\n")
    assert answer.status == 400
    assert "Inference-Header-Content-Length must be a number of bytes" in answer.document["error"]


# --- HTTP ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP"])
def test_a_compressed_body_is_a_415(wire: Wire, encoding: str) -> None:
    answer = wire.infer("ragged", {"inputs": [X]}, headers=f"Content-Encoding: {encoding}\r\n")
    assert (answer.status, answer.document) == (415, {"error": "compressed bodies are not accepted"})


def test_identity_is_no_compression_and_compressed_answers_need_not_be_given(wire: Wire) -> None:
    headers = "Content-Encoding: identity\r\nAccept-Encoding: gzip, deflate\r\n"
    answer = wire.infer("ragged", {"inputs": [X]}, headers=headers)
    assert answer.status == 200
    assert "Content-Encoding" not in answer.headers


def test_a_body_over_the_limit_is_refused_before_it_is_read(wire: Wire) -> None:
    size = MAX_BODY_BYTES + 1
    lengths = f"Content-Length: {size}\r\nInference-Header-Content-Length: 10\r\n"
    wire.say(f"POST /v2/models/ragged/infer HTTP/1.1\r\nHost: x\r\n{lengths}\r\n".encode())
    answer = wire.hear()
    text = f"the body has {size} bytes, at most {MAX_BODY_BYTES} are accepted"
    assert (answer.status, answer.document) == (413, {"error": text})
    assert answer.headers["Connection"] == "close"
    assert wire.ended()


@pytest.mark.parametrize(
    ("lines", "status"), [("A: " + "a" * 20_000, 431), ("\r\n".join(f"H{n}: 1" for n in range(120)), 431)]
)
def test_headers_over_the_limits_are_refused(wire: Wire, lines: str, status: int) -> None:
    wire.say(f"GET /v2 HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n".encode())
    answer = wire.hear()
    assert answer.status == status
    assert list(answer.document) == ["error"]


def test_pipelined_requests_are_answered_in_order_errors_included(wire: Wire) -> None:
    requests = [
        infer("ankle" if n % 5 == 4 else "ragged", {"id": str(n), "inputs": [X]}) if n % 3 else
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" for n in range(60)
    ]  # fmt: skip
    wire.say(b"".join(requests))
    for n in range(60):
        answer = wire.hear()
        if n % 3 == 0:
            assert answer.document == {"live": True}
        elif n % 5 == 4:
            assert answer.status == 404
        else:
            assert answer.document["id"] == str(n)


def test_a_connection_is_kept_for_thousands_of_requests(wire: Wire) -> None:
    raw = infer("ragged", {"inputs": [X]})
    for _ in range(2000):
        wire.say(raw)
        answer = wire.hear()
        assert answer.status == 200
        assert "Connection" not in answer.headers


def test_a_client_that_wants_no_more_is_closed(wire: Wire) -> None:
    answer = wire.infer("ragged", {"inputs": [X]}, headers="Connection: close\r\n")
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert wire.ended()


def test_http_1_0_is_closed_after_its_answer(wire: Wire) -> None:
    wire.say(infer("ragged", {"inputs": [X]}, version="1.0"))
    answer = wire.hear()
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert wire.ended()


def test_http_1_0_is_kept_where_it_asks_for_that_and_is_told_so(wire: Wire) -> None:
    raw = infer("ragged", {"inputs": [X]}, version="1.0", headers="Connection: keep-alive\r\n")
    for _ in range(3):
        wire.say(raw)
        answer = wire.hear()
        assert (answer.status, answer.headers.get("Connection")) == (200, "keep-alive")


def test_head_gets_no_body(wire: Wire) -> None:
    """Whoever asks so does not expect one: it would be read as the beginning of the next answer."""
    wire.say(b"HEAD /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\nGET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = wire.hear("HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert wire.hear().document == {"live": True}


def test_a_body_with_a_get_is_read_over(wire: Wire) -> None:
    wire.say(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello" * 2)
    assert [wire.hear().status for _ in range(2)] == [200, 200]


def test_header_names_come_in_any_case(wire: Wire) -> None:
    inputs = [described("x", "FP32", [1, 1], parameters={"binary_data_size": 4})]
    raw = infer("ragged", {"inputs": inputs}, pack("FP32", [4])).replace(b"Inference-Header", b"INFERENCE-hEADER")
    wire.say(raw)
    assert wire.hear().outputs()["twice"] == [8.0]


def test_waiting_for_permission_to_send_a_body_is_answered(wire: Wire) -> None:
    raw = infer("ragged", {"inputs": [X]}, headers="Expect: 100-continue\r\n")
    head, _, body = raw.partition(b"\r\n\r\n")
    wire.say(head + b"\r\n\r\n")
    assert wire.socket.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.say(body)
    assert wire.hear().status == 200


# --- clients that are slow -----------------------------------------------------------------------------------
def test_a_request_that_trickles_in_is_answered_and_holds_nobody_up(
    wire: Wire, stage: tuple[Sockets, RunningWorker]
) -> None:
    raw = infer("ragged", {"inputs": [X]})
    with Wire(stage[0]) as other:
        for byte in raw[:-1]:
            wire.say(bytes([byte]))
        for _ in range(20):
            assert other.infer("ragged", {"inputs": [X]}).status == 200
        wire.say(raw[-1:])
        assert wire.hear().status == 200


def test_a_client_that_does_not_read_holds_nobody_up_and_loses_nothing(
    wire: Wire, stage: tuple[Sockets, RunningWorker]
) -> None:
    x = np.ones(20_000, np.float32)
    inputs = [described("x", "FP32", [1, x.size], parameters={"binary_data_size": x.nbytes})]
    raw = infer("ragged", {"inputs": inputs, "parameters": {"binary_data_output": True}}, x.tobytes())
    sent = 0
    wire.socket.settimeout(0.5)
    try:
        for _ in range(500):  # 40 MB of answers: more than any buffer on the way holds
            wire.say(raw)
            sent += 1
    except TimeoutError:
        pass
    assert 0 < sent < 500  # the server stopped reading
    with Wire(stage[0]) as other:
        for _ in range(20):
            assert other.infer("ragged", {"inputs": [X]}).status == 200
    wire.socket.settimeout(60)
    for _ in range(sent):
        assert len(wire.hear().binary) == x.nbytes + 8
