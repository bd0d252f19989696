"""From a recipe to artifacts: train, export, judge, measure, gate, choose, package, report.

Every step looks into the cache first; the order of steps and the one result are here, their content elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import clock
from agent.contract.artifact import Budget, Choice
from compressor import assess, evidence, package, select
from compressor.cache import Cache
from compressor.candidate import Candidate, Variant, Verdict
from compressor.evaluate import FaultLine
from compressor.jobs import Job, Report, run_jobs, translated, work
from compressor.recipe import DeviceClassTable, Recipe, open_task
from compressor.task import Role, Task, TaskData

AFTER = {"judge": 6.0, "measure": 12.0, "evidence": 10.0}  # work of the later steps, in the unit of jobs.work


@dataclass(frozen=True, slots=True)
class Shipped:
    """What goes to one device class. `fallbacks`: by artifact name, best first."""

    device: DeviceClassTable
    verdicts: tuple[Verdict, ...]
    active: Candidate
    fallbacks: dict[str, Candidate]
    fallback_verdicts: tuple[Verdict, ...]
    faults: tuple[FaultLine, ...]
    accuracy: dict[str, float]  # by artifact name, stream role
    active_name: str
    watch: evidence.Watch


@dataclass(frozen=True, slots=True)
class Result:
    """Everything a report says about a run."""

    recipe: Recipe
    task: Task
    data: TaskData
    origin: package.Origin
    candidates: tuple[Candidate, ...]
    shipped: tuple[Shipped, ...]
    front: tuple[str, ...]
    timings: assess.Timings
    seconds: dict[str, float]

    @property
    def teacher(self) -> Candidate:
        return next(c for c in self.candidates if c.name == self.recipe.teacher.name)


def total_work(recipe: Recipe) -> float:
    return sum(work(model) for model in recipe.model) + sum(AFTER.values())


def plan(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """(step, what it will do) for a person who wants to know before it runs."""
    names = ", ".join(f"{m.name} ({m.role}, {m.family} {m.width}, {m.epochs} epochs)" for m in recipe.model)
    classes = "; ".join(f"{d.name}: {assess.device_budget(d)}" for d in recipe.device_class)
    return (
        ("train", f"{names}; {recipe.train.processes} at a time, one thread each"),
        ("export", f"ONNX with preprocessing and view inside, as {', '.join(recipe.quantise.precisions)}"),
        ("judge", "accuracy by role, parity torch/ONNX/engine, golden inputs"),
        ("measure", f"CPU time of one row, {recipe.measure.rounds} x {recipe.measure.runs} runs in turns"),
        ("choose", classes),
        ("package", "artifacts with drift reference, golden inputs and card; report"),
    )


def compress(
    recipe: Recipe, recipe_path: Path, out: Path, *, cache: Path, report: Report, replay: Path | None = None
) -> Result:
    """Run everything and write the artifacts below `out`; the reports are the caller's.

    replay: measurements.json of an earlier run, whose figures decide instead of new ones.

    Raises:
        RecipeError, DataError, StageFailed, GateFailed, StorageError
    """
    seconds: dict[str, float] = {}
    timed = _Stopwatch(seconds)
    task, task_sha256 = open_task(recipe, recipe_path)
    with translated("load data", task.name):
        data = task.load(recipe.data)
    with timed("train and export"):
        jobs = [Job(recipe, recipe_path, model, cache) for model in recipe.model]
        made = run_jobs(sorted(jobs, key=lambda job: -work(job.model)), report)
    variants = [variant for model in recipe.model for variant in made[model.name]]
    origin = package.Origin(recipe.sha256, task_sha256, data.sha256, recipe.data, recipe.seed)
    with tempfile.TemporaryDirectory(prefix="edgewarden-") as folder, timed("assess and package"):
        bench = assess.Bench(recipe, task, task_sha256, data, Cache(cache), Path(folder))
        candidates, timings = _assess(bench, variants, report, timed, replay)
        with timed("evidence"), translated("evidence", recipe.name):
            shipped = tuple(_ship(bench, candidates, device) for device in recipe.device_class)
        report("all", "evidence collected", AFTER["evidence"])
        for ship in shipped:
            _package(bench, ship, origin, out / ship.device.name)
    ranked = [c for c in candidates if c.variant.model.role != "fallback"]
    front = select.pareto_front(ranked)
    return Result(recipe, task, data, origin, candidates, shipped, front, timings, seconds)


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


def _assess(
    bench: assess.Bench, variants: Sequence[Variant], report: Report, timed: _Stopwatch, replay: Path | None
) -> tuple[tuple[Candidate, ...], assess.Timings]:
    judged = {}
    with timed("judge"):
        for variant in variants:
            with translated("judge", variant.name):
                judged[variant.name] = assess.judge(bench, variant)
            report(variant.name, "judged on the device's engine", AFTER["judge"] / len(variants))
    with timed("measure"), translated("measure", bench.recipe.name):
        timings = assess.replay(replay, variants) if replay else assess.time_all(bench, variants)
    report("all", "latency taken from an earlier run" if timings.replayed else "latency measured", AFTER["measure"])
    return assess.candidates(bench, variants, judged, timings.latency), timings


def _ship(bench: assess.Bench, candidates: Sequence[Candidate], device: DeviceClassTable) -> Shipped:
    """Choose for one device class, and collect what its card says."""
    rules, service = bench.recipe.select, bench.task.service
    ranked = [c for c in candidates if c.variant.model.role != "fallback"]
    verdicts = select.choose(ranked, device, rules, kind="model")
    active = _named(ranked, select.chosen(verdicts).candidate)
    fallbacks: dict[str, Candidate] = {}
    fallback_verdicts: list[Verdict] = []
    for model in bench.recipe.model:
        if model.role == "fallback":
            own = [c for c in candidates if c.variant.model.name == model.name]
            told = select.choose(own, device, rules, kind="fallback")
            fallback_verdicts += told
            fallbacks[f"{service}-{model.name}"] = _named(own, select.chosen(told).candidate)
    columns = {service: evidence.fault_column(bench, active.variant)}
    columns |= {name: evidence.fault_column(bench, c.variant) for name, c in fallbacks.items()}
    prior = evidence.class_prior(bench.task, bench.data)
    floor = floor_name(bench.task)
    columns[floor] = evidence.floor_column(bench, prior)
    accuracy = {service: active.accuracy[Role.STREAM], **{n: c.accuracy[Role.STREAM] for n, c in fallbacks.items()}}
    table = evidence.table(bench, columns, active=service, clean=accuracy[service])
    accuracy[floor] = columns[floor][0]
    watch = evidence.watch(bench, active.variant, detection_runs=bench.recipe.faults.detection_runs)
    return Shipped(device, verdicts, active, fallbacks, tuple(fallback_verdicts), table, accuracy, service, watch)


def floor_name(task: Task) -> str:
    return f"{task.service}-floor"


def _named(candidates: Sequence[Candidate], name: str) -> Candidate:
    return next(candidate for candidate in candidates if candidate.name == name)


def _package(bench: assess.Bench, ship: Shipped, origin: package.Origin, folder: Path) -> None:
    """Write active, fallbacks and floor of one device class."""
    floor = floor_name(bench.task)
    plain = select.chosen(ship.verdicts).plain_reason
    order = (*ship.fallbacks, floor)
    active = artifact_of(
        bench,
        ship.active.variant,
        ship,
        origin,
        name=ship.active_name,
        fallbacks=order,
        reason=plain,
        watch=ship.watch,
    )
    package.write_artifact(folder / ship.active_name, package.build_artifact(active))
    for verdict, (name, candidate) in zip(
        (v for v in ship.fallback_verdicts if v.chosen), ship.fallbacks.items(), strict=True
    ):
        content = artifact_of(
            bench, candidate.variant, ship, origin, name=name, fallbacks=(floor,), reason=verdict.plain_reason,
            watch=evidence.watch(bench, candidate.variant, detection_runs=0),
        )  # fmt: skip
        package.write_artifact(folder / name, package.build_artifact(content))
    package.write_artifact(folder / floor, package.build_artifact(floor_of(bench, ship, origin)))


def artifact_of(
    bench: assess.Bench, variant: Variant, ship: Shipped, origin: package.Origin, *, name: str,
    fallbacks: tuple[str, ...], reason: str, watch: evidence.Watch,
) -> package.Content:  # fmt: skip
    """What an artifact with a model says."""
    recipe, device = bench.recipe, ship.device
    return package.Content(
        name=name,
        task=bench.task,
        package=recipe.package,
        origin=origin,
        budget=_budget(device, recipe),
        fallbacks=fallbacks,
        card=_card(bench, ship, origin, watch),
        choice=Choice(variant=variant.name, device_class=device.name, reason=reason),
        precision=variant.precision,
        reads=variant.model.channels,
        model=variant.onnx,
        reference=watch.reference,
        golden=evidence.golden(bench, variant),
        scales=variant.scales,
        calibrator=recipe.quantise.calibrator,
    )


def floor_of(bench: assess.Bench, ship: Shipped, origin: package.Origin) -> package.Content:
    """The constant answer: each label's share of the training rows."""
    return package.Content(
        name=floor_name(bench.task),
        task=bench.task,
        package=bench.recipe.package,
        origin=origin,
        budget=_budget(ship.device, bench.recipe),
        fallbacks=(),
        card=_card(bench, ship, origin, None),
        choice=Choice(
            variant="class-prior", device_class=ship.device.name, reason="the answer when no model can give one"
        ),
        precision="constant",
        prior=evidence.class_prior(bench.task, bench.data),
    )


def _budget(device: DeviceClassTable, recipe: Recipe) -> Budget:
    return Budget(
        device_class=device.name,
        latency_p95_us=device.latency_p95_us,
        size_bytes=device.size_bytes,
        accuracy_drop=recipe.gates.accuracy_drop,
    )


def _card(
    bench: assess.Bench, ship: Shipped, origin: package.Origin, watch: evidence.Watch | None
) -> dict[str, object]:
    return package.make_card(
        accuracy=ship.accuracy,
        role=Role.STREAM,
        rows=len(bench.data.role(Role.STREAM)),
        faults=ship.faults,
        origin=origin,
        package=bench.recipe.package,
        device_class=ship.device.name,
        claim=watch.claim if watch else None,
        detectability=watch.detectability if watch else (),
    )
