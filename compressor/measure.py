"""How long one row takes, measured so that a busy neighbour does not decide.

Candidates take turns round by round; the ranking figure is the 20th percentile of thread CPU time, which moves
by about 1 % where wall medians move by a factor of two. Wall time is reported beside it.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

WARM_RUNS = 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call."""

    cpu_p20_us: float
    wall_p50_us: float
    wall_p95_us: float


def interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int, runs: int) -> dict[str, Timing]:
    """Times every call `rounds` x `runs` times in turns, in this thread."""
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_RUNS):
            call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                _time_block(call, runs, cpu[name], wall[name])
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(cpu[name], wall[name]) for name in calls}


def _time_block(call: Callable[[], object], runs: int, cpu: list[float], wall: list[float]) -> None:
    call()  # the first after another candidate pays for its cold caches
    began = time.thread_time_ns()
    for _ in range(runs):
        start = time.perf_counter_ns()
        call()
        wall.append((time.perf_counter_ns() - start) / 1e3)
    cpu.append((time.thread_time_ns() - began) / 1e3 / runs)


def _timing(cpu: list[float], wall: list[float]) -> Timing:
    return Timing(
        cpu_p20_us=float(np.percentile(cpu, 20)),
        wall_p50_us=float(np.percentile(wall, 50)),
        wall_p95_us=float(np.percentile(wall, 95)),
    )


def machine() -> dict[str, str | int]:
    """What figures of this module belong to: compare them only where this is equal."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 0,
        "system": platform.system(),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
    }


def load_average() -> float:
    """Of the last minute: how busy the machine was with everything."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or "unknown"
