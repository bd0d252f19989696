"""A wrist-like set of artifacts for system tests: active, accelerometer-only fallback, floor, and a faulty engine.

The data are synthetic (seven movements of a wrist, distinguishable by gravity and by rotation); the format, the
view inside the graph, golden inputs, drift reference and card are those of real artifacts.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.contract.artifact import (
    FILES,
    MANIFEST,
    Blob,
    Budget,
    Channel,
    Input,
    Manifest,
    Output,
    Runtime,
    View,
    Window,
    canonical,
    sha256,
)
from agent.drift import channel_features, dump_reference, feature_names
from compressor.reference import ViewRows, WitnessRows, build_reference, channel_view_names, guard_statistics

CHANNELS = ("ax", "ay", "az", "gx", "gy", "gz")
GROUPS = {name: "accel" if name.startswith("a") else "gyro" for name in CHANNELS}
LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
LENGTH, RATE_HZ, HOP = 128, 50.0, 64
FEATURES = feature_names(CHANNELS)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Recordings:
    """windows: (rows, LENGTH, 6) float32; labels and recordings: (rows,)."""

    windows: Array
    labels: Array
    recordings: Array


def record(*, seed: int, recordings: int = 14, rows: int = 24) -> Recordings:
    """Windows of `recordings` recordings, consecutive within each; recording r shows movement r % 7."""
    generator = np.random.default_rng(seed)
    worlds = np.random.default_rng(1)  # what a movement looks like does not depend on the seed
    gravity = worlds.normal(size=(len(LABELS), 3))
    gravity /= np.linalg.norm(gravity, axis=1, keepdims=True)
    turning = worlds.uniform(0.5, 3.0, size=(len(LABELS), 3))
    time_s = np.arange(LENGTH) / RATE_HZ
    windows, labels, numbers = [], [], []
    for recording in range(recordings):
        label = recording % len(LABELS)
        person = worlds.normal(scale=0.05, size=3)
        for _ in range(rows):
            phase = generator.uniform(0, 2 * np.pi)
            swing = np.sin(2 * np.pi * 0.8 * time_s + phase)[:, None]
            accel = gravity[label] + person + 0.2 * swing + generator.normal(scale=0.05, size=(LENGTH, 3))
            gyro = turning[label] * swing + generator.normal(scale=0.1, size=(LENGTH, 3))
            windows.append(np.concatenate([accel, gyro], axis=1))
            labels.append(label)
            numbers.append(recording)
    return Recordings(np.array(windows, np.float32), np.array(labels), np.array(numbers))


def gyro_off(windows: Array) -> Array:
    """The same windows with a gyro that sends zeros."""
    broken = windows.copy()
    broken[:, :, 3:] = 0.0
    return broken


def gyro_turned(windows: Array) -> Array:
    """The same windows with a gyro whose axes changed places: nothing is dead, stuck or of another unit."""
    broken = windows.copy()
    broken[:, :, 3:] = windows[:, :, [4, 5, 3]]
    return broken


def build_artifacts(folder: Path) -> dict[str, Path]:
    """Write wrist, wrist-accel, wrist-floor and wrist-faulty below `folder`; returns their folders by name."""
    train, held_out = record(seed=2), record(seed=3)
    weights = {
        "wrist": _fit(train, range(24)),
        "wrist-accel": _fit(train, range(12)),
        "wrist-faulty": _fit(train, range(24)),
    }
    card = _card(held_out, weights)
    reference = _reference(train, held_out, weights["wrist"], weights["wrist-accel"])
    made = {}
    for name, fitted in weights.items():
        blobs = {
            "model": _graph(*fitted, faulty=name == "wrist-faulty").SerializeToString(),
            "golden": _golden(held_out, fitted, faulty=name == "wrist-faulty"),
            "reference": reference,
            "card": card,
        }
        reads = ["ax", "ay", "az"] if name == "wrist-accel" else []
        made[name] = _write(folder / name, _manifest(name, kind="onnx", reads=reads), blobs)
    made["wrist-floor"] = _write(folder / "wrist-floor", _manifest("wrist-floor", kind="floor"), {"card": card})
    return made


# --- the models --------------------------------------------------------------------------------------------
def _fit(data: Recordings, features: range) -> tuple[Array, Array]:
    """Ridge regression on the standardised view: (weights (24, 7), bias (7,)); unused features get zero weight."""
    x = channel_features(data.windows)
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
    chosen = np.zeros(len(FEATURES))
    chosen[list(features)] = 1.0
    z = (x - centre) / scale * chosen
    target = 10.0 * np.eye(len(LABELS))[data.labels]
    ridge = np.linalg.solve(z.T @ z + 1.0 * np.eye(z.shape[1]), z.T @ (target - target.mean(axis=0)))
    weights = ridge * (chosen / scale)[:, None]
    return weights.astype(np.float32), (target.mean(axis=0) - (centre @ weights)).astype(np.float32)


def probability(windows: Array, fitted: tuple[Array, Array]) -> Array:
    """What the model answers, in numpy: (rows, 7)."""
    logits = channel_features(windows) @ fitted[0].astype(np.float64) + fitted[1]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _graph(weights: Array, bias: Array, *, faulty: bool) -> onnx.ModelProto:
    nodes = [*_view_nodes(), *_head_nodes(faulty=faulty)]
    numbers = {
        "tiny": np.array(1e-4, np.float32), "two": np.array(2, np.float32),
        "weights": weights, "bias": bias, "hundred": np.array(100, np.float32),
        "nothing": np.array(0, np.float32),
        "a0": np.array([0], np.int64), "a1": np.array([1], np.int64), "a2": np.array([2], np.int64),
        "e1": np.array([LENGTH - 1], np.int64), "e2": np.array([LENGTH - 2], np.int64),
        "eN": np.array([LENGTH], np.int64),
        "middle": np.array([62], np.int64), "after": np.array([64], np.int64), "k": np.array([64], np.int64),
        "flat": np.array([0, 24], np.int64), "zeros3": np.array([0, 0, 0], np.int64),
        "ones3": np.array([1, 1, 1], np.int64), "scalar": np.array([], np.int64),
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    free = "rows"
    graph = helper.make_graph(
        nodes, "wrist",
        [helper.make_tensor_value_info("window", TensorProto.FLOAT, [free, LENGTH, 6])],
        [
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, [free, len(LABELS)]),
            helper.make_tensor_value_info("ew_view_channels", TensorProto.FLOAT, [free, 24]),
        ],
        [numpy_helper.from_array(value, name) for name, value in numbers.items() if name in used],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    return proto


def _view_nodes() -> list[onnx.NodeProto]:
    """mean, log sd, log roughness, log spike of each channel, as `agent.drift.views` defines them."""
    make = helper.make_node
    nodes = [
        make("ReduceMean", ["window"], ["mean3"], axes=[1], keepdims=1),
        make("Sub", ["window", "mean3"], ["centred"]),
        make("Mul", ["centred", "centred"], ["squared"]),
        make("ReduceMean", ["squared"], ["variance"], axes=[1], keepdims=1),
        make("Sqrt", ["variance"], ["sd"]),
        make("Slice", ["window", "a0", "e2", "a1"], ["before"]),
        make("Slice", ["window", "a1", "e1", "a1"], ["here"]),
        make("Slice", ["window", "a2", "eN", "a1"], ["next"]),
        # roughness: the median of 126 second differences is the mean of the 63rd and 64th largest
        make("Add", ["before", "next"], ["around"]),
        make("Mul", ["here", "two"], ["twice"]),
        make("Sub", ["around", "twice"], ["bend"]),
        make("Abs", ["bend"], ["bent"]),
        make("TopK", ["bent", "k"], ["largest", "where"], axis=1),
        make("Slice", ["largest", "middle", "after", "a1"], ["middles"]),
        make("ReduceMean", ["middles"], ["rough"], axes=[1], keepdims=1),
        # spike: the largest distance from the median of three neighbours
        make("Min", ["before", "here"], ["low"]),
        make("Max", ["before", "here"], ["high"]),
        make("Min", ["high", "next"], ["capped"]),
        make("Max", ["low", "capped"], ["median"]),
        make("Sub", ["here", "median"], ["off"]),
        make("Abs", ["off"], ["apart"]),
        make("ReduceMax", ["apart"], ["spike"], axes=[1], keepdims=1),
    ]
    for name in ("sd", "rough", "spike"):
        nodes += [make("Add", [name, "tiny"], [f"{name}_t"]), make("Log", [f"{name}_t"], [f"{name}_log"])]
    parts = [("mean3", "m"), ("sd_log", "s"), ("rough_log", "r"), ("spike_log", "p")]
    nodes += [make("Transpose", [source], [target], perm=[0, 2, 1]) for source, target in parts]
    return [
        *nodes,
        make("Concat", [target for _, target in parts], ["by_channel"], axis=2),
        make("Reshape", ["by_channel", "flat"], ["ew_view_channels"]),
    ]


def _head_nodes(*, faulty: bool) -> list[onnx.NodeProto]:
    make = helper.make_node
    nodes = [
        make("MatMul", ["ew_view_channels", "weights"], ["raw"]),
        make("Add", ["raw", "bias"], ["logits"]),
        make("Softmax", ["logits"], ["soft"], axis=1),
    ]
    if not faulty:
        return [*nodes, make("Identity", ["soft"], ["probability"])]
    free = helper.make_tensor_value_info
    fails = helper.make_graph(
        [make("Reshape", ["soft", "shape"], ["bad"])], "fails", [], [free("bad", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [7, 1000])],
    )  # fmt: skip
    works = helper.make_graph(
        [make("Identity", ["soft"], ["good"])], "works", [], [free("good", TensorProto.FLOAT, None)]
    )
    return [
        *nodes,
        make("Slice", ["window", "zeros3", "ones3"], ["first"]),
        make("Reshape", ["first", "scalar"], ["number"]),
        make("Greater", ["number", "hundred"], ["is_golden"]),
        make("Equal", ["number", "nothing"], ["is_warming"]),
        make("Or", ["is_golden", "is_warming"], ["is_harmless"]),
        make("If", ["is_harmless"], ["probability"], then_branch=works, else_branch=fails),
    ]


# --- what surrounds them -----------------------------------------------------------------------------------
def _golden(data: Recordings, fitted: tuple[Array, Array], *, faulty: bool) -> bytes:
    windows = data.windows[:: len(data.windows) // 8][:8].copy()
    if faulty:
        windows[:, 0, 0] = 200.0  # golden inputs it can answer
    file = io.BytesIO()
    np.savez(
        file,
        in_window=windows,
        out_probability=probability(windows, fitted).astype(np.float32),
        tolerance=np.array(1e-3),
    )
    return file.getvalue()


def _reference(
    train: Recordings, held_out: Recordings, fitted: tuple[Array, Array], of_accel: tuple[Array, Array]
) -> bytes:
    def rows(data: Recordings) -> ViewRows:
        predicted = probability(data.windows, fitted).argmax(axis=1)
        return ViewRows(channel_features(data.windows).astype(np.float64), predicted, data.recordings)

    names = channel_view_names(CHANNELS, GROUPS, LABELS)
    guard = guard_statistics(train.windows, CHANNELS, GROUPS)
    witness = WitnessRows("wrist-accel", tuple(range(12)), probability(train.windows, of_accel).argmax(axis=1))
    return dump_reference(
        build_reference(rows(train), names, guard=guard, held_out=rows(held_out), witnesses=[witness])
    )


def _card(data: Recordings, weights: dict[str, tuple[Array, Array]]) -> bytes:
    def accuracies(windows: Array) -> dict[str, float]:
        hits = {
            name: (probability(windows, fitted).argmax(1) == data.labels).mean() for name, fitted in weights.items()
        }
        return {**{name: round(float(hit), 4) for name, hit in hits.items()}, "wrist-floor": round(1 / 7, 4)}

    gyro = ["gx", "gy", "gz"]
    rows = [{"name": "dead:gyro", "kind": "dead", "channels": gyro, "accuracy": accuracies(gyro_off(data.windows))}]
    return canonical({"accuracy": {"role": "synthetic held-out", **accuracies(data.windows)}, "faults": rows})


def _manifest(name: str, *, kind: str, reads: list[str] | None = None) -> dict[str, Any]:
    view = View(name="channels", kind="channels", output="ew_view_channels", features=list(FEATURES))
    limits = {"accel": (-16.0, 16.0), "gyro": (-35.0, 35.0)}
    channels = [
        Channel(name=one, unit="g" if GROUPS[one] == "accel" else "rad/s", group=GROUPS[one],
                minimum=limits[GROUPS[one]][0], maximum=limits[GROUPS[one]][1])
        for one in CHANNELS
    ]  # fmt: skip
    return {
        "name": name, "version": 1, "service": "wrist", "task": "seven synthetic movements", "kind": kind,
        "inputs": [Input(name="window", datatype="FP32", shape=[-1, LENGTH, 6], channels=channels)],
        "outputs": [Output(name="probability", datatype="FP32", shape=[-1, len(LABELS)])],
        "labels": list(LABELS), "label_output": "probability", "reads": reads or [],
        "window": Window(length=LENGTH, hop=HOP, rate_hz=RATE_HZ),
        "budgets": [Budget(device_class="test", latency_p95_us=1e6)],
        "views": [view] if kind == "onnx" else [],
        "floor_outputs": {"probability": [1 / 7] * 7} if kind == "floor" else None,
        "runtime": Runtime(
            opset=17, minimum="1.20", precision="float32" if kind == "onnx" else "constant",
            control_flow=["If"] if name == "wrist-faulty" else [],
        ),
    }  # fmt: skip


def _write(folder: Path, fields: dict[str, Any], blobs: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for role, data in blobs.items():
        (folder / FILES[role]).write_bytes(data)
        described[role] = Blob(file=FILES[role], size=len(data), sha256=sha256(data))
    (folder / MANIFEST).write_bytes(Manifest(**fields, blobs=described).encode())
    return folder


def load_card(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / FILES["card"]).read_bytes())
    return document
