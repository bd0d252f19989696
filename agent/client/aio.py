"""The client of asyncio programs: the same calls as coroutines, several at once over a few connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

from agent.client.aio_streams import AsyncStream
from agent.client.sender import StreamOptions
from agent.client.wire import Address, Answer, Call, InferOptions, Response, ResponseReader, Wire
from agent.contract.errors import DeadlineExceeded, Disconnected
from agent.contract.tensors import Array

Result = TypeVar("Result")


class AsyncClient:
    """Connections that are opened when needed and kept, at most `connections`; further calls wait their turn.

    Belongs to the event loop it is used in. A call that is cancelled gives its connection up.
    """

    def __init__(
        self, address: str, *, timeout_s: float = 30.0, retry_once: bool = False, connections: int = 8
    ) -> None:
        """As for `Client`; `timeout_s` bounds each exchange with the server, not the wait for a free connection.

        Raises:
            InvalidRequest: the address has no known form.
        """
        self._address = Address.parse(address)
        self._wire = Wire(self._address)
        self._timeout_s = timeout_s
        self._retry_once = retry_once
        self._free = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []
        self._retries = 0

    async def infer(self, model: str, inputs: Mapping[str, Array], **options: Unpack[InferOptions]) -> Answer:
        """Ask `model` for an answer; see `Client.infer`.

        Raises:
            InvalidRequest, UnknownModel, Overloaded, DeadlineExceeded, EngineFailed: as the server says.
            Disconnected: the connection broke or could not be opened.
        """
        return await self._do(self._wire.infer(model, inputs, **options))

    def stream(self, model: str, name: str, **options: Unpack[StreamOptions]) -> AsyncStream:
        """A stream of raw samples to `model`, from its first sample on. Options: see `StreamOptions`.

        Raises:
            InvalidRequest: a name that cannot be sent.
        """
        return AsyncStream(self._do, self._wire, model, name, **options)

    async def live(self) -> bool:
        """Whether the server runs."""
        return await self._do(self._wire.live())

    async def ready(self, model: str = "") -> bool:
        """Whether the server, or one model of it, can answer."""
        return await self._do(self._wire.ready(model))

    async def metadata(self, model: str = "") -> dict[str, Any]:
        """What the server, or one model of it, says about itself."""
        return await self._do(self._wire.metadata(model))

    async def statistics(self, model: str) -> dict[str, Any]:
        """Counts and times of a model, in the protocol's statistics form."""
        return await self._do(self._wire.statistics(model))

    async def models(self) -> list[dict[str, Any]]:
        """The served models with their state."""
        return await self._do(self._wire.models())

    @property
    def retries(self) -> int:
        """Requests that were sent a second time."""
        return self._retries

    async def close(self) -> None:
        """Close the idle connections and wait until they are; calls under way finish first or are cancelled."""
        while self._idle:
            connection = self._idle.pop()
            connection.close()
            await connection.closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[Result]) -> Result:
        attempts = 2 if self._retry_once and call.repeatable else 1
        async with self._free:
            for attempt in range(1, attempts + 1):
                try:
                    async with asyncio.timeout(self._timeout_s):
                        response = await self._exchange(call)
                    break
                except TimeoutError:
                    text = f"{self._address.text} did not answer {call.name} within {self._timeout_s:g} s"
                    raise DeadlineExceeded(text) from None
                except OSError as error:
                    if attempt == attempts:
                        text = f"{call.name} on {self._address.text}: {error.strerror or error}"
                        raise Disconnected(text, hint="Is the agent running?") from None
                    self._retries += 1
        return call.read(response)

    async def _exchange(self, call: Call[Any]) -> Response:
        while self._idle and self._idle[-1].closed.done():
            self._idle.pop()
        connection = self._idle.pop() if self._idle else await self._connect()
        kept = False
        try:
            response = await connection.exchange(call)
            kept = not response.closing and not connection.closed.done()
        finally:
            if not kept:
                connection.close()
        self._idle.append(connection) if kept else await connection.closed
        return response

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._address.family == socket.AF_UNIX:
            _, protocol = await loop.create_unix_connection(_Connection, self._address.target)
        else:
            _, protocol = await loop.create_connection(_Connection, *self._address.target)
        return protocol


class _Connection(asyncio.Protocol):
    """One exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._answer: asyncio.Future[Response] | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def exchange(self, call: Call[Any]) -> Response:
        """Send a request and wait for its response. Raises: OSError: the connection dropped before it was there."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection was closed before an answer")
        self._reader = ResponseReader()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.writelines(call.parts)
        return await self._answer

    def close(self) -> None:
        """Drop the connection; `closed` is done when it is."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        with contextlib.suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._reader is None or self._answer is None or self._answer.done():
            self.close()  # it speaks without being asked
            return
        try:
            response = self._reader.feed(data)
        except ConnectionError as error:
            self._answer.set_exception(error)
            return
        if response is not None:
            self._answer.set_result(response)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done() and self._reader is not None:
            self._answer.set_exception(exc if isinstance(exc, OSError) else self._reader.ended())
        if not self.closed.done():
            self.closed.set_result(None)
