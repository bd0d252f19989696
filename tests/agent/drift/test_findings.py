from dataclasses import FrozenInstanceError

import pytest

from agent.decisions.events import AlarmKind
from agent.drift import Finding
from agent.drift.counters import RULES


def test_a_finding_never_changes() -> None:
    finding = Finding("dead", raised=True)
    with pytest.raises(FrozenInstanceError):
        finding.raised = False  # type: ignore[misc]


def test_every_kind_a_drift_part_gives_is_an_alarm_kind() -> None:
    assert {*RULES, "drift"} <= {kind.value for kind in AlarmKind}
