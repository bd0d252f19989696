"""From a network to self-contained ONNX bytes: preprocessing and the monitor's view inside, no trace of the host.

The same network gives the same bytes in any folder: what the exporter writes about the machine (stack traces
with absolute paths, doc strings, shapes of intermediate values) is removed.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import Tensor, nn

from agent.drift.views import Combination
from compressor.stages.naming import OPSET, PROBABILITY, VIEW_OUTPUT
from compressor.views import ChannelFeatures, choose, combine

MAX_ROWS = 4096


class Served(nn.Module):
    """What the device runs: raw window (rows, length, channels) -> class probabilities, features of the view.

    `reads`: positions of the series the network looks at: channels, then `combinations`. The view always covers
    all of them.
    """

    mean: Tensor
    sd: Tensor

    def __init__(
        self, network: nn.Module, *, reads: Sequence[int], mean: Tensor, sd: Tensor,
        combinations: Sequence[Combination] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self.combinations = tuple(combinations)
        self.reads = list(reads)
        self.features = ChannelFeatures()
        self.register_buffer("mean", mean[self.reads].view(1, -1, 1))
        self.register_buffer("sd", sd[self.reads].view(1, -1, 1))

    def normalise(self, x: Tensor) -> Tensor:
        """(rows, channels, length) raw -> (rows, series read, length) with mean 0 and sd 1 on training rows."""
        return (choose(x, self.combinations, self.reads) - self.mean) / self.sd

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        x = window.transpose(1, 2)
        logits = self.network(self.normalise(x))
        return torch.softmax(logits, 1), self.features(combine(x, self.combinations))


def export(served: Served, *, input_name: str, shape: tuple[int, int]) -> bytes:
    """ONNX of a network; `shape` is (length, channels) of one row.

    What the exporter cannot follow (control flow that depends on data) goes to the older one, which records one
    run; whether the recording is true of other rows is the parity gate's question.
    """
    try:
        return strip(_dynamo(served.eval(), _example(shape), input_name))
    except torch.onnx.OnnxExporterError:
        return legacy(served, input_name=input_name, shape=shape)


def _example(shape: tuple[int, int]) -> Tensor:
    """Two rows that move, in all channels alike."""
    example = torch.zeros(2, *shape)
    example[:, ::2] = 1.0
    return example


def _dynamo(served: Served, example: Tensor, input_name: str) -> onnx.ModelProto:
    # the exporter warns about optional packages and its own future; none of it concerns the result
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            served,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[PROBABILITY, VIEW_OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=MAX_ROWS)},),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter returned nothing")
    proto: onnx.ModelProto = program.model_proto
    return proto


def legacy(served: Served, *, input_name: str, shape: tuple[int, int]) -> bytes:
    """The older exporter: for float networks the newer one cannot handle. It knows no lowered 8 bit networks."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            served.eval(),
            (_example(shape),),
            buffer,  # type: ignore[arg-type]  # a stream is documented, the annotation forgot it
            dynamo=False,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[PROBABILITY, VIEW_OUTPUT],
            dynamic_axes={name: {0: "rows"} for name in (input_name, PROBABILITY, VIEW_OUTPUT)},
        )
    return strip(onnx.load_from_string(buffer.getvalue()))


def strip(model: onnx.ModelProto) -> bytes:
    """Deterministic bytes without paths, stack traces, doc strings and intermediate shapes; names made short."""
    graph = model.graph
    _shorten(graph)
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    graph.doc_string = model.doc_string = ""
    graph.name = "edgewarden"
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _shorten(graph: onnx.GraphProto) -> None:
    """Number internal values: exporter names are a large part of a small file, and may change between versions."""
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {"": ""}

    def short(name: str) -> str:
        if name not in kept and name not in names:
            names[name] = f"v{len(names) - 1}"
        return names.get(name, name)

    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for index, node in enumerate(graph.node):
        node.name = f"n{index}"
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
