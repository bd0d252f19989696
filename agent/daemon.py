"""The agent process: its life from the first beat to SIGTERM, and the desk that answers the admin socket.

Serving is the worker's: whatever happens here (a full disk, a broker that is down, a fault of ours) must not stop
it. Never imports the model runtime. Decides nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent import page
from agent.admin import Admin
from agent.blueprint import Blueprint
from agent.conductor import Conductor
from agent.config import load_config
from agent.contract.errors import InvalidRequest, UnknownModel
from agent.decisions.events import Pinned, Unpinned
from agent.journal import Journal, Severity, choose_style
from agent.link import Link
from agent.metrics import render
from agent.parts import Parts, build_parts

INTAKE_S = 0.05
TICK_S = 1.0


class Daemon:
    """One running agent."""

    def __init__(self, parts: Parts, environment: Mapping[str, str]) -> None:
        self._parts = parts
        self._conductor = Conductor(parts, environment)
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or the terminal goes away."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._met_fault)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stopping.set)
        admin = Admin(self._parts.doors.admin, self)
        await admin.start()
        self._conductor.begin()
        beats = self._start_beats()
        link = self._parts.link
        linking = asyncio.create_task(self._keep_linked(link), name="ew-link") if link else None
        await self._stopping.wait()
        self._parts.notifier.stopping()
        self._parts.journal.notice("agent.stopping", "finishing what is being answered")
        await _cancel(beats)
        await self._conductor.end()
        if link and linking:
            await link.stop()
            await _cancel([linking])
        await admin.stop()
        self._parts.journal.notice("agent.stopped", "stopped")

    # --- beats ----------------------------------------------------------------------------------------------
    def _start_beats(self) -> list[asyncio.Task[None]]:
        conductor, config = self._conductor, self._parts.config
        beats: list[tuple[str, float, Callable[[], None]]] = [
            ("intake", INTAKE_S, conductor.read_observations),
            ("tick", TICK_S, conductor.tick),
            ("workers", config.worker.ping_interval_s, conductor.generations.tend),
            ("telemetry", config.telemetry.interval_s, conductor.send_telemetry),
        ]
        return [asyncio.create_task(self._beat(every_s, work), name=f"ew-{name}") for name, every_s, work in beats]

    async def _beat(self, every_s: float, work: Callable[[], None]) -> None:
        """The process's loop: a fault of ours in one beat is told and counted, and the next beat comes."""
        while True:
            await asyncio.sleep(every_s)
            try:
                work()
            except Exception as error:  # noqa: BLE001 - serving goes on
                self._conductor.note_fault(error)

    async def _keep_linked(self, link: Link) -> None:
        while not self._stopping.is_set():
            try:
                await link.run()
            except Exception as error:  # noqa: BLE001 - as in _beat
                self._conductor.note_fault(error)
                await asyncio.sleep(TICK_S)

    def _met_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A fault of ours in a callback or an unwatched task."""
        error = context.get("exception")
        if isinstance(error, Exception):
            self._conductor.note_fault(error)
        else:
            loop.default_exception_handler(context)

    # --- the admin socket's desk ----------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        return page.status(self._sources())

    def metrics(self) -> str:
        return render(page.samples(self._sources()))

    def pin(self, service: str, engine: str) -> dict[str, Any]:
        """Raises: UnknownModel."""
        engines = self._blueprint(service).policy.engines
        if engine not in engines:
            raise UnknownModel(f"'{service}' has no engine '{engine}'", hint=f"It has: {', '.join(engines)}.")
        self._conductor.handle(Pinned(service, engine))
        return self._parts.supervisor.status(service)

    def unpin(self, service: str) -> dict[str, Any]:
        """Raises: UnknownModel."""
        self._blueprint(service)
        self._conductor.handle(Unpinned(service))
        return self._parts.supervisor.status(service)

    def roll_back(self) -> dict[str, Any]:
        """Raises: InvalidRequest: there is nothing to go back to."""
        updater = self._conductor.steering.updater
        if updater is None or not updater.roll_back("asked for by an operator"):
            raise InvalidRequest("there is no previous selection to go back to")
        return updater.status()

    def renew(self) -> dict[str, Any]:
        """A new worker for what serves now. Raises: InvalidRequest: one with other models is on its way."""
        number = self._conductor.renew()
        if number == 0:
            raise InvalidRequest("a worker with another selection of models is on its way")
        return {"generation": number}

    def _blueprint(self, service: str) -> Blueprint:
        for blueprint in self._parts.blueprints:
            if blueprint.name == service:
                return blueprint
        raise UnknownModel(
            f"there is no service '{service}'", hint=f"There is: {', '.join(self._parts.supervisor.services)}."
        )

    def _sources(self) -> page.Sources:
        conductor = self._conductor
        steering = conductor.steering.status()
        return page.Sources(
            self._parts, conductor.generations, conductor.clock.now_s(), conductor.faults, steering, conductor.loaded
        )


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run(config_file: Path, environment: Mapping[str, str]) -> int:
    """Build an agent from its configuration and let it live; returns the exit code. Raises: EdgewardenError."""
    config = load_config(config_file, environment).config
    style = choose_style(config.log.style, descriptor=sys.stderr.fileno(), environment=environment)
    journal = Journal(sys.stderr, style=style, least=Severity[config.log.level.upper()])

    async def live() -> None:
        parts = build_parts(config, config_file, journal, environment)
        try:
            await Daemon(parts, environment).run()
        finally:
            parts.close()

    asyncio.run(live())
    return 0
