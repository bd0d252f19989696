"""The channel features against a slow second writing of their definition."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drift import Combination, channel_features, combined, feature_names, window_features


def one_channel(samples: list[float]) -> list[float]:
    inner = range(1, len(samples) - 1)
    second = [abs(samples[t + 1] - 2 * samples[t] + samples[t - 1]) for t in inner]
    spike = [abs(samples[t] - statistics.median(samples[t - 1 : t + 2])) for t in inner]
    return [
        statistics.fmean(samples),
        math.log(statistics.pstdev(samples) + 1e-4),
        math.log(statistics.median(second) + 1e-4),
        math.log(max(spike) + 1e-4),
    ]


@given(st.integers(0, 2**32 - 1), st.integers(3, 130), st.integers(1, 4))
def test_features_are_those_of_the_definition(seed: int, samples: int, channels: int) -> None:
    windows = np.random.default_rng(seed).normal(0.0, 2.0, (2, samples, channels))
    expected = [
        [number for channel in range(channels) for number in one_channel(window[:, channel].tolist())]
        for window in windows
    ]
    assert channel_features(windows) == pytest.approx(np.array(expected), abs=1e-9)


def test_a_constant_channel_has_finite_features() -> None:
    features = channel_features(np.full((1, 128, 1), 0.25))
    assert features[0].tolist() == pytest.approx([0.25, math.log(1e-4), math.log(1e-4), math.log(1e-4)])


def test_roughness_is_blind_to_level_and_slope() -> None:
    ramp = np.linspace(-3.0, 3.0, 128)[None, :, None]
    assert channel_features(ramp)[0, 2] == pytest.approx(math.log(1e-4), abs=1e-6)


def test_one_odd_sample_shows_as_a_spike_of_its_height() -> None:
    window = np.zeros((1, 128, 1))
    window[0, 60, 0] = 8.0
    assert channel_features(window)[0, 3] == pytest.approx(math.log(8.0 + 1e-4))


def test_single_precision_input_is_computed_in_double() -> None:
    window = np.random.default_rng(0).normal(size=(4, 128, 6)).astype(np.float32)
    assert channel_features(window).dtype == np.float64


def test_names_follow_the_order_of_the_features() -> None:
    names = feature_names(("ax", "gx"))
    assert names[:4] == ("ax.mean", "ax.log_sd", "ax.log_roughness", "ax.log_spike")
    window = np.zeros((1, 128, 2))
    window[0, :, 1] = 5.0
    assert channel_features(window)[0, names.index("gx.mean")] == 5.0


NORM, DOT = Combination("norm(a)", (0, 1, 2)), Combination("dot(a,w)", (0, 1, 2), (3, 4, 5))


def test_lengths_and_dot_products_by_hand() -> None:
    window = np.array([[[3.0, 4.0, 0.0, 1.0, 0.0, 2.0], [0.0, 0.0, -2.0, 0.0, 0.0, 5.0], [1, 2, 2, 2, 2, 1]]])
    assert combined(window, (NORM, DOT)).tolist() == [[[5.0, 3.0], [2.0, -10.0], [3.0, 8.0]]]


def test_what_is_combined_does_not_change_when_the_sensor_is_turned() -> None:
    generator = np.random.default_rng(4)
    window = generator.normal(0.0, 2.0, (3, 50, 6))
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    turned = np.concatenate([window[:, :, :3] @ turn, window[:, :, 3:] @ turn], axis=2)
    assert np.allclose(combined(turned, (NORM, DOT)), combined(window, (NORM, DOT)))
    assert not np.allclose(channel_features(turned), channel_features(window))


def test_features_of_combinations_follow_those_of_channels() -> None:
    window = np.random.default_rng(5).normal(size=(2, 30, 6))
    features = window_features(window, (NORM, DOT))
    assert features.shape == (2, 32)
    assert np.array_equal(features[:, :24], window_features(window, ()))
    assert np.allclose(features[:, 24], np.linalg.norm(window[:, :, :3], axis=2).mean(axis=1))
