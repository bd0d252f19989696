"""Runs of broken input: turns what the guard saw in single windows into findings that begin and end.

The guard judges one window; a window may be odd for a good reason. A fault is what stays. Constants are
those measured on the wrist data (three windows in a row for a channel that does not move, six of the last
eight for a unit change); dead and scale fired on none of 2,393 held-out windows of known wearers and 3,200 of new
ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from agent.drift.findings import Finding

HISTORY_ROWS: Final = 8
CLEAR_ROWS: Final = 8
_MASK: Final = (1 << HISTORY_ROWS) - 1


@dataclass(frozen=True, slots=True)
class _Rule:
    """`needed` of the last `within` rows raise; CLEAR_ROWS rows without it clear.

    `one`, `many`: what the channel or the channels do.
    """

    needed: int
    within: int
    one: str
    many: str

    def fires(self, history: int) -> bool:
        return self.recent(history).bit_count() >= self.needed

    def recent(self, history: int) -> int:
        return history & ((1 << self.within) - 1)


RULES: Final = {
    "not_finite": _Rule(3, 8, "sends numbers that are not finite", "send numbers that are not finite"),
    "dead": _Rule(3, 3, "no longer moves", "no longer move"),
    "stuck": _Rule(3, 3, "repeats one value", "repeat one value each"),
    "scale": _Rule(6, 8, "changed its scale", "changed their scale"),
    "range": _Rule(3, 8, "leaves its allowed range", "leave their allowed ranges"),
}


class GuardCounters:
    """Owned by one thread. `channels` in the order of the guard's bits; `groups`: channel -> its sensor group."""

    def __init__(self, channels: tuple[str, ...], groups: dict[str, str]) -> None:
        self._channels = channels
        self._group_bits = tuple(
            sum(1 << other for other, name in enumerate(channels) if groups.get(name) == groups.get(channel))
            for channel in channels
        )
        self._history: dict[str, list[int]] = {}
        self._raised: dict[str, tuple[str, ...]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything, also what is raised (without saying so)."""
        self._history = {kind: [0] * len(self._channels) for kind in RULES}
        self._raised = dict.fromkeys(RULES, ())

    def update(
        self, *, dead: int = 0, stuck: int = 0, scale: int = 0, not_finite: int = 0, out_of_range: int = 0
    ) -> tuple[Finding, ...]:
        """One row's bits (bit i = channel i) -> what began or ended, usually nothing.

        A raised finding names all channels that have the fault now, and is given again when they become
        more or fewer; a cleared one names those that had it. A row explains a channel once: not finite,
        else dead, else stuck, else its group's scale, so that one fault is one finding.
        """
        dead &= ~not_finite
        stuck &= ~(not_finite | dead)
        scale &= ~self._groups_of(not_finite | dead | stuck)
        bits = {"not_finite": not_finite, "dead": dead, "stuck": stuck, "scale": scale, "range": out_of_range}
        return tuple(self._edges(bits))

    def statistics(self) -> dict[str, tuple[str, ...]]:
        """Kind -> channels that are raised now."""
        return dict(self._raised)

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON."""
        return {
            "channels": list(self._channels),
            "history": {kind: list(rows) for kind, rows in self._history.items()},
            "raised": {kind: list(names) for kind, names in self._raised.items()},
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue where `state` was taken; False (and unchanged) when it is of other channels."""
        if tuple(state.get("channels", ())) != self._channels:
            return False
        self._history = {kind: [int(row) for row in state["history"][kind]] for kind in RULES}
        self._raised = {kind: tuple(state["raised"][kind]) for kind in RULES}
        return True

    def _edges(self, bits: dict[str, int]) -> Iterator[Finding]:
        for kind, rule in RULES.items():
            history = self._history[kind]
            for index in range(len(history)):
                history[index] = (history[index] << 1 | bits[kind] >> index & 1) & _MASK
            before = self._raised[kind]
            now = tuple(
                name
                for name, rows in zip(self._channels, history, strict=True)
                if rule.fires(rows) or (name in before and rows)
            )
            self._raised[kind] = now
            if now != before:
                joined = (rows for name, rows in zip(self._channels, history, strict=True) if name not in before)
                since = max((rule.recent(rows).bit_length() for rows in joined if rule.fires(rows)), default=0)
                yield _finding(kind, rule, now, before, since)

    def _groups_of(self, bits: int) -> int:
        groups = 0
        for index, group in enumerate(self._group_bits):
            if bits >> index & 1:
                groups |= group
        return groups


def _finding(kind: str, rule: _Rule, now: tuple[str, ...], before: tuple[str, ...], since: int) -> Finding:
    """`since`: rows from the first odd one of the channels that joined, 0 = none joined."""
    if now:
        numbers = {"rows": float(rule.needed), **({"rows_since_change": float(since)} if since else {})}
        return Finding(
            kind=kind, raised=True, channels=now, numbers=numbers,
            text=f"{', '.join(now)} {rule.one if len(now) == 1 else rule.many}",
        )  # fmt: skip
    return Finding(
        kind=kind, raised=False, channels=before, text=f"{', '.join(before)}: normal for {CLEAR_ROWS} rows"
    )
