"""Pre-bound memory: what a request of one fixed shape is read from and answered into."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from agent.contract.tensors import Array
from agent.engine.runtime import RunControl


class Lane:
    """Pre-bound memory for one fixed shape: 0.6 of the time of a plain run on tiny models."""

    def __init__(self, session: Any, feeds: Mapping[str, Array], answer: Mapping[str, Array]) -> None:
        self._inputs = {name: np.array(array) for name, array in feeds.items()}
        self._outputs = {name: np.array(array) for name, array in answer.items()}
        binding = session.io_binding()
        for name, array in self._inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self._outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The native call: with RunOptions the Python wrapper costs 30 us (it looks for graph-capture settings), the
        # call below 3 us. The binding must outlive it.
        self._binding = binding
        self._run = session._sess.run_with_iobinding  # noqa: SLF001
        self._bound = binding._iobinding  # noqa: SLF001
        self._options = RunControl().options
        self._lock = threading.Lock()

    def fits(self, feeds: Mapping[str, Array]) -> bool:
        for name, memory in self._inputs.items():
            given = feeds.get(name)
            if given is None or given.shape != memory.shape or given.dtype != memory.dtype:
                return False
        return True

    def run(self, feeds: Mapping[str, Array], options: Any) -> dict[str, Array] | None:
        """Copies of the outputs; None when another thread is using the lane."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            for name, memory in self._inputs.items():
                np.copyto(memory, feeds[name])
            self._run(self._bound, options or self._options)
            return {name: memory.copy() for name, memory in self._outputs.items()}
        finally:
            self._lock.release()
