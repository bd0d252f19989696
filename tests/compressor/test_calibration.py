"""Which monitor a view gets, and what is claimed of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agent.decisions.events import AlarmRaised
from agent.drift import GuardStatistics, Reference, drift_monitor, dump_reference, load_reference
from agent.monitor import Monitor, MonitorPlan
from agent.observation import RECORD
from compressor.calibration import CLAIM_ROWS, Calibrated, Kind, alarms_of, calibrate, contradicts
from compressor.errors import ReferenceRefused
from compressor.reference import ViewRows, build_reference, feature_view_names

FEATURES = ("flow", "heat", "tilt", "load")
NAMES = feature_view_names(FEATURES, ("low", "high"))
GUARD = GuardStatistics({}, {}, {})
STEP_S = 300.0
DAY_S = 86_400.0


def stream(x: np.ndarray, *, begin: int = 0, recordings: int = 1, timed: bool = False) -> ViewRows:
    predicted = np.random.default_rng(begin).integers(0, 2, len(x))
    number = np.arange(len(x)) * recordings // len(x)
    times_s = (begin + np.arange(len(x))) * STEP_S if timed else None
    return ViewRows(x, predicted, number, times_s)


def gaussian(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, len(FEATURES)))


def autoregressive(rows: int, seed: int, phi: float = 0.8) -> np.ndarray:
    x = gaussian(rows + 200, seed)
    for t in range(1, len(x)):
        x[t] = phi * x[t - 1] + np.sqrt(1 - phi * phi) * x[t]
    return x[200:]


def seasonal(rows: int, seed: int, begin: int) -> np.ndarray:
    time_s = (begin + np.arange(rows)) * STEP_S
    day = np.sin(2 * np.pi * time_s / DAY_S)[:, None]
    return 2.0 * day + autoregressive(rows, seed)


def decided(rows: ViewRows, held_out: ViewRows, **changes: Any) -> Calibrated:
    def regimes() -> Reference:
        return build_reference(rows, NAMES, guard=GUARD, held_out=held_out)

    return calibrate(rows, held_out, NAMES, guard=GUARD, **{"regimes": regimes, **changes})


def test_a_steady_stream_gets_the_stationary_monitor_and_the_agent_raises_on_a_shift() -> None:
    made = decided(stream(gaussian(2400, 1)), stream(gaussian(2400, 2)))
    assert (made.kind, made.watched, made.tolerance_sd) == (Kind.STATIONARY, {}, {})
    assert made.reference.bins.shape == (len(made.reference.features), 16)
    reference = load_reference(dump_reference(made.reference))  # as a device reads it
    assert reference.claim.rows_per_alarm == CLAIM_ROWS
    assert reference.claim.replayed_rows == 4800
    assert "by construction" in reference.claim.text
    plan = MonitorPlan(service="plant", index=0, engines=("plant",), channels=FEATURES, classes=2, view="features")
    monitor = Monitor(plan, reference)
    moved = gaussian(1600, 3)
    moved[800:, 2] += 1.0
    records = np.zeros(len(moved), RECORD)
    records["rows"], records["view_width"], records["sequence"] = 1, len(FEATURES), np.arange(len(moved))
    records["view"][:, : len(FEATURES)] = moved
    records["predicted"] = np.random.default_rng(4).integers(0, 2, len(moved))
    records["arrival_ns"] = np.arange(len(moved)) * 10**7
    records["data_time_s"] = np.nan
    assert not [event for event in monitor.observe(records[:800]) if isinstance(event, AlarmRaised)]
    raised = [event for event in monitor.observe(records[800:]) if isinstance(event, AlarmRaised)]
    assert raised[0].channels[0] == "tilt"


def test_season_and_memory_are_taken_out_by_the_times_of_the_data() -> None:
    rows = stream(seasonal(4000, 1, 0), timed=True)
    held_out = stream(seasonal(2000, 2, 4000), begin=4000, timed=True)
    made = decided(rows, held_out)
    assert made.kind is Kind.STATIONARY
    assert not made.watched
    shifted = stream(held_out.features + np.array([0, 1.5, 0, 0]), begin=4000, timed=True)
    assert alarms_of(made.reference, shifted)[0].channels[0] == "heat"


def test_a_feature_that_wanders_is_watched_only_and_the_others_stay() -> None:
    x = gaussian(4000, 5)
    x[:, 1] *= np.exp(np.arange(4000) / 500)
    made = decided(stream(x[:2400]), stream(x[2400:]))
    assert made.kind is Kind.STATIONARY
    assert list(made.watched) == ["heat"]
    assert "unstable in the replay" in made.watched["heat"]
    reference = load_reference(dump_reference(made.reference))
    assert reference.watched == ("heat",)
    assert reference.stationary.columns.tolist() == [0, 2, 3]


def test_a_small_wandering_is_tolerated_before_a_feature_is_given_up() -> None:
    x = gaussian(6000, 6)
    x[3000:, 0] += 0.2
    made = decided(stream(x[:3000]), stream(x[3000:]))
    assert made.kind is Kind.STATIONARY
    assert not made.watched
    assert 0.0 < made.tolerance_sd["flow"] <= 0.5
    assert set(made.tolerance_sd) == {"flow"}


def test_a_stream_that_is_nowhere_stable_is_watched_only() -> None:
    x = gaussian(3000, 7) * np.exp(np.arange(3000) / 500)[:, None]  # neither a season nor lags make it steady
    made = decided(stream(x[:1800]), stream(x[1800:]))
    assert made.kind is Kind.WATCHED
    assert drift_monitor(load_reference(dump_reference(made.reference))) is None
    assert set(made.watched) == set(FEATURES)
    assert made.reference.claim.rows_per_alarm == 0
    assert made.reference.claim.text.startswith("nothing is claimed, the view is watched only: stationary:")


def regimes(rows: int, seed: int, recordings: int = 12) -> ViewRows:
    levels = np.random.default_rng(8).normal(0, 6, (recordings, len(FEATURES)))
    number = np.arange(rows) * recordings // rows
    return ViewRows(levels[number] + 0.5 * gaussian(rows, seed), number % 2, number)


@pytest.mark.parametrize("rows", [240, 720])
def test_a_stream_of_regimes_gets_the_regime_monitor_with_the_same_reference(rows: int) -> None:
    seen, held_out = regimes(rows, 1), regimes(rows, 2)
    made = decided(seen, held_out)
    assert made.kind is Kind.REGIMES
    plain = build_reference(seen, NAMES, guard=GUARD, held_out=held_out)
    assert dump_reference(made.reference) == dump_reference(plain)
    told = "stationary: not tried, 240" if rows == 240 else "stationary: quiet but not able, 0 % of shifts by 1 sd"
    assert any(line.startswith(told) for line in made.because)


def test_too_few_rows_for_any_monitor_are_refused_with_both_reasons() -> None:
    with pytest.raises(ReferenceRefused, match=r"240 rows are fewer than 500.*1 recording"):
        decided(stream(gaussian(240, 1)), stream(gaussian(240, 2)))


def test_shuffled_rows_are_refused_with_what_to_do() -> None:
    good = stream(gaussian(1000, 1), recordings=4, timed=True)
    order = np.random.default_rng(1).permutation(1000)
    with pytest.raises(ReferenceRefused, match="interleaved: 4 of them") as refused:
        decided(good[order], good)
    assert "do not shuffle" in refused.value.hint
    swapped = np.arange(1000)
    swapped[[10, 11]] = 11, 10
    with pytest.raises(ReferenceRefused, match="row 11 is earlier"):
        decided(good, good[swapped])


def test_a_count_of_alarms_contradicts_a_claim_when_it_is_improbable_under_it() -> None:
    assert not contradicts(0, 10**9, 10_000)
    assert contradicts(1, 500, 10_000)  # chance .0488
    assert not contradicts(1, 600, 10_000)
    assert not contradicts(3, 10_000, 10_000)  # .080
    assert contradicts(4, 10_000, 10_000)  # .019
