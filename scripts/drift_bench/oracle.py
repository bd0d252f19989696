"""The oracle: a CUSUM that was told the size and the sign of the shift, and that the reference is exact.

S <- max(0, S + z - size / 2), alarm at S >= h: no detector finds a shift of that size in one known feature sooner
at the same run length (Moustakides 1986). `unknown` is the same oracle without the name of the feature: one such
CUSUM per feature and sign, their alarms added up. What is left between the two is the price of looking at
2 d places at once, which every detector pays that is not told where to look.

Run length and delay are computed, not simulated: S on a grid is a Markov chain (Brook and Evans 1972).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 160
WARM_ROWS = 400
MOST_ROWS = 20_000

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Oracle:
    """`size` in sd, known; `threshold` of the CUSUM."""

    size: float
    threshold: float

    @classmethod
    def tuned(cls, size: float, run_length: float, *, places: int = 1) -> Oracle:
        """The threshold at which `places` independent such CUSUMs together run `run_length` rows to an alarm."""
        low, high = 0.1, 30.0 / size
        for _ in range(40):
            middle = (low + high) / 2
            if cls(size, middle).run_length() < places * run_length:
                low = middle
            else:
                high = middle
        return cls(size, (low + high) / 2)

    def run_length(self) -> float:
        """Mean rows to an alarm without a shift, from S = 0."""
        chain = self._chain(0.0)
        lengths = np.linalg.solve(np.eye(STATES) - chain, np.ones(STATES))
        return float(lengths[0])

    def delay(self) -> float:
        """Median rows to the alarm after a shift that comes when the CUSUM has long run without one."""
        still, shifted = self._chain(0.0), self._chain(self.size)
        state = np.zeros(STATES)
        state[0] = 1.0
        for _ in range(WARM_ROWS):
            state = state @ still
            state /= state.sum()
        before = 1.0
        for row in range(1, MOST_ROWS):
            state = state @ shifted
            alive = float(state.sum())
            if alive <= 0.5:
                return row - 1 + (before - 0.5) / (before - alive)
            before = alive
        return math.inf

    def _chain(self, shift: float) -> Array:
        """(STATES, STATES): from S in the middle of cell i to cell j below the threshold, in one row."""
        width = 2 * self.threshold / (2 * STATES - 1)  # cell 0 is half as wide and lies at 0
        steps = np.arange(-STATES, STATES + 1) * width - (shift - self.size / 2)
        edges = np.array([_normal(step + width / 2) for step in steps])  # of a step by so many cells, upwards
        cells = np.arange(STATES)[None, :] - np.arange(STATES)[:, None] + STATES
        chain: Array = edges[cells] - edges[cells - 1]
        chain[:, 0] = edges[cells[:, 0]]
        return chain


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
