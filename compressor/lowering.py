"""From a trained network to the one that is exported: batch norms folded, optionally lowered to 8 bit.

The lowered network computes in torch exactly what the device computes: quantise and dequantise steps become
ONNX nodes one to one, and the runtime fuses them into integer kernels. Unsigned asymmetric activations per
tensor and signed symmetric weights per channel: the pair that is fast on x86 and folds ReLU.
The last linear layer stays float: its inputs are few, and quantised logits tie.
"""

from __future__ import annotations

import copy
import operator

import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed operators
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compressor.calibrators import Calibrator, Scale, scale_for, weight_scales

_ADDITIONS = frozenset({operator.add, torch.add})
_OPS = torch.ops.quantized_decomposed


def fold(network: nn.Module) -> fx.GraphModule:
    """A copy in evaluation mode with every batch norm merged into the convolution before it."""
    graph_module = fx.symbolic_trace(copy.deepcopy(network).eval())
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        before = node.args[0] if node.op == "call_module" else None
        norm = modules.get(str(node.target))
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or not isinstance(before, fx.Node):
            continue
        convolution = modules.get(str(before.target))
        if isinstance(convolution, nn.Conv1d | nn.Conv2d) and len(before.users) == 1:
            _replace(graph_module, str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def quantise(
    folded: fx.GraphModule, rows: Tensor, *, calibrator: Calibrator
) -> tuple[fx.GraphModule, dict[str, Scale]]:
    """An 8 bit copy of a folded network, and the activation scales it was given.

    rows: normalised calibration input (rows, channels, length).
    """
    lowered = copy.deepcopy(folded)
    places = [node.name for node in lowered.graph.nodes if _is_quantised(node, lowered)]
    recorder = _Recorder(lowered, frozenset(places), calibrator)
    with torch.no_grad():
        recorder.run(rows)
    for node in list(lowered.graph.nodes):
        if node.name in recorder.scales:
            _insert_after(lowered, node, recorder.scales[node.name])
    for name, module in list(lowered.named_modules()):
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            _replace(lowered, name, IntegerWeightConv(module))
    lowered.recompile()
    return lowered.eval(), recorder.scales


class QuantiseDequantise(nn.Module):
    """Rounds an activation to the 256 values the device can hold."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale, self.zero_point = scale.scale, scale.zero_point

    def forward(self, x: Tensor) -> Tensor:
        integers = _OPS.quantize_per_tensor(x, self.scale, self.zero_point, 0, 255, torch.uint8)
        out: Tensor = _OPS.dequantize_per_tensor(integers, self.scale, self.zero_point, 0, 255, torch.uint8)
        return out


class IntegerWeightConv(nn.Module):
    """A convolution that stores its weight as signed bytes with one scale per output channel."""

    weight: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        scales = weight_scales(convolution.weight)
        shape = (-1, *[1] * (convolution.weight.dim() - 1))
        integers = (convolution.weight.detach() / scales.view(shape)).round().clamp(-127, 127)
        self.register_buffer("weight", integers.to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros_like(scales, dtype=torch.int8))
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        weight = _OPS.dequantize_per_channel(self.weight, self.scales, self.zero_points, 0, -128, 127, torch.int8)
        out: Tensor = self.convolution._conv_forward(x, weight, self.convolution.bias)  # noqa: SLF001
        return out


class _Recorder(fx.Interpreter):
    """Runs a network once and notes a scale for the chosen nodes' values."""

    def __init__(self, module: fx.GraphModule, places: frozenset[str], calibrator: Calibrator) -> None:
        super().__init__(module)
        self.places = places
        self.calibrator = calibrator
        self.scales: dict[str, Scale] = {}

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if n.name in self.places and isinstance(value, Tensor):
            self.scales[n.name] = scale_for(value, self.calibrator)
        return value


def _is_quantised(node: fx.Node, module: fx.GraphModule) -> bool:
    """Inputs, ReLUs, and convolutions and additions no ReLU follows: both inputs and the output of each sum."""
    if node.op == "placeholder":
        return True
    if node.op == "call_function" and node.target in _ADDITIONS:
        return not _feeds_relu(node, module)
    if node.op != "call_module":
        return False
    target = module.get_submodule(str(node.target))
    if isinstance(target, nn.Conv1d | nn.Conv2d):
        return not _feeds_relu(node, module)
    return isinstance(target, nn.ReLU)


def _feeds_relu(node: fx.Node, module: fx.GraphModule) -> bool:
    users = list(node.users)
    return (
        len(users) == 1
        and users[0].op == "call_module"
        and isinstance(module.get_submodule(str(users[0].target)), nn.ReLU)
    )


def _insert_after(module: fx.GraphModule, node: fx.Node, scale: Scale) -> None:
    name = f"quantise_{node.name}"
    module.add_submodule(name, QuantiseDequantise(scale))
    with module.graph.inserting_after(node):
        step = module.graph.call_module(name, (node,))
    node.replace_all_uses_with(step, delete_user_cb=lambda user: user is not step)


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent) if parent else module, leaf, child)
