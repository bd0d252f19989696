"""One service: what is known of it (ServiceState), what was configured (ServicePolicy), and what follows (`decide`).

Facts are written into the state by `supervisor.py`; `decide` reads them and moves the stay of `fallback.py`:

| asked in this order | signal | to |
|---|---|---|
| an operator pinned, or released | pin, unpin | the pinned engine; the preferred one |
| the serving engine is not loaded, or benched because it failed | trouble | `choose_other` |
| latency, power, heat or memory alarm; again after each dwell while it lasts | trouble | `choose_cheaper` |
| broken input is diagnosed | trouble | `choose`: only if another engine is better under that fault |
| harm: a drift makes the preferred engine wrong; no broken input is diagnosed | trouble | the witness that says so |
| fallback: rested, and what led here is gone for `settle_s` and `settle_requests` | settled | the preferred engine |
| probation: `probation_s` and `settle_requests` without trouble | proven | stays |

Plain drift is in no row: it is published and makes the health degraded, and never switches (drift.md). Harm ends with
the drift it was said of, and the preferred engine returns as after any other trouble.

During one stay away from the preferred engine, faults add up (`causes`): an engine is left for a better one only
because of a fault that is new in this stay, so alarms that flap cannot make the engines flap.
Pure; times are seconds of the decision clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from agent.decisions import fallback, health
from agent.decisions.choice import DEFAULT_MARGIN, Card, Choice, Fault, choose, choose_cheaper, choose_other
from agent.decisions.events import (
    BROKEN_INPUT,
    UNNAMED,
    Activate,
    AlarmKind,
    Command,
    Level,
    Publish,
    RestartWindows,
)
from agent.decisions.fallback import Limits, Phase, Signal, Stay
from agent.decisions.health import Condition, Health

PRESSURE: Final = frozenset({AlarmKind.LATENCY, AlarmKind.POWER, AlarmKind.THERMAL, AlarmKind.MEMORY})
"""Alarms a cheaper engine may end."""
SWITCHING: Final = (BROKEN_INPUT - {AlarmKind.RANGE} - UNNAMED) | PRESSURE | {AlarmKind.HARM}
"""Alarms that may switch. Values out of range are clipped or refused by the guard's policy, which is the remedy."""


def switching(card: Card) -> frozenset[AlarmKind]:
    """SWITCHING, and faults of the whole input where the card says what they cost each engine."""
    return SWITCHING | (UNNAMED & {row.kind for row in card.rows})


DEFAULT_SETTLE_S = 15.0
DEFAULT_SETTLE_REQUESTS = 8  # the longest run a guard judges: a fault still there would have been raised again
PUBLISHED_AS: Final = dict.fromkeys(BROKEN_INPUT, "sensor") | {
    AlarmKind.DRIFT: "drift",
    AlarmKind.HARM: "drift",
    AlarmKind.LATENCY: "health",
    AlarmKind.MEMORY: "health",
    AlarmKind.POWER: "power",
    AlarmKind.THERMAL: "power",
    AlarmKind.ENGINE: "engine",
}
"""Under which kind of event an alarm is published."""
MAX_STEPS = 4  # pin -> release -> trouble -> the next; more moves in one event would be a loop


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """Engines and card in lineup order, the preferred first. `failures` of the last `of_last` requests bench one.

    `missing`: a sentence about a better model that is configured and cannot be used; "" = all are here.
    `least_gain`: accuracy that a switch because of harm must gain at least, where that is known.
    """

    service: str
    card: Card
    limits: Limits = field(default_factory=Limits)
    failures: int = 3
    of_last: int = 20
    margin: float = DEFAULT_MARGIN
    settle_s: float = DEFAULT_SETTLE_S
    settle_requests: int = DEFAULT_SETTLE_REQUESTS
    switching: frozenset[AlarmKind] = SWITCHING
    missing: str = ""
    least_gain: float = 0.0

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(card.engine for card in self.card.engines)

    @property
    def preferred(self) -> str:
        return self.card.engines[0].engine


@dataclass(frozen=True, slots=True)
class OpenAlarm:
    kind: AlarmKind
    level: Level
    channels: tuple[str, ...]
    engine: str
    raised_s: float
    text: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    better: str = ""

    @property
    def fault(self) -> Fault:
        return Fault(self.kind, frozenset(self.channels))


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine that must not serve before `until_s`. `unload`: it is suspected of killing the worker."""

    until_s: float
    why: str
    unload: bool = False


@dataclass(frozen=True, slots=True)
class ServiceState:
    """Everything known of one service. `usable` None = no worker told yet; `served` counts since `changed_s`."""

    stay: Stay
    health: Health
    changed_s: float
    alarms: tuple[OpenAlarm, ...] = ()
    causes: tuple[Fault, ...] = ()
    pressed: AlarmKind | None = None
    served: int = 0
    seen: bool = False
    outcomes: dict[str, str] = field(default_factory=dict)
    benched: dict[str, Bench] = field(default_factory=dict)
    usable: tuple[str, ...] | None = None
    pin: str = ""
    reload_asked: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    signal: Signal
    why: str
    choice: Choice


def start(policy: ServicePolicy, now_s: float) -> ServiceState:
    stay = fallback.start(policy.preferred, now_s, policy.limits)
    return ServiceState(replace(stay, reason=policy.missing or stay.reason), health.start(now_s), now_s)


# --- decisions ---------------------------------------------------------------------------------------------
def decide(policy: ServicePolicy, state: ServiceState, now_s: float) -> tuple[ServiceState, list[Command]]:
    """Follow the facts until nothing more follows from them."""
    commands: list[Command] = []
    for _ in range(MAX_STEPS):
        move = find_move(policy, state, now_s)
        state = replace(state, pressed=None)
        if move is None:
            break
        state, caused = _apply(policy, state, move, now_s)
        commands += caused
    return state, commands


def find_move(policy: ServicePolicy, state: ServiceState, now_s: float) -> Move | None:
    """The first row of the module's table that applies."""
    if state.pin or state.stay.phase is Phase.PINNED:
        return _follow_pin(policy, state)
    return (
        _leave_unusable(policy, state, now_s)
        or _relieve(policy, state, now_s)
        or _avoid_fault(policy, state, now_s)
        or _avoid_harm(policy, state, now_s)
        or _return(policy, state, now_s)
    )


def _follow_pin(policy: ServicePolicy, state: ServiceState) -> Move | None:
    stay, pin = state.stay, state.pin
    if not pin:
        return Move(Signal.UNPIN, "unpinned", Choice(policy.preferred, "the operator's pin was released"))
    wanted = Choice(pin, f"an operator pinned {pin}")
    if pin not in _usable(policy, state):
        others = _usable(policy, state)
        current = stay.engine if stay.engine in others else pin
        wanted = (
            Choice(current, f"{pin} is pinned but not loaded: stays with {current}")
            if current != pin
            else choose_other(policy.card, (), others, pin, f"{pin} is pinned but not loaded")
        )
    if stay.phase is not Phase.PINNED:
        return Move(Signal.PIN, "pinned", wanted)
    return Move(Signal.TROUBLE, "pinned", wanted) if wanted.engine != stay.engine else None


def _leave_unusable(policy: ServicePolicy, state: ServiceState, now_s: float) -> Move | None:
    current, usable = state.stay.engine, _usable(policy, state)
    bench = state.benched.get(current)
    loaded = current in usable
    if loaded and not (bench and now_s < bench.until_s):
        return None
    why, text = ("not_loaded", f"{current} is not loaded")
    if bench and now_s < bench.until_s:
        why, text = ("crash_loop" if bench.unload else "engine_failed"), bench.why
    choice = choose_other(policy.card, faults_of_stay(policy, state), candidates(policy, state, now_s), current, text)
    if choice.engine == current and not loaded:  # even a benched engine is better than one that is not there
        choice = choose_other(policy.card, (), usable, current, text)
    return Move(Signal.TROUBLE, why, choice) if choice.engine != current else None


def _relieve(policy: ServicePolicy, state: ServiceState, now_s: float) -> Move | None:
    lasting = next((alarm.kind for alarm in state.alarms if _presses(policy, alarm)), None)
    kind = state.pressed or (lasting if fallback.rested(state.stay, now_s) else None)
    if kind is None:
        return None
    text = next((alarm.text for alarm in state.alarms if alarm.kind is kind and alarm.text), f"{kind.value} alarm")
    choice = choose_cheaper(
        policy.card, faults_of_stay(policy, state), candidates(policy, state, now_s), state.stay.engine, text
    )
    return Move(Signal.TROUBLE, kind.value, choice) if choice.engine != state.stay.engine else None


def _avoid_fault(policy: ServicePolicy, state: ServiceState, now_s: float) -> Move | None:
    choice = choose_for_faults(policy, state, now_s)
    return Move(Signal.TROUBLE, "fault", choice) if choice and choice.engine != state.stay.engine else None


def _avoid_harm(policy: ServicePolicy, state: ServiceState, now_s: float) -> Move | None:
    """What is said of the preferred engine moves nobody who has left it already."""
    alarm = harm(policy, state)
    if alarm is None or state.stay.engine != policy.preferred or faults_of_stay(policy, state):
        return None
    if alarm.better not in candidates(policy, state, now_s):
        return None
    numbers = {name: value for name, value in alarm.numbers.items() if name in ("disagreement", "gain_at_least")}
    return Move(Signal.TROUBLE, "harm", Choice(alarm.better, alarm.text or "the drift does harm", numbers))


def harm(policy: ServicePolicy, state: ServiceState) -> OpenAlarm | None:
    """The open alarm of harm that may switch."""
    alarm = next((one for one in state.alarms if one.kind is AlarmKind.HARM), None)
    if alarm is None or AlarmKind.HARM not in policy.switching:
        return None
    return alarm if alarm.numbers.get("gain_at_least", policy.least_gain) >= policy.least_gain else None


def choose_for_faults(policy: ServicePolicy, state: ServiceState, now_s: float) -> Choice | None:
    """The engine for what is diagnosed; None without a diagnosis that may switch."""
    faults = faults_of_stay(policy, state)
    if not faults:
        return None
    among = candidates(policy, state, now_s)
    if state.stay.phase is Phase.FALLBACK and state.stay.why != "fault":
        among -= {policy.preferred}  # left for another reason: it comes back through probation only
    return choose(policy.card, faults, among, state.stay.engine, margin=policy.margin)


def _return(policy: ServicePolicy, state: ServiceState, now_s: float) -> Move | None:
    preferred = policy.preferred
    if fallback.rested(state.stay, now_s) and settled(policy, state, now_s) and preferred in _usable(policy, state):
        quiet_s = now_s - state.changed_s
        reason = f"quiet for {quiet_s:.0f} s and {state.served} requests: {preferred} serves again, on probation"
        return Move(Signal.SETTLED, "probation", Choice(preferred, reason, {"quiet_s": quiet_s}))
    if fallback.proven(state.stay, now_s, policy.limits) and state.served >= policy.settle_requests:
        reason = f"{preferred} served {state.served} requests on probation without trouble"
        return Move(Signal.PROVEN, "returned", Choice(preferred, reason, {"requests": float(state.served)}))
    return None


def settled(policy: ServicePolicy, state: ServiceState, now_s: float) -> bool:
    """What led away from the preferred engine is gone, and has been for a while with traffic."""
    if now_s - state.changed_s < policy.settle_s or state.served < policy.settle_requests:
        return False
    if harm(policy, state) or any(_presses(policy, alarm) and not alarm.engine for alarm in state.alarms):
        return False
    faults = open_faults(policy, state)
    among = candidates(policy, state, now_s) | {policy.preferred}
    return not faults or choose(policy.card, faults, among, policy.preferred, margin=policy.margin).engine == (
        policy.preferred
    )


def wants_reload(policy: ServicePolicy, state: ServiceState, now_s: float) -> bool:
    """The preferred engine may come back, but was left out of the running worker on purpose."""
    bench = state.benched.get(policy.preferred)
    return (
        bench is not None
        and bench.unload
        and policy.preferred not in _usable(policy, state)
        and fallback.rested(state.stay, now_s)
        and settled(policy, state, now_s)
    )


def _apply(
    policy: ServicePolicy, state: ServiceState, move: Move, now_s: float
) -> tuple[ServiceState, list[Command]]:
    before, choice = state.stay, move.choice
    stay = fallback.step(
        before, move.signal, now_s, policy.limits, engine=choice.engine, why=move.why, reason=choice.reason
    )
    kept = tuple(alarm for alarm in state.alarms if stay.engine == before.engine or not alarm.engine)
    dropped = [alarm for alarm in state.alarms if alarm not in kept]
    causes = state.causes if before.phase is Phase.FALLBACK else ()
    state = replace(
        state,
        stay=stay,
        alarms=kept,
        causes=_union(causes, open_faults(policy, state)) if stay.phase is Phase.FALLBACK else (),
        changed_s=now_s,
        served=0,
        outcomes={**state.outcomes, stay.engine: ""},
    )
    commands: list[Command] = []
    if stay.engine != before.engine:
        commands += [
            Activate(policy.service, stay.engine, stay.why, stay.reason),
            RestartWindows(policy.service, stay.engine),
        ]
    commands.append(_announce(policy, state, before, move))
    return state, [*commands, *(_forget(policy, alarm, now_s) for alarm in dropped)]


def _forget(policy: ServicePolicy, alarm: OpenAlarm, now_s: float) -> Publish:
    """An alarm about an engine ends when that engine no longer serves."""
    return Publish(
        severity="notice",
        kind=PUBLISHED_AS[alarm.kind],
        text=f"{alarm.kind.value} of {alarm.engine} is no longer judged: it does not serve",
        service=policy.service,
        numbers={"open_s": now_s - alarm.raised_s},
        details={"raised": False, "alarm": alarm.kind.value, "level": Level.OK.value},
    )


def without_bench(state: ServiceState, engine: str) -> dict[str, Bench]:
    return {name: bench for name, bench in state.benched.items() if name != engine}


STEPS: Final = {
    Phase.PREFERRED: {Phase.FALLBACK: "switched", Phase.PINNED: "pinned"},
    Phase.FALLBACK: {Phase.FALLBACK: "moved", Phase.PROBATION: "probation", Phase.PINNED: "pinned"},
    Phase.PROBATION: {Phase.FALLBACK: "return-failed", Phase.PREFERRED: "returned", Phase.PINNED: "pinned"},
    Phase.PINNED: {Phase.PINNED: "moved", Phase.PREFERRED: "unpinned"},
}
"""What a published fallback event calls the way from one phase to the next (`details.step`)."""


def _announce(policy: ServicePolicy, state: ServiceState, before: Stay, move: Move) -> Publish:
    stay = state.stay
    told = move.why in ("fault", "harm")
    evidence = [alarm for alarm in state.alarms if alarm.kind in policy.switching] if told else []
    numbers = {name: value for alarm in reversed(evidence) for name, value in alarm.numbers.items()}
    numbers |= move.choice.numbers | {"dwell_s": stay.dwell_s, "previous_stay_s": stay.since_s - before.since_s}
    way = f"{before.engine} -> {stay.engine}" if stay.engine != before.engine else stay.engine
    worse = move.signal is Signal.TROUBLE
    return Publish(
        severity="error" if worse and policy.card[stay.engine].floor else "warning" if worse else "notice",
        kind="fallback",
        text=f"{way}: {stay.reason}",
        service=policy.service,
        channels=tuple(dict.fromkeys(channel for alarm in evidence for channel in alarm.channels)),
        numbers=numbers,
        details={
            "step": STEPS[before.phase][stay.phase],
            "from": before.engine,
            "to": stay.engine,
            "why": stay.why,
            "phase": stay.phase.value,
        },
    )


# --- facts -------------------------------------------------------------------------------------------------
def candidates(policy: ServicePolicy, state: ServiceState, now_s: float) -> set[str]:
    """Loaded engines that are not benched now."""
    benched = {engine for engine, bench in state.benched.items() if now_s < bench.until_s}
    return set(_usable(policy, state)) - benched


def lineup(policy: ServicePolicy, state: ServiceState, now_s: float) -> tuple[str, ...]:
    """The engines a new worker should load, in order: without those suspected of killing it."""
    unloaded = {engine for engine, bench in state.benched.items() if bench.unload and now_s < bench.until_s}
    kept = tuple(engine for engine in policy.engines if engine not in unloaded)
    return kept or policy.engines[-1:]


def open_faults(policy: ServicePolicy, state: ServiceState) -> tuple[Fault, ...]:
    """Diagnoses of broken input that are true now and may switch."""
    kinds = policy.switching & BROKEN_INPUT
    return tuple(alarm.fault for alarm in state.alarms if alarm.kind in kinds)


def faults_of_stay(policy: ServicePolicy, state: ServiceState) -> tuple[Fault, ...]:
    """Open faults; on a fallback also those that were open earlier in this stay."""
    return _union(state.causes if state.stay.phase is Phase.FALLBACK else (), open_faults(policy, state))


def _union(first: tuple[Fault, ...], second: tuple[Fault, ...]) -> tuple[Fault, ...]:
    channels: dict[AlarmKind, frozenset[str]] = {}
    for fault in (*first, *second):
        channels[fault.kind] = channels.get(fault.kind, frozenset()) | fault.channels
    return tuple(Fault(kind, names) for kind, names in channels.items())


def _usable(policy: ServicePolicy, state: ServiceState) -> tuple[str, ...]:
    return policy.engines if state.usable is None else state.usable


def _presses(policy: ServicePolicy, alarm: OpenAlarm) -> bool:
    return alarm.kind in PRESSURE & policy.switching


def complaints(policy: ServicePolicy, state: ServiceState, now_s: float, *, worker: str) -> list[str]:
    """Why the service is not simply healthy, one sentence each. `worker`: up, starting, lost or loop."""
    stay = state.stay
    bench = state.benched.get(stay.engine)
    return [
        *(["the worker keeps crashing"] if worker == "loop" else ["the worker was lost"] if worker == "lost" else []),
        *(["no engine is loaded"] if state.usable == () else []),
        *([policy.missing] if policy.missing else []),
        *([bench.why] if bench and now_s < bench.until_s and stay.phase is not Phase.PINNED else []),
        *([f"only the floor answers ({stay.reason})"] if _on_floor(policy, state) else []),
        *(alarm.text or f"{alarm.fault.sentence()}" for alarm in state.alarms),
        *([f"{stay.phase.value}: {stay.reason}"] if stay.phase in {Phase.FALLBACK, Phase.PROBATION} else []),
        *([f"{stay.engine} failed {count} of its last requests"] if (count := _failures(state)) else []),
    ]


def condition(policy: ServicePolicy, state: ServiceState, now_s: float, *, worker: str) -> Condition:
    """The facts in one word; `worker` as in `complaints`."""
    bench = state.benched.get(state.stay.engine)
    failing = bench is not None and now_s < bench.until_s and state.stay.phase is not Phase.PINNED
    if worker == "loop" or state.usable == () or failing or _on_floor(policy, state):
        return Condition.BROKEN
    if complaints(policy, state, now_s, worker=worker):
        return Condition.IMPAIRED
    return Condition.CLEAN if state.seen else Condition.NO_DATA


def _on_floor(policy: ServicePolicy, state: ServiceState) -> bool:
    return policy.card[state.stay.engine].floor and state.pin != state.stay.engine


def _failures(state: ServiceState) -> int:
    return state.outcomes.get(state.stay.engine, "").count("x")
