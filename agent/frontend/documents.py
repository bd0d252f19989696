"""What every route reads and writes: infer documents with their binary tensors, and the status of each error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from agent.contract.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)
from agent.contract.tensors import HEADER_LENGTH, Tensor, write_tensors
from agent.frontend.server import HttpRequest, HttpResponse, Reply, error_response
from agent.serving import Answer

STATUS: dict[type[ServingError], int] = {
    InvalidRequest: 400,
    UnknownModel: 404,
    EngineFailed: 500,
    Overloaded: 503,
    DeadlineExceeded: 504,
}


class AskedOutput(msgspec.Struct):
    """An output a client names."""

    name: str
    parameters: dict[str, Any] = {}


class InferDocument(msgspec.Struct):
    """The JSON part of a request with tensors, as far as one look at its form goes."""

    inputs: list[Any]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[AskedOutput] = []


_infer_decoder = msgspec.json.Decoder(InferDocument)
_encode = msgspec.json.Encoder().encode
_LENGTH_KEY = HEADER_LENGTH.lower()


def failure(error: ServingError) -> HttpResponse:
    """The response that says what went wrong."""
    status = error.status or STATUS.get(type(error), 500)
    headers = {"Retry-After": str(math.ceil(error.retry_after_s or 1))} if status in (429, 503) else None
    return error_response(status, error.sentence(), headers)


def document_response(document: Any) -> HttpResponse:
    """A JSON document as a response."""
    return HttpResponse(200, (_encode(document),))


def only(method: str, request: HttpRequest, reply: Reply) -> bool:
    """Whether the request has this method, or HEAD for GET; else it is answered here."""
    allowed = (method, "HEAD") if method == "GET" else (method,)  # of what answers HEAD, the server sends no body
    if request.method in allowed:
        return True
    text = f"{request.method} is not possible here, use {method}"
    reply(error_response(405, text, {"Allow": ", ".join(allowed)}))
    return False


def read(request: HttpRequest, reply: Reply, make: Callable[[], Any]) -> None:
    """Answer a GET with a document, which is only made for one."""
    if only("GET", request, reply):
        reply(document_response(make()))


# --- infer ---------------------------------------------------------------------------------------------------
def read_document(http: HttpRequest) -> tuple[int, InferDocument]:
    """Length of the JSON part and the document in it. Raises: InvalidRequest: it cannot be read."""
    given = http.headers.get(_LENGTH_KEY)
    length = len(http.body)
    if given is not None:
        if not (given.isascii() and given.isdigit() and len(given) < 16 and int(given) <= length):
            raise InvalidRequest(f"{HEADER_LENGTH} must be a number of bytes up to the body's {length}")
        length = int(given)
    try:
        return length, _infer_decoder.decode(memoryview(http.body)[:length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        hint = _json_hint(bytes(memoryview(http.body)[:length]))
        raise InvalidRequest(f"the request's JSON cannot be read: {error}", hint=hint) from None


def _json_hint(text: bytes) -> str:
    """What to do where a program wrote the numbers that JSON has no words for, as Python's json does."""
    if any(word in text for word in (b"NaN", b"Infinity")):
        return "NaN and infinity have no JSON form: send the tensors as binary data."
    return ""


def number(parameters: dict[str, Any], name: str) -> float | None:
    """A request parameter that is a finite number; None = not given. Raises: InvalidRequest: it is something else."""
    value = parameters.get(name)
    if value is None:
        return None
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    raise InvalidRequest(f"parameter {name} must be a number")


def deadline_ms(parameters: dict[str, Any]) -> float | None:
    """When an answer is of no use any more, by our or Triton's parameter; None = not given."""
    given_ms = number(parameters, "ew_deadline_ms")
    if given_ms is not None:
        return given_ms
    timeout_us = number(parameters, "timeout")
    return timeout_us / 1e3 if timeout_us else None


def binary_names(document: InferDocument) -> Callable[[str], bool]:
    """Which outputs travel as binary data: each one's own wish, else the request's."""
    everything = document.parameters.get("binary_data_output") is True
    wishes: dict[str, bool] = {}
    for output in document.outputs:
        for unknown in ("classification", "shared_memory_region"):
            if unknown in output.parameters:
                raise InvalidRequest(f"output '{output.name}' asks for {unknown}, which is not offered here")
        if output.name in wishes:
            raise InvalidRequest(f"output '{output.name[:60]}' is asked for twice")
        wishes[output.name] = bool(output.parameters.get("binary_data", everything))
    return lambda name: wishes.get(name, everything)


def check_forms(datatypes: Mapping[str, str], asked: Sequence[str], binary: Callable[[str], bool]) -> None:
    """Raises: InvalidRequest: an output, of those asked for or of all, is to be JSON and has no JSON form."""
    for name in asked or datatypes:
        if datatypes.get(name) == "FP16" and not binary(name):
            raise InvalidRequest(f"'{name}' is FP16, which has no JSON form", hint="Ask for binary data.")


def answer_response(model: str, request_id: str, answer: Answer, binary: Callable[[str], bool]) -> HttpResponse:
    """What a model answered. Raises: InvalidRequest: an output has no JSON form, and was not asked for as binary."""
    parameters: dict[str, Any] = {
        "ew_served_by": answer.engine, "ew_artifact": answer.digest, "ew_reason": answer.reason
    }  # fmt: skip
    if answer.guard:
        parameters["ew_guard"] = answer.guard
    return tensors_response(model, answer.version, request_id, parameters, answer.outputs, binary)


def tensors_response(
    model: str,
    version: str,
    request_id: str,
    parameters: dict[str, Any],
    outputs: Sequence[Tensor],
    binary: Callable[[str], bool],
) -> HttpResponse:
    """An infer response of any tensors. Raises: InvalidRequest: as `answer_response`."""
    described, parts = write_tensors(outputs, {tensor.name for tensor in outputs if binary(tensor.name)})
    document = {"model_name": model, "model_version": version, "parameters": parameters, "outputs": described}
    if request_id:
        document["id"] = request_id
    head = _encode(document)
    return HttpResponse(200, (head, *parts), json_bytes=len(head) if parts else 0)
