"""Decides how far an update goes: one literal table, restart and failure included. Pure; time is an argument.

    lifecycle = Lifecycle(limits, load_update(saved))
    for command in lifecycle.handle(DesiredArrived(target), now_s): ...

Every change of state is persisted before the effect that follows it, and every effect can be repeated, so a
process killed anywhere resumes with `Restarted`. A try takes at most MAX_STEPS persisted steps: attempts and
restarts are counted, each state has a deadline. What replaces a running model is watched; the previous selection
is kept until then. A digest that failed its self-test or its probation is remembered and never tried again.

`shadow` (run beside the active model before probation) is not part of the table yet; it goes between SELFTEST and
PROBATION.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, assert_never

from agent.decisions.updates import (
    CandidateFailed,
    Commit,
    DesiredArrived,
    Effect,
    Fetch,
    PersistUpdate,
    Report,
    Restarted,
    Rollback,
    RollbackAsked,
    SelfTest,
    State,
    StepDone,
    StepFailed,
    Swap,
    Target,
    Tick,
    Update,
    UpdateCommand,
    UpdateEvent,
    Verify,
    digests,
)

DAY_S = 86_400.0
MAX_STEPS = 28
STEPS_BEFORE_SWAP = 20  # leaves room for a swap, its restarts and the way back
MAX_QUARANTINED = 64
MAX_DIRECTORS = 32
MAX_TEXT = 500

# What a failed step means. Anything not named here is treated as transient: attempts are bounded anyway.
REFUSING: Final = frozenset({
    "untrusted", "not_approved", "downgrade", "below_minimum", "incompatible", "too_large", "malformed",
    "unsupported_version", "quarantined",
})  # fmt: skip
# These condemn the bytes only where the candidate itself ran; before that they speak of our own child. A trial that
# was `killed` from outside is not among them: whoever did it, the bytes are as good as before.
POISONED: Final = frozenset({"golden_mismatch", "resource_limit", "engine_failed", "crashed"})


class Signal(StrEnum):
    NEW = "new"  # another document arrived
    DUE = "due"  # the moment this state waits for has come
    DONE = "done"
    RETRY = "retry"  # failed, may succeed later
    REFUSED = "refused"  # may not be installed here
    POISONED = "poisoned"  # the bytes are trusted and bad
    GIVEN_UP = "given-up"  # attempts, restarts or steps are used up
    RESTARTED = "restarted"
    DEADLINE = "deadline"
    UNDO = "undo"  # an operator wants to go back


@dataclass(frozen=True, slots=True)
class Row:
    """The next state; `acts`: its effect is executed (again)."""

    state: State
    acts: bool = False


def _do(state: State) -> Row:
    return Row(state, acts=True)


I, PL, F, V, ST = State.IDLE, State.PLANNED, State.FETCHING, State.VERIFIED, State.STAGED  # noqa: E741 - table labels
SE, PR, CO, DE, RJ = State.SELFTEST, State.PROBATION, State.COMMITTED, State.DEFERRED, State.REJECTED
SU, FA, RB, RD, QU = State.SUPERSEDED, State.FAILED, State.ROLLING_BACK, State.ROLLED_BACK, State.QUARANTINED
_CELLS: Final[dict[State, tuple[State | Row, ...]]] = {
    #    new due       done     retry    refused  poisoned given-up restarted deadline undo
    I:  (PL, I,        I,       I,       I,       I,       I,       I,        I,       _do(RB)),
    PL: (SU, _do(F),   CO,      PL,      RJ,      RJ,      FA,      PL,       FA,      RJ),
    F:  (SU, F,        _do(V),  DE,      RJ,      QU,      FA,      _do(F),   DE,      RJ),
    V:  (SU, V,        ST,      DE,      RJ,      QU,      FA,      _do(V),   DE,      RJ),
    ST: (SU, _do(SE),  ST,      DE,      RJ,      QU,      FA,      ST,       FA,      RJ),
    SE: (SU, SE,       _do(PR), DE,      RJ,      QU,      FA,      _do(SE),  FA,      RJ),
    PR: (PR, _do(CO),  PR,      _do(RB), _do(RB), _do(RB), _do(RB), _do(PR),  _do(RB), _do(RB)),
    CO: (PL, PL,       CO,      CO,      CO,      CO,      CO,      CO,       CO,      _do(RB)),
    DE: (SU, _do(F),   DE,      DE,      RJ,      QU,      FA,      DE,       FA,      RJ),
    RJ: (PL, PL,       RJ,      RJ,      RJ,      RJ,      RJ,      RJ,       RJ,      _do(RB)),
    SU: (PL, PL,       SU,      SU,      SU,      SU,      SU,      SU,       SU,      _do(RB)),
    FA: (PL, PL,       FA,      FA,      FA,      FA,      FA,      FA,       FA,      _do(RB)),
    RB: (RB, RB,       RD,      RB,      RB,      RB,      RB,      _do(RB),  _do(RB), RB),
    RD: (PL, PL,       RD,      RD,      RD,      RD,      RD,      RD,       RD,      _do(RB)),
    QU: (PL, PL,       QU,      QU,      QU,      QU,      QU,      QU,       QU,      _do(RB)),
}  # fmt: skip
TABLE: Final[dict[State, dict[Signal, Row]]] = {
    state: {signal: cell if isinstance(cell, Row) else Row(cell) for signal, cell in zip(Signal, cells, strict=True)}
    for state, cells in _CELLS.items()
}

BUSY: Final = frozenset({F, V, SE, PR, RB})
RESTING: Final = frozenset({I, CO, RJ, SU, FA, RD, QU})
BEFORE_SWAP: Final = frozenset({PL, F, V, ST, SE, DE})


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds of the decision clock."""

    probation_s: float = 60.0
    fetch_s: float = 3600.0
    verify_s: float = 600.0
    selftest_s: float = 600.0
    swap_s: float = 120.0
    rollback_s: float = 120.0  # then it is asked for again: there is nothing else to do
    backoff_s: float = 10.0  # doubled with each attempt
    max_backoff_s: float = 900.0
    rest_s: float = 900.0  # before a failed target is taken up again; doubled with each try
    max_rest_s: float = 86_400.0
    attempts: int = 6
    restarts: int = 3  # in one state before the swap
    trial_restarts: int = 2  # a model whose trial takes the machine down this often is bad
    probation_restarts: int = 2
    window_s: tuple[float, float] | None = None  # of the day; outside, what is staged waits. None = at any time


class Lifecycle:
    """The update of one device. Owned by the agent process's main thread."""

    def __init__(self, limits: Limits | None = None, update: Update | None = None) -> None:
        self.limits = limits or Limits()
        self.update = update or Update()

    def handle(self, event: UpdateEvent, now_s: float) -> tuple[UpdateCommand, ...]:
        """What to do now, in this order; a PersistUpdate must be durable before the next command is executed."""
        if now_s < self.update.since_s:  # the clock was set back: nothing has elapsed
            self.clock_set(now_s - self.update.since_s)
        commands = list(self._handle(event, now_s))
        for _ in range(len(State)):  # waiting states whose moment is now are passed at once
            if not self._is_due(now_s) or self._signal(Tick(), now_s) is not Signal.DUE:
                break
            commands += self._step(Signal.DUE, now_s)
        return tuple(commands)

    def clock_set(self, by_s: float) -> None:
        """The decision clock was set by `by_s`: elapsed times stay as they are."""
        update = self.update
        self.update = replace(
            update,
            since_s=update.since_s + by_s,
            began_s=update.began_s + by_s,
            retry_at_s=update.retry_at_s + by_s,
        )

    def next_check_s(self) -> float | None:
        """When time alone may change something; None = never."""
        update, times = self.update, [self._deadline_s()]
        if update.state is DE or self._is_worth_another_try():
            times.append(update.retry_at_s)
        if update.state is PR and update.swapped:
            times.append(update.since_s + self.limits.probation_s)
        return min((time_s for time_s in times if time_s is not None), default=None)

    def statistics(self) -> dict[str, float]:
        """Flat numbers for status and metrics."""
        update = self.update
        return {
            "attempts": update.attempts,
            "restarts": update.restarts,
            "steps": update.steps,
            "tries": update.tries,
            "moved_bytes": update.moved_bytes,
            "quarantined": len(update.quarantined),
        }

    # --- from event to signal -------------------------------------------------------------------------------
    def _handle(self, event: UpdateEvent, now_s: float) -> list[UpdateCommand]:
        if isinstance(event, DesiredArrived):
            return self._arrived(event.target, now_s)
        if isinstance(event, StepDone | StepFailed) and not self._is_awaited(event.ticket):
            return []  # the answer to a step that was left
        signal = self._signal(event, now_s)
        if signal is None:
            return []
        self._note(event)
        blamed = event.digests if isinstance(event, StepFailed | CandidateFailed) else ()
        return self._step(signal, now_s, blamed=blamed)

    def _signal(self, event: UpdateEvent, now_s: float) -> Signal | None:
        match event:
            case DesiredArrived():
                return Signal.NEW
            case StepDone():
                return None if self.update.swapped else Signal.DONE
            case StepFailed():
                return self._failure(event.code)
            case CandidateFailed():
                return Signal.POISONED if self.update.state is PR else None
            case RollbackAsked():
                return Signal.UNDO if self._can_undo() else None
            case Restarted():
                return self._restart()
            case Tick():
                return self._time(now_s)
            case _:
                assert_never(event)

    def _failure(self, code: str) -> Signal:
        if code in REFUSING:
            return Signal.REFUSED
        if code in POISONED and self.update.state in {SE, PR}:
            return Signal.POISONED
        used_up = self.update.attempts >= self.limits.attempts or self.update.steps >= STEPS_BEFORE_SWAP
        return Signal.GIVEN_UP if used_up else Signal.RETRY

    def _restart(self) -> Signal:
        update, limits = self.update, self.limits
        if update.state is SE and update.restarts + 1 >= limits.trial_restarts:
            return Signal.POISONED
        if update.state is PR and update.restarts >= limits.probation_restarts:
            return Signal.GIVEN_UP
        used_up = update.restarts >= limits.restarts or update.steps >= STEPS_BEFORE_SWAP
        if update.state in BEFORE_SWAP & BUSY and used_up:
            return Signal.GIVEN_UP
        return Signal.RESTARTED

    def _time(self, now_s: float) -> Signal | None:
        update, deadline_s = self.update, self._deadline_s()
        if update.state in BEFORE_SWAP and update.steps >= STEPS_BEFORE_SWAP and update.state not in BUSY:
            return Signal.GIVEN_UP
        if deadline_s is not None and now_s >= deadline_s:
            late = update.state in {F, V} and update.attempts >= self.limits.attempts
            return Signal.GIVEN_UP if late else Signal.DEADLINE
        return Signal.DUE if self._is_due(now_s) else None

    def _is_due(self, now_s: float) -> bool:
        update = self.update
        if update.state is ST:
            return self._is_open(now_s)
        if update.state is PL:
            return True
        if update.state is PR:
            return update.swapped and now_s - update.since_s >= self.limits.probation_s
        if update.state in RESTING and update.waiting is not None:
            return True
        return (update.state is DE or self._is_worth_another_try()) and now_s >= update.retry_at_s

    def _is_open(self, now_s: float) -> bool:
        """Whether the maintenance window is open; one that ends before it begins goes over midnight."""
        if self.limits.window_s is None:
            return True
        begin_s, end_s = self.limits.window_s
        of_day_s = now_s % DAY_S
        if begin_s <= end_s:
            return begin_s <= of_day_s < end_s
        return of_day_s >= begin_s or of_day_s < end_s

    def _deadline_s(self) -> float | None:
        update, limits = self.update, self.limits
        own = {F: limits.fetch_s, V: limits.verify_s, SE: limits.selftest_s, RB: limits.rollback_s}.get(update.state)
        if update.state is PR and not update.swapped:
            own = limits.swap_s
        times = [] if own is None else [update.since_s + own]
        if update.state in BEFORE_SWAP and update.target is not None and update.target.deadline_s:
            times.append(update.began_s + update.target.deadline_s)
        return min(times, default=None)

    def _is_awaited(self, ticket: int) -> bool:
        return self.update.state in BUSY and ticket == self.update.ticket

    def _can_undo(self) -> bool:
        return self.update.state not in RESTING or self.update.previous is not None

    def _is_worth_another_try(self) -> bool:
        """A failed target is taken up again unless its own time is over; so is one that was not trusted.

        For who sits in the network can answer nonsense once: that must not keep a device from updating for ever.
        """
        update = self.update
        if update.target is None or not (update.state is FA or (update.state is RJ and update.code == "untrusted")):
            return False
        limit_s = update.target.deadline_s
        return not limit_s or update.retry_at_s < update.began_s + limit_s

    # --- from signal to state and commands ------------------------------------------------------------------
    def _arrived(self, target: Target, now_s: float) -> list[UpdateCommand]:
        update = self.update
        if target.version <= update.seen.get(target.director, 0):
            return []  # a retained document comes again with every connection; an older one is a replay
        seen = {**update.seen, target.director: target.version}
        self.update = replace(update, waiting=target, seen=dict(list(seen.items())[-MAX_DIRECTORS:]))
        if update.state in {PR, RB}:
            return [PersistUpdate(self.update.document())]
        return self._step(Signal.NEW, now_s)

    def _note(self, event: UpdateEvent) -> None:
        """Keep what the event says beside its signal; why a rollback began stays the reason while it lasts."""
        if self.update.state is RB:
            return
        match event:
            case StepDone():
                self.update = replace(self.update, moved_bytes=self.update.moved_bytes + event.moved_bytes)
            case StepFailed() | CandidateFailed():
                moved = event.moved_bytes if isinstance(event, StepFailed) else 0
                self.update = replace(
                    self.update,
                    code=event.code,
                    text=event.text[:MAX_TEXT],
                    moved_bytes=self.update.moved_bytes + moved,
                )
            case RollbackAsked():
                self.update = replace(self.update, code="rollback_asked", text=event.text[:MAX_TEXT])
            case Restarted() | Tick() | DesiredArrived():
                pass
            case _:
                assert_never(event)

    def _step(self, signal: Signal, now_s: float, *, blamed: tuple[str, ...] = ()) -> list[UpdateCommand]:
        before = self.update
        row = TABLE[before.state][signal]
        if row.state is before.state and not row.acts and not (row.state is PR and signal is Signal.DONE):
            return []
        if row.state is PL:
            return self._plan(now_s)
        self.update = self._entered(row, signal, now_s)
        if signal is Signal.POISONED or (before.state is PR and signal is Signal.GIVEN_UP):
            self.update = _quarantine(self.update, blamed)
        if before.state is RB and row.state is RB:  # asked again; nothing new to remember
            return [self._effect()]
        commands: list[UpdateCommand] = [PersistUpdate(self.update.document())]
        if row.state is not before.state or signal is Signal.RESTARTED:
            commands.append(self.report())
        if row.acts:
            commands.append(self._effect())
        return commands

    def _plan(self, now_s: float) -> list[UpdateCommand]:
        """Take up the waiting target, or a failed one again; refuse or skip what needs no work."""
        update = self.update
        target, tries = (update.waiting, 0) if update.waiting else (update.target, update.tries + 1)
        if target is None:
            return []
        began_s = now_s if update.waiting else update.began_s
        self.update = replace(
            update, state=PL, target=target, waiting=None, tries=tries, since_s=now_s, began_s=began_s, steps=1,
            attempts=0, restarts=0, moved_bytes=0, swapped=False, code="", text="", ticket=update.ticket + 1,
        )  # fmt: skip
        commands: list[UpdateCommand] = [PersistUpdate(self.update.document()), self.report()]
        if target.services == update.installed:
            return commands + self._step(Signal.DONE, now_s)
        known_bad = sorted(target.digests() & set(update.quarantined))
        if known_bad:
            text = f"{known_bad[0][:12]} failed here before"
            self.update = replace(self.update, code="quarantined", text=text)
            return commands + self._step(Signal.REFUSED, now_s)
        return commands

    def _entered(self, row: Row, signal: Signal, now_s: float) -> Update:
        """The state after a row: what is counted, what is remembered."""
        before = self.update
        update = replace(before, state=row.state)
        if before.state is RB and row.state is RB:
            return replace(update, since_s=now_s)
        same = row.state is before.state
        update = replace(
            update,
            steps=before.steps + 1,
            since_s=now_s,
            ticket=before.ticket + 1 if row.acts or not same else before.ticket,
            restarts=before.restarts + 1 if signal is Signal.RESTARTED else before.restarts if same else 0,
            swapped=row.state is PR and signal is Signal.DONE and same,
        )
        update = _with_reason(update, signal)
        if row.state is F and not same:
            update = replace(update, attempts=before.attempts + 1, code="", text="")
        return self._with_consequences(update, before, now_s)

    def _with_consequences(self, update: Update, before: Update, now_s: float) -> Update:
        limits = self.limits
        match update.state:
            case State.DEFERRED:
                wait_s = min(limits.backoff_s * 2.0 ** (update.attempts - 1), limits.max_backoff_s)
                return replace(update, retry_at_s=now_s + wait_s)
            case State.FAILED | State.REJECTED:
                rest_s = min(limits.rest_s * 2.0 ** min(update.tries, 30), limits.max_rest_s)
                return replace(update, retry_at_s=now_s + rest_s)
            case State.COMMITTED if before.state is PR and update.target is not None:
                return replace(update, installed=update.target.services, previous=update.installed, code="", text="")
            case State.ROLLING_BACK if before.state in RESTING:
                return _undone(update)
            case _:
                return update

    def _effect(self) -> Effect:
        update, target = self.update, self.update.target
        if update.state is RB:
            return Rollback(update.ticket, update.installed)
        if target is None:  # only a rollback at rest has none
            raise ValueError(f"an update in state {update.state} has no target")
        match update.state:
            case State.FETCHING:
                return Fetch(update.ticket, target)
            case State.VERIFIED:
                return Verify(update.ticket, target)
            case State.SELFTEST:
                return SelfTest(update.ticket, target)
            case State.PROBATION:
                return Swap(update.ticket, target)
            case _:
                return Commit(update.ticket, target, update.previous or {})

    def report(self) -> Report:
        """How far it is."""
        update = self.update
        version = update.target.version if update.target else 0
        return Report(version, update.state, update.code, update.text, update.attempts, update.moved_bytes)


def _with_reason(update: Update, signal: Signal) -> Update:
    """A reason for what no event explained."""
    if signal is Signal.DEADLINE:
        return replace(update, code="deadline", text="it took longer than allowed")
    if signal in {Signal.GIVEN_UP, Signal.POISONED} and not update.code:
        code = "crashed" if signal is Signal.POISONED else "restarts"
        return replace(update, code=code, text="the agent process ended again and again in this step")
    return update


def _undone(update: Update) -> Update:
    """Asked for at rest: the previous selection becomes the installed one; what it replaced is not tried again."""
    previous = update.previous or {}
    bad = tuple(sorted(digests(update.installed) - digests(previous)))
    quarantined = _bounded((*update.quarantined, *bad))
    return replace(update, installed=previous, previous=None, quarantined=quarantined, steps=1)


def _quarantine(update: Update, blamed: tuple[str, ...]) -> Update:
    """Remember the blamed digests, or all of the target that are not the installed ones."""
    if update.target is None:
        return update
    new = update.target.digests() - digests(update.installed)
    bad = tuple(sorted(new & set(blamed) or new))
    return replace(update, quarantined=_bounded((*update.quarantined, *bad)))


def _bounded(quarantined: tuple[str, ...]) -> tuple[str, ...]:
    """No doubles, the newest MAX_QUARANTINED."""
    return tuple(dict.fromkeys(reversed(quarantined)))[:MAX_QUARANTINED][::-1]
