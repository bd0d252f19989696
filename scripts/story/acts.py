"""What a person would have typed, noted where it is done, and orders that reached the broker beside the host.

At every door through which the story acts for an operator stands `acts.note(...)`. While the loop closes by itself
`acts.since(first_report_s)` stays empty, and so does `foreign_orders`, which knows nothing of the notes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from agent import clock


@dataclass(frozen=True, slots=True)
class Act:
    at_s: float  # monotonic
    text: str


@dataclass
class Acts:
    """In order of time. Any thread may note."""

    entries: list[Act] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.entries.append(Act(clock.monotonic_s(), text))

    def before(self, at_s: float) -> list[str]:
        return [act.text for act in self.entries if act.at_s < at_s]

    def since(self, at_s: float) -> list[str]:
        return [act.text for act in self.entries if act.at_s >= at_s]


class Message(Protocol):
    """What a third party sees of a message at the broker."""

    @property
    def topic(self) -> str: ...
    @property
    def document(self) -> dict[str, Any]: ...


def foreign_orders(seen: Iterable[Message], books: Mapping[str, tuple[int, int]]) -> int:
    """How many orders to devices the host did not give.

    books: device -> how many desired documents and how many commands the host ever made for it, by its own database.
    A document that arrives twice is one order.
    """
    heard: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for message in seen:
        _, _, _, device, word = message.topic.split("/")[:5]  # ew/1/<fleet>/<device>/<word>...
        if word in ("desired", "cmd"):
            heard[device, word == "cmd"].add(json.dumps(message.document, sort_keys=True))
    return sum(
        max(0, len(orders) - books.get(device, (0, 0))[is_command]) for (device, is_command), orders in heard.items()
    )
