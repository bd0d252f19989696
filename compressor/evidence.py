"""What travels with a model besides its weights: the fault table, the drift reference with its claim, golden answers.

Accuracies are of the held-out stream, which was in no other role; a drift claim names its rows itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.drift.reference import Reference, dump_reference
from agent.drift.views import CHANNEL_FEATURES
from compressor import battery, calibration
from compressor.assess import Bench, golden_rows
from compressor.cache import stage_key
from compressor.candidate import Variant
from compressor.evaluate import Answers, FaultLine, ask, fault_accuracy, fault_table
from compressor.files import dump_arrays
from compressor.reference import (
    ViewNames,
    ViewRows,
    WitnessRows,
    build_reference,
    channel_view_names,
    guard_statistics,
    measure_detectability,
)
from compressor.stages.naming import PROBABILITY
from compressor.task import Role, Rows, Task, TaskData

REFERENCE, HELD_OUT, CLEAN = Role.CALIBRATE, Role.SELECT, Role.STREAM  # what a view's monitor is made and judged by
DECIMALS = 5  # golden answers are rounded: the last bits of a float differ between processors


@dataclass(frozen=True, slots=True)
class Watch:
    """A drift reference as bytes, and what the card says about it."""

    reference: bytes
    claim: dict[str, Any]
    detectability: tuple[dict[str, Any], ...]
    monitor: dict[str, Any]  # which it is and why (calibration.py), what it finds (battery.py)


def fault_column(bench: Bench, variant: Variant) -> list[float]:
    """Accuracy of one variant under each of the task's faults, in their order."""
    key = bench.key("faults", variant)
    if kept := bench.cache.get(key):
        column: list[float] = json.loads(kept["column.json"])
        return column
    engine, rows = bench.engine(variant), bench.data.role(Role.STREAM)
    column = [fault_accuracy(engine, bench.task.input_name, rows, fault) for fault in bench.task.all_faults()]
    bench.cache.put(key, {"column.json": json.dumps(column).encode()})
    return column


def floor_column(bench: Bench, prior: Sequence[float]) -> list[float]:
    """The floor always names the most frequent class, whatever the input."""
    labels = bench.data.role(Role.STREAM).labels
    return [float((labels == int(np.argmax(prior))).mean())] * len(bench.task.all_faults())


def table(
    bench: Bench, columns: Mapping[str, Sequence[float]], *, active: str, clean: float
) -> tuple[FaultLine, ...]:
    """The fault table of a card."""
    faults, limit = bench.task.all_faults(), bench.recipe.faults.harmful_drop
    return fault_table(faults, columns, active=active, clean=clean, harmful_drop=limit)


def class_prior(task: Task, data: TaskData) -> list[float]:
    """Share of each label among training rows."""
    counts = np.bincount(data.role(Role.TRAIN).labels, minlength=len(task.labels))
    return [round(float(share), 6) for share in counts / counts.sum()]


def watch(
    bench: Bench, variant: Variant, *, detection_runs: int, witnesses: Mapping[str, Variant] | None = None
) -> Watch:
    """The reference of one variant: made of the calibrate role, its claim measured on the select role.

    Not on the stream: what a claim is held against later must not be what it was measured on. Detectability needs
    more rows and more recordings than select has, and is measured on the stream.

    detection_runs: 0 = no detectability card (a fallback is judged by the active model's). witnesses: by artifact
    name, the variants that may tell whether a drift does harm: those that read other series than this one.
    """
    told = {name: one for name, one in (witnesses or {}).items() if one.model.channels != variant.model.channels}
    sources = (
        "evidence.py", "reference.py", "calibration.py", "stationary.py", "battery.py", "corruptions.py", "task.py",
    )  # fmt: skip
    inputs = {
        "model": variant.sha256, "task": bench.task_sha256, "data": bench.data.sha256,
        "settings": bench.recipe.data, "runs": detection_runs,
        "witnesses": {name: one.sha256 for name, one in told.items()},
    }  # fmt: skip
    key = stage_key("reference", inputs, sources=sources)
    if kept := bench.cache.get(key):
        card = json.loads(kept["card.json"])
        return Watch(kept["reference.npz"], card["claim"], tuple(card["detectability"]), card["monitor"])
    made = _watch(bench, variant, detection_runs, told)
    card = {"claim": made.claim, "detectability": made.detectability, "monitor": made.monitor}
    bench.cache.put(key, {"reference.npz": made.reference, "card.json": json.dumps(card).encode()})
    return made


def _watch(bench: Bench, variant: Variant, detection_runs: int, witnesses: Mapping[str, Variant]) -> Watch:
    engine, task = bench.engine(variant), bench.task
    names = view_names(task)
    calibrate, select, stream = (bench.data.role(out_of_sample(role)) for role in (REFERENCE, HELD_OUT, CLEAN))
    seen, held_out, clean = (
        _view_rows(ask(engine, task.input_name, rows.windows), rows) for rows in (calibrate, select, stream)
    )
    guard = guard_statistics(calibrate.windows, names.channels, names.groups)
    said = [
        WitnessRows(
            name,
            columns_of(task, one.model.channels),
            ask(bench.engine(one), task.input_name, calibrate.windows).predicted,
        )
        for name, one in witnesses.items()
    ]

    def regimes() -> Reference:
        return build_reference(
            seen, names, guard=guard, held_out=held_out, held_out_name="windows of role select", witnesses=said
        )

    decided = calibration.calibrate(seen, held_out, names, guard=guard, regimes=regimes)
    reference = decided.reference
    lines: tuple[dict[str, Any], ...] = ()
    told = decided.card()
    if detection_runs:
        told |= battery.as_card(battery.measure_battery(reference, clean, runs=detection_runs))
    if detection_runs and decided.kind is not calibration.Kind.WATCHED:
        faulty = {
            fault.name: _view_rows(ask(engine, task.input_name, fault.apply(stream.windows)), stream)
            for fault in task.faults
        }
        touched = {fault.name: fault.channels for fault in task.faults}
        found = measure_detectability(reference, clean, faulty, touched, runs=detection_runs)
        lines = tuple(asdict(line) for line in found)
    return Watch(dump_reference(reference), asdict(reference.claim), lines, told)


def out_of_sample(role: Role) -> Role:
    """The role, if no model was trained on it: outputs and embeddings of rows it learnt look better than they are.

    Raises: ValueError
    """
    if role in (Role.TRAIN, Role.ENROL_TRAIN):
        raise ValueError(f"rows of role {role} made the model and cannot make its reference")
    return role


def columns_of(task: Task, series: Sequence[str]) -> tuple[int, ...]:
    """The features of the view that are made of these series; of all channels without any."""
    each = len(CHANNEL_FEATURES)
    return tuple(each * at + number for at in task.positions(series) for number in range(each))


def view_names(task: Task) -> ViewNames:
    channels = tuple(channel.name for channel in task.channels)
    groups = {channel.name: channel.group for channel in task.channels}
    return channel_view_names(channels, groups, task.labels, tuple(one.name for one in task.combinations))


def _view_rows(answers: Answers, rows: Rows) -> ViewRows:
    return ViewRows(answers.view.astype(np.float64), answers.predicted, rows.recordings)


def golden(bench: Bench, variant: Variant) -> bytes:
    """A few inputs and what the engine answers to them."""
    windows = golden_rows(bench.data, bench.recipe.package.golden_rows)
    answers = ask(bench.engine(variant), bench.task.input_name, windows)
    outputs = {PROBABILITY: answers.probability}
    return golden_bytes(bench.task.input_name, windows, outputs, bench.recipe.gates.golden_error)


def golden_bytes(
    input_name: str, windows: NDArray[np.float32], outputs: Mapping[str, NDArray[np.float32]], tolerance: float
) -> bytes:
    """golden.npz of the contract."""
    arrays: dict[str, NDArray[np.generic]] = {f"in_{input_name}": windows, "tolerance": np.array(tolerance)}
    arrays |= {f"out_{name}": np.round(array, DECIMALS) for name, array in outputs.items()}
    return dump_arrays(arrays)
