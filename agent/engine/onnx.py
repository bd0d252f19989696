"""One ONNX model: load it, warm it, run it. Host and device use the same code: what was measured is what runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent import clock
from agent.contract.errors import ArtifactError, Corrupt, EngineFailed, Incompatible, Unavailable
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, Array
from agent.engine.lane import Lane
from agent.engine.modelfile import check_file
from agent.engine.runtime import FOREIGN, Opening, RunControl, open_session, runtime_version, short
from agent.engine.tuning import Times, times

WARM_RUNS, WARM_S = (5, 50), 0.1  # at least and at most so many; between them, as many as fit into that time
_DATATYPES = {
    "tensor(bool)": "BOOL", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}  # fmt: skip
_LOAD_ERRORS: dict[str, type[ArtifactError]] = {
    "InvalidProtobuf": Corrupt, "InvalidGraph": Corrupt, "NoSuchFile": Unavailable
}  # fmt: skip


class OnnxEngine:
    """One ONNX model. Safe to run from several threads."""

    def __init__(self, session: Any, name: str) -> None:
        """Use `load`."""
        self._session = session
        self._name = name
        self.inputs = tuple(_tensor_plan(node, name) for node in session.get_inputs())
        self.outputs = tuple(_tensor_plan(node, name) for node in session.get_outputs())
        self.threads = 1
        self.provider = str(session.get_providers()[0])
        self.note = ""  # in words: why it is not on the provider asked for
        self.cached = False  # whether its optimised graph was kept from an earlier load
        self.times = Times(0.0, 0.0)  # of one warm batch-1 run
        self._all = tuple(output.name for output in self.outputs)
        self._texts = tuple(tensor.name for tensor in self.inputs if tensor.datatype == "BYTES")
        self.example: Mapping[str, Array] | None = None
        self._answer: dict[str, Array] | None = None  # to the example, where a lane can be made of both
        self._lane: Lane | None = None

    @classmethod
    def load(cls, path: Path, *, sha256: str = "", threads: int = 1, name: str = "") -> OnnxEngine:
        """Load a self-contained model as it is. `sha256`: refuse other bytes; empty = do not check.

        On a device `agent.engine.prepare` does more: it keeps what it finds out, and allows less.

        Raises:
            Unavailable: the file cannot be read.
            Corrupt: wrong digest, or no ONNX model.
            Incompatible: external data, custom operators, or operators this runtime does not have.
        """
        name = name or path.name
        check_file(path, sha256, name)
        return cls.open(path, Opening(threads=threads), name)

    @classmethod
    def open(cls, path: Path, opening: Opening, name: str) -> OnnxEngine:
        """Open a model file that was checked. Raises: Unavailable, Corrupt, Incompatible."""
        try:
            session, note = open_session(path, opening)
            engine = cls(session, name)
        except FOREIGN as error:
            kind = _LOAD_ERRORS.get(type(error).__name__, Incompatible)
            raise kind(
                f"engine '{name}' cannot be loaded from {path} by onnxruntime {runtime_version()}: {short(error)}"
            ) from None
        engine.threads, engine.note = opening.threads, note
        return engine

    @property
    def warm_us(self) -> float:
        """See `Engine.warm_us`."""
        return self.times.p50_us

    @property
    def p95_us(self) -> float:
        """See `Engine.p95_us`."""
        return self.times.p95_us

    def warm(self, feeds: Mapping[str, Array] | None = None, *, limit_s: float = 10.0) -> None:
        """Run a few times on one request, measure, and prepare the pre-bound batch-1 lane where shapes allow it.

        `feeds`: that request; zeros when none is given, which not every model can answer.

        Raises:
            EngineFailed: it cannot answer that, or not within `limit_s`.
        """
        feeds = {tensor.name: _zeros(tensor) for tensor in self.inputs} if feeds is None else feeds
        control = RunControl()
        timer = threading.Timer(limit_s, control.stop)
        timer.name = "engine-warm-limit"
        timer.start()
        try:
            answer = self.run(feeds, control=control)
            self.example = {name: array.copy() for name, array in feeds.items()}  # not the whole that it is a row of
            if all(_is_bindable(tensor) for tensor in (*self.inputs, *self.outputs)):
                self._answer = answer
                self._lane = self.lane()
            self.times = times(self._measure(feeds, control))
        finally:
            timer.cancel()
            timer.join()

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str] = (), *, control: RunControl | None = None
    ) -> dict[str, Array]:
        """See `Engine.run`. Feeds must have the model's datatypes; shapes are checked by the runtime."""
        options = None if control is None else control.options
        try:
            answer = self._in_lane(feeds, control)
            if answer is not None:
                return {name: answer[name] for name in wanted} if wanted else answer
            if self._texts:
                feeds = {name: _texts(array) if name in self._texts else array for name, array in feeds.items()}
            names = list(wanted or self._all)
            return dict(zip(names, self._session.run(names, dict(feeds), options), strict=True))
        except FOREIGN as error:
            what = "was ended" if control is not None and control.stopped else "failed"
            raise EngineFailed(f"a run of engine '{self._name}' {what}: {short(error)}") from None

    def _in_lane(self, feeds: Mapping[str, Array], control: RunControl | None) -> dict[str, Array] | None:
        """None: to be run without it. Raises: any of FOREIGN."""
        lane = self._lane
        if lane is None or not lane.fits(feeds):
            return None
        try:
            return lane.run(feeds, None if control is None else control.options)
        except FOREIGN:
            if control is not None and control.stopped:
                raise
            return None  # perhaps as many rows as there is something to say: they do not fit the memory bound

    def _measure(self, feeds: Mapping[str, Array], control: RunControl) -> list[float]:
        fewest, most = WARM_RUNS
        measured = [self._time(feeds, control) for _ in range(fewest)]
        while len(measured) < most and sum(measured) < WARM_S * 1e6:
            measured.append(self._time(feeds, control))
        return measured

    def lane(self, order: Sequence[str] = ()) -> Lane | None:
        """Memory of its own for one request of batch 1, outputs in this order; None where shapes are not fixed."""
        if self.example is None or self._answer is None:
            return None
        return Lane(self._session, self.example, self._answer, order)

    def _time(self, feeds: Mapping[str, Array], control: RunControl) -> float:
        start = clock.monotonic_ns()
        self.run(feeds, control=control)
        return (clock.monotonic_ns() - start) / 1e3


def _tensor_plan(node: Any, name: str) -> TensorPlan:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise Incompatible(f"engine '{name}': tensor '{node.name}' has the type {node.type}, which cannot be served")
    shape = tuple(axis if isinstance(axis, int) and axis >= 0 else -1 for axis in node.shape)
    return TensorPlan(node.name, datatype, shape)


def _is_bindable(tensor: TensorPlan) -> bool:
    """Whether one row of this tensor always has the same size."""
    return tensor.datatype != "BYTES" and -1 not in tensor.shape[1:]


def _zeros(tensor: TensorPlan) -> Array:
    shape = tuple(1 if axis == -1 else axis for axis in tensor.shape)
    return np.full(shape, b"", object) if tensor.datatype == "BYTES" else np.zeros(shape, DATATYPES[tensor.datatype])


def _texts(array: Array) -> Array:
    flat = [
        element.decode(errors="replace") if isinstance(element, bytes) else str(element) for element in array.flat
    ]
    texts = np.empty(len(flat), object)
    texts[:] = flat
    return texts.reshape(array.shape)
