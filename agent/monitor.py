"""From observations to alarms: what one service's requests say about its engines, latency, sensors and world.

    monitor = Monitor(MonitorPlan(service="wrist", index=0, engines=(...), channels=(...), groups={...}), reference)
    monitor.count(intake.take_tallies())           # exact counts; without them observe counts the records
    events = monitor.observe(records, gaps=3)      # a batch from RingReader.read(); -> Supervisor.handle, in order
    monitor.restart_windows("wrist-accel")         # on a RestartWindows command
    part = monitor.take_window()                   # counters, latency sketches, drift windows since the last call
    saved = monitor.state(); monitor.restore(saved)   # over a restart; then, after AgentStarted was handled:
    events = monitor.announce()

    device = DeviceMonitor(("wrist",), power_w=5.0, temperature_c=80.0, memory_bytes=0)   # 0 = no limit
    events = device.observe(power_w=4.2, temperature_c=None, memory_bytes=93e6)            # about once a second

Alarms are edges: raised once, cleared once; each carries its evidence as numbers. Failures and successes of an
engine come as runs in the order they happened, so that "3 of the last 20" means requests, not polls.
Holds no I/O and no clock; leaves all decisions to `agent.decisions`. Mutable, owned by one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent.decisions.budget import LatencyBudget, Limit
from agent.decisions.events import (
    BROKEN_INPUT,
    AlarmCleared,
    AlarmKind,
    AlarmRaised,
    DriftPersists,
    EngineFailed,
    EngineServed,
    Event,
    Level,
)
from agent.drift import (
    Calendar,
    DriftMonitor,
    Explanation,
    Finding,
    FixedPoint,
    GuardCounters,
    HarmMonitor,
    MomentWindow,
    Reference,
    SenderCounters,
    drift_monitor,
)
from agent.drift.counters import HISTORY_ROWS
from agent.drift.explanation import details
from agent.drift.thinning import Allowance, Repetition
from agent.drift.views import output_features
from agent.observation import NO_CLASS, NO_ENGINE, PATCHED, Outcome
from agent.sketch import LogSketch
from agent.tally import ANSWERED, COUNTED, Tally, add_latencies

Records = NDArray[Any]
"""One-dimensional array of dtype `observation.RECORD`."""

PERSISTED_ROWS: Final = 64
"""A drift that lasts so long is said once more, with who is to blame: what a host may plan from (drift-wrist.md
section 4: what is open for 64 windows without harm is a lasting change, not a passing one)."""
DRIFT_ROWS_PER_S: Final = 1000.0
"""Rows the regime monitor follows at most, a twentieth of a core (45 us a row, drift-wrist.md section 6). Above it
every k-th row is followed and the others are counted as thinned; drift windows still see every row. Each witness of
a reference has a model of its own to follow: with three of them (75 us a row more) a quarter as many rows."""
DRIFT_ROWS_AT_ONCE: Final = 8192  # after a pause: eight seconds' worth
GUARD_ROWS_PER_S: Final = 1000.0
"""Rows with changing guard bits that are followed at most, 2 % of a core (20 us a row). Above it the older ones
of a batch are skipped, counted: thinning would make a run of what is none. Rows that repeat the last ones cost
nothing and are never skipped."""
GUARD_ROWS_AT_ONCE: Final = 8192
BITS: Final = {
    "dead": "dead_bits",
    "stuck": "stuck_bits",
    "scale": "scale_bits",
    "not_finite": "not_finite_bits",
    "out_of_range": "range_bits",
}
"""GuardCounters' argument -> the record's field."""
LEVELS: Final = {AlarmKind.DRIFT: Level.DRIFT, AlarmKind.HARM: Level.HARMFUL}
JUDGED: Final = tuple(set(Outcome) - {Outcome.OVERLOADED, Outcome.SHADOW})
"""Outcomes whose input a guard has seen."""


@dataclass(frozen=True, slots=True)
class MonitorPlan:
    """What is watched. `index` and `engines` as in the worker's plan; `channels` in the order of the guard's bits;
    `groups`: channel -> sensor group; `classes`: number of labels; `latency_p95_us`: 0 = no budget; `hop_s`: from one
    window to the next, 0 = not known; `repeats`: whether inputs that repeat are a fault; `accuracy`: of engines on
    clean input, where the card says it; `view_at`: by engine, at which number of its records `view` begins, -1 = it
    has none, () = it is all there is; `of_outputs`: the view is made of class, confidence and entropy.
    """

    service: str
    index: int
    engines: tuple[str, ...]
    channels: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    classes: int = 0
    view: str = ""
    view_at: tuple[int, ...] = ()
    of_outputs: bool = False
    latency_p95_us: float = 0.0
    hop_s: float = 0.0
    repeats: bool = False
    accuracy: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)  # channel -> unit, for explanations


class Monitor:
    """Follows one service."""

    def __init__(self, plan: MonitorPlan, reference: Reference | None = None) -> None:
        self._plan = plan
        self._serving = plan.engines[0]
        self._budget = LatencyBudget(plan.latency_p95_us) if plan.latency_p95_us > 0 else None
        self._guards = GuardCounters(plan.channels, dict(plan.groups))
        self._repetition = Repetition(HISTORY_ROWS, len(BITS))
        self._senders = SenderCounters(plan.hop_s)
        self._classes = np.zeros(plan.classes, np.int64)  # rows by predicted class
        # by engine number; what answered before the last exchange looks as who is first now
        self._view_at = np.full(256, plan.view_at[0] if plan.view_at else 0, np.int64)
        self._view_at[: len(plan.view_at)] = plan.view_at
        self._repeated = 0  # rows of the batch in hand
        self._guard_rows = Allowance(GUARD_ROWS_PER_S, GUARD_ROWS_AT_ONCE)
        self._drift = drift_monitor(reference) if reference else None
        self._digest = reference.digest() if reference else ""
        self._fixed: FixedPoint | None = reference.fixed_point() if reference else None
        witnesses = reference.witnesses if reference and self._drift else ()
        self._harm = HarmMonitor(reference, plan.accuracy) if reference and witnesses else None
        self._calendar = Calendar()  # arrival and data time of the rows that are followed
        self._drift_rows = Allowance(DRIFT_ROWS_PER_S / (1 + len(witnesses)), DRIFT_ROWS_AT_ONCE)
        self._totals: Counter[str] = Counter()
        self._odd: Counter[tuple[str, str]] = Counter()  # rows by guard and channel
        self._lifetime = {engine: LogSketch() for engine in plan.engines}
        self._start_window()

    # --- observations ---
    def count(self, tallies: Iterable[tuple[int, Tally]]) -> None:
        """Take in exact counts, by number of the service. Where there are any, records are not counted."""
        for service, tally in tallies:
            if service == self._plan.index:
                self._count_tally(tally)

    def observe(self, records: Records, *, gaps: int = 0, counted: bool = False) -> list[Event]:
        """Take in one batch, oldest first. `gaps`: records lost or left out before or within it.

        `counted`: these requests are, or will be, counted by `count`.
        """
        self._count("gaps", gaps)
        records = records[records["service"] == self._plan.index]
        shadows = records[records["outcome"] == Outcome.SHADOW]
        if len(shadows):
            records = records[records["outcome"] != Outcome.SHADOW]
        if not len(records):
            return list(self._harm_events(shadows))
        requests = records[records["row"] == 0]
        if not counted:
            self._count_requests(requests)
        self._count_bits(records)
        self._count_classes(records)
        judged = records[np.isin(records["outcome"], JUDGED)]
        return [
            *self._engine_events(requests),
            *self._latency_events(requests),
            *self._guard_events(judged),
            *self._sender_events(judged),
            *self._drift_events(judged),
            *self._harm_events(shadows),
        ]

    def restart_windows(self, engine: str) -> None:
        """`engine` serves from now on: latency is judged anew; sensors and drift are the world's and stay."""
        self._serving = engine
        if self._budget:
            self._budget.reset()

    def announce(self, *, since: str = "the restart") -> list[Event]:
        """Raise again what is raised, for a supervisor that does not know it."""
        events: list[Event] = []
        for kind, channels in self._guards.statistics().items():
            if channels:
                text = f"{', '.join(channels)}: {kind}, as before {since}"
                events.append(self._alarm(Finding(kind, raised=True, channels=channels, text=text)))
        for kind, senders in self._senders.statistics().items():
            if senders:
                events.append(self._alarm(Finding(kind, raised=True, text=f"the input: {kind}, as before {since}")))
        if self._drift and self._drift.raised:
            text = f"the input has drifted from its reference, as before {since}"
            events.append(self._alarm(Finding("drift", raised=True, channels=self._drift.named(), text=text)))
        if self._harm and self._harm.harmful:
            text = f"the drift does harm, says {self._harm.harmful}, as before {since}"
            events.append(self._alarm(Finding("harm", raised=True, engine=self._harm.harmful, text=text)))
        return events

    @property
    def witnesses(self) -> tuple[str, ...]:
        """Engines to be asked about the requests that come now, besides the one that answers them."""
        if self._harm is None or self._serving != self._plan.engines[0]:
            return ()  # a reference is that of the first engine: of others nothing is known to compare with
        return tuple(engine for engine in self._harm.wanted if engine in self._plan.engines)

    # --- what others read ---
    def take_window(self) -> dict[str, Any]:
        """`counters`, `latency`, `drift` since the last call, as the telemetry message wants them."""
        part = {"counters": dict(self._counters), "latency": self._latency_fields(), "drift": self._drift_fields()}
        self._start_window()
        return part

    def statistics(self) -> dict[str, Any]:
        """Since the start: `counters`; per engine `latency` (count, total_us, p50_us, p95_us, p99_us; None = no
        request yet); `budget`, `guards` (kind -> channels, none = the whole input), `odd_rows` (guard -> channel ->
        rows), `drift` and `harm`, empty when not watched.
        """
        return {
            "counters": dict(self._totals),
            "latency": {engine: _summary(sketch) for engine, sketch in self._lifetime.items()},
            "budget": {**self._budget.numbers(), "raised": float(self._budget.raised)} if self._budget else {},
            "guards": {kind: list(names) for kind, names in self._guards.statistics().items() if names}
            | {kind: [] for kind, senders in self._senders.statistics().items() if senders},
            "classes": self._classes.tolist(),
            "odd_rows": {
                name: {channel: count for (kind, channel), count in self._odd.items() if kind == name and count}
                for name in BITS
            },
            "drift": self._drift.statistics() if self._drift else {},
            "explanation": self._explained(self._drift.explanation()) if self._drift else {},
            "harm": self._harm.statistics() if self._harm else {},
        }

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON."""
        return {
            "guards": self._guards.state(),
            "senders": self._senders.state(),
            "drift": self._drift.state() if self._drift else None,
            "harm": self._harm.state() if self._harm else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; parts that belong to other channels or another reference start anew."""
        if self._guards.restore(state.get("guards") or {}):
            self._repetition.forget()
        self._senders.restore(state.get("senders") or {})
        same = self._drift is not None and bool(state.get("drift")) and self._drift.restore(state["drift"])
        if same and self._harm and state.get("harm"):
            self._harm.restore(state["harm"])

    # --- counting ---
    def _start_window(self) -> None:
        self._counters: Counter[str] = Counter()
        self._window = {engine: LogSketch() for engine in self._plan.engines}
        self._moments = MomentWindow.empty(self._fixed, classes=self._plan.classes) if self._fixed else None
        self._span: tuple[int, int] | None = None

    def _count(self, name: str, count: int) -> None:
        if count:
            self._counters[name] += count
            self._totals[name] += count

    def _count_tally(self, tally: Tally) -> None:
        by_outcome = tally.by_outcome()
        self._count("requests", sum(by_outcome))
        self._count("rows", tally.rows)
        for outcome in COUNTED:
            self._count(OUTCOME_COUNTERS[outcome], by_outcome[outcome])
        for number, cell in tally.answered().items():
            if number < len(self._plan.engines):
                for sketches in (self._window, self._lifetime):
                    add_latencies(sketches[self._plan.engines[number]], cell)

    def _count_requests(self, requests: Records) -> None:
        self._count("requests", len(requests))
        self._count("rows", int(requests["rows"].astype(np.int64).sum()))
        for value, count in zip(*np.unique(requests["outcome"], return_counts=True), strict=True):
            self._count(OUTCOME_COUNTERS[Outcome(int(value))], int(count))
        answered = requests[np.isin(requests["outcome"], ANSWERED)]
        for number, engine in enumerate(self._plan.engines):
            latencies = answered["latency_us"][answered["engine"] == number]
            latencies = latencies[latencies >= 0]  # a negative or NaN latency is a writer's bug, not a fast request
            if len(latencies):
                self._window[engine].add_many(latencies)
                self._lifetime[engine].add_many(latencies)

    def _count_bits(self, records: Records) -> None:
        for name, bits in BITS.items():
            odd = records[bits][records[bits] != 0]
            self._count(f"rows_{name}", len(odd))
            for index, channel in enumerate(self._plan.channels) if len(odd) else ():
                self._odd[name, channel] += int(np.count_nonzero(odd >> np.uint64(index) & np.uint64(1)))

    def _count_classes(self, records: Records) -> None:
        known = records["predicted"][(records["predicted"] >= 0) & (records["predicted"] < len(self._classes))]
        self._classes += np.bincount(known, minlength=len(self._classes)) if len(self._classes) else 0

    # --- engines ---
    def _engine_events(self, requests: Records) -> Iterator[Event]:
        marks: dict[int, list[str]] = {}
        for engine, code in _marks(requests):
            if engine < len(self._plan.engines):
                marks.setdefault(engine, []).append(code)
        for number, codes in sorted(marks.items()):
            name = self._plan.engines[number]
            for code, run in groupby(codes):
                count = sum(1 for _ in run)
                yield (
                    EngineFailed(self._plan.service, name, code, count)
                    if code
                    else EngineServed(self._plan.service, name, count)
                )

    def _latency_events(self, requests: Records) -> Iterator[Event]:
        budget = self._budget
        if budget is None:
            return
        tried = requests[requests["first_engine"] == self._plan.engines.index(self._serving)]
        tried = tried[np.isin(tried["outcome"], (*ANSWERED, Outcome.DEADLINE))]
        over = (tried["latency_us"] > budget.budget_us) | (tried["outcome"] == Outcome.DEADLINE)
        for one in over.tolist():
            if budget.update(one):
                yield self._latency_alarm(budget)

    def _latency_alarm(self, budget: LatencyBudget) -> Event:
        plan, engine = self._plan, self._serving
        if not budget.raised:
            return AlarmCleared(plan.service, AlarmKind.LATENCY, engine=engine)
        numbers = budget.numbers()
        text = (
            f"{engine}: {numbers['over']:.0f} of the last {numbers['of_last']:.0f} requests took longer than "
            f"the {budget.budget_us:.0f} us that 95 % should keep"
        )
        p95_us = self._window[engine].quantile(0.95)
        numbers |= {} if p95_us is None else {"p95_us": p95_us}
        return AlarmRaised(plan.service, AlarmKind.LATENCY, Level.HARMFUL, engine=engine, text=text, numbers=numbers)

    # --- sensors and the world ---
    def _guard_events(self, judged: Records) -> Iterator[Event]:
        bits = np.stack([judged[field] for field in BITS.values()], axis=1)
        news = self._repetition.news(bits)
        rows = bits[news]
        followed = rows[self._guard_rows.newest(len(rows), judged["arrival_ns"])]
        if len(followed) < len(rows):
            self._count("rows_unguarded", len(rows) - len(followed))
            self._repetition.forget()
        for values in followed.tolist():
            for finding in self._guards.update(**dict(zip(BITS, values, strict=True))):
                yield self._alarm(finding)

    def _sender_events(self, judged: Records) -> Iterator[Event]:
        times_s = np.where(judged["rows"] == 1, judged["data_time_s"], np.nan)  # rows of one request share their time
        timed = np.isfinite(times_s) & (self._plan.hop_s > 0)
        comparable = self._comparable(judged)
        news = np.flatnonzero(timed | comparable)
        before = self._senders.repeated
        views = np.ascontiguousarray(judged["view"][news])
        sources = judged["source"][news].tolist()
        for at, source, width, time_s, compared, request in zip(
            range(len(news)), sources, judged["view_width"][news].tolist(), times_s[news].tolist(),
            comparable[news].tolist(), judged["arrival_ns"][news].tolist(), strict=True,
        ):  # fmt: skip
            view = views[at, :width].tobytes() if compared else b""
            patched = bool(source & PATCHED)
            for finding in self._senders.update(
                source & ~PATCHED, view=view, time_s=time_s, patched=patched, request=request
            ):
                yield self._alarm(finding)
        self._repeated = self._senders.repeated - before
        self._count("rows_repeated", self._repeated)

    def _comparable(self, judged: Records) -> NDArray[np.bool_]:
        """Rows whose view may be compared with others: not those in which a guard explains every channel."""
        if not self._plan.repeats:
            return np.zeros(len(judged), bool)
        every = np.uint64((1 << len(self._plan.channels)) - 1)
        explained = judged["dead_bits"] | judged["stuck_bits"] | judged["not_finite_bits"]
        known = (explained & every == every) if every else judged["not_finite_bits"] != 0
        comparable: NDArray[np.bool_] = (judged["view_width"] > 0) & ~known & np.isfinite(judged["view"]).all(axis=1)
        return comparable

    def _drift_events(self, judged: Records) -> Iterator[Event]:
        if self._moments is None or not len(judged):
            return
        viewed, features = self._viewed(judged, self._moments.fixed.width)
        counted = self._odd_rows(judged) - Counter(
            not_finite=int((~np.isfinite(features).all(axis=1) & (viewed["not_finite_bits"] != 0)).sum())
        )  # those the window counts by itself
        self._moments = self._moments.add(features, viewed["predicted"], counted)
        first = self._span[0] if self._span else int(judged["sequence"][0])
        self._span = (first, int(judged["sequence"][-1]))
        if self._drift:
            followed = self._drift_rows.thin(len(viewed), viewed["arrival_ns"])
            self._count("rows_thinned", len(viewed) - len(viewed[followed]))
            yield from self._follow(self._drift, features[followed], viewed[followed])

    def _viewed(self, judged: Records, width: int) -> tuple[Records, NDArray[np.float64]]:
        """Rows that have the followed view, and its numbers."""
        if self._plan.of_outputs:
            answered = judged[judged["predicted"] >= 0]
            predicted, confidence, entropy = (answered[name] for name in ("predicted", "confidence", "entropy"))
            return answered, output_features(predicted, confidence, entropy, width - 2)
        if not self._plan.view_at:
            viewed = judged[judged["view_width"] == width]
            return viewed, viewed["view"][:, :width].astype(np.float64)
        begins = self._view_at[judged["engine"]]
        viewed = judged[(begins >= 0) & (judged["view_width"] >= begins + width)]
        columns_of = self._view_at[viewed["engine"]][:, None] + np.arange(width)
        return viewed, np.take_along_axis(viewed["view"], columns_of, axis=1).astype(np.float64)

    def _follow(self, drift: DriftMonitor, features: NDArray[Any], rows: Records) -> Iterator[Event]:
        start = 0
        while start < len(rows):
            before = drift.raised_rows
            # in pieces that end where a finding has lasted, so that what is said of it then is of that moment; row by
            # row where harm is judged, which looks at every row's evidence
            most = PERSISTED_ROWS - before if before < PERSISTED_ROWS else PERSISTED_ROWS
            piece = slice(start, start + (1 if self._harm else most))
            self._calendar.add(rows["arrival_ns"][piece], rows["data_time_s"][piece])
            found = drift.follow(features[piece], rows["predicted"][piece], rows["data_time_s"][piece])
            left = len(rows["row"][piece])
            yield from (self._alarm(finding, back=left - 1 - number) for number, finding in found)
            if self._harm:
                yield from self._follow_harm(self._harm, drift, features[start], rows[start])
            if not found and before < PERSISTED_ROWS <= drift.raised_rows:  # a row may not count
                yield self._persisting(drift)
            start = piece.stop

    def _follow_harm(
        self, harm: HarmMonitor, drift: DriftMonitor, features: NDArray[Any], row: Any
    ) -> Iterator[Event]:
        # what another engine says is no evidence against the first one
        predicted = int(row["predicted"]) if row["engine"] == 0 else NO_CLASS
        key = (int(row["arrival_ns"]), int(row["row"]))
        ended = harm.follow(features, predicted, key, evidence=drift.evidence(), drifts=drift.raised)
        if ended:
            yield self._alarm(ended)

    def _harm_events(self, shadows: Records) -> Iterator[Event]:
        """What witnesses said of rows that were followed."""
        self._count("rows_witnessed", len(shadows))
        if self._harm is None or not len(shadows):
            return
        told: dict[tuple[int, int], dict[str, int]] = {}
        columns = ("arrival_ns", "row", "engine", "predicted")
        for arrival_ns, row, engine, predicted in zip(*(shadows[name].tolist() for name in columns), strict=True):
            if engine < len(self._plan.engines) and predicted != NO_CLASS:
                told.setdefault((arrival_ns, row), {})[self._plan.engines[engine]] = predicted
        for key, said in told.items():
            finding = self._harm.hear(key, said)
            if finding:
                yield self._alarm(finding)

    def _persisting(self, drift: DriftMonitor) -> Event:
        open_guards = (
            *(f"{kind}:{name}" for kind, names in self._guards.statistics().items() for name in names),
            *(kind for kind, senders in self._senders.statistics().items() if senders),
        )
        blame = drift.blame()
        channels = tuple(sorted(blame, key=lambda name: -blame[name]))
        return DriftPersists(
            self._plan.service, PERSISTED_ROWS, channels, open_guards, drift.single_channel(), self._digest,
            self._explained(drift.explanation()),
        )  # fmt: skip

    def _explained(self, explanation: Explanation | None, *, back: int = 0) -> dict[str, Any]:
        """As `DriftExplanation` of the contract; {} for none. back: rows that came after the one it is of."""
        if explanation is None:
            return {}
        newest = self._calendar.rows - 1 - back
        changed_ns, changed_at_s = self._calendar.at(newest - explanation.rows + 1)
        newest_ns, _ = self._calendar.at(newest)
        return details(
            explanation, self._plan.units, changed_at_s=changed_at_s, changed_ago_s=(newest_ns - changed_ns) * 1e-9
        )

    def _odd_rows(self, judged: Records) -> Counter[str]:
        """Rows that were odd, by the names a drift window uses; a whole group has one scale."""
        counts: Counter[str] = Counter(repeated=self._repeated)
        for name in ("not_finite", "out_of_range"):
            counts[name] = int(np.count_nonzero(judged[BITS[name]]))
        for index, channel in enumerate(self._plan.channels):
            for name in ("dead", "stuck"):
                counts[f"{name}:{channel}"] = int(
                    np.count_nonzero(judged[BITS[name]] >> np.uint64(index) & np.uint64(1))
                )
        for group in dict.fromkeys(self._plan.groups.values()):
            mask = sum(1 << at for at, name in enumerate(self._plan.channels) if self._plan.groups.get(name) == group)
            counts[f"scale:{group}"] = int(np.count_nonzero(judged["scale_bits"] & np.uint64(mask)))
        return counts

    def _alarm(self, finding: Finding, *, back: int = 0) -> Event:
        kind, service = AlarmKind(finding.kind), self._plan.service
        if not finding.raised:
            return AlarmCleared(service, kind, finding.channels)
        numbers = {name: float(value) for name, value in finding.numbers.items()}
        if "rows_since_change" in numbers:  # from the first odd row to the alarm, both counted
            numbers["delay_windows"] = numbers["rows_since_change"]
        level = Level.BROKEN_INPUT if kind in BROKEN_INPUT else LEVELS[kind]
        return AlarmRaised(
            service, kind, level, finding.channels, text=finding.text, numbers=numbers, better=finding.engine,
            explanation=self._explained(finding.explanation, back=back),
        )  # fmt: skip

    # --- telemetry ---
    def _latency_fields(self) -> list[dict[str, Any]]:
        return [
            {"service": self._plan.service, "engine": engine, **sketch.fields()}
            for engine, sketch in self._window.items()
            if sketch.count
        ]

    def _drift_fields(self) -> list[dict[str, Any]]:
        if self._moments is None or self._span is None:
            return []
        moments, gaps = self._moments, self._counters["gaps"]
        return [
            {
                "service": self._plan.service,
                "view": self._plan.view,
                "reference": self._digest,
                "first": self._span[0],
                "last": self._span[1],
                "rows": moments.rows,
                "clip": moments.fixed.clip,
                "fraction_bits": moments.fixed.fraction_bits,
                "sums": list(moments.sums),
                "squares": list(moments.squares),
                "classes": list(moments.classes),
                "counters": {**moments.counters, **({"gap": gaps} if gaps else {})},
            }
        ]


OUTCOME_COUNTERS: Final = {
    Outcome.OK: "ok",
    Outcome.FAILED_OVER: "failed_over",
    Outcome.FLOOR: "floor",
    Outcome.REFUSED_BY_GUARD: "refused_by_guard",
    Outcome.OVERLOADED: "overloaded",
    Outcome.DEADLINE: "deadline",
    Outcome.ERROR: "error",
}


def _marks(requests: Records) -> Iterator[tuple[int, str]]:
    """(engine number, failure code or "" for an answer), in the order of the requests."""
    columns = ("outcome", "engine", "first_engine", "latency_us", "queue_us")
    for outcome, engine, first, latency_us, queue_us in zip(
        *(requests[name].tolist() for name in columns), strict=True
    ):
        answered = outcome in ANSWERED and engine != NO_ENGINE
        ran_late = (
            outcome == Outcome.DEADLINE and queue_us < latency_us / 2
        )  # else the queue was late, not the engine
        if first != NO_ENGINE and (outcome == Outcome.ERROR or ran_late or (answered and first != engine)):
            yield first, "deadline_exceeded" if ran_late else "engine_failed"
        if answered:
            yield engine, ""


def _summary(sketch: LogSketch) -> dict[str, float | None]:
    quantiles = {f"p{round(100 * q)}_us": sketch.quantile(q) for q in (0.5, 0.95, 0.99)}
    return {"count": float(sketch.count), "total_us": float(sketch.total_us), **quantiles}


# --- the device --------------------------------------------------------------------------------------------
UNITS: Final = {AlarmKind.POWER: "W", AlarmKind.THERMAL: "°C", AlarmKind.MEMORY: "bytes"}


class DeviceMonitor:
    """Power, temperature and memory against their limits; an alarm reaches every service."""

    def __init__(
        self, services: tuple[str, ...], *, power_w: float, temperature_c: float, memory_bytes: float
    ) -> None:
        self._services = services
        self._limits = {
            AlarmKind.POWER: Limit(power_w),
            AlarmKind.THERMAL: Limit(temperature_c),
            AlarmKind.MEMORY: Limit(memory_bytes),
        }

    def observe(
        self, *, power_w: float | None, temperature_c: float | None, memory_bytes: float | None
    ) -> list[Event]:
        readings = {AlarmKind.POWER: power_w, AlarmKind.THERMAL: temperature_c, AlarmKind.MEMORY: memory_bytes}
        return [
            self._alarm(service, kind, value)
            for kind, value in readings.items()
            if value is not None and self._limits[kind].update(value)
            for service in self._services
        ]

    def statistics(self) -> dict[str, bool]:
        """Kind -> raised."""
        return {kind.value: limit.raised for kind, limit in self._limits.items()}

    def _alarm(self, service: str, kind: AlarmKind, value: float) -> Event:
        limit = self._limits[kind]
        if not limit.raised:
            return AlarmCleared(service, kind)
        text = f"{kind.value}: {value:.4g} {UNITS[kind]} is over the limit of {limit.limit:.4g} {UNITS[kind]}"
        numbers = {"value": float(value), "limit": float(limit.limit), "samples": float(Limit.RAISE_SAMPLES)}
        return AlarmRaised(service, kind, Level.HARMFUL, text=text, numbers=numbers)
