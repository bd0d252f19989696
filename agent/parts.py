"""The long-lived parts of the agent process, built once from the configuration, in an order that fails early.

State folder first (another agent?), then the artifacts, then the link's secrets, then the sockets. What fails
leaves nothing behind: no lock, no socket file. Starts nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.blueprint import Blueprint, configured_runtime
from agent.clock import wall_s
from agent.config import AgentConfig, LinkSection
from agent.contract.errors import ConfigError, EdgewardenError, StateUnreadable
from agent.contract.messages import Status
from agent.decisions.supervisor import Supervisor
from agent.decisions.updates import Selection
from agent.equipment import Depot, Equipment
from agent.intake import Intake
from agent.journal import Journal
from agent.link import Link
from agent.modelcache import FOLDER as CACHE
from agent.modelcache import ModelCache
from agent.monitor import DeviceMonitor, Monitor
from agent.ota.installer import Installer, Site
from agent.ota.slots import POINTER, Pointer, Slots
from agent.outbox import Outbox
from agent.session import Broker, Will, make_tls
from agent.sockets import address_of, listen_tcp, listen_unix
from agent.store import Store
from agent.systemd import Manager, Notifier, read_environment
from agent.vitals import Vitals

PASSWORD_CREDENTIAL = "mqtt-password"  # noqa: S105 - a name, not a secret
ADMIN_SOCKET = "admin"  # FileDescriptorName= of a socket that is not for serving
SUPERVISOR, MONITOR = "supervisor", "monitor:"  # names of values in the store


@dataclass(frozen=True, slots=True)
class Doors:
    """Listening sockets; `files` are those we made and must remove."""

    serving: tuple[socket.socket, ...]
    admin: socket.socket
    files: tuple[Path, ...]

    @property
    def addresses(self) -> list[str]:
        """Where clients are served."""
        return [address_of(listener) for listener in self.serving]

    def close(self) -> None:
        for listener in (*self.serving, self.admin):
            listener.close()
        for path in self.files:
            path.unlink(missing_ok=True)


@dataclass(slots=True)
class Parts:
    """Everything that lives as long as the agent, but its workers. Owned by the event loop.

    `equipment` alone is replaced, by an update; `installer` None: this device is not updated.
    """

    config: AgentConfig
    config_file: Path
    journal: Journal
    notifier: Notifier
    store: Store
    depot: Depot
    installer: Installer | None
    equipment: Equipment
    problems: tuple[str, ...]  # why something better does not serve
    device_monitor: DeviceMonitor
    vitals: Vitals
    outbox: Outbox
    link: Link | None
    intake: Intake
    doors: Doors
    process_id: int = field(default_factory=os.getpid)
    started_at: float = field(default_factory=wall_s)

    @property
    def blueprints(self) -> tuple[Blueprint, ...]:
        return self.equipment.blueprints

    @property
    def supervisor(self) -> Supervisor:
        return self.equipment.supervisor

    @property
    def monitors(self) -> Mapping[str, Monitor]:
        return self.equipment.monitors

    def close(self) -> None:
        self.doors.close()
        self.intake.close_all()
        self.store.close()
        self.notifier.close()


def build_parts(config: AgentConfig, config_file: Path, journal: Journal, environment: Mapping[str, str]) -> Parts:
    """Take the state folder, verify the artifacts, bind the sockets.

    Raises:
        StateLocked, StorageError, ArtifactError, ConfigError
    """
    store = Store(config.state.folder, outbox_bytes=config.outbox.max_bytes)
    try:
        return _build(config, config_file, journal, environment, store)
    except EdgewardenError:
        store.close()
        raise


def _build(
    config: AgentConfig, config_file: Path, journal: Journal, environment: Mapping[str, str], store: Store
) -> Parts:
    manager = read_environment(environment, process_id=os.getpid())
    slots, pointer = _read_slots(config, journal)
    depot = Depot(config, slots)
    selection, blueprints, problems = depot.settle(pointer)
    ModelCache(config.state.folder / CACHE).prune(depot.models())
    installer = _make_installer(config, depot) if config.update.enabled else None
    equipment = _first_equipment(selection, blueprints, store, journal)
    budget = config.budget
    outbox = Outbox(
        store, boot=uuid.uuid4().hex[:12], max_bytes=config.outbox.max_bytes, max_age_s=config.outbox.max_age_s
    )
    return Parts(
        config=config,
        config_file=config_file,
        journal=journal,
        notifier=Notifier(environment),
        store=store,
        depot=depot,
        installer=installer,
        equipment=equipment,
        problems=tuple(problems),
        device_monitor=DeviceMonitor(
            equipment.supervisor.services,
            power_w=budget.power_w,
            temperature_c=budget.temperature_c,
            memory_bytes=budget.memory_bytes,
        ),
        vitals=Vitals(config.state.folder, watts_per_cpu=config.power.watts_per_cpu),
        outbox=outbox,
        link=_make_link(config, manager, outbox, journal) if config.link.enabled else None,
        intake=Intake([one.monitor.engines for one in blueprints]),
        doors=_open_doors(config, manager),
    )


def _read_slots(config: AgentConfig, journal: Journal) -> tuple[Slots | None, Pointer]:
    """What was installed here; a device that was never updated keeps no folders for it."""
    if not config.update.enabled and not (config.state.folder / POINTER).exists():
        return None, Pointer()
    slots = Slots(config.state.folder)
    try:
        return slots, slots.pointer()
    except StateUnreadable as error:
        journal.error("update.pointer", f"serving what is configured: {error.sentence()}")
        return slots, Pointer()


def _make_installer(config: AgentConfig, depot: Depot) -> Installer:
    update = config.update
    return Installer(
        Site(
            config.device.id, config.state.folder, Path(update.root), device_class=update.device_class,
            tls_ca=update.tls_ca, factory=depot.factory, max_artifact_bytes=update.max_artifact_bytes,
            runtimes={section.name: configured_runtime(config, section) for section in config.service},
        )
    )  # fmt: skip


def _first_equipment(
    selection: Selection, blueprints: tuple[Blueprint, ...], store: Store, journal: Journal
) -> Equipment:
    monitors = {one.name: _make_monitor(one, store, journal) for one in blueprints}
    return Equipment(selection, blueprints, _make_supervisor(blueprints, store, journal), monitors)


def _make_supervisor(blueprints: tuple[Blueprint, ...], store: Store, journal: Journal) -> Supervisor:
    policies = [blueprint.policy for blueprint in blueprints]
    try:
        return Supervisor(policies, store.value(SUPERVISOR))
    except StateUnreadable as error:  # decisions can be made anew; serving cannot wait
        journal.error("state.unreadable", f"starting with no memory of decisions: {error.sentence()}")
        return Supervisor(policies)


def _make_monitor(blueprint: Blueprint, store: Store, journal: Journal) -> Monitor:
    monitor = Monitor(blueprint.monitor, blueprint.reference)
    try:
        saved = store.value(MONITOR + blueprint.name)
        if saved:
            monitor.restore(saved)
    except (StateUnreadable, LookupError, TypeError, ValueError, AttributeError) as error:
        # written by another version: what it followed starts anew, half a memory would be worse
        journal.warning("monitor.anew", f"the monitor of {blueprint.name} starts with no memory: {error!r}")
        return Monitor(blueprint.monitor, blueprint.reference)
    return monitor


# --- the link ----------------------------------------------------------------------------------------------
def _make_link(config: AgentConfig, manager: Manager, outbox: Outbox, journal: Journal) -> Link:
    device, topics = config.device, config.topics
    broker = make_broker(config.link, manager, client_id=f"edgewarden-{device.fleet}-{device.id}")
    lost = Status(device=device.id, boot=outbox.boot, state="offline", reason="connection lost", at=wall_s())
    will = Will(topics.status, lost.encode())
    return Link(broker, outbox, journal, will=will, keep_unheard=config.outbox.keep_unheard)


def make_broker(link: LinkSection, manager: Manager, *, client_id: str) -> Broker:
    """The broker from the configuration, with its password read.

    Raises:
        ConfigError: the password file or a TLS file cannot be used.
    """
    password = manager.credential(PASSWORD_CREDENTIAL) or ""
    if link.password_file:
        try:
            password = Path(link.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read link.password_file {link.password_file}: {getattr(error, 'strerror', None) or error}"
            ) from None
    tls = make_tls(ca=link.tls_ca, certificate=link.tls_cert, key=link.tls_key)
    return Broker(link.host, link.port, client_id, link.username, password, tls, link.keepalive_s)


# --- the sockets -------------------------------------------------------------------------------------------
def _open_doors(config: AgentConfig, manager: Manager) -> Doors:
    """The service manager's serving sockets, else our own; the admin socket is always ours.

    Raises:
        ConfigError: nothing to listen on, or an address is taken; then nothing stays open.
    """
    files: list[Path] = []
    with contextlib.ExitStack() as undo:
        serving = [one for name, one in manager.sockets if name != ADMIN_SOCKET]
        if not serving:
            serving = _own_serving(config, files, undo)
        admin = listen_unix(config.admin_socket, mode=0o600)
        undo.pop_all()
    return Doors(tuple(serving), admin, (*files, config.admin_socket))


def _own_serving(config: AgentConfig, files: list[Path], undo: contextlib.ExitStack) -> list[socket.socket]:
    serving, listeners = config.serving, []
    if serving.tcp:
        listeners.append(undo.enter_context(listen_tcp(serving.tcp)))
    if serving.unix:
        path = Path(serving.unix)
        listeners.append(undo.enter_context(listen_unix(path, mode=int(serving.unix_mode, 8))))
        undo.callback(path.unlink, missing_ok=True)
        files.append(path)
    if not listeners:
        raise ConfigError("there is nothing to serve on", hint="Set serving.unix or serving.tcp.")
    return listeners
