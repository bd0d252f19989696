"""Open Inference Protocol v2 over HTTP: which path means what, JSON and binary tensors, and the status of each error.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol with Triton's binary tensor,
model configuration and statistics extensions. Only public outputs are described; hidden views never get here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec

from agent import VERSION
from agent.contract.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, HEADER_LENGTH, Array, Buffer, read_tensors, write_tensors
from agent.frontend.server import MAX_JSON_BYTES, HttpRequest, HttpResponse, Reply, error_response
from agent.serving import MAX_BATCH_ROWS, Answer, Request, Service, Serving

STATUS: dict[type[ServingError], int] = {
    InvalidRequest: 400,
    UnknownModel: 404,
    EngineFailed: 500,
    Overloaded: 503,
    DeadlineExceeded: 504,
}
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
PLATFORM = "onnxruntime_onnx"
_TRITON_TYPES = {"BYTES": "TYPE_STRING"}  # the others are TYPE_ and the protocol's name


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(msgspec.Struct):
    inputs: list[Any]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_infer_decoder = msgspec.json.Decoder(_Infer)
_encode = msgspec.json.Encoder().encode
_LENGTH_KEY = HEADER_LENGTH.lower()


def body_limit(services: Iterable[Service], configured_bytes: int) -> int:
    """Largest body worth reading: the configured one, or less where no request to `services` can be that large."""
    largest = max((_largest_bytes(service.signature.inputs) for service in services), default=0)
    return min(configured_bytes, largest + MAX_JSON_BYTES)


class OpenInference:
    """The handler of a worker's server."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Answer one HTTP request; every ServingError becomes its status and text."""
        try:
            self._route(request, reply)
        except ServingError as error:
            reply(_failure(error))

    def _route(self, request: HttpRequest, reply: Reply) -> None:
        path = request.path.partition("?")[0].rstrip("/")
        parts = path.split("/")[1:]
        match [unquote(part) for part in parts] if "%" in path else parts:
            case ["v2", "models", model, "infer"]:
                self._infer(request, reply, model, "")
            case ["v2", "models", model, "versions", version, "infer"]:
                self._infer(request, reply, model, version)
            case ["v2"]:
                _read(request, reply, _server_metadata)
            case ["v2", "health", "live"]:
                _read(request, reply, lambda: {"live": True})
            case ["v2", "health", "ready"]:
                _read(request, reply, self._ready)
            case ["v2", "models", "stats"]:
                _read(request, reply, lambda: _statistics(*self._serving.services.values()))
            case ["v2", "models", model, *rest]:
                self._model(request, reply, model, rest)
            case ["v2", "repository", "index"]:
                if _only("POST", request, reply):
                    reply(_document(self._index()))
            case ["v2", "repository", "models", _, ("load" | "unload") as verb]:
                text = f"{verb} is refused: which models this device serves is decided by its agent, not by clients"
                if _only("POST", request, reply):
                    reply(error_response(403, text))
            case _:
                reply(error_response(404, f"there is nothing at {path[:100]}"))

    def _model(self, request: HttpRequest, reply: Reply, model: str, rest: list[str]) -> None:
        version = ""
        if len(rest) >= 2 and rest[0] == "versions":
            version, rest = rest[1], rest[2:]
        views: dict[tuple[str, ...], Callable[[Service], Any]] = {
            (): _metadata,
            ("ready",): _model_ready,
            ("config",): _config,
            ("stats",): _statistics,
        }
        view = views.get(tuple(rest))
        if view is None:
            reply(error_response(404, f"a model has no '{'/'.join(rest)[:60]}'"))
            return
        service = self._serving.service(model)
        service.check_version(version)
        _read(request, reply, lambda: view(service))

    def _infer(self, http: HttpRequest, reply: Reply, model: str, version: str) -> None:
        if not _only("POST", http, reply):
            return
        service = self._serving.service(model)
        service.check_version(version)
        length, document = _read_document(http)
        binary = _binary_names(document)
        inputs = _read_inputs(service, document, memoryview(http.body)[length:])
        request = _request(service, version, document, inputs, http)

        def done(result: Answer | ServingError) -> None:
            if isinstance(result, ServingError):
                reply(_failure(result))
                return
            try:
                reply(_answer(model, document.id, result, binary))
            except InvalidRequest as error:  # an output that has no JSON form
                reply(_failure(error))

        self._serving.submit(request, done)

    def _ready(self) -> dict[str, bool]:
        for service in self._serving.services.values():
            _model_ready(service)
        return {"ready": True}

    def _index(self) -> list[dict[str, str]]:
        return [
            {
                "name": service.plan.service,
                "version": service.version,
                "state": "READY" if service.ready else "UNAVAILABLE",
                "reason": service.lineup.reason if service.ready else "no engine is usable",
            }
            for service in self._serving.services.values()
        ]


def _failure(error: ServingError) -> HttpResponse:
    status = error.status or STATUS.get(type(error), 500)
    headers = {"Retry-After": str(math.ceil(error.retry_after_s or 1))} if status in (429, 503) else None
    return error_response(status, error.sentence(), headers)


def _document(document: Any) -> HttpResponse:
    return HttpResponse(200, (_encode(document),))


def _only(method: str, request: HttpRequest, reply: Reply) -> bool:
    if request.method == method:
        return True
    reply(error_response(405, f"{request.method} is not possible here, use {method}", {"Allow": method}))
    return False


def _read(request: HttpRequest, reply: Reply, make: Callable[[], Any]) -> None:
    if _only("GET", request, reply):
        reply(_document(make()))


# --- infer ---------------------------------------------------------------------------------------------------
def _read_document(http: HttpRequest) -> tuple[int, _Infer]:
    """Length of the JSON part and the document in it."""
    given = http.headers.get(_LENGTH_KEY)
    length = len(http.body)
    if given is not None:
        if not (given.isascii() and given.isdigit() and len(given) < 16 and int(given) <= length):
            raise InvalidRequest(f"{HEADER_LENGTH} must be a number of bytes up to the body's {length}")
        length = int(given)
    try:
        return length, _infer_decoder.decode(memoryview(http.body)[:length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the request's JSON cannot be read: {error}") from None


def _read_inputs(service: Service, document: _Infer, binary: Buffer) -> dict[str, Array]:
    """The arrays of a request, each built only after its description was found right."""
    seen: set[str] = set()

    def admit(name: str, datatype: str, shape: tuple[int, ...]) -> None:
        if name in seen:
            raise InvalidRequest(f"input '{name[:60]}' is given twice")
        seen.add(name)
        service.check_input(name, datatype, shape)

    return {tensor.name: tensor.array for tensor in read_tensors(document.inputs, binary, admit=admit)}


def _request(
    service: Service, version: str, document: _Infer, inputs: dict[str, Array], http: HttpRequest
) -> Request:
    deadline_ms = _number(document.parameters, "ew_deadline_ms")
    if deadline_ms is None:
        timeout_us = _number(document.parameters, "timeout")  # Triton's name for it
        deadline_ms = timeout_us / 1e3 if timeout_us else None
    data_time_s = _number(document.parameters, "ew_time_s")
    return Request(
        service=service.plan.service,
        inputs=inputs,
        arrival_ns=http.arrival_ns,
        outputs=tuple(output.name for output in document.outputs),
        version=version,
        deadline_ms=deadline_ms,
        data_time_s=math.nan if data_time_s is None else data_time_s,
        client=http.client,
    )


def _number(parameters: dict[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InvalidRequest(f"parameter {name} must be a number")
    return float(value)


def _binary_names(document: _Infer) -> Callable[[str], bool]:
    """Which outputs travel as binary data: each one's own wish, else the request's."""
    everything = document.parameters.get("binary_data_output") is True
    wishes: dict[str, bool] = {}
    for output in document.outputs:
        for unknown in ("classification", "shared_memory_region"):
            if unknown in output.parameters:
                raise InvalidRequest(f"output '{output.name}' asks for {unknown}, which is not offered here")
        wishes[output.name] = bool(output.parameters.get("binary_data", everything))
    return lambda name: wishes.get(name, everything)


def _answer(model: str, request_id: str, answer: Answer, binary: Callable[[str], bool]) -> HttpResponse:
    names = {tensor.name for tensor in answer.outputs if binary(tensor.name)}
    described, parts = write_tensors(answer.outputs, names)
    parameters = {"ew_served_by": answer.engine, "ew_artifact": answer.digest, "ew_reason": answer.reason}
    if answer.guard:
        parameters["ew_guard"] = answer.guard
    document = {"model_name": model, "model_version": answer.version, "parameters": parameters, "outputs": described}
    if request_id:
        document["id"] = request_id
    head = _encode(document)
    return HttpResponse(200, (head, *parts), json_bytes=len(head) if parts else 0)


# --- what a model says about itself --------------------------------------------------------------------------
def _server_metadata() -> dict[str, Any]:
    return {"name": "edgewarden", "version": VERSION, "extensions": EXTENSIONS}


def _model_ready(service: Service) -> dict[str, Any]:
    if not service.ready:
        raise Overloaded(f"no engine of '{service.plan.service}' is usable")
    return {"name": service.plan.service, "ready": True}


def _metadata(service: Service) -> dict[str, Any]:
    labels = {"parameters": {"labels": list(service.plan.labels)}} if service.plan.labels else {}
    return {
        "name": service.plan.service,
        "versions": [service.version],
        "platform": PLATFORM,
        "inputs": [_tensor(tensor) for tensor in service.signature.inputs],
        "outputs": [_tensor(tensor) for tensor in service.signature.outputs],
        **labels,  # beyond the protocol, in the place it has for such things
    }


def _largest_bytes(inputs: Sequence[TensorPlan]) -> int:
    """Binary size of the largest inputs admitted; no limit where an axis other than the rows is free."""
    if any(tensor.datatype == "BYTES" or -1 in tensor.shape[1:] for tensor in inputs):
        return sys.maxsize
    return sum(
        math.prod(MAX_BATCH_ROWS if axis == -1 else axis for axis in tensor.shape)
        * DATATYPES[tensor.datatype].itemsize
        for tensor in inputs
    )


def _tensor(tensor: TensorPlan) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _config(service: Service) -> dict[str, Any]:
    """Triton's model configuration, as far as its clients read it."""
    tensors = (*service.signature.inputs, *service.signature.outputs)
    batched = all(tensor.shape[:1] == (-1,) for tensor in tensors)
    skip = 1 if batched else 0  # with batching, dims leave out the first axis

    def described(tensor: TensorPlan) -> dict[str, Any]:
        kind = _TRITON_TYPES.get(tensor.datatype, f"TYPE_{tensor.datatype}")
        return {"name": tensor.name, "data_type": kind, "dims": list(tensor.shape[skip:])}

    return {
        "name": service.plan.service,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": MAX_BATCH_ROWS if batched else 0,
        "input": [described(tensor) for tensor in service.signature.inputs],
        "output": [described(tensor) for tensor in service.signature.outputs],
        "parameters": {"labels": {"string_value": ",".join(service.plan.labels)}},
    }


def _statistics(*services: Service) -> dict[str, Any]:
    return {"model_stats": [_service_statistics(service) for service in services]}


def _service_statistics(service: Service) -> dict[str, Any]:
    counters = service.counters
    infer_us = max(0.0, counters.latency_us - counters.queue_us)

    def duration(count: int, total_us: float) -> dict[str, int]:
        return {"count": count, "ns": int(total_us * 1e3)}

    return {
        "name": service.plan.service,
        "version": service.version,
        "last_inference": int(counters.last_wall_s * 1e3),
        "inference_count": counters.rows,
        "execution_count": counters.answered,
        "inference_stats": {
            "success": duration(counters.answered, counters.latency_us),
            "fail": duration(counters.failed, 0.0),
            "queue": duration(counters.requests, counters.queue_us),
            "compute_input": duration(counters.answered, 0.0),
            "compute_infer": duration(counters.answered, infer_us),
            "compute_output": duration(counters.answered, 0.0),
            "cache_hit": duration(0, 0.0),
            "cache_miss": duration(0, 0.0),
        },
        "batch_stats": [],
    }
