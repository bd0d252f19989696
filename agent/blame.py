"""Whose fault it is that a run gave nothing: its engine's, or its request's.

A client can ask, in good form, for what no model can answer: an index outside a table, axes that do not go together,
numbers so large that they overflow. If that counted against the engine, one client's mistake would have it benched
for everybody. So a run that raised, or gave NaN, needs a witness to count (`attempt` asks in this order):

- another model of the chain answered the same request;
- the engine does not answer the request either that it was warmed with, its first golden input;
- it has answered nobody since a request with other numbers failed: it fails at whatever it is asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agent import clock
from agent.contract.errors import EngineFailed
from agent.contract.plan import TensorPlan
from agent.contract.tensors import Array
from agent.engine import Engine
from agent.watchdog import Watch


@dataclass(frozen=True, slots=True)
class Doubt:
    """A failure without a witness: of which engine, at which request, with which content."""

    engine: int
    arrival_ns: int
    content: int

    def confirmed(self, before: Doubt | None, answered_ns: int) -> bool:
        """Whether `before` speaks against the engine too. `answered_ns`: when the newest finished request came."""
        return (
            before is not None
            and before.engine == self.engine
            and before.content != self.content
            and answered_ns <= before.arrival_ns
        )


def content_of(feeds: Mapping[str, Array]) -> int:
    """A checksum of shapes and numbers."""
    checksum = 0
    for name, array in sorted(feeds.items()):
        checksum = zlib.crc32(f"{name}{array.shape}".encode(), checksum)
        raw = repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
        checksum = zlib.crc32(raw, checksum)
    return checksum


def disagreement(inputs: Sequence[TensorPlan], feeds: Mapping[str, Array]) -> str:
    """Which inputs of free length have different numbers of rows; empty = none. Some models take such requests."""
    rows = [(tensor.name, len(feeds[tensor.name])) for tensor in inputs if tensor.shape[:1] == (-1,)]
    other = next((one for one in rows if one[1] != rows[0][1]), None)
    if other is None:
        return ""
    (first, ours), (second, theirs) = rows[0], other
    return f"input '{first}' has {ours} rows and input '{second}' has {theirs}"


def still_answers(engine: Engine, watch: Watch, limit_ns: int) -> bool:
    """Whether an engine answers what it was warmed with. True as well when it had no time to show it."""
    if engine.example is None:
        return False
    try:
        answer = watch.run(engine, engine.example, limit_ns)
    except EngineFailed:
        return clock.monotonic_ns() > limit_ns
    return all(np.isfinite(array).all() for array in answer.values() if array.dtype.kind == "f")
