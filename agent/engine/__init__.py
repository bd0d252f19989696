"""Engines: load a model file, warm it, run it, compare it with its golden inputs, end a run.

Host and device use the same door, so what the host measured is what the device runs. Foreign exceptions are
translated here. Which engine answers a request, and what to do when one fails, is decided elsewhere.
"""

from agent.engine.engine import Engine, leading_rows
from agent.engine.floor import FloorEngine
from agent.engine.golden import MAX_GOLDEN_BYTES, Golden, GoldenResult, check_golden, load_golden
from agent.engine.lane import Lane
from agent.engine.memory import SIGNS, bounded
from agent.engine.modelfile import control_flow_of
from agent.engine.onnx import OnnxEngine
from agent.engine.prepare import prepare
from agent.engine.runtime import CPU, RunControl, full_name, runtime_version, usable_providers

__all__ = [
    "CPU",
    "MAX_GOLDEN_BYTES",
    "SIGNS",
    "Engine",
    "FloorEngine",
    "Golden",
    "GoldenResult",
    "Lane",
    "OnnxEngine",
    "RunControl",
    "bounded",
    "check_golden",
    "control_flow_of",
    "full_name",
    "leading_rows",
    "load_golden",
    "prepare",
    "runtime_version",
    "usable_providers",
]
