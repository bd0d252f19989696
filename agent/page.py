"""One truth about the running agent, told twice: as the status document and as Prometheus samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agent import VERSION
from agent.blueprint import Blueprint
from agent.clock import iso, wall_s
from agent.contract.plan import EngineLoaded
from agent.decisions import fallback, health
from agent.decisions.events import AlarmKind
from agent.decisions.updates import State
from agent.generation import Phase
from agent.generations import Generations
from agent.journal import Line
from agent.metrics import Sample, latency_samples, one_of
from agent.parts import Parts

UNANSWERED = ("error", "deadline", "overloaded")
MEASURED = re.compile(r"evidence.*|share_.*|.*_(s|us)")
"""Names of flat numbers that are measured; the others are counted."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What is shown: the parts, the workers, the decision clock, how often the agent itself was at fault, how
    updates stand (as `agent.steering` says), and how engines were loaded, by service and name.
    """

    parts: Parts
    generations: Generations
    decision_time_s: float
    faults: int
    update: Mapping[str, Any]
    loaded: Mapping[tuple[str, str], EngineLoaded]


def status(sources: Sources) -> dict[str, Any]:
    """Everything a person asks about, JSON-able; unknown is None."""
    config, info = sources.parts.config, sources.parts.vitals.info
    return {
        "agent": {
            "version": VERSION,
            "pid": sources.parts.process_id,
            "boot": sources.parts.outbox.boot,
            "started_at": sources.parts.started_at,
            "uptime_s": wall_s() - sources.parts.started_at,
            "config": str(sources.parts.config_file),
            "addresses": sources.parts.doors.addresses,
        },
        "device": {
            "id": config.device.id,
            "fleet": config.device.fleet,
            "machine": info.machine,
            "system": info.system,
            "cpus": info.cpus,
        },
        "clock": {"source": config.clock.source, "now_s": sources.decision_time_s},
        "worker": worker(sources),
        "services": [service(sources, blueprint) for blueprint in sources.parts.blueprints],
        "update": dict(sources.update),
        "ring": sources.parts.intake.statistics(),
        "power": power(sources),
        **_vital_signs(sources),
        "link": sources.parts.link.statistics() if sources.parts.link else {"state": "off"},
        "outbox": {**sources.parts.outbox.statistics(), "max_age_s": config.outbox.max_age_s},
        "store": sources.parts.store.statistics(),
        "faults": sources.faults,
        "events": [_event(line) for line in sources.parts.journal.recent()],
    }


def worker(sources: Sources) -> dict[str, Any]:
    current = sources.generations.current
    counted = sources.parts.supervisor.statistics()
    return {
        "pid": current.pid if current else 0,
        "generation": current.number if current else 0,
        "phase": current.phase.value if current else ("starting" if sources.generations.is_starting else "none"),
        "incoming": sources.generations.incoming,
        "leaving": sources.generations.leaving,
        "losses": counted["losses"],
        "statistics": _whole(current.statistics) if current else {},
        **_whole(sources.generations.statistics()),
    }


def service(sources: Sources, blueprint: Blueprint) -> dict[str, Any]:
    decided = sources.parts.supervisor.status(blueprint.name)
    watched = sources.parts.monitors[blueprint.name].statistics()
    counters = watched["counters"]
    latency = _latency_of(watched["latency"], decided["serving"])
    return {
        "name": blueprint.name,
        **decided,
        "engines": [
            {
                "engine": plan.engine,
                "kind": plan.kind.value,
                "version": plan.version,
                "digest": plan.digest,
                "accuracy": blueprint.policy.card[plan.engine].accuracy,
                "loaded": _loaded(sources.loaded.get((blueprint.name, plan.engine))),
            }
            for plan in blueprint.plan.engines
        ],
        "requests": counters.get("requests", 0),
        "rows": counters.get("rows", 0),
        "errors": sum(counters.get(name, 0) for name in UNANSWERED),
        "counters": counters,
        "latency_p50_us": latency.get("p50_us"),
        "latency_p95_us": latency.get("p95_us"),
        "latency_p99_us": latency.get("p99_us"),
        "budget_p95_us": blueprint.monitor.latency_p95_us or None,
        "latency": {engine: _whole(numbers) for engine, numbers in watched["latency"].items()},
        "budget": _whole(watched["budget"]),
        "guards": watched["guards"],
        "odd_rows": watched["odd_rows"],
        "classes": dict(zip(blueprint.plan.labels, watched["classes"], strict=False)),
        "drift": _whole(watched["drift"]),
        "explanation": watched["explanation"],
        "harm": _whole(watched["harm"]),
        "claim": blueprint.reference.claim.text if blueprint.reference else "",
        "problems": list(blueprint.problems),
    }


def _loaded(report: EngineLoaded | None) -> dict[str, Any] | None:
    """How the worker runs an engine; None: it has not said, or there is nothing to say of a floor."""
    if report is None or not report.threads:
        return None
    return {
        "load_ms": report.load_ms,
        "threads": report.threads,
        "placement": report.placement,
        "provider": report.provider,
        "p50_us": report.p50_us,
        "p95_us": report.p95_us,
        "cached": report.cached,
        "memory_bytes": report.memory_bytes,
        "note": report.note,
    }


def power(sources: Sources) -> dict[str, Any]:
    """The last reading, and joules per input row since the start."""
    energy = sources.parts.vitals.energy()
    rows = sum(monitor.statistics()["counters"].get("rows", 0) for monitor in sources.parts.monitors.values())
    joules = energy["joules"]
    per_row = joules / rows if isinstance(joules, float) and rows and joules > 0 else None
    return {
        **energy,
        "inferences": rows,
        "joules_per_inference": per_row,
        "limit_w": sources.parts.config.budget.power_w or None,
    }


def _vital_signs(sources: Sources) -> dict[str, Any]:
    newest, budget = sources.parts.vitals.newest, sources.parts.config.budget
    usage, heat = (newest.usage, newest.heat) if newest else (None, None)
    return {
        "thermal": {
            "temperature_c": heat.temperature_c if heat else None,
            "zone": heat.zone if heat else "",
            "throttled": heat.throttled if heat else None,
            "limit_c": budget.temperature_c or None,
        },
        "memory": {
            "resident_bytes": usage.resident_bytes if usage else None,
            "available_bytes": usage.memory_available_bytes if usage else None,
            "total_bytes": usage.memory_total_bytes if usage else None,
            "limit_bytes": budget.memory_bytes or None,
        },
        "disk": {
            "free_bytes": usage.disk_free_bytes if usage else None,
            "total_bytes": usage.disk_total_bytes if usage else None,
        },
        "cpu": {"share": usage.cpu_share if usage else None, "load_1min": usage.load_1min if usage else None},
    }


def _latency_of(by_engine: Mapping[str, Mapping[str, float | None]], serving: str) -> Mapping[str, float | None]:
    """The serving engine's; before it answered anything, that of the engine that answered most."""
    if (by_engine[serving]["count"] or 0) > 0:
        return by_engine[serving]
    return max(by_engine.values(), key=lambda one: one["count"] or 0)


def _whole(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers with counters as integers: parts and worker hand all of theirs on as floats."""
    return {
        name: int(value) if isinstance(value, float) and not MEASURED.fullmatch(name) else value
        for name, value in numbers.items()
    }


def _event(line: Line) -> dict[str, Any]:
    return {
        "at": line.at, "time": iso(line.at), "severity": line.severity.name.lower(), "event": line.event,
        "service": str(line.fields.get("service", "")), "text": line.text,
    }  # fmt: skip


# --- Prometheus --------------------------------------------------------------------------------------------
def samples(sources: Sources) -> Iterator[Sample]:
    """Every metric of `agent.metrics.METRICS` that is known now."""
    device = sources.parts.config.device
    yield Sample("edgewarden_info", 1, {"version": VERSION, "device": device.id, "fleet": device.fleet})
    for blueprint in sources.parts.blueprints:
        yield from _service_samples(sources, blueprint)
    yield from _device_samples(sources)
    current = sources.generations.current
    counted = sources.parts.supervisor.statistics()
    serving = current is not None and current.phase is Phase.SERVING
    yield Sample("edgewarden_worker_generation", current.number if current and serving else 0)
    yield Sample("edgewarden_worker_losses", counted["losses"])
    yield Sample("edgewarden_switches_total", counted["switches"])
    yield Sample("edgewarden_observation_gaps_total", sources.parts.intake.statistics()["gaps"])
    outbox = sources.parts.outbox.statistics()
    yield Sample("edgewarden_outbox_messages", outbox["rows"])
    yield Sample("edgewarden_outbox_bytes", outbox["bytes"])
    yield Sample("edgewarden_outbox_dropped_total", outbox["dropped"] + outbox["expired"] + outbox["refused"])
    yield from _update_samples(sources.update)
    if sources.parts.link:
        yield Sample("edgewarden_link_up", float(sources.parts.link.statistics()["state"] == "connected"))


def _service_samples(sources: Sources, blueprint: Blueprint) -> Iterator[Sample]:
    decided, name = sources.parts.supervisor.status(blueprint.name), {"service": blueprint.name}
    watched = sources.parts.monitors[blueprint.name].statistics()
    counters = watched["counters"]
    for outcome in ("ok", "failed_over", "floor", "refused_by_guard", "overloaded", "deadline", "error"):
        yield Sample("edgewarden_requests_total", counters.get(outcome, 0), {**name, "outcome": outcome})
    yield Sample("edgewarden_rows_total", counters.get("rows", 0), name)
    yield from _row_samples(blueprint, watched, name)
    for engine, latency in watched["latency"].items():
        yield from latency_samples(blueprint.name, engine, latency)
    if blueprint.monitor.latency_p95_us:
        yield Sample("edgewarden_latency_budget_seconds", blueprint.monitor.latency_p95_us * 1e-6, name)
    yield from one_of("edgewarden_serving", blueprint.policy.engines, decided["serving"], "engine", name)
    yield from one_of("edgewarden_phase", (one.value for one in fallback.Phase), decided["phase"], "phase", name)
    yield from one_of("edgewarden_health", (one.value for one in health.State), decided["health"], "state", name)
    for key, value in watched["drift"].items():
        if key.startswith("evidence:"):
            yield Sample("edgewarden_drift_evidence", value, {**name, "component": key.removeprefix("evidence:")})
    yield Sample("edgewarden_drift_rows_total", watched["drift"].get("rows"), name)
    for key, value in watched["harm"].items():
        kind, _, engine = key.partition(":")
        if engine and kind in ("quietness", "harm"):
            metric = "edgewarden_harm_evidence" if kind == "harm" else "edgewarden_witness_evidence"
            yield Sample(metric, value, {**name, "engine": engine})
    raised = {alarm["kind"] for alarm in decided["alarms"]}
    for kind in AlarmKind:
        yield Sample("edgewarden_alarm", float(kind.value in raised), {**name, "kind": kind.value})


def _row_samples(blueprint: Blueprint, watched: Mapping[str, Any], name: Mapping[str, str]) -> Iterator[Sample]:
    for guard in ("dead", "stuck", "scale", "not_finite", "out_of_range", "repeated"):
        yield Sample(
            "edgewarden_odd_rows_total", watched["counters"].get(f"rows_{guard}", 0), {**name, "guard": guard}
        )
    for guard, channels in watched["odd_rows"].items():
        for channel, count in channels.items():
            labels = {**name, "guard": guard, "channel": channel}
            yield Sample("edgewarden_odd_channel_rows_total", count, labels)
    for label, count in zip(blueprint.plan.labels, watched["classes"], strict=False):
        yield Sample("edgewarden_predicted_rows_total", count, {**name, "label": label})


def _update_samples(update: Mapping[str, Any]) -> Iterator[Sample]:
    for code, count in update["orders"]["refused"].items():
        yield Sample("edgewarden_refused_documents_total", count, {"code": code})
    if update["state"] == "off":
        return
    yield from one_of("edgewarden_update_state", (one.value for one in State), update["state"], "state", {})
    yield Sample("edgewarden_update_desired_version", update["desired_version"])
    yield Sample("edgewarden_update_attempts", update["attempt"])
    yield Sample("edgewarden_update_moved_bytes", update["moved_bytes"])
    yield Sample("edgewarden_update_waits", float(bool(update["waiting"]["code"])))
    yield Sample("edgewarden_update_store_bytes", update["numbers"].get("blob_bytes"))


def _device_samples(sources: Sources) -> Iterator[Sample]:
    energy, newest = sources.parts.vitals.energy(), sources.parts.vitals.newest
    labels = {"source": str(energy["source"]), "measured": str(energy["measured"]).lower()}
    yield Sample("edgewarden_power_watts", _number(energy["watts"]), labels)
    yield Sample("edgewarden_energy_joules_total", _number(energy["joules"]), labels)
    if newest is None:
        return
    usage, heat = newest.usage, newest.heat
    yield Sample("edgewarden_temperature_celsius", heat.temperature_c, {"zone": heat.zone})
    yield Sample("edgewarden_throttled", None if heat.throttled is None else float(heat.throttled))
    yield Sample("edgewarden_resident_bytes", usage.resident_bytes)
    yield Sample("edgewarden_memory_available_bytes", usage.memory_available_bytes)
    yield Sample("edgewarden_disk_free_bytes", usage.disk_free_bytes)
    yield Sample("edgewarden_cpu_ratio", usage.cpu_share)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
