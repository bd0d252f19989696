"""Pre-bound memory: what a request of one fixed shape is read from and answered into."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.contract.tensors import Array
from agent.engine.runtime import FOREIGN, RunControl

ALIGNMENT = 64  # of the whole memory; tensors in it follow each other without gaps
_FLOAT = np.dtype(np.float32)


class Lane:
    """One contiguous memory for the inputs and outputs of one fixed shape: 0.6 of the time of a plain run on tiny
    models.

    It holds first whatever is not float32, then the float32 inputs and the float32 outputs, these in the order asked
    for. So outputs that belong together are one piece to copy, and one look over `floats` finds any NaN or infinity.
    A lane serves one run at a time; `run` takes care of that, whoever uses `native` has to.
    """

    failures = FOREIGN  # what `native` may raise

    def __init__(
        self, session: Any, feeds: Mapping[str, Array], answer: Mapping[str, Array], order: Sequence[str] = ()
    ) -> None:
        """`feeds`, `answer`: examples, of which only names, types and shapes count; `order`: of the outputs."""
        outputs = {name: answer[name] for name in order or answer}
        tensors = {("in", name): array for name, array in feeds.items()}
        tensors |= {("out", name): array for name, array in outputs.items()}
        places, size = _places(tensors)
        self._block = np.zeros(size + ALIGNMENT, np.uint8)
        skipped = -self._block.ctypes.data % ALIGNMENT
        whole = self._block[skipped : skipped + size]
        self._memory = memoryview(whole.data)
        self._places = places
        views = {
            key: whole[begin:end].view(tensors[key].dtype).reshape(tensors[key].shape)
            for key, (begin, end) in places.items()
        }
        self.inputs: dict[str, Array] = {name: views["in", name] for name in feeds}
        self.outputs: dict[str, Array] = {name: views["out", name] for name in outputs}
        self.floats = _floats(whole, places, tensors)
        self.zeros = np.zeros_like(self.floats)
        binding = session.io_binding()
        for name, array in self.inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self.outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The native call: with RunOptions the Python wrapper costs 30 us (it looks for graph-capture settings), the
        # call below 3 us, and it would make options anew if it were given none. The binding must outlive it.
        self._binding = binding
        self.native = session._sess.run_with_iobinding  # noqa: SLF001
        self.bound = binding._iobinding  # noqa: SLF001
        self._options = RunControl().options
        self._lock = threading.Lock()

    def fits(self, feeds: Mapping[str, Array]) -> bool:
        for name, memory in self.inputs.items():
            given = feeds.get(name)
            if given is None or given.shape != memory.shape or given.dtype != memory.dtype:
                return False
        return True

    def run(self, feeds: Mapping[str, Array], options: Any) -> dict[str, Array] | None:
        """Copies of the outputs; None when another thread is using the lane."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            for name, memory in self.inputs.items():
                np.copyto(memory, feeds[name])
            self.native(self.bound, options or self._options)
            return {name: memory.copy() for name, memory in self.outputs.items()}
        finally:
            self._lock.release()

    def piece(self, names: Sequence[str], *, of_inputs: bool = False) -> memoryview | None:
        """The bytes of these tensors in this order, if they follow each other; None when they do not."""
        places = [self._places["in" if of_inputs else "out", name] for name in names]
        if any(end != begin for (_, end), (begin, _) in pairwise(places)):
            return None
        return self._memory[places[0][0] : places[-1][1]] if places else self._memory[:0]


_Key = tuple[str, str]


def _places(tensors: Mapping[_Key, Array]) -> tuple[dict[_Key, tuple[int, int]], int]:
    """Where each tensor begins and ends, each aligned to its numbers, and the size of all."""
    at, places = 0, {}
    for (kind, name), array in sorted(tensors.items(), key=lambda item: _rank(item[1].dtype)):
        at = math.ceil(at / array.dtype.itemsize) * array.dtype.itemsize
        places[kind, name] = (at, at + array.nbytes)
        at += array.nbytes
    return places, at


def _rank(dtype: np.dtype[Any]) -> tuple[bool, int]:
    return dtype == _FLOAT, -dtype.itemsize


def _floats(
    memory: NDArray[np.uint8], places: Mapping[_Key, tuple[int, int]], tensors: Mapping[_Key, Array]
) -> NDArray[np.float32]:
    begins = [begin for key, (begin, _) in places.items() if tensors[key].dtype == _FLOAT]
    return memory[min(begins, default=len(memory)) :].view(_FLOAT)
