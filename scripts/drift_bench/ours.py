"""Our monitors as the bench runs them: the shipped code over rows, reset after each alarm."""

from __future__ import annotations

from agent.drift import Finding, Reference, RegimeMonitor
from compressor.reference import ViewRows


def alarms(reference: Reference, rows: ViewRows) -> list[int]:
    """Row numbers at which a fresh monitor raises; it is reset after each alarm."""
    monitor = RegimeMonitor(reference)
    raised = []
    for index in range(len(rows)):
        finding = monitor.update(rows.features[index], int(rows.predicted[index]))
        if finding is not None and finding.raised:
            raised.append(index)
            monitor.reset()
    return raised


def first_alarm(reference: Reference, before: ViewRows, after: ViewRows) -> tuple[int, Finding] | None:
    """The first alarm in `after` of a monitor that has seen `before`: rows of `after` until then, and what it said.

    A false alarm in `before` resets the monitor.
    """
    monitor = RegimeMonitor(reference)
    for index in range(len(before)):
        finding = monitor.update(before.features[index], int(before.predicted[index]))
        if finding is not None and finding.raised:
            monitor.reset()
    for index in range(len(after)):
        finding = monitor.update(after.features[index], int(after.predicted[index]))
        if finding is not None and finding.raised:
            return index + 1, finding
    return None
