"""The only door to onnxruntime: load a model file, warm it, run it, compare it with its golden inputs, end a run.

Host and device use the same door, so what the host measured is what the device runs. Foreign exceptions are
translated here. Which engine answers a request, and what to do when one fails, is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

# Since 1.29 the runtime keeps a device id and an event store below HOME and reports to its maker unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # isort: skip
from onnxruntime.capi import onnxruntime_pybind11_state as native  # isort: skip

from agent import clock
from agent.contract.errors import ArtifactError, Corrupt, EngineFailed, Incompatible, TooLarge, Unavailable
from agent.contract.plan import TensorPlan
from agent.contract.tensors import DATATYPES, Array

MAX_GOLDEN_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 32  # nested subgraphs
WARM_RUNS = 5
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})  # what the stock runtime implements

_DATATYPES = {
    "tensor(bool)": "BOOL", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}  # fmt: skip
# the runtime's exceptions have no common base of their own; RuntimeError, ValueError: its binding layer
_FOREIGN: tuple[type[Exception], ...] = (
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)
_UNREADABLE = (  # what numpy and zipfile raise on bytes that are no npz
    OSError, ValueError, LookupError, EOFError, TypeError, MemoryError, NotImplementedError, RuntimeError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_LOAD_ERRORS: dict[str, type[ArtifactError]] = {
    "InvalidProtobuf": Corrupt, "InvalidGraph": Corrupt, "NoSuchFile": Unavailable
}  # fmt: skip

ort.set_default_logger_severity(4)  # failures are raised; the runtime's own log lines would only repeat them


def runtime_version() -> str:
    """Version of the onnxruntime behind this door."""
    return str(ort.__version__)


class RunControl:
    """Lets another thread end a run. One control serves one run at a time."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()
        self.options.log_severity_level = 4

    def stop(self) -> None:
        """End the run at the next node of its graph (also inside loops); a single long kernel finishes first."""
        self.options.terminate = True

    def rearm(self) -> None:
        """Make the control usable for the next run."""
        self.options.terminate = False

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called since the last `rearm`."""
        return bool(self.options.terminate)


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


class OnnxEngine:
    """One ONNX model on the CPU. Safe to run from several threads."""

    def __init__(self, session: Any, name: str) -> None:
        """Use `load`."""
        self._session = session
        self._name = name
        self.inputs = tuple(_tensor_plan(node, name) for node in session.get_inputs())
        self.outputs = tuple(_tensor_plan(node, name) for node in session.get_outputs())
        self.warm_us = 0.0
        self._all = tuple(output.name for output in self.outputs)
        self._texts = tuple(tensor.name for tensor in self.inputs if tensor.datatype == "BYTES")
        self._lane: _Lane | None = None

    @classmethod
    def load(cls, path: Path, *, sha256: str = "", threads: int = 1, name: str = "") -> OnnxEngine:
        """Load a self-contained model. `sha256`: refuse other bytes; empty = do not check.

        Raises:
            Unavailable: the file cannot be read.
            Corrupt: wrong digest, or no ONNX model.
            Incompatible: external data, custom operators, or operators this runtime does not have.
        """
        name = name or path.name
        _check_file(path, sha256, name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if threads > 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            # from the path: parsing bytes would hold the interpreter's lock for the whole load
            session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=False
            )
            return cls(session, name)
        except _FOREIGN as error:
            kind = _LOAD_ERRORS.get(type(error).__name__, Incompatible)
            raise kind(
                f"engine '{name}' cannot be loaded from {path} by onnxruntime {runtime_version()}: {_short(error)}"
            ) from None

    def warm(self, *, limit_s: float = 10.0) -> None:
        """Run a few times on zeros, measure, and prepare the pre-bound batch-1 lane where shapes allow it.

        Raises:
            EngineFailed: it cannot answer zeros, or not within `limit_s`.
        """
        feeds = {tensor.name: _zeros(tensor) for tensor in self.inputs}
        control = RunControl()
        timer = threading.Timer(limit_s, control.stop)
        timer.name = "engine-warm-limit"
        timer.start()
        try:
            answer = self.run(feeds, control=control)
            if all(_is_bindable(tensor) for tensor in (*self.inputs, *self.outputs)):
                self._lane = _Lane(self._session, feeds, answer)
            times = [self._time(feeds, control) for _ in range(WARM_RUNS)]
        finally:
            timer.cancel()
            timer.join()
        self.warm_us = sorted(times)[WARM_RUNS // 2]

    def run(
        self, feeds: Mapping[str, Array], wanted: Sequence[str] = (), *, control: RunControl | None = None
    ) -> dict[str, Array]:
        """See `Engine.run`. Feeds must have the model's datatypes; shapes are checked by the runtime."""
        options = None if control is None else control.options
        try:
            if self._lane is not None and self._lane.fits(feeds):
                answer = self._lane.run(feeds, options)
                if answer is not None:
                    return {name: answer[name] for name in wanted} if wanted else answer
            if self._texts:
                feeds = {name: _texts(array) if name in self._texts else array for name, array in feeds.items()}
            names = list(wanted or self._all)
            return dict(zip(names, self._session.run(names, dict(feeds), options), strict=True))
        except _FOREIGN as error:
            what = "was ended" if control is not None and control.stopped else "failed"
            raise EngineFailed(f"a run of engine '{self._name}' {what}: {_short(error)}") from None

    def _time(self, feeds: Mapping[str, Array], control: RunControl) -> float:
        start = clock.monotonic_ns()
        self.run(feeds, control=control)
        return (clock.monotonic_ns() - start) / 1e3


class FloorEngine:
    """The answer of last resort: one constant row per output, repeated for every row of the input."""

    inputs: tuple[TensorPlan, ...]
    warm_us = 0.0

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


class _Lane:
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
        self._options = ort.RunOptions()
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


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs with the answers expected of them. `tolerance`: largest absolute difference allowed."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    tolerance: float


@dataclass(frozen=True, slots=True)
class GoldenResult:
    """`difference`: largest absolute one over all outputs; `text` says what is wrong, empty when nothing is."""

    passed: bool
    difference: float
    text: str = ""


def load_golden(path: Path) -> Golden:
    """Read golden.npz: arrays `in_<input>`, `out_<output>` and `tolerance`.

    Raises:
        Corrupt: unreadable, pickled, or without inputs, outputs or tolerance.
        TooLarge: over MAX_GOLDEN_BYTES, packed or unpacked.
    """
    try:
        if path.stat().st_size > MAX_GOLDEN_BYTES:
            raise TooLarge(f"{path} has {path.stat().st_size} bytes, at most {MAX_GOLDEN_BYTES} are read")
        with path.open("rb") as file:
            _check_unpacked(file, path)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        tolerance = float(arrays["tolerance"])
    except _UNREADABLE as error:
        raise Corrupt(f"golden inputs {path} cannot be read: {_short(error)}") from None
    inputs = {name.removeprefix("in_"): array for name, array in arrays.items() if name.startswith("in_")}
    outputs = {name.removeprefix("out_"): array for name, array in arrays.items() if name.startswith("out_")}
    whole = inputs and outputs and all(a.ndim and len(a) for a in (*inputs.values(), *outputs.values()))
    if not whole or not tolerance >= 0:
        raise Corrupt(f"golden inputs {path} need rows in_<input> and out_<output> and a tolerance")
    return Golden(inputs, outputs, tolerance)


def _check_unpacked(file: BinaryIO, path: Path) -> None:
    """Sizes before contents: a few packed bytes may promise any number of unpacked ones."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_GOLDEN_BYTES:
        raise TooLarge(f"{path} unpacks to {unpacked} bytes, at most {MAX_GOLDEN_BYTES} are read")
    file.seek(0)


def check_golden(engine: Engine, golden: Golden, *, limit_s: float = 10.0) -> GoldenResult:
    """Answer golden inputs row by row, the way single requests are answered, and compare.

    Raises:
        EngineFailed: the engine raises, or needs longer than `limit_s`.
    """
    control = RunControl()
    timer = threading.Timer(limit_s, control.stop)
    timer.name = "engine-golden-limit"
    timer.start()
    try:
        results = [_check_row(engine, golden, row, control) for row in range(_rows(golden))]
    finally:
        timer.cancel()
        timer.join()
    worst = max(result.difference for result in results)
    return next((result for result in results if not result.passed), GoldenResult(passed=True, difference=worst))


def _rows(golden: Golden) -> int:
    return min(len(array) for array in (*golden.inputs.values(), *golden.outputs.values()))


def _check_row(engine: Engine, golden: Golden, row: int, control: RunControl) -> GoldenResult:
    feeds = {name: array[row : row + 1] for name, array in golden.inputs.items()}
    answer = engine.run(feeds, tuple(golden.outputs), control=control)
    worst = 0.0
    for name, rows in golden.outputs.items():
        given, expected = answer[name], rows[row : row + 1]
        if given.shape != expected.shape:
            text = f"'{name}' has shape {list(given.shape)}, {list(expected.shape)} was expected"
            return GoldenResult(passed=False, difference=float("inf"), text=text)
        worst = max(worst, _difference(given, expected))
    if worst <= golden.tolerance:
        return GoldenResult(passed=True, difference=worst)
    text = f"golden input {row} is answered {worst:.3g} off, allowed is {golden.tolerance:.3g}"
    return GoldenResult(passed=False, difference=worst, text=text)


def _difference(given: Array, expected: Array) -> float:
    if expected.dtype.kind not in "fiub":
        return 0.0 if (given == expected).all() else float("inf")
    if not given.size:
        return 0.0
    difference = float(np.abs(given.astype(np.float64) - expected.astype(np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")


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


def _floor_row(rows: Mapping[str, Sequence[float]], output: TensorPlan) -> Array:
    shape = output.shape[1:]
    if output.name not in rows or -1 in shape or len(rows[output.name]) != int(np.prod(shape)):
        raise Corrupt(f"the floor has no constant for output '{output.name}' of shape {list(output.shape)}")
    return np.array(rows[output.name], DATATYPES[output.datatype]).reshape(shape)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# --- what a model file refers to: a walk over its protobuf fields, without a protobuf library ---------------
# (field number of a message -> what it holds), https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_HOLDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_EXTERNAL, _TENSOR_LOCATION, _NODE_DOMAIN = 13, 14, 7


def _check_file(path: Path, sha256: str, name: str) -> None:
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if sha256 and hashlib.sha256(memory).hexdigest() != sha256:
            raise Corrupt(f"engine '{name}': {path} does not have the promised digest {sha256[:12]}")
        _check_message(memoryview(memory), "model", name, 0)
    except OSError as error:
        raise Unavailable(f"engine '{name}': cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise Corrupt(f"engine '{name}': {path} is no ONNX model") from None


def _check_message(message: memoryview, kind: str, name: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Incompatible(f"engine '{name}' nests graphs deeper than {MAX_DEPTH // 3} levels")
    for field, value in _fields(message):
        held = _HOLDS.get(kind, {}).get(field)
        if kind == "tensor" and (field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value == 1)):
            raise Incompatible(
                f"engine '{name}' keeps weights outside its file", hint="Export the model with its weights inside."
            )
        if kind == "node" and field == _NODE_DOMAIN:
            _check_domain(value, name)
        elif held is not None and isinstance(value, memoryview):
            _check_message(value, held, name, depth + 1)


def _check_domain(value: memoryview | int, name: str) -> None:
    domain = bytes(value).decode(errors="replace") if isinstance(value, memoryview) else ""
    if domain not in DOMAINS:
        raise Incompatible(
            f"engine '{name}' needs operators of '{domain[:60]}', which the runtime does not have",
            hint="Export the model with standard operators.",
        )


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field numbers and values; a length-delimited value is a view, fixed-width ones are skipped."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                value, at = _varint(message, at)
                yield key >> 3, value
            case 1:
                at += 8
            case 2:
                size, at = _varint(message, at)
                if at + size > len(message):
                    raise ValueError("a field ends outside its message")
                yield key >> 3, message[at : at + size]
                at += size
            case 5:
                at += 4
            case _:
                raise ValueError("unknown wire type")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
