"""Artifacts in the contract's format: the same inputs give the same bytes of every blob and of the manifest.

Nothing measured in time enters an artifact; measurements travel beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agent.contract.artifact import (
    FILES,
    MANIFEST,
    Blob,
    Budget,
    Choice,
    Input,
    Manifest,
    Output,
    Runtime,
    View,
    canonical,
    sha256,
)
from agent.engine import control_flow_of
from compressor.evaluate import FaultLine
from compressor.evidence import view_names
from compressor.files import storage_error, write_file
from compressor.recipe import PackageTable
from compressor.stages.naming import OPSET, PROBABILITY, VIEW_OUTPUT
from compressor.task import Task

VIEW_NAME = "channels"
LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an artifact comes from: digests that a rebuild starts with."""

    recipe_sha256: str
    task_sha256: str
    data_sha256: str
    settings: Mapping[str, object]
    seed: int
    enrolment: Mapping[str, object] | None = None  # newcomers' recordings it was taught besides


@dataclass(frozen=True, slots=True)
class Content:
    """Everything one artifact says. `model` is None for a floor, which answers `prior`."""

    name: str
    task: Task
    package: PackageTable
    origin: Origin
    budget: Budget
    fallbacks: tuple[str, ...]
    card: Mapping[str, Any]
    choice: Choice
    precision: str  # float32 | int8 | constant
    reads: tuple[str, ...] = ()
    model: bytes | None = None
    reference: bytes | None = None
    golden: bytes | None = None
    prior: Sequence[float] = ()
    scales: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    calibrator: str = ""
    parent: str | None = None  # manifest digest of the artifact it succeeds


def build_artifact(content: Content) -> dict[str, bytes]:
    """File name -> bytes of one artifact folder."""
    blobs = {
        "model": content.model,
        "reference": content.reference,
        "golden": content.golden,
        "card": canonical(content.card),
    }
    files = {FILES[role]: data for role, data in blobs.items() if data is not None}
    manifest = _manifest(content, {role: data for role, data in blobs.items() if data is not None})
    return {MANIFEST: manifest.encode(), **files}


def _manifest(content: Content, blobs: Mapping[str, bytes]) -> Manifest:
    task, floor = content.task, content.model is None
    width = len(view_names(task).features)
    outputs = [
        Output(name=PROBABILITY, datatype="FP32", shape=[-1, len(task.labels)], meaning="probability of each label")
    ]
    return Manifest(
        name=content.name,
        version=content.package.version,
        service=task.service,
        task=task.name,
        kind="floor" if floor else "onnx",
        inputs=[task_input(task)],
        outputs=outputs,
        labels=list(task.labels),
        label_output=PROBABILITY,
        reads=list(content.reads),
        window=task.window,
        budgets=[content.budget],
        fallbacks=list(content.fallbacks),
        views=[] if floor else [graph_view(task, width)],
        floor_outputs={PROBABILITY: list(content.prior)} if floor else None,
        runtime=Runtime(
            opset=OPSET,
            minimum=version("onnxruntime"),
            precision=content.precision,
            control_flow=[] if content.model is None else control_flow_of(content.model),
        ),
        choice=content.choice,
        parent=content.parent,
        quantisation=_quantisation(content),
        provenance=_provenance(content),
        blobs={role: Blob(file=FILES[role], size=len(data), sha256=sha256(data)) for role, data in blobs.items()},
    )


def task_input(task: Task) -> Input:
    return Input(
        name=task.input_name,
        datatype="FP32",
        shape=[-1, task.window.length, len(task.channels)],
        meaning=task.input_meaning,
        channels=list(task.channels),
        missing="refuse",
        out_of_range="pass",
    )


def graph_view(task: Task, width: int) -> View:
    features = list(view_names(task).features)
    if len(features) != width:
        raise ValueError(f"the view has {width} numbers but {len(features)} names")
    return View(name=VIEW_NAME, kind="channels", source="graph", output=VIEW_OUTPUT, features=features)


def _quantisation(content: Content) -> dict[str, Any]:
    if not content.scales:
        return {}
    return {
        "scheme": "uint8 asymmetric activations per tensor, int8 symmetric weights per channel",
        "calibrator": content.calibrator,
        "calibrated_on": "calibrate",
        "activations": {name: [scale, zero] for name, (scale, zero) in content.scales.items()},
        "float": ["preprocessing", "view", "last linear layer", "softmax"],
    }


def _provenance(content: Content) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(content.origin).items() if name != "settings" and value is not None},
        "settings": dict(content.origin.settings),
        "libraries": {name: version(name) for name in LIBRARIES},
        "training_threads": 1,
        "owner": content.package.owner,
        "licence": content.package.licence,
    }


def make_card(
    *,
    accuracy: Mapping[str, float],
    role: str,
    rows: int,
    faults: Sequence[FaultLine],
    origin: Origin,
    package: PackageTable,
    device_class: str,
    claim: Mapping[str, Any] | None = None,
    detectability: Sequence[Mapping[str, Any]] = (),
    monitor: Mapping[str, Any] | None = None,
    gates: Sequence[Mapping[str, Any]] = (),
    accuracy_new: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """card.json: figures of `role`, per engine name; see docs of the contract. `accuracy_new`: of newcomers."""
    return {
        **({"accuracy_new": dict(accuracy_new)} if accuracy_new else {}),
        "accuracy": {"role": role, "rows": rows, **{name: round(value, 4) for name, value in accuracy.items()}},
        "faults": [
            {
                "name": line.name,
                "kind": line.kind,
                "channels": list(line.channels),
                "expected": line.expected,
                "harmful": line.harmful,
                "accuracy": dict(line.accuracy),
            }
            for line in faults
        ],
        "claim": dict(claim or {}),
        "monitor": dict(monitor or {}),
        "detectability": [dict(line) for line in detectability],
        "gates": [dict(gate) for gate in gates],
        "recipe_sha256": origin.recipe_sha256,
        "data_sha256": origin.data_sha256,
        "seeds": [origin.seed],
        "device_class": device_class,
        "licence": package.licence,
        "owner": package.owner,
    }


def write_artifact(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an artifact folder whole: beside its place first, then moved there; what stood there is replaced.

    Raises:
        DiskFull, StorageError
    """
    temporary = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in sorted(files.items()):
            write_file(temporary / name, data)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only when something failed
