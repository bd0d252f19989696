"""The client that blocks: one connection, one thread."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from agent.client.sender import StreamOptions
from agent.client.streams import Stream
from agent.client.wire import JOINED_BYTES, Address, Answer, Call, InferOptions, Response, ResponseReader, Wire
from agent.contract.errors import DeadlineExceeded, Disconnected
from agent.contract.tensors import Array, Buffer

READ_BYTES = 64 * 1024
MOST_READ_BYTES = 1024 * 1024
MAX_PARTS = 64  # buffers of one sendmsg; the system takes 1024
_TIMEVAL = struct.Struct("@ll")
Result = TypeVar("Result")


class Client:
    """A connection that is opened when needed and kept. Not for use by two threads at once."""

    def __init__(self, address: str, *, timeout_s: float = 30.0, retry_once: bool = False) -> None:
        """`address`: "unix:/path", "/path", "host:port" or "http://host:port".

        `timeout_s` bounds each wait for the server. `retry_once`: send a request again, once, when the connection
        drops before the answer is complete (the worker was replaced); inference has no side effect, so this is safe.

        Raises:
            InvalidRequest: the address has none of these forms.
        """
        self._address = Address.parse(address)
        self._wire = Wire(self._address)
        self._timeout_s = timeout_s
        self._retry_once = retry_once
        self._socket: socket.socket | None = None
        self._retries = 0

    def infer(self, model: str, inputs: Mapping[str, Array], **options: Unpack[InferOptions]) -> Answer:
        """Ask `model` for an answer; all outputs unless some are named. Options: see `InferOptions`.

        Raises:
            InvalidRequest, UnknownModel, Overloaded, DeadlineExceeded, EngineFailed: as the server says.
            Disconnected: the connection broke or could not be opened.
        """
        return self._do(self._wire.infer(model, inputs, **options))

    def stream(self, model: str, name: str, **options: Unpack[StreamOptions]) -> Stream:
        """A stream of raw samples to `model`, from its first sample on. Options: see `StreamOptions`.

        Raises:
            InvalidRequest: a name that cannot be sent.
        """
        return Stream(self._do, self._wire, model, name, **options)

    def live(self) -> bool:
        """Whether the server runs."""
        return self._do(self._wire.live())

    def ready(self, model: str = "") -> bool:
        """Whether the server, or one model of it, can answer."""
        return self._do(self._wire.ready(model))

    def metadata(self, model: str = "") -> dict[str, Any]:
        """What the server, or one model of it, says about itself."""
        return self._do(self._wire.metadata(model))

    def statistics(self, model: str) -> dict[str, Any]:
        """Counts and times of a model, in the protocol's statistics form."""
        return self._do(self._wire.statistics(model))

    def models(self) -> list[dict[str, Any]]:
        """The served models with their state."""
        return self._do(self._wire.models())

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

    def _do(self, call: Call[Result]) -> Result:
        attempts = 2 if self._retry_once and call.repeatable else 1
        for attempt in range(1, attempts + 1):
            try:
                response = self._exchange(call.parts)
                break
            except (TimeoutError, BlockingIOError):
                self.close()
                text = f"{self._address.text} did not answer {call.name} within {self._timeout_s:g} s"
                raise DeadlineExceeded(text) from None
            except OSError as error:
                self.close()
                if attempt == attempts:
                    text = f"{call.name} on {self._address.text}: {error.strerror or error}"
                    raise Disconnected(text, hint="Is the agent running?") from None
                self._retries += 1
            except BaseException:  # interrupted in the middle: what is still to come belongs to no later request
                self.close()
                raise
        return call.read(response)

    def _exchange(self, parts: Sequence[Buffer]) -> Response:
        sock = self._socket
        if sock is None:
            sock = self._socket = self._connect()
        with contextlib.suppress(BrokenPipeError):  # the server may have refused a large body: read what it says
            _send(sock, parts)
        reader = ResponseReader()
        response: Response | None = None
        while response is None:
            data = sock.recv(min(max(READ_BYTES, reader.missing), MOST_READ_BYTES))
            if not data:
                raise reader.ended()
            response = reader.feed(data)
        if response.closing:
            self.close()
        return response

    def _connect(self) -> socket.socket:
        sock = socket.socket(self._address.family, socket.SOCK_STREAM)
        try:
            # waits are bounded by the system: Python's own timeouts cost a poll beside every send and receive
            limit = _TIMEVAL.pack(int(self._timeout_s), max(1, int(self._timeout_s % 1 * 1e6)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            if self._address.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(self._address.target)
        except OSError:
            sock.close()
            raise
        return sock


def _send(sock: socket.socket, parts: Sequence[Buffer]) -> None:
    if sum(map(len, parts)) <= JOINED_BYTES:
        sock.sendall(b"".join(parts))
        return
    left = [memoryview(part) for part in parts]
    while left:
        sent = sock.sendmsg(left[:MAX_PARTS])
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]
