"""Observations of all living workers, in one sequence and with the engine numbers of the lineup that serves.

Each generation has a ring of its own: two that overlap never write to the same memory, and a lineup from which an
engine was left out keeps its own numbering. What is lost by overwriting is counted, never waited for.

Not every record need be read: above RECORDS_PER_S the oldest are left out, counted, so that a busy worker does not
make the agent process busy. What must be exact, requests by outcome and their latencies, comes from the tally.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.plan import EnginePlan, WorkerPlan
from agent.observation import DEFAULT_SLOTS, NO_ENGINE, RECORD, Layout, RingReader, create_ring
from agent.tally import Tally

Records = NDArray[Any]
READ_AT_ONCE = 1024  # about 10 ms of reading: the event loop has other things to do as well
RECORDS_PER_S = 1000.0
"""What is read at most, over time: as many as the monitors follow one by one (`monitor.DRIFT_ROWS_PER_S`). A worker
can write fifty times as many."""
SAVED_RECORDS = 8192  # after a pause: eight seconds' worth


@dataclass(slots=True)
class _Source:
    reader: RingReader
    descriptor: int
    plan: WorkerPlan
    engines: dict[int, NDArray[np.uint8]]  # service -> number in this generation's plan -> number in the lineup
    gaps: int = 0
    skipped: int = 0
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
        self._skipped = 0
        self._credit_records = float(SAVED_RECORDS)
        self._credit_ns: int | None = None
        self._tallies: list[tuple[int, Tally]] = []

    def open(self, plan: WorkerPlan) -> int:
        """A new ring for a generation; returns the descriptor its worker inherits, which stays ours to close.

        Raises:
            OSError: there is no memory or no descriptor left; then nothing stays open.
        """
        layout = Layout(len(plan.services), max((len(service.engines) for service in plan.services), default=1))
        descriptor = create_ring(self._slots, layout=layout)
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

    def read(self, now_ns: int | None = None) -> tuple[Records, int]:
        """(new records, records lost or left out since the last call). Bounded; call again while `in_arrears`.

        `now_ns`: monotonic; what may be read depends on it. None: as if no time had passed.
        """
        self._earn(now_ns)
        parts: list[Records] = []
        lost = 0
        for generation, source in list(self._sources.items()):
            source.reader.skip(int(self._credit_records))
            records = source.reader.read(READ_AT_ONCE)
            self._credit_records -= len(records)
            lost += self._count_lost(source)
            self._take_tally(source)
            if len(records):
                parts.append(self._renumber(records, source))
            elif source.ended:
                self._forget(generation)
        return (np.concatenate(parts) if parts else np.empty(0, RECORD)), lost

    def take_tallies(self) -> list[tuple[int, Tally]]:
        """(service, what was counted) up to the last `read`, with the engine numbers of the lineup."""
        tallies, self._tallies = self._tallies, []
        return tallies

    @property
    def in_arrears(self) -> bool:
        """Whether a call of `read` now would take in a whole lot of records.

        Fewer wait for the next beat: read as soon as they come, a busy worker's records come a handful at a time, and
        a call takes 1 ms even for one.
        """
        waiting = max((source.reader.statistics()["behind"] for source in self._sources.values()), default=0)
        return waiting >= READ_AT_ONCE and self._credit_records >= READ_AT_ONCE

    def reads_behind(self) -> int:
        """How many calls of `read` take in what waits now, and let go of the rings that have ended. Bounded."""
        behind = [min(source.reader.statistics()["behind"], self._slots) for source in self._sources.values()]
        return -(-max(behind, default=0) // READ_AT_ONCE) + 1

    def statistics(self) -> dict[str, int]:
        """`read`, `gaps` (lost by overwriting), `skipped` (left out, too many), `behind` (waiting to be read)."""
        behind = sum(source.reader.statistics()["behind"] for source in self._sources.values())
        return {
            "read": self._read, "gaps": self._gaps, "skipped": self._skipped, "behind": behind,
            "rings": len(self._sources),
        }  # fmt: skip

    def close_all(self) -> None:
        for generation in list(self._sources):
            self._forget(generation)

    # --- inside ---------------------------------------------------------------------------------------------
    def _earn(self, now_ns: int | None) -> None:
        if now_ns is None:
            return
        earned = 0.0 if self._credit_ns is None else (now_ns - self._credit_ns) * 1e-9 * RECORDS_PER_S
        self._credit_ns = now_ns
        self._credit_records = min(self._credit_records + earned, SAVED_RECORDS)

    def _count_lost(self, source: _Source) -> int:
        numbers = source.reader.statistics()
        gaps, skipped = numbers["gaps"] - source.gaps, numbers["skipped"] - source.skipped
        source.gaps, source.skipped = numbers["gaps"], numbers["skipped"]
        self._gaps += gaps
        self._skipped += skipped
        return gaps + skipped

    def _take_tally(self, source: _Source) -> None:
        news = source.reader.take(ended=source.ended)
        if news is None:
            return
        places = source.reader.layout.engines
        for service in source.engines:
            engines = (*source.engines[service][:places].tolist(), NO_ENGINE)
            self._tallies.append((service, Tally(news[service], engines)))

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
