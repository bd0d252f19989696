"""The monitor of stationary streams: raises when an e-detector suite has found a change, says where, and takes it
back only when a test says that the stream is what it was.

PROMISE. While nothing changes, a false alarm comes on average not before `claim_rows` rows. It holds, without any
simulation, if what the pre-transform leaves has a mean that does not move with its past and lies within the charges
of the reference (edetector.py); the reference says with which confidence it does (compressor/stationary.py). Of a
stream that breaks this (regimes, a season that was not fitted) nothing is promised: the build replays it and says so.

TAKING IT BACK. The raised state ends by a test of its own: for the statistics that carry the finding, that they are
STILL away by at least half of what they were when it was raised. Its bet 1 + l (eta - x), x <= most, 0 < l < 1 /
(most - eta), has a mean of at most 1 as long as mean(x) >= eta, whatever the law of x (Waudby-Smith, Ramdas, 2024,
section 4); its e-detector must reach the same threshold as an alarm. So a finding is not taken back too early more
often than one is raised too early, a change that stays is reported as long as it stays, and the reference never
moves.

Rows are judged in blocks of 16. Knows nothing of what is done about a finding.
"""

from __future__ import annotations

import base64
import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.drift.edetector import BATCH_ROWS, CLIP, Batch, EDetector, Leading
from agent.drift.explanation import Explanation, How, Looked, Trail, explain
from agent.drift.findings import Finding
from agent.drift.models import StationaryModel
from agent.drift.reference import Reference
from agent.drift.transforms import Transform

NAMED_SHARE: Final = 0.5  # of the strongest log-wealth: features above it are named too
SINGLE_SHARE: Final = 0.25  # of the first's: a second one above it means that it is not one channel's fault
TOLD: Final = 8  # channels whose share a finding tells
LARGEST: Final = 1e30  # a number beyond it is as good as none
MOST_TESTS: Final = 4  # statistics that must be back before a finding ends

HOWS: Final = {
    "mean": How.SHIFT, "level": How.SHIFT, "variance": How.SPREAD, "spread": How.SPREAD, "pair": How.RELATION,
    "repeated": How.REPEATED, "missing": How.MISSING, "range": How.RANGE, "bins": How.SHARES,
}  # fmt: skip
"""What a family's evidence about its first feature is about; of an axis it is said by the rows."""

Floats = NDArray[np.float64]


class _Return(NamedTuple):
    """One statistic that must be back, and the value of the e-detector that says it is."""

    leading: Leading
    wealth: float


class StationaryMonitor:
    """Follows one stream. Owned by one thread; `state` and `restore` carry it over a restart, bit for bit."""

    def __init__(self, reference: Reference) -> None:
        """Raises: ValueError when the reference has no stationary model."""
        if reference.stationary is None:
            raise ValueError("this reference has no stationary model")
        self._model = model = reference.stationary
        self._digest = reference.digest()
        self._columns = np.asarray(model.columns, dtype=np.int64)
        self._names = tuple(
            reference.channels[channel] if channel >= 0 else reference.features[column]
            for column, channel in zip(
                self._columns.tolist(), reference.channel_of[self._columns].tolist(), strict=True
            )
        )
        self._features = tuple(reference.features[column] for column in self._columns.tolist())
        self._channels = tuple(dict.fromkeys(self._names))
        self._place = np.array([self._channels.index(name) for name in self._names])
        self._transform = Transform(model)
        self._detector = EDetector(model)
        offset, self._per_scale = model.offset.astype(np.float64), 1 / model.scale.astype(np.float64)
        self._middle = model.centre + offset / self._per_scale
        self._least, self._most = -CLIP - offset, CLIP - offset
        self._counts = np.zeros((3, len(self._columns)))
        self._no_codes = np.zeros((BATCH_ROWS, 0), dtype=np.int64)
        self._all_columns = self._columns.tolist() == list(range(len(reference.features)))
        self._low, self._high = model.low.astype(np.float64), model.high.astype(np.float64)
        self._bin_values = [values[np.isfinite(values)].astype(np.float64) for values in model.bin_values]
        self._threshold = model.claim_rows / BATCH_ROWS
        self._offset = offset
        self._looked = looked_at(reference, model)
        self._alarms = 0
        self._missing = 0
        self.reset()

    def reset(self) -> None:
        """Start anew, as after a switch or a repair; what was raised is forgotten without a finding."""
        w = len(self._columns)
        self._block = np.full((1 + BATCH_ROWS, w), np.nan)  # the row before it first, for repeats
        self._predicted = np.full(BATCH_ROWS, -1, dtype=np.int64)
        self._time_s = np.full(BATCH_ROWS, np.nan)
        self._filled = 0
        self._transform.reset()
        self._detector.reset()
        self._raised: tuple[str, ...] | None = None
        self._shares: dict[str, float] = {}
        self._raised_rows = 0
        self._since = 0  # rows from the estimated change to the finding that stands
        self._trail = Trail(w, block_rows=BATCH_ROWS)
        self._returns: tuple[_Return, ...] = ()
        self._seen = 0

    # --- rows ---
    def follow(
        self, features: NDArray[Any], predicted: NDArray[Any], time_s: NDArray[Any]
    ) -> list[tuple[int, Finding]]:
        """The next rows, in order. features: (rows, features of the view), not finite or beyond 1e30 = missing;
        predicted: (rows,) class numbers, -1 = unknown; time_s: (rows,) seconds of the data, NaN = unknown.

        Returns (row, finding) where drift begins or ends: the last row of a block. Cutting the rows into other
        batches changes nothing.
        """
        rows = np.asarray(features) if self._all_columns else np.asarray(features)[:, self._columns]
        found = []
        start = 0
        while start < len(rows):
            take = min(BATCH_ROWS - self._filled, len(rows) - start)
            here, there = slice(self._filled, self._filled + take), slice(start, start + take)
            self._block[1 + self._filled : 1 + self._filled + take] = rows[there]
            self._predicted[here] = predicted[there]
            self._time_s[here] = time_s[there]
            self._filled += take
            start += take
            if self._filled == BATCH_ROWS:
                self._filled = 0
                finding = self._judge(self._batch())
                if finding:
                    found.append((start - 1, finding))
        return found

    def _batch(self) -> Batch:
        """The full block as the bets see it."""
        x = self._block[1:]
        self._seen += BATCH_ROWS
        counts = self._counts
        counts[:] = 0.0
        finite = np.abs(x) < LARGEST
        whole = bool(finite.all())
        if not whole:
            x[~finite] = np.nan
            counts[1] = BATCH_ROWS - finite.sum(axis=0)
            self._missing += int(counts[1].sum())
        same = x == self._block[:-1]
        if same.any():
            counts[0] = same.sum(axis=0)
        codes = self._codes(x) if self._bin_values else self._no_codes
        residual = self._transform.apply(x, self._time_s)
        beyond = residual < self._low
        beyond |= residual > self._high
        if beyond.any():
            counts[2] = beyond.sum(axis=0)
        z = residual - self._middle
        self._block[0] = x[-1]
        z *= self._per_scale
        self._trail.add(z.astype(np.float32))
        np.minimum(z, self._most, out=z)
        np.maximum(z, self._least, out=z)
        if not (whole and self._transform.idle):
            z[np.isnan(z)] = 0.0
        return Batch(z.astype(np.float32), counts, codes)

    def _codes(self, x: Floats) -> NDArray[np.int64]:
        codes = np.empty((BATCH_ROWS, len(self._bin_values)), dtype=np.int64)
        other = self._model.bin_values.shape[1]
        for at, (column, values) in enumerate(zip(self._model.bin_column.tolist(), self._bin_values, strict=True)):
            given = x[:, column] if column >= 0 else self._predicted.astype(np.float64)
            place = np.minimum(np.searchsorted(values, given), len(values) - 1)
            codes[:, at] = np.where(values[place] == given, place, other)
            codes[np.isnan(given) | ((column < 0) & (given < 0)), at] = -1
        return codes

    # --- judging ---
    def _judge(self, batch: Batch) -> Finding | None:
        evidence = self._detector.update(batch)
        if self._raised is None:
            return self._raise() if evidence >= 1.0 else None
        self._raised_rows += BATCH_ROWS
        self._returns = tuple(self._tested(one, batch) for one in self._returns)
        back = all(one.wealth >= self._threshold for one in self._returns)
        return self._clear() if back else None

    def _tested(self, one: _Return, batch: Batch) -> _Return:
        if one.wealth >= self._threshold:
            return one
        grown = (one.wealth + 1.0) * math.exp(self._detector.return_bet(one.leading, batch))
        return one._replace(wealth=min(grown, self._threshold))

    def _raise(self) -> Finding:
        leading = self._detector.leading(MOST_TESTS)
        first = leading[0]
        evidence = self._detector.evidence()
        self._shares = self._channel_shares()
        strongest = max(self._shares.values())
        self._raised = tuple(name for name, share in self._shares.items() if share >= NAMED_SHARE * strongest)
        self._returns = tuple(_Return(one, 0.0) for one in leading)
        self._raised_rows = 0
        self._alarms += 1
        since = self._since = max(BATCH_ROWS, round(first.age * BATCH_ROWS))
        sizes = self._detector.sizes(first.age)
        feature = self._detector.feature_of(first)
        numbers = {
            "rows_since_change": float(since),
            "evidence": evidence,
            "size_sd": float(sizes[0][feature]),
            "sd_ratio": float(sizes[1][feature]),
        }
        numbers |= {f"share:{name}": share for name, share in [*self._shares.items()][:TOLD]}
        numbers |= {
            f"family:{kind}": share for kind, share in self._detector.family_shares().items() if share >= 0.01
        }
        return Finding(
            kind="drift",
            raised=True,
            channels=self._raised,
            numbers=numbers,
            text=f"the stream changed about {since} rows ago, most of all in {self._raised[0]}: "
            + _words(first.kind, self._features[feature], numbers),
            explanation=self.explanation(),
        )

    def _clear(self) -> Finding:
        channels, self._raised, rows = self.named(), None, self._raised_rows
        self._raised_rows, self._returns, self._shares = 0, (), {}
        self._detector.reset()
        return Finding(
            kind="drift",
            raised=False,
            channels=channels,
            numbers={"rows": float(rows)},
            text=f"the stream is back at its reference after {rows} rows",
        )

    def _channel_shares(self) -> dict[str, float]:
        """Channel -> its share of the log-wealth beyond the threshold, of all if none is beyond; largest first."""
        of_features = self._detector.feature_wealth()
        beyond = np.maximum(of_features - math.log(self._threshold), 0.0)
        wealth = np.zeros(len(self._channels))
        np.maximum.at(wealth, self._place, beyond if beyond.any() else of_features)
        total = float(wealth.sum()) or 1.0
        order = np.argsort(-wealth, kind="stable")
        return {self._channels[at]: float(wealth[at]) / total for at in order.tolist()}

    # --- what others read ---
    @property
    def raised(self) -> bool:
        return self._raised is not None

    @property
    def raised_rows(self) -> int:
        """Rows since the finding that stands, in whole blocks; 0 when none does."""
        return self._raised_rows

    def named(self) -> tuple[str, ...]:
        """Channels of the finding that stands, those with the most log-wealth first."""
        return self._raised or ()

    def blame(self) -> dict[str, float]:
        """Channel -> share of the log-wealth now, while a finding stands; empty otherwise."""
        return self._channel_shares() if self.raised else {}

    def single_channel(self) -> str:
        """The one channel that carries the finding that stands; "" when it is several or nobody's fault."""
        shares = [*self.blame().items(), ("", 0.0), ("", 0.0)]
        return shares[0][0] if self.raised and shares[1][1] <= SINGLE_SHARE * shares[0][1] else ""

    def explanation(self) -> Explanation | None:
        """What the finding that stands is made of; None when none does. Shares are of the log-wealth beyond the
        threshold, of all if none is beyond.
        """
        if self._raised is None:
            return None
        rows = self._since + self._raised_rows
        of_features = self._detector.feature_wealth()
        beyond = np.maximum(of_features - math.log(self._threshold), 0.0)
        return explain(
            self._looked, self._trail.last(rows) + self._offset, rows=rows,
            shares=beyond if beyond.any() else of_features, channels=self._channel_shares(),
            single=self.single_channel(), hows=self._hows(),
        )  # fmt: skip

    def _hows(self) -> dict[int, How]:
        """Column -> what the strongest evidence about it says; a repeated or missing value also moves the mean."""
        found: dict[int, How] = {}
        leading = [one for one in self._detector.leading(TOLD) if one.kind in HOWS]
        for one in sorted(leading, key=lambda one: one.kind not in ("repeated", "missing", "bins")):
            found.setdefault(self._detector.feature_of(one), HOWS[one.kind])
            if one.kind == "pair":
                found.setdefault(one.other, How.RELATION)
        return found

    def evidence(self) -> float:
        """The average of all e-detectors over the threshold; 1 raises."""
        return self._detector.evidence()

    def suspicion(self) -> dict[str, float]:
        """Channel -> share of the log-wealth, most suspicious first; empty before the first block."""
        return self._channel_shares() if self._seen else {}

    def statistics(self) -> dict[str, float]:
        """rows, missing (values), alarms, raised (0 or 1), raised_rows, evidence, each family's share of it."""
        return {
            "rows": float(self._seen + self._filled),
            "missing": float(self._missing),
            "alarms": float(self._alarms),
            "raised": float(self.raised),
            "raised_rows": float(self._raised_rows),
            "evidence": self.evidence(),
            **{f"family:{kind}": share for kind, share in self._detector.family_shares().items()},
        }

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON; numbers that must be exact as base64 of their bytes."""
        arrays = {
            "block": self._block, "predicted": self._predicted, "time_s": self._time_s,
            **{f"transform.{name}": value for name, value in self._transform.state().items()},
            **{f"detector.{name}": value for name, value in self._detector.state().items()},
        }  # fmt: skip
        return {
            "reference": self._digest,
            "arrays": {name: _packed(value) for name, value in arrays.items()},
            "filled": self._filled,
            "raised": None if self._raised is None else list(self._raised),
            "raised_rows": self._raised_rows,
            "since": self._since,
            "returns": [
                {
                    **one.leading._asdict(),
                    "direction": _packed(one.leading.direction),
                    "wealth": one.wealth,
                }
                for one in self._returns
            ],
            "seen": self._seen,
            "missing": self._missing,
            "alarms": self._alarms,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue where `state` was taken; False (and unchanged) when it belongs to another reference."""
        if state.get("reference") != self._digest:
            return False
        arrays = {name: _unpacked(value) for name, value in state["arrays"].items()}
        self._block, self._predicted, self._time_s = arrays["block"], arrays["predicted"], arrays["time_s"]
        self._transform.restore(_part(arrays, "transform."))
        self._detector.restore(_part(arrays, "detector."))
        self._filled = int(state["filled"])
        self._raised = None if state["raised"] is None else tuple(state["raised"])
        self._raised_rows, self._since = int(state["raised_rows"]), int(state["since"])
        self._returns = tuple(_returned(one) for one in state["returns"])
        self._seen, self._missing, self._alarms = (int(state[name]) for name in ("seen", "missing", "alarms"))
        return True


def looked_at(reference: Reference, model: StationaryModel) -> Looked:
    """How people are told of this model's features. A shift of an autoregressive feature's residual is that of its
    level over 1 / (1 - sum of its coefficients).
    """
    columns = model.columns.tolist()
    remembered = model.lags.astype(np.float64).sum(axis=0)
    relative = bool(model.season.any() or model.lags.any())
    channels = [int(reference.channel_of[column]) for column in columns]
    return Looked(
        names=tuple(reference.features[column] for column in columns),
        channels=tuple(reference.channels[channel] if channel >= 0 else "" for channel in channels),
        groups=reference.groups,
        centre=np.zeros(len(columns)) if relative else model.centre.astype(np.float64),
        scale=model.scale / np.maximum(1.0 - remembered, 0.01),
        bins=reference.bins,
        relative=relative,
    )


def _words(kind: str, feature: str, numbers: dict[str, float]) -> str:
    match kind:
        case "variance" | "spread" | "axis":
            return f"{feature} spreads {numbers['sd_ratio']:.2f} times as much"
        case "pair":
            return f"{feature} no longer goes with the others as it did"
        case "repeated":
            return f"{feature} repeats its value"
        case "missing":
            return f"{feature} is missing more often"
        case "range":
            return f"{feature} leaves the range of its reference"
        case "bins":
            return f"the values of {feature} come in other shares"
        case _:
            return f"{feature} moved by {numbers['size_sd']:+.2f} standard deviations"


def _packed(array: Any) -> list[Any]:
    whole = np.ascontiguousarray(array)
    return [whole.dtype.str, list(np.shape(array)), base64.b64encode(whole.tobytes()).decode("ascii")]


def _unpacked(value: list[Any]) -> NDArray[Any]:
    kind, shape, text = value
    return np.frombuffer(base64.b64decode(text), dtype=np.dtype(kind)).reshape(shape).copy()


def _part(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _returned(one: dict[str, Any]) -> _Return:
    fields = {name: one[name] for name in ("kind", "at", "other", "sign", "size", "age")}
    return _Return(Leading(**fields, direction=_unpacked(one["direction"])), float(one["wealth"]))
