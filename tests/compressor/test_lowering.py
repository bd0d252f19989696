from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.calibrators import Calibrator
from compressor.families import PlainConv1d, ResidualConv1d
from compressor.lowering import IntegerWeightConv, QuantiseDequantise, fold, quantise

pytestmark = pytest.mark.torch


def trained(network: nn.Module) -> nn.Module:
    """Batch norms with statistics and gains worth folding."""
    torch.manual_seed(0)
    for _ in range(5):
        network(torch.randn(32, 6, 64) * 2 + 1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


NETWORKS = [PlainConv1d(6, 8, 5), ResidualConv1d(6, 8, 5)]


@pytest.mark.parametrize("network", NETWORKS, ids=["plain", "residual"])
def test_folding_changes_nothing_but_the_norms(network: nn.Module) -> None:
    network = trained(network)
    folded, x = fold(network), torch.randn(16, 6, 64)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d)]
    with torch.no_grad():
        assert torch.allclose(folded(x), network(x), atol=1e-4)
    assert [m for m in network.modules() if isinstance(m, nn.BatchNorm1d)]  # the original is untouched


@pytest.mark.parametrize("network", NETWORKS, ids=["plain", "residual"])
def test_eight_bits_stay_close_and_the_last_layer_stays_float(network: nn.Module) -> None:
    folded, x = fold(trained(network)), torch.randn(64, 6, 64)
    lowered, scales = quantise(folded, x, calibrator=Calibrator.MINMAX)
    with torch.no_grad():
        exact, rounded = folded(x), lowered(x)
    assert (exact - rounded).abs().max() < 0.05 * (exact.max() - exact.min())
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv1d)]
    assert len([m for m in lowered.modules() if isinstance(m, IntegerWeightConv)]) == len(convolutions)
    assert len([m for m in lowered.modules() if isinstance(m, QuantiseDequantise)]) == len(scales)
    assert [m for m in lowered.modules() if isinstance(m, nn.Linear)]


def test_both_inputs_and_the_output_of_a_sum_are_quantised() -> None:
    folded = fold(trained(ResidualConv1d(6, 8, 5)))
    _, scales = quantise(folded, torch.randn(8, 6, 64), calibrator=Calibrator.MINMAX)
    sums = [node for node in folded.graph.nodes if node.op == "call_function" and len(node.args) == 2]
    assert len(sums) == 8
    for node in sums:
        assert next(iter(node.users)).name in scales  # the ReLU behind the sum
        assert node.args[1].name in scales  # the branch's convolution, which no ReLU follows
