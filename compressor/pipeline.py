"""From a recipe to artifacts: train, export, judge, measure, gate, choose, package, report.

With newcomers' recordings it is a second run: the first one's results are taken from the cache, its models are
taught what is new (`regenerate`), and what ships must hold against what the first run shipped.

Every step looks into the cache first; the order of steps and the one result are here, their content elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent import clock
from agent.contract.artifact import sha256
from compressor import assess, enrolment, evidence, package, regenerate, select
from compressor.cache import Cache
from compressor.candidate import Candidate, Variant
from compressor.errors import RecipeError
from compressor.jobs import Job, Report, run_jobs, translated, work
from compressor.recipe import DeviceClassTable, Recipe, open_task
from compressor.regenerate import Regeneration, Taught
from compressor.select import Lineup
from compressor.shipping import Shipped, floor_name, write_artifacts
from compressor.task import Role, Task, TaskData

AFTER = {"judge": 6.0, "measure": 12.0, "evidence": 10.0}  # work of the later steps, in the unit of jobs.work


@dataclass(frozen=True, slots=True)
class Orders:
    """What a run is told besides its recipe.

    replay: measurements.json of an earlier run, whose figures decide instead of new ones. enrolment: folder of
    newcomers' recordings. parents: manifest digests of the artifacts this run succeeds, by name. device_class: build
    for this one only ("" = for all).
    """

    replay: Path | None = None
    enrolment: Path | None = None
    parents: Mapping[str, str] = field(default_factory=dict)
    device_class: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """Everything a report says about a run."""

    recipe: Recipe
    task: Task
    data: TaskData
    origin: package.Origin
    candidates: tuple[Candidate, ...]
    teacher: Candidate
    shipped: tuple[Shipped, ...]
    front: tuple[str, ...]
    timings: assess.Timings
    seconds: dict[str, float]
    regeneration: Regeneration | None = None


def total_work(recipe: Recipe, orders: Orders = Orders()) -> float:
    first = sum(work(model) for model in recipe.model) + sum(AFTER.values())
    if orders.enrolment is None:
        return first
    return first + regenerate.second_work(recipe) + AFTER["judge"] + AFTER["measure"]


def plan(recipe: Recipe, orders: Orders = Orders()) -> tuple[tuple[str, str], ...]:
    """(step, what it will do) for a person who wants to know before it runs."""
    names = ", ".join(f"{m.name} ({m.role}, {m.family} {m.width}, {m.epochs} epochs)" for m in recipe.model)
    devices = _devices(recipe, orders.device_class)
    classes = "; ".join(f"{d.name}: {assess.device_budget(d)}" for d in devices)
    rules = recipe.regenerate
    second = (
        f"students and fallbacks go on from their first weights with the recordings in {orders.enrolment}, twice, "
        f"once with the halves exchanged; newcomers must gain, known rows may lose {rules.forgetting:g}"
    )
    return (
        ("train", f"{names}; {recipe.train.processes} at a time, one thread each"),
        *([("teach", second)] if orders.enrolment else []),
        ("export", f"ONNX with preprocessing and view inside, as {', '.join(recipe.quantise.precisions)}"),
        ("judge", "accuracy by role, parity torch/ONNX/engine, golden inputs"),
        ("measure", f"CPU time of one row, {recipe.measure.rounds} x {recipe.measure.runs} runs in turns"),
        ("choose", classes),
        ("package", "artifacts with drift reference, golden inputs and card; report"),
    )


def compress(
    recipe: Recipe, recipe_path: Path, out: Path, *, cache: Path, report: Report, orders: Orders = Orders()
) -> Result:
    """Run everything and write the artifacts below `out`; the reports are the caller's.

    Raises:
        RecipeError, DataError, StageFailed, GateFailed, StorageError
    """
    seconds: dict[str, float] = {}
    timed = _Stopwatch(seconds)
    task, task_sha256 = open_task(recipe, recipe_path)
    devices = _devices(recipe, orders.device_class)
    with translated("load data", task.name):
        data = task.load(recipe.data)
    halves = enrolment.read_enrolment(orders.enrolment, task, data) if orders.enrolment else None
    with timed("train and export"):
        jobs = [Job(recipe, recipe_path, model, cache, halves) for model in recipe.model]
        taught = run_jobs(sorted(jobs, key=lambda job: -work(job.model)), report, run=regenerate.teach)
    origin = package.Origin(recipe.sha256, task_sha256, data.sha256, recipe.data, recipe.seed, _provenance(halves))
    with tempfile.TemporaryDirectory(prefix="edgewarden-") as folder, timed("assess and package"):
        bench = assess.Bench(recipe, task, task_sha256, data, Cache(cache), Path(folder))
        made = _Made(bench, taught, report, timed)
        run = _first(made, orders.replay) if halves is None else _second(made, devices, halves, orders.replay)
        with timed("evidence"), translated("evidence", recipe.name):
            shipped = tuple(_ship(run, device) for device in devices)
        report("all", "evidence collected", AFTER["evidence"])
        for ship in shipped:
            write_artifacts(run.bench, ship, origin, out / ship.device.name, orders.parents)
    ranked = [c for c in run.candidates if c.variant.model.role != "fallback"]
    return Result(
        recipe, task, run.bench.data, origin, run.candidates, run.teacher, shipped, select.pareto_front(ranked),
        run.timings, seconds, run.regeneration,
    )  # fmt: skip


def _devices(recipe: Recipe, name: str) -> tuple[DeviceClassTable, ...]:
    found = tuple(device for device in recipe.device_class if name in {"", device.name})
    if not found:
        known = ", ".join(device.name for device in recipe.device_class)
        raise RecipeError(f"recipe '{recipe.name}' has no device class '{name}'", hint=f"It has {known}.")
    return found


def _provenance(halves: enrolment.Halves | None) -> dict[str, object] | None:
    """What a manifest says of newcomers' recordings: digests and counts; who they are of stays on the host."""
    if halves is None:
        return None
    told = halves.straight
    return {
        "sha256": told.sha256,
        "train_rows": len(told.train),
        "reference_rows": len(told.reference),
        "recordings": [
            {"device": sha256(source.device.encode())[:16], "sha256": source.sha256, "rows": source.rows}
            for source in told.sources
        ],
    }


@dataclass(frozen=True, slots=True)
class _Made:
    """What training left, and what the later steps work with."""

    bench: assess.Bench
    taught: Mapping[str, Taught]
    report: Report
    timed: _Stopwatch

    def first(self) -> list[Variant]:
        return [variant for model in self.bench.recipe.model for variant in self.taught[model.name].first]

    def second(self) -> list[Variant]:
        return [variant for model in self.bench.recipe.model for variant in self.taught[model.name].second]


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything known of the candidates of one run. `before`: what an earlier run chose, by device class."""

    bench: assess.Bench
    candidates: tuple[Candidate, ...]
    teacher: Candidate
    timings: assess.Timings
    regeneration: Regeneration | None = None

    def lineup(self, device: DeviceClassTable) -> Lineup:
        """Raises: GateFailed."""
        rules, service, candidates = self.bench.recipe.select, self.bench.task.service, self.candidates
        if self.regeneration is None:
            return select.choose_lineup(candidates, device, rules, service=service)
        former = self.regeneration.before[device.name]
        held = regenerate.gated(candidates, former, self.bench.recipe.regenerate, self.regeneration.halves)
        return select.choose_lineup(held, device, rules, service=service, kept=regenerate.kept(former))


def _first(made: _Made, replay: Path | None) -> _Run:
    bench = made.bench
    judged = _judge(bench, made.first(), made)
    timings = _time(bench, made.first(), made, replay)
    candidates = assess.candidates(bench, made.first(), judged, timings.latency)
    return _Run(bench, candidates, _named(candidates, bench.recipe.teacher.name), timings)


def _second(made: _Made, devices: Sequence[DeviceClassTable], halves: enrolment.Halves, replay: Path | None) -> _Run:
    """The first run again, from the cache, and its successors beside it; the teacher stays as it was."""
    first = _first(made, None)
    before = {device.name: regenerate.before(first.bench, first.lineup(device), halves) for device in devices}
    bench = regenerate.second_bench(first.bench, halves)
    teacher = first.teacher
    judged = _judge(bench, made.second(), made) | {teacher.name: assess.judge(first.bench, teacher.variant)}
    timings = _time(bench, made.second(), made, replay)
    candidates = assess.candidates(bench, made.second(), judged, timings.latency)
    candidates = regenerate.with_swapped(candidates, made.taught)
    return _Run(bench, candidates, teacher, timings, Regeneration(halves, before))


class _Stopwatch:
    """Notes how long each named step took."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.running: list[tuple[str, float]] = []
        self.name = ""

    def __call__(self, name: str) -> _Stopwatch:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.running.append((self.name, clock.monotonic_s()))

    def __exit__(self, *failure: object) -> None:
        name, started = self.running.pop()
        self.seconds[name] = round(clock.monotonic_s() - started, 2)


def _judge(bench: assess.Bench, variants: Sequence[Variant], made: _Made) -> dict[str, assess.Judgement]:
    judged = {}
    with made.timed("judge"):
        for variant in variants:
            with translated("judge", variant.name):
                judged[variant.name] = assess.judge(bench, variant)
            made.report(variant.name, "judged on the device's engine", AFTER["judge"] / len(variants))
    return judged


def _time(bench: assess.Bench, variants: Sequence[Variant], made: _Made, replay: Path | None) -> assess.Timings:
    with made.timed("measure"), translated("measure", bench.recipe.name):
        timings = assess.replay(replay, variants) if replay else assess.time_all(bench, variants)
    told = "latency taken from an earlier run" if timings.replayed else "latency measured"
    made.report("all", told, AFTER["measure"])
    return timings


def _ship(run: _Run, device: DeviceClassTable) -> Shipped:
    """Choose for one device class, and collect what its card says."""
    bench, service, lineup = run.bench, run.bench.task.service, run.lineup(device)
    engines = {service: lineup.active, **lineup.fallbacks}
    columns = {name: evidence.fault_column(bench, one.variant) for name, one in engines.items()}
    floor = floor_name(bench.task)
    columns[floor] = evidence.floor_column(bench, evidence.class_prior(bench.task, bench.data))
    accuracy = {name: one.accuracy[Role.STREAM] for name, one in engines.items()}
    table = evidence.table(bench, columns, active=service, clean=accuracy[service])
    accuracy[floor] = columns[floor][0]
    new = regenerate.on_reference(run.regeneration, device.name, engines) if run.regeneration else {}
    watch = evidence.watch(
        bench, lineup.active.variant, detection_runs=bench.recipe.faults.detection_runs,
        witnesses={name: one.variant for name, one in lineup.fallbacks.items()},
    )  # fmt: skip
    return Shipped(device, lineup, table, accuracy, new, service, watch)


def _named(candidates: Sequence[Candidate], name: str) -> Candidate:
    return next(candidate for candidate in candidates if candidate.name == name)
