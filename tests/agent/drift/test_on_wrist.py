"""What is claimed of the wrist data, measured again on it: quiet on known wearers, quick on faults and new ones.

The predicted class, which only names the channel, comes from the nearest class centroid: deterministic, no
training. The roles are the task's: nothing of the stream or of the new wearers is in the reference.
"""

import numpy as np
import pytest

from agent.contract.plan import ChannelPlan, GuardPlan
from agent.drift import Reference, RegimeMonitor, channel_features, dump_reference
from agent.guard import KINDS, Guard
from compressor.examples.wrist.task import TASK, load
from compressor.reference import (
    ViewRows,
    alarm_rows,
    build_reference,
    channel_view_names,
    guard_statistics,
    measure_claim,
    measure_detectability,
)
from compressor.task import Role, Rows, TaskData

pytestmark = pytest.mark.slow

NEW_WEARERS = (1, 2, 3)
CHANNELS = tuple(channel.name for channel in TASK.channels)
GROUPS = {channel.name: channel.group for channel in TASK.channels}
# faults that cost the demo's models at least 10 points, and how often the first named channel must be touched
NAMED_SHARE = {
    "gyro_dead_x": 0.95,
    "gyro_off": 0.95,
    "accel_in_ms2": 0.95,
    "gyro_in_degrees": 0.95,
    "swap_xy": 0.9,
    "worn_180": 0.8,
    "rotated_30": 0.8,
    "rotated_45": 0.9,
    "noise": 0.95,
    "spikes": 0.95,
}


class Wrist:
    """Rows of the wrist task as the monitor sees them."""

    def __init__(self) -> None:
        self.data: TaskData = load({"new_wearers": list(NEW_WEARERS)})
        train = self.data.role(Role.TRAIN)
        features = channel_features(train.windows)
        self._sd = features.std(axis=0)
        self._centroids = np.stack([features[train.labels == k].mean(axis=0) for k in range(len(TASK.labels))])

    def rows(self, role: Role) -> Rows:
        return self.data.role(role)

    def view(self, rows: Rows, fault: str = "") -> ViewRows:
        windows = TASK.fault(fault).apply(rows.windows) if fault else rows.windows
        features = channel_features(windows)
        away = (features[:, None, :] - self._centroids[None]) / self._sd
        return ViewRows(features, (away**2).sum(axis=2).argmin(axis=1), rows.recordings)


@pytest.fixture(scope="module")
def wrist() -> Wrist:
    return Wrist()


@pytest.fixture(scope="module")
def reference(wrist: Wrist) -> Reference:
    calibrate = wrist.rows(Role.CALIBRATE)
    return build_reference(
        wrist.view(calibrate),
        channel_view_names(CHANNELS, GROUPS, TASK.labels),
        guard=guard_statistics(calibrate.windows, CHANNELS, GROUPS),
        held_out=wrist.view(wrist.rows(Role.SELECT)),
    )


def test_known_wearers_are_quiet_within_the_declared_budget(wrist: Wrist, reference: Reference) -> None:
    measured = measure_claim(reference, wrist.view(wrist.rows(Role.STREAM)), orders=6)
    assert measured.distinct_rows >= 600
    budget = reference.claim.declared_budget(measured.replayed_rows)
    assert budget == 1
    assert measured.alarms == 0


def test_harmful_faults_are_found_within_60_windows_and_a_touched_channel_is_named(
    wrist: Wrist, reference: Reference
) -> None:
    rows = wrist.rows(Role.STREAM)
    lines = measure_detectability(
        reference,
        wrist.view(rows),
        {fault: wrist.view(rows, fault) for fault in NAMED_SHARE},
        {fault: TASK.fault(fault).channels for fault in NAMED_SHARE},
        runs=20,
    )
    weak = [line for line in lines if line.found_share < 0.95 or (line.named_share or 0) < NAMED_SHARE[line.fault]]
    assert weak == []


def test_harmless_faults_that_are_said_to_be_invisible_are(wrist: Wrist, reference: Reference) -> None:
    rows = wrist.rows(Role.STREAM)
    faults = ("accel_gain_1.1", "gyro_bias_0.1")
    lines = measure_detectability(
        reference,
        wrist.view(rows),
        {fault: wrist.view(rows, fault) for fault in faults},
        dict.fromkeys(faults, ()),
        runs=10,
    )
    assert [line.found_share for line in lines] == [0.0, 0.0]


@pytest.mark.parametrize("wearer", NEW_WEARERS)
def test_a_new_wearer_is_noticed_within_one_session(wrist: Wrist, reference: Reference, wearer: int) -> None:
    everything = wrist.rows(Role.NEW_TEST)
    rows = wrist.view(everything.where(everything.sources == wearer))
    monitor = RegimeMonitor(reference)
    generator = np.random.default_rng(1)
    for _ in range(5):
        order = generator.permutation(np.unique(rows.recordings))
        alarms = alarm_rows(monitor, rows[np.concatenate([np.flatnonzero(rows.recordings == i) for i in order])])
        assert alarms
        assert alarms[0] < 370


@pytest.mark.parametrize("role", [Role.STREAM, Role.NEW_TEST])
def test_the_guards_scale_rule_parts_every_clean_window_from_every_wrong_unit(
    wrist: Wrist, reference: Reference, role: Role
) -> None:
    windows = wrist.rows(role).windows
    channels = tuple(ChannelPlan(one.name, one.group, -1e9, 1e9, 0.0) for one in TASK.channels)
    guard = Guard(GuardPlan("window", channels, group_rms=reference.guard.group_rms))
    assert guard.check(windows).bits is None
    for fault in ("accel_in_ms2", "gyro_in_degrees"):
        bits = guard.check(TASK.fault(fault).apply(windows)).bits
        assert bits is not None
        assert (bits[KINDS.index("scale")] != 0).all(), fault


def test_the_reference_fits_in_24_kb(reference: Reference) -> None:
    assert len(dump_reference(reference)) <= 24 * 1024
