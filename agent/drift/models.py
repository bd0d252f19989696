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
class StationaryModel:
    """What the stationary monitor knows (transforms.py, edetector.py, stationary.py); w columns, float32 unless said.

    Pre-transform: columns (w,) int16; season and season_scale (season terms, w), no terms = no season; lags (orders,
    w) autoregressive coefficients, 0 beyond a feature's order; gap_s: a longer step of time is a gap, 0 = time is not
    looked at. centre and scale (w,): of what the transform leaves; offset (w,): mean of it standardised and clipped.

    Charges, in nats a row, that make each bet fair for the whole null (edetector.py): mean_charge (mean bets, w),
    variance_charge (variance bets, w), dense_charge (variance bets,). variance_centre and variance_scale (w,): of the
    clipped squares; dense_centre and dense_scale: of their standardised sum. whitening (w, w) symmetric; pair_mean
    and pair_square (w (w - 1) / 2,): of whitened products; pair_band: in standard deviations of a product. radius: of
    the reference's mean vector in whitened space; inflation: of the variance in any direction. tolerance_sd (w,):
    shifts of each that do not matter.

    Counters: low and high (w,) of the reference's residuals; rates (3, w): most that repeats, missing values and
    values out of range may make of the rows. Bins: bin_column (m,) int16 places among the columns, -1 = the predicted
    class; bin_values (m, b), NaN = unused; bin_share and bin_bound (m, b + 1): share of each value and of any other,
    and the most it may be.
    """

    columns: Array
    season: Array
    season_scale: Array
    lags: Array
    centre: Array
    scale: Array
    offset: Array
    mean_charge: Array
    variance_centre: Array
    variance_scale: Array
    variance_charge: Array
    dense_charge: Array
    whitening: Array
    pair_mean: Array
    pair_square: Array
    low: Array
    high: Array
    rates: Array
    bin_column: Array
    bin_values: Array
    bin_share: Array
    bin_bound: Array
    tolerance_sd: Array
    gap_s: float
    dense_centre: float
    dense_scale: float
    pair_band: float
    radius: float
    inflation: float
    claim_rows: float


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
