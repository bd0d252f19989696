"""The only door to onnxruntime: its settings for the whole process, its sessions, its exceptions, ending a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Since 1.29 the runtime keeps a device id and an event store below HOME and reports to its maker unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # isort: skip
from onnxruntime.capi import onnxruntime_pybind11_state as native  # isort: skip


# the runtime's exceptions have no common base of their own; RuntimeError, ValueError: its binding layer
FOREIGN: tuple[type[Exception], ...] = (
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)

CPU = "CPUExecutionProvider"
_ELSEWHERE = frozenset({"AzureExecutionProvider"})  # sends what it is asked to somebody else's computer

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


@dataclass(frozen=True, slots=True)
class Opening:
    """How a session is to be opened. `providers`: wanted, best first; what is not here is told, never a failure.

    `optimise`: False for a graph that the runtime has optimised before. `write_to`: where it may write that graph.
    """

    threads: int = 1
    providers: tuple[str, ...] = ()
    spin: bool = False
    optimise: bool = True
    write_to: Path | None = None


def usable_providers() -> tuple[str, ...]:
    """Execution providers of this runtime that compute on this device, best first."""
    return tuple(name for name in ort.get_available_providers() if name not in _ELSEWHERE)


def full_name(provider: str) -> str:
    """`CUDA` and `CUDAExecutionProvider` are the same."""
    return provider if provider.endswith("ExecutionProvider") else f"{provider}ExecutionProvider"


def open_session(path: Path, opening: Opening) -> tuple[Any, str]:
    """A session for a model file, and in words why it is not on the wanted provider (empty = it is).

    Raises: any of FOREIGN: it cannot be opened on the CPU either.
    """
    wanted = [full_name(name) for name in opening.providers if full_name(name) != CPU]
    here = [name for name in wanted if name in usable_providers()]
    note = f"{', '.join(wanted)} was asked for, this runtime has {', '.join(usable_providers())}"
    if here:
        try:
            session = ort.InferenceSession(
                str(path), _options(opening), providers=[*here, CPU], enable_fallback=False
            )
        except FOREIGN as error:
            note = f"{', '.join(here)} was asked for and failed: {short(error)}"
        else:
            used = session.get_providers()
            missing = [name for name in wanted if name not in used]
            return session, f"{', '.join(missing)} was asked for, {', '.join(used)} is used" if missing else ""
    session = ort.InferenceSession(str(path), _options(opening), providers=[CPU], enable_fallback=False)
    return session, note if wanted else ""


def _options(opening: Opening) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = opening.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if opening.threads > 1:  # waiting threads that spin answer sooner and burn a core each
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if opening.spin else "0")
    if not opening.optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if opening.write_to is not None:
        options.optimized_model_filepath = str(opening.write_to)
    return options


def short(error: Exception) -> str:
    """A foreign error's text on one line, bounded."""
    return " ".join(str(error).split())[:300]
