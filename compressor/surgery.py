"""Adds a monitor's view to an ONNX file that somebody else made: nodes behind an input or a hidden tensor.

    watched = add_view(model, Wanted("identity", "x"))     # -> AddedView: the model and its manifest entry

The same numbers as agent.drift.views; the model's own outputs stay what they were, bit for bit, which is tried on
random inputs before anything is given back. A temporary file is all it writes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.contract.artifact import View
from agent.contract.errors import EngineFailed
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, Array
from agent.drift.views import (
    BRIGHT,
    DARK,
    FLOOR,
    LARGEST,
    MOST_FEATURES,
    feature_names,
    image_feature_names,
    projection,
)
from agent.engine import OnnxEngine
from compressor.errors import SurgeryRefused

KINDS = ("identity", "channels", "image", "hidden")
OLDEST_OPSET = 13
MOST_NUMBERS = {"identity": 128, "hidden": 16_384}
TRIED_ROWS = (1, 2, 5)
_PREFIX = "ew_view_"


@dataclass(frozen=True, slots=True)
class Wanted:
    """`source`: the input a view is of, or the tensor for `hidden`; "" = the only input. `names`: of the features
    (`identity`), or of the channels (`channels`). `low`, `high`, `layout`: of an image's pixels.
    """

    kind: str
    source: str = ""
    names: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 255.0
    layout: str = "NHWC"


@dataclass(frozen=True, slots=True)
class AddedView:
    model: onnx.ModelProto
    view: View


def add_view(model: onnx.ModelProto, wanted: Wanted) -> AddedView:
    """A copy of the model with one view more.

    Raises:
        SurgeryRefused: what is asked for cannot be done, or an output of the model would change.
    """
    opset = _check_model(model, wanted)
    source, shape, kind = _source(model, wanted)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = _Nodes(f"{_PREFIX}{wanted.kind}", opset)
    x = source if kind == TensorProto.FLOAT else nodes.add("Cast", source, to=TensorProto.FLOAT)
    match wanted.kind:
        case "channels":
            made, features = _channels(nodes, x, shape, wanted)
        case "image":
            made, features = _image(nodes, x, shape, wanted)
        case _:
            made, features = _numbers(nodes, x, shape, wanted)
    output = f"{_PREFIX}{wanted.kind}"
    taken = sum(_width(one) for one in model.graph.output if one.name.startswith(_PREFIX))
    if taken + len(features) > MOST_FEATURES:
        raise SurgeryRefused(
            f"the views of one row would be {taken + len(features)} numbers, a record holds {MOST_FEATURES}"
        )
    nodes.add("Identity", made, output=output)
    changed.graph.node.extend(nodes.nodes)
    changed.graph.initializer.extend(nodes.constants)
    rows = next(one for one in model.graph.input if one.name not in _constants(model)).type.tensor_type.shape.dim[0]
    first = rows.dim_value if rows.HasField("dim_value") else rows.dim_param or "rows"
    changed.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [first, len(features)]))
    _check_same(model, changed)
    view = View(name=wanted.kind, kind=wanted.kind, source="graph", output=output, features=list(features))  # type: ignore[arg-type]
    return AddedView(changed, view)


# --- what is asked for -------------------------------------------------------------------------------------
def _check_model(model: onnx.ModelProto, wanted: Wanted) -> int:
    if wanted.kind not in KINDS:
        raise SurgeryRefused(f"there is no view '{wanted.kind}' to add", hint=f"Known: {', '.join(KINDS)}.")
    if any(one.data_location == TensorProto.EXTERNAL for one in model.graph.initializer):
        raise SurgeryRefused("the model's weights lie outside its file", hint="Save it as one file first.")
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise SurgeryRefused(
            f"the model has opset {opset}, views need {OLDEST_OPSET} or newer",
            hint="Export it again, or convert it with onnx.version_converter.",
        )
    if any(one.name == f"{_PREFIX}{wanted.kind}" for one in model.graph.output):
        raise SurgeryRefused(f"the model has a view '{wanted.kind}' already")
    return int(opset)


def _source(model: onnx.ModelProto, wanted: Wanted) -> tuple[str, tuple[int, ...], int]:
    """(tensor, its shape without rows, its type)."""
    inputs = [one for one in model.graph.input if one.name not in _constants(model)]
    if wanted.kind == "hidden":
        known = onnx.shape_inference.infer_shapes(model).graph
        found = {one.name: one for one in (*known.value_info, *known.output)}
        made = {name for node in model.graph.node for name in node.output}
        if wanted.source not in made:
            near = ", ".join(name for name in found if name in made)[:200]
            raise SurgeryRefused(f"the model makes no tensor '{wanted.source}'", hint=f"It makes: {near}.")
    else:
        found = {one.name: one for one in inputs}
    name = wanted.source or (inputs[0].name if len(inputs) == 1 else "")
    if name not in found:
        what = f"'{name}'" if name else "without a name, and it has several"
        raise SurgeryRefused(
            f"the shape of '{name}' cannot be inferred"
            if wanted.kind == "hidden"
            else f"the model has no input {what}",
            hint="" if wanted.kind == "hidden" else f"Its inputs: {', '.join(one.name for one in inputs)}.",
        )
    kind = found[name].type.tensor_type
    dims = [one.dim_value if one.HasField("dim_value") else -1 for one in kind.shape.dim]
    if len(dims) < 2 or min(dims[1:]) < 1:
        raise SurgeryRefused(f"'{name}' is {dims}: a view needs rows first and fixed axes behind them")
    if kind.elem_type in (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        raise SurgeryRefused(f"'{name}' holds no numbers a view could be of")
    return name, tuple(dims[1:]), kind.elem_type


def _constants(model: onnx.ModelProto) -> set[str]:
    return {one.name for one in model.graph.initializer}


def _width(output: onnx.ValueInfoProto) -> int:
    return int(output.type.tensor_type.shape.dim[-1].dim_value)


def _named(wanted: Wanted, count: int, what: str) -> tuple[str, ...]:
    if wanted.names and len(wanted.names) != count:
        raise SurgeryRefused(f"{len(wanted.names)} names were given for {count} {what}")
    return wanted.names or tuple(f"{wanted.source or wanted.kind}.{number}" for number in range(count))


# --- nodes -------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Nodes:
    """Nodes and constants under one prefix, in the dialect of one opset."""

    prefix: str
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, output: str = "", outputs: int = 1, **attributes: Any) -> str:
        name = output or f"{self.prefix}/{len(self.nodes)}"
        names = [name, *(f"{name}.{at}" for at in range(1, outputs))]
        self.nodes.append(
            helper.make_node(operator, list(inputs), names, name=f"{self.prefix}/n{len(self.nodes)}", **attributes)
        )
        return name

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"{self.prefix}/c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def reduce(self, operator: str, x: str, axes: Sequence[int], *, keep: bool = False) -> str:
        """Axes are an attribute up to opset 17."""
        if self.opset < 18:
            return self.add(operator, x, axes=list(axes), keepdims=int(keep))
        return self.add(operator, x, self.constant(list(axes), np.int64), keepdims=int(keep))

    def piece(self, x: str, axis: int, begin: int, end: int) -> str:
        """x[begin:end] along an axis; `end` may count from behind, 0 = to the end."""
        numbers = (self.constant([one], np.int64) for one in (begin, end or np.iinfo(np.int64).max, axis))
        return self.add("Slice", x, *numbers)

    def clip(self, x: str, low: float, high: float) -> str:
        return self.add("Clip", x, self.constant(low), self.constant(high))

    def sd(self, x: str, axes: Sequence[int], *, keep: bool = False) -> str:
        away = self.add("Sub", x, self.reduce("ReduceMean", x, axes, keep=True))
        return self.add("Sqrt", self.reduce("ReduceMean", self.add("Mul", away, away), axes, keep=keep))


def _numbers(nodes: _Nodes, x: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    count, most = math.prod(shape), MOST_NUMBERS[wanted.kind]
    if count > most:
        raise SurgeryRefused(
            f"a row of '{wanted.source or 'the input'}' has {count} numbers, a view '{wanted.kind}' takes {most}",
            hint="Use `channels`, `image`, or a hidden tensor further on.",
        )
    flat = nodes.add("Flatten", nodes.clip(x, -LARGEST, LARGEST), axis=1)
    matrix = projection(count)
    if matrix is None:
        return flat, _named(wanted, count, "numbers")
    return nodes.add("MatMul", flat, nodes.constant(matrix)), tuple(
        f"{wanted.kind}.{at}" for at in range(MOST_FEATURES)
    )


def _channels(nodes: _Nodes, x: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    if len(shape) != 2 or shape[0] < 3:
        raise SurgeryRefused(f"'channels' needs windows (rows, samples, channels) of 3 samples or more, not {shape}")
    names = feature_names(_named(wanted, shape[1], "channels"))
    series = nodes.add("Transpose", nodes.clip(x, -LARGEST, LARGEST), perm=[0, 2, 1])
    before, here, after = (nodes.piece(series, 2, at, at - 2) for at in range(3))
    # relative to the first sample: a channel that repeats one value must give exactly zero
    first = nodes.piece(series, 2, 0, 1)
    moved = nodes.add("Sub", series, first)
    mean = nodes.add("Add", first, nodes.reduce("ReduceMean", moved, [2], keep=True))
    bends = nodes.add("Abs", nodes.add("Sub", nodes.add("Sub", after, here), nodes.add("Sub", here, before)))
    count = shape[0] - 2
    upper = nodes.add("TopK", bends, nodes.constant([count // 2 + 1], np.int64), outputs=2, axis=2, sorted=0)
    lowest = nodes.add(
        "TopK", upper, nodes.constant([2 - count % 2], np.int64), outputs=2, axis=2, largest=0, sorted=0
    )
    low, high = nodes.add("Min", before, here), nodes.add("Max", before, here)
    middle = nodes.add("Max", low, nodes.add("Min", high, after))
    spike = nodes.reduce("ReduceMax", nodes.add("Abs", nodes.add("Sub", here, middle)), [2], keep=True)
    parts = (nodes.sd(moved, [2], keep=True), nodes.reduce("ReduceMean", lowest, [2], keep=True), spike)
    logs = nodes.add("Log", nodes.add("Add", nodes.add("Concat", *parts, axis=2), nodes.constant(FLOOR)))
    return nodes.add("Flatten", nodes.add("Concat", mean, logs, axis=2), axis=1), names


def _image(nodes: _Nodes, x: str, shape: tuple[int, ...], wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    if len(shape) != 3 or wanted.layout not in ("NHWC", "NCHW") or not wanted.low < wanted.high:
        raise SurgeryRefused(f"'image' needs (rows, height, width, channels) or NCHW, and a range, not {shape}")
    height, width, channels = shape if wanted.layout == "NHWC" else (*shape[1:], shape[0])
    if min(height, width) < 3 or channels > 4:
        raise SurgeryRefused(f"an image of {height} x {width} pixels and {channels} channels has no such view")
    if wanted.layout == "NHWC":
        x = nodes.add("Transpose", x, perm=[0, 3, 1, 2])
    kept = nodes.add("Sub", nodes.clip(x, wanted.low, wanted.high), nodes.constant(wanted.low))
    pixels = nodes.add("Mul", kept, nodes.constant(1.0 / (wanted.high - wanted.low)))
    light = nodes.reduce("ReduceMean", pixels, [1])  # (rows, height, width)

    def mean(part: str) -> str:
        return nodes.reduce("ReduceMean", part, [1, 2])

    def steps(axis: int) -> str:
        return mean(
            nodes.add("Abs", nodes.add("Sub", nodes.piece(light, axis, 1, 0), nodes.piece(light, axis, 0, -1)))
        )

    def share(operator: str, limit: float) -> str:
        return mean(nodes.add("Cast", nodes.add(operator, light, nodes.constant(limit)), to=TensorProto.FLOAT))

    inner_rows, inner_columns = nodes.piece(light, 1, 1, -1), nodes.piece(light, 2, 1, -1)
    inner = nodes.piece(inner_rows, 2, 1, -1)
    around = nodes.add(
        "Sum", nodes.piece(inner_columns, 1, 0, -2), nodes.piece(inner_columns, 1, 2, 0),
        nodes.piece(inner_rows, 2, 0, -2), nodes.piece(inner_rows, 2, 2, 0),
    )  # fmt: skip
    sharpness = mean(nodes.add("Abs", nodes.add("Sub", nodes.add("Mul", inner, nodes.constant(4.0)), around)))
    columns = [
        mean(light), nodes.sd(light, [1, 2]), steps(2), steps(1), sharpness, share("Less", DARK),
        share("Greater", BRIGHT), nodes.sd(nodes.reduce("ReduceMean", light, [2]), [1]),
        nodes.sd(nodes.reduce("ReduceMean", light, [1]), [1]),
    ]  # fmt: skip
    if channels > 1:
        widest = nodes.add("Sub", nodes.reduce("ReduceMax", pixels, [1]), nodes.reduce("ReduceMin", pixels, [1]))
        columns.append(mean(widest))
    upright = [nodes.add("Reshape", one, nodes.constant([-1, 1], np.int64)) for one in columns]
    colours = [nodes.reduce("ReduceMean", pixels, [2, 3])] if channels > 1 else []
    return nodes.add("Concat", *upright, *colours, axis=1), image_feature_names(channels)


# --- proof -------------------------------------------------------------------------------------------------
def _check_same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Ask the device's engine.

    Raises:
        SurgeryRefused: an output of the model differs in a bit, or the view is not one row for each.
    """
    with tempfile.TemporaryDirectory() as folder:
        old, new = _loaded(before, Path(folder) / "before.onnx"), _loaded(after, Path(folder) / "after.onnx")
        names = tuple(one.name for one in old.outputs)
        added = tuple(one.name for one in new.outputs if one.name not in names)
        for rows in TRIED_ROWS:
            feeds = {one.name: _noise(one, rows) for one in old.inputs}
            try:
                expected, given = old.run(feeds, names), new.run(feeds, (*names, *added))
            except EngineFailed as error:
                if rows > 1:
                    return  # a model of one row
                raise SurgeryRefused(f"the model does not run on random numbers: {error}") from None
            _compare(expected, given, added, rows)


def _loaded(model: onnx.ModelProto, path: Path) -> OnnxEngine:
    path.write_bytes(model.SerializeToString())
    return OnnxEngine.load(path, name="model")


def _compare(expected: Mapping[str, Array], given: Mapping[str, Array], added: Sequence[str], rows: int) -> None:
    for name, one in expected.items():
        other = given[name]
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            raise SurgeryRefused(
                f"with this view the output '{name}' would no longer be the same to the last bit",
                hint="Choose a tensor behind the next activation.",
            )
    if any(len(given[name]) != rows for name in added) and rows > 1:
        raise SurgeryRefused("the tensor does not hold one row for each row of the input")


def _noise(tensor: TensorPlan, rows: int) -> Array:
    """Random numbers in the shape of an input; free axes behind the first are 1."""
    shape = [size if size > 0 else rows if at == 0 else 1 for at, size in enumerate(tensor.shape)]
    generator, kind = np.random.default_rng(rows), DATATYPES[tensor.datatype]
    return (generator.standard_normal(shape) if kind.kind == "f" else generator.integers(0, 2, shape)).astype(kind)
