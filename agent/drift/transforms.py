"""What is predictable of a stream is taken out before anything is bet on it: the season, then what rows owe to the
rows before them. Both were chosen per feature by the compressor; a feature may have neither.

    season   x - mean(time), divided by exp(log scale(time)): harmonics of hour of day, day of week and day of year of
             the DATA's time in seconds. A feature without one has coefficients of zero.
    lags     autoregressive residual of order <= 5. The first rows after a gap, and after a value that is missing,
             have no history; their residual is missing (NaN), never guessed.

Assumption that is handed on: what is left is a sequence whose mean, given everything before it, does not move.
Source: Box, Jenkins, Reinsel, Time Series Analysis, chapters 3 and 9.

Pure functions and one small state, owned by the monitor.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.drift.models import StationaryModel

DAY_S: Final = 86_400.0
SEASON: Final = ((DAY_S, 1), (DAY_S, 2), (7 * DAY_S, 1), (365.2425 * DAY_S, 1))  # (period in seconds, harmonic)
SEASON_TERMS: Final = 1 + 2 * len(SEASON)
MAX_ORDER: Final = 5
GAP_STEPS: Final = 1.5  # times the reference's median step of time

Floats = NDArray[np.float64]


def season_terms(time_s: NDArray[Any]) -> Floats:
    """(rows, SEASON_TERMS): 1, then cosine and sine of each of SEASON. time_s: (rows,), NaN gives NaN."""
    columns = [np.ones(len(time_s))]
    for period_s, harmonic in SEASON:
        # the phase is taken of the remainder: exact also for seconds since 1970
        angle = np.mod(time_s, period_s) * (2 * math.pi * harmonic / period_s)
        columns += [np.cos(angle), np.sin(angle)]
    return np.stack(columns, axis=1)


class Transform:
    """Rows in time order -> residuals. Mutable: remembers the last rows and when they were."""

    def __init__(self, model: StationaryModel) -> None:
        self._season = np.asarray(model.season, dtype=np.float64)
        self._season_scale = np.asarray(model.season_scale, dtype=np.float64)
        self._seasonal = bool(np.any(self._season) or np.any(self._season_scale))
        self._lags = np.asarray(model.lags, dtype=np.float64)
        self._used = self._lags != 0
        self._gap_s = model.gap_s
        self._width = len(model.columns)
        self.idle = not self._seasonal and not self._used.any()  # nothing to take out
        self.reset()

    def reset(self) -> None:
        """Forget what came before, as after a gap."""
        self._history = np.full((len(self._lags), self._width), np.nan)
        self._last_s = math.nan

    def apply(self, rows: Floats, time_s: Floats) -> Floats:
        """rows: (rows, w), not finite = missing; time_s: (rows,), NaN = not known. Returns the residuals, NaN where
        there is none. A row without a time has no season: a seasonal feature is missing there.
        """
        if self.idle:
            return rows
        flat = self._without_season(rows, time_s) if self._seasonal else rows
        if not self._used.any():
            return flat
        edges = [0, *self._gaps(time_s), len(rows)]
        pieces = []
        for start, stop in itertools.pairwise(edges):
            if start:
                self._history[:] = np.nan
            pieces.append(self._residual(flat[start:stop]))
        return np.concatenate(pieces)

    def state(self) -> dict[str, Any]:
        return {"history": self._history, "last_s": self._last_s}

    def restore(self, state: dict[str, Any]) -> None:
        self._history, self._last_s = state["history"], float(state["last_s"])

    def _without_season(self, rows: Floats, time_s: Floats) -> Floats:
        terms = season_terms(time_s)
        # a column of its own for each term: a product of matrices may differ with the number of rows
        with np.errstate(invalid="ignore"):
            flat: Floats = (rows - _weighted(terms, self._season)) / np.exp(_weighted(terms, self._season_scale))
        plain = ~(np.any(self._season, axis=0) | np.any(self._season_scale, axis=0))
        flat[:, plain] = rows[:, plain]
        return flat

    def _gaps(self, time_s: Floats) -> list[int]:
        """Rows before which time is missing. The first row's own gap clears the history at once."""
        if not self._gap_s or not len(time_s):
            return []
        steps = np.diff(time_s, prepend=self._last_s)
        self._last_s = float(time_s[-1])
        # time that runs backwards is a gap too: the rows before are not the ones these follow upon
        wide = (steps > self._gap_s) | (steps < 0)
        if wide[0]:
            self._history[:] = np.nan
        return (np.flatnonzero(wide[1:]) + 1).tolist()

    def _residual(self, flat: Floats) -> Floats:
        depth = len(self._lags)
        padded = np.concatenate([self._history, flat])
        residual = flat.copy()
        for lag in range(1, depth + 1):
            used = self._used[lag - 1]
            if used.any():
                earlier = padded[depth - lag : len(padded) - lag]
                residual -= np.where(used, self._lags[lag - 1] * earlier, 0.0)
        self._history = padded[len(padded) - depth :].copy()
        return residual


def _weighted(terms: Floats, weights: Floats) -> Floats:
    total = np.zeros((len(terms), weights.shape[1]))
    for term, weight in zip(terms.T, weights, strict=True):
        total += term[:, None] * weight
    return total
