"""The Prometheus page: every metric in one table, rendered as text format 0.0.4.

    page = render([Sample("edgewarden_requests_total", 1200, {"service": "wrist", "outcome": "ok"}), ...])

The table is the documentation and the check: a sample of an unknown metric or with other labels is refused, so
that dashboards can rely on names. A value of None is unknown and is left out, never shown as zero.
Format: prometheus.io/docs/instrumenting/exposition_formats. Leaves gathering the samples to its caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    SUMMARY = "summary"  # rendered from samples of NAME (with `quantile`), NAME_sum and NAME_count


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    value: float | None
    labels: Mapping[str, str] = field(default_factory=dict)


METRICS: Final = (
    Metric("edgewarden_info", Kind.GAUGE, "1; what runs here.", ("version", "device", "fleet")),
    Metric("edgewarden_requests_total", Kind.COUNTER, "Requests by outcome.", ("service", "outcome")),
    Metric("edgewarden_rows_total", Kind.COUNTER, "Input rows received.", ("service",)),
    Metric("edgewarden_odd_rows_total", Kind.COUNTER, "Rows a guard found odd, by what.", ("service", "guard")),
    Metric(
        "edgewarden_odd_channel_rows_total", Kind.COUNTER, "The same by channel; channels never odd are left out.",
        ("service", "guard", "channel"),
    ),
    Metric(
        "edgewarden_predicted_rows_total", Kind.COUNTER, "Observed rows by the class that was predicted.",
        ("service", "label"),
    ),
    Metric("edgewarden_observation_gaps_total", Kind.COUNTER, "Observations overwritten before being read."),
    Metric(
        "edgewarden_latency_seconds", Kind.SUMMARY, "Latency of answered requests; quantiles since the start.",
        ("service", "engine"),
    ),
    Metric("edgewarden_latency_budget_seconds", Kind.GAUGE, "What 95 % of requests should keep.", ("service",)),
    Metric(
        "edgewarden_latency_over_ratio", Kind.GAUGE, "Share of the last requests over the budget, 0..1.", ("service",)
    ),
    Metric("edgewarden_serving", Kind.GAUGE, "1 for the engine that answers first, else 0.", ("service", "engine")),
    Metric(
        "edgewarden_phase", Kind.GAUGE, "1 for the phase: preferred, fallback, probation, pinned.",
        ("service", "phase"),
    ),
    Metric(
        "edgewarden_health", Kind.GAUGE, "1 for the state: unknown, healthy, degraded, failing.", ("service", "state")
    ),
    Metric("edgewarden_alarm", Kind.GAUGE, "1 while the alarm is raised.", ("service", "kind")),
    Metric("edgewarden_drift_evidence", Kind.GAUGE, "Share of the threshold; 1 raises.", ("service", "component")),
    Metric("edgewarden_drift_rows_total", Kind.COUNTER, "Rows the drift monitor judged.", ("service",)),
    Metric(
        "edgewarden_harm_evidence", Kind.GAUGE, "Disagreement with this witness, share of what raises.",
        ("service", "engine"),
    ),
    Metric(
        "edgewarden_witness_evidence", Kind.GAUGE, "Drift of the witness's own view, share of what silences it.",
        ("service", "engine"),
    ),
    Metric("edgewarden_switches_total", Kind.COUNTER, "Changes of the serving engine."),
    Metric("edgewarden_worker_generation", Kind.GAUGE, "Generation of the serving worker; 0 = none."),
    Metric("edgewarden_worker_losses", Kind.GAUGE, "Workers lost within the last minute."),
    Metric("edgewarden_update_state", Kind.GAUGE, "1 for the state of the update.", ("state",)),
    Metric("edgewarden_update_desired_version", Kind.GAUGE, "Version of the desired document it is about."),
    Metric("edgewarden_update_attempts", Kind.GAUGE, "Times its bytes were asked for."),
    Metric("edgewarden_update_moved_bytes", Kind.GAUGE, "Bytes it moved."),
    Metric("edgewarden_update_waits", Kind.GAUGE, "1 while documents cannot be judged (repository, clock)."),
    Metric("edgewarden_update_store_bytes", Kind.GAUGE, "Size of the stored artifacts."),
    Metric("edgewarden_refused_documents_total", Kind.COUNTER, "Documents not believed, by reason.", ("code",)),
    Metric("edgewarden_power_watts", Kind.GAUGE, "Power of the last interval.", ("source", "measured")),
    Metric("edgewarden_energy_joules_total", Kind.COUNTER, "Energy since the start.", ("source", "measured")),
    Metric("edgewarden_temperature_celsius", Kind.GAUGE, "The hottest sensor of the processor.", ("zone",)),
    Metric("edgewarden_throttled", Kind.GAUGE, "1 while the processor is slowed down for heat or power."),
    Metric("edgewarden_resident_bytes", Kind.GAUGE, "Resident memory of agent and worker."),
    Metric("edgewarden_memory_available_bytes", Kind.GAUGE, "Memory the system could still give."),
    Metric("edgewarden_disk_free_bytes", Kind.GAUGE, "Free space where the state is kept."),
    Metric("edgewarden_cpu_ratio", Kind.GAUGE, "Share of all processors in use, 0..1."),
    Metric("edgewarden_link_up", Kind.GAUGE, "1 while connected to the broker."),
    Metric("edgewarden_outbox_messages", Kind.GAUGE, "Messages waiting to be sent."),
    Metric("edgewarden_outbox_bytes", Kind.GAUGE, "Bytes waiting to be sent."),
    Metric("edgewarden_outbox_dropped_total", Kind.COUNTER, "Messages dropped for age or space."),
)  # fmt: skip
_SUFFIXES: Final = {Kind.SUMMARY: ("", "_sum", "_count")}


def render(samples: Iterable[Sample]) -> str:
    """The page, in the table's order; metrics without a known sample are left out.

    Raises:
        ValueError: a name that is not in METRICS, other labels than its own, or the same sample twice.
    """
    lines: dict[str, dict[str, str]] = {metric.name: {} for metric in METRICS}
    owners = {metric.name + suffix: metric for metric in METRICS for suffix in _SUFFIXES.get(metric.kind, ("",))}
    for sample in samples:
        metric = owners.get(sample.name)
        if metric is None:
            raise ValueError(f"'{sample.name}' is not in the table of metrics")
        _check_labels(metric, sample)
        if sample.value is None:
            continue
        series = f"{sample.name}{_labels(metric, sample.labels)}"
        if series in lines[metric.name]:
            raise ValueError(f"{series} was given twice")
        lines[metric.name][series] = f"{series} {_number(sample.value)}"
    return "".join(
        f"{line}\n" for metric in METRICS if lines[metric.name] for line in _block(metric, lines[metric.name])
    )


def latency_samples(service: str, engine: str, latency: Mapping[str, float | None]) -> list[Sample]:
    """The summary of one engine from `Monitor.statistics()["latency"][engine]`, in seconds."""
    labels = {"service": service, "engine": engine}
    name = "edgewarden_latency_seconds"
    return [
        *(
            Sample(name, _seconds(latency[field]), labels | {"quantile": quantile})
            for field, quantile in (("p50_us", "0.5"), ("p95_us", "0.95"), ("p99_us", "0.99"))
        ),
        Sample(f"{name}_sum", _seconds(latency["total_us"]), labels),
        Sample(f"{name}_count", latency["count"], labels),
    ]


def one_of(name: str, states: Iterable[str], now: str, label: str, labels: Mapping[str, str]) -> list[Sample]:
    """One sample per state, 1 for `now` and 0 for the others: a state as Prometheus likes it."""
    return [Sample(name, float(state == now), {**labels, label: state}) for state in states]


def _block(metric: Metric, series: Mapping[str, str]) -> Iterator[str]:
    yield f"# HELP {metric.name} {_escape(metric.help)}"
    yield f"# TYPE {metric.name} {metric.kind.value}"
    yield from series.values()


def _check_labels(metric: Metric, sample: Sample) -> None:
    wanted = set(metric.labels)
    if metric.kind is Kind.SUMMARY and sample.name == metric.name:
        wanted.add("quantile")
    if set(sample.labels) != wanted:
        raise ValueError(f"{sample.name} has the labels {sorted(wanted)}, not {sorted(sample.labels)}")


def _labels(metric: Metric, labels: Mapping[str, str]) -> str:
    names = [name for name in (*metric.labels, "quantile") if name in labels]
    inner = ",".join(f'{name}="{_escape(labels[name], quote=True)}"' for name in names)
    return f"{{{inner}}}" if inner else ""


def _escape(text: str, *, quote: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quote else escaped


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds * 1e-6


def documented() -> list[dict[str, Any]]:
    """The table as plain rows, for the generated reference page."""
    return [
        {"name": metric.name, "type": metric.kind.value, "labels": list(metric.labels), "help": metric.help}
        for metric in METRICS
    ]
