"""Drift: what a view of a stream looks like now, against its reference. Pure: no clock, no I/O but reading
the reference, no threads. Device and host run the same code; calibration replays the shipped monitor.

    views      window -> features              findings   what began or ended
    windows    exactly mergeable sums          counters   runs of broken input
    reference  what is normal here             regimes    has the stream left every known regime?
    stationary has a steady stream changed?    edetector  the bets it makes
    transforms season and lags taken out       models     what a monitor compares with
    archive    arrays as bytes and back        senders    what repeats, what comes at another rate
    calendar   when rows came                  explanation what changed, in words and pictures
    harm       does a drift do harm?
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from agent.drift.calendar import Calendar
from agent.drift.counters import GuardCounters
from agent.drift.explanation import Explanation
from agent.drift.findings import Finding
from agent.drift.harm import HarmMonitor
from agent.drift.models import RegimeModel, StationaryModel, Witness
from agent.drift.reference import (
    Claim,
    Detectability,
    GuardStatistics,
    Reference,
    dump_reference,
    load_reference,
)
from agent.drift.regimes import RegimeMonitor
from agent.drift.senders import SenderCounters
from agent.drift.stationary import StationaryMonitor
from agent.drift.views import Combination, channel_features, combined, feature_names, window_features
from agent.drift.windows import FixedPoint, MomentWindow

__all__ = [
    "Calendar",
    "Claim",
    "Combination",
    "Detectability",
    "DriftMonitor",
    "Explanation",
    "Finding",
    "FixedPoint",
    "GuardCounters",
    "GuardStatistics",
    "HarmMonitor",
    "MomentWindow",
    "Reference",
    "RegimeModel",
    "RegimeMonitor",
    "SenderCounters",
    "StationaryModel",
    "StationaryMonitor",
    "Witness",
    "channel_features",
    "combined",
    "drift_monitor",
    "dump_reference",
    "feature_names",
    "load_reference",
    "window_features",
]


class DriftMonitor(Protocol):
    """Follows one stream against its reference; owned by one thread. What every kind of monitor can do."""

    def follow(
        self, features: NDArray[Any], predicted: NDArray[Any], time_s: NDArray[Any]
    ) -> list[tuple[int, Finding]]:
        """The next rows in order; (row number within them, what began or ended). Batching changes nothing.

        features: (rows, features of the view); predicted: (rows,) class numbers, -1 = unknown; time_s: (rows,)
        seconds of the data, NaN = not known.
        """
        ...

    @property
    def raised(self) -> bool:
        """Whether a finding stands."""
        ...

    @property
    def raised_rows(self) -> int:
        """Rows since the finding that stands; 0 when none does."""
        ...

    def named(self) -> tuple[str, ...]:
        """Channels (or features) of the finding that stands, the most suspicious first."""
        ...

    def blame(self) -> dict[str, float]:
        """Channel -> its part in the finding that stands."""
        ...

    def single_channel(self) -> str:
        """The one channel that carries the finding that stands; "" when it is several or nobody's fault."""
        ...

    def evidence(self) -> float:
        """As a share of what raises; 1 raises."""
        ...

    def suspicion(self) -> dict[str, float]:
        """Channel -> how odd it is now, the oddest first."""
        ...

    def explanation(self) -> Explanation | None:
        """What the finding that stands is made of, as of now; None when none does."""
        ...

    def statistics(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue where `state` was taken; False (and unchanged) when it belongs to another reference."""
        ...

    def reset(self) -> None:
        """Start anew; what was raised is forgotten without a finding."""
        ...


def drift_monitor(reference: Reference) -> DriftMonitor | None:
    """The monitor this reference was built for; None when its view is watched only."""
    if reference.stationary:
        return StationaryMonitor(reference)
    return RegimeMonitor(reference) if reference.regimes else None
