from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agent.drift.views import Combination, channel_features, combined, window_features
from compressor.views import ChannelFeatures, choose, combine, median

pytestmark = pytest.mark.torch


def told(windows: np.ndarray) -> np.ndarray:
    return ChannelFeatures()(torch.from_numpy(windows).transpose(1, 2)).numpy()


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 20, 3), elements=st.floats(-40, 40, width=32)))
def test_the_graphs_view_equals_the_monitors(windows: np.ndarray) -> None:
    assert np.abs(told(windows) - channel_features(windows)).max() <= 1e-4


@pytest.mark.parametrize("value", [0.0, 9.80665, 13.109796, -34.9])
def test_a_constant_channel_gives_the_floor_exactly(value: float) -> None:
    windows = np.full((1, 128, 2), value, np.float32)
    expected = [np.float32(value), *[np.log(np.float32(1e-4))] * 3] * 2
    assert np.allclose(told(windows)[0], expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 126])
def test_the_median_is_numpys_also_with_ties(count: int) -> None:
    values = np.random.default_rng(count).integers(0, 5, (7, count)).astype(np.float32)
    assert np.array_equal(median(torch.from_numpy(values)).numpy()[:, 0], np.median(values, axis=1))


COMBINATIONS = (Combination("norm", (0, 1, 2)), Combination("dot", (0, 1, 2), (3, 4, 5)), Combination("odd", (0, 5)))


def test_the_graphs_combinations_equal_the_monitors() -> None:
    windows = np.random.default_rng(1).normal(0.0, 3.0, (7, 64, 6)).astype(np.float32)
    series = combine(torch.from_numpy(windows).transpose(1, 2), COMBINATIONS)
    expected = np.concatenate([windows, combined(windows, COMBINATIONS)], axis=2)
    assert np.allclose(series.numpy(), expected.transpose(0, 2, 1), rtol=1e-6, atol=1e-6)
    assert np.abs(ChannelFeatures()(series).numpy() - window_features(windows, COMBINATIONS)).max() <= 1e-4


@pytest.mark.parametrize("reads", [[0, 1, 2], [0, 2], [6, 7], [8], [1, 7, 8]])
def test_a_network_gets_the_series_it_reads_in_their_order(reads: list[int]) -> None:
    x = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(choose(x, COMBINATIONS, reads), combine(x, COMBINATIONS)[:, reads])
