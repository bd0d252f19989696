"""The supervisor's state as JSON: written for Persist, read after a restart, compared to know when to write.

A service or engine that is no longer configured is dropped, so a changed configuration starts that service anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from agent.contract.errors import StateUnreadable
from agent.decisions import fallback, health, service
from agent.decisions.choice import Fault
from agent.decisions.events import AlarmKind, Level
from agent.decisions.fallback import Phase, Stay
from agent.decisions.health import Health, State
from agent.decisions.service import Bench, OpenAlarm, ServicePolicy, ServiceState
from agent.decisions.workers import Workers

VERSION: Final = 1
_TRANSIENT: Final = {"health", "outcomes", "served", "seen", "usable", "pressed"}
"""What a restart can do without: not worth a write to flash each second. The health's state alone is kept."""


def write(now_s: float, workers: Workers, services: Mapping[str, ServiceState]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "now_s": now_s,
        "workers": {"generation": workers.generation, "lost_s": list(workers.lost_s)},
        "services": {name: _service(state) for name, state in services.items()},
    }


def durable(workers: Workers, services: Mapping[str, ServiceState]) -> dict[str, Any]:
    """The part whose change is worth writing."""
    kept = {name: _kept(state) for name, state in services.items()}
    return {"workers": workers, "services": kept}


def _kept(state: ServiceState) -> dict[str, Any]:
    fields = {name: getattr(state, name) for name in state.__slots__ if name not in _TRANSIENT}
    return {**fields, "health": state.health.state}


def _service(state: ServiceState) -> dict[str, Any]:
    return {
        **asdict(state),
        "causes": [{"kind": fault.kind.value, "channels": sorted(fault.channels)} for fault in state.causes],
        "usable": None if state.usable is None else list(state.usable),
        "alarms": [{**asdict(alarm), "channels": list(alarm.channels)} for alarm in state.alarms],
    }


def read(
    document: Mapping[str, Any], policies: Mapping[str, ServicePolicy]
) -> tuple[float, Workers, dict[str, ServiceState]]:
    """now_s, workers and the services that `policies` still has.

    Raises:
        StateUnreadable: not what `write` writes.
    """
    try:
        if document["version"] > VERSION:
            raise StateUnreadable(
                f"the saved decisions have version {document['version']}, this agent reads up to {VERSION}",
                hint="Update the agent, or move the state folder away to start anew.",
            )
        counted = document["workers"]
        workers = Workers(int(counted["generation"]), tuple(map(float, counted["lost_s"])))
        services = {
            name: state
            for name, policy in policies.items()
            if name in document["services"] and (state := _read_service(policy, document["services"][name]))
        }
        return float(document["now_s"]), workers, services
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateUnreadable(
            f"the saved decisions are malformed: {error!r}", hint="Move the state folder away to start anew."
        ) from None


def _read_service(policy: ServicePolicy, fields: Mapping[str, Any]) -> ServiceState | None:
    stay = fields["stay"]
    if stay["engine"] not in policy.engines:
        return None
    if stay["phase"] in (Phase.PREFERRED, Phase.PROBATION) and stay["engine"] != policy.preferred:
        return None  # another engine was the preferred one then: its stay leads nowhere now
    known = set(policy.engines)
    return ServiceState(
        stay=Stay(**{**stay, "phase": Phase(stay["phase"])}),
        health=Health(**{**fields["health"], "state": State(fields["health"]["state"])}),
        changed_s=float(fields["changed_s"]),
        alarms=tuple(_alarm(alarm) for alarm in fields["alarms"]),
        causes=tuple(Fault(AlarmKind(one["kind"]), frozenset(one["channels"])) for one in fields["causes"]),
        pressed=AlarmKind(fields["pressed"]) if fields["pressed"] else None,
        served=int(fields["served"]),
        seen=bool(fields["seen"]),
        outcomes={engine: str(row) for engine, row in fields["outcomes"].items() if engine in known},
        benched={engine: Bench(**bench) for engine, bench in fields["benched"].items() if engine in known},
        usable=None if fields["usable"] is None else tuple(name for name in fields["usable"] if name in known),
        pin=fields["pin"] if fields["pin"] in known else "",
        reload_asked=bool(fields["reload_asked"]),
    )


def _alarm(fields: Mapping[str, Any]) -> OpenAlarm:
    return OpenAlarm(
        **{
            **fields,
            "kind": AlarmKind(fields["kind"]),
            "level": Level(fields["level"]),
            "channels": tuple(fields["channels"]),
        }
    )


def shifted(state: ServiceState, by_s: float) -> ServiceState:
    """The same state on a clock that was set by `by_s`."""
    return replace(
        state,
        stay=fallback.shifted(state.stay, by_s),
        health=health.shifted(state.health, by_s),
        changed_s=state.changed_s + by_s,
        alarms=tuple(replace(alarm, raised_s=alarm.raised_s + by_s) for alarm in state.alarms),
        benched={name: replace(one, until_s=one.until_s + by_s) for name, one in state.benched.items()},
    )


def status(policy: ServicePolicy, state: ServiceState, now_s: float, *, worker: str) -> dict[str, Any]:
    """One service for people: who serves since when and why, how well, what is open, what comes next."""
    stay = state.stay
    check_s = fallback.next_check_s(stay, policy.limits)
    return {
        "serving": stay.engine,
        "preferred": policy.preferred,
        "missing": policy.missing,
        "phase": stay.phase.value,
        "why": stay.why,
        "reason": stay.reason,
        "since_s": stay.since_s,
        "dwell_s": stay.dwell_s,
        "next_check_in_s": None if check_s is None else max(check_s - now_s, 0.0),
        "health": state.health.state.value,
        "complaints": service.complaints(policy, state, now_s, worker=worker),
        "pin": state.pin,
        "usable": None if state.usable is None else list(state.usable),
        "benched": {name: one.why for name, one in state.benched.items() if now_s < one.until_s},
        "alarms": [
            {
                "kind": alarm.kind.value,
                "level": alarm.level.value,
                "channels": list(alarm.channels),
                "engine": alarm.engine,
                "since_s": alarm.raised_s,
                "text": alarm.text,
                "numbers": alarm.numbers,
            }
            for alarm in state.alarms
        ],
    }
