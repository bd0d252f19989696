"""The nearest-regime monitor: has the stream left every regime the reference knows?

For streams that live in one regime at a time (an exercise, a machine state, a scene). Such a stream is never
stationary, so no test on marginal features keeps quiet; but each regime is a tight cloud of its own. A row is
scored by its distance to the NEAREST reference recording, under the covariance pooled within recordings:
once over all features (catches changed relations, such as swapped axes) and once per channel (catches one
channel dying, and a channel's share of everything else).

Each score runs in a CUSUM, S <- max(0, S + score - allowance): with the allowance at the 90 % quantile of the
replayed reference a known regime makes S fall on average, anything farther away makes it climb. The threshold
is a multiple of the largest S of a replay of the reference (see compressor/reference.py). It is no theorem:
the rate of false alarms is what the reference's claim says was measured.

Which channel is to blame is asked of another distance, to the mean of the PREDICTED class: under a fault the
nearest recording changes and takes the blame with it, the predicted class mostly does not.

Knows nothing of time or of what is done about a finding.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.drift.explanation import Explanation, Looked, Trail, explain
from agent.drift.findings import Finding
from agent.drift.models import RegimeModel, channels_of
from agent.drift.reference import Reference

NAMING_ROWS: Final = 8  # rows over which suspicion is averaged
REARM_SHARE: Final = 0.5  # of the threshold: below it the stream counts as back
REARM_ROWS: Final = 16  # that many rows in a row below it end a finding
NAMED_SHARE: Final = 0.25  # of the strongest suspicion: channels above it are named too
FARTHEST_SD: Final = 64.0  # of the reference: a feature is looked at up to here, so one wild number is no sum's end
LEAST_BLAME: Final = 2.0  # times the reference's 90 % quantile, over a whole excursion: below it nobody is to blame

Floats = NDArray[np.float64]


class RegimeDistance:
    """Scores of rows against known regimes. Stateless; also used by the replay that calibrates the monitor."""

    def __init__(
        self, means: NDArray[Any], covariance: NDArray[Any], channel_of: NDArray[Any], *, cap: float
    ) -> None:
        """means: (regimes, features); covariance: (features, features), pooled within regimes; channel_of:
        (features,) channel numbers from 0, -1 = in the total only; cap: the largest score one row can get.
        """
        self._means = np.asarray(means, dtype=np.float64)
        self._whitening = whitening(covariance)
        self._whitened_means = self._means @ self._whitening.T
        self._blocks = block_whitening(covariance, channel_of)
        self._share = channel_share(channel_of)
        self._cap = cap

    def scores(self, rows: NDArray[Any]) -> Floats:
        """rows: (rows, features). Returns (rows, 1 + channels): total first, root mean squares of whitened
        distances, so that 1 is an ordinary row of a known regime whatever the number of features.
        """
        whitened = rows @ self._whitening.T
        squares = ((whitened[:, None, :] - self._whitened_means[None, :, :]) ** 2).sum(axis=2)
        nearest = squares.argmin(axis=1)
        total = squares[np.arange(len(nearest)), nearest] / rows.shape[1]
        residual = (rows - self._means[nearest]) @ self._blocks.T
        per_channel = (residual * residual) @ self._share
        scores: Floats = np.minimum(np.sqrt(np.column_stack([total, per_channel])), self._cap)
        return scores


class ClassResidual:
    """Per channel: mean squared whitened distance to the mean of the predicted class."""

    def __init__(self, class_means: NDArray[Any], covariance: NDArray[Any], channel_of: NDArray[Any]) -> None:
        self._means = np.asarray(class_means, dtype=np.float64)
        self._blocks = block_whitening(covariance, channel_of)
        self._share = channel_share(channel_of)

    def squares(self, rows: NDArray[Any], predicted: NDArray[Any]) -> Floats:
        """rows: (rows, features); predicted: (rows,), a row without a valid class gets the nearest one.
        Returns (rows, channels).
        """
        valid = (predicted >= 0) & (predicted < len(self._means))
        chosen = self._per_channel(rows, self._means[np.where(valid, predicted, 0)])
        if valid.all():
            return chosen
        every = np.stack([self._per_channel(rows, mean[None, :]) for mean in self._means])
        nearest = every[every.sum(axis=2).argmin(axis=0), np.arange(len(rows))]
        result: Floats = np.where(valid[:, None], chosen, nearest)
        return result

    def _per_channel(self, rows: NDArray[Any], means: NDArray[Any]) -> Floats:
        residual = (rows - means) @ self._blocks.T
        squares: Floats = (residual * residual) @ self._share
        return squares


class ClassUsual:
    """Rows against what is usual for their predicted class, in standard deviations within classes. For people."""

    def __init__(self, model: RegimeModel) -> None:
        self._means = np.asarray(model.class_means, dtype=np.float64)
        self.scale: Floats = np.sqrt(np.diag(np.asarray(model.class_covariance, dtype=np.float64)))

    def standardised(self, rows: NDArray[Any], predicted: NDArray[Any]) -> Floats:
        """rows: (rows, w) of the model's columns; predicted: (rows,), one without a valid class is held against the
        nearest. Returns (rows, w).
        """
        valid = (predicted >= 0) & (predicted < len(self._means))
        z: Floats = (rows - self._means[np.where(valid, predicted, 0)]) / self.scale
        for row in np.flatnonzero(~valid).tolist():
            every = (rows[row] - self._means) / self.scale
            z[row] = every[(every * every).sum(axis=1).argmin()]
        return z


class RegimeMonitor:
    """Follows one stream. Owned by one thread; `state` and `restore` carry it over a restart."""

    def __init__(self, reference: Reference, model: RegimeModel | None = None) -> None:
        """model: a witness's; else the reference's own. Raises: ValueError when it has none."""
        model = model or reference.regimes
        if model is None:
            raise ValueError("this reference has no regimes")
        present, channel_of = channels_of(model.columns, reference.channel_of)
        self._model = model
        self._digest = reference.digest()
        self._channels = tuple(reference.channels[channel] for channel in present)
        self._columns = np.asarray(model.columns, dtype=np.int64)
        self._distance = RegimeDistance(model.regime_means, model.covariance, channel_of, cap=model.score_cap)
        self._residual = ClassResidual(model.class_means, model.class_covariance, channel_of)
        centre, scale = (array.astype(np.float64)[self._columns] for array in (reference.centre, reference.scale))
        self._least, self._most = centre - FARTHEST_SD * scale, centre + FARTHEST_SD * scale
        self._usual = ClassUsual(model)
        self._looked = Looked(
            names=tuple(reference.features[column] for column in self._columns.tolist()),
            channels=tuple("" if place < 0 else self._channels[place] for place in channel_of.tolist()),
            groups={name: reference.groups[name] for name in self._channels},
            centre=np.zeros(len(self._columns)),
            scale=self._usual.scale,
            bins=reference.bins if model is reference.regimes else reference.bins[:0],
            relative=True,
        )
        self._components = ("total", *self._channels)
        self._alarms = 0
        self._skipped = 0
        self.reset()

    def reset(self) -> None:
        """Start anew, as after a switch or a repair; what was raised is forgotten without a finding."""
        self._cusum = np.zeros(len(self._components))
        self._climbing = np.zeros(len(self._components), dtype=np.int64)  # rows since that CUSUM was last 0
        self._recent = np.zeros((0, len(self._channels)))
        self._raised: tuple[str, ...] | None = None  # the channels named; a model may have none to name
        self._blamed = np.zeros(len(self._channels))  # squares since it was raised
        self._raised_rows = 0
        self._since = 0  # rows from the estimated change to the finding that stands
        self._trail = Trail(len(self._columns))
        self._quiet = 0
        self._rows = 0

    def follow(
        self, features: NDArray[Any], predicted: NDArray[Any], time_s: NDArray[Any]
    ) -> list[tuple[int, Finding]]:
        """The next rows, in order. features: (rows, features of the view); predicted: (rows,) class numbers, -1 =
        unknown; time_s: (rows,), not used: regimes have no season.

        Returns (row, finding) where drift begins or ends; cutting the rows into other batches changes nothing. A row
        that is not finite is counted and skipped: broken numbers are the guard's to judge.
        """
        del time_s
        rows = np.clip(np.asarray(features, dtype=np.float64)[:, self._columns], self._least, self._most)
        rows[~np.isfinite(np.asarray(features)[:, self._columns])] = np.nan  # infinity is broken, not far away
        found = []
        for number, label in enumerate(np.asarray(predicted).tolist()):
            finding = self._follow_row(rows[number : number + 1], label)
            if finding:
                found.append((number, finding))
        return found

    def _follow_row(self, row: Floats, predicted: int) -> Finding | None:
        # one row at a time: a product of several rows may differ from theirs in the last bits
        if not np.isfinite(row).all():
            self._skipped += 1
            return None
        self._rows += 1
        self._climb(self._distance.scores(row)[0])
        label = np.array([predicted])
        squares = self._residual.squares(row, label)
        self._trail.add(self._usual.standardised(row, label).astype(np.float32))
        self._recent = np.concatenate([self._recent, squares])[-NAMING_ROWS:]
        if self.raised:
            self._raised_rows += 1
            self._blamed += squares[0]
        return self._judge()

    @property
    def raised(self) -> bool:
        return self._raised is not None

    def named(self) -> tuple[str, ...]:
        """The channels of the finding that stands, the most suspicious first."""
        return self._raised or ()

    @property
    def raised_rows(self) -> int:
        """Rows since the finding that stands; 0 when none does."""
        return self._raised_rows

    def blame(self) -> dict[str, float]:
        """Channel -> mean suspicion over all rows since the finding; 1 is the reference's 90 % quantile."""
        mean = self._blamed / max(1, self._raised_rows) / self._model.naming_scale
        return {name: float(value) for name, value in zip(self._channels, mean, strict=True)}

    def single_channel(self) -> str:
        """The one channel that carries the finding that stands; "" when it is several or nobody's fault.

        Over 64 rows of the wrist data a channel with noise of 0.5 g or a gain of 0.3 stands out by 5 to 10 times, the
        worst channel of a new wearer by less than 2. A milder fault of one channel is not told from a new wearer.
        """
        return _standing_out(self.blame()) if self.raised else ""

    def explanation(self) -> Explanation | None:
        """What the finding that stands is made of; None when none does.

        A channel's part is its suspicion above 1, the reference's 90 % quantile (all of it when nobody is above); a
        feature's part of that is its mean square in standard deviations of the predicted class.
        """
        if not self.raised:
            return None
        rows = self._since + self._raised_rows
        suspicion = self.blame() if self._raised_rows >= NAMING_ROWS else self.suspicion()
        excess = {name: max(ratio - 1.0, 0.0) for name, ratio in suspicion.items()}
        channels = excess if any(excess.values()) else suspicion
        z = self._trail.last(rows)
        squares = (z * z).mean(axis=0) if len(z) else np.ones(len(self._columns))
        shares = squares * [channels.get(name, 0.0) for name in self._looked.channels]
        for name in self._channels:  # of each channel, its features' parts make its own
            mine = np.array([channel == name for channel in self._looked.channels])
            shares[mine] /= float(squares[mine].sum()) or 1.0
        return explain(
            self._looked, z, rows=rows, shares=shares if shares.any() else squares, channels=channels,
            single=_standing_out(suspicion), hows={},
        )  # fmt: skip

    def evidence(self) -> float:
        """Largest CUSUM as a share of the threshold; 1 raises."""
        return float(self._cusum.max() / self._model.threshold)

    def suspicion(self) -> dict[str, float]:
        """Channel -> how far it is from the predicted class, mean of the last rows; 1 is the reference's 90 %
        quantile. Most suspicious first; empty before the first row.
        """
        if not len(self._recent):
            return {}
        ratio = self._recent.mean(axis=0) / self._model.naming_scale
        order = np.argsort(-ratio, kind="stable")
        return {self._channels[index]: float(ratio[index]) for index in order}

    def statistics(self) -> dict[str, float]:
        """rows, skipped, alarms, raised (0 or 1), raised_rows, evidence, each component's share of the threshold."""
        shares = {
            f"evidence:{name}": float(value / self._model.threshold)
            for name, value in zip(self._components, self._cusum, strict=True)
        }
        return {
            "rows": float(self._rows),
            "skipped": float(self._skipped),
            "alarms": float(self._alarms),
            "raised": float(self.raised),
            "raised_rows": float(self._raised_rows),
            "evidence": self.evidence(),
            **shares,
        }

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON."""
        return {
            "reference": self._digest,
            "cusum": self._cusum.tolist(),
            "climbing": self._climbing.tolist(),
            "recent": self._recent.tolist(),
            "raised": None if self._raised is None else list(self._raised),
            "raised_rows": self._raised_rows,
            "since": self._since,
            "blamed": self._blamed.tolist(),
            "quiet": self._quiet,
            "rows": self._rows,
            "skipped": self._skipped,
            "alarms": self._alarms,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue where `state` was taken; False (and unchanged) when it belongs to another reference."""
        if state.get("reference") != self._digest:
            return False
        self._cusum = np.array(state["cusum"], dtype=np.float64)
        self._climbing = np.array(state["climbing"], dtype=np.int64)
        self._recent = np.array(state["recent"], dtype=np.float64).reshape(-1, len(self._channels))
        self._raised = None if state["raised"] is None else tuple(state["raised"])
        self._raised_rows = int(state["raised_rows"])
        self._since = int(state["since"])
        self._blamed = np.array(state["blamed"], dtype=np.float64)
        self._quiet, self._rows = int(state["quiet"]), int(state["rows"])
        self._skipped, self._alarms = int(state["skipped"]), int(state["alarms"])
        return True

    def _climb(self, scores: Floats) -> None:
        # held at the threshold: how long a fault lasted must not decide how long its end takes to be seen
        climbed = np.maximum(0.0, self._cusum + scores - self._model.allowance)
        self._cusum = np.minimum(climbed, self._model.threshold)
        self._climbing = np.where(self._cusum > 0, self._climbing + 1, 0)

    def _judge(self) -> Finding | None:
        evidence = self.evidence()
        if not self.raised:
            return self._raise() if evidence >= 1.0 else None
        self._quiet = self._quiet + 1 if evidence < REARM_SHARE else 0
        return self._clear() if self._quiet >= REARM_ROWS else None

    def _raise(self) -> Finding:
        suspicion = self.suspicion()
        strongest = max(suspicion.values(), default=0.0)
        self._raised = tuple(
            name
            for position, (name, ratio) in enumerate(suspicion.items())
            if position == 0 or ratio >= max(1.0, NAMED_SHARE * strongest)
        )
        self._quiet = self._raised_rows = 0
        self._blamed = np.zeros(len(self._channels))
        self._alarms += 1
        since = self._since = int(self._climbing[self._cusum.argmax()])
        return Finding(
            kind="drift",
            raised=True,
            channels=self._raised,
            numbers={"rows_since_change": float(since), "evidence": self.evidence()}
            | {f"suspicion:{name}": ratio for name, ratio in suspicion.items()},
            text=f"the input left every known regime about {since} rows ago"
            + (f", most of all in {self._raised[0]}" if self._raised else ""),
            explanation=self.explanation(),
        )

    def _clear(self) -> Finding:
        channels, self._raised, self._quiet, self._raised_rows = self.named(), None, 0, 0
        return Finding(
            kind="drift",
            raised=False,
            channels=channels,
            numbers={"evidence": self.evidence()},
            text=f"the input has been in known regimes for {REARM_ROWS} rows",
        )


def _standing_out(suspicion: dict[str, float]) -> str:
    """The one channel far above all others; "" when there is none."""
    first, second, *_ = *sorted(suspicion.items(), key=lambda item: -item[1]), ("", 0.0), ("", 0.0)
    return first[0] if first[1] >= LEAST_BLAME and second[1] <= NAMED_SHARE * first[1] else ""


def whitening(covariance: NDArray[Any]) -> Floats:
    """W with W covariance W^T = 1: the inverse of the Cholesky factor. Raises: numpy.linalg.LinAlgError."""
    factor = np.linalg.cholesky(np.asarray(covariance, dtype=np.float64))
    return np.asarray(np.linalg.inv(factor), dtype=np.float64)


def block_whitening(covariance: NDArray[Any], channel_of: NDArray[Any]) -> Floats:
    """Each channel whitened on its own, relations between channels ignored; (features, features)."""
    same_channel = channel_of[:, None] == channel_of[None, :]
    return whitening(np.where(same_channel, covariance, 0.0))


def channel_share(channel_of: NDArray[Any]) -> Floats:
    """(features, channels): multiplying squares by it gives each channel's mean square; -1 counts nowhere."""
    channels = max(int(channel_of.max()) + 1, 0)
    member = np.asarray(channel_of)[:, None] == np.arange(channels)
    share: Floats = np.asarray(member / member.sum(axis=0), dtype=np.float64)
    return share
