"""Exact counts of a worker's requests, in memory it shares with the agent process.

One number per (service, engine that answered, outcome, latency bucket), and two sums; the buckets are those of
`sketch.LogSketch`. Requests, answers, errors and latencies all follow from them, so that the reader may skip records
under load and a worker may die at any moment.

Numbers here, no memory and no process: what is counted, and when, is `observation`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from agent.sketch import BUCKETS, BUCKETS_PER_E, LOWEST_US, LogSketch

NO_ENGINE = 255


class Outcome(IntEnum):
    OK = 0
    FAILED_OVER = 1  # answered, but not by the engine tried first
    FLOOR = 2  # the declared constant answered
    REFUSED_BY_GUARD = 3
    OVERLOADED = 4
    DEADLINE = 5
    ERROR = 6  # no engine could answer, or only a floor that is configured to refuse
    SHADOW = 7  # no request: what a witness says of one that was answered before


COUNTED = tuple(outcome for outcome in Outcome if outcome is not Outcome.SHADOW)
"""What becomes of requests, in the order of their numbers, which are 0 to the last."""
ANSWERED = (Outcome.OK, Outcome.FAILED_OVER, Outcome.FLOOR)
TOTAL_NS = BUCKETS  # of all latencies of a cell
MORE_ROWS = BUCKETS + 1  # rows beyond the first of each request
CELL = BUCKETS + 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Which services and engines have a place. `engines`: the most that one service has."""

    services: int
    engines: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(services, engines and one row for none, outcomes, numbers of a cell)"""
        return self.services, self.engines + 1, len(COUNTED), CELL

    @property
    def size_bytes(self) -> int:
        return 8 * math.prod(self.shape)

    def add(
        self, numbers: NDArray[np.int64], kind: tuple[int, int, int], elapsed_ns: NDArray[np.uint64], more_rows: int
    ) -> None:
        """Count requests of one kind (service, engine, outcome) into `numbers`, an array of `shape`.

        `more_rows`: beyond the first of each, of all together. Requests to a service without a place are left out; an
        engine without one counts as none. What witnesses say is no request and is left out too.
        """
        service, engine, outcome = kind
        if service >= self.services or outcome >= len(COUNTED):
            return
        cell = numbers[service, min(engine, self.engines), outcome]
        buckets = np.ceil(np.log(np.maximum(elapsed_ns * 1e-3, LOWEST_US)) * BUCKETS_PER_E).astype(np.intp)
        cell[:BUCKETS] += np.bincount(np.minimum(buckets, BUCKETS - 1), minlength=BUCKETS)
        cell[TOTAL_NS] += int(elapsed_ns.sum())
        cell[MORE_ROWS] += more_rows


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of one service. `numbers` (engines, outcomes, CELL), int64; `engines`: whose row is whose."""

    numbers: NDArray[np.int64]
    engines: Sequence[int]

    def by_outcome(self) -> list[int]:
        """Requests by outcome, in the order of COUNTED."""
        counts: list[int] = self.numbers[:, :, :BUCKETS].sum(axis=(0, 2)).tolist()
        return counts

    @property
    def rows(self) -> int:
        """Of all requests."""
        return sum(self.by_outcome()) + int(self.numbers[:, :, MORE_ROWS].sum())

    def answered(self) -> dict[int, NDArray[np.int64]]:
        """Engine -> the sum of its cells over all outcomes that are answers; engines with none are left out."""
        cells = self.numbers[:, ANSWERED, :].sum(axis=1)
        pairs = zip(self.engines, cells, strict=True)
        return {number: cell for number, cell in pairs if number != NO_ENGINE and cell.any()}


def add_latencies(sketch: LogSketch, cell: NDArray[np.int64]) -> None:
    """Take the latencies of a cell into a sketch of the default accuracy; exact but for smallest and largest."""
    sketch.add_buckets(cell[:BUCKETS], total_us=round(int(cell[TOTAL_NS]) / 1e3))
