"""Open Inference Protocol v2 over HTTP: which path means what, JSON and binary tensors, and the status of each error.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol with Triton's binary tensor,
model configuration and statistics extensions. Only public outputs are described; hidden views never get here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from agent import VERSION
from agent.attempt import Ended
from agent.contract.errors import (
    InvalidRequest,
    Overloaded,
    ServingError,
)
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, HEADER_LENGTH, Array, Buffer, Tensor, read_tensors
from agent.express import BinaryWire, Express, Wire
from agent.frontend.documents import (
    InferDocument,
    answer_response,
    binary_names,
    check_forms,
    deadline_ms,
    document_response,
    failure,
    number,
    only,
    read,
    read_document,
)
from agent.frontend.plans import Plan
from agent.frontend.server import MAX_JSON_BYTES, HttpRequest, HttpResponse, Reply, encode_response, error_response
from agent.frontend.streams import StreamRoute
from agent.frontend.texts import TextWire
from agent.serving import MAX_BATCH_ROWS, Answer, Request, Service, Serving

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
PLATFORM = "onnxruntime_onnx"
_TRITON_TYPES = {"BYTES": "TYPE_STRING"}  # the others are TYPE_ and the protocol's name


def body_limit(services: Iterable[Service], configured_bytes: int) -> int:
    """Largest body worth reading: the configured one, or less where no request to `services` can be that large."""
    largest = max((_largest_bytes(service.signature.inputs) for service in services), default=0)
    return min(configured_bytes, largest + MAX_JSON_BYTES)


class OpenInference:
    """The handler of a worker's server."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self.streams = StreamRoute(serving)

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Answer one HTTP request; every ServingError becomes its status and text."""
        try:
            self._route(request, reply)
        except ServingError as error:
            reply(failure(error))

    def _route(self, request: HttpRequest, reply: Reply) -> None:
        path, parts = _parts(request.path)
        match parts:
            case ["v2", "models", model, "infer"]:
                self._infer(request, reply, model, "")
            case ["v2", "models", model, "versions", version, "infer"]:
                self._infer(request, reply, model, version)
            case ["v2"]:
                read(request, reply, _server_metadata)
            case ["v2", "health", "live"]:
                read(request, reply, lambda: {"live": True})
            case ["v2", "health", "ready"]:
                read(request, reply, self._ready)
            case ["v2", "models", "stats"]:
                read(request, reply, lambda: _statistics(*self._serving.services.values()))
            case ["v2", "models", model, *rest]:
                self._model(request, reply, model, rest)
            case ["v2", "repository", "index"]:
                if only("POST", request, reply):
                    reply(document_response(self._index()))
            case ["v2", "repository", "models", _, ("load" | "unload") as verb]:
                text = f"{verb} is refused: which models this device serves is decided by its agent, not by clients"
                if only("POST", request, reply):
                    reply(error_response(403, text))
            case _:
                reply(error_response(404, f"there is nothing at {path[:100] or '/'}. Paths begin with /v2."))

    def _model(self, request: HttpRequest, reply: Reply, model: str, rest: list[str]) -> None:
        version = ""
        if len(rest) >= 2 and rest[0] == "versions":
            version, rest = rest[1], rest[2:]
        if len(rest) == 2 and rest[0] == "streams":
            service = self._serving.service(model)
            service.check_version(version)
            self.streams.handle(request, reply, service, rest[1])
            return
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
        read(request, reply, lambda: view(service))

    def _infer(self, http: HttpRequest, reply: Reply, model: str, version: str) -> None:
        if not only("POST", http, reply):
            return
        service = self._serving.service(model)
        service.check_version(version)
        length, document = read_document(http)
        asked = _Asked(model, version, service, document, binary_names(document))
        self._submit(asked, memoryview(http.body)[length:], http.arrival_ns, http.client, None, reply)

    def _submit(
        self, asked: _Asked, binary: memoryview, arrival_ns: int, client: str, ended: Ended | None, reply: Reply
    ) -> None:
        """Raises: ServingError: the request does not fit its service; there is no reply then."""
        refusal = self._serving.turn_away(asked.service, client, arrival_ns)
        if refusal is not None:
            reply(failure(refusal))
            return
        request = asked.request(binary, arrival_ns, client)

        def done(result: Answer | ServingError) -> None:
            if isinstance(result, ServingError):
                reply(failure(result))
                return
            try:
                reply(answer_response(asked.model, asked.document.id, result, asked.binary))
            except InvalidRequest as error:  # an output that has no JSON form
                reply(failure(error))

        self._serving.submit(request, done, ended)

    def refuse(self, method: str, path: str, client: str, arrival_ns: int) -> HttpResponse | None:
        """What a request hears whose head says that there is no place for it: nobody need look at its body."""
        model = _asked_model(path)[0] if method == "POST" else ""
        service = self._serving.services.get(model)
        refusal = None if service is None else self._serving.turn_away(service, client, arrival_ns)
        return None if refusal is None else failure(refusal)

    def plan(self, http: HttpRequest, prefix: bytes, response: bytes) -> Plan | None:
        """How messages like this one, which were answered by `response`, are answered from now on.

        None: they are no requests for inference, or the answer says something that others would not.
        """
        model, version = _asked_model(http.path)
        if model not in self._serving.services:
            return None
        service = self._serving.services[model]
        length, document = read_document(http)
        asked = _Asked(model, version, service, document, binary_names(document))
        request = asked.request(memoryview(http.body)[length:], http.arrival_ns, http.client)
        is_text = HEADER_LENGTH.lower() not in http.headers
        expected = True

        def wire(express: Express) -> Wire | None:
            nonlocal expected
            answer = express.answer(request.outputs)
            names = [tensor.name for tensor in answer.outputs]
            if any(asked.binary(name) is is_text for name in names):
                return None
            encoded = encode_response(answer_response(model, document.id, answer, asked.binary))
            if is_text:
                ours, theirs = (
                    TextWire.learn(prefix + http.body, len(prefix), names, each) for each in (encoded, response)
                )
                expected = ours == theirs
                return ours if expected else None
            head = encoded[: len(encoded) - sum(tensor.array.nbytes for tensor in answer.outputs)]
            expected = len(encoded) == len(response) and response.startswith(head)
            whole = sum(array.nbytes for array in request.inputs.values()) == len(http.body) - length
            return BinaryWire(len(prefix), tuple(request.inputs), names, head) if expected and whole else None

        serve = self._serving.express(request, wire)
        lineup, head_only = service.lineup, replace(http, body=b"")  # a body of megabytes is no part of a plan

        def submit(binary: memoryview, arrival_ns: int, client: str, ended: Ended | None, reply: Reply) -> None:
            try:
                self._submit(asked, binary, arrival_ns, client, ended, reply)
            except ServingError as error:
                reply(failure(error))

        def submit_text(body: memoryview, arrival_ns: int, client: str, ended: Ended | None, reply: Reply) -> None:
            again = replace(head_only, body=bytes(body), arrival_ns=arrival_ns, client=client)
            try:
                document = read_document(again)[1]
                asked = _Asked(model, version, service, document, binary_names(document))
                self._submit(asked, memoryview(b""), arrival_ns, client, ended, reply)
            except ServingError as error:
                reply(failure(error))

        body_bytes = len(http.body)
        size_bytes = len(prefix) + body_bytes - (0 if is_text else length)
        if not expected:
            return None
        return Plan(
            prefix,
            size_bytes,
            body_bytes,
            serve,
            submit_text if is_text else submit,
            lambda: service.lineup is not lineup,
        )

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


def _parts(path: str) -> tuple[str, list[str]]:
    """A path without its query, and the names it is made of. It may be a whole address, as proxies write it."""
    path = path.partition("?")[0].rstrip("/")
    if path[:7].lower() == "http://":
        path = "/" + path[7:].partition("/")[2]
    parts = path.split("/")[1:]
    return path, [unquote(part) for part in parts] if "%" in path else parts


def _asked_model(path: str) -> tuple[str, str]:
    """Model and version that a path asks for inference; empty = it does not."""
    match _parts(path)[1]:
        case ["v2", "models", model, "infer"]:
            return model, ""
        case ["v2", "models", model, "versions", version, "infer"]:
            return model, version
        case _:
            return "", ""


# --- infer ---------------------------------------------------------------------------------------------------
def _read_inputs(service: Service, document: InferDocument, binary: Buffer) -> dict[str, Array]:
    """The arrays of a request, each built only after its description was found right."""
    seen: set[str] = set()

    def admit(name: str, datatype: str, shape: tuple[int, ...]) -> None:
        if name in seen:
            raise InvalidRequest(f"input '{name[:60]}' is given twice")
        seen.add(name)
        service.check_input(name, datatype, shape)

    tensors = read_tensors(document.inputs, binary, admit=admit)
    for tensor in tensors:
        if tensor.datatype == "BYTES":
            _check_texts(tensor)
    return {tensor.name: tensor.array for tensor in tensors}


def _check_texts(tensor: Tensor) -> None:
    """The runtime's strings are UTF-8; what is not would reach a model as something else."""
    for index, element in enumerate(tensor.array.ravel()):
        try:
            element.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"element {index} of '{tensor.name}' is not UTF-8") from None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request for inference says, but for its binary data."""

    model: str
    version: str
    service: Service
    document: InferDocument
    binary: Callable[[str], bool]

    def request(self, binary: memoryview, arrival_ns: int, client: str) -> Request:
        """Raises: InvalidRequest: the tensors are not those of the service, or the data do not fit them."""
        parameters = self.document.parameters
        inputs = _read_inputs(self.service, self.document, binary)
        outputs = tuple(output.name for output in self.document.outputs)
        check_forms(self.service.datatypes, outputs, self.binary)
        data_time_s = number(parameters, "ew_time_s")
        return Request(
            service=self.service.plan.service,
            inputs=inputs,
            arrival_ns=arrival_ns,
            outputs=outputs,
            version=self.version,
            deadline_ms=deadline_ms(parameters),
            data_time_s=math.nan if data_time_s is None else data_time_s,
            client=client,
        )


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
