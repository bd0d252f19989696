"""Turns variants into candidates: accuracy by role, parity, golden inputs and latency, all on the device's engine.

Results are kept by content. Latency belongs to a machine, so the machine is part of its key: a rebuild on the
same machine replays the figures its choice rested on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.artifact import sha256
from agent.engine import OnnxEngine
from compressor.cache import Cache, stage_key
from compressor.candidate import Candidate, Latency, Variant
from compressor.corruptions import Windows
from compressor.enrolment import concatenate
from compressor.errors import StageFailed
from compressor.evaluate import alone_and_together, ask, varied_accuracy
from compressor.files import dump_arrays, load_arrays, write_file
from compressor.gates import Parity, general_gates
from compressor.measure import Timing, interleaved, machine
from compressor.recipe import DeviceClassTable, Recipe
from compressor.stages.naming import PROBABILITY, VIEW_OUTPUT
from compressor.task import Role, Rows, Task, TaskData

SOURCES = ("assess.py", "evaluate.py", "gates.py", "corruptions.py", "task.py")
INTERPRETED_ROWS = 8
JUDGED_ROLES = (Role.SELECT, Role.CALIBRATE, Role.STREAM)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every assessment needs: the task with its data, where engines load from, and the cache.

    newcomers: enrolment rows are judged too, and count in the ranking; in a first run they are out of reach.
    """

    recipe: Recipe
    task: Task
    task_sha256: str
    data: TaskData
    cache: Cache
    folder: Path  # temporary: an engine loads from a file
    newcomers: bool = False

    @property
    def judged_roles(self) -> tuple[Role, ...]:
        return (*JUDGED_ROLES, Role.ENROL_REFERENCE) if self.newcomers else JUDGED_ROLES

    def ranking_rows(self) -> Rows:
        select = self.data.role(Role.SELECT)
        return concatenate([select, self.data.role(Role.ENROL_REFERENCE)]) if self.newcomers else select

    def engine(self, variant: Variant) -> OnnxEngine:
        return self._load(variant.name, variant.onnx)

    def engine_without_view(self, variant: Variant) -> OnnxEngine:
        return self._load(f"{variant.name}.bare", without_view(variant.onnx))

    def _load(self, name: str, model: bytes) -> OnnxEngine:
        path = self.folder / f"{sha256(model)}.onnx"
        if not path.exists():
            write_file(path, model)
        engine = OnnxEngine.load(path, name=name)
        engine.warm()
        return engine

    def key(self, stage: str, variant: Variant, **more: object) -> str:
        inputs = {
            "model": variant.sha256, "task": self.task_sha256, "data": self.data.sha256,
            "settings": self.recipe.data, **more,
        }  # fmt: skip
        return stage_key(stage, inputs, sources=SOURCES)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one variant answers; nothing of it depends on the machine's speed."""

    accuracy: dict[str, float]
    parity: Parity
    golden_error: float
    predicted: NDArray[np.int64]  # (stream rows,)


def without_view(model: bytes) -> bytes:
    """The same model without the monitor's view and the nodes that only it needs."""
    import onnx

    proto = onnx.load_from_string(model)
    graph = proto.graph
    outputs = [output for output in graph.output if output.name != VIEW_OUTPUT]
    needed = {output.name for output in outputs}
    nodes = []
    for node in reversed(graph.node):  # nodes stand in order: a node's users come after it
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, kept in ((graph.node, nodes[::-1]), (graph.output, outputs), (graph.initializer, initializers)):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def golden_rows(data: TaskData, count: int) -> Windows:
    """A few calibrate rows, every label among them as far as `count` allows; none of a newcomer's.

    Golden inputs travel to every device: what one person uploaded must not.
    """
    rows = data.role(Role.CALIBRATE)
    if Role.ENROL_REFERENCE in data.rows:
        rows = rows.where(~np.isin(rows.sources, data.role(Role.ENROL_REFERENCE).sources))
    first = [int(np.flatnonzero(rows.labels == label)[0]) for label in np.unique(rows.labels)]
    others = [index for index in np.linspace(0, len(rows) - 1, 2 * count).astype(int).tolist() if index not in first]
    return rows.windows[(first + others)[:count]]


def judge(bench: Bench, variant: Variant) -> Judgement:
    """Accuracies, parity and golden error of one variant, from the cache where known."""
    key = bench.key("judge", variant, golden_rows=bench.recipe.package.golden_rows)
    if kept := bench.cache.get(key):
        facts: dict[str, Any] = json.loads(kept["facts.json"])
        predicted = load_arrays(kept["stream.npz"], where="kept answers")["predicted"]
        parity = Parity(facts["agreement"], facts["error"])
        accuracy: dict[str, float] = facts["accuracy"]
        return Judgement(accuracy, parity, float(facts["golden_error"]), predicted.astype(np.int64))
    judged = _judge(bench, variant)
    told = {"accuracy": judged.accuracy, **asdict(judged.parity), "golden_error": judged.golden_error}
    files = {"facts.json": json.dumps(told).encode(), "stream.npz": dump_arrays({"predicted": judged.predicted})}
    bench.cache.put(key, files)
    return judged


def _judge(bench: Bench, variant: Variant) -> Judgement:
    engine, name = bench.engine(variant), bench.task.input_name
    answers = {role: ask(engine, name, bench.data.role(role).windows) for role in bench.judged_roles}
    accuracy = {role.value: found.accuracy(bench.data.role(role).labels) for role, found in answers.items()}
    variations = [fault for fault in bench.task.faults if fault.expected == "harmless"]
    accuracy["varied"] = varied_accuracy(engine, name, bench.ranking_rows(), variations)
    told = answers[Role.CALIBRATE].probability
    parity = Parity.between(told[: len(variant.torch_probability)], variant.torch_probability)
    few = bench.data.role(Role.CALIBRATE).windows[:INTERPRETED_ROWS]
    parity = parity.worse(Parity.between(told[:INTERPRETED_ROWS], interpret(variant.onnx, name, few)))
    golden = golden_rows(bench.data, bench.recipe.package.golden_rows)
    return Judgement(accuracy, parity, alone_and_together(engine, name, golden), answers[Role.STREAM].predicted)


def interpret(model: bytes, input_name: str, windows: Windows) -> NDArray[np.float32]:
    """Probabilities as the ONNX standard's own interpreter computes them: a second opinion on the file."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_from_string(model))
    probability: Any = evaluator.run([PROBABILITY], {input_name: windows})
    return np.asarray(probability[0], np.float32)


@dataclass(frozen=True, slots=True)
class Timings:
    """Latency of every variant, by name; `machine` is the one they were measured on."""

    latency: dict[str, Latency]
    machine: dict[str, str | int]
    replayed: bool  # an earlier run's figures


def replay(path: Path, variants: Sequence[Variant]) -> Timings:
    """The figures of an earlier run's measurements.json: so that a rebuild never measures, and chooses alike.

    Raises:
        StageFailed: unreadable, or measured on other models than these.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        models, fields = document["models"], Latency.__dataclass_fields__
        digests = {name: figures["sha256"] for name, figures in models.items()}
        latency = {name: Latency(**{f: float(figures[f]) for f in fields}) for name, figures in models.items()}
        measured_on = dict(document["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageFailed("replay", str(path), f"no measurements of an earlier run: {error}") from None
    for variant in variants:
        if digests.get(variant.name) != variant.sha256:
            raise StageFailed(
                "replay", str(path), f"it does not hold the figures of this '{variant.name}'",
                hint="Replay only what was built from the same recipe, data and libraries, or leave --replay out.",
            )  # fmt: skip
    return Timings({variant.name: latency[variant.name] for variant in variants}, measured_on, replayed=True)


def time_all(bench: Bench, variants: Sequence[Variant]) -> Timings:
    """Latency of every variant measured in turns, or from the cache."""
    settings = bench.recipe.measure
    inputs = {
        "models": {variant.name: variant.sha256 for variant in variants},
        "settings": settings.model_dump(), "machine": machine(),
    }  # fmt: skip
    key = stage_key("measure", inputs, sources=("measure.py", "assess.py"))
    if kept := bench.cache.get(key):
        figures: dict[str, dict[str, float]] = json.loads(kept["latency.json"])
        return Timings({name: Latency(**one) for name, one in figures.items()}, machine(), replayed=True)
    row = bench.data.role(Role.CALIBRATE).windows[:1]
    calls: dict[str, Callable[[], object]] = {}
    for variant in variants:
        calls[variant.name] = _call(bench.engine(variant), bench.task.input_name, row)
        calls[f"{variant.name}.bare"] = _call(bench.engine_without_view(variant), bench.task.input_name, row)
    timings = interleaved(calls, rounds=settings.rounds, runs=settings.runs)
    latency = {v.name: _latency(timings[v.name], timings[f"{v.name}.bare"]) for v in variants}
    bench.cache.put(key, {"latency.json": json.dumps({k: asdict(v) for k, v in latency.items()}).encode()})
    return Timings(latency, machine(), replayed=False)


def _call(engine: OnnxEngine, input_name: str, row: Windows) -> Callable[[], object]:
    feeds = {input_name: row}
    return lambda: engine.run(feeds)


def _latency(full: Timing, bare: Timing) -> Latency:
    return Latency(
        cpu_p20_us=round(full.cpu_p20_us, 2),
        wall_p50_us=round(full.wall_p50_us, 2),
        wall_p95_us=round(full.wall_p95_us, 2),
        view_us=round(full.cpu_p20_us - bare.cpu_p20_us, 2),
    )


def candidates(
    bench: Bench, variants: Sequence[Variant], judged: dict[str, Judgement], latency: dict[str, Latency]
) -> tuple[Candidate, ...]:
    """Candidates with the gates every device class asks for."""
    teacher = judged[bench.recipe.teacher.name]
    return tuple(_candidate(bench, v, judged[v.name], teacher, latency[v.name]) for v in variants)


def _candidate(bench: Bench, variant: Variant, judged: Judgement, teacher: Judgement, latency: Latency) -> Candidate:
    fallback = variant.model.role == "fallback"
    limits = bench.recipe.gates
    gates = general_gates(
        limits,
        accuracy=judged.accuracy[Role.SELECT],
        reference_accuracy=teacher.accuracy[Role.SELECT],
        allowed_drop=limits.fallback_drop if fallback else limits.accuracy_drop,
        parity=judged.parity,
        golden_error=judged.golden_error,
    )
    agreement = float((judged.predicted == teacher.predicted).mean())
    return Candidate(variant, judged.accuracy, agreement, latency, gates)


def device_budget(device: DeviceClassTable) -> str:
    """A device class in one line."""
    return f"{device.latency_us:g} us of CPU, {device.size_bytes:,} bytes, prefers {device.prefer}"
