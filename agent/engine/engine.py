"""What every engine promises, whatever is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from agent.contract.plan import TensorPlan
from agent.contract.tensors import Array
from agent.engine.runtime import RunControl


class Engine(Protocol):
    """What can answer: a loaded model or a declared constant."""

    @property
    def inputs(self) -> tuple[TensorPlan, ...]: ...

    @property
    def outputs(self) -> tuple[TensorPlan, ...]: ...

    @property
    def warm_us(self) -> float:
        """Typical time of one batch-1 run, taken while warming; 0 = not warmed or a constant."""
        ...

    @property
    def p95_us(self) -> float:
        """What 95 of 100 such runs take at most."""
        ...

    @property
    def example(self) -> Mapping[str, Array] | None:
        """The request it was warmed with, and answered then; None = not warmed or a constant."""
        ...

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str] = (), *, control: RunControl | None = None
    ) -> dict[str, Array]:
        """Outputs by name: all, or those `wanted`.

        Raises:
            EngineFailed: the run failed or was ended through `control`.
        """
        ...


def leading_rows(inputs: Sequence[TensorPlan], feeds: Mapping[str, Array]) -> int:
    """Rows of a request: along the first declared input with a free first axis, else along the first; 1 without."""
    name = next((tensor.name for tensor in inputs if tensor.shape[:1] == (-1,)), inputs[0].name if inputs else "")
    return len(feeds[name]) if name in feeds and feeds[name].ndim else 1
