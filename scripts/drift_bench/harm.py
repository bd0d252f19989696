"""Switches on the wrist: does the device leave its model when, and only when, another is better?

The shipped parts decide: the guard's bits and their counters, the drift monitor, the witnesses of the reference
(agent.drift.harm) and the choice among engines by the card. Witnesses are asked from the row after a drift was raised
on, as a device asks them. A run puts a fault into the stream of known wearers after CLEAN_ROWS to twice as many rows
and follows it for FAULT_ROWS; what matters is the first switch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.contract.plan import ChannelPlan, GuardPlan
from agent.decisions.choice import DEFAULT_MARGIN, Card, Fault, choose, read_card
from agent.decisions.events import BROKEN_INPUT, AlarmKind
from agent.drift import GuardCounters, HarmMonitor, Reference, drift_monitor, load_reference
from agent.engine import OnnxEngine
from agent.guard import Guard
from compressor import evidence
from compressor.assess import Bench
from compressor.cache import Cache
from compressor.candidate import Variant
from compressor.evaluate import ask
from compressor.jobs import Job, run_job
from compressor.recipe import open_task, read_recipe
from compressor.task import Fault as TaskFault
from compressor.task import Role, Rows
from scripts.drift_bench.wrist import MODEL, RECIPE, Say, orders

CLEAN_ROWS = 60
FAULT_ROWS = 260
WITHIN_GUARD_ROWS = 10
WITHIN_ROWS = 64
SEED = 20260301
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


def untouched(device: Device, role: Role, runs: int, seed: int = 0) -> Runs:
    """No fault: the whole stream of known wearers, or known rows and then those of new wearers."""
    known, new = device.rows(Role.STREAM), device.rows(role)
    clean, seen = device.seen(Role.STREAM), device.seen(role)
    nothing = np.zeros(0, np.int64)
    switches = []
    for order, before in zip(orders(new, runs, seed), orders(known, runs, seed + 1), strict=True):
        lead = nothing if role is Role.STREAM else before[:CLEAN_ROWS]
        switches.append(run(device, clean, seen, new.labels, lead, order))
    return Runs(role.value, tuple(switches))
