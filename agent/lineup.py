"""The warm engines of one service and their order: immutable, replaced by one assignment, read once per request.

Loading checks each engine against its plan and its golden inputs; one that fails is left out and told, the others
serve. Which engine should be first is decided by the agent process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agent import clock
from agent.contract.errors import ArtifactError, EngineFailed, Incompatible, UnknownModel
from agent.contract.plan import EngineKind, EngineLoaded, EnginePlan, Placement, ServicePlan, TensorPlan
from agent.contract.tensors import Array
from agent.engine import Engine, FloorEngine, Golden, OnnxEngine, bounded, check_golden, load_golden, prepare

INLINE_US = 300.0  # quicker runs cost less than handing them to another thread and back


@dataclass(frozen=True, slots=True)
class Seat:
    """A usable engine. `index`: its place in the service's plan."""

    index: int
    plan: EnginePlan
    engine: Engine


@dataclass(frozen=True, slots=True)
class Lineup:
    """`seats` in the order they are asked; empty = nothing can answer. `reason`: why the first is first."""

    seats: tuple[Seat, ...]
    reason: str = "active"

    def prefer(self, engine: str, *, active: str, reason: str) -> Lineup:
        """The same seats with `engine` first and the others behind it in plan order.

        Raises:
            UnknownModel: no usable engine has this name.
        """
        first = [seat for seat in self.seats if seat.plan.engine == engine]
        if not first:
            names = ", ".join(seat.plan.engine for seat in self.seats) or "none"
            raise UnknownModel(f"engine '{engine}' cannot be preferred, usable are: {names}")
        others = sorted((seat for seat in self.seats if seat.plan.engine != engine), key=lambda seat: seat.index)
        why = "active" if engine == active else f"switched: {reason or 'no reason given'}"
        return replace(self, seats=(*first, *others), reason=why)

    @property
    def slowest_us(self) -> float:
        """What a warm run of the slowest engine takes (p95): decides whether runs may happen on the event loop."""
        return max((seat.engine.p95_us for seat in self.seats), default=0.0)


def load_lineup(service: ServicePlan) -> tuple[Lineup, tuple[EngineLoaded, ...]]:
    """Load and warm every engine of a service; the active one is first, unless it is not usable."""
    seats: list[Seat] = []
    reports: list[EngineLoaded] = []
    for index, plan in enumerate(service.engines):
        seat, report = _load(service, index, plan)
        reports.append(report)
        if seat is not None:
            seats.append(seat)
    lineup = Lineup(tuple(seats))
    placement = placed(service, lineup)
    reports = [replace(report, placement=placement) if report.threads else report for report in reports]
    if any(seat.plan.engine == service.active for seat in seats):
        return lineup.prefer(service.active, active=service.active, reason=""), tuple(reports)
    return replace(lineup, reason=f"switched: {service.active} is not usable"), tuple(reports)


def placed(service: ServicePlan, lineup: Lineup) -> Placement:
    """Where single rows of a service are run: as configured, else by the slowest of its engines."""
    if service.placement is not Placement.AUTO:
        return service.placement
    return Placement.INLINE if lineup.slowest_us < INLINE_US else Placement.THREAD


def _load(service: ServicePlan, index: int, plan: EnginePlan) -> tuple[Seat | None, EngineLoaded]:
    start = clock.monotonic_ns()
    try:
        with bounded(plan.engine, plan.runtime.memory_bytes) as meter:
            golden = load_golden(Path(plan.golden_path)) if plan.golden_path else None
            engine = _build(plan, golden)
            _check_siblings(service.engines[0], plan)
            wrong = "" if golden is None else check_golden(engine, golden).text
    except (ArtifactError, EngineFailed) as error:
        return None, EngineLoaded(
            service.service, plan.engine, 0.0, golden_ok=False, error_code=error.code, error=error.sentence()
        )
    report = EngineLoaded(
        service.service,
        plan.engine,
        (clock.monotonic_ns() - start) / 1e6,
        golden_ok=not wrong,
        error_code="golden" if wrong else "",
        error=wrong,
        memory_bytes=meter.peak_bytes,
    )
    if isinstance(engine, OnnxEngine):
        report = replace(
            report, threads=engine.threads, provider=engine.provider, p50_us=engine.warm_us, p95_us=engine.p95_us,
            cached=engine.cached, note=engine.note,
        )  # fmt: skip
    return (None if wrong else Seat(index, plan, engine)), report


def _build(plan: EnginePlan, golden: Golden | None) -> Engine:
    def check(engine: OnnxEngine) -> Mapping[str, Array] | None:
        _check_signature(plan, engine)
        return None if golden is None else golden.first(engine.inputs)

    match plan.kind:
        case EngineKind.FLOOR:
            return FloorEngine(plan.floor_outputs or {}, plan.inputs, plan.outputs)
        case EngineKind.ONNX:
            return prepare(
                Path(plan.model_path), sha256=plan.model_sha256, name=plan.engine, runtime=plan.runtime, check=check
            )


def _check_signature(plan: EnginePlan, engine: OnnxEngine) -> None:
    """Every tensor of the graph is declared and fits: an undeclared output could leave the device by accident."""
    views = tuple(TensorPlan(view.output, "FP32", (-1, view.width)) for view in plan.views)
    for what, declared, given in (
        ("input", plan.inputs, engine.inputs),
        ("output", (*plan.outputs, *views), engine.outputs),
    ):
        names, graph = {tensor.name for tensor in declared}, {tensor.name for tensor in given}
        if names != graph:
            odd = ", ".join(sorted(names ^ graph))
            raise Incompatible(f"engine '{plan.engine}': {what}s of manifest and graph differ in {odd}")
        by_name = {tensor.name: tensor for tensor in given}
        for tensor in declared:
            if not _fits(tensor, by_name[tensor.name]):
                raise Incompatible(
                    f"engine '{plan.engine}': {what} '{tensor.name}' is {_text(by_name[tensor.name])} in the graph, "
                    f"{_text(tensor)} in the manifest"
                )


def _check_siblings(first: EnginePlan, plan: EnginePlan) -> None:
    """A request may be answered by any engine of the service, so all take and give the same tensors."""
    for what, ours, theirs in (("inputs", first.inputs, plan.inputs), ("outputs", first.outputs, plan.outputs)):
        if {(t.name, t.datatype, t.shape) for t in ours} != {(t.name, t.datatype, t.shape) for t in theirs}:
            raise Incompatible(f"engine '{plan.engine}' and '{first.engine}' of one service have different {what}")


def _fits(declared: TensorPlan, graph: TensorPlan) -> bool:
    return (
        declared.datatype == graph.datatype
        and len(declared.shape) == len(graph.shape)
        and all(d == g or g == -1 for d, g in zip(declared.shape, graph.shape, strict=True))
    )


def _text(tensor: TensorPlan) -> str:
    return f"{tensor.datatype} {list(tensor.shape)}"
