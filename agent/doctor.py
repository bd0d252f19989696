"""Looks for what would keep the agent from working, one check after the other, each with what to do about it.

Unix sockets are only looked at, a TCP port is bound for a moment unless an agent runs, the broker is greeted, told
one empty document that no host listens to, and left; the state folder is opened for a moment unless an agent holds it
or it belongs to another user.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.blueprint import draw_up
from agent.clock import iso, wall_s
from agent.config import AgentConfig, ServiceSection, load_config
from agent.contract.errors import ArtifactError, EdgewardenError, StateLocked, StorageError
from agent.memory import available_bytes
from agent.parts import make_broker
from agent.sensors.power import find_meters
from agent.sensors.thermal import Thermal
from agent.session import probe
from agent.sockets import MAX_UNIX_PATH_BYTES, is_answered, listen_tcp
from agent.store import RESERVE_BYTES, ROOM_BESIDE_OUTBOX_BYTES, Store
from agent.systemd import read_environment

BUILT_AT = 1_764_547_200.0  # 2025-12-01: a clock before this release was written is wrong
FAR_FUTURE_S = 20 * 365 * 86_400.0


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` is empty when there is nothing to do. `exit_code` is that of the error behind a failure."""

    check: str
    verdict: Verdict
    text: str
    advice: str = ""
    exit_code: int = 0


def examine(config_file: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """All checks, as they finish. Without a readable configuration only the first."""
    try:
        config = load_config(config_file, environment).config
    except EdgewardenError as error:
        yield _failed("config", error)
        return
    yield Finding("config", Verdict.OK, f"{config_file} is valid")
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("artifacts", lambda: _artifacts(config)),
        ("runtime", lambda: _runtime(config)),
        ("state", lambda: _state(config)),
        ("sockets", lambda: _sockets(config)),
        ("broker", lambda: _broker(config, environment)),
        ("clock", lambda: _clock(config)),
        ("meters", _meters),
        ("disk", lambda: _disk(config)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except EdgewardenError as error:
            yield _failed(name, error)


def _artifacts(config: AgentConfig) -> Iterator[Finding]:
    for section in config.service:
        try:
            yield from _artifacts_of(config, section)
        except ArtifactError as error:
            yield _failed("artifacts", error)


def _artifacts_of(config: AgentConfig, section: ServiceSection) -> Iterator[Finding]:
    (blueprint,) = draw_up(config.model_copy(update={"service": [section]}))
    for problem in blueprint.problems:
        yield Finding("artifacts", Verdict.FAIL, problem, exit_code=4)
    names = ", ".join(f"{plan.engine} v{plan.version}" for plan in blueprint.plan.engines)
    missing = blueprint.policy.missing
    text = f"{blueprint.name}: {names}" + (f"; {missing}" if missing else "")
    yield Finding("artifacts", Verdict.WARN if missing else Verdict.OK, text)
    if not section.fallbacks:
        yield Finding(
            "artifacts", Verdict.WARN, f"{blueprint.name} has no fallback model", "Give the service `fallbacks`."
        )
    if blueprint.reference is None:
        text = f"{blueprint.name}: drift is not watched, the artifact has no reference for its view"
        yield Finding("artifacts", Verdict.WARN, text, "Build the artifact with a reference.")


def _runtime(config: AgentConfig) -> Iterator[Finding]:
    """What engines will be run on, beside what is asked for."""
    from agent.engine import CPU, full_name, runtime_version, usable_providers

    here = usable_providers()
    text = f"onnxruntime {runtime_version()} on {', '.join(here)}"
    missing = [full_name(name) for name in config.serving.providers if full_name(name) not in here]
    if missing:
        text += f"; {', '.join(missing)} was asked for and is not there: {here[0] if here else CPU} is used instead"
        yield Finding("runtime", Verdict.WARN, text, "Install a runtime that has it, or take it out of the list.")
    else:
        yield Finding("runtime", Verdict.OK, text)
    free, wanted = available_bytes(), config.serving.memory_mb * 1_000_000
    if free is not None and free < wanted:
        text = f"{free / 1e6:.0f} MB of memory are free, serving.memory_mb allows an engine {wanted / 1e6:.0f}"
        yield Finding("runtime", Verdict.WARN, text, "Free memory, or lower serving.memory_mb.")
    cpus = sorted(set(config.serving.cpus) - os.sched_getaffinity(0))
    if cpus:
        yield Finding("runtime", Verdict.WARN, f"serving.cpus names {cpus}, which this device does not have")


def _state(config: AgentConfig) -> Iterator[Finding]:
    folder = config.state.folder
    if not folder.exists():
        parent = next(one for one in folder.parents if one.exists())
        if os.access(parent, os.W_OK):
            yield Finding("state", Verdict.OK, f"{folder} will be made at the first start")
        else:
            yield Finding(
                "state", Verdict.FAIL, f"{folder} cannot be made", f"Make it, or let this user write {parent}.", 6
            )
        return
    if folder.stat().st_uid != os.geteuid():
        yield Finding(
            "state", Verdict.WARN, f"{folder} is another user's: not looked into", "Run this as the agent's user."
        )
        return
    try:
        store = Store(folder, outbox_bytes=config.outbox.max_bytes)
    except StateLocked as error:
        yield Finding("state", Verdict.OK, f"in use: {error}")
        return
    except StorageError as error:
        yield _failed("state", error)
        return
    waiting = store.outbox_totals()[0]
    set_aside = store.set_aside
    store.close()
    if set_aside:
        yield Finding("state", Verdict.WARN, f"the database was damaged and is set aside in {set_aside}")
    yield Finding("state", Verdict.OK, f"{folder} is sound, {waiting} messages wait in the outbox")


def _sockets(config: AgentConfig) -> Iterator[Finding]:
    paths = {"admin.socket": config.admin_socket}
    if config.serving.unix:
        paths["serving.unix"] = Path(config.serving.unix)
    for key, path in paths.items():
        if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
            yield Finding("sockets", Verdict.FAIL, f"{key}: {path} is too long for a socket", "Shorten the path.", 2)
        elif path.exists() and not path.is_socket():
            yield Finding("sockets", Verdict.FAIL, f"{key}: {path} is not a socket", "Move it away.", 2)
        else:
            state = "answered by a running agent" if is_answered(path) else "free"
            yield Finding("sockets", Verdict.OK, f"{key}: {path} is {state}")
    if config.serving.tcp:
        yield _tcp(config)
    elif not config.serving.unix:
        advice = "Set serving.unix or serving.tcp, unless systemd hands the agent its sockets."
        yield Finding("sockets", Verdict.FAIL, "there is nothing to serve on", advice, 2)


def _tcp(config: AgentConfig) -> Finding:
    """Raises: ConfigError: the agent could not listen there."""
    address = config.serving.tcp
    if is_answered(config.admin_socket):
        return Finding("sockets", Verdict.OK, f"serving.tcp: {address} is the running agent's: not tried")
    listen_tcp(address).close()
    return Finding("sockets", Verdict.OK, f"serving.tcp: {address} is free")


def _broker(config: AgentConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    link = config.link
    if not link.enabled:
        yield Finding(
            "broker", Verdict.WARN, "the link is off: nothing is reported", "Set link.enabled and link.host."
        )
        return
    manager = read_environment({**environment, "LISTEN_FDS": "0"}, process_id=os.getpid())
    broker = make_broker(link, manager, client_id=f"edgewarden-doctor-{os.getpid()}")
    base = config.topics.base
    asyncio.run(probe(broker, f"{base}/doctor"))
    yield Finding("broker", Verdict.OK, f"{link.host}:{link.port} accepts this device and what it says in {base}/")
    if not link.tls_ca and link.host not in ("localhost", "127.0.0.1", "::1"):
        yield Finding("broker", Verdict.WARN, "the link is not encrypted", "Set link.tls_ca.")
    if not link.username and not link.tls_cert:
        yield Finding("broker", Verdict.WARN, "the broker accepts anybody", "Use a user name or a certificate.")


def _clock(config: AgentConfig) -> Iterator[Finding]:
    now = wall_s()
    if not BUILT_AT < now < BUILT_AT + FAR_FUTURE_S:
        yield Finding("clock", Verdict.FAIL, f"the clock says {iso(now)}", "Set it, or let NTP set it.", 1)
    else:
        yield Finding("clock", Verdict.OK, f"{iso(now)}; decisions follow the {config.clock.source} clock")


def _meters() -> Iterator[Finding]:
    sysfs = Path("/sys")
    sources = [
        meter.source
        for meter in find_meters(sysfs, cpu_seconds=lambda: 0.0)
        if meter.measured and (meter.joules(1.0) is not None or _has_counter(meter))
    ]
    if sources:
        yield Finding("meters", Verdict.OK, f"power is measured by {sources[0]}")
    else:
        text = "no power meter can be read: power will be an estimate from CPU time, and labelled so"
        yield Finding("meters", Verdict.WARN, text, "Set power.watts_per_cpu to this device's figure.")
    heat = Thermal(sysfs).read()
    if heat.temperature_c is None:
        yield Finding("meters", Verdict.WARN, "no temperature sensor can be read")
    else:
        yield Finding("meters", Verdict.OK, f"{heat.temperature_c:.0f} °C ({heat.zone})")


def _has_counter(meter: object) -> bool:
    """A counter answers from its second reading on."""
    second = meter.joules(1.0) if hasattr(meter, "joules") else None
    return second is not None


def _disk(config: AgentConfig) -> Iterator[Finding]:
    folder = next(one for one in (config.state.folder, *config.state.folder.parents) if one.exists())
    free = shutil.disk_usage(folder).free
    needed = config.outbox.max_bytes * 3 // 2 + ROOM_BESIDE_OUTBOX_BYTES + RESERVE_BYTES
    text = f"{free / 1e6:,.0f} MB free in {folder}, at most {needed / 1e6:,.0f} MB are used"
    if free < needed:
        yield Finding("disk", Verdict.WARN, text, "Free space, or lower outbox.max_bytes.")
    else:
        yield Finding("disk", Verdict.OK, text)


def _failed(check: str, error: EdgewardenError) -> Finding:
    return Finding(check, Verdict.FAIL, str(error), error.hint, error.exit_code)
