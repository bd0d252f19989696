from __future__ import annotations

import numpy as np
import pytest

from compressor import corruptions as broken

RNG = np.random.default_rng(7)
WINDOWS = RNG.standard_normal((6, 40, 6)).astype(np.float32)


def apply(corruption: broken.Corruption, windows: broken.Windows = WINDOWS) -> broken.Windows:
    return corruption(windows, np.random.default_rng(1))


@pytest.mark.parametrize(
    "corruption",
    [
        broken.dead([0]), broken.stuck([0, 1]), broken.scale([2], 9.8), broken.bias([3], 0.3), broken.noise([0], 0.5),
        broken.spikes([0, 1], 0.1, 8.0), broken.saturate([0], 0.5), broken.swap([(0, 1)]),
        broken.rotate([(0, 1)], 30), broken.hold(2), broken.lose(10), broken.stretch(1.25),
    ],
)  # fmt: skip
def test_every_corruption_keeps_shape_and_type_and_leaves_its_input_alone(corruption: broken.Corruption) -> None:
    before = WINDOWS.copy()
    out = apply(corruption)
    assert out.shape == WINDOWS.shape
    assert out.dtype == np.float32
    assert np.array_equal(before, WINDOWS)
    assert not np.array_equal(out, WINDOWS)


def test_a_stuck_channel_repeats_one_value_it_once_had() -> None:
    out = apply(broken.stuck([4]))
    assert len(np.unique(out[:, :, 4])) == 1
    assert out[0, 0, 4] in WINDOWS[:, :, 4]
    assert np.array_equal(out[:, :, :4], WINDOWS[:, :, :4])


def test_turning_by_ninety_degrees_moves_x_to_y() -> None:
    out = apply(broken.rotate([(0, 1)], 90))
    assert np.allclose(out[:, :, 1], WINDOWS[:, :, 0], atol=1e-6)
    assert np.allclose(out[:, :, 0], -WINDOWS[:, :, 1], atol=1e-6)


def test_turning_never_changes_the_length_of_a_pair() -> None:
    out = apply(broken.rotate([(0, 1)], 37))
    assert np.allclose(np.hypot(out[..., 0], out[..., 1]), np.hypot(WINDOWS[..., 0], WINDOWS[..., 1]), atol=1e-5)


def test_swapping_twice_changes_nothing() -> None:
    assert np.array_equal(apply(broken.swap([(0, 1)]), apply(broken.swap([(0, 1)]))), WINDOWS)


def test_holding_repeats_each_second_sample() -> None:
    out = apply(broken.hold(2))
    assert np.array_equal(out[:, 0::2], WINDOWS[:, 0::2])
    assert np.array_equal(out[:, 1::2], WINDOWS[:, 0::2])


def test_a_loss_repeats_the_last_sample_before_it() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None], (3, 40, 6)).copy()
    out = apply(broken.lose(10), ramp)
    steps = np.diff(out[:, :, 0], axis=1)
    assert (steps == 0).sum(axis=1).tolist() == [10, 10, 10]
    assert steps.max() == 11


def test_a_fast_clock_shows_less_time() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None], (1, 40, 6)).copy()
    assert np.allclose(apply(broken.stretch(1.25), ramp)[0, :, 0], np.arange(40) / 1.25, atol=1e-5)


def test_spikes_hit_about_the_stated_share() -> None:
    windows = np.zeros((100, 100, 1), np.float32)
    out = apply(broken.spikes([0], 0.01, 8.0), windows)
    assert set(np.unique(out)) == {-8.0, 0.0, 8.0}
    assert 60 < (out != 0).sum() < 140  # 100 expected, sd 10
