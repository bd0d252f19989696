"""What devices say of their newest drift, as lines and as bars, and who of the cohort drifts too.

Believes nothing: what breaks the contract or its bounds is "not readable", names are made printable, lines are cut.
Reads only; geometry is whole numbers, so the page needs no inline style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from agent.contract import messages as contract
from agent.drift.explanation import lines
from compressor.config import HostConfig
from compressor.fleet.database import Connection, Row, messages
from compressor.fleet.inbox import MAX_COUNT
from compressor.fleet.situation import drifting
from compressor.web.views import when

LOOKED_AT: Final = 64  # newest drift events of a device
MAX_SHOWN: Final = 4  # explanations on one page
MAX_LINE: Final = 200
MAX_LISTED: Final = 6
HEIGHT: Final = 60  # of the highest bar; each bin is 20 wide
NOT_READABLE: Final = "The device's explanation is not readable: it does not keep the contract."


@dataclass(frozen=True, slots=True)
class Bin:
    """Two bars beside each other, drawn from `x`, and their shares of the rows in percent."""

    x: int
    low: str
    high: str
    reference: str
    now: str
    reference_height: int
    now_height: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A feature's histogram. `summary`: the same in words; `has_reference`: there is something to compare with."""

    feature: str
    bins: tuple[Bin, ...]
    has_reference: bool
    summary: str

    @property
    def width(self) -> int:
        return 20 * len(self.bins)


@dataclass(frozen=True, slots=True)
class Told:
    """The newest drift of one device and service that explains itself.

    `document`: the explanation's known fields, None when it is not readable. `over`: when it was taken back, "" = not
    yet. `lines` carry bars as text and are for a terminal, `words` not.
    """

    device: str
    service: str
    at: str
    over: str
    document: dict[str, Any] | None
    lines: tuple[str, ...]
    words: tuple[str, ...]
    pictures: tuple[Picture, ...]
    cohort: str


def explanations(
    tx: Connection, config: HostConfig, devices: Iterable[str], *, service: str | None = None, now_s: float
) -> list[Told]:
    """Of these devices in turn, at most MAX_SHOWN. service: only this one's; None = every service's."""
    found: list[Told] = []
    sentences: dict[tuple[str, str], str] = {}
    for device in devices:
        for row, over in _newest(messages.events(tx, device=device, kinds=("drift",), limit=LOOKED_AT)):
            if len(found) == MAX_SHOWN:
                return found
            if service in {None, row.service}:
                key = (config.cohort_of(device), row.service)
                if key not in sentences:
                    sentences[key] = _cohort(tx, config, *key, now_s=now_s)
                found.append(_told(row, over, sentences[key]))
    return found


def _newest(events: Sequence[Row[Any]]) -> list[tuple[Row[Any], str]]:
    """events: newest first. Per service the newest explained one of its newest drift, and when that was over."""
    found: dict[str, tuple[Row[Any], str]] = {}
    over: dict[str, str] = {}
    raised: set[str] = set()
    settled: set[str] = set()
    for row in events:
        service = row.service
        if service in settled or row.details.get("alarm") == "harm":
            continue
        if row.details.get("raised", True) is not False:
            raised.add(service)
            if "explanation" in row.details:
                found[service] = (row, over.get(service, ""))
                settled.add(service)
        elif service in raised:
            settled.add(service)  # the end of an earlier drift: the newest one explains nothing
        else:
            over[service] = when(row.received_at)
    return list(found.values())


def _told(row: Row[Any], over: str, cohort: str) -> Told:
    document = read(row.details["explanation"])
    return Told(
        device=row.device,
        service=row.service,
        at=when(row.received_at),
        over=over,
        document=document,
        lines=_lines(document),
        words=_lines(document | {"pictures": []} if document else None),
        pictures=tuple(filter(None, map(picture, document["pictures"]))) if document else (),
        cohort=cohort,
    )


def read(said: object) -> dict[str, Any] | None:
    """The known fields of an explanation, printable and bounded; None when it does not keep the contract."""
    try:
        explanation = contract.DriftExplanation.model_validate(said)
    except (ValidationError, OverflowError):
        return None
    finite = all(map(math.isfinite, explanation.channels.values()))
    if not finite or max(explanation.rows, explanation.looked_at) > MAX_COUNT:
        return None
    known: dict[str, Any] = _plain(explanation)
    return known


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
        case str():
            return printable(value)
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {printable(name)[:64]: _plain(item) for name, item in value.items()}
        case _:
            return value


def printable(text: str) -> str:
    """Without what could steer a terminal or turn the direction of a line."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _lines(document: dict[str, Any] | None) -> tuple[str, ...]:
    return tuple(line[:MAX_LINE] for line in lines(document)) if document else (NOT_READABLE,)


def picture(drawn: dict[str, Any]) -> Picture | None:
    """None when there is nothing to draw: no rows, bins that do not match, or no range."""
    reference, now, low, high = drawn["reference"], drawn["now"], drawn["low"], drawn["high"]
    if not any(now) or len(reference) not in {0, len(now)} or not low < high:
        return None
    largest = max([*reference, *now])
    edges = [f"{low * (1 - at / len(now)) + high * at / len(now):.3g}" for at in range(len(now) + 1)]
    bins = tuple(
        Bin(
            x=20 * at, low=edges[at], high=edges[at + 1], reference=f"{usual / 10:.1f}", now=f"{after / 10:.1f}",
            reference_height=_height(usual, largest), now_height=_height(after, largest),
        )
        for at, (usual, after) in enumerate(zip(reference or [0] * len(now), now, strict=True))
    )  # fmt: skip
    before = f"Reference most often {_most(reference, edges)}; " if any(reference) else ""
    summary = f"{before}now most often {_most(now, edges)}."
    return Picture(drawn["feature"], bins, any(reference), summary)


def _height(count: int, largest: int) -> int:
    return max(1, count * HEIGHT // largest) if count else 0


def _most(counts: Sequence[int], edges: Sequence[str]) -> str:
    fullest = counts.index(max(counts))
    return f"between {edges[fullest]} and {edges[fullest + 1]} ({counts[fullest] / 10:.0f} % of the rows)"


# --- the cohort ------------------------------------------------------------------------------------------------
def _cohort(tx: Connection, config: HostConfig, name: str, service: str, *, now_s: float) -> str:
    members = config.fleet.cohorts.get(name, ())
    return cohort_words(name, len(members), drifting(tx, members, service, now_s=now_s)) if members else ""


def cohort_words(name: str, members: int, drift: Sequence[str]) -> str:
    """`one device of 5 in cohort canary drifts (w1): ...`. drift: the members whose drift stands."""
    if members == 1:
        return f"the only device of cohort {name}: nobody to compare with"
    where = f"of {members} in cohort {name}"
    if not drift:
        return f"no device {where} drifts any more"
    if len(drift) == 1:
        return f"one device {where} drifts ({drift[0]}): rather this device than the world"
    more = f" and {len(drift) - MAX_LISTED} more" if len(drift) > MAX_LISTED else ""
    tail = ": rather the world than one device" if 2 * len(drift) > members else ""
    return f"{len(drift)} devices {where} drift ({', '.join(drift[:MAX_LISTED])}{more}){tail}"
