"""What each part of the page shows, as plain values: from the database to what a template prints. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.clock import iso
from compressor.config import HostConfig
from compressor.fleet import evidence
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Connection, Row, devices, messages, plans, timeline
from compressor.fleet.situation import ENOUGH_ROWS, HELD, MAX_WINDOWS

SHOWN_TIMELINE = 60
SHOWN_DECISIONS = 8
SHOWN_EVENTS = 80
SHOWN_SKETCHES = 300
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
BAD_STATES = ("rejected", "failed", "rolling_back", "rolled_back", "quarantined")


def when(at: float | None) -> str:
    """`2026-01-31 12:00:00` UTC, or a dash."""
    return iso(at)[:19].replace("T", " ") if at else "–"


@dataclass(frozen=True, slots=True)
class ServiceView:
    name: str
    active: str
    model: str  # `wrist v2`, when known
    preferred: bool
    health: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceView:
    id: str
    cohort: str
    enrolled: bool
    presence: str
    presence_reason: str
    services: tuple[ServiceView, ...]
    desired: int
    seen: int
    update: str
    update_code: str
    tone: str  # good | busy | bad | quiet
    last_seen: str


@dataclass(frozen=True, slots=True)
class Story:
    """One row of the timeline."""

    number: int
    at: str
    what: str
    device: str
    text: str
    severity: str


def all_devices(tx: Connection, config: HostConfig, catalogue: Catalogue) -> list[DeviceView]:
    """Everybody that was ever heard of, and who is expected by a cohort."""
    known = {row.id: device_view(row, config, catalogue) for row in devices.listed(tx)}
    for cohort, members in config.fleet.cohorts.items():
        for device in members:
            known.setdefault(device, _never_seen(device, cohort))
    return sorted(known.values(), key=lambda device: (device.cohort or "~", device.id))


def _never_seen(device: str, cohort: str) -> DeviceView:
    return DeviceView(
        id=device, cohort=cohort, enrolled=False, presence="unknown", presence_reason="never heard of", services=(),
        desired=0, seen=0, update="idle", update_code="", tone="quiet", last_seen="–",
    )  # fmt: skip


def device_view(row: Row[Any], config: HostConfig, catalogue: Catalogue) -> DeviceView:
    reported = row.reported or {}
    state, code = str(reported.get("update_state", "idle")), str(reported.get("code", ""))
    services = tuple(_services(row, catalogue))
    return DeviceView(
        id=row.id,
        cohort=config.cohort_of(row.id),
        enrolled=row.enrolled_at is not None,
        presence=row.presence or "unknown",
        presence_reason=row.presence_reason or "",
        services=services,
        desired=row.desired_version,
        seen=int(reported.get("desired_version", 0)),
        update=state,
        update_code=code,
        tone=_tone(row, services, state),
        last_seen=when(row.last_seen_at),
    )


def _services(row: Row[Any], catalogue: Catalogue) -> list[ServiceView]:
    """What a device serves, as it last reported; `versions` maps an engine to its version or manifest digest."""
    reported = (row.reported or {}).get("services", {})
    artifacts = (row.birth or {}).get("artifacts", {})
    health = (row.vitals or {}).get("health", {})
    found = []
    for name, about in sorted(reported.items()) if isinstance(reported, dict) else []:
        if not isinstance(about, dict):
            continue
        active = str(about.get("active", ""))
        versions = about.get("versions", {})
        version = versions.get(active) if isinstance(versions, dict) else None
        found.append(ServiceView(
            name=str(name), active=active, model=_model(active, version, artifacts, catalogue),
            preferred=active == str(about.get("preferred", active)),
            health=str(about.get("health") or health.get(name) or "unknown"),
            reason=str(about.get("reason", ""))[:300],
        ))  # fmt: skip
    return found


def _model(active: str, version: object, artifacts: Any, catalogue: Catalogue) -> str:
    if isinstance(version, int) or (isinstance(version, str) and version.isdecimal()):
        return f"{active} v{version}"
    digest = version if isinstance(version, str) else artifacts.get(active) if isinstance(artifacts, dict) else None
    return catalogue.label(digest) if isinstance(digest, str) and len(digest) == 64 else active


def _tone(row: Row[Any], services: Sequence[ServiceView], state: str) -> str:
    if row.presence == "offline" or state in BAD_STATES or any(s.health == "failing" for s in services):
        return "bad"
    if any(not s.preferred or s.health == "degraded" for s in services):
        return "busy"
    return "good" if row.presence == "online" else "quiet"


@dataclass(frozen=True, slots=True)
class Summary:
    online: int
    devices: int
    on_fallback: int
    updating: int
    connected: bool
    link_error: str
    held: bool
    regenerates: bool


def summary(tx: Connection, listed: Sequence[DeviceView], link: dict[str, Any], *, regenerates: bool) -> Summary:
    return Summary(
        online=sum(device.presence == "online" for device in listed),
        devices=len(listed),
        on_fallback=sum(any(not service.preferred for service in device.services) for device in listed),
        updating=sum(device.desired > device.seen or device.update not in _RESTING for device in listed),
        connected=bool(link.get("connected")),
        link_error=str(link.get("error", "")),
        held=plans.setting(tx, HELD) is True,
        regenerates=regenerates,
    )


_RESTING = ("idle", "committed", *BAD_STATES, "superseded")


# --- decisions, jobs, rollouts ---------------------------------------------------------------------------------
def decision_view(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id, "at": when(row.at), "last_at": when(row.last_at), "cohort": row.cohort, "service": row.service,
        "kind": row.kind, "row": row.row, "devices": row.devices, "reason": row.reason,
        "numbers": {name.replace("_", " "): _number(value) for name, value in row.numbers.items()},
    }  # fmt: skip


def _number(value: Any) -> str:
    """Grouped by thousands, four places where there are any."""
    return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, int | float) else str(value)[:60]


def gauges_view(vitals: dict[str, Any]) -> dict[str, str]:
    gauges = vitals.get("gauges") or {}
    return {
        name.replace("_", " "): "not measured" if value is None else _number(value) for name, value in gauges.items()
    }


def decisions_view(tx: Connection, *, limit: int = SHOWN_DECISIONS) -> list[dict[str, Any]]:
    return [decision_view(row) for row in plans.decisions(tx, limit=limit)]


def updates_view(tx: Connection, catalogue: Catalogue) -> dict[str, Any]:
    """The newest trainings, rollouts and requests for recordings."""
    return {
        "jobs": [
            {"id": row.id, "state": row.state, "devices": row.devices, "created": when(row.created_at),
             "ended": when(row.ended_at), "text": row.text or "",
             "seconds": round(row.ended_at - row.started_at) if row.ended_at and row.started_at else None}
            for row in reversed(plans.jobs(tx, limit=5))
        ],
        "rollouts": [
            {"id": row.id, "state": row.state, "service": row.service, "since": when(row.since),
             "cohort": row.cohort or ", ".join(row.devices), "rollback": bool(row.rollback), "text": row.text,
             "open": row.state in plans.OPEN_ROLLOUTS, "halt_asked": row.halt_asked,
             "models": [catalogue.label(row.artifacts[name]) for name in row.order if name in row.artifacts]}
            for row in reversed(plans.rollouts(tx, limit=5))
        ],
        "samples": [
            {"device": row.device, "state": row.state, "asked": when(row.asked_at), "rows": row.rows,
             "text": row.text or ""}
            for row in plans.samples(tx)[:8]
        ],
    }  # fmt: skip


def stories(tx: Connection, *, device: str = "", limit: int = SHOWN_TIMELINE) -> list[Story]:
    return [
        Story(row.id, when(row.at), row.what, row.device, row.text, row.severity)
        for row in timeline.newest(tx, device=device, limit=limit)
    ]


def refusals_view(tx: Connection, device: str = "") -> list[dict[str, Any]]:
    return [
        {
            "device": row.device or "–",
            "code": row.code,
            "count": row.count,
            "last": when(row.last_at),
            "text": row.text,
        }
        for row in messages.refusals(tx, device)[:20]
    ]


# --- one device --------------------------------------------------------------------------------------------------
def events_view(tx: Connection, device: str) -> list[dict[str, Any]]:
    return [
        {"at": when(row.received_at), "severity": row.severity, "kind": row.kind, "service": row.service,
         "text": row.text, "channels": row.channels}
        for row in messages.events(tx, device=device, limit=SHOWN_EVENTS)
    ]  # fmt: skip


def latency_view(tx: Connection, device: str) -> list[dict[str, Any]]:
    """Per engine, merged over the newest sketches: milliseconds."""
    rows = [{"engine": row.engine, "body": row.body} for row in messages.sketches(tx, device, limit=SHOWN_SKETCHES)]
    return [
        {"engine": engine, "requests": sketch.count,
         **{name: f"{(sketch.quantile(q) or 0) / 1000:.2f}" for name, q in QUANTILES.items()}}
        for engine, sketch in sorted(evidence.merge_sketches(rows).items())
    ]  # fmt: skip


def shift_view(tx: Connection, device: str, services: Sequence[str], catalogue: Catalogue) -> list[dict[str, Any]]:
    """Per service, the features that lie farthest from the reference in the newest windows."""
    found = []
    for service in services:
        newest = messages.windows(tx, device, service, limit=MAX_WINDOWS)
        same = [row for row in newest if row.reference == newest[0].reference][: ENOUGH_ROWS // 16]
        for pool, window in evidence.merge_windows(same).items():
            means = window.mean()
            names = catalogue.features(pool.reference)
            order = np.argsort(-np.abs(means))[:6].tolist()
            called = [names[i] if i < len(names) else f"feature {i}" for i in order]
            features = [
                {"name": name, "shift": f"{means[i]:+.2f}", "share": min(100, round(abs(means[i]) / pool.clip * 100))}
                for name, i in zip(called, order, strict=True)
            ]
            found.append({"service": service, "rows": window.rows, "features": features})
    return found
