"""What is fitted: transforms only where the rows show them, charges with what rows leave open, bounds by proof."""

import math
import warnings

import numpy as np
import pytest

from agent.drift import dump_reference
from agent.drift.edetector import MEAN_BETS
from compressor.errors import ReferenceRefused
from compressor.stationary import (
    ThinReference,
    _chi_square_above,
    _chi_square_quantile,
    beyond_extremes,
    binomial_above,
    fit_stationary,
)
from tests.agent.drift.stationary_streams import autoregressive, fit, gaussian, reference_of


def test_fewer_than_500_rows_are_refused_and_fewer_than_2000_warned_of() -> None:
    with pytest.raises(ReferenceRefused, match="500 are needed"):
        fit_stationary(gaussian(499, seed=1), None, claim_rows=1000)
    with pytest.warns(ThinReference, match=r"no shift below 0\.13"):
        fit_stationary(gaussian(1000, seed=1), None, claim_rows=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_stationary(gaussian(2000, seed=1), None, claim_rows=1000)


def test_a_feature_that_never_differs_or_is_mostly_missing_is_refused() -> None:
    dead, gone = gaussian(600, seed=1), gaussian(600, seed=1)
    dead[:, 2] = 5.0
    gone[:400, 1] = np.nan
    for rows, feature in ((dead, "2"), (gone, "1")):
        with pytest.raises(ReferenceRefused, match=feature):
            fit(rows)


def test_the_same_rows_make_the_same_bytes() -> None:
    first, second = (dump_reference(reference_of(fit(autoregressive(1500, seed=2)))) for _ in range(2))
    assert first == second


def test_lags_are_fitted_where_rows_depend_on_each_other_and_nowhere_else() -> None:
    rows = gaussian(6000, seed=3)
    rows[:, 1] = autoregressive(6000, seed=4)[:, 1]
    model = fit(rows)
    assert model.lags[0, 1] == pytest.approx(0.9, abs=0.03)
    assert (model.lags[:, [0, 2, 3]] == 0).all()


def test_lags_do_not_reach_over_a_gap() -> None:
    rows, times_s = autoregressive(6000, seed=4), np.arange(6000) * 10.0
    pieces = np.arange(6000) // 3
    model = fit(rows, times_s + 1000.0 * pieces)
    assert model.gap_s == pytest.approx(15.0)
    assert np.abs(model.lags).max() < 1.3


def test_a_daily_season_is_fitted_only_where_it_is() -> None:
    times_s = 1.7e9 + np.arange(3000) * 1800.0
    rows = gaussian(3000, seed=5)
    rows[:, 2] += 1.5 * np.sin(2 * np.pi * times_s / 86_400)
    model = fit(rows, times_s)
    assert np.hypot(*model.season[1:3, 2]) == pytest.approx(1.5, abs=0.1)
    assert (model.season[:, [0, 1, 3]] == 0).all()
    assert fit(rows).season.shape[0] == 0


def test_a_wandering_stream_is_not_taken_for_a_season() -> None:
    """Four days of a random walk that returns slowly fit any daily wave well, by chance."""
    rows = autoregressive(2000, seed=6, phi=0.99)
    assert not fit(rows, np.arange(2000) * 172.8).season.any()


def test_a_charge_is_the_gaussian_one_and_what_the_rows_leave_open() -> None:
    small, large = fit(gaussian(2000, seed=7)), fit(gaussian(20_000, seed=7))
    for at, bet in enumerate(MEAN_BETS):
        bands = [float((model.mean_charge[at] - bet * bet / 2).mean()) / abs(bet) for model in (small, large)]
        assert 2.5 / math.sqrt(2000) <= bands[0] <= 6.5 / math.sqrt(2000)
        assert bands[0] / bands[1] == pytest.approx(math.sqrt(10), rel=0.3)


def test_a_tolerance_that_is_wider_takes_the_place_of_the_band() -> None:
    model = fit(gaussian(4000, seed=7), tolerance_sd=0.3)
    assert model.mean_charge[1] == pytest.approx(MEAN_BETS[1] ** 2 / 2 + 0.3 * MEAN_BETS[1], abs=0.01)


def test_binomial_bounds_are_exact() -> None:
    for count, n in ((0, 100), (3, 50), (40, 200)):
        p = binomial_above(count, n, 0.01)
        assert sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count + 1)) == pytest.approx(
            0.01, rel=1e-6
        )
    assert binomial_above(5, 5, 0.01) == 1.0


def test_what_lies_beyond_the_extremes_is_bounded_for_any_law() -> None:
    bound = beyond_extremes(300, 0.05)
    generator = np.random.default_rng(8)
    outside = []
    for _ in range(2000):
        rows = generator.random(300)  # any continuous law is this one after its own distribution function
        outside.append(1 - (rows.max() - rows.min()))
    assert np.mean(np.array(outside) > bound) == pytest.approx(0.05, abs=0.02)


def test_chi_square_numbers_are_those_of_the_tables() -> None:
    assert _chi_square_above(18.307, 10) == pytest.approx(0.05, abs=1e-4)
    assert _chi_square_quantile(0.99, 32) == pytest.approx(53.486, rel=2e-3)
    assert _chi_square_quantile(0.99, 4) == pytest.approx(13.277, rel=1e-2)


def test_a_reference_of_32_features_fits_in_24_kb() -> None:
    rows = autoregressive(2500, seed=9, width=32)
    assert len(dump_reference(reference_of(fit(rows), width=32))) <= 24 * 1024


def test_values_that_depend_on_the_rows_before_are_no_categories() -> None:
    rows = gaussian(3000, seed=10)
    rows[:, 0] = np.cumsum(np.random.default_rng(1).random(3000) < 0.02) % 2  # a door
    rows[:, 1] = np.random.default_rng(2).integers(0, 3, 3000)
    stays = np.arange(3000) // 20 % 3
    assert fit(rows, predicted=stays, labels=3).bin_column.tolist() == [1]


def test_values_that_are_missing_in_bursts_have_the_rate_of_a_burst() -> None:
    rows = gaussian(3000, seed=11)
    rows[::20, 0] = np.nan
    for start in range(0, 3000, 100):
        rows[start : start + 5, 1] = np.nan
    rates = fit(rows).rates[1]
    assert rates[0] == pytest.approx(0.065, abs=0.015)
    assert rates[1] > 0.8
    assert rates[2] < 0.005
