"""A worker's services behind connections without sockets: bytes in, bytes out, records to compare."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import numpy as np

from agent.contract.plan import ServicePlan
from agent.contract.tensors import HEADER_LENGTH
from agent.frontend.openinference import OpenInference
from agent.frontend.server import Connection, Server
from agent.lineup import load_lineup
from agent.observation import RingReader, RingWriter, create_ring
from agent.serving import Service, Serving
from tests.models import LENGTH

TIMES = ("sequence", "arrival_ns", "latency_us", "queue_us")


class Wire:
    """The transport of one connection; `sent` is what the client gets, `closed` whether it ended."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.sent += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        """The other half stays open."""

    pause_reading = resume_reading = write_eof

    def get_extra_info(self, _: str) -> None:
        return None


class Side:
    """One serving with its ring; `cached`: whether requests seen twice skip the parser."""

    def __init__(
        self, plan: ServicePlan, *, cached: bool, inline_us: float = 1e9, stuck_after_s: float = 5.0
    ) -> None:
        self._descriptor = create_ring()
        self._writer, self.ring = RingWriter(self._descriptor), RingReader(self._descriptor)
        self.service = Service(0, plan, load_lineup(plan)[0])
        self.serving = Serving(
            [self.service], self._writer, stuck_after_s=stuck_after_s, on_unstoppable=lambda: None,
            inline_us=inline_us,
        )  # fmt: skip
        handler = OpenInference(self.serving)
        self.server = Server(handler.handle, make_plan=handler.plan if cached else None, max_body_bytes=100_000)

    def connect(self) -> tuple[Connection, Wire]:
        wire, connection = Wire(), Connection(self.server)
        connection.connection_made(wire)  # type: ignore[arg-type]
        return connection, wire

    def exchange(self, pieces: list[bytes]) -> tuple[bytes, bool]:
        """What a new connection answers to these pieces, and whether it closed."""
        connection, wire = self.connect()
        for piece in pieces:
            if not wire.closed and piece:
                with np.errstate(
                    invalid="ignore", over="ignore"
                ):  # as the worker has it: `express.expect_any_number`
                    connection.data_received(piece)
        connection.connection_lost(None)
        return wire.sent, wire.closed

    def records(self) -> list[dict[str, Any]]:
        """What was observed since the last call, but for times; numbers as text, so that NaN equals NaN."""
        read = self.ring.read()
        return [
            {name: repr(record[name].tolist()) for name in read.dtype.names or () if name not in TIMES}
            for record in read
        ]

    def close(self) -> None:
        self.serving.close()
        self._writer.close()
        self.ring.close()
        os.close(self._descriptor)


def message(x: np.ndarray, *, path: str = "/v2/models/wrist/infer", headers: str = "", **document: Any) -> bytes:
    """A binary request; `document`: more members of its JSON."""
    data = x.astype("<f4").tobytes()
    tensor = {
        "name": "window", "datatype": "FP32", "shape": [len(x), LENGTH, 3],
        "parameters": {"binary_data_size": len(data)},
    }  # fmt: skip
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}} | document
    head = json.dumps(document).encode()
    lines = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}{HEADER_LENGTH}: {len(head)}\r\n"
        f"Content-Length: {len(head) + len(data)}\r\n\r\n"
    )
    return lines.encode() + head + data


def agree(sides: tuple[Side, Side], pieces: list[bytes]) -> None:
    """The same answers byte by byte, and the same observations."""

    async def both() -> None:
        cached, strict = (side.exchange(pieces) for side in sides)
        observed, expected = (side.records() for side in sides)
        assert cached == strict
        assert observed == expected

    asyncio.run(both())
