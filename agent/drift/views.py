"""The views of a window that need no model: shape features of its channels, and of series made of them. Pure
numpy; the exported graph computes the same numbers, and a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

CHANNEL_FEATURES: Final = ("mean", "log_sd", "log_roughness", "log_spike")
FLOOR: Final = 1e-4  # keeps a logarithm finite for a constant channel


@dataclass(frozen=True, slots=True)
class Combination:
    """A series made of a window's channels, the same however the sensor is turned: at each sample the length of
    one group's vector (`right` empty), or the dot product of two groups' vectors. `left`, `right`: channel numbers.
    """

    name: str
    left: tuple[int, ...]
    right: tuple[int, ...] = ()


def combined(windows: NDArray[Any], combinations: tuple[Combination, ...]) -> NDArray[np.float64]:
    """windows: (rows, samples, channels). Returns (rows, samples, combinations)."""
    x = np.asarray(windows, dtype=np.float64)
    made = np.empty((*x.shape[:2], len(combinations)))
    for at, one in enumerate(combinations):
        sums = (x[:, :, one.left] * x[:, :, one.right or one.left]).sum(axis=2)
        made[:, :, at] = sums if one.right else np.sqrt(sums)
    return made


def window_features(windows: NDArray[Any], combinations: tuple[Combination, ...]) -> NDArray[np.float64]:
    """`channel_features` of the channels, then of the combinations: (rows, 4 * (channels + combinations))."""
    if not combinations:
        return channel_features(windows)
    return channel_features(np.concatenate([windows, combined(windows, combinations)], axis=2))


def feature_names(series: tuple[str, ...]) -> tuple[str, ...]:
    """`ax.mean, ax.log_sd, ...`: the names of `channel_features`, in its order."""
    return tuple(f"{name}.{feature}" for name in series for feature in CHANNEL_FEATURES)


def channel_features(windows: NDArray[Any]) -> NDArray[np.float64]:
    """Four numbers per channel that say where a window lies and how it moves.

    windows: (rows, samples, channels), raw units, at least 3 samples. Returns (rows, 4 * channels), channel
    by channel: the mean; log of the population sd; log of the median absolute second difference (roughness:
    blind to level and slope, so it sees noise and sample-and-hold); log of the largest distance from the
    median of three neighbours (spike: a single odd sample stands alone there). Each log adds 1e-4 first.
    """
    x = np.asarray(windows, dtype=np.float64)
    inner = x[:, 1:-1]
    second_difference = np.abs(x[:, 2:] - 2.0 * inner + x[:, :-2])
    spike = np.abs(inner - _median_of_three(x))
    features = np.stack(
        [
            x.mean(axis=1),
            np.log(x.std(axis=1) + FLOOR),
            np.log(np.median(second_difference, axis=1) + FLOOR),
            np.log(spike.max(axis=1) + FLOOR),
        ],
        axis=2,
    )
    return features.reshape(len(x), -1)


def _median_of_three(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of each interior sample and its two neighbours; three comparisons instead of a sort."""
    before, here, after = x[:, :-2], x[:, 1:-1], x[:, 2:]
    low, high = np.minimum(before, here), np.maximum(before, here)
    median: NDArray[np.float64] = np.maximum(low, np.minimum(high, after))
    return median
