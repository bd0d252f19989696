"""Asks the device's own engine: what does this file answer on these rows, clean and under every fault?

Accuracies are shares of rows, 0..1; the caller says which role the rows are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.engine import Engine
from compressor.corruptions import Windows
from compressor.stages.naming import PROBABILITY, VIEW_OUTPUT
from compressor.task import Fault, Rows

BATCH = 256


@dataclass(frozen=True, slots=True)
class Answers:
    """probability: (rows, classes) float32; view: (rows, features) float32."""

    probability: NDArray[np.float32]
    view: NDArray[np.float32]

    @property
    def predicted(self) -> NDArray[np.int64]:
        predicted: NDArray[np.int64] = self.probability.argmax(axis=1)
        return predicted

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        return float((self.predicted == labels).mean())


def ask(engine: Engine, input_name: str, windows: Windows) -> Answers:
    """All rows, in batches."""
    parts = [
        engine.run({input_name: windows[start : start + BATCH]}, (PROBABILITY, VIEW_OUTPUT))
        for start in range(0, len(windows), BATCH)
    ]
    return Answers(*(np.concatenate([part[name] for part in parts]) for name in (PROBABILITY, VIEW_OUTPUT)))


def alone_and_together(engine: Engine, input_name: str, windows: Windows) -> float:
    """Largest difference between a row answered alone and in a batch."""
    together = ask(engine, input_name, windows).probability
    alone = np.concatenate([ask(engine, input_name, windows[i : i + 1]).probability for i in range(len(windows))])
    return float(np.abs(together - alone).max())


def varied_accuracy(engine: Engine, input_name: str, rows: Rows, variations: Sequence[Fault]) -> float:
    """Mean accuracy over the rows as they are and under each variation: finer than one figure on few rows."""
    tables = [rows.windows, *(variation.apply(rows.windows) for variation in variations)]
    return float(np.mean([ask(engine, input_name, windows).accuracy(rows.labels) for windows in tables]))


@dataclass(frozen=True, slots=True)
class FaultLine:
    """Accuracy of each engine under one fault; `harmful`: it costs the active engine at least the recipe's limit."""

    name: str
    kind: str
    channels: tuple[str, ...]
    expected: str
    accuracy: dict[str, float]
    harmful: bool


def fault_accuracy(engine: Engine, input_name: str, rows: Rows, fault: Fault) -> float:
    """Mean over the fault's draws."""
    accuracies = [
        ask(engine, input_name, fault.apply(rows.windows, seed)).accuracy(rows.labels) for seed in range(fault.draws)
    ]
    return float(np.mean(accuracies))


def fault_table(
    faults: Sequence[Fault],
    accuracies: Mapping[str, Sequence[float]],
    *,
    active: str,
    clean: float,
    harmful_drop: float,
) -> tuple[FaultLine, ...]:
    """One line per fault. `accuracies`: per engine, in the order of `faults`; `clean`: the active engine's own."""
    return tuple(
        FaultLine(
            name=fault.name,
            kind=fault.kind,
            channels=fault.channels,
            expected=fault.expected,
            accuracy={engine: round(column[index], 4) for engine, column in accuracies.items()},
            harmful=clean - accuracies[active][index] >= harmful_drop,
        )
        for index, fault in enumerate(faults)
    )
