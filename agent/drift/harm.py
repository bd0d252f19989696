"""Does a drift do harm? Asked of witnesses: engines with other inputs, while their own inputs look as ever.

Confidence, output shares and the distance to the reference all fail to tell harmful drift from harmless (a gain of
1.5 drifts more than a dead axis and costs nothing). What tells is disagreement with an engine whose inputs did not
change: then the serving engine is the one that is wrong. Three conditions, all needed:

- the witness is *eligible*: a nearest-regime CUSUM of its own features alone stayed under half of its threshold for
  the last QUIET_ROWS rows;
- D > H, with D the CUSUM of [serving engine's class != witness's] - (share of reference rows on which they disagree
  when the serving engine says this class + MARGIN). Within a run of one predicted class D rises by at most RUN_CAP:
  windows of one exercise are near copies, and one exercise the two see differently is not harm, so that about four
  runs have to disagree;
- the drift is FEWEST_ROWS to MOST_ROWS rows old, of those witnesses were heard about: what is open for longer without
  harm is a lasting change, and the longer a CUSUM runs over a slightly worse stream, the surer it crosses any
  threshold.

Witnesses are asked, and D runs, from the first suspicion on: while the drift's evidence is at least WATCH_SHARE, as
on a tenth of the rows of a quiet stream. Asked from the alarm on only, a mounting fault of 45 degrees is found to be
harmful in 50 % of the runs, asked always in 65 %.

The quietest eligible witness is the one to switch to. The constants were chosen on the wrist data and are frozen: the
rule is a measured one (scripts/drift_bench/wrist.py), not a theorem.

What a switch gains is bounded without labels: with disagreement share q, the serving engine is right on at most
1 - q + (1 - a) of the rows if the witness is right on a share a as ever, so that the gain is at least 2 a + q - 2.

Pure; knows nothing of time, engines or switches. Owned by one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.drift.findings import Finding
from agent.drift.models import Witness, channels_of
from agent.drift.reference import Reference
from agent.drift.regimes import RegimeDistance

H: Final = 4.0
MARGIN: Final = 0.25
RUN_CAP: Final = 1.2
QUIET_SHARE: Final = 0.5
QUIET_ROWS: Final = 40
WATCH_SHARE: Final = 0.1  # of what raises a drift
FEWEST_ROWS: Final = 8
MOST_ROWS: Final = 64
MOST_OPEN_ROWS: Final = 1024
"""Rows that wait for what witnesses say of them; what is said of older ones is not heard."""


class Quietness:
    """How far a witness's own features are from every known regime: largest CUSUM of the last rows, of its threshold.

    The score and the CUSUM are those of `RegimeMonitor`, without naming a channel.
    """

    def __init__(self, witness: Witness, channel_of: NDArray[Any]) -> None:
        model = witness.regimes
        _, places = channels_of(model.columns, channel_of)
        self._columns = np.asarray(model.columns, dtype=np.int64)
        self._distance = RegimeDistance(model.regime_means, model.covariance, places, cap=model.score_cap)
        self._allowance = np.asarray(model.allowance, dtype=np.float64)
        self._threshold = model.threshold
        self.reset()

    def reset(self) -> None:
        self._cusum = np.zeros(len(self._allowance))
        self._shares: deque[float] = deque(maxlen=QUIET_ROWS)

    def follow(self, row: NDArray[np.float64]) -> None:
        """One row of the view, (1, features); one that is not finite says nothing."""
        own = row[:, self._columns]
        if not np.isfinite(own).all():
            return
        climbed = np.maximum(0.0, self._cusum + self._distance.scores(own)[0] - self._allowance)
        self._cusum = np.minimum(climbed, self._threshold)
        self._shares.append(float(self._cusum.max()) / self._threshold)

    @property
    def share(self) -> float:
        """Largest CUSUM of the last QUIET_ROWS rows, of its threshold; 1 with fewer rows."""
        return max(self._shares) if len(self._shares) == QUIET_ROWS else 1.0

    def state(self) -> dict[str, Any]:
        return {"cusum": self._cusum.tolist(), "shares": list(self._shares)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cusum = np.array(state["cusum"], dtype=np.float64)
        self._shares = deque(state["shares"], maxlen=QUIET_ROWS)


@dataclass(slots=True)
class _Case:
    """Against the serving engine, by one witness: D, and what it was when the present run of a class began."""

    evidence: float = 0.0
    at_run: float = 0.0
    run_of: int = -1
    rows: int = 0
    differed: int = 0

    def add(self, predicted: int, *, differs: bool, expected: float) -> None:
        if predicted != self.run_of:
            self.run_of, self.at_run = predicted, self.evidence
        climbed = self.evidence + differs - expected - MARGIN
        self.evidence = max(0.0, min(climbed, self.at_run + RUN_CAP))
        self.rows += 1
        self.differed += differs


@dataclass(frozen=True, slots=True)
class _Row:
    """What a row looked like when it was followed: the serving engine's class, each witness's quietness, and whether
    the drift stood.
    """

    predicted: int
    quiet: tuple[float, ...]
    drifts: bool


@dataclass(slots=True)
class _Hearing:
    """From the first suspicion on: what each witness has against the serving engine.

    open: rows that witnesses may still be heard about; heard: those of the standing drift that they were heard about.
    """

    cases: tuple[_Case, ...]
    drifts: bool = False
    open: dict[Hashable, _Row] = field(default_factory=dict)
    heard: dict[Hashable, None] = field(default_factory=dict)


class HarmMonitor:
    """Follows one stream with the witnesses of its reference.

        ended = harm.follow(row, predicted, key, evidence=monitor.evidence(), drifts=monitor.raised)   # every row
        found = harm.hear(key, {"wrist-norm": 3})        # what witnesses said of that row, some time later

    `accuracy`: of each engine on clean input, where known; for the numbers of a finding only.
    """

    def __init__(self, reference: Reference, accuracy: Mapping[str, float] | None = None) -> None:
        self._witnesses = reference.witnesses
        self._numbers = {one.engine: number for number, one in enumerate(reference.witnesses)}
        self._quiet = tuple(Quietness(one, reference.channel_of) for one in reference.witnesses)
        self._expected = tuple(np.asarray(one.disagreement, np.float64).tolist() for one in reference.witnesses)
        self._accuracy = dict(accuracy or {})
        self._hearing: _Hearing | None = None
        self._harmful = ""

    @property
    def harmful(self) -> str:
        """The witness that says so, while the drift it was said of lasts; "" = nobody does."""
        return self._harmful

    @property
    def wanted(self) -> tuple[str, ...]:
        """Witnesses to be asked about the rows that come now; empty while all is quiet, or all was said."""
        hearing = self._hearing
        if hearing is None or self._harmful or len(hearing.heard) >= MOST_ROWS:
            return ()
        return tuple(self._numbers)

    def follow(
        self, row: NDArray[np.float64], predicted: int, key: Hashable, *, evidence: float, drifts: bool
    ) -> Finding | None:
        """The next row. row: (features of the view,); key: what a witness will name the row by; evidence, drifts: of
        the drift monitor, this row included.

        Returns the finding that ends when the drift ends.
        """
        for quiet in self._quiet:
            quiet.follow(row.reshape(1, -1))
        ended = None
        if self._harmful or (self._hearing is not None and self._hearing.drifts):
            ended = None if drifts else self._end()
        if not drifts and evidence < WATCH_SHARE:
            self._hearing = None
            return ended
        if self._hearing is None:
            self._hearing = _Hearing(tuple(_Case() for _ in self._witnesses))
        self._hearing.drifts = drifts
        open_rows = self._hearing.open
        open_rows[key] = _Row(predicted, tuple(quiet.share for quiet in self._quiet), drifts)
        if len(open_rows) > MOST_OPEN_ROWS:
            del open_rows[next(iter(open_rows))]
        return ended

    def hear(self, key: Hashable, told: Mapping[str, int]) -> Finding | None:
        """What witnesses say of a row that was followed, engine -> class; rows nobody knows (any more) are not heard.

        Returns the finding when the drift is harmful.
        """
        hearing = self._hearing
        row = hearing.open.get(key) if hearing else None
        if hearing is None or row is None or self._harmful:
            return None
        if row.drifts:
            hearing.heard[key] = None
        if len(hearing.heard) > MOST_ROWS:
            return None
        for engine, predicted in told.items():
            number = self._numbers.get(engine)
            if number is not None and 0 <= row.predicted < len(self._expected[number]):
                expected = self._expected[number][row.predicted]
                hearing.cases[number].add(row.predicted, differs=predicted != row.predicted, expected=expected)
        return self._judge(hearing, row) if len(hearing.heard) >= FEWEST_ROWS else None

    def _judge(self, hearing: _Hearing, row: _Row) -> Finding | None:
        speaking = [
            (row.quiet[number], number)
            for number, case in enumerate(hearing.cases)
            if case.evidence > H and row.quiet[number] < QUIET_SHARE
        ]
        if not speaking:
            return None
        quiet, number = min(speaking)
        return self._raise(number, quiet, hearing.cases[number], len(hearing.heard))

    def _raise(self, number: int, quiet: float, case: _Case, age: int) -> Finding:
        self._harmful = engine = self._witnesses[number].engine
        differed = case.differed / case.rows
        numbers = {"disagreement": differed, "quietness": quiet, "harm_evidence": case.evidence, "rows": float(age)}
        accuracy = self._accuracy.get(engine)
        gains = ""
        if accuracy is not None:
            numbers["gain_at_least"] = 2 * accuracy + differed - 2
            gains = f"; a switch gains at least {numbers['gain_at_least']:.2f} if it is as good as ever"
        return Finding(
            kind="harm",
            raised=True,
            numbers=numbers,
            text=f"{engine}, whose own inputs look as ever, disagrees on {differed:.0%} of {case.rows} rows{gains}",
            engine=engine,
        )

    def _end(self) -> Finding | None:
        engine, self._harmful, self._hearing = self._harmful, "", None
        if not engine:
            return None
        return Finding(kind="harm", raised=False, text="the drift is over", engine=engine)

    def reset(self) -> None:
        """Start anew; what was raised is forgotten without a finding."""
        for quiet in self._quiet:
            quiet.reset()
        self._hearing, self._harmful = None, ""

    def statistics(self) -> dict[str, float]:
        """Per witness `quietness:<engine>` (below 0.5 it may speak), and `harm:<engine>`, its D as a share of H;
        `heard`: rows of the standing drift that witnesses spoke about; `harmful` 0 or 1.
        """
        hearing = self._hearing
        numbers = {f"quietness:{name}": self._quiet[number].share for name, number in self._numbers.items()}
        if hearing:
            numbers |= {f"harm:{name}": hearing.cases[number].evidence / H for name, number in self._numbers.items()}
        heard = float(len(hearing.heard)) if hearing else 0.0
        return {**numbers, "heard": heard, "harmful": float(bool(self._harmful))}

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON: a drift that stands is judged anew, harm that was said stays said."""
        quiet = {name: self._quiet[number].state() for name, number in self._numbers.items()}
        return {"quiet": quiet, "harmful": self._harmful}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with the same reference."""
        for name, number in self._numbers.items():
            if name in state.get("quiet", {}):
                self._quiet[number].restore(state["quiet"][name])
        harmful = state.get("harmful", "")
        self._harmful = harmful if harmful in self._numbers else ""
