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


# --- views of adopted graphs -------------------------------------------------------------------------------
LARGEST: Final = 1e15  # a number of a view is looked at up to here: its square still fits a float32, also summed
MOST_FEATURES: Final = 64  # numbers of all views of a row together: what a record holds
DARK: Final = 0.1  # below it, of an image's range
BRIGHT: Final = 0.9  # above it


def bounded(x: NDArray[Any]) -> NDArray[np.float64]:
    """What views see of an input: float32 numbers, none beyond LARGEST; NaN stays."""
    return np.clip(np.asarray(x, dtype=np.float32).astype(np.float64), -LARGEST, LARGEST)


def identity_features(x: NDArray[Any], matrix: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """The numbers themselves, also of a hidden layer. x: (rows, ...). `matrix`: (numbers, features), else all."""
    flat = bounded(x).reshape(len(x), -1)
    return flat if matrix is None else flat @ np.asarray(matrix, dtype=np.float64)


def projection(numbers: int) -> NDArray[np.float32] | None:
    """(numbers, MOST_FEATURES) with orthonormal columns, always the same; None where all numbers fit."""
    if numbers <= MOST_FEATURES:
        return None
    noise = np.random.default_rng(numbers).standard_normal((numbers, MOST_FEATURES))
    return np.linalg.qr(noise)[0].astype(np.float32)


def image_feature_names(channels: int) -> tuple[str, ...]:
    """Names of `image_features`, in its order."""
    plain = ("brightness", "contrast", "edges_x", "edges_y", "sharpness", "dark", "bright", "rows_sd", "columns_sd")
    return plain if channels == 1 else (*plain, "saturation", *(f"mean_{number}" for number in range(channels)))


def image_features(images: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """What changes when a camera or its light does, each 0..1 or a little more. images: (rows, height, width,
    channels), at least 3 x 3; `low`..`high`: the range of a pixel, beyond which it is clipped.

    Mean and sd of the pixels' brightness (mean of the channels); mean difference to the right and lower neighbour;
    mean distance to four neighbours (sharpness: blur takes it away, noise and blocks add to it); share of dark and
    bright pixels; sd of the means of rows and of columns (a stuck line, a shadow). Of colours also the mean distance
    of the largest from the smallest channel, and each channel's mean.
    """
    x = (np.clip(np.asarray(images, dtype=np.float32).astype(np.float64), low, high) - low) / (high - low)
    light = x.mean(axis=3)
    inner = light[:, 1:-1, 1:-1]
    around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
    columns = [
        light.mean(axis=(1, 2)),
        light.std(axis=(1, 2)),
        np.abs(light[:, :, 1:] - light[:, :, :-1]).mean(axis=(1, 2)),
        np.abs(light[:, 1:] - light[:, :-1]).mean(axis=(1, 2)),
        np.abs(4.0 * inner - around).mean(axis=(1, 2)),
        (light < DARK).mean(axis=(1, 2)),
        (light > BRIGHT).mean(axis=(1, 2)),
        light.mean(axis=2).std(axis=1),
        light.mean(axis=1).std(axis=1),
    ]
    if x.shape[3] > 1:
        columns += [(x.max(axis=3) - x.min(axis=3)).mean(axis=(1, 2)), *x.mean(axis=(1, 2)).T]
    return np.stack(columns, axis=1)


def output_features(
    predicted: NDArray[Any], confidence: NDArray[Any], entropy: NDArray[Any], classes: int
) -> NDArray[np.float64]:
    """The `outputs` view, made of what a record has: (rows, 2 + classes): confidence, entropy in nats, and 1 for the
    predicted class. A row without a class has none.
    """
    labels = np.asarray(predicted)[:, None] == np.arange(classes)
    return np.column_stack([confidence, entropy, labels]).astype(np.float64)
