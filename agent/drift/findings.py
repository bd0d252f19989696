"""What a drift part says when something begins or ends: one value, edges only."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.drift.explanation import Explanation


@dataclass(frozen=True, slots=True)
class Finding:
    """An edge: `raised` begins (or extends) a condition, otherwise it ends.

    `kind` is one of the alarm kinds of the decisions, as plain text: dead, stuck, scale, not_finite, range,
    repeated, rate, drift, harm. `channels`: the most suspicious first, none where the whole input is meant.
    `numbers` are the evidence; `text` reads without them. `engine`: of harm, the one to switch to.
    """

    kind: str
    raised: bool
    channels: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    text: str = ""
    engine: str = ""
    explanation: Explanation | None = field(default=None, compare=False)  # of a drift; for people, not its identity
