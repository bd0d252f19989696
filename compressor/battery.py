"""The standard faults, injected into rows of any view: how soon does its monitor find them, and whom does it name?

Knows nothing of the task: rows of features are changed, in units of each feature's own standard deviation at the
reference; the predicted class is left as it was. A run follows clean rows, then changed ones, for at most
`within_rows`; runs take the features in turns. A feature is named when its channel comes first in the finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.drift import DriftMonitor, Reference, drift_monitor
from compressor.reference import CLEAN_ROWS, SEED, SESSION_ROWS, ViewRows

STATIONARY_ROWS: Final = 1000  # how long a fault of a stationary stream may last until it is found
MOST_RUNS: Final = 20
SHIFTS_SD: Final = (0.25, 0.5, 1.0)
PROMISED_SHARE: Final = 0.95
GAP_ROWS: Final = 50
PIECE_ROWS: Final = 16

Floats = NDArray[np.float64]


class _Into(NamedTuple):
    """What a fault is put into: rows, the column it touches, the sd of each feature."""

    rows: ViewRows
    column: int
    sd: Floats
    generator: np.random.Generator


Fault = Callable[[_Into], ViewRows]


@dataclass(frozen=True, slots=True)
class Line:
    """One fault. found_share: found within `within_rows`; median_delay_rows: None when most runs never found it;
    named_share: of the found, None where no single feature is touched.
    """

    fault: str
    runs: int
    within_rows: int
    median_delay_rows: float | None
    found_share: float
    named_share: float | None


def measure_battery(reference: Reference, clean: ViewRows, *, runs: int) -> tuple[Line, ...]:
    """Every standard fault, at most MOST_RUNS runs each; nothing for a view that is watched only.

    clean: consecutive rows that nothing was fitted to.
    """
    monitor = drift_monitor(reference)
    if monitor is None or not len(clean):
        return ()
    runs = min(runs, MOST_RUNS)
    return tuple(_line(reference, monitor, clean, name, runs) for name in _faults(reference))


def found_share(reference: Reference, clean: ViewRows, *, size: float, runs: int = 8) -> float:
    """Share of the runs in which a shift of one feature by `size` sd (one of SHIFTS_SD) is found in time."""
    monitor = drift_monitor(reference)
    return _line(reference, monitor, clean, _shift_name(size), runs).found_share if monitor and len(clean) else 0.0


def _line(reference: Reference, monitor: DriftMonitor, clean: ViewRows, name: str, runs: int) -> Line:
    fault, single = _faults(reference)[name]
    model = reference.stationary or reference.regimes
    columns = model.columns.tolist() if model else []
    within = STATIONARY_ROWS if reference.stationary else SESSION_ROWS
    sd = reference.scale.astype(np.float64)
    generator = np.random.default_rng(SEED + 2)
    delays: list[float] = []
    named: list[bool] = []
    for run in range(runs):
        column = columns[run * len(columns) // runs]
        rows = clean[_order(clean, reference, 2 * CLEAN_ROWS + within, generator)]
        start = int(generator.integers(CLEAN_ROWS, 2 * CLEAN_ROWS))
        before, after = rows[np.arange(start)], rows[np.arange(start, start + within)]
        delay, first = _run(monitor, before, fault(_Into(after, column, sd, generator)))
        delays.append(delay)
        if single and np.isfinite(delay):
            named.append(first == _name(reference, column))
    median = float(np.median(delays))
    return Line(
        name, runs, within, median if np.isfinite(median) else None,
        float(np.mean(np.isfinite(delays))), float(np.mean(named)) if named else None,
    )  # fmt: skip


def promise(lines: Sequence[Line]) -> str:
    """The smallest shift of one feature that is promised to be found, in words."""
    if not lines:
        return "no change is promised to be found: the view is watched only"
    by_name = {line.fault: line for line in lines}
    for size in SHIFTS_SD:
        line = by_name[_shift_name(size)]
        if line.found_share >= PROMISED_SHARE:
            return (
                f"a shift of one feature by {size:g} sd is found within {line.within_rows} rows in"
                f" {line.found_share:.0%} of {line.runs} runs, median {line.median_delay_rows:.0f} rows"
            )
    return f"no shift of one feature up to {SHIFTS_SD[-1]:g} sd is promised within {lines[0].within_rows} rows"


def as_card(lines: Sequence[Line]) -> dict[str, Any]:
    return {"battery": [asdict(line) for line in lines], "promise": promise(lines)}


def _shift_name(size: float) -> str:
    return f"shift {size:g} sd, one feature"


def _faults(reference: Reference) -> Mapping[str, tuple[Fault, bool]]:
    """Name -> (fault, whether it touches one feature)."""
    made: dict[str, tuple[Fault, bool]] = {"no change": (_nothing, False)}
    made |= {_shift_name(size): (_shift(size), True) for size in SHIFTS_SD}
    made |= {
        "spread x1.5, one feature": (_spread, True),
        "relation lost, one feature": (_unrelated, True),
        "stuck, one feature": (_stuck, True),
        "shift 0.25 sd, all features": (_shift_all, False),
        f"gap of {GAP_ROWS} rows": (_gap, False),
    }
    if reference.stationary:  # a regime monitor leaves broken numbers to the guard
        made["missing in half of the rows, one feature"] = (_missing, True)
    return made


# --- faults ----------------------------------------------------------------------------------------------------
def _nothing(into: _Into) -> ViewRows:
    return into.rows


def _shift(size: float) -> Fault:
    def apply(into: _Into) -> ViewRows:
        return _changed(into.rows, into.column, into.rows.features[:, into.column] + size * into.sd[into.column])

    return apply


def _spread(into: _Into) -> ViewRows:
    own = into.rows.features[:, into.column]
    middle = np.nanmean(own) if np.isfinite(own).any() else 0.0
    return _changed(into.rows, into.column, middle + 1.5 * (own - middle))


def _unrelated(into: _Into) -> ViewRows:
    """The feature's own values, half the rows later: its law stays, who it goes with does not."""
    return _changed(into.rows, into.column, np.roll(into.rows.features[:, into.column], len(into.rows) // 2))


def _stuck(into: _Into) -> ViewRows:
    return _changed(into.rows, into.column, np.full(len(into.rows), into.rows.features[0, into.column]))


def _missing(into: _Into) -> ViewRows:
    return _changed(
        into.rows,
        into.column,
        np.where(into.generator.random(len(into.rows)) < 0.5, np.nan, into.rows.features[:, into.column]),
    )


def _shift_all(into: _Into) -> ViewRows:
    return ViewRows(into.rows.features + 0.25 * into.sd, into.rows.predicted, into.rows.recordings, into.rows.times_s)


def _gap(into: _Into) -> ViewRows:
    return into.rows[np.arange(min(GAP_ROWS, len(into.rows) - 1), len(into.rows))]


def _changed(rows: ViewRows, column: int, values: Floats) -> ViewRows:
    features = rows.features.copy()
    features[:, column] = values
    return ViewRows(features, rows.predicted, rows.recordings, rows.times_s)


# --- runs ------------------------------------------------------------------------------------------------------
def _order(clean: ViewRows, reference: Reference, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Row numbers: consecutive from a random place on, or recordings in random order; over again if too few."""
    if reference.stationary:
        return (int(generator.integers(len(clean))) + np.arange(count)) % len(clean)
    names = generator.permutation(np.unique(clean.recordings))
    order = np.concatenate([np.flatnonzero(clean.recordings == name) for name in names])
    return np.resize(order, count)


def _run(monitor: DriftMonitor, clean: ViewRows, faulty: ViewRows) -> tuple[float, str]:
    """Rows of the fault until it was found, and who was named first."""
    monitor.reset()
    if _raised(monitor, clean):
        monitor.reset()
    for start in range(0, len(faulty), PIECE_ROWS):
        piece = np.arange(start, min(start + PIECE_ROWS, len(faulty)))
        found = _raised(monitor, faulty[piece])
        if found:
            row, names = found
            return start + row + 1.0, next(iter(names), "")
    return float("inf"), ""


def _raised(monitor: DriftMonitor, rows: ViewRows) -> tuple[int, tuple[str, ...]] | None:
    """Row and names of the first finding."""
    found = monitor.follow(rows.features, rows.predicted, rows.time_or_nan())
    return next(((row, finding.channels) for row, finding in found if finding.raised), None)


def _name(reference: Reference, column: int) -> str:
    channel = int(reference.channel_of[column])
    return reference.channels[channel] if channel >= 0 else reference.features[column]
