"""The models of the bench, as real artifacts: MLP 32-64-10, conv 28x28, a MobileNetV2-like 96x96.

Weights are random: what is measured is speed. The MLP shows its hidden layer as a view and has a reference, so that
guard, ring and drift monitor have their full work.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from agent.contract.artifact import (
    FILES,
    MANIFEST,
    Blob,
    Budget,
    Input,
    Manifest,
    Output,
    Runtime,
    View,
    canonical,
    sha256,
)
from agent.drift import dump_reference
from agent.engine import OnnxEngine
from compressor.reference import ViewNames, ViewRows, build_reference, guard_statistics

OPSET, IR_VERSION, SEED = 17, 8, 20261124
OUTPUT, VIEW = "probability", "ew_view_hidden"
HIDDEN, CLASSES = 64, 10
GOLDEN_ROWS = 4
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Model:
    """`shape`: of one input row. `artifacts`: folders, best first, the last is the floor."""

    name: str
    input: str
    shape: tuple[int, ...]
    artifacts: tuple[Path, ...]

    @property
    def onnx(self) -> Path:
        return self.artifacts[0] / FILES["model"]

    def row(self) -> Array:
        """One input, always the same: (1, *shape) float32."""
        return np.random.default_rng(SEED).normal(size=(1, *self.shape)).astype(np.float32)


def build(folder: Path, name: str) -> Model:
    """Write the artifacts of `mlp`, `conv` or `mobilenet` below `folder`: active, fallback and floor."""
    graph, shape = {"mlp": (_mlp, (32,)), "conv": (_conv, (1, 28, 28)), "mobilenet": (_mobilenet, (3, 96, 96))}[name]
    artifacts = []
    for number, artifact in enumerate((name, f"{name}-second")):
        view = name == "mlp"
        proto = graph(np.random.default_rng(SEED + number), view=view)
        onnx.checker.check_model(proto)
        artifacts.append(_write(folder, artifact, name, shape, proto.SerializeToString(), view=view))
    artifacts.append(_write(folder, f"{name}-floor", name, shape, None, view=False))
    return Model(name, "x", shape, tuple(artifacts))


# --- graphs -------------------------------------------------------------------------------------------------
class _Graph:
    """Nodes and weights as they come."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._generator = generator

    def weight(self, *shape: int) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        name = f"w{len(self.weights)}"
        values = self._generator.normal(scale=(2.0 / fan_in) ** 0.5, size=shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def conv(self, x: str, given: int, wanted: int, kernel: int, *, stride: int = 1, group: int = 1) -> str:
        pad = kernel // 2
        return self.add(
            "Conv", x, self.weight(wanted, given // group, kernel, kernel), self._bias(wanted),
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=[pad] * 4, group=group,
        )  # fmt: skip

    def _bias(self, size: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.zeros(size, np.float32), name))
        return name

    def relu6(self, x: str) -> str:
        if not any(weight.name == "zero" for weight in self.weights):
            self.weights += [
                numpy_helper.from_array(np.array(0, np.float32), "zero"),
                numpy_helper.from_array(np.array(6, np.float32), "six"),
            ]
        return self.add("Clip", x, "zero", "six")

    def dense(self, x: str, given: int, wanted: int, output: str = "") -> str:
        return self.add("Gemm", x, self.weight(wanted, given), self._bias(wanted), output=output, transB=1)

    def finish(self, x: str, shape: tuple[int, ...], *, view: bool) -> onnx.ModelProto:
        self.add("Softmax", x, output=OUTPUT, axis=1)
        info = helper.make_tensor_value_info
        outputs = [info(OUTPUT, TensorProto.FLOAT, ["rows", CLASSES])]
        outputs += [info(VIEW, TensorProto.FLOAT, ["rows", HIDDEN])] if view else []
        graph = helper.make_graph(
            self.nodes, "bench", [info("x", TensorProto.FLOAT, ["rows", *shape])], outputs, self.weights
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _mlp(generator: np.random.Generator, *, view: bool) -> onnx.ModelProto:
    graph = _Graph(generator)
    hidden = graph.add("Relu", graph.dense("x", 32, HIDDEN), output=VIEW)
    return graph.finish(graph.dense(hidden, HIDDEN, CLASSES), (32,), view=view)


def _conv(generator: np.random.Generator, *, view: bool) -> onnx.ModelProto:
    """About 20,000 parameters."""
    graph = _Graph(generator)
    x = graph.add("Relu", graph.conv("x", 1, 16, 3, stride=2))
    x = graph.add("Relu", graph.conv(x, 16, 32, 3, stride=2))
    x = graph.add("Relu", graph.conv(x, 32, 48, 3, stride=2))
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    return graph.finish(graph.dense(x, 48, CLASSES), (1, 28, 28), view=view)


def _mobilenet(generator: np.random.Generator, *, view: bool) -> onnx.ModelProto:
    """MobileNetV2 of width 1.0 for 96x96 with 10 classes: 2.2 million parameters."""
    graph = _Graph(generator)
    x, width = graph.relu6(graph.conv("x", 3, 32, 3, stride=2)), 32
    for expansion, channels, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(repeats):
            step = stride if number == 0 else 1
            inner = width * expansion
            y = graph.relu6(graph.conv(x, width, inner, 1)) if expansion > 1 else x
            y = graph.relu6(graph.conv(y, inner, inner, 3, stride=step, group=inner))
            y = graph.conv(y, inner, channels, 1)
            x = graph.add("Add", x, y) if step == 1 and width == channels else y
            width = channels
    x = graph.relu6(graph.conv(x, width, 1280, 1))
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    return graph.finish(graph.dense(x, 1280, CLASSES), (3, 96, 96), view=view)


# --- artifacts ----------------------------------------------------------------------------------------------
def _write(folder: Path, name: str, service: str, shape: tuple[int, ...], model: bytes | None, *, view: bool) -> Path:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    features = [f"hidden-{number}" for number in range(HIDDEN)] if view else []
    blobs: dict[str, bytes] = {}
    if model is not None:
        (place / FILES["model"]).write_bytes(model)
        blobs["model"] = model
        blobs["golden"] = _golden(place / FILES["model"], shape)
    if view:
        blobs["reference"] = _reference(place / FILES["model"], shape, tuple(features))
    blobs["card"] = canonical({"accuracy": {}, "faults": []})
    for role, data in blobs.items():
        (place / FILES[role]).write_bytes(data)
    manifest = Manifest(
        name=name,
        version=1,
        service=service,
        task="serving bench, random weights",
        kind="onnx" if model is not None else "floor",
        inputs=[Input(name="x", datatype="FP32", shape=[-1, *shape])],
        outputs=[Output(name=OUTPUT, datatype="FP32", shape=[-1, CLASSES])],
        labels=[f"class-{number}" for number in range(CLASSES)],
        label_output=OUTPUT,
        budgets=[Budget(device_class="bench")],
        views=[View(name="hidden", kind="hidden", output=VIEW, features=features)] if view else [],
        floor_outputs=None if model is not None else {OUTPUT: [1.0 / CLASSES] * CLASSES},
        runtime=Runtime(opset=OPSET, minimum="1.20", precision="float32" if model is not None else "constant"),
        blobs={role: Blob(file=FILES[role], size=len(data), sha256=sha256(data)) for role, data in blobs.items()},
    )
    (place / MANIFEST).write_bytes(manifest.encode())
    return place


def _golden(model: Path, shape: tuple[int, ...]) -> bytes:
    rows = np.random.default_rng(SEED + 7).normal(size=(GOLDEN_ROWS, *shape)).astype(np.float32)
    engine = OnnxEngine.load(model)
    answers = np.concatenate([engine.run({"x": row[None]})[OUTPUT] for row in rows])
    file = io.BytesIO()
    np.savez(file, **{"in_x": rows, f"out_{OUTPUT}": answers, "tolerance": np.array(1e-4)})
    return file.getvalue()


def _reference(model: Path, shape: tuple[int, ...], features: tuple[str, ...]) -> bytes:
    """Of random inputs in four recordings: rows enough for the monitor's statistics."""
    engine = OnnxEngine.load(model)

    def rows(seed: int, count: int) -> ViewRows:
        x = np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)
        answer = engine.run({"x": x})
        predicted = answer[OUTPUT].argmax(axis=1)
        return ViewRows(answer[VIEW].astype(np.float64), predicted, np.arange(count) * 4 // count)

    count = 6 * len(features)
    names = ViewNames(
        features, ("hidden",), (0,) * len(features), {"hidden": "hidden"}, tuple(f"class-{n}" for n in range(CLASSES))
    )
    windows = np.random.default_rng(SEED).normal(size=(count, 8, 1))
    guard = guard_statistics(windows, ("hidden",), {"hidden": "hidden"})
    return dump_reference(build_reference(rows(1, count), names, guard=guard, held_out=rows(2, count)))
