"""Sensor faults as functions on raw windows. Knows channels by index, not what they mean.

Every corruption takes windows (rows, length, channels) float32 and a generator and returns new windows of the
same shape; the input is never changed. Rows of one call are read as one stream after the sensor broke: what a
break decides once (the value a channel freezes at) is decided once per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Windows = NDArray[np.float32]
Corruption = Callable[[Windows, np.random.Generator], Windows]


def dead(channels: Sequence[int]) -> Corruption:
    """The channels read zero."""
    return scale(channels, 0.0)


def stuck(channels: Sequence[int]) -> Corruption:
    """Each channel repeats one value it once had: a sample drawn from the stream."""

    def apply(windows: Windows, generator: np.random.Generator) -> Windows:
        out = windows.copy()
        if len(out):
            row, sample = generator.integers(len(out)), generator.integers(out.shape[1])
            out[:, :, list(channels)] = windows[row, sample, list(channels)]
        return out

    return apply


def scale(channels: Sequence[int], factor: float) -> Corruption:
    """A gain or a unit change."""

    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        out = windows.copy()
        out[:, :, list(channels)] *= np.float32(factor)
        return out

    return apply


def bias(channels: Sequence[int], offset: float) -> Corruption:
    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        out = windows.copy()
        out[:, :, list(channels)] += np.float32(offset)
        return out

    return apply


def noise(channels: Sequence[int], sd: float) -> Corruption:
    def apply(windows: Windows, generator: np.random.Generator) -> Windows:
        out = windows.copy()
        shape = (*windows.shape[:2], len(channels))
        out[:, :, list(channels)] += np.float32(sd) * generator.standard_normal(shape, dtype=np.float32)
        return out

    return apply


def spikes(channels: Sequence[int], share: float, height: float) -> Corruption:
    """A `share` of all samples is replaced by plus or minus `height`."""

    def apply(windows: Windows, generator: np.random.Generator) -> Windows:
        out = windows.copy()
        shape = (*windows.shape[:2], len(channels))
        hit = generator.random(shape) < share
        sign = np.where(generator.random(shape) < 0.5, -height, height).astype(np.float32)
        out[:, :, list(channels)] = np.where(hit, sign, windows[:, :, list(channels)])
        return out

    return apply


def saturate(channels: Sequence[int], limit: float) -> Corruption:
    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        out = windows.copy()
        out[:, :, list(channels)] = np.clip(windows[:, :, list(channels)], -limit, limit)
        return out

    return apply


def swap(pairs: Sequence[tuple[int, int]]) -> Corruption:
    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        out = windows.copy()
        for first, second in pairs:
            out[:, :, first], out[:, :, second] = windows[:, :, second], windows[:, :, first]
        return out

    return apply


def rotate(pairs: Sequence[tuple[int, int]], degrees: float) -> Corruption:
    """Turn each (x, y) pair about the third axis: how a device is worn, not what it measures."""
    cosine, sine = np.float32(np.cos(np.radians(degrees))), np.float32(np.sin(np.radians(degrees)))

    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        out = windows.copy()
        for x, y in pairs:
            out[:, :, x] = cosine * windows[:, :, x] - sine * windows[:, :, y]
            out[:, :, y] = sine * windows[:, :, x] + cosine * windows[:, :, y]
        return out

    return apply


def hold(every: int) -> Corruption:
    """Only each `every`-th sample is new; the others repeat it."""

    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        index = np.arange(windows.shape[1]) // every * every
        return windows[:, index]

    return apply


def lose(samples: int) -> Corruption:
    """One gap of `samples` per window at a random place, filled with the last sample before it."""

    def apply(windows: Windows, generator: np.random.Generator) -> Windows:
        length = windows.shape[1]
        start = generator.integers(1, length - samples, size=(len(windows), 1))
        time = np.arange(length)[None, :]
        index = np.where((time >= start) & (time < start + samples), start - 1, time)
        return np.take_along_axis(windows, index[:, :, None], axis=1)

    return apply


def stretch(factor: float) -> Corruption:
    """The clock runs off: a window shows 1/factor of its span, linearly interpolated (factor > 1)."""

    def apply(windows: Windows, _: np.random.Generator) -> Windows:
        place = np.arange(windows.shape[1]) / factor
        left = place.astype(np.int64)
        right = np.minimum(left + 1, windows.shape[1] - 1)
        share = (place - left).astype(np.float32)[None, :, None]
        return windows[:, left] * (1 - share) + windows[:, right] * share

    return apply
