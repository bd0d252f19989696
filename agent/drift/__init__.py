"""Drift: what a view of a stream looks like now, against its reference. Pure: no clock, no I/O but reading
the reference, no threads. Device and host run the same code; calibration replays the shipped monitor.

    views      window -> features              findings   what began or ended
    windows    exactly mergeable sums          counters   runs of broken input
    reference  what is normal here             regimes    has the stream left it?
"""

from agent.drift.counters import GuardCounters
from agent.drift.findings import Finding
from agent.drift.reference import (
    Claim,
    Detectability,
    GuardStatistics,
    Reference,
    dump_reference,
    load_reference,
)
from agent.drift.regimes import RegimeMonitor
from agent.drift.views import channel_features, feature_names
from agent.drift.windows import FixedPoint, MomentWindow

__all__ = [
    "Claim",
    "Detectability",
    "Finding",
    "FixedPoint",
    "GuardCounters",
    "GuardStatistics",
    "MomentWindow",
    "Reference",
    "RegimeMonitor",
    "channel_features",
    "dump_reference",
    "feature_names",
    "load_reference",
]
