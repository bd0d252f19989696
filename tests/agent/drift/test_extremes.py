"""A finite number of any size in one row: no sum, score or suspicion is ruined by it, then or later."""

import numpy as np
import pytest

from agent.drift import FixedPoint, MomentWindow, Reference, RegimeMonitor, StationaryMonitor, drift_monitor
from tests.agent.drift.conftest import REGIMES, RegimeStream
from tests.agent.drift.stationary_streams import NAMES, fit, reference_of

WILD = [1e30, -1e30, float(np.finfo(np.float32).max), float(np.finfo(np.float32).min)]


@pytest.mark.parametrize("wild", WILD)
def test_a_window_of_sums_takes_the_clip_and_no_more(wild: float) -> None:
    fixed = FixedPoint((0.0, 5.0), (1.0, 1e-6))
    rows = np.random.default_rng(0).normal(size=(100, 2)) * fixed.scale + fixed.centre
    clean = MomentWindow.empty(fixed).add(rows, np.full(100, -1))
    broken = rows.copy()
    broken[7] = wild
    told = MomentWindow.empty(fixed).add(broken, np.full(100, -1))
    for at, (low, high) in enumerate(zip(clean.sums, told.sums, strict=True)):
        assert abs(low - high) <= 2 * fixed.clip * (1 << fixed.fraction_bits)
        assert abs(clean.squares[at] - told.squares[at]) <= (fixed.clip * (1 << fixed.fraction_bits)) ** 2
    assert told.rows == 100
    assert np.isfinite(told.mean()).all()
    assert np.isfinite(told.sd()).all()


@pytest.mark.parametrize("wild", WILD)
def test_one_wild_row_is_no_drift_of_regimes_and_leaves_no_trace(
    stream: RegimeStream, reference: Reference, wild: float
) -> None:
    rows = stream.rows(8, seed=5)
    broken = rows.features.copy()
    broken[40, 3] = wild
    monitor, clean = RegimeMonitor(reference), RegimeMonitor(reference)
    time_s = np.full(len(broken), np.nan)
    assert monitor.follow(broken, rows.predicted, time_s) == clean.follow(rows.features, rows.predicted, time_s) == []
    assert monitor.statistics() == clean.statistics()
    assert monitor.suspicion() == clean.suspicion()


@pytest.mark.parametrize("wild", WILD)
def test_blame_is_of_the_fault_not_of_one_wild_number(
    stream: RegimeStream, reference: Reference, wild: float
) -> None:
    rows = stream.rows(16, seed=6)
    broken = rows.features.copy()
    broken[:, 4:8] += 40.0  # of ay
    broken[120, 0] = wild  # of ax, once
    monitor = RegimeMonitor(reference)
    monitor.follow(broken, rows.predicted, np.full(len(broken), np.nan))
    assert monitor.raised
    assert max(monitor.blame(), key=lambda name: monitor.blame()[name]) == "ay"
    assert np.isfinite(list(monitor.blame().values())).all()
    assert len(broken) == 16 * REGIMES


@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize("lag", [0.0, 0.8])
def test_one_wild_row_is_no_drift_of_a_stationary_stream(wild: float, lag: float) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(3000, len(NAMES)))
    for row in range(1, len(x)):
        x[row] += lag * x[row - 1]
    monitor = drift_monitor(reference_of(fit(x[:2000])))
    assert isinstance(monitor, StationaryMonitor)
    later = x[2000:].copy()
    later[100, 1] = wild
    found = monitor.follow(later, np.full(len(later), -1), np.full(len(later), np.nan))
    assert found == []
    assert np.isfinite(list(monitor.statistics().values())).all()
