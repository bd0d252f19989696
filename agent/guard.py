"""Judges one input: NaN and infinity, range, dead and stuck channels, a sensor group whose unit changed.

The only place that judges a single input; runs of bad inputs are the business of `drift.counters`, what to do about
them that of `decisions`. The policies of the plan say whether a finding refuses, repairs or is only told.
Pure: no clock, no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import ConfigError
from agent.contract.plan import GuardPlan, GuardPolicy
from agent.contract.tensors import Array

MAX_CHANNELS = 64
MIN_WINDOW = 8  # shorter inputs say nothing about a channel's movement
KINDS = ("dead", "stuck", "range", "not_finite", "scale")
Bits = tuple[int, int, int, int, int]
NO_BITS: Bits = (0, 0, 0, 0, 0)

Flags = NDArray[np.bool_]  # (rows, channels)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`x` is what the engines get: the input itself unless a policy repaired it.

    `refusal`: why nothing may be run; empty = serve. `bits` (5, rows), uint64: KINDS by row, bit i = channel i of
    the plan; None when nothing was found. `text`: "dead:gx,gy;range:ax" over all rows.
    """

    x: Array
    refusal: str = ""
    text: str = ""
    bits: NDArray[np.uint64] | None = None

    def row_bits(self, row: int) -> Bits:
        """The five bit fields of one row, in the order of KINDS."""
        if self.bits is None or row >= self.bits.shape[1]:
            return NO_BITS
        dead, stuck, beyond, not_finite, scale = self.bits[:, row].tolist()
        return dead, stuck, beyond, not_finite, scale


class Guard:
    """The compiled checks of one input."""

    def __init__(self, plan: GuardPlan) -> None:
        """Raises: ConfigError: more channels than a bit field holds."""
        if len(plan.channels) > MAX_CHANNELS:
            raise ConfigError(f"the guard of '{plan.input}' has {len(plan.channels)} channels, over {MAX_CHANNELS}")
        self.plan = plan
        self._names = tuple(channel.name for channel in plan.channels)
        limits = np.array([(c.minimum, c.maximum, c.mean) for c in plan.channels], np.float32).reshape(-1, 3)
        largest = np.finfo(np.float32).max  # an infinite limit must not let infinity pass
        self._minimum = np.maximum(limits[:, 0], -largest)
        self._maximum = np.minimum(limits[:, 1], largest)
        self._mean = limits[:, 2]
        # each channel's own policy, else the input's
        self._not_finite = tuple(channel.not_finite or plan.not_finite for channel in plan.channels)
        self._out_of_range = tuple(channel.out_of_range or plan.out_of_range for channel in plan.channels)
        self._weights = np.left_shift(np.uint64(1), np.arange(len(self._names), dtype=np.uint64))
        groups = list(dict.fromkeys(channel.group for channel in plan.channels))
        members = [[c.group == g for g in groups] for c in plan.channels]
        self._members = np.array(members, bool).reshape(len(members), len(groups))  # (channels, groups)
        self._neighbours = _neighbours(self._members)
        rms = [(plan.group_rms or {}).get(group, (0.0, np.inf)) for group in groups]
        self._mean_square_low = np.array([(low / plan.scale_factor) ** 2 for low, _ in rms])
        self._mean_square_high = np.array([(high * plan.scale_factor) ** 2 for _, high in rms])
        self._share = (self._members / np.maximum(1, self._members.sum(axis=0))).astype(np.float32)
        # the cheap test works in float32: a little stricter, so that rounding can only send it to the exact one
        self._low32 = (self._mean_square_low * 1.001).astype(np.float32)
        self._high32 = (self._mean_square_high * 0.999).astype(np.float32)

    def check(self, x: Array, reads: Collection[str] | None = None) -> Verdict:
        """Judge `x`: (rows, ..., channels), floating point; the axes between are time.

        `reads`: the channels the engine to be asked looks at, None = all; in the others a value that would be refused
        is imputed, since no answer rests on it. Without channels in the plan only NaN and infinity are looked for,
        and told as bit 0.
        """
        if x.dtype.kind != "f" or x.size == 0:
            return Verdict(x)
        if not self._names:
            return self._check_unnamed(x)
        windows = x.reshape(len(x), -1, len(self._names))
        # (rows, channels, time): numpy reduces a contiguous last axis three times faster. Sums of FP16 would overflow
        wide = np.float32 if x.dtype.itemsize < 4 else None
        series = np.ascontiguousarray(windows.transpose(0, 2, 1), wide)
        if self._is_clean(windows, series):
            return Verdict(x)
        return self._verdict(x, self._judge(series), reads)

    def watch(self, x: Array) -> Callable[[], bool]:
        """What tells of memory that holds ever new inputs whether `check` would find nothing; False may mean yes.

        x: as for `check`. One window of float32, the common case, takes 8 us instead of 18 (128 x 6, `scripts/bench
        request`): it is small enough that calls are what costs, so all comparisons of numbers by channel are one
        product of a matrix with the largest, smallest and summed squares.
        """
        windows = x.reshape(len(x), -1, len(self._names)) if self._names and x.size else x
        if not self._names or len(windows) != 1 or x.dtype != np.float32 or windows.shape[1] < MIN_WINDOW:
            return lambda: self._finds_nothing(x)
        samples = windows[0].T  # (channels, time)
        length, channels = samples.shape[1], len(self._names)
        series, repeated = np.empty(samples.shape, np.float32), np.empty((channels, length - 1), bool)
        later, earlier = series[:, 1:], series[:, :-1]
        numbers = np.ones(3 * channels + 1, np.float32)
        highest, lowest, squares = (numbers[at : at + channels] for at in range(0, 3 * channels, channels))
        rules = self._rules(length)
        margins = np.empty(len(rules), np.float32)
        fewest = _fewest_repeats(length, self.plan.stuck_share)
        largest_of, smallest_of = np.maximum.reduce, np.minimum.reduce

        def clean() -> bool:
            np.copyto(series, samples)
            largest_of(series, 1, out=highest)
            smallest_of(series, 1, out=lowest)
            np.vecdot(series, series, squares)
            np.dot(rules, numbers, margins)
            if not smallest_of(margins) >= 0.0:  # also NaN
                return False
            np.equal(later, earlier, repeated)
            return bool(np.count_nonzero(repeated) < fewest)

        return clean

    def _finds_nothing(self, x: Array) -> bool:
        verdict = self.check(x)
        return verdict.bits is None and not verdict.refusal

    def _rules(self, length: int) -> NDArray[np.float32]:
        """Rows of which each gives a margin that is not negative while one of `_is_clean`'s conditions holds.

        To be multiplied with: largest, smallest and summed squares of each channel, and 1.
        """
        one, nothing = np.eye(len(self._names)), np.zeros((len(self._names), len(self._names)))
        dead = 1.001 * self.plan.dead_sd * math.sqrt(2 * length)
        share = self._share.T.astype(np.float64)
        no = np.zeros_like(share)
        blocks = (
            (-one, nothing, nothing, self._maximum),
            (nothing, one, nothing, -self._minimum),
            (one, -one, nothing, np.full(len(one), -dead)),
            (no, no, share, -self._low32 * length),
            (no, no, -share, self._high32 * length),
        )
        rows = [np.hstack((high, low, squares, offset[:, None])) for high, low, squares, offset in blocks]
        # margins just wide enough that rounding can only send a window to the exact test
        return np.vstack(rows).astype(np.float32)

    def _is_clean(self, x: Array, series: Array) -> bool:
        """True only if `_judge` would find nothing. Sufficient conditions, chosen for cost."""
        # count_nonzero instead of all(): a third of the cost on arrays this small; NaN compares false
        length, count = series.shape[2], len(series) * len(self._names)
        low, high = np.minimum.reduce(series, axis=2), np.maximum.reduce(series, axis=2)
        if np.count_nonzero(low >= self._minimum) + np.count_nonzero(high <= self._maximum) < 2 * count:
            return False
        sums = np.vecdot(series, series) @ self._share
        inside = np.count_nonzero(sums >= self._low32 * length) + np.count_nonzero(sums <= self._high32 * length)
        if inside < 2 * sums.size:
            return False
        if length < MIN_WINDOW:
            return True
        # a window that spans r has a standard deviation of at least r / sqrt(2 * length)
        if np.count_nonzero(high - low >= 1.001 * self.plan.dead_sd * math.sqrt(2 * length)) < count:
            return False
        repeats = np.count_nonzero(x[:, 1:] == x[:, :-1])
        return bool(repeats < _fewest_repeats(length, self.plan.stuck_share))

    def _judge(self, series: Array) -> tuple[Flags, ...]:
        """Exact flags in the order of KINDS, each (rows, channels)."""
        finite_values = np.isfinite(series)
        finite: Flags = np.logical_and.reduce(finite_values, axis=2)
        usable = np.where(finite_values, series, self._mean[:, None])
        beyond = finite_values & ((usable < self._minimum[:, None]) | (usable > self._maximum[:, None]))
        dead, stuck = self._movement(usable, finite)
        scale = self._scale(usable, finite & ~dead & ~stuck)
        outside: Flags = np.logical_or.reduce(beyond, axis=2)
        return dead, stuck, outside, np.logical_not(finite), scale

    def _movement(self, series: Array, finite: Flags) -> tuple[Flags, Flags]:
        """Dead and stuck channels; a constant zero, or a whole group that stands still, is dead and not stuck."""
        length = series.shape[2]
        if length < MIN_WINDOW:
            nothing = np.zeros_like(finite)
            return nothing, nothing
        still = series.std(axis=2, dtype=np.float64) < self.plan.dead_sd
        repeats = (series[:, :, 1:] == series[:, :, :-1]).sum(axis=2)
        repeated: Flags = repeats == length - 1
        zero: Flags = np.logical_and.reduce(series == 0, axis=2)
        for row, channel in np.argwhere((repeats >= _fewest_repeats(length, self.plan.stuck_share)) & ~repeated):
            counts = np.unique(series[row, channel], return_counts=True)[1]
            repeated[row, channel] = counts.max() >= self.plan.stuck_share * length
        moving_neighbour = ((finite & ~still & ~repeated).astype(np.uint8) @ self._neighbours) > 0
        stuck = finite & repeated & moving_neighbour & ~zero
        return finite & still & ~stuck, stuck

    def _scale(self, series: Array, sound: Flags) -> Flags:
        """Channels of groups whose rms left the reference; only groups all of whose channels are sound are judged."""
        values = series.astype(np.float64)
        mean_square = np.vecdot(values, values) / series.shape[2] @ self._share
        judged = (~sound).astype(np.uint8) @ self._members == 0
        wrong = judged & ((mean_square < self._mean_square_low) | (mean_square > self._mean_square_high))
        flags: Flags = wrong.astype(np.uint8) @ self._members.T > 0
        return flags

    def _verdict(self, x: Array, flags: tuple[Flags, ...], reads: Collection[str] | None) -> Verdict:
        found = {kind: flag for kind, flag in zip(KINDS, flags, strict=True) if flag.any()}
        if not found:
            return Verdict(x)
        text = ";".join(f"{kind}:{','.join(self._named(flag))}" for kind, flag in found.items())
        bits = np.stack([flag.astype(np.uint64) @ self._weights for flag in flags])
        unread = np.array([reads is not None and name not in reads for name in self._names])
        refusal = self._refusal({kind: flag & ~unread for kind, flag in found.items()})
        return Verdict(x if refusal else self._repaired(x, found), refusal, text, bits)

    def _refusal(self, found: dict[str, Flags]) -> str:
        for kind, policies, words in (
            ("not_finite", self._not_finite, "holds NaN or infinity"),
            ("range", self._out_of_range, "is outside its allowed range"),
        ):
            refused = found[kind] & _under(policies, GuardPolicy.REFUSE) if kind in found else None
            if refused is not None and refused.any():
                return f"input '{self.plan.input}' {words} in channel {', '.join(self._named(refused))}"
        return ""

    def _repaired(self, x: Array, found: dict[str, Flags]) -> Array:
        # under `refuse` what is left lies in unread channels: it is imputed
        # in the input's own datatype, which is the engine's; a limit beyond FP16 becomes infinite and limits nothing
        with np.errstate(over="ignore"):
            low, high, mean = (numbers.astype(x.dtype) for numbers in (self._minimum, self._maximum, self._mean))
        # NaN has no nearest allowed value: `clip` imputes what is not finite
        missing = ~_under(self._not_finite, GuardPolicy.PASS)
        clipped = _under(self._out_of_range, GuardPolicy.CLIP)
        imputed = ~clipped & ~_under(self._out_of_range, GuardPolicy.PASS)
        if "not_finite" in found and missing.any():
            x = np.where(missing & ~np.isfinite(x), mean, x)
        if "range" in found and clipped.any():
            x = np.where(clipped & np.isfinite(x), np.clip(x, low, high), x)
        if "range" in found and imputed.any():
            x = np.where(imputed & np.isfinite(x) & ((x < self._minimum) | (x > self._maximum)), mean, x)
        return x

    def _check_unnamed(self, x: Array) -> Verdict:
        finite = np.isfinite(x)
        if finite.all():
            return Verdict(x)
        bits = np.zeros((len(KINDS), len(x)), np.uint64)
        bits[KINDS.index("not_finite")] = ~finite.reshape(len(x), -1).all(axis=1)
        match self.plan.not_finite:
            case GuardPolicy.REFUSE:
                return Verdict(x, f"input '{self.plan.input}' holds NaN or infinity", "not_finite", bits)
            case GuardPolicy.PASS:
                return Verdict(x, "", "not_finite", bits)
            case GuardPolicy.IMPUTE | GuardPolicy.CLIP:
                return Verdict(np.where(finite, x, x.dtype.type(0)), "", "not_finite", bits)

    def _named(self, flag: Flags) -> list[str]:
        return [self._names[channel] for channel in np.flatnonzero(flag.any(axis=0))]


def _under(policies: Collection[GuardPolicy], wanted: GuardPolicy) -> NDArray[np.bool_]:
    """(channels,): whose policy this is."""
    return np.array([policy is wanted for policy in policies], bool)


def _neighbours(members: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(channels, channels): who can show that a channel stands still alone: its group, or all when it has none."""
    same = members.astype(np.uint8) @ members.T.astype(np.uint8)
    np.fill_diagonal(same, 0)
    alone = same.sum(axis=0) == 0
    same[:, alone] = 1
    np.fill_diagonal(same, 0)
    return same


def _fewest_repeats(length: int, share: float) -> float:
    """Equal neighbours in time that a window must have at least if one value fills `share` of it."""
    others = math.floor((1.0 - share) * length + 1e-9)
    return max(1.0, float(length - 1 - 2 * others))
