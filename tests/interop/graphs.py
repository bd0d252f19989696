"""Graphs of every datatype and shape the protocol knows, as services."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from agent.contract.plan import EngineKind, EnginePlan, ServicePlan, TensorPlan
from tests.models import model, save

KINDS = {
    "BOOL": TensorProto.BOOL, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
ODD = 'serving_default/x:0 "quoted", ä.b-c'  # a tensor's name is data: it must survive everything


def service(folder: Path, name: str, proto: onnx.ModelProto) -> ServicePlan:
    """A service over one graph, whose tensors it declares as they are."""
    plan = EnginePlan(
        engine=f"{name}-engine", version=2, digest=hashlib.sha256(name.encode()).hexdigest(), kind=EngineKind.ONNX,
        model_path=str(folder / f"{name}.onnx"), model_sha256=save(proto, folder / f"{name}.onnx"),
        inputs=tuple(map(_declared, proto.graph.input)), outputs=tuple(map(_declared, proto.graph.output)),
    )  # fmt: skip
    return ServicePlan(service=name, engines=(plan,), active=plan.engine, guard=None, deadline_ms=60_000.0)


def _declared(value: onnx.ValueInfoProto) -> TensorPlan:
    kind = next(name for name, number in KINDS.items() if number == value.type.tensor_type.elem_type)
    axes = (axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim)
    return TensorPlan(value.name, kind, tuple(axes))


def _value(name: str, kind: str, shape: Sequence[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, KINDS[kind], shape)


def types() -> onnx.ModelProto:
    """Every datatype through a graph that gives it back: thirteen inputs and outputs with odd names."""
    nodes = [helper.make_node("Identity", [f"{ODD} {kind}"], [f"{kind}:out"]) for kind in KINDS]
    inputs = [_value(f"{ODD} {kind}", kind, ["rows", 2]) for kind in KINDS]
    return model(nodes, inputs, [_value(f"{kind}:out", kind, ["rows", 2]) for kind in KINDS])


def ragged() -> onnx.ModelProto:
    """Both axes free; `twice` is as large, `count` a scalar."""
    nodes = [helper.make_node("Add", ["x", "x"], ["twice"]), helper.make_node("Size", ["x"], ["count"])]
    outputs = [_value("twice", "FP32", ["rows", "columns"]), _value("count", "INT64", [])]
    return model(nodes, [_value("x", "FP32", ["rows", "columns"])], outputs)


def scalars() -> onnx.ModelProto:
    nodes = [helper.make_node("Sub", ["a", "b"], ["difference"])]
    return model(nodes, [_value("a", "FP32", []), _value("b", "FP32", [])], [_value("difference", "FP32", [])])
