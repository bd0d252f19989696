"""Observations of all living workers, in one sequence and with the engine numbers of the lineup that serves.

Each generation has a ring of its own: two that overlap never write to the same memory, and a lineup from which an
engine was left out keeps its own numbering. What is lost by overwriting is counted, never waited for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.plan import EnginePlan, WorkerPlan
from agent.observation import DEFAULT_SLOTS, NO_ENGINE, RECORD, RingReader, create_ring

Records = NDArray[Any]
READ_AT_ONCE = 1024  # about 10 ms of reading: the event loop has other things to do as well


@dataclass(slots=True)
class _Source:
    reader: RingReader
    descriptor: int
    plan: WorkerPlan
    engines: dict[int, NDArray[np.uint8]]  # service -> number in this generation's plan -> number in the lineup
    gaps: int = 0
    ended: bool = False


class Intake:
    """`lineups`: the engines of each service, best first. Owned by the event loop."""

    def __init__(self, lineups: Sequence[tuple[str, ...]], *, slots: int = DEFAULT_SLOTS) -> None:
        self._lineups = tuple(lineups)
        self._digests: frozenset[str] | None = None  # None: engines are known by their names alone
        self._slots = slots
        self._sources: dict[int, _Source] = {}
        self._next = 0
        self._read = 0
        self._gaps = 0

    def open(self, plan: WorkerPlan) -> int:
        """A new ring for a generation; returns the descriptor its worker inherits, which stays ours to close.

        Raises:
            OSError: there is no memory or no descriptor left; then nothing stays open.
        """
        descriptor = create_ring(self._slots)
        try:
            reader = RingReader(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._sources[plan.generation] = _Source(reader, descriptor, plan, self._maps(plan))
        return descriptor

    def renumber(self, lineups: Sequence[tuple[EnginePlan, ...]]) -> None:
        """Other engines serve from now on; what replaced ones still answer counts as answered by no engine."""
        self._lineups = tuple(tuple(plan.engine for plan in plans) for plans in lineups)
        self._digests = frozenset(plan.digest for plans in lineups for plan in plans)
        for source in self._sources.values():
            source.engines = self._maps(source.plan)

    def close(self, generation: int) -> None:
        """Its worker has ended: what it left is still read, then the ring goes."""
        self._sources[generation].ended = True

    def read(self) -> tuple[Records, int]:
        """(new records, records lost since the last call). Bounded; call again while `behind`."""
        parts: list[Records] = []
        lost = 0
        for generation, source in list(self._sources.items()):
            records = source.reader.read(READ_AT_ONCE)
            gaps = source.reader.statistics()["gaps"]
            lost += gaps - source.gaps
            source.gaps = gaps
            if len(records):
                parts.append(self._renumber(records, source))
            elif source.ended:
                self._forget(generation)
        self._gaps += lost
        return (np.concatenate(parts) if parts else np.empty(0, RECORD)), lost

    def reads_behind(self) -> int:
        """How many calls of `read` take in what waits now, and let go of the rings that have ended. Bounded."""
        behind = [min(source.reader.statistics()["behind"], self._slots) for source in self._sources.values()]
        return -(-max(behind, default=0) // READ_AT_ONCE) + 1

    def statistics(self) -> dict[str, int]:
        """`read`, `gaps` (lost by overwriting), `behind` (waiting to be read)."""
        behind = sum(source.reader.statistics()["behind"] for source in self._sources.values())
        return {"read": self._read, "gaps": self._gaps, "behind": behind, "rings": len(self._sources)}

    def close_all(self) -> None:
        for generation in list(self._sources):
            self._forget(generation)

    # --- inside ---------------------------------------------------------------------------------------------
    def _maps(self, plan: WorkerPlan) -> dict[int, NDArray[np.uint8]]:
        return {index: self._map(index, service.engines) for index, service in enumerate(plan.services)}

    def _map(self, index: int, engines: Sequence[EnginePlan]) -> NDArray[np.uint8]:
        numbers = np.full(256, NO_ENGINE, np.uint8)
        for number, plan in enumerate(engines):
            if plan.engine in self._lineups[index] and (self._digests is None or plan.digest in self._digests):
                numbers[number] = self._lineups[index].index(plan.engine)
        return numbers

    def _renumber(self, records: Records, source: _Source) -> Records:
        records["sequence"] = np.arange(self._next, self._next + len(records), dtype=np.uint64)
        self._next += len(records)
        self._read += len(records)
        for index, numbers in source.engines.items():
            ours = records["service"] == index
            for name in ("engine", "first_engine"):
                records[name][ours] = numbers[records[name][ours]]
        return records

    def _forget(self, generation: int) -> None:
        source = self._sources.pop(generation)
        source.reader.close()
        os.close(source.descriptor)
