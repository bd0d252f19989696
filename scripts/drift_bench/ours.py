"""Our monitors as the bench runs them: the shipped code over rows, reset after each alarm."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from agent.drift import Claim, DriftMonitor, Finding, GuardStatistics, Reference, drift_monitor
from compressor.reference import ViewRows
from scripts.drift_bench.streams import Rows
from scripts.drift_bench.trials import Detector

PIECE_ROWS = 64
CLAIM_ROWS = 10_000


class Ours:
    """A monitor as a detector of trials; `predicted` is unknown unless given."""

    def __init__(self, monitor: DriftMonitor) -> None:
        self.monitor = monitor

    def first_alarm(self, rows: Rows) -> int | None:
        found = self.first_finding(rows.features, np.full(len(rows), -1), rows.times_s)
        return None if found is None else found[0]

    def first_finding(
        self, features: NDArray[np.float64], predicted: NDArray[np.int64], times_s: NDArray[np.float64]
    ) -> tuple[int, Finding] | None:
        """Rows taken when it alarmed, and what it said. The rest of the piece it came in is followed too: reset."""
        for start in range(0, len(features), PIECE_ROWS):
            piece = slice(start, start + PIECE_ROWS)
            for row, finding in self.monitor.follow(features[piece], predicted[piece], times_s[piece]):
                if finding.raised:
                    return start + row + 1, finding
        return None

    def reset(self) -> None:
        self.monitor.reset()


def watching(reference: Reference) -> Ours:
    """Raises: ValueError: the reference is watched only."""
    monitor = drift_monitor(reference)
    if monitor is None:
        raise ValueError("this reference never raises: its view is watched only")
    return Ours(monitor)


def alarms(reference: Reference, rows: ViewRows) -> list[int]:
    """Row numbers at which a fresh monitor raises; it is reset after each alarm."""
    ours, raised, start = watching(reference), [], 0
    while (found := _first(ours, rows, start)) is not None:
        start += found[0]
        raised.append(start - 1)
        ours.reset()
    return raised


def first_alarm(reference: Reference, before: ViewRows, after: ViewRows) -> tuple[int, Finding] | None:
    """The first alarm in `after` of a monitor that has seen `before`: rows of `after` until then, and what it said.

    A false alarm in `before` resets the monitor.
    """
    ours, start = watching(reference), 0
    while (found := _first(ours, before, start)) is not None:
        start += found[0]
        ours.reset()
    return _first(ours, after, 0)


def _first(ours: Ours, rows: ViewRows, start: int) -> tuple[int, Finding] | None:
    left = rows.features[start:]
    return ours.first_finding(left, rows.predicted[start:], np.full(len(left), np.nan))


def stationary_reference(rows: Rows, *, claim_rows: int = CLAIM_ROWS, tolerance_sd: float | None = None) -> Reference:
    """A reference of a view without channels or classes, for the stationary monitor.

    Raises: ReferenceRefused: the rows cannot carry one.
    """
    from compressor.stationary import ThinReference, fit_stationary

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinReference)  # what a short one cannot see is what is measured
        model = fit_stationary(rows.features, rows.times_s, claim_rows=claim_rows, tolerance_sd=tolerance_sd)
    names = tuple(f"f{number}" for number in range(rows.features.shape[1]))
    return Reference(
        features=names, channels=names, groups=dict.fromkeys(names, "view"), labels=("any",),
        channel_of=np.arange(len(names), dtype=np.int16),
        centre=np.nanmean(rows.features, axis=0).astype(np.float32),
        scale=np.maximum(np.nanstd(rows.features, axis=0), 1e-6).astype(np.float32),
        class_share=np.ones(1, np.float32), rows=len(rows), guard=GuardStatistics({}, {}, {}),
        claim=Claim(claim_rows, 0, 0, 0, 0, 0.95, f"at most one alarm per {claim_rows} rows"),
        stationary=model,
    )  # fmt: skip


def make(rows: Rows, claim_rows: int = CLAIM_ROWS) -> Detector:
    return watching(stationary_reference(rows, claim_rows=claim_rows))
