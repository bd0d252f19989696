"""Switches on the wrist: does the device leave its model when, and only when, another is better?

The shipped parts decide: the guard's bits and their counters, the drift monitor, the witnesses of the reference
(agent.drift.harm) and the choice among engines by the card. Witnesses are asked from the row after the first
suspicion on, as a device asks them. A run puts a fault into the stream of known wearers after CLEAN_ROWS to twice as
many rows and follows it for FAULT_ROWS; what matters is the first switch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.plan import ChannelPlan, GuardPlan
from agent.decisions.choice import DEFAULT_MARGIN, Card, Fault, choose, read_card
from agent.decisions.events import (
    BROKEN_INPUT,
    AgentStarted,
    AlarmKind,
    Event,
    RestartWindows,
    Tick,
    WorkerReady,
)
from agent.decisions.service import ServicePolicy
from agent.decisions.supervisor import Supervisor
from agent.drift import (
    DriftMonitor,
    GuardCounters,
    HarmMonitor,
    Reference,
    drift_monitor,
    dump_reference,
    load_reference,
)
from agent.engine import OnnxEngine
from agent.guard import Guard
from agent.monitor import Monitor, MonitorPlan
from agent.observation import RECORD, Outcome
from compressor import evidence
from compressor.assess import Bench
from compressor.cache import Cache
from compressor.candidate import Variant
from compressor.evaluate import ask
from compressor.jobs import Job, run_job
from compressor.recipe import open_task, read_recipe
from compressor.task import Fault as TaskFault
from compressor.task import Role, Rows
from scripts.drift_bench.wrist import MODEL, RECIPE, SESSION_ROWS, Say, orders

RUNS = 20  # of each fault on each fold
CLEAN_ROWS = 60
FAULT_ROWS = 260
WITHIN_GUARD_ROWS = 10
WITHIN_ROWS = 64
SEED = 20260301
ROW_S = 1.28  # from one window of the wrist's stream to the next
SICK_ROWS = 30
HEAL_ROWS = 700
HEALS = 18  # of each fold: more than 50 together
RECORD_BITS = ("dead_bits", "stuck_bits", "range_bits", "not_finite_bits", "scale_bits")  # as BITS
LEAST_GAIN = 0.0  # as `drift.least_gain` is unless configured
GUARDED = ("gyro_dead_x", "gyro_off", "accel_in_ms2", "gyro_in_degrees")
SWAPPED = ("swap_xy",)
MOUNTED = ("worn_180", "rotated_45")
BITS = ("dead", "stuck", "out_of_range", "not_finite", "scale")  # GuardCounters' names, in the order of a verdict's

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Seen:
    """A stream as the device sees it: view (rows, features), each engine's class (rows,), guard bits by kind."""

    view: NDArray[np.float64]
    predicted: Mapping[str, Ints]
    bits: NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Device:
    """Engines of one fold in lineup order, their card, and the serving model's reference with its witnesses."""

    bench: Bench
    engines: Mapping[str, OnnxEngine]
    card: Card
    reference: Reference
    guard: Guard
    answers: dict[tuple[Role, str, int], Seen] = field(default_factory=dict)

    @property
    def preferred(self) -> str:
        return next(iter(self.engines))

    def rows(self, role: Role) -> Rows:
        return self.bench.data.role(role)

    def seen(self, role: Role, fault: TaskFault | None = None, draw: int = 0) -> Seen:
        """All rows of a role, under a fault."""
        key = (role, fault.name if fault else "", draw)
        if key not in self.answers:
            windows = self.rows(role).windows
            self.answers[key] = self._seen(fault.apply(windows, draw) if fault else windows)
        return self.answers[key]

    def _seen(self, windows: NDArray[np.float32]) -> Seen:
        told = {name: ask(engine, self.bench.task.input_name, windows) for name, engine in self.engines.items()}
        verdict = self.guard.check(windows)
        bits = np.zeros((len(BITS), len(windows)), np.uint64) if verdict.bits is None else verdict.bits
        view = told[self.preferred].view.astype(np.float64)
        return Seen(view, {name: one.predicted for name, one in told.items()}, bits)


def open_device(new_wearers: Sequence[int], cache: Path, scratch: Path, say: Say, *, model: str = MODEL) -> Device:
    """Train the fold's models, or take them from the cache; card and reference as a shipped artifact's.

    Raises: EdgewardenError: the data is missing, or training failed.
    """
    recipe = read_recipe(RECIPE)
    recipe = recipe.model_copy(
        update={
            "data": {**recipe.data, "new_wearers": list(new_wearers)},
            "quantise": recipe.quantise.model_copy(update={"precisions": ("float32",)}),
        }
    )
    task, task_sha256 = open_task(recipe, RECIPE)
    scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(recipe, task, task_sha256, task.load(recipe.data), Cache(cache), scratch)
    tables = {
        task.service if one.name == model else f"{task.service}-{one.name}": one
        for one in sorted(recipe.model, key=lambda one: one.name != model)  # the serving one first
        if one.name == model or one.role == "fallback"
    }
    variants = {
        name: run_job(Job(recipe, RECIPE, one, cache), lambda name, step, _: say(f"{name}: {step}"))[0]
        for name, one in tables.items()
    }
    serving, *others = variants
    watch = evidence.watch(
        bench, variants[serving], detection_runs=0, witnesses={name: variants[name] for name in others}
    )
    reference = load_reference(watch.reference)
    engines = {name: bench.engine(variant) for name, variant in variants.items()}
    return Device(bench, engines, _card(bench, variants, engines, reference), reference, _guard(bench, reference))


def _card(
    bench: Bench, variants: Mapping[str, Variant], engines: Mapping[str, OnnxEngine], reference: Reference
) -> Card:
    stream = bench.data.role(Role.STREAM)
    accuracy = {
        name: ask(engine, bench.task.input_name, stream.windows).accuracy(stream.labels)
        for name, engine in engines.items()
    }
    columns = {name: evidence.fault_column(bench, variant) for name, variant in variants.items()}
    serving = next(iter(engines))
    lines = evidence.table(bench, columns, active=serving, clean=accuracy[serving])
    document = {
        "accuracy": accuracy,
        "faults": [
            {"name": line.name, "kind": line.kind, "channels": line.channels, "accuracy": line.accuracy}
            for line in lines
        ],
    }
    reads = {name: bench.task.channels_behind(variant.model.channels) for name, variant in variants.items()}
    return read_card(document, engines=tuple(engines), reads=reads, groups=reference.groups)


def _guard(bench: Bench, reference: Reference) -> Guard:
    means = reference.guard.channel_mean
    channels = tuple(
        ChannelPlan(one.name, one.group, one.minimum, one.maximum, means[one.name]) for one in bench.task.channels
    )
    return Guard(GuardPlan(bench.task.input_name, channels, group_rms=reference.guard.group_rms))


@dataclass(frozen=True, slots=True)
class Switch:
    """`row` counts from the fault's first, `event_row` that of the drift finding (None: there was none)."""

    engine: str
    why: str  # guard | harm
    row: int
    event_row: int | None
    before: float
    after: float
    numbers: Mapping[str, float]


def run(device: Device, clean: Seen, broken: Seen, labels: Ints, clean_order: Ints, order: Ints) -> Switch | None:
    """The first switch of a device that sees `clean_order` of the clean rows, then `order` of the broken ones."""
    follower = _Follower(device)
    for index in clean_order.tolist():
        if (engine := follower.step(clean, index)) is not None:
            return _switch(follower, engine, -1, None, clean, labels, clean_order)
    event_row: int | None = None
    for row, index in enumerate(order.tolist()):
        engine = follower.step(broken, index)
        if event_row is None and follower.drifts:
            event_row = row
        if engine is not None:
            return _switch(follower, engine, row, event_row, broken, labels, order[row + 1 :])
    return None


def _switch(
    follower: _Follower, engine: str, row: int, event_row: int | None, seen: Seen, labels: Ints, after: Ints
) -> Switch:
    def accuracy(name: str) -> float:
        return float((seen.predicted[name][after] == labels[after]).mean())

    return Switch(
        engine, follower.why, row, event_row, accuracy(follower.device.preferred), accuracy(engine), follower.numbers
    )


class _Follower:
    """The monitors of one device, and what they lead to."""

    def __init__(self, device: Device) -> None:
        self.device = device
        reference, names = device.reference, tuple(one.name for one in device.bench.task.channels)
        monitor = drift_monitor(reference)
        assert monitor is not None
        self.monitor = monitor
        self.harm = HarmMonitor(reference, {card.engine: card.accuracy or 0.0 for card in device.card.engines})
        self.guards = GuardCounters(names, dict(reference.groups))
        self.why, self.numbers = "", {}
        self._row = 0

    @property
    def drifts(self) -> bool:
        return self.monitor.raised

    def step(self, seen: Seen, index: int) -> str | None:
        """One row; the engine it makes the device switch to."""
        self._row += 1
        engine = self._guarded(seen, index)
        if engine is not None:
            return engine
        predicted = seen.predicted[self.device.preferred]
        one = slice(index, index + 1)
        self.monitor.follow(seen.view[one], predicted[one], np.full(1, np.nan))
        asked = self.harm.wanted
        self.harm.follow(
            seen.view[index], int(predicted[index]), self._row, evidence=self.monitor.evidence(), drifts=self.drifts
        )
        if not asked:
            return None
        found = self.harm.hear(self._row, {name: int(seen.predicted[name][index]) for name in asked})
        if found is None or found.numbers["gain_at_least"] < LEAST_GAIN:
            return None
        self.why, self.numbers = "harm", found.numbers
        return found.engine

    def _guarded(self, seen: Seen, index: int) -> str | None:
        bits = dict(zip(BITS, seen.bits[:, index].tolist(), strict=True))
        self.guards.update(**bits)
        kinds = {kind: names for kind, names in self.guards.statistics().items() if names and kind != "range"}
        faults = [
            Fault(AlarmKind(kind), frozenset(names))
            for kind, names in kinds.items()
            if AlarmKind(kind) in BROKEN_INPUT
        ]
        if not faults:
            return None
        current = self.device.preferred
        choice = choose(self.device.card, faults, tuple(self.device.engines), current, margin=DEFAULT_MARGIN)
        self.why = "guard"
        return choice.engine if choice.engine != current else None


# --- scenarios --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Runs:
    """`switches`: of each run, None where there was none."""

    name: str
    switches: tuple[Switch | None, ...]

    def share(self, within: Callable[[Switch], bool] = lambda _: True) -> float:
        return float(np.mean([one is not None and within(one) for one in self.switches]))


def faulty(device: Device, fault: TaskFault, runs: int, seed: int = 0, *, role: Role = Role.STREAM) -> Runs:
    """The fault after clean rows of the same stream, in `runs` orders."""
    generator = np.random.default_rng([SEED, seed])
    rows, clean = device.rows(role), device.seen(role)
    switches = []
    for number, order in enumerate(orders(rows, runs, seed)):
        start = int(generator.integers(CLEAN_ROWS, 2 * CLEAN_ROWS))
        broken = device.seen(role, fault, number % min(runs, fault.draws))
        switches.append(run(device, clean, broken, rows.labels, order[:start], order[start : start + FAULT_ROWS]))
    return Runs(fault.name, tuple(switches))


def untouched(device: Device, runs: int, seed: int = 0) -> Runs:
    """The stream of known wearers as it is."""
    rows, clean, nothing = device.rows(Role.STREAM), device.seen(Role.STREAM), np.zeros(0, np.int64)
    return Runs(
        "untouched",
        tuple(run(device, clean, clean, rows.labels, nothing, order) for order in orders(rows, runs, seed)),
    )


@dataclass(frozen=True, slots=True)
class Session:
    """One new wearer's, after known rows: `event_row` of the first drift finding."""

    wearer: int
    event_row: int | None
    switch: Switch | None


def newcomers(device: Device, runs: int, seed: int = 0) -> list[Session]:
    """`runs` sessions of each new wearer, recordings in another order each time, nothing broken."""
    known, new = device.rows(Role.STREAM), device.rows(Role.NEW_TEST)
    clean, seen = device.seen(Role.STREAM), device.seen(Role.NEW_TEST)
    sessions = []
    for order, before in zip(orders(new, runs, seed), orders(known, runs, seed + 1), strict=True):
        for wearer in np.unique(new.sources).tolist():
            own = order[new.sources[order] == wearer][:SESSION_ROWS]
            switch = run(device, clean, seen, new.labels, before[:CLEAN_ROWS], own)
            sessions.append(Session(wearer, _first_event(device, clean, seen, before[:CLEAN_ROWS], own), switch))
    return sessions


def _first_event(device: Device, clean: Seen, seen: Seen, clean_order: Ints, order: Ints) -> int | None:
    monitor = _drift_monitor(device.reference)
    for one, index in ((clean, clean_order), (seen, order)):
        found = monitor.follow(one.view[index], one.predicted[device.preferred][index], np.full(len(index), np.nan))
        raised = [row for row, finding in found if finding.raised]
        if one is clean:
            monitor.reset()
    return raised[0] if raised else None


def _drift_monitor(reference: Reference) -> DriftMonitor:
    monitor = drift_monitor(reference)
    if monitor is None:
        raise ValueError("the wrist's reference watches nothing")
    return monitor


@dataclass(frozen=True, slots=True)
class Healed:
    """A fault that came and went: rows to the switch, and from the repair to the preferred engine's return."""

    switched_row: int | None
    back_row: int | None


def heal(device: Device, fault: TaskFault, runs: int, seed: int = 0) -> list[Healed]:
    """The device's own monitor and supervisor, row by row: the fault lasts until it has led to a switch and
    SICK_ROWS more, then the stream is as before. The decision clock is the data's.
    """
    generator = np.random.default_rng([SEED + 1, seed])
    rows, clean, broken = device.rows(Role.STREAM), device.seen(Role.STREAM), device.seen(Role.STREAM, fault)
    healed = []
    for order in orders(rows, runs, seed):
        agent = _Agent(device)
        start = int(generator.integers(CLEAN_ROWS, 2 * CLEAN_ROWS))
        for index in order[:start].tolist():
            agent.step(clean, index)
        switched: int | None = None
        for sick, index in enumerate(order[start : start + FAULT_ROWS].tolist(), 1):
            agent.step(broken, index)
            if switched is None and agent.serving != device.preferred:
                switched = sick
            if switched is not None and sick >= switched + SICK_ROWS:
                break
        back = None
        for row, index in enumerate(np.resize(order, HEAL_ROWS).tolist(), 1):
            agent.step(clean, index)
            if agent.phase == "preferred":
                back = row
                break
        healed.append(Healed(switched, back))
    return healed


class _Agent:
    """What the agent process does with records, without a process: monitor, supervisor, and a worker that obeys."""

    def __init__(self, device: Device) -> None:
        reference, names = device.reference, tuple(one.name for one in device.bench.task.channels)
        engines = tuple(device.engines)
        accuracy = {card.engine: card.accuracy for card in device.card.engines if card.accuracy is not None}
        self._device, self._engines = device, engines
        self._monitor = Monitor(
            MonitorPlan(
                device.bench.task.service, 0, engines, names, dict(reference.groups), len(reference.labels),
                accuracy=accuracy,
            ),
            reference,
        )  # fmt: skip
        self._supervisor = Supervisor([ServicePolicy(device.bench.task.service, device.card)])
        self._row = 0
        self._handle([AgentStarted(), WorkerReady(1, {device.bench.task.service: engines})])

    @property
    def serving(self) -> str:
        return self._supervisor.serving(self._device.bench.task.service)

    @property
    def phase(self) -> str:
        return str(self._supervisor.status(self._device.bench.task.service)["phase"])

    def step(self, seen: Seen, index: int) -> None:
        """One request is answered, and what witnesses are asked for is said."""
        asked = self._monitor.witnesses
        self._row += 1
        told = [self.serving, *(one for one in asked if one != self.serving)]
        records = np.zeros(len(told), RECORD)
        records["arrival_ns"], records["rows"] = int(self._row * ROW_S * 1e9), 1
        records["data_time_s"] = self._row * ROW_S
        records["engine"] = [self._engines.index(name) for name in told]
        records["first_engine"] = records["engine"][0]
        records["predicted"] = [seen.predicted[name][index] for name in told]
        records["outcome"][1:] = Outcome.SHADOW
        records["view_width"][0], width = seen.view.shape[1], seen.view.shape[1]
        records["view"][0, :width] = seen.view[index]
        for field_name, bits in zip(RECORD_BITS, seen.bits[:, index].tolist(), strict=True):
            records[field_name][0] = bits
        self._handle([*self._monitor.observe(records), Tick()])

    def _handle(self, events: Sequence[Event]) -> None:
        for event in events:
            for command in self._supervisor.handle(event, self._row * ROW_S):
                if isinstance(command, RestartWindows):
                    self._monitor.restart_windows(command.engine)


# --- figures ----------------------------------------------------------------------------------------------------
def measure_switches(devices: Sequence[Device], runs: int, say: Say, *, seed: int = 0) -> dict[str, Any]:
    """Keys of the document's section `wrist` that are about switches, and `details`: one line a scenario."""
    faults = devices[0].bench.task.faults
    results: dict[str, list[Runs]] = {}
    for device in devices:
        for fault in faults:
            results.setdefault(fault.name, []).append(faulty(device, fault, runs, seed))
        results.setdefault("untouched", []).append(untouched(device, runs, seed))
        say(f"switches: {sum(len(one.switches) for ones in results.values() for one in ones)} runs")
    pooled = {
        name: Runs(name, tuple(one for each in ones for one in each.switches)) for name, ones in results.items()
    }
    sessions = [session for device in devices for session in newcomers(device, runs, seed)]
    healed = [one for device in devices for one in heal(device, device.bench.task.fault("swap_xy"), HEALS, seed)]
    switched = [one for one in healed if one.switched_row is not None]
    harmless = [one for name in ("untouched", *_expected(faults, "harmless")) for one in pooled[name].switches]
    in_faults = [one for fault in faults for one in pooled[fault.name].switches if one is not None]
    return {
        "wrist": {
            "guard_switch_share": _share(
                [_guarded_in_time(one) for name in GUARDED for one in pooled[name].switches]
            ),
            "swap_switch_share": min(pooled[name].share(_in_time) for name in SWAPPED),
            "mount_switch_share": min(pooled[name].share(_in_time) for name in MOUNTED),
            "switch_helped_share": _share([one.after > one.before for one in in_faults]),
            "harmless_switch_share": _share([one is not None for one in harmless]),
            "switched_back_share": _share([one.back_row is not None for one in switched]),
            "new_wearer_event_share": _share([one.event_row is not None for one in sessions]),
            "new_wearer_switch_share": _share([one.switch is not None for one in sessions]),
        },
        "details": {
            "scenarios": [_line(one) for one in pooled.values()],
            "new_wearers": _line(Runs("new wearers", tuple(one.switch for one in sessions))),
            "new_wearer_sessions": len(sessions),
            "healed": {
                "runs": len(healed),
                "switched": len(switched),
                "median_back_rows": _median([one.back_row for one in switched if one.back_row is not None]),
            },
            "harmless_runs": len(harmless),
            "reference_bytes": [len(dump_reference(device.reference)) for device in devices],
        },
    }


def _expected(faults: Sequence[TaskFault], what: str) -> list[str]:
    return [fault.name for fault in faults if fault.expected == what]


def _in_time(one: Switch) -> bool:
    return one.why == "harm" and one.event_row is not None and one.row - one.event_row <= WITHIN_ROWS


def _guarded_in_time(one: Switch | None) -> bool:
    return one is not None and 0 <= one.row < WITHIN_GUARD_ROWS


def _share(hits: Sequence[bool]) -> float | None:
    return round(float(np.mean(hits)), 4) if hits else None


def _median(numbers: Sequence[float]) -> float | None:
    return float(np.median(numbers)) if numbers else None


def _line(runs: Runs) -> dict[str, Any]:
    made = [one for one in runs.switches if one is not None]
    return {
        "name": runs.name,
        "runs": len(runs.switches),
        "switched": runs.share(),
        "median_row": _median([one.row for one in made]),
        "p90_row": float(np.quantile([one.row for one in made], 0.9)) if made else None,
        "before": round(float(np.mean([one.before for one in made])), 3) if made else None,
        "after": round(float(np.mean([one.after for one in made])), 3) if made else None,
        "helped": _share([one.after > one.before for one in made]),
        "to": {name: sum(one.engine == name for one in made) for name in sorted({one.engine for one in made})},
    }
