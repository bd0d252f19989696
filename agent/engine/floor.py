"""The answer of last resort: a declared constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from agent.contract.errors import Corrupt
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, Array
from agent.engine.engine import leading_rows
from agent.engine.runtime import RunControl


class FloorEngine:
    """The answer of last resort: one constant row per output, repeated for every row of the input."""

    inputs: tuple[TensorPlan, ...]
    warm_us = p95_us = 0.0
    example: Mapping[str, Array] | None = None

    def __init__(
        self, rows: Mapping[str, Sequence[float]], inputs: Sequence[TensorPlan], outputs: Sequence[TensorPlan]
    ) -> None:
        """`rows`: per output the numbers of one row, in row-major order.

        Raises:
            Corrupt: an output has no constant, or one of the wrong length.
        """
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._rows = {output.name: _floor_row(rows, output) for output in self.outputs}

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str] = (), *, control: RunControl | None = None
    ) -> dict[str, Array]:
        """The constants, one row per row of the leading input. `control` is not needed: this cannot hang."""
        del control
        rows = leading_rows(self.inputs, feeds)
        return {
            name: np.broadcast_to(self._rows[name], (rows, *self._rows[name].shape)) for name in wanted or self._rows
        }


def _floor_row(rows: Mapping[str, Sequence[float]], output: TensorPlan) -> Array:
    shape = output.shape[1:]
    if output.name not in rows or -1 in shape or len(rows[output.name]) != int(np.prod(shape)):
        raise Corrupt(f"the floor has no constant for output '{output.name}' of shape {list(output.shape)}")
    return np.array(rows[output.name], DATATYPES[output.datatype]).reshape(shape)
