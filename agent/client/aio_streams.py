"""A stream of raw samples to a model, for asyncio programs; see `agent.client.streams`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Unpack

from agent.client.sender import ATTEMPTS, Sender, StreamOptions, first_input
from agent.client.wire import Answer, Call, Wire
from agent.contract.errors import Disconnected, Overloaded, ServingError, UnknownModel
from agent.contract.tensors import Array


class AsyncStream:
    """`Stream` over an `AsyncClient`; make it with `AsyncClient.stream`. Sends wait for each other."""

    def __init__(
        self,
        do: Callable[[Call[Any]], Awaitable[Any]],
        wire: Wire,
        model: str,
        name: str,
        **options: Unpack[StreamOptions],
    ) -> None:
        """Raises: InvalidRequest: a name that cannot be sent."""
        self._do = do
        self._sender = Sender(wire, model, name, **options)
        self._turn = asyncio.Lock()

    @property
    def sequence(self) -> int:
        """Index of the next sample."""
        return self._sender.sequence

    @property
    def pending(self) -> int:
        """Samples that were not delivered yet; the next `send` begins with them."""
        return self._sender.pending

    @property
    def lost(self) -> int:
        """Samples given up because too many were pending; the server sees a gap."""
        return self._sender.lost

    async def send(self, samples: Array, time_s: float | None = None, *, end: bool = False) -> Answer:
        """As `Stream.send`. Cancelled, its samples are pending."""
        sender = self._sender
        async with self._turn:
            sender.add(samples, time_s, end=end)
            if not sender.input:
                sender.input = first_input(await self._deliver(sender.metadata))
            while (call := sender.next()) is not None:
                try:
                    sender.delivered(await self._deliver(call))
                except (Disconnected, Overloaded):
                    raise
                except ServingError:
                    sender.delivered(None)
                    raise
            return sender.collect()

    async def describe(self) -> dict[str, Any]:
        """As `Stream.describe`."""
        document: dict[str, Any] = await self._do(self._sender.describe())
        return document

    async def end(self) -> None:
        """As `Stream.end`."""
        async with self._turn:
            try:
                await self._do(self._sender.end())
            except UnknownModel:
                return

    async def _deliver(self, call: Call[Any]) -> Any:
        for _ in range(ATTEMPTS - 1):
            try:
                return await self._do(call)
            except Disconnected:
                continue
        return await self._do(call)
