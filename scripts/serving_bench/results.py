"""What a run found: goals, table, comparison. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """`limit`: the most (`at_least` False) or the least allowed."""

    section: str
    key: str
    limit: float
    at_least: bool
    text: str

    def met(self, value: float | None) -> bool | None:
        if value is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


GOALS = (
    Goal("ratios", "inprocess_over_bare", 0.95, False, "in-process request over bare session.run, MLP, CPU"),
    Goal("ratios", "monitoring_over_bare", 0.15, False, "what monitoring adds over bare session.run, CPU"),
    Goal("ratios", "uds_over_floor", 1.5, False, "Unix socket, pinned, over C echo + bound run"),
    Goal("ratios", "cpu_over_fastapi", 0.2, False, "CPU per request over FastAPI's, 16 connections, JSON"),
    Goal("ratios", "rps_over_fastapi", 5, True, "requests/s over FastAPI's, 16 connections, JSON"),
    Goal("ratios", "rps_over_mlserver", 12, True, "requests/s over MLServer's"),
    Goal("ratios", "rps_over_litserve", 20, True, "requests/s over LitServe's"),
    Goal("ratios", "rps_over_bentoml", 40, True, "requests/s over BentoML's"),
    Goal("ratios", "p999_busy_over_idle", 2, False, "p999 with a busy agent process over idle"),
    Goal("ratios", "rss_over_mlserver", 0.5, False, "worker's RSS over MLServer's"),
    Goal("ratios", "first_reply_over_mlserver", 1 / 3, False, "exec to first reply over MLServer's"),
    Goal("ratios", "kill_over_cold_start", 1.5, False, "kill -9 to next answer over a cold worker start"),
    Goal("memory", "total_pss_mb", 100, False, "PSS of all processes less the model file, MobileNet-like, MB"),
    Goal("swap", "swaps", 1000, True, "swaps under load"),
    Goal("swap", "generations", 100, True, "of them whole generations"),
    Goal("swap", "requests", 1_000_000, True, "requests across the swaps"),
    Goal("swap", "errors", 0, False, "errors and resets among them"),
    Goal("swap", "rss_growth", 0.05, False, "growth of RSS after the swaps"),
    Goal("overload", "goodput_over_capacity", 0.95, True, "goodput at 2x overload over capacity"),
)
KEYS: Mapping[str, tuple[str, ...]] = {
    "floor": ("echo_us", "bound_run_us"),
    "ratios": tuple(goal.key for goal in GOALS if goal.section == "ratios"),
    "memory": ("total_pss_mb",),
    "swap": ("swaps", "generations", "requests", "errors", "rss_growth"),
    "overload": ("goodput_over_capacity", "p99_ms"),
}


def empty() -> dict[str, Any]:
    """A document with every promised key, nothing known yet."""
    return {
        **{section: dict.fromkeys(keys) for section, keys in KEYS.items()},
        "missing": {},
        "details": {},
    }


def median(values: Sequence[float]) -> float:
    """Raises: ValueError: there are none."""
    if not values:
        raise ValueError("a median needs values")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def ratio(above: float, below: float) -> float | None:
    """None where the quotient says nothing."""
    if not below or not math.isfinite(above) or not math.isfinite(below):
        return None
    return round(above / below, 4)


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table of goals: text, measured, goal, met or not."""
    rows = []
    for goal in GOALS:
        value = document[goal.section][goal.key]
        met = goal.met(value)
        sign = "at least" if goal.at_least else "at most"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[met]
        shown = "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        limit = f"{goal.limit:,.3g}" if goal.limit < 1000 else f"{goal.limit:,.0f}"
        rows.append(f"{goal.text:58}{shown:>12}  {sign} {limit:<10}{verdict}")
    for part, why in document["missing"].items():
        rows.append(f"not measured: {part}: {why}")
    return rows


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How each promised number changed from one run to another."""
    rows = []
    for section, keys in KEYS.items():
        for key in keys:
            old, new = before.get(section, {}).get(key), now.get(section, {}).get(key)
            if old is None or new is None:
                continue
            change = f"{(new / old - 1) * 100:+.1f} %" if old else ("same" if new == old else "from zero")
            rows.append(f"{section + '.' + key:36}{old:>14,.4g}{new:>14,.4g}{change:>10}")
    return rows
