"""Has a stationary stream changed? Shiryaev-Roberts e-detectors: an alarm rate that is promised by construction.

A BET is a number E >= 0 made of one batch of k rows whose mean is at most 1 as long as nothing has changed, whatever
came before. Its e-detector is R <- (R + 1) E. While nothing has changed the mean of R after b batches is at most b;
so is that of any average of such R, with weights fixed beforehand. Raising when the average reaches A therefore gives
a mean time to a false alarm of at least A batches (Shin, Ramdas, Rinaldo, E-detectors, 2024, theorem 2.4: optional
stopping of R - b). Here A = claim_rows / k. No simulation, no table, no correction for the number of bets.

NOTHING HAS CHANGED means, for the standardised and clipped residual z of each feature and given all earlier rows: no
charge below is too small. Every charge covers a set of laws around the reference: shifts up to the user's tolerance,
or what n reference rows leave open at 95 % for all charges at once (compressor/stationary.py), whichever is larger.

LINEAR BETS   E = exp(c sum(s) - k charge), s a fixed statistic of a row. Fair because charge >= log mean exp(c s),
    from the empirical moment generating function:
    mean        of a feature, both signs: s = z
    variance    of a feature, both signs: s = (min(z^2, 9) - m) / sd
    spread      of all features together, both signs: s = the sum of these, standardised and clipped
    counter     repeated, missing, beyond the reference's extremes: s = 0 or 1; the likelihood ratio of a rate p1
                against the bound p < p1, whose mean only falls with the true rate: fair for all rates <= p
PLUG-IN BETS  the direction was learnt from EARLIER batches, so it is fixed when the batch comes. No charge could be
    tabled for every direction; these are fair by algebra:
    level, pair the mean along a direction, the product of two whitened features: the product over rows of
                (1 + x + x^2/3) / (1 + V/3), for all laws with mean(x) <= 0 and variance <= V (`quadratic_bet`).
                It is above exp(x - x^2/6) (Delyon, 2009), so for small x it wins what exp(x - V/2) would, the best
                there is for a Gaussian x, and for large x it still wins
    axis        the variance along a direction v: the product of 1 + l (q / Q - 1), q = (v y)^2 >= 0, 0 < l < 1, for
                all laws with mean(q) <= Q
    bins        categorical values, the predicted class: the product of guess(value) / bound(value), for all shares <=
                bound, because the guesses sum to 1

A value that is missing counts as z = 0 and s = 0 and still pays its charge: it can only delay an alarm.

All arithmetic is on blocks of exactly k rows, in few numpy calls; nothing here depends on how rows came in.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.drift.models import StationaryModel

BATCH_ROWS: Final = 16
CLIP: Final = 4.0  # standard deviations; beyond it a value says no more
SQUARE_CLIP: Final = 9.0
MEAN_BETS: Final = (0.125, 0.25, 0.5, 1.0, -0.125, -0.25, -0.5, -1.0)
VARIANCE_BETS: Final = (0.1, 0.25, 0.5, -0.25, -0.5)
SCALES_ROWS: Final = (32, 128, 512)  # memories of the plug-in mean
PAIR_BETS: Final = (0.2, 0.45)
AXIS_BETS: Final = (0.1, 0.35)
COVARIANCE_ROWS: Final = 256
LONGEST_DIRECTION: Final = 1.5
COUNTERS: Final = ("repeated", "missing", "range")
PRIOR_ROWS: Final = 16.0  # of the reference's shares, in the plug-in guess of a category
BIN_MEMORY_ROWS: Final = 256
# which part of the average a family has; any numbers are fair, these spend most on what is asked for most
WEIGHTS: Final = {
    "mean": 0.40, "variance": 0.16, "level": 0.12, "spread": 0.05, "pair": 0.12, "axis": 0.05, "counter": 0.06,
    "bins": 0.04,
}  # fmt: skip
LEAST_AWAY: Final = 0.05  # a change of less, in standard deviations, is back
LEAST_RATE: Final = 0.01  # as a share of the rows
CEILING: Final = 1e6  # times the threshold: no single e-detector grows beyond it, so that it also comes down again

_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_CLIP: Final = np.float32(CLIP)
_SQUARE_CLIP: Final = np.float32(SQUARE_CLIP)
_LARGEST: Final = np.float32(60.0)  # of an exponent: far over the ceiling, and no overflow
_FORGIVEN: Final = np.float32(0.1)  # nats a batch: a plug-in bet that waits for a direction has exponent 0
_LOG_3: Final = math.log(3.0)
_SHORTEST: Final = 1e-12

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


class Batch(NamedTuple):
    """One block of k rows as the bets see it.

    z: (k, w) standardised, clipped, 0 = missing; counts: (3, w) rows that repeated, missed, left the range; codes:
    (k, m) number of each categorical's value.
    """

    z: Singles
    counts: Floats
    codes: NDArray[np.int64]


class Leading(NamedTuple):
    """A statistic that carries evidence. kind: as WEIGHTS, a counter by its name; at, other: feature numbers (or the
    number of the categorical); sign; size: how far its mean is away, in the statistic's unit; age: batches since the
    change; direction: (w,) in whitened space, where it has one.
    """

    kind: str
    at: int
    other: int
    sign: float
    size: float
    age: float
    direction: NDArray[Any]


class EDetector:
    """The average of all e-detectors of one view. Mutable, owned by one thread."""

    def __init__(self, model: StationaryModel) -> None:
        self._width = len(model.columns)
        self._model = model
        self._threshold = model.claim_rows / BATCH_ROWS
        self._tolerates = bool(model.tolerance_sd.any())
        self._bets(model)
        self._plug_ins(model)
        self.reset()

    # --- what is bet on ---
    def _bets(self, model: StationaryModel) -> None:
        """Linear bets, as one gather: exponent = coefficient * statistic[which] - charge."""
        w, k = self._width, BATCH_ROWS
        which: list[NDArray[Any]] = []
        coefficient: list[NDArray[Any]] = []
        charge: list[NDArray[Any]] = []
        family: list[str] = []
        feature: list[NDArray[Any]] = []

        def place(kind: str, at: NDArray[Any], per_unit: Any, per_row: Any, of: Any) -> None:
            which.append(at)
            coefficient.append(np.broadcast_to(per_unit, at.shape))
            charge.append(np.broadcast_to(per_row, at.shape) * k)
            family.extend([kind] * len(at))
            feature.append(np.broadcast_to(of, at.shape))

        own = np.arange(w)
        for bet, per_row in zip(MEAN_BETS, model.mean_charge, strict=True):
            place("mean", own, np.float64(bet), per_row, own)
        scale, centre = model.variance_scale.astype(np.float64), model.variance_centre.astype(np.float64)
        for bet, per_row in zip(VARIANCE_BETS, model.variance_charge, strict=True):
            place("variance", w + own, bet / scale, per_row + bet * centre / scale, own)
        for bet, per_row in zip(VARIANCE_BETS, model.dense_charge, strict=True):
            place("spread", np.array([2 * w]), np.float64(bet), per_row, -1)
        for number, rate in enumerate(model.rates.astype(np.float64)):
            for likely in counter_bets(rate):
                gain = np.log(likely / rate) - np.log((1 - likely) / (1 - rate))
                place("counter", 2 * w + 1 + number * w + own, gain, -np.log((1 - likely) / (1 - rate)), own)
        self._which = np.concatenate(which)
        self._linear = len(self._which)
        self._linear_coefficient = np.concatenate(coefficient).astype(np.float32)
        self._charge = np.concatenate(charge).astype(np.float32)
        self._level_bets = len(SCALES_ROWS)
        self._axis_at = self._level_bets + (len(PAIR_BETS) if w > 1 else 0)
        plug_ins = ["level"] * self._level_bets + ["pair"] * (self._axis_at - self._level_bets)
        plug_ins += ["axis"] * len(AXIS_BETS) + ["bins"] * len(model.bin_column)
        self._bins_at = self._linear + len(plug_ins) - len(model.bin_column)
        self.family = np.array(family + plug_ins)
        self.feature = np.concatenate([*feature, np.full(len(plug_ins), -1)])
        self._sign = np.sign(np.concatenate([self._linear_coefficient, np.ones(len(plug_ins))]))
        present = {kind: int((self.family == kind).sum()) for kind in WEIGHTS}
        total = sum(WEIGHTS[kind] for kind, count in present.items() if count)
        weight = [WEIGHTS[str(kind)] / total / present[str(kind)] for kind in self.family]
        self._weight = np.array(weight, dtype=np.float32)
        self._ceiling = np.float32(CEILING * self._threshold)

    def _plug_ins(self, model: StationaryModel) -> None:
        k, w = BATCH_ROWS, self._width
        self._whitening = np.ascontiguousarray(model.whitening, dtype=np.float32)
        self._ones, self._ones_w, self._ones64 = np.ones(k, np.float32), np.ones(w, np.float32), np.ones(k)
        learn = np.array([2 / (rows / k + 1) for rows in SCALES_ROWS])
        self._learn = (learn / k).astype(np.float32)[:, None]
        self._keep_means = (1 - learn).astype(np.float32)[:, None]
        # an exponential mean of n rows' worth has 1/n of a row's variance
        self._worth: list[float] = (k * (2 - learn) / learn).tolist()
        self._noise = w + 1.5 * math.sqrt(2 * w)  # what a whitened mean of pure noise has, and some more
        self._forget = np.float32(2 / (COVARIANCE_ROWS / k + 1))
        square = np.zeros((2, w, w), dtype=np.float32)
        for at, values in enumerate((model.pair_mean, model.pair_square)):
            square[at][np.triu_indices(w, 1)] = values
            square[at] += square[at].T
        self._pair_mean, self._pair_square = square
        self._expected = self._pair_mean + np.eye(w, dtype=np.float32)
        self._pair_bets = np.array(PAIR_BETS)
        self._axis_bets = np.array(AXIS_BETS)
        self._axis_rest = 1.0 - self._axis_bets
        self._spread_weight = (1 / (model.variance_scale * model.dense_scale)).astype(np.float32)
        middle = (model.variance_centre / model.variance_scale).sum() + model.dense_centre
        self._spread_middle = np.float32(middle / model.dense_scale)
        self._bins = _Bins(model)
        self._statistic = np.zeros(5 * w + 1, dtype=np.float32)
        self._before = np.zeros(5 * w + 1)  # the statistics' means at the reference
        self._before[w : 2 * w] = model.variance_centre
        self._both = np.empty((k, 2 * w + 1), dtype=np.float32)
        self._exponent = np.empty(len(self.family), dtype=np.float32)
        self._still = np.empty(len(self.family), dtype=bool)
        self._squared = np.empty((w, w), dtype=np.float32)
        self._gain = np.empty((k, self._axis_at + len(AXIS_BETS)))

    def reset(self) -> None:
        """Forget all evidence and everything learnt of the stream."""
        w = self._width
        self.wealth = np.zeros(len(self.family), dtype=np.float32)
        self._climb = np.zeros(len(self.family), dtype=np.float32)
        self._age = np.zeros(len(self.family), dtype=np.float32)  # batches since that CUSUM was last 0
        self._means = np.tile(self._before.astype(np.float32), (len(SCALES_ROWS), 1))
        self._products = self._expected.copy()
        self._axis = np.full(w, 1 / math.sqrt(w), dtype=np.float32)
        self._bins.reset()

    # --- one batch ---
    def update(self, batch: Batch) -> float:
        """Take in one block; returns the evidence: the average of all e-detectors over the threshold."""
        exponent = self._exponent
        white = batch.z @ self._whitening
        self._sum(batch)
        linear = exponent[: self._linear]
        np.take(self._statistic, self._which, out=linear, mode="clip")  # "raise" would copy
        linear *= self._linear_coefficient
        linear -= self._charge
        exponent[self._linear : self._bins_at] = self._plug_in_exponents(batch.z, white)
        if self._bins_at < len(exponent):
            exponent[self._bins_at :] = self._bins.exponents(batch.codes)
            self._bins.learn(batch.codes)
        self._bet(exponent)
        self._learn_from(white)
        return self.evidence()

    def evidence(self) -> float:
        """The average over the threshold: 1 raises. While nothing has changed its mean is at most batches / A."""
        return float(self._weight @ self.wealth) / self._threshold

    # --- what carries the evidence ---
    def feature_wealth(self) -> Floats:
        """(w,): per feature, log of 1 + what bets on it won on average; joint bets share theirs by who is away."""
        w = self._width
        wealth = self.wealth.astype(np.float64)
        total = np.zeros(w)
        for kind in ("mean", "variance", "counter"):
            here = self.family == kind
            np.maximum.at(total, self.feature[here], wealth[here])
        own = np.log1p(total)
        joint = np.zeros(w)
        for one in self.leading(len(WEIGHTS)):
            if one.kind in ("level", "spread", "pair", "axis", "bins"):
                won = math.log1p(float(wealth[self.family == one.kind].max()))
                joint = np.maximum(joint, won * self._parts(one))
        result: Floats = np.maximum(own, joint)
        return result

    def _parts(self, one: Leading) -> Floats:
        """(w,): how much of a joint statistic each feature makes, the largest 1."""
        parts = np.zeros(self._width)
        match one.kind:
            case "pair":
                parts[[one.at, one.other]] = 1.0
            case "bins":
                column = int(self._model.bin_column[one.at])
                if column >= 0:
                    parts[column] = 1.0
                return parts
            case "spread":
                parts = np.maximum(one.sign * self._excess(one.age), 0.0) ** 2
            case _:
                parts = one.direction.astype(np.float64) ** 2
        return parts / max(float(parts.max()), 1e-12)

    def family_shares(self) -> dict[str, float]:
        """Family -> its share of the average."""
        parts = {kind: float((self._weight * self.wealth)[self.family == kind].sum()) for kind in WEIGHTS}
        total = sum(parts.values()) or 1.0
        return {kind: value / total for kind, value in parts.items()}

    def leading(self, most: int) -> list[Leading]:
        """The statistics with the most wealth, the strongest first: at least one, at most `most`, none a square root
        of the threshold below the first.
        """
        weighted = self._weight * self.wealth
        order = np.argsort(-weighted, kind="stable")
        least = weighted[order[0]] / math.sqrt(self._threshold)
        found: dict[tuple[str, int, int], Leading] = {}
        for bet in order.tolist():
            if weighted[bet] < least or len(found) == most:
                break
            one = self._described(bet)
            found.setdefault((one.kind, one.at, one.other), one)
        return list(found.values())

    def _described(self, bet: int) -> Leading:
        kind, feature = str(self.family[bet]), int(self.feature[bet])
        age = float(self._age[bet])
        sign = float(self._sign[bet])
        nothing = np.zeros(0, dtype=np.float32)
        shifts, ratios = self.sizes(age)
        match kind:
            case "mean":
                return Leading(kind, feature, -1, sign, abs(float(shifts[feature])), age, nothing)
            case "variance":
                return Leading(kind, feature, -1, sign, abs(float(self._excess(age)[feature])), age, nothing)
            case "spread":
                size = abs(float(self._recent(age)[2 * self._width]))
                return Leading(kind, int(np.abs(ratios - 1).argmax()), -1, sign, size, age, nothing)
            case "counter":
                statistic = int(self._which[bet])
                number = (statistic - 2 * self._width - 1) // self._width
                return Leading(COUNTERS[number], feature, -1, 1.0, float(self._recent(age)[statistic]), age, nothing)
            case "bins":
                at = bet - (len(self.family) - len(self._model.bin_column))
                return Leading(kind, at, -1, 1.0, self._bins.divergence(at), age, self._bins.gains(at))
            case "pair":
                i, j, sign = self._oddest_pair()
                size = abs(float(self._products[i, j] - self._expected[i, j])) / self._warmth(age)
                return Leading(kind, i, j, sign, size, age, nothing)
            case "axis":
                axis = self._axis.copy()
                size = float(axis @ self._products @ axis) - 1.0
                return Leading(
                    kind, int(np.abs(axis).argmax()), -1, 1.0, min(size / self._warmth(age), 3.0), age, axis
                )
            case _:
                learnt = self._means[bet - self._linear, : self._width] @ self._whitening
                length = max(float(np.sqrt(learnt @ learnt)), 1e-12)
                unit = learnt / np.float32(length)
                return Leading(kind, int(np.abs(unit).argmax()), -1, 1.0, length, age, unit)

    def feature_of(self, one: Leading) -> int:
        """The feature to speak of; of a class histogram none, then the oddest."""
        if one.kind == "bins":
            column = int(self._model.bin_column[one.at])
            return column if column >= 0 else int(np.abs(self.sizes(one.age)[0]).argmax())
        return one.at

    def sizes(self, age: float) -> tuple[Floats, Floats]:
        """Per feature over about the last `age` batches: shift of the mean in sd, and sd over the reference's."""
        means = self._recent(age)
        shift = means[: self._width]
        square = np.maximum(means[self._width : 2 * self._width] - shift**2, 0.0)
        return shift, np.sqrt(square / self._model.variance_centre)

    def _excess(self, age: float) -> Floats:
        """Per feature: how much its clipped square is above the reference's, in its sd."""
        away: Floats = (self._recent(age) - self._before)[self._width : 2 * self._width]
        return away / self._model.variance_scale

    def _recent(self, age: float) -> Floats:
        """Means since a change `age` batches ago: of the longest memory not much longer, as if it had begun then."""
        scale = max((at for at, rows in enumerate(SCALES_ROWS) if rows <= 2 * age * BATCH_ROWS), default=0)
        left = float(self._keep_means[scale, 0]) ** max(age, 1.0)
        recent: Floats = (self._means[scale] - left * self._before) / (1.0 - left)
        return recent

    def _warmth(self, age: float) -> float:
        """How much of a change `age` batches ago the products have learnt."""
        left: float = (1.0 - float(self._forget)) ** max(age, 1.0)
        return 1.0 - left

    def return_bet(self, one: Leading, batch: Batch) -> float:
        """Log of a bet of one block against `one` still being away by half of its size: fair, whatever the law, as
        long as the mean of x is at least eta: the product over rows of 1 + l (eta - x), for x <= most.
        """
        x, most = self._rows_of(one, batch)
        counted = one.kind in COUNTERS
        eta = max(one.size / 2, LEAST_RATE if counted else LEAST_AWAY)
        # the stake that wins most if x is back at mean 0 with variance 1; a counter's is about 0 all the time
        stake = 0.9 / (most - eta) if counted else min(eta / (1.0 + eta * eta), 0.9 / (most - eta))
        return float(np.log1p(stake * (eta - x)).sum())

    def _rows_of(self, one: Leading, batch: Batch) -> tuple[Floats, float]:
        """The statistic of each row of a block, its mean about 0 at the reference and `one.size` when it was found
        (a counter's: 0 or 1), and the most it can be.
        """
        model, z = self._model, batch.z
        match one.kind:
            case "mean":
                return one.sign * z[:, one.at].astype(np.float64), 2 * CLIP
            case "variance":
                square = np.minimum(z[:, one.at].astype(np.float64) ** 2, SQUARE_CLIP)
                scale = float(model.variance_scale[one.at])
                return one.sign * (square - float(model.variance_centre[one.at])) / scale, SQUARE_CLIP / scale
            case "spread":
                return one.sign * self._spread(np.minimum(z * z, np.float32(SQUARE_CLIP))).astype(np.float64), CLIP
            case "pair":
                product = self._product(z @ self._whitening, one.at, one.other)
                return one.sign * (product.astype(np.float64) - float(self._pair_mean[one.at, one.other])), 2 * CLIP
            case "axis":
                along = (z @ self._whitening @ one.direction).astype(np.float64)
                return np.minimum(along**2, SQUARE_CLIP) - 1.0, SQUARE_CLIP - 1.0
            case "level":
                along = (z @ self._whitening @ one.direction).astype(np.float64)
                return np.clip(along, -CLIP, CLIP), CLIP
            case "bins":
                codes = batch.codes[:, one.at]
                return np.where(codes >= 0, one.direction[np.maximum(codes, 0)], 0.0), CLIP
            case _:
                number = COUNTERS.index(one.kind)
                count = float(batch.counts[number, one.at])
                return np.repeat([1.0, 0.0], [int(count), BATCH_ROWS - int(count)]), 1.0

    def state(self) -> dict[str, Any]:
        """Arrays and numbers a restart needs."""
        return {
            "wealth": self.wealth, "climb": self._climb, "age": self._age, "means": self._means,
            "products": self._products,
            "axis": self._axis, "seen": self._bins.seen,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.wealth, self._climb, self._age, self._means = (
            state[name] for name in ("wealth", "climb", "age", "means")
        )
        self._products, self._axis, self._bins.seen = state["products"], state["axis"], state["seen"]

    # --- the bets ---
    def _bet(self, exponent: Singles) -> None:
        """R <- (R + 1) E for all; beside it a CUSUM of each exponent, whose last zero is the likeliest change."""
        climb, still = self._climb, self._still
        climb += exponent
        climb -= _FORGIVEN
        np.maximum(climb, _ZERO, out=climb)
        self._age += _ONE
        np.greater(climb, _ZERO, out=still)
        self._age *= still
        np.minimum(exponent, _LARGEST, out=exponent)
        np.exp(exponent, out=exponent)
        self.wealth += _ONE
        self.wealth *= exponent
        np.minimum(self.wealth, self._ceiling, out=self.wealth)

    def _sum(self, batch: Batch) -> None:
        """The linear bets' statistics, summed over the block: z, clipped squares, their spread, counters."""
        w, both = self._width, self._both
        both[:, :w] = batch.z
        squares = both[:, w : 2 * w]
        np.multiply(batch.z, batch.z, out=squares)
        np.minimum(squares, _SQUARE_CLIP, out=squares)
        both[:, 2 * w] = self._spread(squares)
        np.matmul(self._ones, both, out=self._statistic[: 2 * w + 1])
        self._statistic[2 * w + 1 :] = batch.counts.ravel()

    def _spread(self, squares: Singles) -> Singles:
        """(k,): the standardised clipped squares of a row, summed, standardised again and clipped."""
        spread: Singles = squares @ self._spread_weight
        spread -= self._spread_middle
        np.minimum(spread, _CLIP, out=spread)
        return np.maximum(spread, -_CLIP, out=spread)

    def _plug_in_exponents(self, z: Singles, white: Singles) -> Floats:
        """Log of each plug-in bet: mean along three directions, the oddest pair, the widest axis."""
        level, axis, gain = self._level_bets, self._axis_at, self._gain
        pay = [0.0] * (axis + len(AXIS_BETS))  # log of what each bet costs a row
        direction, length = self._directions()
        if direction is None:
            gain[:, :level] = 0.0
        else:
            along = direction @ self._whitening
            gain[:, :level] = z @ along.T
            gain[:, :level] -= self._level_band(along, length)
            pay[:level] = [math.log1p(self._model.inflation * each * each / 3.0) for each in length]
        if level < axis:
            i, j, sign = self._oddest_pair()
            square = float(self._pair_square[i, j])
            band = sign * float(self._pair_mean[i, j]) + self._pair_band(i, j, square)
            pair = gain[:, level:axis]
            np.multiply(self._product(white, i, j)[:, None], sign * self._pair_bets, out=pair)
            pair -= band * self._pair_bets
            pay[level:axis] = [math.log1p(square * bet * bet / 3.0) for bet in PAIR_BETS]
        quadratic = gain[:, :axis]  # 1 + x + x^2/3 = ((x + 3/2)^2 + 3/4) / 3
        quadratic += 1.5
        quadratic *= quadratic
        quadratic += 0.75
        pay[:axis] = [each + _LOG_3 for each in pay[:axis]]
        q = white @ self._axis
        q *= q
        wide = gain[:, axis:]
        np.multiply(q[:, None], self._axis_bets / self._largest_variance(), out=wide)
        wide += self._axis_rest
        won: list[float] = (self._ones64 @ np.log(gain)).tolist()
        return np.array([one - BATCH_ROWS * cost for one, cost in zip(won, pay, strict=True)])

    def _directions(self) -> tuple[Singles | None, list[float]]:
        """Plug-in directions in whitened space, one a scale, shrunk towards none; and their lengths. None: all 0."""
        learnt = self._means[:, : self._width] @ self._whitening
        squares: list[float] = ((learnt * learnt) @ self._ones_w).tolist()
        lengths = [
            min(math.sqrt(square) * max(0.0, 1.0 - self._noise / max(square * worth, 1e-12)), LONGEST_DIRECTION)
            for square, worth in zip(squares, self._worth, strict=True)
        ]
        if not any(lengths):
            return None, lengths
        kept = [length / math.sqrt(max(square, 1e-24)) for length, square in zip(lengths, squares, strict=True)]
        learnt *= np.array(kept, dtype=np.float32)[:, None]
        return learnt, lengths

    def _level_band(self, along: Singles, length: list[float]) -> Floats:
        band = np.array(length) * self._model.radius
        if self._tolerates:
            band = np.maximum(band, np.abs(along) @ self._model.tolerance_sd)
        return band

    def _pair_band(self, i: int, j: int, square: float) -> float:
        tolerance = self._model.tolerance_sd
        return max(self._model.pair_band, float(tolerance[i]), float(tolerance[j])) * math.sqrt(square)

    def _product(self, white: Singles, i: int, j: int) -> Singles:
        product: Singles = white[:, i] * white[:, j]
        np.minimum(product, _CLIP, out=product)
        return np.maximum(product, -_CLIP, out=product)

    def _oddest_pair(self) -> tuple[int, int, float]:
        off = self._products - self._expected
        off.flat[:: self._width + 1] = 0.0
        i, j = divmod(int(np.abs(off).argmax()), self._width)
        if i == j:  # nothing was learnt yet
            i, j = 0, 1
        return i, j, 1.0 if off[i, j] >= 0 else -1.0

    def _largest_variance(self) -> float:
        """Most that the mean of (v y)^2 may be along the axis v, of length 1."""
        model = self._model
        shift, most = model.radius, model.inflation
        if self._tolerates:
            shift = max(shift, float(np.abs(self._whitening @ self._axis) @ model.tolerance_sd))
            most = max(most, 1.0 + float(model.tolerance_sd.max()))
        return most + shift * shift

    def _learn_from(self, white: Singles) -> None:
        """After the bets: what was learnt from a batch is for the next ones only."""
        self._means *= self._keep_means
        self._means += self._learn * self._statistic
        products = np.matmul(white.T, white, out=self._squared)
        products *= self._forget / np.float32(BATCH_ROWS)
        self._products *= _ONE - self._forget
        self._products += products
        axis = self._products @ self._axis
        axis -= self._axis
        length = float(axis @ axis)
        if length > _SHORTEST:
            axis *= np.float32(1 / math.sqrt(length))
            self._axis = axis


def quadratic_bet(x: Floats, variance: float) -> float:
    """Log of the product over rows of (1 + x + x^2/3) / (1 + variance/3): fair when each x has mean <= 0, >= -3 and a
    variance of at most `variance`. x: (rows,).

    Proof: mean(1 + x + x^2/3) <= 1 + m + (variance + m^2) / 3 with m = mean(x), and m + m^2/3 <= 0 for -3 <= m <= 0.
    """
    return float(np.log1p(x + x * x / 3.0).sum()) - len(x) * math.log1p(variance / 3.0)


def counter_bets(rate: Floats) -> tuple[Floats, Floats]:
    """The two rates bet on against `rate`, both above it: the fair bet's ratio then only falls with the true rate."""
    high = np.maximum(0.5, (1 + rate) / 2)
    return high, np.sqrt(rate * high)


class _Bins:
    """Categorical values: bets that their shares are what they lately were, not the reference's."""

    def __init__(self, model: StationaryModel) -> None:
        self._count, values = model.bin_values.shape
        self._size = values + 1
        self._offset = np.arange(self._count) * self._size
        self._share = model.bin_share.astype(np.float64).ravel()
        self._bound = np.log(np.maximum(model.bin_bound.astype(np.float64), 1e-12)).ravel()
        self._keep = 1 - 2 / (BIN_MEMORY_ROWS / BATCH_ROWS + 1)
        self.reset()

    def reset(self) -> None:
        self.seen = np.zeros(self._count * self._size)

    def guess(self) -> Floats:
        seen = self.seen.reshape(self._count, -1)
        mixed: Floats = (seen + PRIOR_ROWS * self._share.reshape(self._count, -1)) / (
            seen.sum(axis=1, keepdims=True) + PRIOR_ROWS
        )
        return mixed

    def exponents(self, codes: NDArray[np.int64]) -> Floats:
        """codes: (k, m) number of each value, the last number = any other, -1 = missing."""
        if not self._count:
            return np.zeros(0)
        with np.errstate(divide="ignore"):
            gain = np.log(self.guess()).ravel() - self._bound
        rows: Floats = np.where(codes >= 0, gain[np.maximum(codes, 0) + self._offset], 0.0)
        total: Floats = rows.sum(axis=0)
        return total

    def gains(self, at: int) -> Floats:
        """(b + 1,): what each value of one categorical wins now, clipped."""
        guess = np.maximum(self.guess(), 1e-12)[at]
        gains: Floats = np.clip(np.log(guess) - self._bound.reshape(self._count, -1)[at], -CLIP, CLIP)
        return gains

    def divergence(self, at: int) -> float:
        """What a row of one categorical wins on average now, in nats."""
        return max(float(self.guess()[at] @ self.gains(at)), 0.0)

    def learn(self, codes: NDArray[np.int64]) -> None:
        if self._count:
            flat = (codes + self._offset)[codes >= 0]
            self.seen *= self._keep
            self.seen += np.bincount(flat, minlength=len(self.seen))
