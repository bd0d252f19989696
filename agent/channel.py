"""Frames between agent process and worker over one Unix stream socket; both ends use this module.

A frame is a 4-byte little-endian length and a msgpack pair (name of the frame's type, its fields); the types are
those of `contract.plan`. Frames and the send queue are bounded: an end that does not read is a fault to report,
not a reason to grow. What a frame means is decided by its receiver.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

import msgspec

from agent.contract import plan
from agent.contract.errors import MalformedMessage, Overloaded

Frame = plan.ToWorker | plan.FromWorker

MAX_FRAME_BYTES = 1024 * 1024
MAX_QUEUED_BYTES = 4 * MAX_FRAME_BYTES
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind)
    for kind in (
        plan.Start, plan.Serve, plan.Prefer, plan.Consult, plan.Drain, plan.Ping,
        plan.Ready, plan.Preferred, plan.EngineTrouble, plan.Pong, plan.Drained,
        plan.Inherited,
    )
}  # fmt: skip


def encode(frame: Frame) -> bytes:
    """Length and payload of one frame.

    Raises:
        MalformedMessage: the frame is larger than MAX_FRAME_BYTES.
    """
    payload = _encoder.encode((type(frame).__name__, frame))
    if len(payload) > MAX_FRAME_BYTES:
        raise MalformedMessage(f"a {type(frame).__name__} frame of {len(payload)} bytes is over {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


def decode(payload: bytes) -> Frame:
    """One frame from its payload (without the length).

    Raises:
        MalformedMessage: no frame, an unknown type, or a field that is missing or wrong.
    """
    try:
        name, fields = _envelopes.decode(payload)
        frame: Frame = _decoders[name].decode(fields)
    except KeyError:
        raise MalformedMessage(f"a channel frame has the unknown type '{name[:40]}'") from None
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"a channel frame cannot be read: {error}") from None
    return frame


class Channel:
    """One end, on an event loop. `send` never waits; `receive` waits for the next frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._sent = 0
        self._received = 0

    @classmethod
    async def open(cls, sock: socket.socket) -> Channel:
        """Take over one end of a connected Unix stream socket."""
        return cls(*await asyncio.open_unix_connection(sock=sock))

    def send(self, frame: Frame) -> None:
        """Queue one frame.

        Raises:
            Overloaded: the other end has not read for MAX_QUEUED_BYTES.
            MalformedMessage: the frame is too large.
        """
        waiting = self._writer.transport.get_write_buffer_size()
        if waiting > MAX_QUEUED_BYTES:
            raise Overloaded(f"the channel has {waiting} unread bytes waiting", hint="The other process hangs.")
        self._writer.write(encode(frame))
        self._sent += 1

    async def receive(self) -> Frame | None:
        """The next frame; None once the other end has closed, even in the middle of a frame.

        Raises:
            MalformedMessage: what arrived is no frame; the channel cannot be used any further.
        """
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_FRAME_BYTES:
                raise MalformedMessage(f"a channel frame announces {length} bytes, over {MAX_FRAME_BYTES}")
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._received += 1
        return decode(payload)

    async def drain(self) -> None:
        """Wait until the other end has taken what was queued, or is gone."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def close(self) -> None:
        """Send what is queued, then close."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def statistics(self) -> dict[str, int]:
        """`sent`, `received` frames and `waiting_bytes` not yet taken by the other end."""
        waiting = self._writer.transport.get_write_buffer_size()
        return {"sent": self._sent, "received": self._received, "waiting_bytes": waiting}
