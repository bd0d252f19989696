import math
from dataclasses import replace

import numpy as np
import pytest

from agent.contract.plan import ChannelPlan, GuardPlan
from agent.drift import GuardStatistics, Reference, drift_monitor, dump_reference
from agent.drift.views import CHANNEL_FEATURES
from agent.guard import Guard
from compressor.reference import (
    _POISSON_UPPER,
    MULTIPLE,
    ReferenceRefused,
    ViewRows,
    _folds,
    build_reference,
    channel_view_names,
    guard_statistics,
    measure_claim,
    measure_detectability,
)
from tests.agent.drift.conftest import CHANNELS as STREAMED
from tests.agent.drift.conftest import GROUPS as STREAM_GROUPS
from tests.agent.drift.conftest import NO_GUARD, RegimeStream

CHANNELS = ("ax", "gx")
NAMES = channel_view_names(CHANNELS, {"ax": "accel", "gx": "gyro"}, ("walk", "rest"))
GUARD = GuardStatistics({}, {}, {})
MEANS = np.random.default_rng(5).normal(0.0, 4.0, (12, 8))


def some_rows(per_recording: int, *, seed: int, shift: float = 0.0) -> ViewRows:
    recordings = np.repeat(np.arange(len(MEANS)), per_recording)
    noise = np.random.default_rng(seed).normal(shift, 0.5, (len(recordings), 8))
    return ViewRows(MEANS[recordings] + noise, recordings % 2, recordings)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return build_reference(some_rows(6, seed=1), NAMES, guard=GUARD, held_out=some_rows(6, seed=2))


def test_the_same_rows_make_the_same_bytes(reference: Reference) -> None:
    again = build_reference(some_rows(6, seed=1), NAMES, guard=GUARD, held_out=some_rows(6, seed=2))
    assert dump_reference(again) == dump_reference(reference)


def test_the_threshold_is_the_multiple_of_the_replays_largest_value(reference: Reference) -> None:
    rows = some_rows(6, seed=1)
    doubled = build_reference(rows, NAMES, guard=GUARD, held_out=rows, multiple=2 * MULTIPLE)
    assert doubled.regimes.threshold == pytest.approx(2 * reference.regimes.threshold, rel=1e-3)


def test_a_quiet_replay_claims_by_the_rule_of_three(reference: Reference) -> None:
    claim = reference.claim
    assert claim.alarms == 0
    assert claim.replayed_rows == claim.orders * claim.distinct_rows
    assert claim.rows_per_alarm == pytest.approx(claim.replayed_rows / 3, rel=0.01)
    assert claim.text.startswith(f"at most one alarm per {claim.rows_per_alarm} rows at 95%: no alarm in")


def test_the_bounds_are_those_of_a_poisson_count() -> None:
    for alarms, mean in enumerate(_POISSON_UPPER):
        at_most = sum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(alarms + 1))
        assert at_most == pytest.approx(0.05, abs=2e-4)


def test_a_monitor_that_alarms_all_the_time_claims_nothing(reference: Reference) -> None:
    claim = measure_claim(reference, some_rows(6, seed=3, shift=3.0))
    assert claim.rows_per_alarm == 0
    assert claim.alarms > 3
    assert claim.text.startswith("nothing is claimed:")


def test_a_lower_threshold_alarms_more_and_claims_less(reference: Reference) -> None:
    claims = [
        measure_claim(
            replace(reference, regimes=replace(reference.regimes, threshold=share * reference.regimes.threshold)),
            some_rows(6, seed=4),
            orders=4,
        )
        for share in (1.0, 0.3, 0.1, 0.05)
    ]
    alarms = [claim.alarms for claim in claims]
    assert alarms == sorted(alarms)
    assert alarms[0] == 0 < alarms[-1]
    promises = [claim.rows_per_alarm for claim in claims]
    assert promises == sorted(promises, reverse=True)


def test_detectability_tells_a_found_fault_from_a_hidden_one(reference: Reference) -> None:
    clean = some_rows(12, seed=6)
    dead = ViewRows(clean.features.copy(), clean.predicted, clean.recordings)
    dead.features[:, 4:] = -9.0
    found, hidden = measure_detectability(
        reference, clean, {"gx_dead": dead, "nothing": clean}, {"gx_dead": ("gx",), "nothing": ()}, runs=8
    )
    assert found.fault == "gx_dead"
    assert found.median_delay_rows is not None
    assert found.median_delay_rows <= 20
    assert (found.found_share, found.named_share) == (1.0, 1.0)
    assert (hidden.median_delay_rows, hidden.found_share, hidden.named_share) == (None, 0.0, None)


@pytest.mark.parametrize("per_recording", [1, 2])
def test_too_few_rows_a_recording_are_refused_with_what_is_needed(per_recording: int) -> None:
    with pytest.raises(ReferenceRefused, match="24 and 8 are needed"):
        build_reference(some_rows(per_recording, seed=1), NAMES, guard=GUARD, held_out=some_rows(2, seed=2))


def test_rows_that_never_differ_are_refused() -> None:
    rows = some_rows(6, seed=1)
    rows.features[:] = MEANS[rows.recordings]
    with pytest.raises(ReferenceRefused, match="never rose"):
        build_reference(rows, NAMES, guard=GUARD, held_out=rows)


def test_a_recording_of_one_row_is_a_regime_but_is_not_replayed(reference: Reference) -> None:
    rows = some_rows(6, seed=1)
    lonely = ViewRows(
        np.vstack([rows.features, np.full((1, 8), 50.0)]),
        np.append(rows.predicted, 0),
        np.append(rows.recordings, 99),
    )
    built = build_reference(lonely, NAMES, guard=GUARD, held_out=some_rows(6, seed=2))
    assert len(built.regimes.regime_means) == len(reference.regimes.regime_means) + 1
    assert built.regimes.threshold == pytest.approx(reference.regimes.threshold, rel=1e-3)


def test_folds_are_consecutive_in_time_within_each_recording() -> None:
    assert _folds(np.array([7, 7, 8, 7, 8, 7, 7, 7])).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_class_never_predicted_lies_at_the_middle_and_breaks_nothing() -> None:
    names = channel_view_names(CHANNELS, {"ax": "accel", "gx": "gyro"}, ("walk", "rest", "never"))
    rows = some_rows(6, seed=1)
    built = build_reference(rows, names, guard=GUARD, held_out=some_rows(6, seed=2))
    assert built.regimes.class_means[2] == pytest.approx(rows.features.mean(axis=0), rel=1e-5)
    assert built.class_share.tolist() == [0.5, 0.5, 0.0]


def test_guard_statistics_are_per_window_rms_over_a_groups_channels_and_time() -> None:
    windows = np.zeros((2, 4, 3))
    windows[0, :, 0], windows[0, :, 1] = 3.0, 4.0
    windows[1, :, 0] = 1.0
    windows[:, :, 2] = -2.0
    statistics = guard_statistics(windows, ("ax", "ay", "gx"), {"ax": "accel", "ay": "accel", "gx": "gyro"})
    assert statistics.group_rms["accel"] == pytest.approx((math.sqrt(1 / 2), math.sqrt((9 + 16) / 2)))
    assert statistics.group_rms["gyro"] == (2.0, 2.0)
    assert statistics.channel_mean == {"ax": 2.0, "ay": 2.0, "gx": -2.0}
    assert statistics.channel_range["ay"] == (0.0, 4.0)


@pytest.mark.parametrize(
    ("factor", "text"), [(0.45, ""), (2.4, ""), (0.35, "scale:ax,ay,az"), (2.6, "scale:ax,ay,az")]
)
def test_the_guard_measures_a_groups_scale_as_the_reference_does(factor: float, text: str) -> None:
    """Windows all alike, so that smallest and largest rms are one number: 2.5 times off is the limit, both ways."""
    channels = ("ax", "ay", "az")
    windows = np.tile(np.sin(np.arange(32) + 1.0)[None, :, None], (4, 1, 3)).astype(np.float32)
    statistics = guard_statistics(windows, channels, dict.fromkeys(channels, "accel"))
    plans = tuple(ChannelPlan(name, "accel", -99.0, 99.0, 0.0) for name in channels)
    guard = Guard(GuardPlan("window", plans, group_rms=statistics.group_rms))
    assert guard.check(windows[:1] * np.float32(factor)).text == text


def test_what_belongs_to_no_channel_is_viewed_but_raises_nothing(stream: RegimeStream) -> None:
    rows, held_out = stream.rows(8, seed=1), stream.rows(8, seed=2)
    names = channel_view_names(STREAMED, STREAM_GROUPS, ("walk", "rest"), ("norm(accel)",))
    assert names.features[-4:] == tuple(f"norm(accel).{one}" for one in CHANNEL_FEATURES)
    assert names.channel_of[-4:] == (-1,) * 4

    def wider(of: ViewRows) -> ViewRows:
        return ViewRows(np.hstack([of.features, of.features[:, :4]]), of.predicted, of.recordings)

    reference = build_reference(wider(rows), names, guard=NO_GUARD, held_out=wider(held_out))
    monitor = drift_monitor(reference)
    assert monitor is not None
    far = wider(held_out).features
    far[:, -4:] += 100.0
    assert monitor.follow(far, held_out.predicted, np.full(len(far), np.nan)) == []
    assert reference.fixed_point().width == 16


@pytest.fixture(scope="module")
def stream() -> RegimeStream:
    return RegimeStream()
