"""How a director steers this device: from the link to orders, and on to the updater and the commands.

    desired -> orders -> updater          cmd/<op> -> orders -> commands -> res/<op>          ack -> outbox

Builds these parts from the configuration and gives them their threads; decides nothing. Without [update] only the
host's acknowledgements are listened to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.blueprint import Blueprint
from agent.chores import Chores
from agent.clock import monotonic_s, wall_s
from agent.commands import Commands, Crew
from agent.config import AgentConfig
from agent.contract.errors import StorageError
from agent.decisions.events import Event, Publish
from agent.decisions.lifecycle import Limits
from agent.decisions.updates import Selection
from agent.enrolment import ENROLMENT, Enrolment
from agent.orders import Handlers, Keys, Orders
from agent.ota.installer import Installer
from agent.parts import Parts
from agent.reporter import Reporter
from agent.session import Inbound
from agent.updater import Hooks, Told, Updater

FOLLOWS_HOST = "follows_host"  # name of a value in the store
MAX_ACK_BYTES = 64 * 1024
MAX_BOOTS = 1000


@dataclass(frozen=True, slots=True)
class Pilot:
    """What the process does for a director, on the event loop; see `agent.conductor`."""

    change: Callable[[Selection, tuple[Blueprint, ...], Told], None]
    report: Callable[[], None]
    publish: Callable[[Publish], None]
    decide: Callable[[Event], None]
    tell_birth: Callable[[], None]
    note_fault: Callable[[Exception], None]
    statuses: Callable[[], Mapping[str, Mapping[str, Any]]]


class Steering:
    """Owned by the event loop."""

    def __init__(self, parts: Parts, reporter: Reporter, pilot: Pilot) -> None:
        self._parts = parts
        self._pilot = pilot
        self._reporter = reporter
        errands = Chores("ew-errand", on_fault=pilot.note_fault)
        self._enrolment = Enrolment(parts.config, parts.store, errands, self._enrolled)
        self._unreadable_marks = 0
        self.updater: Updater | None = None
        self._orders: Orders | None = None
        if parts.installer is not None:
            self.updater = self._make_updater(parts.installer)
            commands = Commands(parts.config, errands, self._crew(self.updater), reporter)
            self._orders = self._make_orders(parts.installer, self.updater, commands)

    def begin(self) -> None:
        """Take up a former process's update, and listen."""
        parts, topics = self._parts, self._parts.config.topics
        if self.updater is not None:
            self.updater.begin(parts.equipment.selection, problem=next(iter(parts.problems), ""))
        if self._follows_host():
            parts.outbox.follow_host()
        self._enrolment.begin()
        if parts.link is not None:
            orders = [topics.desired, f"{topics.base}/cmd/+"] if self._orders else []
            parts.link.listen([*orders, topics.acknowledged], self._arrived)

    def tick(self) -> None:
        """About once a second."""
        self._enrolment.tick()
        self._reporter.gaps(self._parts.outbox.gaps())
        if self._orders is not None and self.updater is not None:
            self._orders.tick()
            self.updater.tick()

    def worker_lost(self, reason: str) -> None:
        """The serving worker is gone."""
        if self.updater is not None:
            self.updater.worker_lost(reason)

    def reported(self) -> dict[str, Any]:
        return self.updater.reported() if self.updater else {}

    def status(self) -> dict[str, Any]:
        """How updates, orders and enrolment stand; `state` "off" = this device is not updated."""
        orders = self._orders.statistics() if self._orders else {"accepted": 0, "refused": {}, "waiting": 0}
        update = self.updater.status() if self.updater else {"state": "off"}
        marks = {"unreadable": self._unreadable_marks}
        return {**update, "orders": orders, "enrolment": self._enrolment.status(), "acknowledgements": marks}

    # --- what arrives ---------------------------------------------------------------------------------------
    def _arrived(self, inbound: Inbound) -> None:
        topics = self._parts.config.topics
        if inbound.topic == topics.acknowledged:
            self._acknowledged(inbound.payload)
        elif self._orders is None:
            pass
        elif inbound.topic == topics.desired:
            self._orders.take_desired(inbound.payload)
        else:
            op = inbound.topic.removeprefix(f"{topics.base}/cmd/")
            self._orders.take_command(op, inbound.payload, inbound.correlation)

    def _acknowledged(self, payload: bytes) -> None:
        """The host's watermark, unsigned: who forges it can only make us forget what was sent already."""
        try:
            committed = json.loads(payload)["committed"] if len(payload) <= MAX_ACK_BYTES else {}
            marks = {str(boot): int(seq) for boot, seq in list(committed.items())[:MAX_BOOTS]}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            self._unreadable_marks += 1
            return
        if self._parts.config.outbox.delete_after == "host":
            self._follow_host()
            self._parts.outbox.acknowledge(marks)

    # --- who deletes ----------------------------------------------------------------------------------------
    def _follows_host(self) -> bool:
        if self._parts.config.outbox.delete_after != "host":
            return False
        try:
            return bool(self._parts.store.value(FOLLOWS_HOST) or self._parts.store.value(ENROLMENT))
        except StorageError:
            return False

    def _follow_host(self) -> None:
        if self._parts.outbox.follows_host:
            return
        self._parts.outbox.follow_host()
        try:
            self._parts.store.put_value(FOLLOWS_HOST, value=True)
        except StorageError as error:
            self._parts.journal.warning("state.unsaved", error.sentence(), code=error.code)

    def _enrolled(self, said: Publish, *, done: bool) -> None:
        self._pilot.publish(said)
        if not done:
            return
        if self._follows_host():
            self._follow_host()
        self._reporter.presence_again()  # the host refused what is retained while it did not know us
        self._pilot.tell_birth()
        self._pilot.report()

    # --- making ---------------------------------------------------------------------------------------------
    def _make_updater(self, installer: Installer) -> Updater:
        parts, pilot = self._parts, self._pilot
        hooks = Hooks(pilot.change, pilot.report, pilot.publish, pilot.statuses)
        chores = Chores("ew-update", on_fault=pilot.note_fault)
        return Updater(
            parts.store, parts.journal, chores, installer, parts.depot, limits=limits_of(parts.config), hooks=hooks
        )

    def _make_orders(self, installer: Installer, updater: Updater, commands: Commands) -> Orders:
        config = self._parts.config

        def ask(repository: str) -> Keys:
            asked_s = monotonic_s()
            services = [section.name for section in config.service]
            keys = installer.directors(repository, wall_s=wall_s(), families=services)
            return Keys(keys, installer.authority.marks().floor_s, asked_s)

        return Orders(
            config.device.id, self._parts.store, Chores("ew-trust", on_fault=self._pilot.note_fault), ask=ask,
            repository=lambda: config.update.repository or self._enrolment.repository or updater.repository,
            handlers=Handlers(updater.desired, commands.obey, commands.refused, updater.waiting),
        )  # fmt: skip

    def _crew(self, updater: Updater) -> Crew:
        pilot = self._pilot
        return Crew(
            roll_back=updater.roll_back_as_ordered, decide=pilot.decide, tell_birth=pilot.tell_birth,
            report=pilot.report, publish=pilot.publish, refused=updater.refused,
            shape=self._shape, engines=self._engines,
        )  # fmt: skip

    def _engines(self, service: str) -> tuple[str, ...]:
        found = [one.policy.engines for one in self._parts.blueprints if one.name == service]
        return found[0] if found else ()

    def _shape(self, service: str) -> tuple[int, ...] | None:
        """Of one row of the service's first input; None = no such service."""
        for one in self._parts.blueprints:
            if one.name == service and one.artifacts[0].manifest.inputs:
                return tuple(one.artifacts[0].manifest.inputs[0].shape[1:])
        return None


def limits_of(config: AgentConfig) -> Limits:
    """The lifecycle's limits as configured."""
    window = config.update.window
    if not window:
        return Limits(probation_s=config.update.probation_s)
    begin_s, end_s = (60.0 * (60 * int(text[:2]) + int(text[3:])) for text in window.split("-"))
    return Limits(probation_s=config.update.probation_s, window_s=(begin_s, end_s))
