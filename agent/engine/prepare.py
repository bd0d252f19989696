"""From a model file to an engine ready to answer: refusals, the optimised graph kept here, threads measured.

The first load lets the runtime optimise the graph for this CPU, measures, and keeps both; later loads read the kept
graph and skip all that. Everything kept can be made again, so nothing about it is ever a reason not to serve.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from agent.contract.errors import ArtifactError
from agent.contract.plan import RuntimePlan
from agent.contract.tensors import Array
from agent.engine.modelfile import check_file
from agent.engine.onnx import OnnxEngine
from agent.engine.runtime import CPU, Opening, full_name, runtime_version, usable_providers
from agent.engine.tuning import Times, best, candidates
from agent.modelcache import Entry, Key, ModelCache

Check = Callable[[OnnxEngine], Mapping[str, Array] | None]
"""Looks at a loaded engine, raises if it is not what was promised, and says what to warm it with (None = zeros)."""


def prepare(
    path: Path, *, sha256: str, name: str, runtime: RuntimePlan, check: Check, limit_s: float = 10.0
) -> OnnxEngine:
    """Load, check and warm a model.

    Raises:
        Unavailable, Corrupt, Incompatible: as `OnnxEngine.load`, or what `check` raises.
        EngineFailed: it cannot be warmed, or not within `limit_s`.
    """
    check_file(path, sha256, name, runtime.control_flow)
    wanted = tuple(full_name(provider) for provider in runtime.providers)
    opening = Opening(threads=runtime.threads or 1, providers=runtime.providers, spin=runtime.spin)
    offloaded = any(provider != CPU and provider in usable_providers() for provider in wanted)
    if not runtime.cache_folder or not sha256 or offloaded:  # a graph compiled for another device cannot be kept
        return _first(path, name, runtime, opening, check, limit_s, write_to=None)
    cache = ModelCache(Path(runtime.cache_folder))
    cores = 0 if runtime.threads else physical_cores()
    key = Key(sha256, runtime_version(), cpu_features(), wanted, runtime.threads, runtime.spin, cores)
    known = cache.find(key)
    engine = _again(path, name, known, opening, check, limit_s) if known else None
    if engine is not None:
        return engine
    place = cache.place(key)
    try:
        engine = _first(path, name, runtime, opening, check, limit_s, write_to=place)
        written = place if place is not None and place.exists() else None
        times = engine.times
        cache.keep(key, Entry(engine.threads, times.p50_us, times.p95_us, written))
        return engine
    finally:
        cache.discard(place)


def _again(path: Path, name: str, known: Entry, opening: Opening, check: Check, limit_s: float) -> OnnxEngine | None:
    """The engine as it was kept; None when the runtime does not take it after all."""
    kept = replace(opening, threads=known.threads, optimise=known.optimised is None)
    try:
        engine = OnnxEngine.open(known.optimised or path, kept, name)
        feeds = check(engine)
    except ArtifactError:
        return None
    engine.warm(feeds, limit_s=limit_s)
    engine.times = Times(known.p50_us, known.p95_us)  # measured when there was time to, and the same at every start
    engine.cached = known.optimised is not None
    return engine


def _first(
    path: Path, name: str, runtime: RuntimePlan, opening: Opening, check: Check, limit_s: float, *,
    write_to: Path | None,
) -> OnnxEngine:  # fmt: skip
    engine = None
    if write_to is not None:
        with contextlib.suppress(ArtifactError):  # no room on the disk, perhaps: then without
            engine = OnnxEngine.open(path, replace(opening, write_to=write_to), name)
    if engine is None:
        engine = OnnxEngine.open(path, opening, name)
    feeds = check(engine)
    engine.warm(feeds, limit_s=limit_s)
    if runtime.threads:
        return engine
    return _with_best_threads(engine, path, name, opening, feeds, limit_s)


def _with_best_threads(
    alone: OnnxEngine, path: Path, name: str, opening: Opening, feeds: Mapping[str, Array] | None, limit_s: float
) -> OnnxEngine:
    engines = {1: alone}
    for threads in candidates(alone.times, physical_cores()):
        engines[threads] = OnnxEngine.open(path, replace(opening, threads=threads), name)
        engines[threads].warm(feeds, limit_s=limit_s)
    return engines[best({threads: engine.times for threads, engine in engines.items()})]


@functools.cache
def cpu_features() -> str:
    """A digest of what this CPU is and can: a graph optimised for another one might not even run here."""
    lines = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
                lines.append(line)
            elif not line and lines:  # the first processor tells
                break
    return hashlib.sha256("\n".join([os.uname().machine, *lines]).encode()).hexdigest()[:16]


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores this process may use; threads that share one count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
