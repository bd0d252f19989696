"""The views of a window that need no model: per-channel shape features. Pure numpy; the exported graph
computes the same numbers, and a test keeps the two equal.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

CHANNEL_FEATURES: Final = ("mean", "log_sd", "log_roughness", "log_spike")
FLOOR: Final = 1e-4  # keeps a logarithm finite for a constant channel


def feature_names(channels: tuple[str, ...]) -> tuple[str, ...]:
    """`ax.mean, ax.log_sd, ...`: the names of `channel_features`, in its order."""
    return tuple(f"{channel}.{feature}" for channel in channels for feature in CHANNEL_FEATURES)


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
