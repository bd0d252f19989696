"""The parts of the bench: each measures something on its own and gives back sections of the document."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.drift_bench import cells, cost, delays, harm, merging, real, wrist

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where things are kept and made, how much of everything, and where progress is told."""

    build: Path
    scratch: Path
    quick: bool
    say: Callable[[str], None]

    def done(self, what: str) -> Callable[[int, int], None]:
        """Tells progress about every eighth."""

        def tell(count: int, total: int) -> None:
            if count * 8 // total != (count - 1) * 8 // total:
                filled = count * 24 // total
                self.say(f"    [{'#' * filled}{'.' * (24 - filled)}] {count} of {total} {what}")

        return tell

    def note(self, text: str) -> None:
        if "epoch" not in text:
            self.say(f"    {text}")


def claim(bench: Bench) -> Found:
    rows, share = (20_000, 0.1) if bench.quick else (cells.ROWS, 1.0)
    chosen = cells.CELLS[:3] if bench.quick else cells.CELLS
    outcomes = cells.run_all(chosen, rows, share, os.cpu_count() or 1, bench.done("references"))
    return cells.summary(outcomes)


def delay(bench: Bench) -> Found:
    return delays.ours(bench.build, delays.QUICK if bench.quick else delays.FULL, bench.note)


def peers(bench: Bench) -> Found:
    return delays.peers(bench.build, delays.QUICK if bench.quick else delays.FULL, bench.note)


def costs(bench: Bench) -> Found:
    return cost.measure(bench.build, bench.note, rounds=3 if bench.quick else cost.ROUNDS, quick=bench.quick)


def wrists(bench: Bench) -> Found:
    if bench.quick:
        return wrist.measure(bench.build, bench.scratch, bench.note, folds=wrist.FOLDS[:1], count=4, runs=2)
    return wrist.measure(bench.build, bench.scratch, bench.note)


def switches(bench: Bench) -> Found:
    folds, runs = (wrist.FOLDS[:1], 2) if bench.quick else (wrist.FOLDS, harm.RUNS)
    devices = [
        harm.open_device(fold, bench.build / "cache", bench.scratch / f"device-{fold[0]}", bench.note)
        for fold in folds
    ]
    return harm.measure_switches(devices, runs, bench.note)


def merge(bench: Bench) -> Found:
    fold = wrist.open_fold(wrist.FOLDS[0], bench.build / "cache", bench.scratch / "merge", bench.note)
    found = merging.bit_equal(fold.reference, fold.clean, 10 if bench.quick else merging.TRIALS)
    return {"merge": {"bit_equal": found["equal"] == found["trials"]}, "details": found}


def employment(bench: Bench) -> Found:
    return real.employment(bench.build, bench.note, rows=20_000 if bench.quick else None)


def shuttle(bench: Bench) -> Found:
    return real.shuttle(bench.build, bench.note)


def digits(bench: Bench) -> Found:
    return real.digits(bench.build, bench.note)


PARTS: Mapping[str, tuple[Callable[[Bench], Found], float]] = {
    "claim": (claim, 240.0),
    "delay": (delay, 120.0),
    "cost": (costs, 150.0),
    "wrist": (wrists, 240.0),
    "switches": (switches, 420.0),
    "merge": (merge, 10.0),
    "employment": (employment, 60.0),
    "shuttle": (shuttle, 15.0),
    "digits": (digits, 15.0),
    "peers": (peers, 1_800.0),
}
"""Part -> what measures it, and about how many seconds that takes in full on two idle cores."""
QUICK = ("claim", "delay", "cost", "wrist", "merge", "employment", "digits")
QUICK_SHARE = 0.12
