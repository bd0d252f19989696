"""The only door to onnxruntime: its settings for the whole process, its sessions, its exceptions, ending a run."""

from __future__ import annotations

import os
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


def open_session(path: Path, threads: int) -> Any:
    """A session on the CPU for a model file. Raises: any of FOREIGN."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # from the path: parsing bytes would hold the interpreter's lock for the whole load
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=False)


def short(error: Exception) -> str:
    """A foreign error's text on one line, bounded."""
    return " ".join(str(error).split())[:300]
