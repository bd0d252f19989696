"""Runs of a detector over generated streams: how long until a false alarm, how long until a true one. Needs numpy
alone: the peers' environments import it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, process_time_ns
from typing import Any, Protocol

import numpy as np

from scripts.drift_bench.streams import CASES, Case, Rows, Source

WARM_ROWS = 256  # before a change; an alarm in them counts for nothing, the detector is reset
PIECE_ROWS = 256
CAP_ROWS = 8_000  # a change not found by then is not found
ENOUGH_ALARMS = 30


class Detector(Protocol):
    """Follows one stream of rows. What it needs of the reference it was given before."""

    def first_alarm(self, rows: Rows) -> int | None:
        """Take rows up to the first alarm or the end; rows taken when it came (from 1), None = none came."""

    def reset(self) -> None: ...


Make = Callable[[Rows], Detector]
"""From a reference to a detector."""


@dataclass(frozen=True, slots=True)
class Length:
    """`alarms` in `rows` rows without a change; `finished`: False = the time was over first."""

    rows: int
    alarms: int
    finished: bool = True


def false_alarms(
    detector: Detector, source: Source, rows: int, *, until: Callable[[], bool] = lambda: False
) -> Length:
    """Alarms in `rows` rows of the unchanged stream, reset after each."""
    detector.reset()
    seen = alarms = 0
    while seen < rows:
        if until():
            return Length(seen, alarms, finished=False)
        piece = source.take(min(PIECE_ROWS, rows - seen))
        seen += len(piece)
        alarms += _all_alarms(detector, piece)
    return Length(seen, alarms)


def delay(detector: Detector, source: Source, case: Case, generator: np.random.Generator) -> float:
    """Rows from the change to the alarm, inf when CAP_ROWS were not enough."""
    detector.reset()
    _all_alarms(detector, source.take(WARM_ROWS))
    change = case.make(source.d, generator)
    seen = 0
    while seen < CAP_ROWS:
        piece = source.take(PIECE_ROWS, change)
        found = detector.first_alarm(piece)
        if found is not None:
            return float(seen + found)
        seen += len(piece)
    return math.inf


def _all_alarms(detector: Detector, piece: Rows) -> int:
    alarms = 0
    while len(piece):
        found = detector.first_alarm(piece)
        if found is None:
            break
        alarms += 1
        detector.reset()
        piece = piece[found:]
    return alarms


def delays(
    make: Make, cases: Sequence[str], *, d: int, n_ref: int, references: int, runs: int,
    until: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:  # fmt: skip
    """Case -> delays of `references` x `runs` runs, fewer when the time is over. All see the same rows."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for seed in range(references):
        made: dict[str, tuple[Detector, Source]] = {}
        for number, name in enumerate(cases):
            case = CASES[name]
            if case.kind not in made:
                source = Source(case.kind, d, seed)
                made[case.kind] = (make(source.take(n_ref)), source)
            detector, source = made[case.kind]
            for run in range(runs):
                if until():
                    return found
                generator = np.random.default_rng([seed, run, number])
                found[name].append(delay(detector, source.fork(1 + run), case, generator))
    return found


def timed_us(detector: Detector, rows: Rows, batch: int) -> float:
    """CPU microseconds a row, of this process, rows given `batch` at a time; alarms do not stop it."""
    began_ns = process_time_ns()
    for start in range(0, len(rows), batch):
        piece = rows[start : start + batch]
        while len(piece):
            found = detector.first_alarm(piece)
            piece = piece[found:] if found is not None else piece[:0]
    return (process_time_ns() - began_ns) / 1e3 / len(rows)


class Deadline:
    """True once its seconds are over."""

    def __init__(self, seconds: float) -> None:
        self._end_s = monotonic() + seconds

    def __call__(self) -> bool:
        return monotonic() > self._end_s


@dataclass(frozen=True, slots=True)
class Tuned:
    """A knob and the run length it really gives. `why`: "" or why the wanted one is out of reach."""

    knob: float
    length: Length
    why: str = ""


def tune(
    measure: Callable[[float], Length], tight: float, loose: float, wanted_rows: float, *, steps: int = 6,
    within: float = 1.4, until: Callable[[], bool] = lambda: False,
) -> Tuned:  # fmt: skip
    """Look for the knob between `tight` (long runs) and `loose` (short ones) whose run length is `wanted_rows`.

    By bisection of the knob's logarithm; `within`: near enough, as a factor. The best one seen is returned.
    """
    tried: list[tuple[float, Length]] = []

    def run_length(knob: float) -> float:
        length = measure(knob)
        tried.append((knob, length))
        return length.rows / max(length.alarms, 0.5)

    def best(why: str = "") -> Tuned:
        # nearest in ratio; without an alarm a run length is at least what was seen
        knob, length = min(tried, key=lambda one: abs(math.log(one[1].rows / max(one[1].alarms, 0.5) / wanted_rows)))
        return Tuned(knob, length, why)

    longest = run_length(tight)
    if longest < wanted_rows / within:
        return best(f"its longest run length is about {longest:.0f} rows")
    for _ in range(steps):
        if until():
            return best("its time was over")
        middle = math.sqrt(tight * loose)
        found = run_length(middle)
        if wanted_rows / within <= found <= wanted_rows * within:
            return best()
        tight, loose = (middle, loose) if found > wanted_rows else (tight, middle)
    reached = best()
    ratio = reached.length.rows / max(reached.length.alarms, 0.5) / wanted_rows
    return reached if 1 / within**2 <= ratio <= within**2 else best("no setting between its ends reaches it")


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Case -> median, 90 % quantile and runs; None where half or a tenth of the runs found nothing."""
    lines = {}
    for name, values in found.items():
        if not values:
            lines[name] = {"runs": 0, "median": None, "p90": None}
            continue
        ordered = np.sort(values)
        median, p90 = (float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in (0.5, 0.9))
        lines[name] = {
            "runs": len(values), "median": median if math.isfinite(median) else None,
            "p90": p90 if math.isfinite(p90) else None,
        }  # fmt: skip
    return lines
