"""The five questions every candidate must answer: accuracy, parity, latency, size, golden inputs.

Pure: figures in, gates out. Limits of the first, second and fifth are the recipe's; latency and size belong to
a device class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.candidate import Candidate, Gate
from compressor.errors import GateFailed
from compressor.recipe import DeviceClassTable, GatesTable


@dataclass(frozen=True, slots=True)
class Parity:
    """How far two ways of running the same network are apart on the same rows."""

    agreement: float  # share of rows with the same most probable class
    error: float  # largest difference of a probability

    @staticmethod
    def between(left: NDArray[np.floating], right: NDArray[np.floating]) -> Parity:
        """left, right: (rows, classes) probabilities."""
        same = left.argmax(axis=1) == right.argmax(axis=1)
        return Parity(float(same.mean()), float(np.abs(left - right).max()))

    def worse(self, other: Parity) -> Parity:
        return Parity(min(self.agreement, other.agreement), max(self.error, other.error))


def general_gates(
    limits: GatesTable, *, accuracy: float, reference_accuracy: float, allowed_drop: float, parity: Parity,
    golden_error: float,
) -> tuple[Gate, ...]:  # fmt: skip
    """The gates that do not depend on a device class."""
    return (
        Gate("accuracy", round(reference_accuracy - accuracy, 6), allowed_drop, "drop against the teacher"),
        Gate("parity", parity.agreement, limits.parity_agreement, "share of rows", at_least=True),
        Gate("parity_error", parity.error, limits.parity_error, "probability"),
        Gate("golden", golden_error, limits.golden_error, "probability"),
    )


def class_gates(device: DeviceClassTable, *, latency_us: float, size_bytes: int) -> tuple[Gate, ...]:
    """The gates of one device class."""
    return (
        Gate("latency", latency_us, device.latency_us, "us of CPU per row"),
        Gate("size", size_bytes, device.size_bytes, "bytes"),
    )


def failed(gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
    return tuple(gate for gate in gates if not gate.passed)


def refuse(
    device: DeviceClassTable, kind: str, candidates: tuple[Candidate, ...], *, slower: Mapping[str, Gate]
) -> GateFailed:
    """The error for a device class nothing fits: names the candidate that came closest and what stopped it.

    `slower`: by name, the gate of a variant that is not faster than its float parent.
    """

    def stops(candidate: Candidate) -> tuple[Gate, ...]:
        own = class_gates(device, latency_us=candidate.latency.cpu_p20_us, size_bytes=candidate.variant.size_bytes)
        held = (slower[candidate.name],) if candidate.name in slower else ()
        return failed(candidate.gates + own + held)

    def distance(candidate: Candidate) -> tuple[int, float]:
        gates = stops(candidate)
        return len(gates), max((gate.excess for gate in gates), default=0.0)

    closest = min(candidates, key=distance)
    first = stops(closest)[0]
    return GateFailed(
        first.name, first.measured, first.limit,
        subject=f"every {kind} for device class '{device.name}'; the closest was '{closest.name}'",
        hint="Loosen the limit in the recipe, or offer another model.",
    )  # fmt: skip
