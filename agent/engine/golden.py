"""Golden inputs: read them strictly, ask an engine, compare its answers with the expected ones."""

from __future__ import annotations

import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from agent.contract.errors import Corrupt, TooLarge
from agent.contract.plan import TensorPlan
from agent.contract.tensors import Array
from agent.engine.engine import Engine
from agent.engine.runtime import RunControl, short

MAX_GOLDEN_BYTES = 64 * 1024 * 1024
_UNREADABLE = (  # what numpy and zipfile raise on bytes that are no npz
    OSError, ValueError, LookupError, EOFError, TypeError, MemoryError, NotImplementedError, RuntimeError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip  # fmt: skip


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs with the answers expected of them. `tolerance`: largest absolute difference allowed."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    tolerance: float

    def pieces(self, inputs: Sequence[TensorPlan]) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """Requests with their answers: one a row, or all at once for a model whose `inputs` are not all rows."""
        arrays = (*self.inputs.values(), *self.outputs.values())
        if any(tensor.shape[:1] not in ((-1,), (1,)) for tensor in inputs) or not all(a.ndim for a in arrays):
            yield self.inputs, self.outputs
            return
        for row in range(min(map(len, arrays))):
            yield _row(self.inputs, row), _row(self.outputs, row)

    def first(self, inputs: Sequence[TensorPlan]) -> dict[str, Array]:
        """The first request of `pieces`: what a model can be warmed with."""
        return next(self.pieces(inputs))[0]


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
        raise Corrupt(f"golden inputs {path} cannot be read: {short(error)}") from None
    inputs = {name.removeprefix("in_"): array for name, array in arrays.items() if name.startswith("in_")}
    outputs = {name.removeprefix("out_"): array for name, array in arrays.items() if name.startswith("out_")}
    whole = inputs and outputs and all(array.size for array in (*inputs.values(), *outputs.values()))
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
        results = [
            _check_piece(engine, golden.tolerance, number, feeds, expected, control)
            for number, (feeds, expected) in enumerate(golden.pieces(engine.inputs))
        ]
    finally:
        timer.cancel()
        timer.join()
    worst = max(result.difference for result in results)
    return next((result for result in results if not result.passed), GoldenResult(passed=True, difference=worst))


def _row(arrays: Mapping[str, Array], row: int) -> dict[str, Array]:
    return {name: array[row : row + 1] for name, array in arrays.items()}


def _check_piece(
    engine: Engine,
    tolerance: float,
    number: int,
    feeds: dict[str, Array],
    wanted: dict[str, Array],
    control: RunControl,
) -> GoldenResult:
    answer = engine.run(feeds, tuple(wanted), control=control)
    worst = 0.0
    for name, expected in wanted.items():
        given = answer[name]
        if given.shape != expected.shape:
            text = f"'{name}' has shape {list(given.shape)}, {list(expected.shape)} was expected"
            return GoldenResult(passed=False, difference=float("inf"), text=text)
        worst = max(worst, _difference(given, expected))
    if worst <= tolerance:
        return GoldenResult(passed=True, difference=worst)
    text = f"golden input {number} is answered {worst:.3g} off, allowed is {tolerance:.3g}"
    return GoldenResult(passed=False, difference=worst, text=text)


def _difference(given: Array, expected: Array) -> float:
    if expected.dtype.kind not in "fiub":
        return 0.0 if (given == expected).all() else float("inf")
    if not given.size:
        return 0.0
    difference = float(np.abs(given.astype(np.float64) - expected.astype(np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")
