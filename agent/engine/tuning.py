"""How many threads a model gets, decided from measured times. Pure: knows no runtime and no clock.

More threads than one pay for models that take longer than a millisecond; below that, waking the others costs more
than they do. One core is left to the rest: sockets, the agent process, the programs that ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORTH_SHARING_US = 1000.0
GAIN = 0.9  # more threads must bring the time down to this share, or they are not worth their cores


@dataclass(frozen=True, slots=True)
class Times:
    """Times of warm batch-1 runs, microseconds."""

    p50_us: float
    p95_us: float


def times(measured_us: Sequence[float]) -> Times:
    """Median and 95th percentile (nearest rank) of at least one measurement."""
    ordered = sorted(measured_us)
    return Times(ordered[(len(ordered) - 1) // 2], ordered[max(0, math.ceil(0.95 * len(ordered)) - 1)])


def candidates(alone: Times, cores: int) -> tuple[int, ...]:
    """Numbers of threads worth trying beside one. `cores`: physical ones this process may use."""
    many = cores - 1
    return (many,) if many > 1 and alone.p50_us > WORTH_SHARING_US else ()


def best(measured: Mapping[int, Times]) -> int:
    """The fewest threads whose p95 nothing with more threads clearly beats."""
    chosen = min(measured)
    for threads in sorted(measured):
        if measured[threads].p95_us < GAIN * measured[chosen].p95_us:
            chosen = threads
    return chosen
