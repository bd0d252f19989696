"""Decides which monitor watches a view, and what may be claimed of it: by replaying the monitor that would ship.

1. stationary: K folds of consecutive reference rows, each watched by a monitor fitted to the others, then the
   held-out rows in their own order, watched by the monitor fitted to all. The promise counts as kept when neither
   count of alarms contradicts it: had the claim been true, so many alarms or more would come with a chance of at
   least 5 % (Poisson). Features that are named in an alarm are given the next larger tolerance, until the replay is
   quiet; one that alarms at the largest is watched only. Chosen when at least half of the features stay and the
   monitor is able as well as quiet: lags that explain a stream's own jumps explain a fault's away too, so a shift of
   one sd must be found in most runs of the standard battery.
2. regimes (reference.py), when their replay lets something be claimed.
3. stationary with the few features that stay, or with what little it finds; 4. watched only, with the reasons.

Rows that cannot be in time order are refused: shuffled rows hide what calibrates a dependent stream.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.drift import Finding, drift_monitor
from agent.drift.models import StationaryModel
from agent.drift.reference import Claim, GuardStatistics, Reference
from compressor.battery import found_share
from compressor.errors import ReferenceRefused
from compressor.marginals import with_bins
from compressor.reference import CONFIDENCE, ViewNames, ViewRows
from compressor.stationary import FEWEST_ROWS, ThinReference, fit_stationary

CLAIM_ROWS: Final = 10_000
TOLERANCES_SD: Final = (0.0, 0.15, 0.3, 0.5)
FOLDS: Final = 4
MAX_ROUNDS: Final = 12
ABLE_SHIFT_SD: Final = 1.0
LEAST_FOUND: Final = 0.5  # of the battery's runs with such a shift
LEAST_KEPT: Final = 0.5  # share of the features a stationary monitor must keep to be preferred
FEWEST_RECORDINGS: Final = 3  # of one or two nothing can be said about regimes
PIECE_ROWS: Final = 16

Floats = NDArray[np.float64]


class Kind(StrEnum):
    STATIONARY = "stationary"
    REGIMES = "regimes"
    WATCHED = "watched"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A reference, and why it is what it is.

    because: sentences with their figures, in the order things were tried. watched: feature -> why it never raises.
    tolerance_sd: feature -> shift that does not matter, where it is not 0.
    """

    reference: Reference
    kind: Kind
    because: tuple[str, ...]
    watched: dict[str, str] = field(default_factory=dict)
    tolerance_sd: dict[str, float] = field(default_factory=dict)

    def card(self) -> dict[str, Any]:
        """What an artifact's card says of it."""
        return {
            "kind": self.kind.value,
            "because": list(self.because),
            "watched": dict(self.watched),
            "tolerance_sd": dict(self.tolerance_sd),
        }


def calibrate(
    rows: ViewRows, held_out: ViewRows, names: ViewNames, *, guard: GuardStatistics,
    regimes: Callable[[], Reference], claim_rows: int = CLAIM_ROWS,
) -> Calibrated:  # fmt: skip
    """The reference of a view, with the monitor that keeps its promise.

    rows: the reference role; held_out: consecutive rows that nothing was fitted to. Neither may have been in a
    model's training, or its outputs would look better than they will. regimes: makes the regime reference of these
    rows, asked only when it is needed.

    Raises:
        ReferenceRefused: rows are not in time order, or too thin for any monitor.
    """
    refuse_disorder(rows)
    refuse_disorder(held_out)
    attempt = _stationary(rows, held_out, names, claim_rows)
    plain = _plain(rows, names, guard)
    because = attempt.because
    if attempt.model is not None and attempt.share >= LEAST_KEPT:
        able = found_share(replace(plain, stationary=attempt.model), held_out, size=ABLE_SHIFT_SD)
        if able >= LEAST_FOUND:
            return _with_stationary(plain, attempt, attempt.model, rows)
        because = (
            *because,
            f"stationary: quiet but not able, {100 * able:.0f} % of shifts by {ABLE_SHIFT_SD:g} sd are found",
        )
    found, said = _regimes(rows, regimes)
    because = (*because, said)
    if found is not None and found.claim.rows_per_alarm:
        return Calibrated(found, Kind.REGIMES, because)
    if attempt.model is not None:
        return _with_stationary(plain, replace(attempt, because=because), attempt.model, rows)
    if found is None and attempt.refused:
        raise ReferenceRefused(
            "; ".join(because), hint="Give the reference role a longer part of the stream or of each recording."
        )
    claim = Claim(0, attempt.replayed, attempt.replayed, 1, attempt.alarms, CONFIDENCE, _nothing(because))
    watched = {
        name: attempt.watched.get(name, "no monitor of this view keeps its promise") for name in names.features
    }
    return Calibrated(replace(plain, claim=claim, watched=names.features), Kind.WATCHED, because, watched)


def refuse_disorder(rows: ViewRows) -> None:
    """Rows of one recording lie together, and time does not run backwards in it. Raises: ReferenceRefused."""
    starts = np.flatnonzero(np.diff(rows.recordings, prepend=rows.recordings[:1] - 1))
    if len(starts) > len(np.unique(rows.recordings)):
        raise ReferenceRefused(
            f"recordings are interleaved: {len(np.unique(rows.recordings))} of them in {len(starts)} pieces",
            hint="Give each recording's rows together and in time order; do not shuffle.",
        )
    if rows.times_s is None:
        return
    back = np.flatnonzero(np.diff(rows.times_s) < 0) + 1
    back = back[~np.isin(back, starts)]
    if len(back):
        raise ReferenceRefused(
            f"row {back[0]} is earlier than the row before it, and {len(back) - 1} more are",
            hint="Sort each recording's rows by their time; do not shuffle.",
        )


def contradicts(alarms: int, rows: int, claim_rows: float) -> bool:
    """Whether so many alarms or more in `rows` rows would have a chance below 5 % if one came in `claim_rows`."""
    mean = rows / claim_rows
    fewer = sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(min(alarms, 100)))
    return alarms > 0 and 1 - fewer < 1 - CONFIDENCE


def alarms_of(reference: Reference, rows: ViewRows) -> list[Finding]:
    """What a fresh monitor raises over the rows; it is reset after each alarm."""
    monitor = drift_monitor(reference)
    if monitor is None:
        return []
    raised = []
    times_s = rows.time_or_nan()
    for start in range(0, len(rows), PIECE_ROWS):
        piece = slice(start, start + PIECE_ROWS)
        found = monitor.follow(rows.features[piece], rows.predicted[piece], times_s[piece])
        first = next((finding for _, finding in found if finding.raised), None)
        if first:
            raised.append(first)
            monitor.reset()
    return raised


# --- the stationary monitor ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class _Attempt:
    """What came of the stationary monitor. share: of the features that it watches; refused: could not be tried."""

    model: StationaryModel | None
    because: tuple[str, ...]
    watched: dict[str, str] = field(default_factory=dict)
    share: float = 0.0
    replayed: int = 0
    alarms: int = 0
    refused: bool = False


@dataclass(slots=True)
class _Search:
    """Where the tolerances stand: column -> rung. Shrinks or climbs with every round."""

    rung: dict[int, int]
    watched: dict[int, str]
    classes: bool  # whether the predicted class is watched too

    def columns(self) -> NDArray[np.int64]:
        return np.array(sorted(self.rung), dtype=np.int64)

    def tolerance_sd(self) -> Floats:
        return np.array([TOLERANCES_SD[self.rung[column]] for column in sorted(self.rung)])

    def blame(self, finding: Finding, place: dict[str, int]) -> None:
        """Give way to one alarm."""
        counted = finding.numbers.get("family:counter", 0.0) > 0.5 or finding.numbers.get("family:bins", 0.0) > 0.5
        if finding.numbers.get("family:bins", 0.0) > 0.5 and self.classes:
            self.classes = False
            return
        for name in finding.channels:
            column = place[name]
            if column not in self.rung:
                continue
            if counted or self.rung[column] + 1 == len(TOLERANCES_SD):
                self.watched[column] = f"unstable in the replay: {finding.text}"
                del self.rung[column]
            else:
                self.rung[column] += 1


def _stationary(rows: ViewRows, held_out: ViewRows, names: ViewNames, claim_rows: int) -> _Attempt:
    if len(rows) < FEWEST_ROWS:
        text = f"stationary: not tried, {len(rows)} rows are fewer than {FEWEST_ROWS}"
        return _Attempt(None, (text,), refused=True)
    own = [column for column, channel in enumerate(names.channel_of) if channel >= 0]
    search = _Search(dict.fromkeys(own, 0), {}, classes=len(names.labels) > 1)
    for column in _dead(rows.features, own):
        search.watched[column] = "it never differs or is mostly missing"
        del search.rung[column]
    # features are named by themselves here: a channel has several
    place = {name: column for column, name in enumerate(names.features)}
    folds = _folds(rows)
    counts: list[tuple[int, int]] = []
    for _ in range(MAX_ROUNDS):
        if not search.rung:
            break
        replays = [(_fit(names, kept, search, claim_rows), part) for kept, part in folds]
        replays.append((_fit(names, rows, search, claim_rows), held_out))
        found = [(part, alarms_of(reference, part)) for reference, part in replays]
        halves = (found[:-1], found[-1:])
        counts = [(sum(len(a) for _, a in half), sum(len(p) for p, _ in half)) for half in halves]
        if not any(contradicts(alarms, replayed, claim_rows) for alarms, replayed in counts):
            return _kept(replays[-1][0], search, counts, names, len(own), rows)
        before = (dict(search.rung), search.classes)
        blamed: dict[tuple[str, ...], Finding] = {finding.channels: finding for _, all_ in found for finding in all_}
        for finding in blamed.values():
            search.blame(finding, place)
        if (search.rung, search.classes) == before:
            break  # alarms that name nobody who is still there
    text = f"stationary: the promise is not kept by any feature; last {_told(counts)}"
    watched = {names.features[column]: why for column, why in search.watched.items()}
    replayed = sum(of for _, of in counts)
    return _Attempt(None, (text,), watched, replayed=replayed, alarms=sum(alarms for alarms, _ in counts))


def _kept(
    reference: Reference, search: _Search, counts: list[tuple[int, int]], names: ViewNames, of: int, rows: ViewRows
) -> _Attempt:
    kept = len(search.rung)
    largest = float(search.tolerance_sd().max())
    text = f"stationary: kept with {kept} of {of} features and tolerances up to {largest:g} sd; {_told(counts)}"
    thin = (f"{len(rows)} reference rows see no shift below {4 / math.sqrt(len(rows)):.2f} sd",)
    watched = {names.features[column]: why for column, why in search.watched.items()}
    moving = ("the shares of the predicted classes are watched only: they change in the replay",)
    watched_classes = moving if not search.classes and len(names.labels) > 1 else ()
    return _Attempt(
        reference.stationary,
        (text, *(thin if len(rows) < 2000 else ()), *watched_classes),
        watched,
        share=kept / max(1, of),
        replayed=sum(replayed for _, replayed in counts),
        alarms=sum(alarms for alarms, _ in counts),
    )


def _told(counts: list[tuple[int, int]]) -> str:
    if not counts:
        return "no replay"
    folds, held_out = counts
    parts = [f"{held_out[0]} alarms in {held_out[1]} held-out rows"]
    if folds[1]:
        parts.insert(0, f"{folds[0]} alarms in {folds[1]} rows of {FOLDS} folds")
    return ", ".join(parts)


def _fit(names: ViewNames, rows: ViewRows, search: _Search, claim_rows: int) -> Reference:
    """A reference whose findings name features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinReference)
        model = fit_stationary(
            rows.features, rows.times_s, claim_rows=claim_rows, tolerance_sd=search.tolerance_sd(),
            columns=search.columns(), predicted=rows.predicted if search.classes else None, labels=len(names.labels),
        )  # fmt: skip
    plain = _plain(rows, names, GuardStatistics({}, {}, {}))
    return replace(
        plain, channels=(), groups={}, channel_of=np.full(len(names.features), -1, np.int16), stationary=model
    )


def _folds(rows: ViewRows) -> list[tuple[ViewRows, ViewRows]]:
    """(all others, consecutive part); none where the others would be too few to fit."""
    edges = np.linspace(0, len(rows), FOLDS + 1).astype(int)
    at = np.arange(len(rows))
    pairs = list(itertools.pairwise(edges.tolist()))
    if len(rows) - max(high - low for low, high in pairs) < FEWEST_ROWS:
        return []
    return [(rows[(at < low) | (at >= high)], rows[(at >= low) & (at < high)]) for low, high in pairs]


def _dead(x: Floats, columns: list[int]) -> Iterator[int]:
    """Columns that could not be fitted in every fold."""
    for column in columns:
        parts = np.array_split(x[:, column], FOLDS)
        others = [np.concatenate(parts[:at] + parts[at + 1 :]) for at in range(FOLDS)]
        for part in others:
            known = part[np.isfinite(part)]
            if len(known) < len(part) / 2 or not known.std() > 0:
                yield column
                break


def _with_stationary(plain: Reference, attempt: _Attempt, model: StationaryModel, rows: ViewRows) -> Calibrated:
    names = [plain.features[column] for column in model.columns.tolist()]
    tolerances = {name: float(sd) for name, sd in zip(names, model.tolerance_sd.tolist(), strict=True) if sd > 0}
    tolerated = f"up to {max(tolerances.values()):.2g} sd" if tolerances else "of what the reference cannot tell"
    count = f"{attempt.alarms or 'no'} alarm{'s' if attempt.alarms > 1 else ''} in {attempt.replayed} rows"
    text = (
        f"at most one alarm per {model.claim_rows:.0f} rows on average, by construction, as long as what season and"
        f" lags leave keeps its law within tolerances {tolerated}; replay: {count}"
    )
    claim = Claim(int(model.claim_rows), attempt.replayed, attempt.replayed, 1, attempt.alarms, CONFIDENCE, text)
    watched = tuple(name for name in plain.features if name in attempt.watched)
    settings = {
        "claim_rows": float(model.claim_rows), "folds": float(FOLDS), "kept_share": attempt.share,
        "largest_tolerance_sd": max(tolerances.values(), default=0.0),
    }  # fmt: skip
    made = replace(plain, stationary=model, claim=claim, watched=watched, settings=settings)
    made = with_bins(made, rows.features, rows.predicted, rows.times_s)
    return Calibrated(made, Kind.STATIONARY, attempt.because, attempt.watched, tolerances)


# --- regimes and nothing ---------------------------------------------------------------------------------------
def _regimes(rows: ViewRows, build: Callable[[], Reference]) -> tuple[Reference | None, str]:
    recordings = len(np.unique(rows.recordings))
    if recordings < FEWEST_RECORDINGS:
        return None, f"regimes: {recordings} recording{'s' * (recordings > 1)} do not show what regimes there are"
    try:
        found = build()
    except ReferenceRefused as refused:
        return None, f"regimes: refused, {refused}"
    return found, f"regimes: {found.claim.text}"


def _plain(rows: ViewRows, names: ViewNames, guard: GuardStatistics) -> Reference:
    """What every reference holds, without a monitor."""
    x = np.where(np.isfinite(rows.features), rows.features, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a feature that is always missing
        centre, scale = np.nan_to_num(np.nanmean(x, axis=0)), np.nan_to_num(np.nanstd(x, axis=0))
    valid = rows.predicted[rows.predicted >= 0]
    return Reference(
        features=names.features,
        channels=names.channels,
        groups=names.groups,
        labels=names.labels,
        channel_of=np.array(names.channel_of, dtype=np.int16),
        centre=centre.astype(np.float32),
        scale=np.maximum(scale, 1e-6).astype(np.float32),
        class_share=(np.bincount(valid, minlength=len(names.labels)) / max(1, len(valid))).astype(np.float32),
        rows=len(rows),
        guard=guard,
        claim=Claim(0, 0, 0, 0, 0, CONFIDENCE, "nothing is claimed"),
    )


def _nothing(because: tuple[str, ...]) -> str:
    return f"nothing is claimed, the view is watched only: {'; '.join(because)}"
