from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from agent.contract.plan import TensorPlan
from agent.contract.tensors import Array
from agent.engine import RunControl
from compressor import corruptions
from compressor.evaluate import BATCH, alone_and_together, ask, fault_accuracy, fault_table, varied_accuracy
from compressor.stages.naming import PROBABILITY, VIEW_OUTPUT
from compressor.task import Fault, Rows


class SignEngine:
    """Names class 1 where the first sample is positive; a shipped-door engine without a file."""

    inputs = (TensorPlan("x", "FP32", (-1, 4, 1)),)
    outputs = (TensorPlan(PROBABILITY, "FP32", (-1, 2)), TensorPlan(VIEW_OUTPUT, "FP32", (-1, 1)))
    warm_us = p95_us = 0.0

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str] = (), *, control: RunControl | None = None
    ) -> dict[str, Array]:
        del wanted, control
        positive = (feeds["x"][:, 0, 0] > 0).astype(np.float32)
        assert len(positive) <= BATCH
        return {PROBABILITY: np.stack([1 - positive, positive], 1), VIEW_OUTPUT: feeds["x"][:, 0]}


def rows(count: int = 600) -> Rows:
    windows = np.random.default_rng(0).standard_normal((count, 4, 1)).astype(np.float32)
    labels = (windows[:, 0, 0] > 0).astype(np.int64)
    zeros = np.zeros(count, np.int64)
    return Rows(windows, labels, zeros, zeros, np.arange(count))


FLIPPED = Fault("flipped", "unknown", ("c",), "harmful", corruptions.scale([0], -1))
LOUDER = Fault("louder", "unknown", ("c",), "harmless", corruptions.scale([0], 2))


def test_all_rows_are_asked_in_batches() -> None:
    told = ask(SignEngine(), "x", rows().windows)
    assert told.probability.shape == (600, 2)
    assert told.accuracy(rows().labels) == 1.0


def test_accuracy_under_a_fault_and_over_variations() -> None:
    assert fault_accuracy(SignEngine(), "x", rows(), FLIPPED) == 0.0
    assert varied_accuracy(SignEngine(), "x", rows(), [LOUDER]) == 1.0
    assert varied_accuracy(SignEngine(), "x", rows(), [FLIPPED]) == 0.5
    assert alone_and_together(SignEngine(), "x", rows(3).windows) == 0.0


def test_harm_is_measured_on_the_active_engine_not_declared() -> None:
    columns = {"a": [0.5, 0.95], "b": [0.1, 0.1]}
    lines = fault_table([FLIPPED, LOUDER], columns, active="a", clean=0.96, harmful_drop=0.10)
    assert [line.harmful for line in lines] == [True, False]
    assert lines[0].accuracy == {"a": 0.5, "b": 0.1}


@pytest.mark.parametrize("drop", [0.01, 0.02])
def test_a_drop_at_the_limit_counts_as_harmful(drop: float) -> None:
    (line,) = fault_table([LOUDER], {"a": [0.5]}, active="a", clean=0.5 + drop, harmful_drop=0.01)
    assert line.harmful
