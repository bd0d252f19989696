"""The guard on hand-made windows: every expectation here was worked out on paper."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.errors import ConfigError
from agent.contract.plan import ChannelPlan, GuardPlan, GuardPolicy
from agent.guard import KINDS, Guard, Verdict

# bit i = channel i
AX, AY, AZ, GX, GY, GZ = (1 << i for i in range(6))
CHANNELS = tuple(
    ChannelPlan(name, "accel" if name[0] == "a" else "gyro", -limit, limit, mean)
    for name, limit, mean in [
        ("ax", 8.0, 0.5), ("ay", 8.0, 0.0), ("az", 8.0, 1.0), ("gx", 20.0, 0.0), ("gy", 20.0, 0.0), ("gz", 20.0, 0.0)
    ]
)  # fmt: skip


def guard(**changes: object) -> Guard:
    return Guard(GuardPlan("window", CHANNELS, **changes))


def sound(rows: int = 1) -> np.ndarray:
    """Each channel a sine of amplitude 1 with its own phase: rms 1/sqrt(2), never constant, never repeating."""
    time = np.arange(128)[:, None]
    phase = np.arange(6)[None, :]
    one = np.sin(2 * math.pi * time / 32 + 0.37 * phase + 0.001 * time)
    return np.repeat(one[None], rows, axis=0).astype(np.float32)


def found(verdict: Verdict, row: int = 0) -> dict[str, int]:
    """The kinds with a finding in a row, with their bits."""
    return {kind: bits for kind, bits in zip(KINDS, verdict.row_bits(row), strict=True) if bits}


def test_a_sound_window_passes_untouched() -> None:
    x = sound()
    verdict = guard().check(x)
    assert verdict == Verdict(x)
    assert verdict.x is x
    assert found(verdict) == {}


def test_channels_at_zero_are_dead() -> None:
    x = sound()
    x[:, :, 3:] = 0
    verdict = guard().check(x)
    assert found(verdict) == {"dead": GX | GY | GZ}
    assert verdict.text == "dead:gx,gy,gz"
    assert verdict.refusal == ""
    assert verdict.x is x


def test_a_single_axis_at_zero_is_dead_while_its_neighbours_move() -> None:
    x = sound()
    x[:, :, 3] = 0
    assert found(guard().check(x)) == {"dead": GX}


def test_a_channel_of_faint_noise_is_dead_and_one_above_the_limit_is_not() -> None:
    # +-a alternating has a standard deviation of exactly a
    signs = np.tile([1.0, -1.0], 64)
    x = sound()
    x[0, :, 0] = 0.3 + 0.0009 * signs
    assert found(guard().check(x)) == {"dead": AX}
    x[0, :, 0] = 0.3 + 0.0011 * signs
    assert found(guard().check(x)) == {}


def test_a_channel_frozen_at_a_value_is_stuck_while_its_neighbours_move() -> None:
    x = sound()
    x[:, :, 0] = 0.25
    assert found(guard().check(x)) == {"stuck": AX}


def test_a_group_frozen_as_a_whole_is_dead() -> None:
    x = sound()
    x[:, :, :3] = [0.1, 0.2, 0.9]
    assert found(guard().check(x)) == {"dead": AX | AY | AZ}


def test_stuck_begins_at_nine_tenths_of_the_window() -> None:
    # 0.9 * 128 = 115.2: 115 equal samples are too few, 116 are enough
    for equal, expected in ((115, {}), (116, {"stuck": AX})):
        x = sound()
        x[0, :equal, 0] = 0.25
        assert found(guard().check(x)) == expected


def test_single_different_samples_in_between_do_not_hide_a_stuck_channel() -> None:
    x = sound()
    x[0, :, 0] = 0.25
    x[0, 5::11, 0] = np.linspace(1, 2, 12)  # 12 others: 116 of 128 repeat
    assert found(guard().check(x)) == {"stuck": AX}


def test_sample_and_hold_at_half_the_rate_is_not_stuck() -> None:
    x = np.repeat(sound()[:, ::2], 2, axis=1)
    assert found(guard().check(x)) == {}


def test_values_outside_the_range_are_told_by_channel() -> None:
    x = sound()
    x[0, 7, 1] = 8.5
    x[0, 9, 5] = -20.5
    verdict = guard().check(x)
    assert found(verdict) == {"range": AY | GZ}
    assert verdict.text == "range:ay,gz"
    assert verdict.x is x  # the default policy passes them


def test_the_limits_themselves_are_allowed() -> None:
    x = sound()
    x[0, 7, 1], x[0, 8, 1] = 8.0, -8.0
    assert found(guard().check(x)) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_default(bad: float) -> None:
    x = sound()
    x[0, 3, 2] = bad
    verdict = guard().check(x)
    assert found(verdict) == {"not_finite": AZ}
    assert verdict.refusal == "input 'window' holds NaN or infinity in channel az"


def test_infinity_does_not_pass_an_infinite_limit() -> None:
    plan = GuardPlan("x", (ChannelPlan("a", "g", -math.inf, math.inf, 0.0), ChannelPlan("b", "g", -1, 1, 0.0)))
    x = sound()[:, :, :2]
    x[0, 3, 0] = math.inf
    assert found(Guard(plan).check(x)) == {"not_finite": 1}


def test_imputing_writes_the_channels_mean() -> None:
    x = sound()
    x[0, 3, 2], x[0, 4, 0], x[0, 5, 1] = math.nan, math.inf, 9.0
    verdict = guard(not_finite=GuardPolicy.IMPUTE, out_of_range=GuardPolicy.IMPUTE).check(x)
    expected = x.copy()
    expected[0, 3, 2], expected[0, 4, 0], expected[0, 5, 1] = 1.0, 0.5, 0.0
    np.testing.assert_array_equal(verdict.x, expected)
    assert found(verdict) == {"not_finite": AX | AZ, "range": AY}
    assert math.isnan(x[0, 3, 2])  # the request itself is not changed
    assert verdict.x.dtype == np.float32


def test_clipping_moves_to_the_nearest_allowed_number() -> None:
    x = sound()
    x[0, 5, 1], x[0, 6, 3], x[0, 7, 0] = 9.0, -1000.0, math.nan
    verdict = guard(not_finite=GuardPolicy.CLIP, out_of_range=GuardPolicy.CLIP).check(x)
    assert (verdict.x[0, 5, 1], verdict.x[0, 6, 3], verdict.x[0, 7, 0]) == (8.0, -20.0, 0.5)


@pytest.mark.parametrize("datatype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("policy", [GuardPolicy.IMPUTE, GuardPolicy.CLIP])
def test_a_repaired_input_keeps_its_datatype(datatype: type[np.floating], policy: GuardPolicy) -> None:
    x = sound().astype(datatype)
    x[0, 5, 0], x[0, 6, 1] = np.nan, 99
    repaired = guard(not_finite=policy, out_of_range=policy).check(x).x
    assert repaired.dtype == x.dtype
    assert repaired[0, 5, 0] == 0.5
    assert repaired[0, 6, 1] == (0.0 if policy is GuardPolicy.IMPUTE else 8.0)
    x[0, 5, 0], x[0, 6, 1] = repaired[0, 5, 0], repaired[0, 6, 1]
    assert (repaired == x).all()


def test_limits_and_sums_beyond_half_precision_are_judged_in_single_precision() -> None:
    channel = ChannelPlan("raw", "counts", -1e6, 1e6, 0.0)
    half = Guard(GuardPlan("window", (channel,), GuardPolicy.IMPUTE, GuardPolicy.CLIP))
    x = (sound()[:, :, :1] * 60_000).astype(np.float16)
    assert half.check(x) == Verdict(x)
    x[0, 5, 0] = np.inf
    verdict = half.check(x)
    assert (found(verdict), verdict.x[0, 5, 0], verdict.x.dtype) == ({"not_finite": 1}, 0.0, np.float16)


def test_passing_hands_on_what_is_not_finite_as_it_is() -> None:
    x = sound()
    x[0, 7, 0] = math.nan
    verdict = guard(not_finite=GuardPolicy.PASS, out_of_range=GuardPolicy.CLIP).check(x)
    assert verdict.refusal == ""
    assert math.isnan(verdict.x[0, 7, 0])


def test_range_can_be_refused() -> None:
    x = sound()
    x[0, 5, 1] = 9.0
    assert "outside its allowed range in channel ay" in guard(out_of_range=GuardPolicy.REFUSE).check(x).refusal


REFUSE, IMPUTE, CLIP, PASS = GuardPolicy


def of_channels(missing: dict[str, GuardPolicy], ranges: dict[str, GuardPolicy], **changes: Any) -> Guard:
    """A guard whose named channels have policies of their own."""
    channels = tuple(
        replace(one, not_finite=missing.get(one.name), out_of_range=ranges.get(one.name)) for one in CHANNELS
    )
    return Guard(GuardPlan("window", channels, **changes))


def test_each_channel_may_have_its_own_policy() -> None:
    x = sound()
    x[0, 3, :4], x[0, 5, :4] = math.nan, 99.0
    policies = {"ax": IMPUTE, "ay": PASS, "az": CLIP, "gx": IMPUTE}
    ranges = {"ax": CLIP, "ay": PASS, "az": IMPUTE}  # gx: as the input
    verdict = of_channels(policies, ranges, out_of_range=CLIP).check(x)
    assert verdict.refusal == ""
    assert found(verdict) == {"not_finite": AX | AY | AZ | GX, "range": AX | AY | AZ | GX}
    mean = [one.mean for one in CHANNELS]
    np.testing.assert_array_equal(verdict.x[0, 3, :4], [mean[0], math.nan, mean[2], mean[3]])
    np.testing.assert_array_equal(verdict.x[0, 5, :4], [8.0, 99.0, mean[2], 20.0])
    untouched = np.delete(np.arange(x.shape[1]), [3, 5])
    np.testing.assert_array_equal(verdict.x[:, untouched], x[:, untouched])


def test_one_strict_channel_refuses_and_is_the_one_named() -> None:
    x = sound()
    x[0, 3, 0] = x[0, 3, 1] = math.nan
    lenient = of_channels({"ax": REFUSE}, {}, not_finite=PASS)
    assert lenient.check(x).refusal == "input 'window' holds NaN or infinity in channel ax"
    x[0, 3, 0] = 0.1
    assert lenient.check(x).refusal == ""
    assert math.isnan(lenient.check(x).x[0, 3, 1])
    strict = of_channels({}, {"ay": REFUSE}, out_of_range=CLIP)
    x[0, 3, 0], x[0, 3, 1] = 99.0, 99.0
    assert strict.check(x).refusal == "input 'window' is outside its allowed range in channel ay"


@given(st.lists(st.tuples(st.sampled_from([*GuardPolicy, None]), st.sampled_from([*GuardPolicy, None])), min_size=6,
                max_size=6), st.sampled_from(GuardPolicy), st.sampled_from(GuardPolicy))  # fmt: skip
def test_a_channels_policy_is_what_an_input_with_that_policy_would_do_to_it(
    own: list[tuple[GuardPolicy | None, GuardPolicy | None]], not_finite: GuardPolicy, out_of_range: GuardPolicy
) -> None:
    x = sound()
    x[0, 2], x[0, 4] = math.nan, 1e30
    channels = tuple(replace(one, not_finite=a, out_of_range=b) for one, (a, b) in zip(CHANNELS, own, strict=True))
    verdict = Guard(GuardPlan("window", channels, not_finite, out_of_range)).check(x)
    refused = ""
    for at, (a, b) in enumerate(own):
        alone = Guard(GuardPlan("window", CHANNELS, a or not_finite, b or out_of_range)).check(x)
        refused += alone.refusal
        if not verdict.refusal:
            np.testing.assert_array_equal(verdict.x[:, :, at], alone.x[:, :, at])
    assert bool(verdict.refusal) == bool(refused)


@pytest.mark.parametrize("policy", ["not_finite", "out_of_range"])
def test_what_would_be_refused_is_imputed_in_channels_that_are_not_read(policy: str) -> None:
    refusing = guard(**{policy: GuardPolicy.REFUSE})
    bad = math.nan if policy == "not_finite" else 99.0
    x = sound()
    x[0, 5, 3] = bad
    assert refusing.check(x).refusal
    verdict = refusing.check(x, reads=("ax", "ay", "az"))
    assert (verdict.refusal, verdict.x[0, 5, 3]) == ("", 0.0)
    assert found(verdict) == {"not_finite" if policy == "not_finite" else "range": GX}
    x[0, 6, 2] = bad  # and one that is read: refused, naming that one alone
    assert refusing.check(x, reads=("ax", "ay", "az")).refusal.endswith("in channel az")
    assert refusing.check(x, reads=()).refusal == ""


# rms of each sound channel is 0.707; the reference says 0.5..1.0, the factor 2.5: allowed are 0.2..2.5
RMS = {"accel": (0.5, 1.0), "gyro": (0.5, 1.0)}


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (9.81, {"scale": AX | AY | AZ, "range": AX | AY | AZ}),
        (4.0, {"scale": AX | AY | AZ}),  # 2.83 > 2.5
        (3.3, {}),  # 2.33
        (0.4, {}),  # 0.283
        (0.2, {"scale": AX | AY | AZ}),  # 0.141 < 0.2
    ],
)
def test_a_group_in_another_unit_is_a_scale_finding(factor: float, expected: dict[str, int]) -> None:
    x = sound()
    x[:, :, :3] *= np.float32(factor)
    assert found(guard(group_rms=RMS).check(x)) == expected


def test_a_dead_group_is_not_also_a_scale_finding() -> None:
    x = sound()
    x[:, :, 3:] = 0
    assert found(guard(group_rms=RMS).check(x)) == {"dead": GX | GY | GZ}


def test_one_loud_axis_counts_with_its_group() -> None:
    # rms of the group: sqrt((49 + .5 + .5) / 3) with one axis at constant magnitude 7 = 4.08 > 2.5
    x = sound()
    x[0, :, 0] = 7.0 * np.tile([1.0, -1.0], 64)
    assert found(guard(group_rms=RMS).check(x)) == {"scale": AX | AY | AZ}


def test_rows_of_a_batch_are_judged_one_by_one() -> None:
    x = sound(rows=3)
    x[0, :, 3:] = 0
    x[2, :, 1] = 0.5
    verdict = guard().check(x)
    assert [found(verdict, row) for row in range(3)] == [{"dead": GX | GY | GZ}, {}, {"stuck": AY}]
    assert verdict.text == "dead:gx,gy,gz;stuck:ay"


def test_short_inputs_say_nothing_about_movement() -> None:
    x = np.zeros((1, 6), np.float32)
    assert found(guard().check(x)) == {}
    x[0, 1] = 9
    assert found(guard().check(x)) == {"range": AY}


def test_a_lonely_channel_has_all_others_as_neighbours() -> None:
    channels = (ChannelPlan("p", "pressure", -9, 9, 0), ChannelPlan("t", "temperature", -9, 9, 0))
    x = sound()[:, :, :2]
    x[:, :, 0] = 0.5
    assert found(Guard(GuardPlan("x", channels)).check(x)) == {"stuck": 1}


def test_without_channels_only_finiteness_is_checked() -> None:
    x = np.zeros((2, 5), np.float32)
    assert Guard(GuardPlan("x")).check(x).bits is None
    x[1, 2] = math.nan
    verdict = Guard(GuardPlan("x")).check(x)
    assert [found(verdict, row) for row in range(2)] == [{}, {"not_finite": 1}]
    assert verdict.refusal == "input 'x' holds NaN or infinity"
    assert Guard(GuardPlan("x", not_finite=GuardPolicy.IMPUTE)).check(x).x[1, 2] == 0
    assert Guard(GuardPlan("x", not_finite=GuardPolicy.PASS)).check(x).refusal == ""


def test_whole_numbers_are_never_wrong() -> None:
    x = np.zeros((1, 128, 6), np.int32)
    assert guard().check(x) == Verdict(x)


def test_more_channels_than_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="65 channels"):
        Guard(GuardPlan("x", tuple(ChannelPlan(str(i), "g", 0, 1, 0) for i in range(65))))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), length=st.sampled_from([1, 8, 16, 128]))
def test_the_cheap_test_never_passes_what_the_exact_one_would_find(
    data: st.DataObject, rows: int, length: int
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = random.normal(scale=10.0 ** random.integers(-4, 2, 6), size=(rows, length, 6)).astype(np.float32)
    for _ in range(data.draw(st.integers(0, 3))):
        row, channel, first = random.integers(rows), random.integers(6), random.integers(length)
        x[row, first:, channel] = random.choice([0.0, 0.5, 1e-4, 30.0, math.nan, math.inf])
    judge = guard(group_rms=RMS)
    series = np.ascontiguousarray(x.transpose(0, 2, 1))
    if judge._is_clean(x, series):
        with np.errstate(all="ignore"):
            assert not any(flags.any() for flags in judge._judge(series))


# --- memory that is watched ----------------------------------------------------------------------------------
def watched(x: np.ndarray, **changes: object) -> tuple[bool, bool]:
    """What `watch` says of a window, and whether `check` finds nothing in it."""
    one, memory = guard(**changes), np.zeros_like(x)
    clean = one.watch(memory)
    memory[:] = x
    with np.errstate(invalid="ignore", over="ignore"):
        said = clean()
    verdict = one.check(x)
    return said, verdict.bits is None and not verdict.refusal


WATCHED_RMS = {"accel": (0.5, 0.9), "gyro": (0.4, 1.2)}


def test_a_watched_sound_window_is_said_to_be_clean() -> None:
    for changes in ({}, {"group_rms": WATCHED_RMS}, {"not_finite": GuardPolicy.IMPUTE}):
        assert watched(sound(), **changes) == (True, True)
    assert watched(sound(rows=3)) == (True, True)
    assert watched(sound()[:, :4]) == (True, True)  # too short for its movement to be judged
    assert watched(sound().astype(np.float64)) == (True, True)


def test_nothing_a_guard_finds_is_said_to_be_clean() -> None:
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(600):
        x = sound() * rng.choice([1.0, 1e-4, 1.7, 2.6, 7.9, 8.1, 1e30])
        channel, at = rng.integers(6), rng.integers(128)
        match rng.integers(6):
            case 0:
                x[0, at, channel] = rng.choice([np.nan, np.inf, -np.inf, 8.0, 8.001, -20.0, 1e38])
            case 1:
                x[0, :, channel] = rng.choice([0.0, 0.5, 1e-3])
            case 2:
                x[0, : rng.integers(100, 128), channel] = 0.25
            case 3:
                x[0, :, 3:] *= rng.choice([0.3, 3.0, 100.0])
            case 4:
                x[0, :, channel] = 0.5 + rng.choice([1e-4, 5e-4, 1e-3, 2e-3]) * rng.normal(size=128)
        said, clean = watched(x.astype(np.float32), group_rms=WATCHED_RMS, dead_sd=1e-3)
        assert clean or not said
        found += not clean
    assert 100 < found < 600
