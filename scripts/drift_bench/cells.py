"""Is the promise kept? Per kind of stream: references of their own, and the alarms of the shipped monitor after each.

Every reference is drawn anew, its stream goes on where it ended. A reference KEEPS the claim unless the alarms
contradict it: the one-sided 95 % lower bound of their rate lies above 1 / claim (bounds.py). With ROWS = 100,000 rows
and a claim of 10,000 that is the case from 16 alarms on; a monitor that alarms twice as often as it claims is caught
in four of five references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from agent.contract.errors import EdgewardenError
from scripts.drift_bench.bounds import kept, run_length, upper_mean
from scripts.drift_bench.ours import CLAIM_ROWS, make
from scripts.drift_bench.streams import Source
from scripts.drift_bench.trials import Length, false_alarms

ROWS = 100_000
DEPENDENT = ("ar0.5", "ar0.9", "season")
FIRST_SEED = 1_000


@dataclass(frozen=True, slots=True)
class Cell:
    kind: str
    d: int
    n_ref: int
    references: int

    @property
    def name(self) -> str:
        return f"{self.kind} d={self.d} n={self.n_ref}"

    @property
    def stationary(self) -> bool:
        return self.kind not in DEPENDENT


CELLS = (
    Cell("gauss", 32, 2_000, 20),
    Cell("t3", 32, 5_000, 20),
    Cell("ar0.9", 8, 5_000, 20),
    Cell("gauss", 8, 500, 5),
    Cell("gauss", 8, 2_000, 5),
    Cell("gauss", 32, 20_000, 5),
    Cell("gauss", 128, 5_000, 2),
    Cell("t3", 8, 2_000, 5),
    Cell("lognormal", 8, 2_000, 5),
    Cell("lognormal", 32, 5_000, 5),
    Cell("correlated", 32, 5_000, 5),
    Cell("categorical", 32, 5_000, 5),
    Cell("gaps", 32, 5_000, 5),
    Cell("ar0.5", 8, 2_000, 5),
    Cell("ar0.5", 32, 5_000, 5),
    Cell("ar0.9", 32, 5_000, 5),
    Cell("season", 8, 5_000, 5),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reference led to. `refused`: why there is no monitor, "" when there is one."""

    cell: Cell
    seed: int
    length: Length
    refused: str = ""


def run_one(cell: Cell, seed: int, rows: int) -> Outcome:
    source = Source(cell.kind, cell.d, FIRST_SEED + seed)
    try:
        detector = make(source.take(cell.n_ref))
    except EdgewardenError as error:
        return Outcome(cell, seed, Length(0, 0), str(error))
    return Outcome(cell, seed, false_alarms(detector, source, rows))


def run_all(
    cells: Sequence[Cell], rows: int, share: float, processes: int, done: Callable[[int, int], None]
) -> list[Outcome]:
    """Every cell with `share` of its references, at least one; the dearest first, so that the end is short."""
    tasks = [(cell, seed) for cell in cells for seed in range(max(1, round(share * cell.references)))]
    tasks.sort(key=lambda task: -task[0].d)
    outcomes = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = [pool.submit(run_one, cell, seed, rows) for cell, seed in tasks]
        for future in as_completed(futures):
            outcomes.append(future.result())
            done(len(outcomes), len(tasks))
    return sorted(outcomes, key=lambda one: (cells.index(one.cell), one.seed))


def summary(outcomes: Sequence[Outcome], claim_rows: float = CLAIM_ROWS) -> dict[str, Any]:
    """The section `claim` and its details."""
    measured = [one for one in outcomes if not one.refused]
    stationary = [one for one in measured if one.cell.stationary]
    cells = {
        cell.name: _line([one for one in outcomes if one.cell == cell], claim_rows)
        for cell in dict.fromkeys(one.cell for one in outcomes)
    }
    dependent = [one.cell.name for one in measured if not one.cell.stationary]
    return {
        "claim": {
            "share_kept": round(sum(_kept(one, claim_rows) for one in stationary) / len(stationary), 4)
            if stationary
            else None,
            "ar_worst_ratio": min(cells[name]["ratio"] for name in dependent) if dependent else None,
        },
        "details": {"claim_rows": claim_rows, "references": len(measured), "cells": cells},
    }


def _kept(one: Outcome, claim_rows: float) -> bool:
    return kept(one.length.alarms, one.length.rows, claim_rows)


def _line(outcomes: Sequence[Outcome], claim_rows: float) -> dict[str, Any]:
    """ratio: actual over claimed run length; `ratio_text` starts with ">" where no alarm came and it is a bound."""
    measured = [one for one in outcomes if not one.refused]
    refused = sorted({one.refused for one in outcomes if one.refused})
    rows, alarms = sum(one.length.rows for one in measured), sum(one.length.alarms for one in measured)
    if not rows:
        return {"references": 0, "refused": refused, "ratio": None}
    length, bound = run_length(alarms, rows)
    return {
        "references": len(measured), "rows": rows, "alarms": alarms,
        "kept": round(sum(_kept(one, claim_rows) for one in measured) / len(measured), 4),
        "most_alarms": max(one.length.alarms for one in measured),
        "ratio": round(length / claim_rows, 3),
        "ratio_text": f"{'> ' if bound else ''}{length / claim_rows:.3g}",
        "ratio_lower_95": round(rows / upper_mean(alarms) / claim_rows, 3),
        **({"refused": refused} if refused else {}),
    }  # fmt: skip
