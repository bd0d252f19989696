"""Histograms of the reference rows as the device's monitor looks at them: what an explanation compares with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.drift.explanation import histograms
from agent.drift.models import RegimeModel, StationaryModel
from agent.drift.reference import Reference
from agent.drift.regimes import ClassUsual
from agent.drift.transforms import Transform

MOST = 65_535  # of a relative count


def with_bins(
    reference: Reference, rows: NDArray[Any], predicted: NDArray[Any], times_s: NDArray[Any] | None = None
) -> Reference:
    """The same reference with `bins`, unchanged when its view is watched only.

    rows: (n, features of the view), the reference rows in time order; predicted: (n,), -1 = unknown; times_s: (n,)
    seconds of the data, None = not known.
    """
    if reference.regimes:
        return replace(reference, bins=_relative(_of_regimes(reference.regimes, rows, predicted)))
    if reference.stationary:
        time_s = np.full(len(rows), np.nan) if times_s is None else np.asarray(times_s, dtype=np.float64)
        return replace(reference, bins=_relative(_of_stationary(reference.stationary, rows, time_s)))
    return reference


def _of_regimes(model: RegimeModel, rows: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.int64]:
    return histograms(ClassUsual(model).standardised(np.asarray(rows, np.float64)[:, model.columns], predicted))


def _of_stationary(model: StationaryModel, rows: NDArray[Any], time_s: NDArray[Any]) -> NDArray[np.int64]:
    x = np.asarray(rows, np.float64)[:, model.columns]
    residual = Transform(model).apply(np.where(np.isfinite(x), x, np.nan), time_s)
    return histograms((residual - model.centre) / model.scale)


def _relative(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    largest = int(counts.max(initial=0))
    fitting = counts if largest <= MOST else np.ceil(counts * (MOST / largest))
    return fitting.astype(np.uint16)
