"""What the pipeline carries from stage to stage: immutable values, replaced and never changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.contract.artifact import sha256
from compressor.recipe import ModelTable


@dataclass(frozen=True, slots=True)
class Variant:
    """One ONNX file made from one model of the recipe.

    `torch_probability`: (rows, classes), what the network said in torch on the first calibrate rows: the parity
    gate compares the device's engine with it. `scales`: activation scales of an 8 bit variant.
    """

    name: str
    model: ModelTable
    precision: str  # float32 | int8
    onnx: bytes
    parameters: int
    torch_probability: NDArray[np.float32]
    scales: dict[str, tuple[float, int]] = field(default_factory=dict)
    seconds: float = 0.0  # spent on this variant in this run; 0 when everything came from the cache

    @property
    def sha256(self) -> str:
        return sha256(self.onnx)

    @property
    def size_bytes(self) -> int:
        return len(self.onnx)


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one row in the engine, one thread, microseconds. `cpu_p20_us` ranks; wall time depends on the neighbours.

    `view_us`: how much of it the monitor's view costs (measured by leaving the view out).
    """

    cpu_p20_us: float
    wall_p50_us: float
    wall_p95_us: float
    view_us: float


@dataclass(frozen=True, slots=True)
class Gate:
    """One question put to a candidate. `limit` is a ceiling, or a floor where `at_least`."""

    name: str
    measured: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def excess(self) -> float:
        """How far beyond the limit, as a share of it; not above 0 when passed."""
        beyond = self.limit - self.measured if self.at_least else self.measured - self.limit
        return beyond / max(abs(self.limit), 1e-9)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant with everything measured about it.

    `accuracy`: by role, plus "varied": mean over the select role as it is and under each variation the data's
    author calls harmless; it ranks, because it tells models apart that are equal on few clean rows.
    """

    variant: Variant
    accuracy: dict[str, float]
    agreement: float  # share of stream rows on which it names the teacher's class
    latency: Latency
    gates: tuple[Gate, ...] = ()

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one candidate ships to one device class, and the sentence why.

    `reason` may hold measured times and is for people; `plain_reason` holds nothing that differs between two
    runs, and goes into the manifest.
    """

    candidate: str
    device_class: str
    chosen: bool
    reason: str
    plain_reason: str = ""
    gates: tuple[Gate, ...] = ()
