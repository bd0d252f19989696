"""What a bench promised and what it found: goals, their table, comparison of two runs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """`bound`: whether `limit` is the most or the least allowed. A truth value counts as 1 or 0.

    section "": the key stands at the top of the document.
    """

    section: str
    key: str
    bound: Literal["at most", "at least"]
    limit: float
    text: str

    def met(self, value: float | None) -> bool | None:
        if value is None:
            return None
        return value >= self.limit if self.bound == "at least" else value <= self.limit


def empty(keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A document with every promised key, nothing known yet."""
    return {
        **{section: dict.fromkeys(names) for section, names in keys.items() if section},
        **dict.fromkeys(keys.get("", ())),
        "missing": {},
        "details": {},
    }


def value_of(document: Mapping[str, Any], section: str, key: str) -> Any:
    """None where the document does not know it."""
    return document.get(section, {}).get(key) if section else document.get(key)


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


def lines(goals: Sequence[Goal], document: Mapping[str, Any]) -> list[str]:
    """The table of goals: text, measured, goal, met or not."""
    rows = []
    for goal in goals:
        value = value_of(document, goal.section, goal.key)
        met = goal.met(value)
        verdict = {True: "met", False: "MISSED", None: "not measured"}[met]
        shown = "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        limit = f"{goal.limit:,.3g}" if goal.limit < 1000 else f"{goal.limit:,.0f}"
        rows.append(f"{goal.text:58}{shown:>12}  {goal.bound} {limit:<10}{verdict}")
    for part, why in document["missing"].items():
        rows.append(f"not measured: {part}: {why}")
    return rows


def compare(keys: Mapping[str, Sequence[str]], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How each promised number changed from one run to another."""
    rows = []
    for section, names in keys.items():
        for key in names:
            old, new = value_of(before, section, key), value_of(now, section, key)
            if old is None or new is None:
                continue
            change = f"{(new / old - 1) * 100:+.1f} %" if old else ("same" if new == old else "from zero")
            rows.append(f"{f'{section}.{key}'.strip('.'):36}{old:>14,.4g}{new:>14,.4g}{change:>10}")
    return rows
