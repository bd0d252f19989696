"""When rows came: a bounded memory from the number of a row to its times. Mutable, owned by one thread."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

EVERY: Final = 4  # rows from one mark to the next
MARKS: Final = 2048  # 8,192 rows are remembered


class Calendar:
    """Numbers the rows it is given from 0 and remembers the times of every fourth."""

    def __init__(self) -> None:
        self.rows = 0
        self._marks = np.full((MARKS, 2), np.nan)

    def add(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Two times of each of the next rows, any unit, NaN = not known. However they are cut."""
        numbers = np.arange(self.rows, self.rows + len(first))[-EVERY * MARKS :]
        marked = numbers % EVERY == 0
        places = numbers[marked] // EVERY % MARKS
        at = numbers[marked] - self.rows
        self._marks[places, 0] = first[at]
        self._marks[places, 1] = second[at]
        self.rows += len(first)

    def at(self, row: int) -> tuple[float, float]:
        """Both times of a row, at most three rows early; NaN when it is too long ago or has not come."""
        mark = row // EVERY
        newest = (self.rows - 1) // EVERY
        if row < 0 or row >= self.rows or mark <= newest - MARKS:
            return math.nan, math.nan
        first, second = self._marks[mark % MARKS].tolist()
        return first, second
