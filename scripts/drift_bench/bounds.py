"""What a count of alarms says about a rate, exactly. Needs the standard library alone.

Alarms of a monitor that starts anew after each one are counted as a Poisson process: near enough for a run
length that is long against the monitor's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

CONFIDENCE = 0.95


def at_most(count: int, mean: float) -> float:
    """P(N <= count) of a Poisson N."""
    if count < 0:
        return 0.0
    term = total = math.exp(-mean)
    for number in range(1, count + 1):
        term *= mean / number
        total += term
    return min(1.0, total)


def upper_mean(count: int, confidence: float = CONFIDENCE) -> float:
    """One-sided upper bound: the mean under which `count` or fewer had probability 1 - confidence."""
    return _solve(lambda mean: at_most(count, mean) - (1 - confidence), count)


def lower_mean(count: int, confidence: float = CONFIDENCE) -> float:
    """One-sided lower bound: the mean under which `count` or more had probability 1 - confidence; 0 for none."""
    return _solve(lambda mean: confidence - at_most(count - 1, mean), count, falling=False) if count else 0.0


def kept(alarms: int, rows: int, claim_rows: float) -> bool:
    """Whether `alarms` in `rows` rows do not contradict at most one per `claim_rows`."""
    return lower_mean(alarms) <= rows / claim_rows


def run_length(alarms: int, rows: int) -> tuple[float, bool]:
    """Rows per alarm, and whether that is a lower bound only: without an alarm, the 95 % one."""
    return (rows / alarms, False) if alarms else (rows / upper_mean(0), True)


def _solve(function: Callable[[float], float], count: int, *, falling: bool = True) -> float:
    """The root of a monotone function of the mean, by bisection."""
    low, high = 0.0, 10.0 + 3.0 * count
    for _ in range(200):
        middle = (low + high) / 2
        if (function(middle) > 0) == falling:
            low = middle
        else:
            high = middle
    return (low + high) / 2
