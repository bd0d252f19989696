"""Engines: load a model file, warm it, run it, compare it with its golden inputs, end a run.

Host and device use the same door, so what the host measured is what the device runs. Foreign exceptions are
translated here. Which engine answers a request, and what to do when one fails, is decided elsewhere.
"""

from agent.engine.engine import Engine, leading_rows
from agent.engine.floor import FloorEngine
from agent.engine.golden import MAX_GOLDEN_BYTES, Golden, GoldenResult, check_golden, load_golden
from agent.engine.lane import Lane
from agent.engine.onnx import OnnxEngine
from agent.engine.runtime import RunControl, runtime_version

__all__ = [
    "MAX_GOLDEN_BYTES",
    "Engine",
    "FloorEngine",
    "Golden",
    "GoldenResult",
    "Lane",
    "OnnxEngine",
    "RunControl",
    "check_golden",
    "leading_rows",
    "load_golden",
    "runtime_version",
]
