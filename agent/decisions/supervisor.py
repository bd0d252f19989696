"""The one owner of all decisions: an event and the time go in, commands come out.

    supervisor = Supervisor(policies, state=saved or None)        # saved: the newest Persist.state
    for command in supervisor.handle(AgentStarted(), now_s): ...  # first; asks for the first worker
    for command in supervisor.handle(event, now_s): ...           # then whatever happens, and a Tick each second

What the executor must know:
- Commands are executed in order; a Persist comes first and must be durable before the rest.
- `StartWorker.not_before - now_s` is a pause: wait it on a monotonic clock, since a data clock stands still while
  no worker serves. Build the new worker from `lineup(service)`, with `serving(service)` active.
- Activate and RestartWindows while no worker is up may be dropped: WorkerReady activates every service again.
- After AgentStarted the monitor announces again what is wrong (`Monitor.announce`), because known alarms are dropped.
- `now_s` may jump back (a clock was set): all stored times move with it, elapsed times stay. A data clock starts
  at the saved `now_s`, else the first timestamp would end every dwell.

Published kinds: fallback, sensor, drift, power, engine, worker, health. Events of unknown services are counted
(`statistics`), never an error. Mutable, owned by one thread. What follows from what: `service.py`, `fallback.py`,
`health.py`, `workers.py`, `choice.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, assert_never

from agent.decisions import fallback, health, saved, service, workers
from agent.decisions.events import (
    BROKEN_INPUT,
    Activate,
    AgentStarted,
    AlarmCleared,
    AlarmKind,
    AlarmRaised,
    Command,
    DriftPersists,
    EngineFailed,
    EngineServed,
    Event,
    Level,
    Persist,
    Pinned,
    Publish,
    StartWorker,
    Tick,
    Unpinned,
    WorkerLost,
    WorkerReady,
)
from agent.decisions.fallback import Phase, Signal
from agent.decisions.health import Condition, State
from agent.decisions.service import PUBLISHED_AS, Bench, OpenAlarm, ServicePolicy, ServiceState
from agent.decisions.workers import CRASH_WINDOW_S, Workers

SEVERITY_OF_LEVEL = {
    Level.OK: "info",
    Level.WATCH: "notice",
    Level.DRIFT: "warning",
    Level.BROKEN_INPUT: "warning",
    Level.HARMFUL: "error",
}
SEVERITY_OF_HEALTH = {
    State.UNKNOWN: "info",
    State.HEALTHY: "notice",
    State.DEGRADED: "warning",
    State.FAILING: "error",
}


class Supervisor:
    """Services by name, in the order of `policies`.

    Raises:
        StateUnreadable: `state` was not written by a supervisor of this or an older version.
    """

    def __init__(self, policies: Iterable[ServicePolicy], state: dict[str, Any] | None = None) -> None:
        self._policies = {policy.service: policy for policy in policies}
        self._workers = Workers()
        self._services: dict[str, ServiceState] = {}
        self._now_s: float | None = None
        self._counts = {"events": 0, "ignored": 0, "switches": 0}
        if state is not None:
            self._now_s, self._workers, self._services = saved.read(state, self._policies)

    # --- asked by the composition root ---
    @property
    def services(self) -> tuple[str, ...]:
        return tuple(self._policies)

    def serving(self, service_name: str) -> str:
        """The engine that answers first now (the preferred one before the first event)."""
        state = self._services.get(service_name)
        return state.stay.engine if state else self._policies[service_name].preferred

    def lineup(self, service_name: str) -> tuple[str, ...]:
        """The engines the next worker should load, best first; never empty."""
        policy, state = self._policies[service_name], self._services.get(service_name)
        return policy.engines if state is None else service.lineup(policy, state, self._now_s or 0.0)

    def health(self, service_name: str) -> State:
        state = self._services.get(service_name)
        return state.health.state if state else State.UNKNOWN

    def state(self) -> dict[str, Any]:
        """What a restart needs, as JSON; the same document as Persist carries."""
        return saved.write(self._now_s or 0.0, self._workers, self._services)

    def statistics(self) -> dict[str, int]:
        return {**self._counts, "generation": self._workers.generation, "losses": len(self._workers.lost_s)}

    def status(self, service_name: str) -> dict[str, Any]:
        """One service for the status page and the `reported` document."""
        policy = self._policies[service_name]
        now_s = self._now_s or 0.0
        state = self._services.get(service_name) or service.start(policy, now_s)
        return saved.status(policy, state, now_s, worker=self._workers.word)

    # --- the one entry ---
    def handle(self, event: Event, now_s: float) -> tuple[Command, ...]:
        """Take in one event and return what must be done, in order."""
        self._counts["events"] += 1
        self._follow_clock(now_s)
        before = saved.durable(self._workers, self._services)
        commands, touched = self._absorb(event, now_s)
        for name in touched:
            commands += self._decide(name, now_s)
        if saved.durable(self._workers, self._services) != before:
            commands.insert(0, Persist(self.state()))
        return tuple(commands)

    def _follow_clock(self, now_s: float) -> None:
        for name, policy in self._policies.items():
            if name not in self._services:
                self._services[name] = service.start(policy, now_s)
        if self._now_s is not None and now_s < self._now_s:
            by_s = now_s - self._now_s
            self._workers = workers.shifted(self._workers, by_s)
            self._services = {name: saved.shifted(state, by_s) for name, state in self._services.items()}
        self._now_s = now_s
        self._workers = workers.calmed(self._workers, now_s)

    def _absorb(self, event: Event, now_s: float) -> tuple[list[Command], tuple[str, ...]]:
        """Write the facts of `event` into the state: what to say of them, and whom they may move."""
        match event:
            case Tick():
                return [], self.services
            case AgentStarted():
                return self._restart(now_s), self.services
            case WorkerReady():
                return self._worker_ready(event), self.services
            case WorkerLost():
                return self._worker_lost(event, now_s), self.services
            case _:
                if event.service not in self._services:
                    self._counts["ignored"] += 1
                    return [], ()
                return self._absorb_one(event, now_s), (event.service,)

    def _absorb_one(
        self,
        event: AlarmRaised | AlarmCleared | DriftPersists | EngineFailed | EngineServed | Pinned | Unpinned,
        now_s: float,
    ) -> list[Command]:
        match event:
            case AlarmRaised():
                return self._alarm_raised(event, now_s)
            case AlarmCleared():
                return self._alarm_cleared(event, now_s)
            case DriftPersists():
                return [_persisting(event)]
            case EngineFailed():
                return self._engine_failed(event, now_s)
            case EngineServed():
                return self._engine_served(event)
            case Pinned():
                return self._pinned(event)
            case Unpinned():
                self._update(event.service, pin="")
                return []
            case _:
                assert_never(event)

    # --- alarms ---
    def _alarm_raised(self, event: AlarmRaised, now_s: float) -> list[Command]:
        policy, state = self._policies[event.service], self._services[event.service]
        if event.kind is AlarmKind.ENGINE:
            return self._bench(event.service, event.engine, event.text or "engine alarm", now_s)
        known = _find(state, event)
        stale = event.engine not in {"", state.stay.engine}
        if stale or (known and (known.channels, known.level) == (event.channels, event.level)):
            self._counts["ignored"] += 1
            return []
        since_s = known.raised_s if known else now_s
        alarm = OpenAlarm(
            event.kind,
            event.level,
            event.channels,
            event.engine,
            since_s,
            event.text,
            dict(event.numbers),
            event.better,
        )
        others = tuple(other for other in state.alarms if other is not known)
        switching = event.kind in policy.switching
        state = self._update(
            event.service,
            alarms=(*others, alarm),
            pressed=event.kind if switching and event.kind in service.PRESSURE else None,
            **({"changed_s": now_s, "served": 0} if switching else {}),
        )
        details: dict[str, Any] = {"raised": True, "alarm": event.kind.value, "level": event.level.value}
        choice = service.choose_for_faults(policy, state, now_s) if event.kind in BROKEN_INPUT else None
        if choice is not None:
            details["decision"] = f"{state.pin} is pinned" if state.pin else choice.reason
        if event.better:
            details["better"] = event.better
        if event.explanation:
            details["explanation"] = event.explanation
        return [
            Publish(
                SEVERITY_OF_LEVEL[event.level], PUBLISHED_AS[event.kind], event.text or alarm.fault.sentence(),
                event.service, event.channels, dict(event.numbers), details,
            )
        ]  # fmt: skip

    def _alarm_cleared(self, event: AlarmCleared, now_s: float) -> list[Command]:
        policy, state = self._policies[event.service], self._services[event.service]
        known = _find(state, event)
        if known is None:
            self._counts["ignored"] += 1
            return []
        left = tuple(name for name in known.channels if event.channels and name not in event.channels)
        others = tuple(other for other in state.alarms if other is not known)
        switching = event.kind in policy.switching
        self._update(
            event.service,
            alarms=(*others, replace(known, channels=left)) if left else others,
            **({"changed_s": now_s, "served": 0} if switching else {}),
        )
        channels = event.channels or known.channels
        open_s = now_s - known.raised_s
        text = f"{' '.join((*channels, event.kind.value))} is over after {open_s:.0f} s"
        details = {"raised": False, "alarm": event.kind.value, "level": Level.OK.value}
        return [
            Publish("notice", PUBLISHED_AS[event.kind], text, event.service, channels, {"open_s": open_s}, details)
        ]

    # --- engines ---
    def _engine_served(self, event: EngineServed) -> list[Command]:
        policy, state = self._policies[event.service], self._services[event.service]
        if event.engine not in policy.engines or event.count <= 0:
            self._counts["ignored"] += 1
            return []
        served = state.served + (event.count if event.engine == state.stay.engine else 0)
        self._update(event.service, served=served, seen=True, outcomes=_counted(policy, state, event, "."))
        return []

    def _engine_failed(self, event: EngineFailed, now_s: float) -> list[Command]:
        policy, state = self._policies[event.service], self._services[event.service]
        if event.engine not in policy.engines or event.count <= 0:
            self._counts["ignored"] += 1
            return []
        before = state.outcomes.get(event.engine, "").count("x")
        state = self._update(event.service, seen=True, outcomes=_counted(policy, state, event, "x"))
        row = state.outcomes[event.engine]
        text = f"{event.engine} failed {row.count('x')} of its last {len(row)} requests ({event.code})"
        watched = state.stay.phase is Phase.PROBATION and event.engine == state.stay.engine
        if watched or row.count("x") >= policy.failures:
            return self._bench(event.service, event.engine, text, now_s)
        if before:
            return []
        numbers = {"failed": float(row.count("x")), "of_last": float(len(row))}
        return [Publish("notice", "engine", text, event.service, (), numbers, _engine_details(event))]

    def _bench(self, name: str, engine: str, why: str, now_s: float, *, unload: bool = False) -> list[Command]:
        """Keep `engine` from serving for one dwell; a pinned or already benched engine only stays where it is."""
        policy, state = self._policies[name], self._services[name]
        known = state.benched.get(engine)
        busy = known is not None and now_s < known.until_s and known.unload >= unload
        if engine not in policy.engines or busy or policy.card[engine].floor:
            return []
        until_s = now_s + fallback.next_dwell_s(state.stay, Signal.TROUBLE, policy.limits)
        self._update(name, benched={**state.benched, engine: Bench(until_s, why, unload)})
        numbers = {"bench_s": until_s - now_s}
        return [Publish("error", "engine", why, name, (), numbers, {"engine": engine, "benched": True})]

    def _pinned(self, event: Pinned) -> list[Command]:
        if event.engine not in self._policies[event.service].engines:
            self._counts["ignored"] += 1
            known = ", ".join(self._policies[event.service].engines)
            text = f"cannot pin '{event.engine}': {event.service} has {known}"
            return [Publish("warning", "fallback", text, event.service, details={"step": "pin-refused"})]
        self._update(event.service, pin=event.engine)
        return []

    # --- processes ---
    def _restart(self, now_s: float) -> list[Command]:
        self._workers = replace(self._workers, generation=0)
        for name, policy in self._policies.items():
            state = self._services[name]
            stay = fallback.step(
                state.stay, Signal.RESTART, now_s, policy.limits,
                engine=state.stay.engine, why=state.stay.why, reason=state.stay.reason,
            )  # fmt: skip
            self._update(
                name, stay=stay, health=health.restarted(state.health, now_s), alarms=(), changed_s=now_s,
                served=0, seen=False, usable=None, reload_asked=False,
            )  # fmt: skip
        return [StartWorker(now_s + workers.pause_s(self._workers), "the agent started")]

    def _worker_ready(self, event: WorkerReady) -> list[Command]:
        self._workers = workers.ready(self._workers, event.generation)
        commands: list[Command] = []
        for name, policy in self._policies.items():
            usable = tuple(engine for engine in policy.engines if engine in event.usable.get(name, ()))
            state = self._update(name, usable=usable, reload_asked=False)
            commands += self._said_of_loading(policy, usable)
            commands.append(Activate(name, state.stay.engine, state.stay.why, state.stay.reason))
        numbers = {"generation": float(event.generation)}
        return [Publish("info", "worker", f"worker {event.generation} serves", numbers=numbers), *commands]

    def _said_of_loading(self, policy: ServicePolicy, usable: tuple[str, ...]) -> list[Command]:
        missing = [engine for engine in self.lineup(policy.service) if engine not in usable]
        if not missing:
            return []
        severity = "error" if usable else "critical"
        text = f"{', '.join(missing)} could not be loaded or answered the golden inputs wrongly"
        return [
            Publish(severity, "engine", text, policy.service, details={"missing": missing, "usable": list(usable)})
        ]

    def _worker_lost(self, event: WorkerLost, now_s: float) -> list[Command]:
        if event.generation < self._workers.generation:
            self._counts["ignored"] += 1  # an older one that had already handed over
            return []
        self._workers = workers.lost(self._workers, event.generation, now_s)
        losses, pause_s = len(self._workers.lost_s), workers.pause_s(self._workers)
        text = f"worker {event.generation} was lost ({event.reason}), loss {losses} in {CRASH_WINDOW_S:.0f} s"
        numbers = {"generation": float(event.generation), "losses": float(losses), "pause_s": pause_s}
        commands: list[Command] = []
        replacement = self._workers.generation > 0
        for name in self.services:
            commands += self._blame(name, text, now_s, replacement=replacement)
        severity = "critical" if self._workers.looping else "error"
        commands.append(Publish(severity, "worker", text, numbers=numbers, details={"reason": event.reason}))
        return commands if replacement else [StartWorker(now_s + pause_s, text), *commands]

    def _blame(self, name: str, text: str, now_s: float, *, replacement: bool) -> list[Command]:
        """Bench what may have killed the worker: the engine reloaded or on probation; in a loop, the serving one."""
        policy, state = self._policies[name], self._services[name]
        if replacement:
            return self._refuse_reload(policy, state, text, now_s) if state.reload_asked else []
        if self._workers.looping:
            return self._bench(name, state.stay.engine, f"{state.stay.engine} served when {text}", now_s, unload=True)
        if state.stay.phase is Phase.PROBATION:
            return self._bench(name, state.stay.engine, f"on probation when {text}", now_s)
        return []

    def _refuse_reload(self, policy: ServicePolicy, state: ServiceState, text: str, now_s: float) -> list[Command]:
        engine = policy.preferred
        until_s = now_s + fallback.next_dwell_s(state.stay, Signal.REFUSED, policy.limits)
        stay = fallback.step(
            state.stay, Signal.REFUSED, now_s, policy.limits,
            engine=state.stay.engine, why=state.stay.why, reason=f"{engine} could not be loaded again: {text}",
        )  # fmt: skip
        benched = {**state.benched, engine: Bench(until_s, f"could not be loaded again: {text}", unload=True)}
        self._update(policy.service, stay=stay, benched=benched, reload_asked=False)
        return [Publish("error", "engine", stay.reason, policy.service, (), {"bench_s": until_s - now_s})]

    # --- consequences ---
    def _decide(self, name: str, now_s: float) -> list[Command]:
        policy = self._policies[name]
        state, commands = service.decide(policy, self._services[name], now_s)
        self._services[name] = state
        self._counts["switches"] += sum(isinstance(command, Activate) for command in commands)
        if service.wants_reload(policy, state, now_s):
            self._update(name, reload_asked=True, benched=service.without_bench(state, policy.preferred))
            commands.append(StartWorker(now_s, f"load {policy.preferred} again"))
        return commands + self._step_health(name, now_s)

    def _step_health(self, name: str, now_s: float) -> list[Command]:
        policy, state = self._policies[name], self._services[name]
        word = self._workers.word
        condition = service.condition(policy, state, now_s, worker=word)
        after = health.step(state.health, condition, now_s, settle_s=policy.settle_s)
        before = state.health.state
        self._update(name, health=after)
        if after.state is before:
            return []
        causes = service.complaints(policy, state, now_s, worker=word) if condition is not Condition.CLEAN else []
        text = f"{before.value} -> {after.state.value}" + (f": {'; '.join(causes)}" if causes else "")
        details = {"from": before.value, "to": after.state.value}
        return [Publish(SEVERITY_OF_HEALTH[after.state], "health", text, name, details=details)]

    def _update(self, name: str, **changes: Any) -> ServiceState:
        self._services[name] = replace(self._services[name], **changes)
        return self._services[name]


def _find(state: ServiceState, event: AlarmRaised | AlarmCleared) -> OpenAlarm | None:
    return next((alarm for alarm in state.alarms if (alarm.kind, alarm.engine) == (event.kind, event.engine)), None)


def _counted(
    policy: ServicePolicy, state: ServiceState, event: EngineFailed | EngineServed, mark: str
) -> dict[str, str]:
    row = state.outcomes.get(event.engine, "") + mark * min(event.count, policy.of_last)
    return {**state.outcomes, event.engine: row[-policy.of_last :]}


def _engine_details(event: EngineFailed) -> dict[str, Any]:
    return {"engine": event.engine, "code": event.code, "text": event.text}


def _persisting(event: DriftPersists) -> Publish:
    """What the host plans from: how long, and whether it looks like a broken sensor or like a new world."""
    what = f"mostly in {event.single_channel}" if event.single_channel else "in no single channel"
    beside = f", beside {', '.join(event.guards)}" if event.guards else ""
    details: dict[str, Any] = {
        "raised": True,
        "alarm": AlarmKind.DRIFT.value,
        "level": Level.DRIFT.value,
        "persisted_windows": event.windows,
        "guards": list(event.guards),
        "single_channel": bool(event.single_channel),
        "reference": event.reference,
        **({"explanation": event.explanation} if event.explanation else {}),
    }
    return Publish(
        "warning", "drift", f"the drift has lasted {event.windows} windows, {what}{beside}", event.service,
        event.channels, {"persisted_windows": float(event.windows)}, details,
    )  # fmt: skip
