"""What a run found: goals, table, comparison. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """`bound`: whether `limit` is the most or the least allowed."""

    section: str
    key: str
    bound: Literal["at most", "at least"]
    limit: float
    text: str

    def met(self, value: float | None) -> bool | None:
        if value is None:
            return None
        return value >= self.limit if self.bound == "at least" else value <= self.limit


GOALS = (
    Goal("ratios", "inprocess_over_bare", "at most", 0.95, "in-process request over bare session.run, MLP, CPU"),
    Goal("ratios", "monitoring_over_bare", "at most", 0.15, "what monitoring adds over bare session.run, CPU"),
    Goal("ratios", "uds_over_floor", "at most", 1.5, "Unix socket, pinned, over C echo + bound run"),
    Goal("ratios", "cpu_over_fastapi", "at most", 0.2, "CPU per request over FastAPI's, 16 connections, JSON"),
    Goal("ratios", "rps_over_fastapi", "at least", 5, "requests/s over FastAPI's, 16 connections, JSON"),
    Goal("ratios", "rps_over_mlserver", "at least", 12, "requests/s over MLServer's"),
    Goal("ratios", "rps_over_litserve", "at least", 20, "requests/s over LitServe's"),
    Goal("ratios", "rps_over_bentoml", "at least", 40, "requests/s over BentoML's"),
    Goal("ratios", "p999_busy_over_idle", "at most", 2, "p999 with a busy agent process over idle"),
    Goal("ratios", "rss_over_mlserver", "at most", 0.5, "worker's RSS over MLServer's"),
    Goal("ratios", "first_reply_over_mlserver", "at most", 1 / 3, "exec to first reply over MLServer's"),
    Goal("ratios", "kill_over_cold_start", "at most", 1.5, "kill -9 to next answer over a cold worker start"),
    Goal("memory", "total_pss_mb", "at most", 100, "PSS of all processes less the model file, MobileNet-like, MB"),
    Goal("swap", "swaps", "at least", 1000, "swaps under load"),
    Goal("swap", "generations", "at least", 100, "of them whole generations"),
    Goal("swap", "requests", "at least", 1_000_000, "requests across the swaps"),
    Goal("swap", "errors", "at most", 0, "errors and resets among them"),
    Goal("swap", "rss_growth", "at most", 0.05, "growth of RSS after the swaps"),
    Goal("overload", "goodput_over_capacity", "at least", 0.95, "goodput at 2x overload over capacity"),
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
        verdict = {True: "met", False: "MISSED", None: "not measured"}[met]
        shown = "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        limit = f"{goal.limit:,.3g}" if goal.limit < 1000 else f"{goal.limit:,.0f}"
        rows.append(f"{goal.text:58}{shown:>12}  {goal.bound} {limit:<10}{verdict}")
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
