"""The population stability index by its rule of thumb.

PSI is computed per feature and tumbling window against ten bins of the reference's deciles; the rule of thumb
calls .1 a moderate and .2 a significant change. Its knob here is the window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scripts.drift_bench.streams import Rows

BINS = 10
LEAST_SHARE = 1e-4


class StabilityIndex:
    """Alarms when the PSI of any feature over a window of `window` rows exceeds `limit`."""

    def __init__(self, reference: Rows, window: int, limit: float) -> None:
        shares = np.linspace(0, 1, BINS + 1)[1:-1]
        self._edges = np.nanquantile(reference.features, shares, axis=0)
        self._expected = self._shares(reference.features)
        self._window, self._limit = window, limit
        self._kept: list[NDArray[np.float64]] = []
        self._count = 0

    def first_alarm(self, rows: Rows) -> int | None:
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + self._window - self._count)
            self._kept.append(rows.features[start:stop])
            self._count += stop - start
            start = stop
            if self._count == self._window:
                index = self._index(np.concatenate(self._kept))
                self.reset()
                if index > self._limit:
                    return stop
        return None

    def reset(self) -> None:
        self._kept, self._count = [], 0

    def _index(self, window: NDArray[np.float64]) -> float:
        seen = self._shares(window)
        return float(((seen - self._expected) * np.log(seen / self._expected)).sum(axis=0).max())

    def _shares(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        columns = [
            np.bincount(np.searchsorted(self._edges[:, j], column, side="right"), minlength=BINS)
            for j, column in enumerate(features.T)
        ]
        return np.maximum(np.stack(columns, axis=1) / len(features), LEAST_SHARE)
