"""What a drift is made of: which features and by how much, in the sensor's own unit; whose fault it looks like; and
what their values are now against the reference.

A monitor keeps its last rows (Trail), standardised as it looks at them: regimes against what is usual for the
predicted class, a stationary stream without its season and what follows from its past. When a finding stands, the
rows since the estimated change are compared with the reference's: mean, spread and a histogram of 16 bins. It is a
description for people; nothing is decided by it, and nothing is promised of its numbers.

Pure: knows nothing of time; the rows' times are their owner's (calendar.py).
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 16
BIN_CLIP: Final = 4.0  # reference standard deviations: the outer bins hold all that lies beyond
TRAIL_ROWS: Final = 256
CLIP: Final = 32.0  # beyond it a size says "more than": one wild value must not make all of it
BESIDE: Final = 0.25  # of the largest share: a channel above it has its part in the change
LEAST_SHIFT: Final = 0.25  # standard deviations: below it what changed is not the mean
MAX_FEATURES: Final = 8
MAX_PICTURES: Final = 3
MAX_CHANNELS: Final = 8
MAX_NAME: Final = 48
MAX_DETAIL_BYTES: Final = 2800  # with the rest of its event below 4 kB

_LOGS: Final = {"log_sd": "sd", "log_roughness": "roughness", "log_spike": "largest spike"}
_BARS: Final = "▁▂▃▄▅▆▇█"

Array = NDArray[Any]


class Scope(StrEnum):
    """Whose fault a drift looks like. Of one device only: whether others see it too is known to the host."""

    ONE_SENSOR = "one sensor"  # one channel carries it, or channels of one sensor group among several
    WORLD = "the world"  # channels of several sensors moved together


class How(StrEnum):
    """What about a feature changed."""

    SHIFT = "shift"  # its mean
    SPREAD = "spread"  # its standard deviation
    RELATION = "relation"  # how it goes with the other features
    REPEATED = "repeated"  # it repeats its value more often
    MISSING = "missing"  # it is missing more often
    RANGE = "range"  # it leaves the reference's range
    SHARES = "shares"  # its values come in other shares


@dataclass(frozen=True, slots=True)
class ChangedFeature:
    """One feature since the change. `share` of the evidence, 0..1. `shift_sd`: of the mean, in reference standard
    deviations; `shift`: the same in the feature's own unit; `spread`: standard deviation over the reference's.

    `reference`, `now`: share of the rows in each of 16 bins between `low` and `high`, in its unit, what lies beyond
    in the outer ones; `reference` is empty when the reference has none, both when there are no rows.
    """

    feature: str
    channel: str
    share: float
    how: How
    shift_sd: float
    shift: float
    spread: float
    low: float
    high: float
    reference: tuple[float, ...] = ()
    now: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """`rows` since the estimated change, of which `looked_at` are described. `blamed`: the channel or sensor group
    that carries it, "" when several do. `channels`: their shares of the evidence. Largest shares first.

    `relative`: sizes and histograms are differences from what the monitor expects of each row (what is usual for the
    class, or the season and the past), not from one constant.
    """

    rows: int
    looked_at: int
    scope: Scope
    blamed: str
    relative: bool
    channels: dict[str, float]
    features: tuple[ChangedFeature, ...]


@dataclass(frozen=True, slots=True)
class Looked:
    """How a monitor looks at its w features. `names`; `channels`: of each, "" = of no single one; `groups`: channel
    -> sensor group; `centre`, `scale` (w,): from standard deviations to the feature's unit; `bins`: (w, 16) of the
    reference, or (0, 16).
    """

    names: tuple[str, ...]
    channels: tuple[str, ...]
    groups: Mapping[str, str]
    centre: Array
    scale: Array
    bins: Array
    relative: bool


class Trail:
    """The last rows as a monitor looks at them, in blocks of `block_rows`. Mutable, owned by one thread.

    Not part of a monitor's state: after a restart a drift is described by the rows that came since.
    """

    def __init__(self, width: int, *, block_rows: int = 1) -> None:
        self._blocks: deque[Array] = deque(maxlen=TRAIL_ROWS // block_rows)
        self._width = width

    def add(self, block: Array) -> None:
        """block: (block_rows, width), standardised, NaN = missing; it is kept, not copied."""
        self._blocks.append(block)

    def last(self, rows: int) -> Array:
        """(at most `rows`, width): the newest rows."""
        if not self._blocks or rows <= 0:
            return np.zeros((0, self._width))
        return np.concatenate(self._blocks)[-rows:].astype(np.float64)


def histograms(z: Array) -> NDArray[np.int64]:
    """Rows in each bin: (width, 16). z: (rows, width), standardised; NaN is in none."""
    width = z.shape[1]
    known = np.isfinite(z)
    place = np.floor((np.where(known, np.clip(z, -BIN_CLIP, BIN_CLIP), 0.0) + BIN_CLIP) * (BINS / (2 * BIN_CLIP)))
    code = np.minimum(place.astype(np.int64), BINS - 1) + BINS * np.arange(width)
    return np.bincount(code[known], minlength=width * BINS).reshape(width, BINS)


def explain(
    looked: Looked, z: Array, *, rows: int, shares: Array, channels: Mapping[str, float], single: str,
    hows: Mapping[int, How],
) -> Explanation:  # fmt: skip
    """What changed. z: (n, w) the newest rows since the change, standardised, n may be 0; shares: (w,) parts of the
    evidence, any scale; channels: the same by channel; single: the one channel the monitor blames, or "";
    hows: column -> what its evidence is about, where that is known.
    """
    total = float(shares.sum()) or 1.0
    clipped = np.clip(z, -CLIP, CLIP)
    known = np.isfinite(clipped)
    count = np.maximum(known.sum(axis=0), 1)
    filled = np.where(known, clipped, 0.0)
    shift = filled.sum(axis=0) / count
    spread = np.sqrt(np.maximum((filled * filled).sum(axis=0) / count - shift * shift, 0.0))
    now = histograms(z)
    features = []
    for column in np.argsort(-shares, kind="stable").tolist():
        centre, scale = float(looked.centre[column]), float(looked.scale[column])
        features.append(ChangedFeature(
            feature=looked.names[column],
            channel=looked.channels[column],
            share=float(shares[column]) / total,
            how=hows.get(column) or _how(float(shift[column]), float(spread[column])),
            shift_sd=float(shift[column]),
            shift=float(shift[column]) * scale,
            spread=float(spread[column]),
            low=centre - BIN_CLIP * scale,
            high=centre + BIN_CLIP * scale,
            reference=_parts(looked.bins[column]) if len(looked.bins) else (),
            now=_parts(now[column]),
        ))  # fmt: skip
    carriers = _carriers(channels)
    scope, blamed = _scope(carriers, looked.groups, single)
    return Explanation(rows, len(z), scope, blamed, looked.relative, _normal(channels), tuple(features))


def _how(shift_sd: float, spread: float) -> How:
    widened = abs(math.log(max(spread, 1e-6)))
    return How.SHIFT if abs(shift_sd) >= min(LEAST_SHIFT, widened) else How.SPREAD


def _parts(counts: Array) -> tuple[float, ...]:
    total = float(counts.sum())
    return tuple((counts / total).tolist()) if total else ()


def _normal(channels: Mapping[str, float]) -> dict[str, float]:
    total = sum(channels.values()) or 1.0
    return {name: value / total for name, value in sorted(channels.items(), key=lambda item: -item[1])}


def _carriers(channels: Mapping[str, float]) -> list[str]:
    largest = max(channels.values(), default=0.0)
    return [name for name, value in channels.items() if value > 0 and value >= BESIDE * largest]


def _scope(carriers: Sequence[str], groups: Mapping[str, str], single: str) -> tuple[Scope, str]:
    if single:
        return Scope.ONE_SENSOR, single
    named = {groups.get(name, "") for name in carriers}
    if len(named) == 1 and "" not in named and len(set(groups.values())) > 1:
        return Scope.ONE_SENSOR, named.pop()
    return Scope.WORLD, ""


# --- in words and for the wire -------------------------------------------------------------------------------
def words(feature: str, how: str, *, shift: float, shift_sd: float, spread: float, unit: str = "") -> str:
    """`gx mean +0.8 rad/s (+2.1 sd)`, `sd of ax x1.9 (+3 sd)`: one changed feature."""
    subject, _, quantity = feature.rpartition(".")
    name = f"{subject} {quantity}" if subject and quantity not in _LOGS else feature
    sure = "" if abs(shift_sd) < 0.99 * CLIP else "more than "
    match how:
        case How.REPEATED:
            return f"{name} repeats its value"
        case How.MISSING:
            return f"{name} is missing more often"
        case How.RANGE:
            return f"{name} leaves the range of its reference"
        case How.SHARES:
            return f"the values of {name} come in other shares"
        case How.RELATION:
            return f"{name} no longer goes with the others as it did"
        case How.SPREAD:
            return f"{name} spreads {spread:.2g} times as much"
    if subject and quantity in _LOGS:
        factor = math.exp(min(max(shift, -50.0), 50.0))
        return f"{_LOGS[quantity]} of {subject} x{factor:.2g} ({sure}{shift_sd:+.1f} sd)"
    return f"{name} {shift:+.2g}{' ' if unit else ''}{unit} ({sure}{shift_sd:+.1f} sd)"


def unit_of(feature: str, channel: str, units: Mapping[str, str]) -> str:
    """The unit of a feature's numbers; "" for a logarithm or when it is not known."""
    _, _, quantity = feature.rpartition(".")
    return "" if quantity in _LOGS else units.get(channel) or units.get(feature, "")


def details(
    explanation: Explanation, units: Mapping[str, str], *, changed_at_s: float | None, changed_ago_s: float | None
) -> dict[str, Any]:
    """As `DriftExplanation` of the contract: at most 8 features, pictures of the first 3, below MAX_DETAIL_BYTES.

    units: of channels or features. changed_at_s: time of the data at the change; changed_ago_s: seconds it lay back
    when the newest row came.
    """
    features = [
        {
            "feature": one.feature[:MAX_NAME],
            "channel": one.channel[:MAX_NAME],
            "share": round(one.share, 3),
            "how": one.how.value,
            "shift": _brief(one.shift),
            "shift_sd": _brief(one.shift_sd),
            "spread": _brief(one.spread),
            "unit": unit_of(one.feature, one.channel, units)[:16],
        }
        for one in explanation.features[:MAX_FEATURES]
    ]
    document: dict[str, Any] = {
        "rows": explanation.rows,
        "looked_at": explanation.looked_at,
        "scope": explanation.scope.value,
        "blamed": explanation.blamed[:MAX_NAME],
        "relative": explanation.relative,
        "changed_at_s": _rounded(changed_at_s),
        "changed_ago_s": _rounded(changed_ago_s),
        "channels": {
            name[:MAX_NAME]: round(share, 3) for name, share in [*explanation.channels.items()][:MAX_CHANNELS]
        },
        "features": features,
        "pictures": [
            {
                "feature": one.feature[:MAX_NAME],
                "low": _brief(one.low),
                "high": _brief(one.high),
                "reference": _thousandths(one.reference),
                "now": _thousandths(one.now),
            }
            for one in explanation.features[:MAX_PICTURES]
            if one.now
        ],
    }
    while len(features) > 1 and len(json.dumps(document)) > MAX_DETAIL_BYTES:
        features.pop()
    return document


def lines(document: Mapping[str, Any]) -> list[str]:
    """Three or four lines of text from `details`: whose fault and since when, then feature by feature."""
    pictures = {picture["feature"]: picture for picture in document["pictures"]}
    told: list[str] = []
    for one in document["features"][:MAX_PICTURES]:
        if one["share"] < 0.01 and told:
            break
        sizes = {name: one[name] for name in ("shift", "shift_sd", "spread", "unit")}
        text = f"{words(one['feature'], one['how'], **sizes)}, {100 * one['share']:.0f} % of the evidence"
        picture = pictures.get(one["feature"])
        if picture and picture["reference"]:
            text += f"  {bars(picture['reference'])} -> {bars(picture['now'])}"
        told.append(text)
    return [headline(document), *told]


def headline(document: Mapping[str, Any]) -> str:
    """`one sensor (ax), for about 34 rows, 44 s`."""
    blamed = f" ({document['blamed']})" if document["blamed"] else ""
    ago_s = document["changed_ago_s"]
    lasting = "" if ago_s is None else f", {ago_s:.0f} s" if ago_s < 600 else f", {ago_s / 60:.0f} min"
    return f"{document['scope']}{blamed}, for about {document['rows']} rows{lasting}"


def bars(thousandths: Sequence[int]) -> str:
    """A histogram as a word of 16 bars, the largest full; an empty bin is a dot."""
    largest = max(thousandths, default=0) or 1
    top = len(_BARS) - 1
    return "".join(_BARS[min(top, count * len(_BARS) // largest)] if count else "·" for count in thousandths)


def _thousandths(parts: Sequence[float]) -> list[int]:
    return [math.ceil(1000 * part - 0.5) or int(part > 0) for part in parts]


def _brief(value: float) -> float:
    """Four digits: what a person reads, and few bytes."""
    return float(f"{value:.4g}")


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None
