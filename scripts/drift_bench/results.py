"""What the drift bench promises; its table and comparison. Pure.

Only figures with a goal of their own stand here; everything a reader needs to judge them is in `details`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.lib import goals
from scripts.lib.goals import Goal

GOALS = (
    Goal("claim", "share_kept", "at least", 0.95, "claim not contradicted, share of references, stationary"),
    Goal("claim", "ar_worst_ratio", "at least", 0.5, "actual over claimed run length, worst AR or season cell"),
    Goal("delay", "over_oracle", "at most", 1.5, "delay over oracle's, .25 and .5 sd, equal actual run length"),
    Goal("delay", "correlation_rows", "at most", 250, "correlation alone changes: rows to the alarm"),
    Goal("delay", "variance_rows", "at most", 100, "sd x1.5 in one feature: rows"),
    Goal("delay", "stuck_rows", "at most", 32, "one feature stuck: rows"),
    Goal("cost", "adwin_over_ours", "at least", 8, "CPU a row: ADWIN per feature over ours, d = 32"),
    Goal("cost", "alibi_over_ours", "at least", 25, "CPU a row: alibi-detect online MMD over ours, d = 32"),
    Goal("wrist", "null_rows", "at least", 2_000, "wrist: held-out windows"),
    Goal("wrist", "null_orders", "at least", 20, "wrist: orders of their recordings"),
    Goal("wrist", "null_alarms", "at most", 0, "wrist: alarms on them"),
    Goal("wrist", "harmful_found_share", "at least", 0.95, "wrist: faults of 10 points and more found in 60 windows"),
    Goal("wrist", "named_share", "at least", 0.95, "wrist: of these, a touched channel named first"),
    Goal("wrist", "guard_switch_share", "at least", 0.99, "wrist: dead, off, unit: switched within 10 windows"),
    Goal("wrist", "swap_switch_share", "at least", 0.90, "wrist: axes swapped: switched within 64 windows"),
    Goal("wrist", "mount_switch_share", "at least", 0.60, "wrist: worn the other way round or turned: switched"),
    Goal("wrist", "switch_helped_share", "at least", 0.95, "wrist: switches after which accuracy was higher"),
    Goal("wrist", "harmless_switch_share", "at most", 0.01, "wrist: switches on harmless faults and quiet streams"),
    Goal("wrist", "switched_back_share", "at least", 1, "wrist: each of these switched back"),
    Goal("wrist", "new_wearer_event_share", "at least", 1, "wrist: new wearers with an event within a session"),
    Goal("wrist", "new_wearer_switch_share", "at most", 0.10, "wrist: switches on clean new wearers"),
    Goal("employment", "switches", "at most", 0, "employment: switches"),
    Goal("", "reference_bytes", "at most", 24 * 1024, "reference.npz, 32 features, bytes"),
    Goal("merge", "bit_equal", "at least", 1, "merged windows equal pooled ones, bit for bit"),
)
KEYS: Mapping[str, tuple[str, ...]] = {
    "claim": ("share_kept", "ar_worst_ratio"),
    "delay": ("over_oracle", "correlation_rows", "variance_rows", "stuck_rows"),
    "cost": ("ours_us", "adwin_over_ours", "alibi_over_ours"),
    "wrist": tuple(goal.key for goal in GOALS if goal.section == "wrist"),
    "employment": ("switches",),
    "": ("reference_bytes",),
    "merge": ("bit_equal",),
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
