"""Fits the model of a stationary stream: pre-transforms, and for every bet the charge that makes it fair.

The promise of the e-detectors (agent/drift/edetector.py) is a theorem about the law the stream comes from. What is
known of that law is n reference rows. So each charge is what the rows say plus what they leave open:

    CHARGE(c) of a statistic s  =  log mean exp(c s)  +  max(|c| tolerance, q se)

log mean exp(c s): the empirical log moment generating function. se: its standard error, by the delta method the
standard deviation of exp(c s) / mean exp(c s) over sqrt(n), from sums over consecutive blocks of n^(1/3) rows, so
that dependence that is left in the rows widens it. q: the 97 % quantile of the LARGEST of all these errors, each over
its se, simulated with Gaussian multipliers on the blocks (Chernozhukov, Chetverikov, Kato, 2013): all charges hold at
once, with their true dependence, and no correction factor is anybody's choice. For small c the charge is that of the
composite null |mean| <= q / sqrt(n): the band.

The other constants, each at 99 % or more:
    radius      the true mean lies within sqrt(chi2(w) / n) of the reference's in whitened space (Hotelling)
    inflation   the true variance in ANY direction over the reference's: 1 / smallest eigenvalue of bootstrap
                covariances in the reference's own whitening, mean + 2.33 standard deviations of the draws
    pair_*      mean and mean square of each clipped product of whitened features, with a band as above
    rates       exact binomial bounds (Clopper, Pearson), all features at once; for the range the law-free tolerance
                limit of Wilks: what lies beyond the extremes of n rows is Beta(2, n - 1)
    bin_bound   exact binomial bounds of all shares at once

Rows must be contiguous and in the order of time: shuffled rows hide the dependence the transforms take out.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.drift.edetector import CLIP, MEAN_BETS, SQUARE_CLIP, VARIANCE_BETS
from agent.drift.models import StationaryModel
from agent.drift.transforms import GAP_STEPS, MAX_ORDER, SEASON, SEASON_TERMS, Transform, season_terms
from compressor.errors import ReferenceRefused

FEWEST_ROWS: Final = 500
GOOD_ROWS: Final = 2000
DRAWS: Final = 1000  # of the multipliers
COVARIANCE_DRAWS: Final = 40
CHARGE_SURE: Final = 0.97
OTHERS_SURE: Final = 0.99
SEED: Final = 20260102
WHITE: Final = 0.01  # a residual whose Ljung-Box p-value is above counts as white
TESTED_LAGS: Final = 10
SEASON_SHARE: Final = 0.05  # of the variance a season must take away
SEASON_SURE: Final = 25.0  # and its chi-square, dependence counted: 8 terms exceed 26 by chance once in 1,000
MOST_VALUES: Final = 16  # a column of at most so many different values is also looked at as categories
INDEPENDENT: Final = 0.01  # p-value, over all values of a categorical, below which they depend on the rows before
FEWEST_AGAIN: Final = 3  # missing values that follow upon a missing one: fewer are no sign of bursts
LARGEST_RATE: Final = 0.9999  # a bound of 1 leaves nothing to bet on

Floats = NDArray[np.float64]


class ThinReference(UserWarning):
    """The reference is short: small shifts will not be seen."""


def fit_stationary(
    rows: NDArray[Any],
    times_s: NDArray[Any] | None,
    *,
    claim_rows: float,
    tolerance_sd: float | NDArray[Any] | None = None,
    columns: NDArray[Any] | None = None,
    predicted: NDArray[Any] | None = None,
    labels: int = 0,
) -> StationaryModel:
    """The model of a stream from a part of it that is normal.

    rows: (n, d) contiguous and in time order, NaN = missing; times_s: (n,) seconds of the data, needed for seasons
    and gaps; claim_rows: rows on average to a false alarm, at least; tolerance_sd: shifts that do not matter, in
    standard deviations of what the transform leaves, of all or of each column (None = 0: only what the reference
    cannot tell is tolerated); columns: which features of the view, all by default; predicted: (n,) classes
    0..labels-1 as the model will predict them on rows it has not seen (out of sample), to watch their shares.

    Raises:
        ReferenceRefused: fewer than 500 rows, or a feature that never differs or is mostly missing.
    """
    n, d = rows.shape
    if n < FEWEST_ROWS:
        raise ReferenceRefused(
            f"{n} rows cannot carry the reference of a stationary stream, {FEWEST_ROWS} are needed",
            hint="Give the reference role a longer part of the stream.",
        )
    if n < GOOD_ROWS:
        warnings.warn(
            f"a reference of {n} rows sees no shift below {4 / math.sqrt(n):.2f} standard deviations",
            ThinReference, stacklevel=2,
        )  # fmt: skip
    chosen = np.arange(d) if columns is None else np.asarray(columns, dtype=np.int64)
    x = np.where(np.isfinite(rows), rows, np.nan)[:, chosen].astype(np.float64)
    _refuse_dead(x)
    time_s = np.full(n, np.nan) if times_s is None else np.asarray(times_s, dtype=np.float64)
    transform = _fit_transform(x, time_s)
    residual = _applied(transform, x, time_s)
    tolerance = np.zeros(len(chosen)) + (0.0 if tolerance_sd is None else tolerance_sd)
    fields: dict[str, Any] = {name: _single(getattr(transform, name)) for name in ("season", "season_scale", "lags")}
    fields |= (
        _moments(residual, transform.terms, tolerance) | _counters(x, residual) | _bins(x, chosen, predicted, labels)
    )
    return StationaryModel(
        columns=chosen.astype(np.int16),
        gap_s=transform.gap_s,
        tolerance_sd=_single(tolerance),
        claim_rows=float(claim_rows),
        **fields,
    )


# --- pre-transforms ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    """As in StationaryModel; `columns` only for its length; terms: (w,) parameters spent on each feature's mean."""

    columns: Floats
    season: Floats
    season_scale: Floats
    lags: Floats
    gap_s: float
    terms: Floats


def _applied(fitted: _Fitted, x: Floats, time_s: Floats) -> Floats:
    """By the device's own code."""
    return Transform(fitted).apply(x, time_s)  # type: ignore[arg-type]


def _refuse_dead(x: Floats) -> None:
    known = np.isfinite(x).sum(axis=0)
    dead = np.flatnonzero((known < len(x) / 2) | ~(_spread(x) > 0))
    if len(dead):
        raise ReferenceRefused(
            f"features {dead.tolist()} never differ or are mostly missing", hint="Leave them out, or only watch them."
        )


def _spread(x: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanstd(x, axis=0), dtype=np.float64)


def _fit_transform(x: Floats, time_s: Floats) -> _Fitted:
    n, w = x.shape
    step_s = np.diff(time_s)
    known = step_s[np.isfinite(step_s)]
    gap_s = float(GAP_STEPS * np.median(known)) if len(known) else 0.0
    season, season_scale, terms = _seasons(x, time_s)
    lags = np.zeros((0, w))
    flat = _applied(_Fitted(np.zeros(w), season, season_scale, lags, gap_s, terms), x, time_s)
    broken = np.zeros(n, dtype=bool)
    if gap_s:
        broken[1:] = (step_s > gap_s) | (step_s < 0)
    orders = [_autoregression(flat[:, j], broken) for j in range(w)]
    depth = max((len(one) for one in orders), default=0)
    lags = np.zeros((depth, w))
    for j, one in enumerate(orders):
        lags[: len(one), j] = one
    terms = terms + np.array([len(one) for one in orders])
    return _Fitted(np.zeros(w), season, season_scale, lags, gap_s, terms)


def _seasons(x: Floats, time_s: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean and log-scale coefficients, and terms spent on the mean; without any season no rows of coefficients."""
    w = x.shape[1]
    none = np.zeros((0, w)), np.zeros((0, w)), np.ones(w)
    usable = _usable_terms(time_s)
    if len(usable) == 1:
        return none
    season, scale, terms = np.zeros((SEASON_TERMS, w)), np.zeros((SEASON_TERMS, w)), np.ones(w)
    basis = season_terms(time_s)[:, usable]
    for j in range(w):
        fitted = _regressed(basis, x[:, j])
        if fitted is None:
            continue
        season[usable, j], terms[j] = fitted, len(usable)
        with np.errstate(divide="ignore"):
            size = np.log(np.abs(x[:, j] - basis @ fitted))
        logs = _regressed(basis, np.where(np.isfinite(size), size, np.nan))
        if logs is not None:
            logs[0] = 0.0  # only its course: the level is the standardisation's
            scale[usable, j] = logs
    return (season, scale, terms) if season.any() else none


def _usable_terms(time_s: Floats) -> list[int]:
    """Columns of `season_terms` whose period the times hold at least twice."""
    known = time_s[np.isfinite(time_s)]
    if len(known) < len(time_s):
        return [0]
    span_s = float(known.max() - known.min())
    return [0] + [
        1 + 2 * at + half for at, (period, _) in enumerate(SEASON) if span_s >= 2 * period for half in (0, 1)
    ]


def _regressed(basis: Floats, y: Floats) -> Floats | None:
    """Coefficients when they take a notable and certain share of the variance away, else None.

    Certain: n_eff R^2 / (1 - R^2) is about chi-square with one degree a term if there is no season; n_eff = n (1 - r)
    / (1 + r) with r the first autocorrelation of what is left, so that a slow wandering is not taken for a season.
    """
    known = np.isfinite(y)
    fitted, *_ = np.linalg.lstsq(basis[known], y[known], rcond=None)
    left = y - basis @ fitted
    total, rest = float(np.nanvar(y)), float(np.nanvar(left))
    share = 1 - rest / total if total > 0 else 0.0
    pairs = np.isfinite(left[1:]) & np.isfinite(left[:-1])
    r = float(np.mean((left[1:] * left[:-1])[pairs])) / max(rest, 1e-300)
    r = min(max(r, 0.0), 0.999)
    n_eff = known.sum() * (1 - r) / (1 + r)
    notable = share >= SEASON_SHARE and n_eff * share / max(1 - share, 1e-9) >= SEASON_SURE
    return np.asarray(fitted, dtype=np.float64) if notable else None


def _autoregression(y: Floats, broken: NDArray[np.bool_]) -> Floats:
    """Coefficients of the lowest order, at most MAX_ORDER, that leaves a white residual (Ljung-Box); broken: rows
    before which time is missing.
    """
    centred = y - np.nanmean(y)
    best = np.zeros(0)
    for order in range(MAX_ORDER + 1):
        best = _least_squares(centred, broken, order)
        left = centred - sum(
            (phi * _lagged(centred, broken, lag) for lag, phi in enumerate(best, 1)), np.zeros(len(y))
        )
        if _ljung_box(left) > WHITE:
            break
    return best


def _lagged(y: Floats, broken: NDArray[np.bool_], lag: int) -> Floats:
    """The value of `lag` rows ago, NaN across a gap."""
    earlier = np.full(len(y), np.nan)
    earlier[lag:] = y[:-lag]
    run = np.cumsum(broken)
    earlier[lag:][run[lag:] != run[:-lag]] = np.nan
    return earlier


def _least_squares(y: Floats, broken: NDArray[np.bool_], order: int) -> Floats:
    if not order:
        return np.zeros(0)
    past = np.stack([_lagged(y, broken, lag) for lag in range(1, order + 1)], axis=1)
    known = np.isfinite(y) & np.isfinite(past).all(axis=1)
    past, y = past[known], y[known]
    return np.asarray(np.linalg.solve(past.T @ past + 1e-9 * np.eye(order), past.T @ y), dtype=np.float64)


def _ljung_box(y: Floats) -> float:
    """P-value of the first TESTED_LAGS autocorrelations; missing rows are left out of their pairs."""
    y = y - np.nanmean(y)
    variance = float(np.nanmean(y * y))
    q = 0.0
    for lag in range(1, TESTED_LAGS + 1):
        products = y[lag:] * y[:-lag]
        known = products[np.isfinite(products)]
        q += len(known) * (float(known.mean()) / variance) ** 2 if len(known) else 0.0
    return _chi_square_above(q, TESTED_LAGS)


# --- charges -----------------------------------------------------------------------------------------------
def _moments(residual: Floats, terms: Floats, tolerance: Floats) -> dict[str, Any]:
    """All that is known of the residuals: (rows, w), NaN = missing."""
    centre, scale = np.nanmean(residual, axis=0), _spread(residual)
    z = np.clip((residual - centre) / scale, -CLIP, CLIP)
    offset = np.nanmean(z, axis=0)
    z = np.where(np.isfinite(z), z - offset, 0.0)
    squares = np.minimum(z * z, SQUARE_CLIP)
    variance_centre, variance_scale = squares.mean(axis=0), squares.std(axis=0)
    if not variance_scale.min() > 0:  # two values, equally often: its square never differs
        variance_scale = np.maximum(variance_scale, 1e-3)
    u = (squares - variance_centre) / variance_scale
    together = u.sum(axis=1)
    dense_centre, dense_scale = float(together.mean()), float(together.std())
    spread = np.clip((together - dense_centre) / dense_scale, -CLIP, CLIP)

    blocks = _blocks(len(z))
    mean = [_Generating(z, bet, blocks, terms - 1) for bet in MEAN_BETS]
    variance = [_Generating(u, bet, blocks) for bet in VARIANCE_BETS]
    dense = [_Generating(spread[:, None], bet, blocks) for bet in VARIANCE_BETS]
    q = _joint_quantile(np.concatenate([one.errors for one in (*mean, *variance, *dense)], axis=1))
    together_tolerance = float(tolerance.sum()) / dense_scale
    return {
        "centre": _single(centre),
        "scale": _single(scale),
        "offset": _single(offset),
        "variance_centre": _single(variance_centre),
        "variance_scale": _single(variance_scale),
        "dense_centre": dense_centre,
        "dense_scale": dense_scale,
        "mean_charge": _single(np.stack([one.charge(q, tolerance) for one in mean])),
        "variance_charge": _single(np.stack([one.charge(q, tolerance) for one in variance])),
        "dense_charge": _single(np.concatenate([one.charge(q, together_tolerance) for one in dense])),
        **_relations(z, blocks),
    }


class _Generating:
    """Empirical log moment generating function of each column of s at one c, with its errors."""

    def __init__(self, s: Floats, c: float, blocks: NDArray[np.int64], terms: Floats | float = 0.0) -> None:
        n = len(s)
        grown = np.exp(c * s)
        mean = grown.mean(axis=0)
        self._c = c
        self._value = np.log(mean)
        sums = np.add.reduceat(grown / mean - 1.0, blocks, axis=0)
        # a season's and an autoregression's own errors move the mean of a row like one more error for each term
        self._se = np.sqrt((sums**2).sum(axis=0) + terms * c * c * n) / n
        self.errors = sums / np.sqrt((sums**2).sum(axis=0))

    def charge(self, q: float, tolerance: Floats | float) -> Floats:
        charge: Floats = self._value + np.maximum(abs(self._c) * tolerance, q * self._se)
        return charge


def _blocks(n: int) -> NDArray[np.int64]:
    return np.arange(0, n, max(1, round(n ** (1 / 3))))


def _joint_quantile(errors: Floats) -> float:
    """CHARGE_SURE quantile of the largest of all errors over their standard error. errors: (blocks, charges)."""
    signs = np.random.default_rng(SEED).standard_normal((DRAWS, len(errors)))
    return float(np.quantile((signs @ errors).max(axis=1), CHARGE_SURE))


def _relations(z: Floats, blocks: NDArray[np.int64]) -> dict[str, Any]:
    n, w = z.shape
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True).reshape(w, w))
    whitening = (vectors / np.sqrt(np.maximum(values, 1e-4 * values.max()))) @ vectors.T
    white = z @ whitening
    pairs = w * (w - 1) // 2
    mean, square, se_mean, se_square = np.zeros((4, pairs))
    for at in range(w - 1):  # a row of the triangle at a time: all products at once could be gigabytes
        here = slice(at * w - at * (at + 1) // 2, (at + 1) * w - (at + 1) * (at + 2) // 2)
        products = np.clip(white[:, at : at + 1] * white[:, at + 1 :], -CLIP, CLIP)
        mean[here], square[here] = products.mean(axis=0), products.var(axis=0)
        away = products - mean[here]
        se_mean[here] = np.sqrt((np.add.reduceat(away, blocks, axis=0) ** 2).sum(axis=0)) / n
        se_square[here] = np.sqrt(((away**2 - square[here]) ** 2).mean(axis=0) / n)
    sure = NormalDist().inv_cdf(1 - (1 - OTHERS_SURE) / max(1, 4 * pairs))  # two signs, mean and square
    square = np.maximum(square + sure * se_square, 1e-6)
    return {
        "whitening": _single(whitening),
        "pair_mean": _single(mean),
        "pair_square": _single(square),
        "pair_band": float((sure * se_mean / np.sqrt(square)).max(initial=0.0)),
        "radius": math.sqrt(_chi_square_quantile(OTHERS_SURE, w) / n * _dependence(white, blocks)),
        "inflation": _inflation(white),
    }


def _dependence(white: Floats, blocks: NDArray[np.int64]) -> float:
    """How many times the variance of a mean exceeds that of independent rows, on average; at least 1."""
    sums = np.add.reduceat(white, blocks, axis=0)
    return max(1.0, float((sums**2).sum() / (white**2).sum()))


def _inflation(white: Floats) -> float:
    """Most that the true variance in any direction may be, of a direction whose reference variance is 1."""
    generator = np.random.default_rng(SEED)
    n = len(white)
    single = white.astype(np.float32)
    smallest = []
    for _ in range(COVARIANCE_DRAWS):
        weight = generator.multinomial(n, np.full(n, 1 / n)).astype(np.float32)
        smallest.append(float(np.linalg.eigvalsh((single * weight[:, None]).T @ single / n)[0]))
    excess = 1 / np.maximum(smallest, 0.05)
    return float(excess.mean() + NormalDist().inv_cdf(OTHERS_SURE) * excess.std())


# --- counters and bins -------------------------------------------------------------------------------------
def _counters(x: Floats, residual: Floats) -> dict[str, Any]:
    n, w = x.shape
    alpha = (1 - OTHERS_SURE) / (3 * w)
    missing = [_misses(~np.isfinite(x[:, j]), alpha) for j in range(w)]
    repeated = [_repeats(x[:, j], alpha) for j in range(w)]
    rates = np.minimum([repeated, missing, [beyond_extremes(n, alpha)] * w], LARGEST_RATE)
    return {
        "low": _single_below(np.nanmin(residual, axis=0)),
        "high": -_single_below(-np.nanmax(residual, axis=0)),
        "rates": _single(rates),
    }


def _misses(missing: NDArray[np.bool_], alpha: float) -> float:
    """Most a value's chance of being missing may be; where they miss in bursts, of the next within one."""
    count, again = int(missing.sum()), int((missing[1:] & missing[:-1]).sum())
    rate = binomial_above(count, len(missing), alpha)
    bursts = again >= FEWEST_AGAIN and again / count > rate
    return max(rate, binomial_above(again, count, alpha)) if bursts else rate


def _repeats(x: Floats, alpha: float) -> float:
    """Most a value's chance of being followed by itself may be: of the stickiest value that is seen often."""
    same = x[1:] == x[:-1]
    rate = binomial_above(int(same.sum()), len(same), alpha)
    values, number, counts = np.unique(x[:-1], return_inverse=True, return_counts=True)
    often = np.flatnonzero((counts >= len(x) / 100) & np.isfinite(values))
    stay = np.bincount(number, weights=same, minlength=len(values))
    return max([rate] + [binomial_above(int(stay[at]), int(counts[at]), alpha / len(often)) for at in often])


def _bins(x: Floats, chosen: NDArray[np.int64], predicted: NDArray[Any] | None, labels: int) -> dict[str, Any]:
    """Shares of columns of few values and of the predicted classes, where one row's value does not tell the next's: a
    bet on shares is fair for independent rows only. A door that stays open is no category in this sense.
    """
    found: list[tuple[int, Floats, Floats]] = []
    for place in range(len(chosen)):
        values = np.unique(x[np.isfinite(x[:, place]), place])
        if len(values) <= MOST_VALUES and _independent(x[:, place], values):
            found.append((place, values, x[:, place]))
    if predicted is not None and labels > 1:
        classes, column = np.arange(labels, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
        if _independent(column, classes):
            found.append((-1, classes, column))
    width = max((len(values) for _, values, _ in found), default=0)
    share = np.zeros((len(found), width + 1))
    bound = np.zeros((len(found), width + 1))
    table = np.full((len(found), width), np.nan)
    alpha = (1 - OTHERS_SURE) / max(1, len(found) * (width + 1))
    for row, (_, values, column) in enumerate(found):
        counts = [int((column == value).sum()) for value in values]
        known = int(np.isfinite(column).sum())
        table[row, : len(values)] = values
        share[row, [*range(len(values)), -1]] = (np.array([*counts, 0]) + 0.5) / (known + 0.5 * (len(values) + 1))
        bound[row, [*range(len(values)), -1]] = [binomial_above(count, known, alpha) for count in (*counts, 0)]
    return {
        "bin_column": np.array([place for place, _, _ in found], dtype=np.int16),
        "bin_values": _single(table),
        "bin_share": _single(share),
        "bin_bound": _single(np.where(bound > 0, bound, 1.0)),
    }


def _independent(column: Floats, values: Floats) -> bool:
    """Whether no value's coming and going shows dependence in time."""
    known = np.isfinite(column)
    lowest = INDEPENDENT / len(values)
    return all(
        _ljung_box(np.where(known, column == value, np.nan)) > lowest
        for value in values
        if 0 < np.count_nonzero(column == value) < np.count_nonzero(known)
    )


def binomial_above(count: int, n: int, alpha: float) -> float:
    """Upper confidence bound of a rate after `count` of `n`, wrong with probability alpha (Clopper and Pearson, by
    the chance of at most `count`).
    """
    if count >= n:
        return 1.0
    low, high = count / n, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (low, rate) if _binomial_at_most(count, n, rate) < alpha else (rate, high)
    return high


def _binomial_at_most(count: int, n: int, rate: float) -> float:
    if not 0 < rate < 1:
        return 1.0 if rate <= 0 else 0.0
    at = np.arange(max(0, count - 2000), count + 1)  # terms further down are nothing
    lgamma = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in at.tolist()])
    terms = lgamma + at * math.log(rate) + (n - at) * math.log1p(-rate)
    top = float(terms.max())
    return math.exp(top) * float(np.exp(terms - top).sum())


def beyond_extremes(n: int, alpha: float) -> float:
    """Most of a continuous law that lies outside the extremes of n rows, wrong with probability alpha.

    The part outside is Beta(2, n - 1): P(more than p) = (1 - p)^n + n p (1 - p)^(n - 1) (Wilks, 1941).
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        chance = (1 - p) ** n + n * p * (1 - p) ** (n - 1)
        low, high = (p, high) if chance > alpha else (low, p)
    return high


def _chi_square_above(x: float, degrees: int) -> float:
    """P(chi-square with an even number of degrees > x): a Poisson sum."""
    half = x / 2
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(degrees // 2)) if half < 700 else 0.0


def _chi_square_quantile(sure: float, degrees: int) -> float:
    """Wilson and Hilferty, 1931: within 1 % from 3 degrees on, on the safe side for fewer at 99 %."""
    a = 2 / (9 * degrees)
    return float(degrees * (1 - a + NormalDist().inv_cdf(sure) * math.sqrt(a)) ** 3)


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _single_below(values: Floats) -> NDArray[np.float32]:
    """The largest float32 that is not above: a row of the reference itself is never out of range."""
    single = values.astype(np.float32)
    return np.where(single > values, np.nextafter(single, np.float32(-np.inf)), single)
