"""What the serving bench promises; its table and comparison. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.lib import goals
from scripts.lib.goals import Goal, median, ratio

__all__ = ["GOALS", "KEYS", "compare", "empty", "lines", "median", "ratio"]

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
    "monitors": ("rate_on", "rate_off", "cpu_us_on", "cpu_us_off"),
    "swap": ("swaps", "generations", "requests", "errors", "rss_growth"),
    "overload": ("goodput_over_capacity", "p99_ms"),
}


def empty() -> dict[str, Any]:
    """A document with every promised key, nothing known yet."""
    return goals.empty(KEYS)


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table of goals: text, measured, goal, met or not."""
    return goals.lines(GOALS, document)


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How each promised number changed from one run to another."""
    return goals.compare(KEYS, before, now)
