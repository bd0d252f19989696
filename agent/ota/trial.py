"""A short-lived child that loads a candidate under limits and asks it its golden inputs.

Started as `python -m agent.ota.trial` (`agent.ota.installer`): the agent process never imports the runtime, and a
model that eats memory, time or the process itself does so here.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent import clock
from agent.contract.artifact import Artifact, open_artifact, running
from agent.contract.errors import EdgewardenError, EngineFailed, Incompatible
from agent.contract.plan import RuntimePlan, TensorPlan
from agent.contract.tensors import Array
from agent.ota.child import serve
from agent.ota.errors import GoldenMismatch, ResourceLimit

if TYPE_CHECKING:
    from agent.engine import Engine, OnnxEngine

TIMED_RUNS = 32
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "Cannot allocate memory", "MemoryError", "of memory")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`folder`: the slot. `limit_s`: time for warming and for all golden inputs, each.

    `runtime`: fields of a `RuntimePlan`, how this device is configured to run such a candidate. What it finds out
    (an optimised graph, the number of threads) is kept for the worker that will serve it.

    Raises:
        Incompatible: what it takes or gives is not what its manifest says, or this runtime cannot run it.
        GoldenMismatch, ResourceLimit, EngineFailed, Corrupt
    """
    try:
        runtime = msgspec.convert(request.get("runtime", {}), RuntimePlan)
        return _try(open_artifact(Path(request["folder"])), float(request["limit_s"]), runtime)
    except EdgewardenError as error:
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise ResourceLimit(str(error)) from None
        if isinstance(error, EngineFailed) and "was ended" in str(error):
            raise ResourceLimit(str(error)) from None
        raise
    except MemoryError:
        raise ResourceLimit("the candidate needs more memory than it may have") from None


def _try(artifact: Artifact, limit_s: float, configured: RuntimePlan) -> dict[str, Any]:
    # here, not above: the limits hold while the runtime is loaded
    from agent.engine import FloorEngine, bounded, check_golden, load_golden, prepare

    manifest = artifact.manifest
    runtime = running(manifest, configured)
    inputs = [TensorPlan(part.name, part.datatype, tuple(part.shape)) for part in manifest.inputs]
    outputs = [TensorPlan(part.name, part.datatype, tuple(part.shape)) for part in manifest.outputs]
    result: dict[str, Any] = {"ok": True, "golden_rows": 0, "difference": 0.0, "p50_us": 0.0}
    with bounded(manifest.name, runtime.memory_bytes) as meter:
        golden = load_golden(artifact.path("golden")) if "golden" in manifest.blobs else None
        if manifest.kind == "floor":
            engine: Engine = FloorEngine(manifest.floor_outputs or {}, inputs, outputs)
        else:

            def check(loaded: OnnxEngine) -> Mapping[str, Array] | None:
                _check_signature(manifest.name, "input", loaded.inputs, inputs)
                _check_signature(manifest.name, "output", loaded.outputs, outputs)
                _check_views(artifact, loaded)
                return None if golden is None else golden.first(loaded.inputs)

            engine = prepare(
                artifact.path("model"), sha256=manifest.blobs["model"].sha256, name=manifest.name, runtime=runtime,
                check=check, limit_s=limit_s,
            )  # fmt: skip
        if golden is not None:
            answer = check_golden(engine, golden, limit_s=limit_s)
            if not answer.passed:
                raise GoldenMismatch(f"'{manifest.name}' version {manifest.version}: {answer.text}")
            result |= {"difference": answer.difference, "p50_us": _p50_us(engine, golden.first(engine.inputs))}
            result["golden_rows"] = sum(1 for _ in golden.pieces(engine.inputs))
        elif manifest.kind != "floor":
            raise GoldenMismatch(
                f"'{manifest.name}' version {manifest.version} brings no golden inputs to be tested with"
            )
    result["memory_bytes"] = meter.peak_bytes
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _check_signature(name: str, what: str, given: Sequence[TensorPlan], promised: Sequence[TensorPlan]) -> None:
    """Every promised tensor is there as promised; a graph may give more outputs, never ask for more inputs."""
    found = {tensor.name: tensor for tensor in given}
    for tensor in promised:
        other = found.get(tensor.name)
        if other is None or other.datatype != tensor.datatype or not _fits(other.shape, tensor.shape):
            is_ = f"{other.datatype} {list(other.shape)}" if other else "missing"
            said = f"{tensor.datatype} {list(tensor.shape)}"
            raise Incompatible(f"the {what} '{tensor.name}' of '{name}' is {is_}, its manifest says {said}")
    if what == "input" and len(found) != len(promised):
        raise Incompatible(f"'{name}' asks for inputs its manifest does not name: {sorted(found)}")


def _fits(given: tuple[int, ...], promised: tuple[int, ...]) -> bool:
    """Same rank; a free axis of the graph fits any promise, a fixed one only its own length."""
    return len(given) == len(promised) and all(a in {-1, b} for a, b in zip(given, promised, strict=True))


def _check_views(artifact: Artifact, engine: Engine) -> None:
    outputs = {output.name: output for output in engine.outputs}
    for view in artifact.manifest.views:
        if view.source != "graph":
            continue
        output = outputs.get(view.output)
        if output is None or output.shape[-1:] not in {(len(view.features),), (-1,)}:
            raise Incompatible(f"the graph does not give the view '{view.name}' of {len(view.features)} numbers")


def _p50_us(engine: Engine, feeds: dict[str, Any]) -> float:
    times = []
    for _ in range(TIMED_RUNS):
        start = clock.monotonic_ns()
        engine.run(feeds)
        times.append((clock.monotonic_ns() - start) / 1e3)
    return sorted(times)[TIMED_RUNS // 2]


if __name__ == "__main__":
    sys.exit(serve(main))
