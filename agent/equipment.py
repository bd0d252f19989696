"""What serves: a selection of artifacts, and the blueprints, decisions and monitors made for it.

    depot       where artifacts lie: the factory's (from the configuration) and those in slots
    equipment   one selection with everything built for it; replaced as a whole, never changed

Promises: there is always something to serve as long as any model of this device is sound; a new equipment keeps
what it knows of the world (broken sensors, heat, an operator's pin) and forgets what it knew of replaced engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.blueprint import Blueprint, configured_folders, draw_up
from agent.config import AgentConfig, ServiceSection
from agent.contract.artifact import MANIFEST, open_artifact, parse_manifest, sha256
from agent.contract.errors import ArtifactError, Corrupt, EdgewardenError, Incompatible, Unavailable
from agent.decisions.events import AlarmKind, AlarmRaised, Event, Level, Pinned
from agent.decisions.supervisor import Supervisor
from agent.decisions.updates import Choice, Selection
from agent.monitor import Monitor
from agent.ota.slots import Pointer, Slots

OF_THE_DEVICE = frozenset({AlarmKind.POWER, AlarmKind.THERMAL, AlarmKind.MEMORY})


@dataclass(frozen=True, slots=True)
class Equipment:
    """`selection`: service -> artifacts by digest; monitors by service."""

    selection: Selection
    blueprints: tuple[Blueprint, ...]
    supervisor: Supervisor
    monitors: Mapping[str, Monitor]

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(plan.digest for one in self.blueprints for plan in one.plan.engines)


def succeed(before: Equipment, selection: Selection, blueprints: tuple[Blueprint, ...]) -> Equipment:
    """The next equipment: monitors go on where they fit, decisions start anew."""
    monitors = {}
    for one in blueprints:
        monitors[one.name] = Monitor(one.monitor, one.reference)
        if one.name in before.monitors:
            monitors[one.name].restore(before.monitors[one.name].state())
    return Equipment(selection, blueprints, Supervisor([one.policy for one in blueprints]), monitors)


def inheritance(before: Equipment, after: Equipment) -> Iterator[Event]:
    """What the new supervisor has to be told: alarms about the device and the world, and pins."""
    for name in after.supervisor.services:
        known: dict[str, Any] = {"alarms": (), "pin": ""}
        if name in before.supervisor.services:
            known = before.supervisor.status(name)
        for alarm in known["alarms"]:
            if AlarmKind(alarm["kind"]) in OF_THE_DEVICE:
                yield AlarmRaised(
                    name, AlarmKind(alarm["kind"]), Level(alarm["level"]), tuple(alarm["channels"]),
                    text=alarm["text"], numbers=dict(alarm["numbers"]),
                )  # fmt: skip
        yield from after.monitors[name].announce(since="the update")
        if known["pin"]:
            yield Pinned(name, known["pin"])


def drift_left_behind(before: Equipment, after: Equipment) -> list[str]:
    """Services whose open drift alarm ends with its reference."""
    watched = {one.name: one.reference.digest() if one.reference else "" for one in after.blueprints}
    return [
        one.name
        for one in before.blueprints
        if any(alarm["kind"] == AlarmKind.DRIFT for alarm in before.supervisor.status(one.name)["alarms"])
        and one.reference is not None
        and one.reference.digest() != watched.get(one.name)
    ]


class Depot:
    """Finds artifacts by digest. Reading is blocking: in the update thread, or before the event loop runs."""

    def __init__(self, config: AgentConfig, slots: Slots | None) -> None:
        self._config = config
        self._slots = slots
        self.factory: dict[str, Path] = {}
        self.factory_selection: Selection = {}
        for section in config.service:
            self._take_in(section)

    def blueprints(self, selection: Selection) -> tuple[Blueprint, ...]:
        """Of exactly this selection; services it does not name stay as configured.

        Raises:
            Incompatible, Unavailable, Corrupt: something of it cannot be used here.
        """
        unknown = sorted(set(selection) - {section.name for section in self._config.service})
        if unknown:
            raise Incompatible(f"this device has no service '{unknown[0]}'")
        folders = {service: self._folders(choice) for service, choice in selection.items()}
        made = draw_up(self._config, folders)
        problems = [problem for one in made if one.name in selection for problem in one.problems]
        if problems:
            raise Incompatible(problems[0])
        return made

    def settle(self, pointer: Pointer) -> tuple[Selection, tuple[Blueprint, ...], list[str]]:
        """What to serve at a start: the current selection if it is sound, else the one before, else the factory's.

        Returns it with what was wrong with the better ones.

        Raises:
            ArtifactError: no model of this device can be used.
        """
        problems: list[str] = []
        for name, selection in (("current", pointer.current), ("previous", pointer.previous)):
            if selection is None:
                break  # the factory's
            try:
                return selection, self.blueprints(selection), problems
            except EdgewardenError as error:
                problems.append(f"the {name} selection cannot be served: {error.sentence()}")
        return self.factory_selection, draw_up(self._config), problems

    def recover(self, selection: Selection) -> tuple[Selection, tuple[Blueprint, ...]]:
        """As asked, or the factory's if it cannot be served any more. Raises: ArtifactError."""
        found, made, _ = self.settle(Pointer(selection))
        return found, made

    def label(self, digest: str) -> str:
        """Name and version of an artifact that is here, else the beginning of its digest."""
        folder = self._place(digest)
        try:
            manifest = parse_manifest((folder / MANIFEST).read_bytes()) if folder else None
        except (OSError, ArtifactError):
            manifest = None
        return f"{manifest.name} v{manifest.version}" if manifest else digest[:12]

    def models(self) -> frozenset[str]:
        """sha256 of every model that lies here, for pruning what was kept about others; other blobs may be in it."""
        found = set(self._slots.stored()) if self._slots is not None else set()
        for folder in self.factory.values():
            with contextlib.suppress(OSError, ArtifactError):
                found |= {blob.sha256 for blob in parse_manifest((folder / MANIFEST).read_bytes()).blobs.values()}
        return frozenset(found)

    def _take_in(self, section: ServiceSection) -> None:
        """Digests of what is configured; a manifest that cannot be read is told when it should serve."""
        artifacts = {}
        for folder in configured_folders(section):
            try:
                raw = (folder / MANIFEST).read_bytes()
                name = parse_manifest(raw).name
            except (OSError, ArtifactError):
                continue
            if name not in artifacts:
                artifacts[name] = sha256(raw)
                self.factory[sha256(raw)] = folder
        self.factory_selection[section.name] = Choice(artifacts, tuple(artifacts))

    def _folders(self, choice: Choice) -> tuple[Path, ...]:
        return tuple(self._folder(choice.artifacts[engine], engine) for engine in choice.order)

    def _folder(self, digest: str, engine: str) -> Path:
        folder = self._place(digest)
        if folder is None:
            raise Unavailable(f"the artifact {digest[:12]} of engine '{engine}' is not here")
        artifact = open_artifact(folder)
        if artifact.digest != digest:
            raise Corrupt(f"{folder} holds another manifest than {digest[:12]}")
        if artifact.manifest.name != engine:
            raise Incompatible(f"'{artifact.manifest.name}' was asked for as engine '{engine}'")
        return folder

    def _place(self, digest: str) -> Path | None:
        if self._slots is not None and self._slots.has(digest):
            return self._slots.path(digest)
        return self.factory.get(digest)
