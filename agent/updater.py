"""Carries an update through: what the lifecycle decides is made durable, executed and reported, one step at a time.

    desired document -> Lifecycle -> PersistUpdate (store) -> Fetch, Verify, SelfTest (installer, in a thread)
                                  -> Swap, Rollback (another equipment, another worker) -> probation -> Commit

Promises: a state is durable before its effect begins; nothing here blocks the event loop; a killed agent resumes
where the store and the pointer say; serving never waits for an update.
Leaves to others: what follows from what (`agent.decisions.lifecycle`), bytes (`agent.ota`), workers
(`agent.conductor`), who may ask (`agent.orders`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.blueprint import Blueprint
from agent.chores import Chores
from agent.clock import monotonic_s, wall_s
from agent.contract.desired import Desired
from agent.contract.errors import EdgewardenError, StorageError
from agent.decisions.events import AlarmKind, Publish
from agent.decisions.lifecycle import RESTING, Lifecycle, Limits
from agent.decisions.updates import (
    CandidateFailed,
    Choice,
    Commit,
    DesiredArrived,
    Fetch,
    PersistUpdate,
    Report,
    Restarted,
    Rollback,
    RollbackAsked,
    Selection,
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
    load_update,
)
from agent.equipment import Depot
from agent.journal import Journal
from agent.modelcache import FOLDER as CACHE
from agent.modelcache import ModelCache
from agent.orders import Refusal
from agent.ota.installer import Installer
from agent.ota.slots import Pointer
from agent.store import Store

UPDATE = "update"  # name of a value in the store
LOSSES = 2  # one lost worker on probation is an accident, the second is the candidate's
SEVERITIES = {
    State.COMMITTED: "notice", State.DEFERRED: "warning", State.ROLLING_BACK: "warning", State.SUPERSEDED: "notice",
    State.REJECTED: "error", State.FAILED: "error", State.ROLLED_BACK: "error", State.QUARANTINED: "error",
}  # fmt: skip

Told = Callable[[str, str], None]
"""(code, sentence): how a change of equipment went; code "" = it serves."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the updater needs of the process around it, on the event loop.

    `change`: let this selection serve; answers through `Told`, now or later. `report`: publish `reported`.
    `statuses`: service -> the supervisor's status.
    """

    change: Callable[[Selection, tuple[Blueprint, ...], Told], None]
    report: Callable[[], None]
    publish: Callable[[Publish], None]
    statuses: Callable[[], Mapping[str, Mapping[str, Any]]]


class Updater:
    """Owned by the event loop; the installer by the thread of `chores`."""

    def __init__(
        self, store: Store, journal: Journal, chores: Chores, installer: Installer, depot: Depot, *, limits: Limits,
        hooks: Hooks,
    ) -> None:  # fmt: skip
        self._store = store
        self._journal = journal
        self._chores = chores
        self._installer = installer
        self._depot = depot
        self._hooks = hooks
        self._limits = limits
        self._clock = (wall_s(), monotonic_s())  # a clock that is set while we run moves no deadline
        self._queue: deque[UpdateCommand] = deque()
        self._draining = False
        self._report: Report | None = None
        self._refusal: Refusal | None = None
        self._wait: tuple[str, str] = ("", "")
        self._losses = 0
        self._slow_before: frozenset[str] = frozenset()
        self._numbers: dict[str, float] = {}
        self._from: dict[str, str] = {}
        self._to: dict[str, str] = {}
        self._unsaved = False
        self._unpointed: Selection | None = None  # what the pointer should name and does not yet
        self._pointing = self._mispointed = False
        self.lifecycle = Lifecycle(limits)

    # --- life -----------------------------------------------------------------------------------------------
    def begin(self, serving: Selection, *, problem: str) -> None:
        """Take up what a former process left; `serving` is what this one serves, `problem` why it is not better."""
        saved = self._load()
        update = saved or Update(installed=serving)
        moving = update.state in {State.PROBATION, State.ROLLING_BACK}
        if not moving and _is_stray(update, serving) and serving != self._depot.factory_selection:
            update = replace(update, state=State.ROLLING_BACK)
        elif not moving and update.installed != serving:
            update = (
                _healed(update, serving, problem, self._now_s()) if problem else replace(update, installed=serving)
            )
        self.lifecycle = Lifecycle(self._limits, update)
        self._name_versions()
        if saved is not None:
            self.handle(Restarted())

    def tick(self) -> None:
        """About once a second: time for the lifecycle, and the candidate judged while it is on probation."""
        failure = self._failure()
        if failure is not None:
            self.handle(failure)
        self.handle(Tick())
        self._point_back()

    def handle(self, event: UpdateEvent) -> None:
        self._queue.extend(self.lifecycle.handle(event, self._now_s()))
        self._drain()

    # --- what others say ------------------------------------------------------------------------------------
    def desired(self, document: Desired, director: str) -> None:
        """A believed desired document; services it does not name stay as they are."""
        update = self.lifecycle.update
        kept = update.target.services if update.state is State.PROBATION and update.target else update.installed
        named = {
            service: Choice(dict(choice.artifacts), tuple(choice.order))
            for service, choice in document.services.items()
        }
        target = Target(
            document.version, {**kept, **named}, document.repository, document.rollout, document.rollback,
            document.deadline_s, director,
        )  # fmt: skip
        if target.version < update.seen.get(director, 0):
            text = f"desired version {target.version} is older than version {update.seen[director]}, which was seen"
            self.refused(Refusal("desired", "replayed", text, target.version))
            return
        self.handle(DesiredArrived(target))

    def refused(self, refusal: Refusal) -> None:
        """A document was not believed: said once more in `reported` until the next step of an update."""
        self._refusal = refusal
        claimed = f" that calls itself version {refusal.claimed}" if refusal.claimed else ""
        what = "desired document" if refusal.what == "desired" else f"command '{refusal.what}'"
        self._hooks.publish(
            Publish(
                "error", "update", f"a {what}{claimed} was refused: {refusal.text}",
                details={"refused": True, "code": refusal.code, "what": refusal.what, "claimed": refusal.claimed},
            )
        )  # fmt: skip
        self._hooks.report()

    def waiting(self, code: str, text: str) -> None:
        """Documents cannot be judged at the moment ("" = they can again)."""
        self._wait = (code, text)
        severity, words = ("warning", f"updates wait: {text}") if code else ("notice", "updates wait no longer")
        self._hooks.publish(Publish(severity, "update", words, details={"waiting": bool(code), "code": code}))
        self._hooks.report()

    def worker_lost(self, reason: str) -> None:
        """The serving worker is gone."""
        if self.lifecycle.update.state is not State.PROBATION:
            return
        self._losses += 1
        if self._losses >= LOSSES:
            self.handle(CandidateFailed("crashed", f"{self._losses} workers were lost on probation: {reason}"))

    def roll_back_as_ordered(self, text: str) -> bool:
        """A director wants the previous selection, which the signed minimums must still allow; False = there is none.

        What only ends an update before it serves, or hurries a way back already begun, is always obeyed.

        Raises:
            BelowMinimum; StateUnreadable, Corrupt, Unavailable: it cannot be judged.
        """
        update = self.lifecycle.update
        back = update.installed if update.state is State.PROBATION else update.previous
        if back is not None and (update.state in RESTING or update.state is State.PROBATION):
            self._installer.check_minimums(back)
        return self.roll_back(text)

    def roll_back(self, text: str) -> bool:
        """An operator wants the previous selection, whatever its versions; False = there is none."""
        before = self.lifecycle.update
        self.handle(RollbackAsked(text))
        return self.lifecycle.update is not before

    @property
    def repository(self) -> str:
        """The repository the newest believed document named."""
        target = self.lifecycle.update.waiting or self.lifecycle.update.target
        return target.repository if target else ""

    # --- what others read -----------------------------------------------------------------------------------
    def reported(self) -> dict[str, Any]:
        """The update's part of the `reported` document."""
        report, refusal = self._report or self.lifecycle.report(), self._refusal
        fields: dict[str, Any] = {
            "desired_version": report.version,
            "update_state": report.state.value,
            "code": refusal.code if refusal else report.code or self._wait[0],
            "text": (refusal.text if refusal else report.text or self._wait[1])[:500],
            "attempt": report.attempt,
            "moved_bytes": report.moved_bytes,
        }
        if refusal:
            fields["refused"] = {"what": refusal.what, "code": refusal.code, "claimed": refusal.claimed}
        return fields

    def status(self) -> dict[str, Any]:
        """For the status page."""
        update, now_s = self.lifecycle.update, self._now_s()
        check_s = self.lifecycle.next_check_s()
        return {
            **self.reported(),
            "state": update.state.value,
            "from": dict(self._from),
            "to": dict(self._to),
            "rollout": update.target.rollout if update.target else "",
            "since_s": max(0.0, now_s - update.since_s) if update.since_s else None,
            "next_check_in_s": None if check_s is None else max(0.0, check_s - now_s),
            "waiting": {"code": self._wait[0], "text": self._wait[1]},
            "previous": self._labels(update.previous) if update.previous else {},
            "unsaved": self._unsaved,
            "unpointed": self._unpointed is not None,
            "trials": [
                {"artifact": self._depot.label(one.digest), "golden_rows": one.golden_rows, "p50_us": one.p50_us,
                 "peak_rss_bytes": one.peak_rss_bytes}
                for one in self._installer.trials
            ],
            "numbers": {**self.lifecycle.statistics(), **self._numbers},
        }  # fmt: skip

    # --- commands -------------------------------------------------------------------------------------------
    def _drain(self) -> None:
        """Execute what waits, in order; a state that cannot be stored holds up what follows it."""
        if self._draining:
            return
        self._draining = True
        try:
            while self._queue:
                command = self._queue[0]
                if isinstance(command, PersistUpdate) and not self._persisted(command):
                    return
                self._queue.popleft()
                self._execute(command)
        finally:
            self._draining = False

    def _persisted(self, command: PersistUpdate) -> bool:
        try:
            self._store.put_value(UPDATE, command.state, durable=True)
        except StorageError as error:
            if not self._unsaved:
                self._journal.error("update.unsaved", error.sentence(), code=error.code)
            self._unsaved = True
            # back to what works must not wait for a disk
            return any(isinstance(waiting, Rollback) for waiting in self._queue)
        self._unsaved = False
        return True

    def _execute(self, command: UpdateCommand) -> None:
        match command:
            case PersistUpdate():
                pass
            case Report():
                self._tell(command)
            case Fetch() | Verify() | SelfTest():
                self._install(command)
            case Swap(ticket=ticket, target=target):
                self._losses = 0
                self._unpointed = None  # the pointer goes forward now
                self._slow_before = self._slow()
                self._prepare(ticket, target.services, self._ready_to_swap)
            case Rollback(ticket=ticket, to=to):
                self._unpointed = to
                self._prepare(ticket, to, self._depot.recover)
                self._point_back()
            case Commit(target=target, previous=previous):
                keep = target.digests() | digests(previous)
                self._chores.start(lambda: self._collect(keep), self._collected)

    def _install(self, command: Fetch | Verify | SelfTest) -> None:
        installed = self.lifecycle.update.installed
        unknown = sorted(set(command.target.services) - set(self._depot.factory_selection))
        if unknown:
            failure = StepFailed(command.ticket, "incompatible", f"this device has no service '{unknown[0]}'")
            self._chores.start(lambda: failure, self._stepped(command.ticket))
            return

        def work() -> StepDone | StepFailed:
            done = self._installer.execute(
                command, installed=installed, wall_s=wall_s(),
                cancelled=lambda: self.lifecycle.update.ticket != command.ticket,
            )  # fmt: skip
            self._numbers = self._installer.statistics()
            return done

        self._chores.start(work, self._stepped(command.ticket))

    def _stepped(self, ticket: int) -> Callable[[StepDone | StepFailed | EdgewardenError], None]:
        def done(outcome: StepDone | StepFailed | EdgewardenError) -> None:
            self._name_versions()
            if isinstance(outcome, EdgewardenError):
                outcome = StepFailed(ticket, outcome.code, outcome.sentence())
            self.handle(outcome)

        return done

    # --- swapping -------------------------------------------------------------------------------------------
    def _prepare(
        self, ticket: int, to: Selection, work: Callable[[Selection], tuple[Selection, tuple[Blueprint, ...]]]
    ) -> None:
        def done(outcome: tuple[Selection, tuple[Blueprint, ...]] | EdgewardenError) -> None:
            if ticket != self.lifecycle.update.ticket:
                return  # the step was left meanwhile
            if isinstance(outcome, EdgewardenError):
                self.handle(StepFailed(ticket, outcome.code, outcome.sentence()))
            else:
                self._hooks.change(*outcome, lambda code, text: self._changed(ticket, code, text))

        self._chores.start(lambda: work(to), done)

    def _ready_to_swap(self, to: Selection) -> tuple[Selection, tuple[Blueprint, ...]]:
        """In the thread: read every byte once more, then point at it."""
        made = self._depot.blueprints(to)
        self._installer.slots.point(self._pointed(to))
        return to, made

    def _point_back(self) -> None:
        """Best effort, beside the worker's return and after it: no disk may hold up the way back."""
        to = self._unpointed
        if to is None or self._pointing:
            return
        self._pointing = True

        def done(outcome: Pointer | EdgewardenError) -> None:
            self._pointing = False
            if not isinstance(outcome, EdgewardenError):
                self._unpointed = None if self._unpointed is to else self._unpointed
            elif not self._mispointed:
                self._journal.error("update.pointer", outcome.sentence(), code=outcome.code)
            self._mispointed = isinstance(outcome, EdgewardenError)

        self._chores.start(lambda: self._installer.slots.point(self._pointed(to)), done)

    def _pointed(self, to: Selection) -> Selection | None:
        """The factory's selection follows the configuration: no pointer is kept to it."""
        return None if to == self._depot.factory_selection else to

    def _changed(self, ticket: int, code: str, text: str) -> None:
        self.handle(StepFailed(ticket, code, text) if code else StepDone(ticket))

    def _collect(self, keep: frozenset[str]) -> int:
        freed = self._installer.slots.collect(keep)
        freed += ModelCache(self._installer.site.folder / CACHE).prune(self._depot.models())
        self._numbers = self._installer.statistics()
        return freed

    def _collected(self, outcome: int | EdgewardenError) -> None:
        if isinstance(outcome, EdgewardenError):
            self._journal.warning("update.collect", outcome.sentence(), code=outcome.code)
        elif outcome:
            self._journal.info("update.collect", f"{outcome} bytes of former artifacts are free again")

    # --- probation ------------------------------------------------------------------------------------------
    def _failure(self) -> CandidateFailed | None:
        """What is wrong with the candidate, in the thin form: failing engines, and latency over its budget."""
        update = self.lifecycle.update
        if update.state is not State.PROBATION or not update.swapped or update.target is None:
            return None
        known = digests(update.installed)
        for service, status in self._hooks.statuses().items():
            choice = update.target.services.get(service)
            new = (
                {engine: digest for engine, digest in choice.artifacts.items() if digest not in known}
                if choice
                else {}
            )
            for engine, why in status["benched"].items():
                if engine in new:
                    return CandidateFailed("engine_failed", why, (new[engine],))
            for engine in (self._slow() - self._slow_before) & new.keys():
                return CandidateFailed("latency", f"{engine} is slower than its budget allows", (new[engine],))
        return None

    def _slow(self) -> frozenset[str]:
        """Engines with an open latency alarm."""
        return frozenset(
            alarm["engine"]
            for status in self._hooks.statuses().values()
            for alarm in status["alarms"]
            if alarm["kind"] == AlarmKind.LATENCY
        )

    # --- telling --------------------------------------------------------------------------------------------
    def _tell(self, report: Report) -> None:
        update = self.lifecycle.update
        self._report, self._refusal = report, None
        self._name_versions()
        named = ", ".join(sorted(set(self._to.values()))) or "the configured models"
        because = f": {report.text}" if report.text else ""
        text = f"desired version {report.version} ({named}): {report.state.value}{because}"
        details = {
            "state": report.state.value, "code": report.code, "version": report.version, "from": dict(self._from),
            "to": dict(self._to), "rollout": update.target.rollout if update.target else "",
        }  # fmt: skip
        numbers = {"moved_bytes": float(report.moved_bytes), "attempt": float(report.attempt)}
        severity = SEVERITIES.get(report.state, "info")
        self._hooks.publish(Publish(severity, "update", text, numbers=numbers, details=details))
        self._hooks.report()

    def _name_versions(self) -> None:
        """Labels of what an update comes from and goes to; after it committed they still tell its story."""
        update = self.lifecycle.update
        before = update.previous if update.state is State.COMMITTED and update.previous else update.installed
        self._from = self._labels(before)
        self._to = self._labels(update.target.services) if update.target else {}

    def _labels(self, selection: Selection) -> dict[str, str]:
        """Service -> name and version of its best engine."""
        return {
            service: self._depot.label(choice.artifacts[choice.order[0]])
            for service, choice in selection.items()
            if choice.order
        }

    # --- inside ---------------------------------------------------------------------------------------------
    def _load(self) -> Update | None:
        try:
            saved = self._store.value(UPDATE)
            return load_update(saved) if saved else None
        except (StorageError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._journal.error("update.unreadable", f"starting with no memory of updates: {error!r}")
            return None

    def _now_s(self) -> float:
        return self._clock[0] + monotonic_s() - self._clock[1]


def _is_stray(update: Update, serving: Selection) -> bool:
    """Whether what the pointer names was taken back: it could not be written then."""
    if serving == update.installed:
        return False
    left = update.state is State.ROLLED_BACK and update.target is not None and serving == update.target.services
    return left or not digests(serving).isdisjoint(update.quarantined)


def _healed(update: Update, serving: Selection, problem: str, now_s: float) -> Update:
    """What was installed cannot be served any more; if the last update brought it, it is fetched again."""
    if update.target is None or update.target.services != update.installed or update.state not in RESTING:
        return replace(update, installed=serving)
    return replace(
        update, state=State.FAILED, installed=serving, previous=None, code="corrupt", text=problem[:500],
        since_s=now_s, began_s=now_s, retry_at_s=now_s, swapped=False,
    )  # fmt: skip
