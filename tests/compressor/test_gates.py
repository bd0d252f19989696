from __future__ import annotations

import numpy as np

from compressor.candidate import Gate
from compressor.gates import Parity, class_gates, failed, general_gates
from compressor.recipe import DeviceClassTable, GatesTable


def test_parity_counts_equal_classes_and_the_largest_difference() -> None:
    left = np.array([[0.9, 0.1], [0.4, 0.6]])
    right = np.array([[0.8, 0.2], [0.6, 0.4]])
    parity = Parity.between(left, right)
    assert parity.agreement == 0.5
    assert np.isclose(parity.error, 0.2)
    assert parity.worse(Parity(1.0, 0.5)) == Parity(0.5, 0.5)


def test_a_drop_beyond_the_limit_fails_and_one_at_it_passes() -> None:
    for accuracy, passes in ((0.95, True), (0.92, True), (0.91, False)):
        gates = general_gates(
            GatesTable(), accuracy=accuracy, reference_accuracy=0.95, allowed_drop=0.03, parity=Parity(1, 0),
            golden_error=0,
        )  # fmt: skip
        assert gates[0].passed is passes


def test_a_floor_fails_below_and_a_ceiling_above() -> None:
    assert [
        gate.name for gate in failed((Gate("a", 0.9, 0.99, at_least=True), Gate("b", 2, 1), Gate("c", 1, 1)))
    ] == ["a", "b"]


def test_latency_and_size_are_the_device_classs_own() -> None:
    device = DeviceClassTable(name="d", latency_us=10, size_bytes=100, latency_p95_us=1)
    assert [gate.passed for gate in class_gates(device, latency_us=10.1, size_bytes=100)] == [False, True]
