"""Small ONNX models and plans for tests of the device side: built with the onnx package, never mocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.contract.plan import (
    ChannelPlan,
    EngineKind,
    EnginePlan,
    GuardPlan,
    RuntimePlan,
    ServicePlan,
    TensorPlan,
    ViewPlan,
    WorkerPlan,
)

LENGTH, CHANNELS, CLASSES = 16, 3, 4
WINDOW = TensorPlan("window", "FP32", (-1, LENGTH, CHANNELS))
PROBABILITY = TensorPlan("probability", "FP32", (-1, CLASSES))
VIEW = ViewPlan("channels", "ew_view_channels", CHANNELS)


def window(value: float = 0.0, rows: int = 1, seed: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Moving random windows, (rows, LENGTH, CHANNELS), shifted by `value`."""
    noise = np.random.default_rng(seed).normal(size=(rows, LENGTH, CHANNELS))
    return (noise + value).astype(np.float32)


def expected_probability(x: np.ndarray[Any, Any], scale: float = 1.0) -> np.ndarray[Any, Any]:
    """What `classifier` answers, in numpy: softmax of scale * channel means times fixed weights."""
    logits = scale * x.astype(np.float64).mean(axis=1) @ _weights().astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def classifier(*, scale: float = 1.0, view: bool = True, trouble: str = "") -> onnx.ModelProto:
    """A graph window (rows, LENGTH, CHANNELS) -> probability (rows, CLASSES) and the view: channel means.

    `trouble` says what happens when the first number of the first row is above 100:
    "raise" (a Reshape that cannot fit), "nan" (NaN in the output), "slow" (a loop that never ends), "deaf" (one
    kernel that takes most of a minute, and no orders meanwhile).
    """
    nodes = [
        helper.make_node("ReduceMean", ["window"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["raw"]),
        helper.make_node("Mul", ["raw", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["soft"], axis=1),
        helper.make_node("Slice", ["window", "starts", "ends"], ["first"]),
        helper.make_node("Reshape", ["first", "scalar"], ["number"]),
        helper.make_node("Greater", ["number", "hundred"], ["told"]),
    ]
    weights = [
        numpy_helper.from_array(_weights(), "weights"),
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        numpy_helper.from_array(np.array([0, 0, 0], np.int64), "starts"),
        numpy_helper.from_array(np.array([1, 1, 1], np.int64), "ends"),
        numpy_helper.from_array(np.array([], np.int64), "scalar"),
        numpy_helper.from_array(np.array(100, np.float32), "hundred"),
    ]
    nodes += _trouble(trouble)
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows", CLASSES])]
    if view:
        nodes.append(helper.make_node("Identity", ["mean"], [VIEW.output]))
        outputs.append(helper.make_tensor_value_info(VIEW.output, TensorProto.FLOAT, ["rows", CHANNELS]))
    inputs = [helper.make_tensor_value_info("window", TensorProto.FLOAT, ["rows", LENGTH, CHANNELS])]
    return model(nodes, inputs, outputs, weights)


def model(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()
) -> onnx.ModelProto:
    """A checked model of one graph."""
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(proto: onnx.ModelProto, path: Path) -> str:
    """Write a model; returns its sha256."""
    raw = proto.SerializeToString()
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def save_golden(path: Path, *, scale: float = 1.0, wrong: float = 0.0) -> None:
    """Golden inputs of `classifier(scale=scale)`, off by `wrong`."""
    x = window(rows=4)
    expected = expected_probability(x, scale) + wrong
    np.savez(path, in_window=x, out_probability=expected.astype(np.float32), tolerance=np.array(1e-5))


def engine_plan(folder: Path, name: str, *, version: int = 1, wrong: float = 0.0, **options: Any) -> EnginePlan:
    """A classifier on disk with its golden inputs; `options` are those of `classifier`."""
    folder.mkdir(parents=True, exist_ok=True)
    path, golden = folder / f"{name}.onnx", folder / f"{name}.npz"
    digest = save(classifier(**options), path)
    save_golden(golden, scale=options.get("scale", 1.0), wrong=wrong)
    return EnginePlan(
        engine=name, version=version, digest=hashlib.sha256(name.encode()).hexdigest(), kind=EngineKind.ONNX,
        model_path=str(path), model_sha256=digest, golden_path=str(golden), inputs=(WINDOW,), outputs=(PROBABILITY,),
        views=(VIEW,) if options.get("view", True) else (), runtime=RuntimePlan(control_flow=("If", "Loop")),
    )  # fmt: skip


def floor_plan(name: str = "wrist-floor") -> EnginePlan:
    """A floor that says .1 .2 .3 .4."""
    return EnginePlan(
        engine=name, version=1, digest="f" * 64, kind=EngineKind.FLOOR, inputs=(WINDOW,), outputs=(PROBABILITY,),
        floor_outputs={"probability": [0.1, 0.2, 0.3, 0.4]},
    )  # fmt: skip


def guard_plan(**changes: Any) -> GuardPlan:
    """Two accelerometer channels and one gyro, allowed -500..500."""
    channels = (
        ChannelPlan("ax", "accel", -500.0, 500.0, 0.25),
        ChannelPlan("ay", "accel", -500.0, 500.0, -0.25),
        ChannelPlan("gx", "gyro", -500.0, 500.0, 0.5),
    )
    return replace(GuardPlan("window", channels), **changes)


def service_plan(*engines: EnginePlan, **changes: Any) -> ServicePlan:
    """The service `wrist` over these engines; the first is active."""
    plan = ServicePlan(
        service="wrist", engines=engines, active=engines[0].engine, guard=guard_plan(),
        labels=("PEN", "ABD", "FEL", "IR"), label_output="probability", deadline_ms=5000.0,
    )  # fmt: skip
    return replace(plan, **changes)


def worker_plan(*services: ServicePlan, **changes: Any) -> WorkerPlan:
    return replace(WorkerPlan(generation=1, services=services), **changes)


def _weights() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(7).normal(size=(CHANNELS, CLASSES)).astype(np.float32)


def _trouble(kind: str) -> list[onnx.NodeProto]:
    if not kind:
        return [helper.make_node("Identity", ["soft"], ["probability"])]
    calm = helper.make_graph(
        [helper.make_node("Identity", ["soft"], ["calm"])], "calm", [], [_free("calm")]
    )  # fmt: skip
    body = {"raise": _raising, "nan": _not_a_number, "slow": _endless, "deaf": _deaf}[kind]()
    return [helper.make_node("If", ["told"], ["probability"], then_branch=body, else_branch=calm)]


def _free(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _raising() -> onnx.GraphProto:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [7, 1000])
    return helper.make_graph(
        [helper.make_node("Reshape", ["soft", "shape"], ["bad"])], "bad", [], [_free("bad")], [shape]
    )


def _not_a_number() -> onnx.GraphProto:
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    nodes = [
        helper.make_node("Mul", ["soft", "zero"], ["nothing"]),
        helper.make_node("Div", ["nothing", "zero"], ["bad"]),
    ]
    return helper.make_graph(nodes, "bad", [], [_free("bad")], [zero])


def hungry(megabytes: int) -> onnx.ModelProto:
    """A few hundred bytes with the classifier's signature, no view, that fill so much memory at every run."""
    numbers = megabytes * 2**20 // 4
    shape = numpy_helper.from_array(np.array([numbers], np.int64), "shape")
    nodes = [
        helper.make_node("ReduceMean", ["window"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("ReduceSum", ["mean"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "shape"], ["plenty"]),
        helper.make_node("ReduceMax", ["plenty"], ["most"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["raw"]),
        helper.make_node("Add", ["raw", "most"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probability"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("window", TensorProto.FLOAT, ["rows", LENGTH, CHANNELS])]
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows", CLASSES])]
    return model(nodes, inputs, outputs, [shape, numpy_helper.from_array(_weights(), "weights")])


def _deaf() -> onnx.GraphProto:
    """Non-maximum suppression of boxes that do not touch compares all with all, within one kernel."""
    boxes = 150_000
    constants = {
        "end": np.array(2.0 * boxes, np.float32), "two": np.array(2, np.float32), "unit": np.array(1, np.float32),
        "nil": np.array(0, np.float32), "column": np.array([1, boxes, 1], np.int64),
        "row": np.array([1, 1, boxes], np.int64), "all": np.array([boxes], np.int64),
        "half": np.array([0.5], np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Range", ["nil", "end", "two"], ["flat"]),
        helper.make_node("Reshape", ["flat", "column"], ["top"]),
        helper.make_node("Add", ["top", "unit"], ["bottom"]),
        helper.make_node("Expand", ["nil", "column"], ["left"]),
        helper.make_node("Expand", ["unit", "column"], ["right"]),
        helper.make_node("Concat", ["top", "left", "bottom", "right"], ["boxes"], axis=2),
        helper.make_node("ReduceMax", ["soft"], ["score"], keepdims=0),  # so that it cannot be folded while loading
        helper.make_node("Expand", ["score", "row"], ["scores"]),
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "all", "half"], ["kept"]),
        helper.make_node("Cast", ["kept"], ["counts"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["counts"], ["count"], keepdims=0),
        helper.make_node("Add", ["soft", "count"], ["bad"]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_graph(nodes, "bad", [], [_free("bad")], weights)


def _endless() -> onnx.GraphProto:
    step = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Abs", ["state"], ["next"])],
        "step",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            _free("state"),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), _free("next")],
    )
    turns = helper.make_tensor("turns", TensorProto.INT64, [], [2**60])
    begin = helper.make_tensor("begin", TensorProto.BOOL, [], [True])
    loop = helper.make_node("Loop", ["turns", "begin", "soft"], ["bad"], body=step)
    return helper.make_graph([loop], "bad", [], [_free("bad")], [turns, begin])
