"""A broker that says whatever a test wants: answers are chosen per packet, also wrong ones.

Understands just enough of MQTT 5 to read CONNECT and PUBLISH. The real broker is used in tests/system.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

CONNECT, PUBLISH, DISCONNECT = 1, 3, 14


@dataclass
class Published:
    topic: str
    body: bytes
    retain: bool


def _puback(_message: Published) -> int | None:
    return 0


@dataclass
class BrokerDouble:
    """`answer` gives the PUBACK reason of a message, or None for silence."""

    connack_reason: int = 0
    maximum_packet_bytes: int = 0
    answer: Callable[[Published], int | None] = _puback
    forbids: frozenset[str] = frozenset()  # topics; over a message to one of them it hangs up
    says_why: bool = True  # ... after a PUBACK that says so, which gets lost when more is arriving meanwhile
    garbage: bytes = b""  # sent instead of the CONNACK
    port: int = 0
    connects: int = 0
    goodbyes: int = 0
    hang_ups: int = 0
    published: list[Published] = field(default_factory=list)
    unanswered_peak: int = 0
    _unanswered: int = 0
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.hang_up()
        await self._server.wait_closed()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while True:
                kind, flags, body = await self._packet(reader)
                if kind == PUBLISH and self._topic(body) in self.forbids:
                    await self._refuse(body, reader, writer)
                    return
                self._handle(kind, flags, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()  # also of one that came while the story ended

    async def _refuse(self, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As mosquitto does: closing a socket with unread bytes resets the connection and loses what was said."""
        self.hang_ups += 1
        if self.says_why and not reader._buffer:  # type: ignore[attr-defined]
            length = int.from_bytes(body[:2], "big")
            writer.write(b"\x40\x04" + body[2 + length : 4 + length] + bytes([0x87, 0]))
            await writer.drain()
        writer.close()

    @staticmethod
    def _topic(body: bytes) -> str:
        return body[2 : 2 + int.from_bytes(body[:2], "big")].decode()

    async def _packet(self, reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
        head = (await reader.readexactly(1))[0]
        length, shift = 0, 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return head >> 4, head & 0xF, await reader.readexactly(length)

    def _handle(self, kind: int, flags: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        if kind == CONNECT:
            self.connects += 1
            limit = self.maximum_packet_bytes
            properties = b"\x27" + limit.to_bytes(4, "big") if limit else b""
            payload = bytes([0, self.connack_reason, len(properties)]) + properties
            writer.write(self.garbage or bytes([0x20, len(payload)]) + payload)
        elif kind == PUBLISH:
            length = int.from_bytes(body[:2], "big")
            topic, packet_id, rest = body[2 : 2 + length], body[2 + length : 4 + length], body[4 + length :]
            message = Published(topic.decode(), rest[1 + rest[0] :], bool(flags & 1))
            self.published.append(message)
            reason = self.answer(message)
            self._unanswered += 1
            self.unanswered_peak = max(self.unanswered_peak, self._unanswered)
            if reason is not None:
                self._unanswered -= 1
                writer.write(b"\x40\x04" + packet_id + bytes([reason, 0]))
        elif kind == DISCONNECT:
            self.goodbyes += 1
