"""Builds the drift reference of an artifact and calibrates it by replay.

The reference role holds a few consecutive windows of every known recording. Three things are made of them:

1. regimes: each recording's mean, and the covariance pooled within recordings;
2. thresholds, by K-fold-in-time replay: each recording's rows are cut into K consecutive parts, each part is
   scored against regimes made of the others, as a later row of a known recording will be. The scores run
   through the shipped CUSUM in several orders of the recordings; the largest value times a multiple is the
   threshold. A recording's rows are repeated until it lasts STAY_ROWS rows, because in use a regime that lies
   a little off stays off for as long as it lasts, and the reference holds only two or three rows of each;
3. a claim, on rows the reference has never seen: the shipped monitor over held-out recordings in many orders.

Windows of a recording must not be shuffled: their order in time is the only information that calibrates a
dependent stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.drift import DriftMonitor, Finding, drift_monitor
from agent.drift.models import RegimeModel, Witness, channels_of
from agent.drift.reference import Claim, Detectability, GuardStatistics, Reference
from agent.drift.regimes import NAMING_ROWS, ClassResidual, RegimeDistance
from agent.drift.views import CHANNEL_FEATURES, feature_names
from compressor.errors import ReferenceRefused
from compressor.marginals import with_bins

FOLDS: Final = 3
STAY_ROWS: Final = 13
REPLAY_ORDERS: Final = 20
MULTIPLE: Final = 2.5
ALLOWANCE_QUANTILE: Final = 0.9
SCORE_CAP: Final = 8.0
FEWEST_ROWS: Final = 4
SPARE_ROWS_PER_FEATURE: Final = 3
RIDGE: Final = 1e-3
CLAIM_ORDERS: Final = 60
CONFIDENCE: Final = 0.95
FOUND_WITHIN_ROWS: Final = 60
CLEAN_ROWS: Final = 60
SESSION_ROWS: Final = 370  # what one wearer's session holds in the wrist data
SEED: Final = 20260101

# upper 95 % bound m of a Poisson mean after k events: P(at most k | m) = 0.05
_POISSON_UPPER: Final = (2.996, 4.744, 6.296, 7.754)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ViewRows:
    """Rows of one view. features: (rows, features); predicted: (rows,) class numbers; recordings: (rows,) ids;
    times_s: (rows,) seconds of the data, where they are known.

    Within a recording the rows are in time order.
    """

    features: Floats
    predicted: NDArray[np.int64]
    recordings: NDArray[np.int64]
    times_s: Floats | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: NDArray[Any]) -> ViewRows:
        times_s = None if self.times_s is None else self.times_s[index]
        return ViewRows(self.features[index], self.predicted[index], self.recordings[index], times_s)

    def time_or_nan(self) -> Floats:
        return np.full(len(self), np.nan) if self.times_s is None else self.times_s


@dataclass(frozen=True, slots=True)
class ViewNames:
    """features: names; channels: names; channel_of: channel number of each feature; groups: channel -> group."""

    features: tuple[str, ...]
    channels: tuple[str, ...]
    channel_of: tuple[int, ...]
    groups: dict[str, str]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WitnessRows:
    """What another engine, with other inputs, says of the same rows. columns: the view's features that are made of
    its inputs alone; predicted: (rows,) class numbers.
    """

    engine: str
    columns: tuple[int, ...]
    predicted: NDArray[np.int64]


def channel_view_names(
    channels: tuple[str, ...], groups: dict[str, str], labels: tuple[str, ...], combinations: tuple[str, ...] = ()
) -> ViewNames:
    """Names of the `channels` view: four features of each channel, then of each combination of channels, as
    `agent.drift.window_features` orders them. What is made of several channels belongs to none (-1).
    """
    each = len(CHANNEL_FEATURES)
    channel_of = tuple(index // each for index in range(each * len(channels))) + (-1,) * each * len(combinations)
    return ViewNames(feature_names((*channels, *combinations)), channels, channel_of, groups, labels)


def feature_view_names(features: tuple[str, ...], labels: tuple[str, ...]) -> ViewNames:
    """Names of a view whose features stand for themselves: each is its own channel."""
    groups = {name: name for name in features}
    return ViewNames(features, features, tuple(range(len(features))), groups, labels)


def guard_statistics(windows: NDArray[Any], channels: tuple[str, ...], groups: Mapping[str, str]) -> GuardStatistics:
    """What clean raw windows look like. windows: (rows, samples, channels)."""
    x = np.asarray(windows, dtype=np.float64)
    rms = {}
    for group in dict.fromkeys(groups[channel] for channel in channels):
        members = [index for index, channel in enumerate(channels) if groups[channel] == group]
        per_window = np.sqrt((x[:, :, members] ** 2).mean(axis=(1, 2)))  # as the guard: over time and channels
        rms[group] = (float(per_window.min()), float(per_window.max()))
    low, high, mean = x.min(axis=(0, 1)), x.max(axis=(0, 1)), x.mean(axis=(0, 1))
    return GuardStatistics(
        group_rms=rms,
        channel_mean={name: float(mean[index]) for index, name in enumerate(channels)},
        channel_range={name: (float(low[index]), float(high[index])) for index, name in enumerate(channels)},
    )


def build_reference(
    rows: ViewRows, names: ViewNames, *, guard: GuardStatistics, held_out: ViewRows, multiple: float = MULTIPLE,
    held_out_name: str = "held-out windows", witnesses: Sequence[WitnessRows] = (),
) -> Reference:  # fmt: skip
    """A calibrated reference with its claim. The stream itself is watched in the features that belong to a channel.

    rows: the reference role, which none of the models was trained on. held_out: consecutive rows of known recordings
    that no other argument comes from; only the claim is measured on them, and calls them `held_out_name`.

    Raises:
        ReferenceRefused: too few rows for the number of features, or rows that never differ.
    """
    channel_of = np.array(names.channel_of, dtype=np.int16)
    labels = len(names.labels)
    draft = Reference(
        features=names.features,
        channels=names.channels,
        groups=names.groups,
        labels=names.labels,
        channel_of=channel_of,
        centre=_single(rows.features.mean(axis=0)),
        scale=_single(np.maximum(rows.features.std(axis=0), 1e-6)),
        class_share=_single(np.bincount(rows.predicted, minlength=labels) / len(rows)),
        rows=len(rows),
        guard=guard,
        claim=Claim(0, 0, 0, 0, 0, CONFIDENCE, "nothing is claimed"),
        regimes=_regime_model(rows, np.flatnonzero(channel_of >= 0), channel_of, labels, multiple),
        witnesses=tuple(
            Witness(
                one.engine,
                _regime_model(rows, np.array(one.columns), channel_of, labels, multiple),
                _single(_disagreement(rows.predicted, one.predicted, labels)),
            )
            for one in witnesses
        ),
        settings={
            "multiple": multiple,
            "folds": float(FOLDS),
            "stay_rows": float(STAY_ROWS),
            "replay_orders": float(REPLAY_ORDERS),
        },
    )
    draft = with_bins(draft, rows.features, rows.predicted)
    return replace(draft, claim=measure_claim(draft, held_out, name=held_out_name))


def _regime_model(
    view: ViewRows, columns: NDArray[Any], channel_of: NDArray[Any], labels: int, multiple: float
) -> RegimeModel:
    """What the regime monitor needs to watch these columns. Raises: ReferenceRefused."""
    rows = ViewRows(view.features[:, columns], view.predicted, view.recordings)
    _refuse_thin(rows)
    _, places = channels_of(columns, channel_of)
    means, covariance = _regimes(rows)
    class_means, class_covariance = _classes(rows, labels)
    allowance, largest = _replay(rows, places)
    if largest <= 0:
        raise ReferenceRefused("the replay of the reference never rose", hint="Are all its rows the same?")
    threshold = round(multiple * largest, 4)
    return RegimeModel(
        columns=columns.astype(np.int16),
        regime_means=_single(means),
        covariance=_single(covariance),
        class_means=_single(class_means),
        class_covariance=_single(class_covariance),
        naming_scale=_single(_naming_scale(rows, class_means, class_covariance, places)),
        allowance=_single(allowance),
        threshold=threshold,
        # however wild, one row or two are not drift
        score_cap=min(SCORE_CAP, float(allowance.min()) + threshold / FEWEST_ROWS),
    )


def _disagreement(predicted: NDArray[np.int64], witness: NDArray[np.int64], labels: int) -> Floats:
    """Per class the serving model says, how often the witness says another; of all rows for a class it never says."""
    differs = (predicted != witness).astype(np.float64)
    counts = np.bincount(predicted, minlength=labels)
    sums = np.bincount(predicted, differs, minlength=labels)
    share: Floats = np.where(counts > 0, sums / np.maximum(counts, 1), differs.mean())
    return share


def measure_claim(
    reference: Reference, held_out: ViewRows, *, orders: int = CLAIM_ORDERS, name: str = "held-out windows"
) -> Claim:
    """Run the shipped monitor over held-out rows in many orders and say what follows.

    With k alarms in M rows the 95 % upper bound of the rate is u_k / M, u_0 = 3 (rule of three). The orders
    share their windows: the bound is for new orders of windows like these, not for windows never seen.
    """
    monitor = _monitor(reference)
    generator = np.random.default_rng(SEED)
    orders = min(orders, math.factorial(min(5, len(np.unique(held_out.recordings)))))  # there are no more
    alarms = 0
    for _ in range(orders):
        order = _shuffled_recordings(held_out.recordings, generator)
        alarms += len(alarm_rows(monitor, held_out[order]))
    total = orders * len(held_out)
    upper = _POISSON_UPPER[alarms] if alarms < len(_POISSON_UPPER) else None
    per_alarm = int(total / upper) if upper else 0
    counted = f"{alarms or 'no'} alarm{'s' if alarms > 1 else ''} in {total} replayed rows"
    source = f"({len(held_out)} {name} in {orders} orders)"
    promise = f"at most one alarm per {per_alarm} rows at {CONFIDENCE:.0%}" if per_alarm else "nothing is claimed"
    return Claim(per_alarm, total, len(held_out), orders, alarms, CONFIDENCE, f"{promise}: {counted} {source}")


def alarm_rows(monitor: DriftMonitor, rows: ViewRows) -> list[int]:
    """Row numbers at which a fresh run of the monitor raises; it is reset first and after each alarm."""
    monitor.reset()
    raised = []
    for index in range(len(rows)):
        if _raises(monitor, rows, index):
            raised.append(index)
            monitor.reset()
    return raised


def _monitor(reference: Reference) -> DriftMonitor:
    monitor = drift_monitor(reference)
    if monitor is None:
        raise ValueError("a view that is watched only has no monitor")
    return monitor


def _raises(monitor: DriftMonitor, rows: ViewRows, index: int) -> Finding | None:
    """The finding that begins at this row."""
    one = slice(index, index + 1)
    found = monitor.follow(rows.features[one], rows.predicted[one], rows.time_or_nan()[one])
    return next((finding for _, finding in found if finding.raised), None)


def measure_detectability(
    reference: Reference,
    clean: ViewRows,
    faulty: Mapping[str, ViewRows],
    touched: Mapping[str, tuple[str, ...]],
    *,
    runs: int = 20,
) -> tuple[Detectability, ...]:
    """Inject each fault into a clean stream, after CLEAN_ROWS to twice as many, and see when it is found and
    who is named. A run ends after SESSION_ROWS rows of the fault.

    faulty: the same windows as `clean`, row by row, under each fault; touched: channels the fault changes.
    """
    generator = np.random.default_rng(SEED + 1)
    monitor = _monitor(reference)
    lines = []
    for fault, rows in faulty.items():
        delays, named = [], []
        for _ in range(runs):
            order = _shuffled_recordings(clean.recordings, generator)
            start = int(generator.integers(CLEAN_ROWS, 2 * CLEAN_ROWS))
            delay, first = _one_run(monitor, clean[order[:start]], rows[order[start : start + SESSION_ROWS]])
            delays.append(delay)
            if np.isfinite(delay):
                named.append(first in touched[fault])
        median = float(np.median(delays))
        lines.append(
            Detectability(
                fault,
                runs,
                median if np.isfinite(median) else None,
                float(np.mean(np.array(delays) <= FOUND_WITHIN_ROWS)),
                float(np.mean(named)) if named else None,
            )
        )
    return tuple(lines)


def _one_run(monitor: DriftMonitor, clean: ViewRows, faulty: ViewRows) -> tuple[float, str]:
    monitor.reset()
    for index in range(len(clean)):
        if _raises(monitor, clean, index):
            monitor.reset()
    for index in range(len(faulty)):
        finding = _raises(monitor, faulty, index)
        if finding:
            return index + 1.0, finding.channels[0]
    return float("inf"), ""


def _refuse_thin(rows: ViewRows) -> None:
    """Enough rows to know the covariance within recordings, in the whole and in every fold of the replay.

    On the wrist data the largest CUSUM of an unchanged stream stayed under 1.5 times the replay's in all of
    48 draws of recordings with about 75 spare rows or more for 24 features, and reached 3.0 and 4.6 with 50
    and 40: over any multiple in use.
    """
    features = rows.features.shape[1]
    spare = _spare_rows(rows)
    fold_of = _folds(rows.recordings)
    spare_in_folds = min(_spare_rows(rows[fold_of != fold]) for fold in range(FOLDS))
    if spare < SPARE_ROWS_PER_FEATURE * features or spare_in_folds < features:
        raise ReferenceRefused(
            f"{len(rows)} rows of {len(np.unique(rows.recordings))} recordings leave {spare} rows within recordings "
            f"({spare_in_folds} in the thinnest fold) for {features} features; "
            f"{SPARE_ROWS_PER_FEATURE * features} and {features} are needed",
            hint="Give the reference role a longer part of each recording, or the view fewer features.",
        )


def _spare_rows(rows: ViewRows) -> int:
    """Degrees of freedom of the covariance within recordings."""
    return len(rows) - len(np.unique(rows.recordings))


def _regimes(rows: ViewRows) -> tuple[Floats, Floats]:
    """Each recording's mean, and the covariance of rows around them with n - recordings degrees of freedom."""
    return _means_and_covariance(rows.features, np.unique(rows.recordings, return_inverse=True)[1])


def _classes(rows: ViewRows, labels: int) -> tuple[Floats, Floats]:
    """Means of the predicted classes; a class without rows lies at the mean of all rows."""
    present, index = np.unique(rows.predicted, return_inverse=True)
    means = np.tile(rows.features.mean(axis=0), (labels, 1))
    means[present], covariance = _means_and_covariance(rows.features, index)
    return means, covariance


def _means_and_covariance(x: Floats, group: NDArray[Any]) -> tuple[Floats, Floats]:
    counts = np.bincount(group)
    means = np.stack([np.bincount(group, column) / counts for column in x.T], axis=1)
    residual = x - means[group]
    covariance = residual.T @ residual / max(len(x) - len(means), 1)
    # a ridge of a thousandth of each variance: keeps the factorisation well posed, moves no distance visibly
    return means, covariance + np.diag(RIDGE * np.diag(covariance) + 1e-6)


def _replay(rows: ViewRows, channel_of: NDArray[Any]) -> tuple[Floats, float]:
    """Allowance per component, and the largest CUSUM over all components and orders of the replay.

    One threshold for all components: scores have the same unit, and seven times as many rows pin down a
    largest value far better than one component's few.
    """
    known = rows[_counts(rows.recordings) > 1]  # of a single row nothing is left to know its recording by
    scores = _held_out_scores(known, rows, channel_of)
    allowance = np.quantile(scores, ALLOWANCE_QUANTILE, axis=0)
    stays = [
        np.resize(part, (max(STAY_ROWS, len(part)), part.shape[1]))
        for part in (scores[known.recordings == name] for name in np.unique(known.recordings))
    ]
    generator = np.random.default_rng(SEED)
    largest = 0.0
    for _ in range(REPLAY_ORDERS):
        order = generator.permutation(len(stays))
        largest = max(largest, _largest_cusum(np.concatenate([stays[index] for index in order]) - allowance))
    return allowance, largest


def _held_out_scores(known: ViewRows, rows: ViewRows, channel_of: NDArray[Any]) -> Floats:
    """Each known row scored against regimes made without its fold; (known rows, 1 + channels)."""
    fold_of = _folds(known.recordings)
    single = rows[_counts(rows.recordings) == 1]
    scores = np.empty((len(known), 2 + int(channel_of.max())))
    for fold in range(FOLDS):
        kept = known[fold_of != fold]
        training = ViewRows(
            np.concatenate([kept.features, single.features]),
            np.concatenate([kept.predicted, single.predicted]),
            np.concatenate([kept.recordings, single.recordings]),
        )
        distance = RegimeDistance(*_regimes(training), channel_of, cap=SCORE_CAP)
        scores[fold_of == fold] = distance.scores(known.features[fold_of == fold])
    return scores


def _naming_scale(rows: ViewRows, means: Floats, covariance: Floats, channel_of: NDArray[Any]) -> Floats:
    """Per channel, the 90 % quantile of what the monitor averages to name a channel."""
    squares = ClassResidual(means, covariance, channel_of).squares(rows.features, rows.predicted)
    order = np.argsort(rows.recordings, kind="stable")
    sums = np.cumsum(np.vstack([np.zeros((1, squares.shape[1])), squares[order]]), axis=0)
    scale: Floats = np.quantile((sums[NAMING_ROWS:] - sums[:-NAMING_ROWS]) / NAMING_ROWS, 0.9, axis=0)
    return scale


def _folds(recordings: NDArray[Any]) -> NDArray[np.int64]:
    """Consecutive parts of each recording, numbered in time."""
    fold = np.empty(len(recordings), dtype=np.int64)
    for name in np.unique(recordings):
        where = np.flatnonzero(recordings == name)
        fold[where] = np.arange(len(where)) * FOLDS // len(where)
    return fold


def _counts(recordings: NDArray[Any]) -> NDArray[np.int64]:
    """For each row, how many rows its recording has."""
    _, index, counts = np.unique(recordings, return_inverse=True, return_counts=True)
    result: NDArray[np.int64] = counts[index]
    return result


def _largest_cusum(increments: Floats) -> float:
    value, largest = np.zeros(increments.shape[1]), 0.0
    for row in increments:
        value = np.maximum(0.0, value + row)
        largest = max(largest, float(value.max()))
    return largest


def _shuffled_recordings(recordings: NDArray[Any], generator: np.random.Generator) -> NDArray[np.int64]:
    """Row numbers: recordings one after another in random order, each in time order."""
    names = generator.permutation(np.unique(recordings))
    return np.concatenate([np.flatnonzero(recordings == name) for name in names])


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)
