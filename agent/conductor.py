"""Lets events flow: observations and readings to the monitors, events to the supervisor, commands to whoever acts.

Decides nothing: every event goes to the supervisor, every command comes from it, and is executed in order.
"""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from agent import VERSION
from agent.blueprint import Blueprint
from agent.clock import monotonic_ns, monotonic_s, wall_s
from agent.contract.errors import StorageError
from agent.contract.plan import EngineLoaded, EngineTrouble, FromWorker, Inherited, Ready, ServicePlan
from agent.decisions.events import (
    Activate,
    AgentStarted,
    AlarmKind,
    Command,
    Event,
    Level,
    Persist,
    Publish,
    RestartWindows,
    StartWorker,
    Tick,
    WorkerLost,
    WorkerReady,
)
from agent.decisions.updates import Selection
from agent.decisions.workers import CRASH_LIMIT
from agent.equipment import drift_left_behind, inheritance, succeed
from agent.generation import Patience, Phase
from agent.generations import Generations
from agent.intake import Records
from agent.memory import available_bytes
from agent.parts import MONITOR, SUPERVISOR, Parts
from agent.reporter import Reporter, add_up
from agent.steering import Pilot, Steering
from agent.updater import Told

SAVE_MONITORS_S = 30.0
RESERVE_S = 60.0
WORKER_BYTES = 128 * 1024 * 1024  # of a worker nobody has measured yet
SPARE_BYTES = 16 * 1024 * 1024
FAR_S, FAR_REQUESTS = 86_400.0, 16


class DecisionClock:
    """Whose time decides: the wall's, or the newest timestamp of the data (which never goes back).

    A timestamp more than FAR_S ahead is a client's mistake, until FAR_REQUESTS in a row agree on it: then the sensor
    was off for so long. The first one since the start is believed.
    """

    def __init__(self, source: str, newest_s: float) -> None:
        self._of_data = source == "data"
        self._newest_s = newest_s
        self._bound_s = math.inf  # how far the next timestamp may lie
        self._far_s, self._far_requests = math.inf, 0
        self.ignored = 0  # requests

    def now_s(self) -> float:
        return self._newest_s if self._of_data else wall_s()

    def slices(self, records: Records) -> Iterator[Records]:
        """Whole batches by the wall clock; by the data's, one slice per second of data, the clock moving along."""
        if not self._of_data or not len(records):
            yield records
            return
        times_s = np.where(np.isfinite(records["data_time_s"]), records["data_time_s"], -1.0)
        for part in np.split(np.arange(len(records)), np.flatnonzero(np.diff(np.floor(times_s))) + 1):
            if times_s[part[0]] >= 0.0:
                self._see(float(times_s[part].max()), int(np.count_nonzero(records["row"][part] == 0)))
            yield records[part[0] : part[-1] + 1]

    def _see(self, time_s: float, requests: int) -> None:
        if time_s > self._bound_s:
            self._far_requests = requests + (self._far_requests if abs(time_s - self._far_s) <= FAR_S else 0)
            self._far_s = time_s
            if self._far_requests < FAR_REQUESTS:
                self.ignored += requests
                return
        self._far_requests = 0
        self._newest_s = max(self._newest_s, time_s)
        self._bound_s = self._newest_s + FAR_S


@dataclass(slots=True)
class _Change:
    """Another equipment on its way; `number`: of the generation that comes with it."""

    selection: Selection
    blueprints: tuple[Blueprint, ...]
    told: Told
    number: int = 0
    losses: int = 0
    worker_wanted: bool = False  # the present equipment lost its worker meanwhile


class Conductor:
    """Owned by the event loop."""

    def __init__(self, parts: Parts, environment: Mapping[str, str]) -> None:
        self._parts = parts
        worker = parts.config.worker
        self.clock = DecisionClock(parts.config.clock.source, float(parts.supervisor.state()["now_s"]))
        self.reporter = Reporter(parts.config.topics, parts.outbox, parts.link)
        self.steering = self._make_steering()
        self._change: _Change | None = None
        self._until_ready: list[Told] = []
        self.generations = Generations(
            parts.doors.serving,
            parts.intake,
            Patience(worker.start_timeout_s, worker.ping_interval_s, worker.missed_pings, worker.drain_timeout_s),
            environment,
            first_number=1,
            on_frame=self._frame,
            on_lost=self._worker_lost,
            admits=self._admits,
            fits_beside=self._fits_beside,
        )
        self._window_from_s = wall_s()
        self._told_totals: dict[str, int] = {}  # what telemetry windows have counted already
        self._start_timer: asyncio.TimerHandle | None = None
        self._next_read: asyncio.Handle | None = None
        self._stopping = False
        self._unsaved: dict[str, Any] | None = None
        self._usable: dict[str, tuple[str, ...]] = {}
        self.loaded: dict[tuple[str, str], EngineLoaded] = {}  # of the newest worker, by service and engine
        self._told_ready = False
        self._consulted: dict[str, tuple[int, tuple[str, ...]]] = {}  # by service: worker, engines
        self._next_save_s = self._next_reserve_s = 0.0
        self.faults = 0  # of our own, counted by the process's loop

    # --- begin and end --------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Say who we are and let the supervisor ask for the first worker."""
        parts = self._parts
        names, addresses = ", ".join(parts.supervisor.services), ", ".join(parts.doors.addresses)
        parts.journal.notice(
            "agent.started", f"Edgewarden {VERSION} serves {names} on {addresses}",
            boot=parts.outbox.boot, pid=parts.process_id,
        )  # fmt: skip
        parts.notifier.starting(parts.config.worker.start_timeout_s + 10.0)
        self.reporter.presence("online", "started")
        self.tell_birth()
        self.handle(AgentStarted())
        for monitor in parts.monitors.values():
            self._handle_all(monitor.announce())
        for problem in (*parts.problems, *(problem for one in parts.blueprints for problem in one.problems)):
            self._execute(Publish("error", "engine", problem))
        if parts.store.set_aside:
            text = f"the agent's state was damaged and is set aside in {parts.store.set_aside}"
            self._execute(Publish("error", "health", text))
        self.steering.begin()

    def tell_birth(self) -> None:
        """Say what this device is and carries: at the start, on change, on request."""
        parts, config = self._parts, self._parts.config
        digests = {plan.engine: plan.digest for one in parts.blueprints for plan in one.plan.engines}
        can = [name for name, on in (("update", config.update.enabled), ("samples", config.samples.allow)) if on]
        self.reporter.birth(
            parts.vitals.info, runtime=metadata.version("onnxruntime"), artifacts=digests, capabilities=can
        )

    async def end(self) -> None:
        """Let the workers finish, then keep and tell the last things."""
        self._stopping = True
        if self._start_timer:
            self._start_timer.cancel()
        await self.generations.stop()
        if self._next_read:
            self._next_read.cancel()
        self._read_what_waits()
        self.save_monitors()
        self._save(self._parts.supervisor.state())
        self.send_telemetry()
        self.reporter.presence("offline", "stopped")

    def note_fault(self, error: Exception) -> None:
        """A fault of ours, met in some loop of the process: counted and told, and serving goes on."""
        self.faults += 1
        frames = traceback.extract_tb(error.__traceback__)
        where = frames[-1] if frames else None
        self._parts.journal.critical(
            "agent.fault", f"a fault of the agent: {type(error).__name__}: {error}",
            file=Path(where.filename).name if where else "", line=(where.lineno or 0) if where else 0,
            count=self.faults,
        )  # fmt: skip

    # --- beats ----------------------------------------------------------------------------------------------
    def read_observations(self) -> None:
        """One bounded read; while many wait the next follows after whatever else the loop has to do."""
        self._read_once()
        if self._next_read is None and self._parts.intake.in_arrears:
            self._next_read = asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        self._next_read = None
        self.read_observations()

    def _read_what_waits(self) -> None:
        """Everything that was written before this call; what comes meanwhile waits for the next beat."""
        for _ in range(self._parts.intake.reads_behind()):
            self._read_once()

    def _read_once(self) -> None:
        records, gaps = self._parts.intake.read(monotonic_ns())
        tallies = self._parts.intake.take_tallies()
        for monitor in self._parts.monitors.values():
            monitor.count(tallies)
        for part in self.clock.slices(records):
            for monitor in self._parts.monitors.values():
                self._handle_all(monitor.observe(part, gaps=gaps, counted=True))
            gaps = 0
        self._consult()

    def _consult(self) -> None:
        """Tell the worker whom to ask besides, when that is another one or the worker is."""
        current = self.generations.current
        if current is None:
            return
        for name, monitor in self._parts.monitors.items():
            wanted = (current.number, monitor.witnesses)
            if wanted != self._consulted.get(name, (current.number, ())):
                self.generations.consult(name, monitor.witnesses)
            self._consulted[name] = wanted

    def tick(self) -> None:
        current = self.generations.current
        vital = self._parts.vitals.sample(
            monotonic_s(), [self._parts.process_id, *([current.pid] if current else [])]
        )
        self._handle_all(
            self._parts.device_monitor.observe(
                power_w=vital.power.watts if vital.power.measured else None,  # an estimate raises no alarm
                temperature_c=vital.heat.temperature_c,
                memory_bytes=vital.usage.resident_bytes,
            )
        )
        self.handle(Tick())
        if self._unsaved is not None:
            self._save(self._unsaved)
        self.steering.tick()
        link = self._parts.link
        self._parts.outbox.tidy(wall_s(), skip_ids=link.on_their_way() if link else ())
        now_s = monotonic_s()
        if now_s >= self._next_save_s:
            self._next_save_s = now_s + SAVE_MONITORS_S
            self.save_monitors()
        if now_s >= self._next_reserve_s:
            self._next_reserve_s = now_s + RESERVE_S
            self._parts.store.keep_reserve()
        self._tell_manager()

    def _tell_manager(self) -> None:
        """Readiness once, then a sign of life: reaching this line proves that the loop turns."""
        words = "; ".join(
            f"{name}: {self._parts.supervisor.serving(name)} serves" for name in self._parts.supervisor.services
        )
        current = self.generations.current
        serving = current is not None and current.phase is Phase.SERVING
        status = words if serving else "no worker serves"
        if not self._told_ready and (serving or self.generations.statistics()["lost"]):
            self._told_ready = True
            self._parts.notifier.ready(status)
        elif self._told_ready:
            self._parts.notifier.status(status)
        self._parts.notifier.alive()

    def send_telemetry(self) -> None:
        fields = add_up((name, monitor.take_window()) for name, monitor in self._parts.monitors.items())
        outbox = self._parts.outbox.statistics()
        totals = {
            "outbox.dropped": int(outbox["dropped"] + outbox["expired"] + outbox["refused"]),
            "outbox.unwanted": int(outbox["unwanted"]),
            "ring.gaps": self._parts.intake.statistics()["gaps"],
            "agent.faults": self.faults,
            "clock.ignored": self.clock.ignored,
        }
        fields["counters"] |= {name: total - self._told_totals.get(name, 0) for name, total in totals.items()}
        self._told_totals = totals
        rows = sum(count for name, count in fields["counters"].items() if name.endswith(".rows"))
        fields["power"] = self._parts.vitals.take_power_window(inferences=rows)
        fields["gauges"] = self._parts.vitals.gauges()
        fields["health"] = {
            name: self._parts.supervisor.health(name).value for name in self._parts.supervisor.services
        }
        to_s = wall_s()
        self.reporter.telemetry(from_s=self._window_from_s, to_s=to_s, fields=fields)
        self._window_from_s = to_s

    # --- events and commands --------------------------------------------------------------------------------
    def _handle_all(self, events: list[Event]) -> None:
        for event in events:
            self.handle(event)

    def handle(self, event: Event) -> None:
        for command in self._parts.supervisor.handle(event, self.clock.now_s()):
            self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case Persist(state=state):
                self._save(state)
            case Activate():
                self._activate(command)
            case RestartWindows(service=service, engine=engine):
                self._parts.monitors[service].restart_windows(engine)
            case StartWorker(not_before=not_before, reason=reason):
                self._schedule_worker(max(0.0, not_before - self.clock.now_s()), reason)
            case Publish():
                self._parts.journal.say(
                    command.severity, f"event.{command.kind}", command.text,
                    service=command.service, channels=",".join(command.channels),
                )  # fmt: skip
                self.reporter.event(command, decision_time_s=self.clock.now_s())

    def _activate(self, wanted: Activate) -> None:
        if wanted.engine in self._usable.get(wanted.service, ()):  # else the next command names one that is
            self.generations.prefer(wanted.service, wanted.engine, wanted.reason)
            text = f"{wanted.engine} answers {wanted.service}: {wanted.reason}"
            self._parts.journal.notice("engine.activated", text, why=wanted.why)
        self.report()

    def _save(self, state: dict[str, Any]) -> None:
        try:
            self._parts.store.put_value(SUPERVISOR, state, durable=True)
        except StorageError as error:  # the device must act all the same; the newest state is tried again each tick
            self._unsaved = state
            self._parts.journal.error("state.unsaved", error.sentence(), code=error.code)
        else:
            self._unsaved = None

    def save_monitors(self) -> None:
        try:
            for name, monitor in self._parts.monitors.items():
                self._parts.store.put_value(MONITOR + name, monitor.state())
        except StorageError as error:
            self._parts.journal.error("state.unsaved", error.sentence(), code=error.code)

    def report(self) -> None:
        """Publish what runs now, and how far an update got."""
        keys = ("serving", "preferred", "phase", "why", "reason", "since_s", "health", "pin")
        services = {}
        for blueprint in self._parts.blueprints:
            decided = self._parts.supervisor.status(blueprint.name)
            engines = blueprint.plan.engines
            services[blueprint.name] = {
                "active": decided["serving"], **{key: decided[key] for key in keys},
                "versions": {plan.engine: plan.version for plan in engines},
                "digests": {plan.engine: plan.digest for plan in engines},
            }  # fmt: skip
        self.reporter.reported(services, self.steering.reported())

    # --- another equipment ----------------------------------------------------------------------------------
    def change(self, selection: Selection, blueprints: tuple[Blueprint, ...], told: Told) -> None:
        """Let this selection serve; `told` hears when it does, or why it does not and the present one stays."""
        self._give_up_change("superseded", "another selection was chosen")
        if selection == self._parts.equipment.selection:
            current = self.generations.current
            if current is not None and current.phase is Phase.SERVING:
                told("", "")
            else:
                self._until_ready.append(told)
            return
        self._change = _Change(selection, blueprints, told)
        self._start_change(self._change)

    def _start_change(self, change: _Change) -> None:
        change.number = self._start_generation(tuple(one.plan for one in change.blueprints))

    def _admits(self, number: int, ready: Ready) -> bool:
        """A comer with another equipment takes over only if every engine of it works."""
        change = self._change
        if change is None or number != change.number:
            return True
        broken = [loaded for loaded in ready.engines if not loaded.golden_ok]
        if broken:
            self._give_up_change(broken[0].error_code or "golden_mismatch", broken[0].error)
        return not broken

    def _give_up_change(self, code: str, text: str) -> None:
        change, self._change = self._change, None
        if change is None:
            return
        change.told(code, text)
        unserved = self.generations.current is None and not self.generations.is_starting
        if (change.worker_wanted or unserved) and self._change is None and not self._stopping:
            self._start_worker()

    def _put_on(self, change: _Change, usable: dict[str, tuple[str, ...]]) -> None:
        """The comer takes over: from here on its equipment is what is watched and decided about."""
        if self._start_timer:
            self._start_timer.cancel()
        self._read_what_waits()
        self.send_telemetry()  # windows never span two references
        parts, before = self._parts, self._parts.equipment
        after = succeed(before, change.selection, change.blueprints)
        parts.equipment = after
        parts.intake.renumber([one.plan.engines for one in after.blueprints])
        self._usable = usable
        for service in drift_left_behind(before, after):
            text = "another reference is watched now: drift is judged anew"
            details = {"raised": False, "alarm": AlarmKind.DRIFT.value, "level": Level.OK.value}
            self._execute(Publish("notice", "drift", text, service, details=details))
        for event in inheritance(before, after):
            self.handle(event)

    # --- workers --------------------------------------------------------------------------------------------
    def _make_steering(self) -> Steering:
        parts = self._parts
        pilot = Pilot(
            change=self.change, report=self.report, publish=self._execute, decide=self.handle,
            tell_birth=self.tell_birth, note_fault=self.note_fault,
            statuses=lambda: {name: parts.supervisor.status(name) for name in parts.supervisor.services},
        )  # fmt: skip
        return Steering(parts, self.reporter, pilot)

    def _schedule_worker(self, pause_s: float, reason: str) -> None:
        if self._start_timer:
            self._start_timer.cancel()
        self._parts.journal.info("worker.wanted", reason, pause_s=pause_s)
        self._start_timer = asyncio.get_running_loop().call_later(pause_s, self._start_worker)

    def _start_worker(self) -> None:
        self._start_timer = None
        if self._change is not None:  # the one that comes with another equipment will do
            self._change.worker_wanted = True
        elif self.generations.coming != self._services():  # else it will do: it is further than another one would be
            self._start_generation(self._services())

    def _services(self) -> tuple[ServicePlan, ...]:
        """What a worker is to load now."""
        return tuple(one.plan_of(self._parts.supervisor.lineup(one.name)) for one in self._parts.blueprints)

    def renew(self) -> int:
        """A new worker for what serves now; its number, or 0: one with another equipment is on its way."""
        if self._change is not None:
            return 0
        if self._start_timer:
            self._start_timer.cancel()
        self._start_timer = None
        return self._start_generation(self._services())

    def _fits_beside(self, worker_bytes: float) -> bool:
        """Whether there is memory for two workers at once, as far as anybody knows."""
        handover = self._parts.config.serving.handover
        available = available_bytes()
        needed = (worker_bytes or WORKER_BYTES) + SPARE_BYTES
        fits = handover == "beside" or (handover == "auto" and (available is None or available >= needed))
        if not fits:
            text = "the worker gives way to the next one: clients wait meanwhile"
            self._parts.journal.notice("worker.lean", text, needed_bytes=needed, available_bytes=available)
        return fits

    def _start_generation(self, services: tuple[ServicePlan, ...]) -> int:
        number = self.generations.start(
            services,
            max_body_bytes=self._parts.config.serving.max_body_bytes,
            stuck_after_s=self._parts.config.worker.stuck_after_s,
            cpus=self._parts.config.serving.cpus,
        )
        self._parts.journal.info("worker.starting", "a worker loads its engines", generation=number)
        return number

    def _frame(self, number: int, frame: FromWorker) -> None:
        match frame:
            case Ready():
                self._worker_ready(frame)
            case EngineTrouble():
                self._parts.journal.warning(
                    "engine.trouble", frame.text,
                    service=frame.service, engine=frame.engine, code=frame.code, count=frame.count,
                )  # fmt: skip
            case Inherited():
                self._parts.journal.info(
                    "worker.inherited", f"worker {number} has taken over what {frame.generation} left",
                    connections=frame.connections, streams=frame.streams, refused=frame.refused, lost=frame.lost,
                )  # fmt: skip
            case _:
                self._parts.journal.debug("worker.frame", str(frame), generation=number)

    def _worker_ready(self, ready: Ready) -> None:
        change = self._change if self._change is not None and self._change.number == ready.generation else None
        usable: dict[str, tuple[str, ...]] = {one.name: () for one in self._parts.blueprints}
        self.loaded = {(loaded.service, loaded.engine): loaded for loaded in ready.engines}
        for loaded in ready.engines:
            if loaded.note:
                self._parts.journal.warning(
                    "engine.provider", loaded.note, service=loaded.service, engine=loaded.engine
                )
            if loaded.golden_ok:
                usable[loaded.service] += (loaded.engine,)
            else:
                self._parts.journal.error(
                    "engine.unusable", loaded.error, service=loaded.service, engine=loaded.engine
                )
        self._parts.journal.notice("worker.ready", "a worker is ready", generation=ready.generation, pid=ready.pid)
        if change is not None:
            self._change = None
            self._put_on(change, usable)
        self._usable = usable
        self.handle(WorkerReady(ready.generation, usable))
        if change is not None:
            self.tell_birth()
        waiting, self._until_ready = self._until_ready, []
        for told in [*waiting, *([change.told] if change else [])]:
            # not from inside the hand-over: it serves when this is heard
            asyncio.get_running_loop().call_soon(told, "", "")

    def _worker_lost(self, number: int, reason: str) -> None:
        change = self._change
        if change is not None and number == change.number:
            self._comer_lost(change, reason)
            return
        self._parts.journal.error("worker.lost", f"worker {number} is gone: {reason}", generation=number)
        self._read_what_waits()  # what it did before it ended
        if not self._stopping:
            served = int(self._parts.supervisor.statistics()["generation"])
            if served and not (self.generations.current or self.generations.is_starting):
                number = served  # the one that gave way is not there to go on serving
            self.handle(WorkerLost(number, reason))
            self.steering.worker_lost(reason)

    def _comer_lost(self, change: _Change, reason: str) -> None:
        """The worker that should take over ended before it was ready: an accident, until it happens again."""
        self._parts.journal.warning("worker.lost", f"the worker of another selection is gone: {reason}")
        change.losses += 1
        if self._stopping:
            return
        if change.losses >= CRASH_LIMIT:
            self._give_up_change("crashed", f"its worker ended {change.losses} times before it was ready: {reason}")
        else:
            self._start_change(change)
