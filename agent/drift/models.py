"""What a monitor compares with: values only, made by the compressor, checked when they are read.

A reference (reference.py) holds at most one model of the stream itself, of regimes or of a stationary stream, and a
regime model for each witness. `columns` are the numbers of the view's features a model looks at, in its own order:
a view may carry features that only a witness uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class RegimeModel:
    """What the regime monitor knows (regimes.py).

    Arrays, float32 unless said: columns (w,) int16; regime_means (regimes, w); covariance (w, w) pooled within
    recordings; class_means (labels, w) and class_covariance (w, w) of the predicted classes; naming_scale (channels,)
    and allowance (1 + channels,) of the channels these columns belong to, in the view's order. `threshold` and
    `score_cap` are in units of the score.
    """

    columns: Array
    regime_means: Array
    covariance: Array
    class_means: Array
    class_covariance: Array
    naming_scale: Array
    allowance: Array
    threshold: float
    score_cap: float


@dataclass(frozen=True, slots=True, eq=False)
class Witness:
    """An engine with other inputs, and its own look at the view.

    engine: its name in the lineup; regimes: of the features made of its inputs alone; disagreement: (labels,)
    float32, per class the serving model predicts, the share of reference rows on which the witness says another.
    """

    engine: str
    regimes: RegimeModel
    disagreement: Array


def channels_of(columns: Array, channel_of: Array) -> tuple[list[int], Array]:
    """The channels (numbers, ascending) that have a feature among `columns`, and for each of these features the
    place of its channel in that list, -1 = it belongs to no single channel. channel_of: (features,).
    """
    own = np.asarray(channel_of)[columns]
    present = sorted(set(own.tolist()) - {-1})
    place = {channel: index for index, channel in enumerate(present)} | {-1: -1}
    return present, np.array([place[channel] for channel in own.tolist()], dtype=np.int64)
