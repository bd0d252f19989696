"""Which rows are looked at one by one: those that say something new, and no more than can be afforded.

Knows nothing of what the rows mean. Mutable, owned by one thread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Repetition:
    """Tells rows that say something new from those that only repeat what came before.

    For a reader whose state depends on the last `memory` rows alone: after so many equal rows a further one changes
    nothing. Before the first row it has seen nothing but zeros.
    """

    def __init__(self, memory: int, width: int) -> None:
        self._memory = memory
        self._last: NDArray[np.uint64] | None = np.zeros(width, np.uint64)
        self._repeated = memory

    def forget(self) -> None:
        """The reader's state is another one, or it did not see every new row: the next row is new."""
        self._last = None

    def news(self, rows: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which rows are new. rows: (count, width), the next ones in their order."""
        if not len(rows):
            return np.zeros(0, bool)
        begins = np.empty(len(rows), bool)
        begins[0] = self._last is None or (rows[0] != self._last).any()
        begins[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        at = np.arange(len(rows))
        repeats = at - np.maximum.accumulate(np.where(begins, at, -self._repeated))  # 0 = the first of its run
        self._last, self._repeated = rows[-1].copy(), min(int(repeats[-1]) + 1, self._memory)
        return repeats < self._memory


class Allowance:
    """Rows that may be followed: `rows_per_s` of arrival time, saved up to `at_once` and full at the beginning."""

    def __init__(self, rows_per_s: float, at_once: int) -> None:
        self._rows_per_s = rows_per_s
        self._at_once = float(at_once)
        self._credit_rows = self._at_once
        self._newest_ns = 0

    def thin(self, count: int, arrival_ns: NDArray[Any]) -> slice:
        """Every k-th of `count` rows, for a reader that takes any sample of them."""
        self._earn(arrival_ns)
        if self._credit_rows < 1.0:
            return slice(0)
        step = max(1, math.ceil(count / self._credit_rows))
        self._credit_rows -= -(-count // step)
        return slice(None, None, step)

    def newest(self, count: int, arrival_ns: NDArray[Any]) -> slice:
        """The newest of `count` rows in one piece, for a reader of what follows upon what."""
        self._earn(arrival_ns)
        rows = min(count, int(self._credit_rows))
        self._credit_rows -= rows
        return slice(count - rows, None)

    def _earn(self, arrival_ns: NDArray[Any]) -> None:
        newest_ns = int(arrival_ns.max(initial=self._newest_ns))
        earned_rows = (newest_ns - self._newest_ns) * 1e-9 * self._rows_per_s
        self._newest_ns = newest_ns
        self._credit_rows = min(self._credit_rows + earned_rows, self._at_once)
