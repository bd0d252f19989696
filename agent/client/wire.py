"""What the clients say and understand: requests to bytes, bytes to answers and errors. Knows no socket.

A `Call` is one request, ready to be sent, with the function that reads its response; a `ResponseReader` turns
received bytes into a `Response`, however they were cut. What repeats from request to request (heads, descriptions) is
made and read once: then a request costs a client a few microseconds instead of tens.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np

from agent.contract.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)
from agent.contract.tensors import (
    DATATYPES,
    HEADER_LENGTH,
    Array,
    Buffer,
    Tensor,
    datatype_of,
    read_tensors,
    write_tensors,
)

MAX_HEAD_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 1024 * 1024 * 1024
ALIGNMENT = 8  # bytes: the server can use binary tensors where they lie
JOINED_BYTES = 64 * 1024  # below, copying an array is cheaper than handing over a view of it
MAX_KNOWN = 64  # heads and descriptions remembered...
MAX_KNOWN_BYTES = 4096  # ...each at most so long
_LENGTH_KEY = HEADER_LENGTH.lower()
_encode = json.JSONEncoder(separators=(",", ":")).encode
_ERRORS: dict[int, type[ServingError]] = {
    400: InvalidRequest,
    403: InvalidRequest,
    404: UnknownModel,
    413: InvalidRequest,
    415: InvalidRequest,
    429: Overloaded,
    500: EngineFailed,
    503: Overloaded,
    504: DeadlineExceeded,
}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: `target` is a path, or host and port; `host` is what the Host header says."""

    text: str
    family: socket.AddressFamily
    target: Any
    host: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """From "unix:/path", "/path", "host:port" or "http://host:port".

        Raises:
            InvalidRequest: it has none of these forms.
        """
        path = text.removeprefix("unix:")
        if path.startswith("/"):
            return cls(text, socket.AF_UNIX, path, "localhost")
        host, _, port = text.removeprefix("http://").rstrip("/").rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise InvalidRequest(f"'{text}' is no address", hint="Use unix:/path or host:port.")
        name = host.strip("[]")
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        return cls(text, family, (name, int(port)), f"{host}:{port}")


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs by name, and what the server says about how they came about."""

    model: str
    version: str
    request_id: str
    outputs: dict[str, Array]
    parameters: dict[str, Any]

    @property
    def served_by(self) -> str:
        """The engine that answered; empty when the server is not ours."""
        return str(self.parameters.get("ew_served_by", ""))

    @property
    def reason(self) -> str:
        """Why that engine answered."""
        return str(self.parameters.get("ew_reason", ""))

    @property
    def guard(self) -> str:
        """What the guard found in the input, such as "dead:gx,gy"; empty when nothing."""
        return str(self.parameters.get("ew_guard", ""))


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response. `json_bytes`: how much of `body` is JSON; `closing`: the server ends the connection."""

    status: int
    body: bytearray
    json_bytes: int
    closing: bool
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """One request and how its response is read. `repeatable`: sending it twice changes nothing."""

    method: str
    path: str
    parts: tuple[Buffer, ...]
    read: Callable[[Response], Result]
    repeatable: bool = True

    @property
    def name(self) -> str:
        """For errors: method and path."""
        return f"{self.method} {self.path}"


class InferOptions(TypedDict, total=False):
    """What may be said with an inference request.

    outputs: names wanted, all when empty. deadline_ms: when an answer is of no use any more, counted by the server.
    time_s: timestamp of the newest sample in the input, for monitors that run on the time of the data.
    parameters: more request parameters, as they are.
    """

    outputs: Sequence[str]
    version: str
    request_id: str
    deadline_ms: float | None
    time_s: float | None
    parameters: Mapping[str, Any] | None


class Wire:
    """The calls a client can make, with what it remembers of earlier ones. Owned by one thread."""

    def __init__(self, address: Address) -> None:
        self._host = address.host
        self._heads: dict[tuple[Any, ...], tuple[str, bytes]] = {}
        self._forms: dict[bytes, _AnswerForm] = {}

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] = (),
        version: str = "",
        request_id: str = "",
        deadline_ms: float | None = None,
        time_s: float | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Call[Answer]:
        """Ask `model` for an answer; see `InferOptions`.

        Raises:
            InvalidRequest: an array or a name that cannot be sent.
        """
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        key = None
        if not (request_id or parameters or time_s is not None):
            shapes = [(name, array.dtype, array.shape) for name, array in arrays.items()]
            key = (model, version, deadline_ms, *outputs, *shapes)
            if (known := self._heads.get(key)) is not None:
                path, head = known
                return Call("POST", path, (head, *map(_raw, arrays.values())), self._read_answer)
        document: dict[str, Any] = {"id": request_id} if request_id else {}
        if outputs:
            document["outputs"] = [{"name": name} for name in outputs]
        asked = {**(parameters or {})}
        if deadline_ms is not None:
            asked["ew_deadline_ms"] = deadline_ms
        if time_s is not None:
            asked["ew_time_s"] = time_s
        call = self.post_tensors(f"{model_path(model, version)}/infer", arrays, asked, document)
        if key is not None and all(array.dtype in _SENT_AS_THEY_LIE for array in arrays.values()):
            _remember(self._heads, key, (call.path, bytes(call.parts[0])))
        return call

    def post_tensors(
        self,
        path: str,
        arrays: Mapping[str, Array],
        parameters: Mapping[str, Any],
        document: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = True,
    ) -> Call[Answer]:
        """Send named arrays as binary data, with request parameters and more fields of the JSON `document`.

        Raises:
            InvalidRequest: an array or a parameter that cannot be sent.
        """
        described, parts = write_tensors(
            [Tensor(name, datatype_of(array), array) for name, array in arrays.items()], arrays.keys()
        )
        whole = {**(document or {}), "inputs": described, "parameters": {"binary_data_output": True, **parameters}}
        try:
            text = _encode(whole).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"a parameter cannot be sent: {error}") from None
        text += b" " * (-len(text) % ALIGNMENT)
        head = self._head("POST", path, len(text) + sum(map(len, parts)), len(text)) + text
        return Call("POST", path, (head, *parts), self._read_answer, repeatable)

    def document(self, method: str, path: str) -> Call[Any]:
        """A request without a body; reads the JSON of its answer."""
        return Call(method, path, (self._head(method, path, 0, 0),), _read_document)

    def live(self) -> Call[bool]:
        """Whether the server runs."""
        return self._probe("/v2/health/live")

    def ready(self, model: str = "") -> Call[bool]:
        """Whether the server, or one model of it, can answer."""
        return self._probe(f"{model_path(model)}/ready" if model else "/v2/health/ready")

    def metadata(self, model: str = "") -> Call[dict[str, Any]]:
        """What the server, or one model of it, says about itself."""
        return self.document("GET", model_path(model) if model else "/v2")

    def statistics(self, model: str) -> Call[dict[str, Any]]:
        """Counts and times of a model, in the protocol's statistics form."""
        return self.document("GET", f"{model_path(model)}/stats")

    def models(self) -> Call[list[dict[str, Any]]]:
        """The served models with their state."""
        return self.document("POST", "/v2/repository/index")

    def _probe(self, path: str) -> Call[bool]:
        return Call("GET", path, (self._head("GET", path, 0, 0),), lambda response: response.status == 200)

    def _head(self, method: str, path: str, size: int, json_bytes: int) -> bytes:
        binary = f"{HEADER_LENGTH}: {json_bytes}\r\n" if size > json_bytes else ""
        start = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {size}\r\n{binary}\r\n"
        return start.encode()

    def _read_answer(self, response: Response) -> Answer:
        if response.status != 200:
            raise _error(response)
        text = bytes(response.body[: response.json_bytes])
        form = self._forms.get(text)
        if form is None:
            form = _AnswerForm.read(text)
            if form.all_binary:
                _remember(self._forms, text, form)
        return form.fill(response)


def model_path(model: str, version: str = "") -> str:
    """Path of a model or one version of it.

    Raises:
        InvalidRequest: a name that would not stay within its place in the path.
    """
    for name in (model, version):
        if not name.isascii() or not name.isprintable() or set(name) & set(" /?#%"):
            raise InvalidRequest(f"{name[:60]!r} cannot be the name or version of a model")
    path = f"/v2/models/{model}"
    return f"{path}/versions/{version}" if version else path


class ResponseReader:
    """Collects one response from received bytes; make a new one for the next."""

    def __init__(self) -> None:
        self._head = b""
        self._form: _HeadForm | None = None
        self._body = bytearray()
        self._have = 0

    @property
    def missing(self) -> int:
        """Bytes of the body that are still to come; 0 while the head is not complete."""
        return 0 if self._form is None else self._form.size - self._have

    def feed(self, data: bytes) -> Response | None:
        """Take what was received; the response when it is complete.

        Raises:
            ConnectionError: this is no HTTP response with a length, or more than was announced.
        """
        form = self._form
        if form is None:
            data = self._head + data if self._head else data
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                if len(data) > MAX_HEAD_BYTES:
                    raise ConnectionError("the answer's headers do not end")
                self._head = data
                return None
            form = self._form = _read_head(data[:end])
            if len(data) - end == form.size:
                return form.response(bytearray(data[end:]))  # all at once: the usual case, one copy
            self._body = bytearray(form.size)
            data = data[end:]
        end = self._have + len(data)
        if end > form.size:
            raise ConnectionError("the answer is longer than announced")
        self._body[self._have : end] = data
        self._have = end
        return form.response(self._body) if end == form.size else None

    def ended(self) -> ConnectionError:
        """What it means that the server closed the connection now."""
        where = "before" if self._form is None else "in the middle of"
        return ConnectionError(f"the connection was closed {where} an answer")


@dataclass(frozen=True, slots=True)
class _HeadForm:
    """What a response's head says."""

    status: int
    size: int
    json_bytes: int
    closing: bool
    retry_after_s: float | None

    def response(self, body: bytearray) -> Response:
        return Response(self.status, body, self.json_bytes, self.closing, self.retry_after_s)


_heads: dict[bytes, _HeadForm] = {}  # immutable values by exact bytes: threads may share them


def _read_head(head: bytes) -> _HeadForm:
    form = _heads.get(head)
    if form is None:
        form = _parse_head(head)
        _remember(_heads, head, form)
    return form


def _parse_head(head: bytes) -> _HeadForm:
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    version, status, size = first[:9], first[9:12], headers.get("content-length", "")
    sound = version in ("HTTP/1.1 ", "HTTP/1.0 ") and status.isdigit() and size.isdigit()
    if not (sound and int(size) <= MAX_ANSWER_BYTES):
        raise ConnectionError("the answer is no HTTP response with a length")
    given, kept = headers.get(_LENGTH_KEY, ""), headers.get("connection", "").lower()
    json_bytes = int(given) if given.isdigit() and int(given) <= int(size) else int(size)
    closing = kept == "close" or (version == "HTTP/1.0 " and kept != "keep-alive")
    return _HeadForm(int(status), int(size), json_bytes, closing, _seconds(headers.get("retry-after", "")))


def _seconds(text: str) -> float | None:
    """A Retry-After; its other form, a date, is not spoken on a device whose clock may be wrong."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


@dataclass(frozen=True, slots=True)
class _AnswerForm:
    """The JSON of an answer; where all tensors are binary, also where each of them lies."""

    document: dict[str, Any]
    places: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int, int], ...]  # name, dtype, shape, begin, count
    size: int
    all_binary: bool

    @classmethod
    def read(cls, text: bytes) -> _AnswerForm:
        document = _json(text)
        if not isinstance(document, dict):
            raise ServingError("the server's answer is no JSON object")
        places, at = [], 0
        for item in described if isinstance(described := document.get("outputs"), list) else []:
            place = _place(item, at)
            if place is None:
                return cls(document, (), 0, all_binary=False)
            places.append(place)
            at += place[1].itemsize * place[4]
        return cls(document, tuple(places), at, all_binary=True)

    def fill(self, response: Response) -> Answer:
        document, body, begin = self.document, response.body, response.json_bytes
        if self.all_binary and begin + self.size == len(body):
            outputs = {
                name: np.frombuffer(body, dtype, count, begin + at).reshape(shape)
                for name, dtype, shape, at, count in self.places
            }
        else:
            outputs = _tensors(document, memoryview(body)[begin:])
        return Answer(
            document.get("model_name", ""),
            document.get("model_version", ""),
            document.get("id", ""),
            outputs,
            dict(document.get("parameters") or ()),
        )


def _place(item: Any, at: int) -> tuple[str, np.dtype[Any], tuple[int, ...], int, int] | None:
    """Where a described tensor lies; None when it is not plain, aligned binary data of the size it should have."""
    try:
        dtype, shape = DATATYPES[item["datatype"]], tuple(item["shape"])
        count, size = math.prod(shape), item["parameters"]["binary_data_size"]
        plain = dtype.kind in "iuf" and size == count * dtype.itemsize and type(item["name"]) is str
        return (item["name"], dtype, shape, at, count) if plain and min(shape, default=0) >= 0 else None
    except (LookupError, TypeError):
        return None


def _tensors(document: dict[str, Any], binary: memoryview) -> dict[str, Array]:
    try:
        tensors = read_tensors(document.get("outputs", []), binary)
    except (InvalidRequest, TypeError) as error:
        raise ServingError(f"the server's answer is malformed: {error}") from None
    return {tensor.name: tensor.array for tensor in tensors}


_SENT_AS_THEY_LIE = frozenset(dtype for dtype in DATATYPES.values() if dtype.kind != "O")


def _raw(array: Array) -> Buffer:
    """Row-major bytes of an array that is little endian already."""
    if array.nbytes > JOINED_BYTES and array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8).data
    return array.tobytes()


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Bounded: whoever varies what was meant to be constant only loses the shortcut."""
    if isinstance(key, bytes) and len(key) > MAX_KNOWN_BYTES:
        return
    if len(known) >= MAX_KNOWN:
        known.clear()
    known[key] = value


def _read_document(response: Response) -> Any:
    if response.status != 200:
        raise _error(response)
    return _json(bytes(response.body))


def _error(response: Response) -> ServingError:
    status = response.status
    text = f"the server answered {status}"
    with contextlib.suppress(ValueError, TypeError, LookupError):
        text = str(json.loads(response.body)["error"])
    return _ERRORS.get(status, ServingError)(text, status=status, retry_after_s=response.retry_after_s)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ServingError("the server's answer is not JSON") from None
