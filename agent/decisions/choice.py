"""Which engine should answer: a pure choice from what the card says, with the reason as a sentence with numbers.

    card = read_card(document, engines=("wrist", "wrist-accel", "wrist-floor"), reads={"wrist-accel": ("ax", ...)},
                     floors=("wrist-floor",), groups={"ax": "accel", ...})
    choose(card, faults, candidates, current, margin=0.03).engine

Three questions, three functions, each -> Choice:

| function | asked when | rule |
|---|---|---|
| `choose` | broken input is diagnosed | best under that fault; stay unless better by `margin` |
| `choose_cheaper` | latency, power, heat, memory | best of those that cost less than the current; stay if none |
| `choose_other` | the current engine fails or is not loaded | best other engine; the floor only if no other is left |

How an engine's accuracy under one fault is estimated:

1. the card's row of the same kind and exactly these channels;
2. else the row of the same kind with the smallest superset of the channels;
3. else, if the engine reads none of the channels, its clean accuracy (a floor needs a row: it never wins unasked);
4. else unknown, and worse than any known one.

Several faults at once: the lowest estimate counts (an upper bound, since faults rarely help each other).
Knows nothing of time, dwell or alarms: `fallback.py` decides when a choice may become a switch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.contract.errors import Corrupt
from agent.decisions.events import AlarmKind

DEFAULT_MARGIN = 0.03
"""Two standard errors of a difference of two accuracies near 0.9 on about 800 windows each (the held-out stream of
data.md): 2 * sqrt(2 * 0.9 * 0.1 / 800) = 0.03. A smaller gain may be chance and is not worth a switch."""


@dataclass(frozen=True, slots=True)
class EngineCard:
    """One engine of a lineup. `reads`: the channels it looks at, None = all. `cost`: any unit, lower is cheaper."""

    engine: str
    accuracy: float | None = None  # on clean input, 0..1
    reads: frozenset[str] | None = None
    floor: bool = False
    cost: float | None = None  # e.g. median latency in us; None = later in the lineup is cheaper


@dataclass(frozen=True, slots=True)
class FaultRow:
    """Accuracy of each engine under one fault, as measured when the artifact was built."""

    name: str
    kind: AlarmKind
    channels: frozenset[str]
    accuracy: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Fault:
    """A diagnosis: what is wrong with which channels."""

    kind: AlarmKind
    channels: frozenset[str] = frozenset()

    def sentence(self) -> str:
        return f"{' '.join(sorted(self.channels)) or 'input'} {self.kind.value}"


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of a lineup, best engine first. `groups`: channel -> sensor group (an alarm may name either)."""

    engines: tuple[EngineCard, ...]
    rows: tuple[FaultRow, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, engine: str) -> EngineCard:
        return next(card for card in self.engines if card.engine == engine)

    def place(self, engine: str) -> int:
        return next(index for index, card in enumerate(self.engines) if card.engine == engine)

    def channels(self, names: Iterable[str]) -> frozenset[str]:
        """Channel names, with every group name replaced by its channels."""
        wanted = set(names)
        members = {channel for channel, group in self.groups.items() if group in wanted}
        return frozenset(members | (wanted - set(self.groups.values())))


@dataclass(frozen=True, slots=True)
class Estimate:
    """`accuracy` None = unknown. `basis` says where it comes from, in words."""

    accuracy: float | None
    basis: str


@dataclass(frozen=True, slots=True)
class Choice:
    engine: str
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)


def read_card(
    document: Mapping[str, Any],
    *,
    engines: tuple[str, ...],
    reads: Mapping[str, Collection[str]] | None = None,
    floors: Collection[str] = (),
    groups: Mapping[str, str] | None = None,
    costs: Mapping[str, float] | None = None,
) -> Card:
    """The card of a lineup from `card.json`'s document; rows of kinds this device cannot diagnose are left out.

    `reads` as in the manifests: an empty collection means all channels.

    Raises:
        Corrupt: the document is not a card.
    """
    reads, costs = reads or {}, costs or {}
    try:
        clean = document.get("accuracy", {})
        cards = tuple(
            EngineCard(
                engine=engine,
                accuracy=float(clean[engine]) if engine in clean else None,
                reads=frozenset(reads.get(engine, ())) or None,
                floor=engine in floors,
                cost=costs.get(engine),
            )
            for engine in engines
        )
        rows = tuple(
            FaultRow(
                name=str(row["name"]),
                kind=AlarmKind(row["kind"]),
                channels=frozenset(map(str, row["channels"])),
                accuracy={str(engine): float(value) for engine, value in row["accuracy"].items()},
            )
            for row in document.get("faults", ())
            if row["kind"] in set(AlarmKind)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"card.json is malformed: {error!r}", hint="The artifact must be built again.") from None
    return Card(cards, rows, dict(groups or {}))


def find_row(card: Card, fault: Fault) -> FaultRow | None:
    """The row of the same kind with exactly these channels, else with the smallest superset of them."""
    wanted = card.channels(fault.channels)
    fitting = [row for row in card.rows if row.kind is fault.kind and row.channels >= wanted]
    # a fault that names no channel may be on any: the largest row is the careful reading
    smaller = 1 if wanted else -1
    return min(fitting, key=lambda row: (smaller * len(row.channels), row.name), default=None)


def estimate(card: Card, engine: str, faults: Collection[Fault]) -> Estimate:
    """The accuracy to expect of `engine` under all of `faults`; clean accuracy without one."""
    if not faults:
        return Estimate(card[engine].accuracy, "clean input")
    each = [_estimate_one(card, card[engine], fault) for fault in faults]
    return min(each, key=lambda one: -1.0 if one.accuracy is None else one.accuracy)


def _estimate_one(card: Card, engine: EngineCard, fault: Fault) -> Estimate:
    row = find_row(card, fault)
    if row is not None and engine.engine in row.accuracy:
        exact = row.channels == card.channels(fault.channels)
        return Estimate(row.accuracy[engine.engine], f"{'row' if exact else 'nearest row'} '{row.name}' of the card")
    touched = card.channels(fault.channels)
    if engine.reads is not None and touched and not engine.floor and not engine.reads & touched:
        return Estimate(engine.accuracy, f"clean accuracy, it does not read {' '.join(sorted(touched))}")
    return Estimate(None, "nothing in the card")


def choose(
    card: Card, faults: Collection[Fault], candidates: Collection[str], current: str, *, margin: float
) -> Choice:
    """The candidate that is best under `faults`; `current` unless the best is better by `margin` or more."""
    here = estimate(card, current, faults)
    others = [engine for engine in _ordered(card, candidates) if engine != current]
    known = {engine: one for engine in others if (one := estimate(card, engine, faults)).accuracy is not None}
    if here.accuracy is None:  # a constant answer must beat a known number, not our ignorance
        known = {engine: one for engine, one in known.items() if not card[engine].floor}
    what = " and ".join(fault.sentence() for fault in faults) or "clean input"
    best = max(known, key=lambda engine: known[engine].accuracy or 0.0, default=None)
    if best is None:
        return Choice(current, f"{what}: stays with {current}, no other engine is known to be better")
    there = known[best]
    numbers = {"accuracy_to": there.accuracy or 0.0, "margin": margin}
    if here.accuracy is not None:
        numbers["accuracy_from"] = here.accuracy
    compared = f"{best} {_show(there.accuracy)}, {current} {_show(here.accuracy)} ({there.basis})"
    # a hair below `margin` still counts: card values are decimals, 0.90 - 0.87 is 0.030000000000000027 or less
    if (there.accuracy or 0.0) - (here.accuracy or 0.0) < margin - 1e-9:
        return Choice(current, f"{what}: stays, none is better by {margin:.2f}: {compared}", numbers)
    return Choice(best, f"{what}: {compared}", numbers)


def choose_cheaper(
    card: Card, faults: Collection[Fault], candidates: Collection[str], current: str, why: str
) -> Choice:
    """The best of the engines that cost less than `current`, never a floor; `current` when there is none."""
    here = card[current]
    cheaper = [engine for engine in _ordered(card, candidates) if _is_cheaper(card, card[engine], here)]
    if not cheaper:
        return Choice(current, f"{why}: stays with {current}, no cheaper engine is loaded")
    best = _best(card, faults, cheaper)
    return Choice(best, f"{why}: {best} costs less than {current}", _accuracies(card, faults, current, best))


def choose_other(
    card: Card, faults: Collection[Fault], candidates: Collection[str], current: str, why: str
) -> Choice:
    """The best candidate but `current`; a floor only when no other is left; `current` when there is none at all."""
    others = [engine for engine in _ordered(card, candidates) if engine != current]
    if not others:
        return Choice(current, f"{why}: stays with {current}, no other engine is left")
    models = [engine for engine in others if not card[engine].floor]
    best = _best(card, faults, models or others)
    rest = "the best of what is left" if models else "the last resort, a constant answer"
    return Choice(best, f"{why}: {best} is {rest}", _accuracies(card, faults, current, best))


def _ordered(card: Card, engines: Collection[str]) -> list[str]:
    return [one.engine for one in card.engines if one.engine in engines]


def _best(card: Card, faults: Collection[Fault], engines: list[str]) -> str:
    """Known before unknown, better before worse, earlier before later."""
    values = {engine: estimate(card, engine, faults).accuracy for engine in engines}
    return max(engines, key=lambda engine: (values[engine] is not None, values[engine] or 0.0))


def _is_cheaper(card: Card, other: EngineCard, here: EngineCard) -> bool:
    if other.floor or other.engine == here.engine:
        return False
    if other.cost is not None and here.cost is not None:
        return other.cost < here.cost
    return card.place(other.engine) > card.place(here.engine)


def _accuracies(card: Card, faults: Collection[Fault], current: str, best: str) -> dict[str, float]:
    pairs = {"accuracy_from": estimate(card, current, faults), "accuracy_to": estimate(card, best, faults)}
    return {name: one.accuracy for name, one in pairs.items() if one.accuracy is not None}


def _show(accuracy: float | None) -> str:
    return "unknown" if accuracy is None else f"{accuracy:.2f}"
