"""Stationary streams that are cheap to make, and references of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from agent.drift import Claim, Finding, GuardStatistics, Reference, StationaryMonitor
from agent.drift.models import StationaryModel
from compressor.stationary import ThinReference, fit_stationary

NAMES = ("flow", "heat", "tilt", "load")


def gaussian(rows: int, *, seed: int, width: int = len(NAMES)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width))


def autoregressive(rows: int, *, seed: int, phi: float = 0.9, width: int = len(NAMES)) -> np.ndarray:
    noise = gaussian(rows + 200, seed=seed, width=width) * np.sqrt(1 - phi * phi)
    x = np.zeros_like(noise)
    for t in range(1, len(x)):
        x[t] = phi * x[t - 1] + noise[t]
    return x[200:]


def fit(
    rows: np.ndarray, times_s: np.ndarray | None = None, *, claim_rows: float = 10_000, **about: Any
) -> StationaryModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinReference)
        return fit_stationary(rows, times_s, claim_rows=claim_rows, **about)


def reference_of(model: StationaryModel, *, width: int = len(NAMES), **changes: Any) -> Reference:
    names = NAMES[:width] + tuple(f"more{n}" for n in range(width - len(NAMES)))
    about: dict[str, Any] = {
        "features": names, "channels": (), "groups": {}, "labels": ("x",), "channel_of": np.full(width, -1, np.int16),
        "centre": np.zeros(width, np.float32), "scale": np.ones(width, np.float32),
        "class_share": np.ones(1, np.float32), "rows": 2000, "guard": GuardStatistics({}, {}, {}),
        "claim": Claim(0, 0, 0, 0, 0, 0.95, ""), "stationary": model,
    }  # fmt: skip
    return Reference(**{**about, **changes})


def feed(
    monitor: StationaryMonitor,
    rows: np.ndarray,
    predicted: np.ndarray | None = None,
    time_s: np.ndarray | None = None,
) -> list[tuple[int, Finding]]:
    labels = np.full(len(rows), -1) if predicted is None else predicted
    return monitor.follow(rows, labels, np.full(len(rows), np.nan) if time_s is None else time_s)
