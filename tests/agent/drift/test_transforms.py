"""Season and lags against their definitions; gaps and missing values never leak across."""

import math
from dataclasses import replace

import numpy as np
import pytest

from agent.drift.models import StationaryModel
from agent.drift.transforms import SEASON, SEASON_TERMS, Transform, season_terms
from tests.agent.drift.stationary_streams import fit, gaussian

W = 3


@pytest.fixture(scope="module")
def plain() -> StationaryModel:
    return fit(gaussian(600, seed=1, width=W))


def lagged(model: StationaryModel, gap_s: float = 15.0) -> StationaryModel:
    """The first feature of order 2, the second of order 1, the third of none."""
    lags = np.array([[0.5, 0.8, 0.0], [0.2, 0.0, 0.0]], dtype=np.float32)
    return replace(model, lags=lags, gap_s=gap_s)


def test_without_season_and_lags_rows_pass_as_they_are(plain: StationaryModel) -> None:
    rows = gaussian(10, seed=2, width=W)
    assert Transform(plain).apply(rows, np.full(10, np.nan)) is rows


def test_the_residual_is_what_the_rows_before_do_not_explain(plain: StationaryModel) -> None:
    model = lagged(plain)
    x = gaussian(40, seed=3, width=W)
    got = Transform(model).apply(x, np.arange(40) * 10.0)
    for t in range(2, 40):
        assert got[t, 0] == pytest.approx(
            x[t, 0] - float(model.lags[0, 0]) * x[t - 1, 0] - float(model.lags[1, 0]) * x[t - 2, 0]
        )
        assert got[t, 1] == pytest.approx(x[t, 1] - float(model.lags[0, 1]) * x[t - 1, 1])
    assert (got[:, 2] == x[:, 2]).all()
    assert np.isnan(got[:2, 0]).all()
    assert np.isnan(got[0, 1])


def test_after_a_gap_history_begins_anew(plain: StationaryModel) -> None:
    x, time_s = gaussian(30, seed=3, width=W), np.arange(30) * 10.0
    time_s[12:] += 100.0
    time_s[20:] -= 500.0  # a clock that was set back
    got = Transform(lagged(plain)).apply(x, time_s)
    assert np.flatnonzero(np.isnan(got[:, 0])).tolist() == [0, 1, 12, 13, 20, 21]
    assert np.flatnonzero(np.isnan(got[:, 1])).tolist() == [0, 12, 20]
    assert np.isfinite(got[:, 2]).all()


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 21])
def test_pieces_give_what_the_whole_gives_also_at_a_gap_and_after_a_restart(plain: StationaryModel, cut: int) -> None:
    x, time_s = gaussian(30, seed=3, width=W), np.arange(30) * 10.0
    time_s[12:] += 100.0
    x[5, 0] = np.nan
    model = lagged(plain)
    whole = Transform(model).apply(x, time_s)
    first, second = Transform(model), Transform(model)
    before = first.apply(x[:cut], time_s[:cut])
    second.restore(first.state())
    assert np.array_equal(np.concatenate([before, second.apply(x[cut:], time_s[cut:])]), whole, equal_nan=True)


def test_a_missing_value_leaves_its_feature_without_residual_until_history_is_whole(plain: StationaryModel) -> None:
    x = gaussian(20, seed=4, width=W)
    x[10, 0] = np.nan
    got = Transform(lagged(plain)).apply(x, np.full(20, np.nan))
    assert np.flatnonzero(np.isnan(got[:, 0])).tolist() == [0, 1, 10, 11, 12]
    assert np.flatnonzero(np.isnan(got[:, 1])).tolist() == [0]


def test_season_terms_are_harmonics_of_the_seconds() -> None:
    time_s = np.array([0.0, 1.7e9, 86_400.0 * 3.25])
    terms = season_terms(time_s)
    assert terms.shape == (3, SEASON_TERMS)
    for row, t in zip(terms, time_s, strict=True):
        for at, (period, harmonic) in enumerate(SEASON):
            angle = 2 * math.pi * harmonic * t / period
            assert row[1 + 2 * at] == pytest.approx(math.cos(angle), abs=1e-5)
            assert row[2 + 2 * at] == pytest.approx(math.sin(angle), abs=1e-5)


def test_a_season_is_taken_out_where_there_is_one_and_needs_a_time(plain: StationaryModel) -> None:
    season = np.zeros((SEASON_TERMS, W), dtype=np.float32)
    scale = np.zeros_like(season)
    season[:2, 0], scale[1, 0] = (5.0, 2.0), 0.5
    model = replace(plain, season=season, season_scale=scale)
    x, time_s = gaussian(48, seed=5, width=W), np.arange(48) * 3600.0
    wave = np.cos(2 * np.pi * time_s / 86_400)
    given = x.copy()
    given[:, 0] = 5.0 + 2.0 * wave + x[:, 0] * np.exp(0.5 * wave)
    assert Transform(model).apply(given, time_s) == pytest.approx(x)
    time_s[7] = np.nan
    got = Transform(model).apply(given, time_s)
    assert np.isnan(got[7]).tolist() == [True, False, False]
