"""Thin client for local programs: Unix socket or TCP, binary tensors, blocking calls.

    with Client("unix:/run/edgewarden/serve.sock", retry_once=True) as client:
        answer = client.infer("wrist", {"window": window})
        answer.outputs["probability"], answer.served_by

One connection, one thread. Speaks the Open Inference Protocol, so any other v2 server answers it too. Failures are
the errors of `contract.errors`, chosen by HTTP status.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from agent.contract.errors import (
    DeadlineExceeded,
    Disconnected,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServingError,
    UnknownModel,
)
from agent.contract.tensors import HEADER_LENGTH, Array, Buffer, Tensor, datatype_of, read_tensors, write_tensors

MAX_HEAD_BYTES = 64 * 1024
ALIGNMENT = 8  # bytes: the server can use binary tensors where they lie
MAX_ANSWER_BYTES = 1024 * 1024 * 1024
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


class Client:
    """A connection that is opened when needed and kept. Not for use by two threads at once."""

    def __init__(self, address: str, *, timeout_s: float = 30.0, retry_once: bool = False) -> None:
        """`address`: "unix:/path", "/path", "host:port" or "http://host:port".

        `timeout_s` bounds each wait for the server. `retry_once`: send a request again, once, when the connection
        drops before the answer is complete (the worker was replaced); inference has no side effect, so this is safe.

        Raises:
            InvalidRequest: the address has none of these forms.
        """
        self._family, self._target, self._host = _parse_address(address)
        self._address = address
        self._timeout_s = timeout_s
        self._attempts = 2 if retry_once else 1
        self._socket: socket.socket | None = None
        self._retries = 0

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
    ) -> Answer:
        """Ask `model` for an answer; all outputs unless some are named.

        `time_s`: timestamp of the newest sample in the input, for monitors that run on the time of the data.

        Raises:
            InvalidRequest, UnknownModel, Overloaded, DeadlineExceeded, EngineFailed: as the server says.
            Disconnected: the connection broke or could not be opened.
        """
        asked = {"binary_data_output": True, **(parameters or {})}
        if deadline_ms is not None:
            asked["ew_deadline_ms"] = deadline_ms
        if time_s is not None:
            asked["ew_time_s"] = time_s
        tensors = [Tensor(name, datatype_of(array), array) for name, array in inputs.items()]
        described, parts = write_tensors(tensors, inputs.keys())
        document: dict[str, Any] = {"inputs": described, "parameters": asked}
        if request_id:
            document["id"] = request_id
        if outputs:
            document["outputs"] = [{"name": name} for name in outputs]
        return self._answer(*self._call("POST", f"{_model_path(model, version)}/infer", document, parts))

    def live(self) -> bool:
        """Whether the server runs."""
        return self._probe("/v2/health/live")

    def ready(self, model: str = "") -> bool:
        """Whether the server, or one model of it, can answer."""
        return self._probe(f"{_model_path(model)}/ready" if model else "/v2/health/ready")

    def metadata(self, model: str = "") -> dict[str, Any]:
        """What the server, or one model of it, says about itself."""
        document: dict[str, Any] = self._document("GET", _model_path(model) if model else "/v2")
        return document

    def statistics(self, model: str) -> dict[str, Any]:
        """Counts and times of a model, in the protocol's statistics form."""
        document: dict[str, Any] = self._document("GET", f"{_model_path(model)}/stats")
        return document

    def models(self) -> list[dict[str, Any]]:
        """The served models with their state."""
        document: list[dict[str, Any]] = self._document("POST", "/v2/repository/index")
        return document

    @property
    def retries(self) -> int:
        """Requests that were sent a second time."""
        return self._retries

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _probe(self, path: str) -> bool:
        status, _, _ = self._exchange("GET", path, b"", [])
        return status == 200

    def _document(self, method: str, path: str) -> Any:
        _, body = self._call(method, path, None, [])
        return _json(bytes(body))

    def _answer(self, headers: dict[str, str], body: memoryview) -> Answer:
        given = headers.get(HEADER_LENGTH.lower(), "")
        length = int(given) if given.isdigit() else len(body)
        document = _json(bytes(body[:length]))
        try:
            tensors = read_tensors(document.get("outputs", []), body[length:])
        except InvalidRequest as error:
            raise ServingError(f"the server's answer is malformed: {error}") from None
        return Answer(
            model=document.get("model_name", ""),
            version=document.get("model_version", ""),
            request_id=document.get("id", ""),
            outputs={tensor.name: tensor.array for tensor in tensors},
            parameters=document.get("parameters", {}),
        )

    def _call(
        self, method: str, path: str, document: Any, parts: Sequence[Buffer]
    ) -> tuple[dict[str, str], memoryview]:
        head = b"" if document is None else json.dumps(document, separators=(",", ":")).encode()
        if parts:
            head += b" " * (-len(head) % ALIGNMENT)
        status, headers, body = self._exchange(method, path, head, parts)
        if status != 200:
            raise _error(status, bytes(body))
        return headers, body

    def _exchange(
        self, method: str, path: str, head: bytes, parts: Sequence[Buffer]
    ) -> tuple[int, dict[str, str], memoryview]:
        size = len(head) + sum(map(len, parts))
        binary = f"{HEADER_LENGTH}: {len(head)}\r\n" if parts else ""
        start = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {size}\r\n{binary}\r\n"
        request = b"".join((start.encode(), head, *parts))
        for attempt in range(1, self._attempts + 1):
            try:
                return self._send(request)
            except TimeoutError:
                self.close()
                raise DeadlineExceeded(
                    f"{self._address} did not answer {method} {path} within {self._timeout_s:g} s"
                ) from None
            except OSError as error:
                self.close()
                if attempt == self._attempts:
                    raise Disconnected(
                        f"{method} {path} on {self._address}: {error.strerror or error}",
                        hint="Is the agent running?",
                    ) from None
                self._retries += 1
        raise AssertionError("unreachable")

    def _send(self, request: bytes) -> tuple[int, dict[str, str], memoryview]:
        if self._socket is None:
            self._socket = self._connect()
        with contextlib.suppress(BrokenPipeError):  # the server may have refused a large body: read what it says
            self._socket.sendall(request)
        status, headers, body = _read_response(self._socket)
        if headers.get("connection", "").lower() == "close":
            self.close()
        return status, headers, body

    def _connect(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._timeout_s)
            if self._family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(self._target)
        except OSError:
            sock.close()
            raise
        return sock


def _parse_address(address: str) -> tuple[socket.AddressFamily, Any, str]:
    path = address.removeprefix("unix:")
    if path.startswith("/"):
        return socket.AF_UNIX, path, "localhost"
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"'{address}' is no address", hint="Use unix:/path or host:port.")
    name = host.strip("[]")
    return (socket.AF_INET6 if ":" in name else socket.AF_INET), (name, int(port)), f"{host}:{port}"


def _model_path(model: str, version: str = "") -> str:
    for name in (model, version):
        if not name.isascii() or not name.isprintable() or set(name) & set(" /?#%"):
            raise InvalidRequest(f"{name[:60]!r} cannot be the name or version of a model")
    path = f"/v2/models/{model}"
    return f"{path}/versions/{version}" if version else path


def _error(status: int, body: bytes) -> ServingError:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return _ERRORS.get(status, ServingError)(json.loads(body)["error"])
    return _ERRORS.get(status, ServingError)(f"the server answered {status}")


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        raise ServingError("the server's answer is not JSON") from None


def _read_response(sock: socket.socket) -> tuple[int, dict[str, str], memoryview]:
    """Status, headers (lower-case names) and body. Raises: ConnectionError when it ends early or is no HTTP."""
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        if len(received) > MAX_HEAD_BYTES:
            raise ConnectionError("the answer's headers do not end")
        received += _receive(sock, 65536)
    first, *lines = received[:end].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status, size = first[9:12], headers.get("content-length", "")
    if not (first.startswith("HTTP/1.") and status.isdigit() and size.isdigit() and int(size) <= MAX_ANSWER_BYTES):
        raise ConnectionError("the answer is no HTTP response with a length")
    body = bytearray(int(size))
    have = len(received) - end - 4
    if have > len(body):
        raise ConnectionError("the answer is longer than announced")
    body[:have] = received[end + 4 :]
    view = memoryview(body)
    while have < len(body):
        count = sock.recv_into(view[have:])
        if count == 0:
            raise ConnectionError("the connection was closed in the middle of an answer")
        have += count
    return int(status), headers, view


def _receive(sock: socket.socket, size: int) -> bytes:
    chunk = sock.recv(size)
    if not chunk:
        raise ConnectionError("the connection was closed before an answer")
    return chunk
