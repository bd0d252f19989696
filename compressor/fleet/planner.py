"""What follows from what the fleet reports: one literal table. Pure: no clock, no I/O, no memory.

A situation (one service of one cohort) falls into cases: each broken sensor, each change that many share, the
new population. Every case meets exactly one row; the first that fits decides. A decision carries its numbers and
a sentence for the person who asks why.

Between a lying device and the fleet stand: the quorum (a training needs so many devices that say the same), the
evidence (a drift whose windows are missing or show nothing does not count), the daily budget, and the canary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """What to do."""

    MAINTENANCE = "maintenance"  # a person should look at one device; no training
    NOTE = "note"  # remember, do nothing
    WATCH = "watch"  # more devices must say the same
    ASK_SAMPLES = "ask-samples"  # the evidence is thin or contradicts itself: ask for recordings
    ASK_ENROLMENT = "ask-enrolment"  # a new population: ask for labelled recordings of it
    WAIT_SAMPLES = "wait-samples"
    WAIT_RUNNING = "wait-running"
    WAIT_BUDGET = "wait-budget"
    REGENERATE = "regenerate"


MAX_HALTED: Final = 2  # regenerations from the same recordings whose rollout was halted, before a person must look
ALONE: Final = "thin-evidence"  # the row that asks without a quorum
ASKS: Final = frozenset({Kind.ASK_SAMPLES, Kind.ASK_ENROLMENT})


class Pattern(StrEnum):
    LOCAL = "local"  # a broken input or one channel, on too few devices to be the world
    COMMON = "common"  # the same broken input or channel on most devices of the cohort
    NOVELTY = "novelty"  # persistent drift of many channels without any guard
    EARLY = "early"  # drift that has not lasted and did no harm
    ANSWERED = "answered"  # what a finished regeneration was made for


class Ask(StrEnum):
    """Where the request for one device's recordings stands."""

    NONE = "none"
    OPEN = "open"
    DELIVERED = "delivered"
    FAILED = "failed"  # refused, expired or unusable


class Outcome(StrEnum):
    RUNNING = "running"  # in training, or on its way to the devices
    DONE = "done"
    FAILED = "failed"
    HALTED = "halted"  # built and published, but its rollout was halted


@dataclass(frozen=True, slots=True)
class Report:
    """What one device says, and what its windows show. `rows`, `shift`: of its newest drift windows."""

    device: str
    guards: tuple[str, ...] = ()
    drifting: bool = False
    channels: tuple[str, ...] = ()
    single_channel: bool = False
    persisted_windows: int = 0
    harmful: bool = False
    reference: str = ""
    rows: int = 0
    shift: float = 0.0
    feature: str = ""
    age_s: float = 0.0  # since the host last heard of it
    known: bool = True  # what it drifts from is published


@dataclass(frozen=True, slots=True)
class Attempt:
    """A regeneration: whose recordings it learned from, and which references' reports it answers."""

    devices: frozenset[str]
    references: frozenset[str]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Limits:
    """`patience_s`: how long a first report waits for others and for its windows before it is asked alone;
    `collect_s`: how long after the last request other devices may still join; `least_shift`: in standard
    deviations of the reference, below which a claimed drift counts as contradicted.
    """

    quorum: int = 2
    persisted_windows: int = 64
    least_shift: float = 0.1
    patience_s: float = 60.0
    collect_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Situation:
    """One service of one cohort, now. `last_ask_age_s`: since the newest request; None = never asked."""

    cohort: str
    service: str
    devices: tuple[str, ...]
    reports: tuple[Report, ...]
    asks: dict[str, Ask]
    attempts: tuple[Attempt, ...]
    budget_left: int
    limits: Limits
    last_ask_age_s: float | None = None
    held: bool = False  # automatic regeneration is switched off


@dataclass(frozen=True, slots=True)
class Decision:
    """`row` names the line of the table; `devices` whom it concerns; `references` what the counted drift from."""

    kind: Kind
    row: str
    cohort: str
    service: str
    devices: tuple[str, ...]
    reason: str
    numbers: dict[str, float]
    references: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, str, str, tuple[str, ...]]:
        """Two decisions of the same identity say the same thing."""
        return (self.cohort, self.service, self.row, self.devices)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the table asks of a case."""

    pattern: Pattern
    running: bool
    fresh: bool  # the newest report is so young that others may follow
    quorum: bool  # enough devices with evidence say so
    known: bool  # somebody not asked yet drifts from something published
    asked: bool  # everybody counted was asked for recordings
    complete: bool  # no recording is outstanding any more, and nobody else is expected
    delivered: bool  # enough recordings are here
    failed: bool  # a regeneration from these very recordings failed
    budget: bool
    held: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line: the facts it wants (None = whatever), and what it decides."""

    name: str
    patterns: tuple[Pattern, ...]
    kind: Kind
    reason: str
    running: bool | None = None
    fresh: bool | None = None
    quorum: bool | None = None
    known: bool | None = None
    asked: bool | None = None
    complete: bool | None = None
    delivered: bool | None = None
    failed: bool | None = None
    budget: bool | None = None
    held: bool | None = None

    def fits(self, facts: Facts) -> bool:
        wanted = ((name, getattr(self, name)) for name in CONDITIONS)
        return facts.pattern in self.patterns and all(
            want is None or want == getattr(facts, name) for name, want in wanted
        )


CONDITIONS: Final = (
    "running", "fresh", "quorum", "known", "asked", "complete", "delivered", "failed", "budget", "held",
)  # fmt: skip
_TRAIN: Final = (Pattern.COMMON, Pattern.NOVELTY)
_NEW: Final = (Pattern.NOVELTY,)
_SAME: Final = (Pattern.COMMON,)

# fmt: off
TABLE: Final = (
    Row("local-fault", (Pattern.LOCAL,), Kind.MAINTENANCE,
        "{finding} on {devices} only ({count} of {members} devices): a sensor to repair, nothing to learn"),
    Row("drift-without-harm", (Pattern.EARLY,), Kind.NOTE,
        "{devices} drifts for {windows} windows, below the {limit} that count: noted"),
    Row("answered", (Pattern.ANSWERED,), Kind.NOTE,
        "a regeneration already answers what {devices} reported"),
    Row("running", _TRAIN, Kind.WAIT_RUNNING,
        "a regeneration or its rollout is under way; {devices} must wait for it", running=True),
    Row("first-report", _NEW, Kind.WATCH,
        "{count} of {quorum_size} devices report a new population: waiting for others", quorum=False, fresh=True),
    Row("unknown-model", _NEW, Kind.WATCH,
        "{devices} drifts from something that nobody published: not asked", quorum=False, asked=False, known=False),
    Row(ALONE, _NEW, Kind.ASK_SAMPLES,
        "{count} of {quorum_size} devices with a persistent drift that their windows support: too little to act on; "
        "{devices} is asked for recordings", quorum=False, asked=False),
    Row("under-quorum", _NEW, Kind.WATCH,
        "{count} of {quorum_size} devices report a new population: a single device never starts a training",
        quorum=False),
    Row("common-change", _SAME, Kind.ASK_SAMPLES,
        "{finding} on {count} of {members} devices: the world changed, not a sensor; {devices} are asked "
        "for recordings",
        asked=False),
    Row("new-population", _NEW, Kind.ASK_ENROLMENT,
        "{count} devices drift for {windows} windows or more with no guard and no single channel to blame "
        "(largest shift {shift} sd): a new population; {devices} are asked for enrolment recordings", asked=False),
    Row("collecting", _TRAIN, Kind.WAIT_SAMPLES,
        "{here} of {asked_count} recordings are here; waiting for the others", complete=False),
    Row("no-recordings", _TRAIN, Kind.WAIT_SAMPLES,
        "only {here} of the {quorum_size} recordings that are needed could be had: a person must provide them",
        delivered=False),
    Row("failed-before", _TRAIN, Kind.NOTE,
        "a regeneration from the recordings of {devices} failed before: a person must look", failed=True),
    Row("held", _TRAIN, Kind.WATCH,
        "everything for a regeneration is here, but automatic regeneration is switched off", held=True),
    Row("budget-spent", _TRAIN, Kind.WAIT_BUDGET,
        "today's regenerations are used up; this one waits", budget=False),
    Row("regenerate-common", _SAME, Kind.REGENERATE,
        "{finding} on {count} of {members} devices, {here} recordings are here: regenerate"),
    Row("regenerate", _NEW, Kind.REGENERATE,
        "a new population on {count} of {members} devices (quorum {quorum_size}), {here} recordings are here: "
        "regenerate"),
)
# fmt: on
"""The first row that fits decides."""


@dataclass(frozen=True, slots=True)
class Case:
    """Devices that say the same. `reports` count; `doubtful` claim it without evidence."""

    pattern: Pattern
    reports: tuple[Report, ...]
    doubtful: tuple[Report, ...] = ()
    finding: str = ""

    @property
    def everybody(self) -> tuple[Report, ...]:
        return (*self.reports, *self.doubtful)


def plan(situation: Situation) -> tuple[Decision, ...]:
    """One decision per case; nothing when nothing is reported."""
    return tuple(_decide(situation, case) for case in cases(situation))


def cases(situation: Situation) -> Iterator[Case]:
    """Sort the reports of the cohort's members: what is broken where, what is shared, who is new."""
    reports = [report for report in situation.reports if report.device in situation.devices]
    shared = _shared(situation, reports)
    for finding in sorted(set(shared.values())):
        same = tuple(report for report in reports if shared.get(report.device) == finding)
        yield Case(Pattern.ANSWERED if _learned(situation, same) else Pattern.COMMON, same, finding=finding)
    rest = [report for report in reports if report.device not in shared]
    for report in rest:
        if findings := findings_of(report):
            yield Case(Pattern.LOCAL, (report,), finding=", ".join(findings))
    yield from _drifts(situation, [report for report in rest if report.drifting and not findings_of(report)])


def _drifts(situation: Situation, drifting: list[Report]) -> Iterator[Case]:
    limits = situation.limits
    done = {reference for a in situation.attempts if a.outcome is Outcome.DONE for reference in a.references}
    if answered := tuple(report for report in drifting if report.reference in done):
        yield Case(Pattern.ANSWERED, answered)
    open_ = [report for report in drifting if report not in answered]
    lasting = [r for r in open_ if r.persisted_windows >= limits.persisted_windows or r.harmful]
    if lasting:
        supported = tuple(report for report in lasting if _supported(report, limits))
        yield Case(Pattern.NOVELTY, supported, tuple(report for report in lasting if report not in supported))
    for report in open_:
        if report not in lasting:
            yield Case(Pattern.EARLY, (report,))


def _learned(situation: Situation, same: tuple[Report, ...]) -> bool:
    """A regeneration from the recordings of all of them is done: what stays open after it is nothing new."""
    devices = {report.device for report in same}
    return any(a.outcome is Outcome.DONE and devices <= a.devices for a in situation.attempts)


def findings_of(report: Report) -> tuple[str, ...]:
    """Names of what is broken: guards, or the one channel that drifts."""
    if report.guards:
        return report.guards
    if report.drifting and report.single_channel:
        return tuple(f"drift:{channel}" for channel in report.channels[:1]) or ("drift:one channel",)
    return ()


def _shared(situation: Situation, reports: list[Report]) -> dict[str, str]:
    """Per device, the finding it shares with most of the cohort, if it does."""
    needed = max(situation.limits.quorum, len(situation.devices) // 2 + 1)
    counts = Counter(finding for report in reports for finding in set(findings_of(report)))
    common = [
        finding for finding, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= needed
    ]
    return {
        report.device: next(finding for finding in common if finding in findings_of(report))
        for report in reports
        if set(common) & set(findings_of(report))
    }


def _supported(report: Report, limits: Limits) -> bool:
    return report.rows >= limits.persisted_windows and report.shift >= limits.least_shift


def facts_of(situation: Situation, case: Case) -> Facts:
    """What the table asks about one case."""
    devices = {report.device for report in case.everybody}
    asks = [situation.asks.get(device, Ask.NONE) for device in devices]
    delivered = delivered_of(situation)
    return Facts(
        pattern=case.pattern,
        running=any(attempt.outcome is Outcome.RUNNING for attempt in situation.attempts),
        fresh=min((report.age_s for report in case.everybody), default=0.0) < situation.limits.patience_s,
        quorum=len(case.reports) >= situation.limits.quorum,
        known=bool(_asked_alone(situation, case)),
        asked=Ask.NONE not in asks,
        complete=Ask.OPEN not in situation.asks.values() and _nobody_else(situation),
        delivered=len(delivered) >= situation.limits.quorum,
        failed=_failed_before(situation, delivered),
        budget=situation.budget_left > 0,
        held=situation.held,
    )


def _failed_before(situation: Situation, delivered: set[str]) -> bool:
    """A pipeline failed with these recordings, or what came of them was halted too often."""
    same = [attempt.outcome for attempt in situation.attempts if delivered <= attempt.devices]
    return Outcome.FAILED in same or same.count(Outcome.HALTED) >= MAX_HALTED


def delivered_of(situation: Situation) -> set[str]:
    """Members whose recordings are here."""
    return {device for device in situation.devices if situation.asks.get(device) is Ask.DELIVERED}


def _nobody_else(situation: Situation) -> bool:
    """Every member was asked and answered, or the time for joining is over."""
    asks = [situation.asks.get(device, Ask.NONE) for device in situation.devices]
    age = situation.last_ask_age_s
    return all(ask in {Ask.DELIVERED, Ask.FAILED} for ask in asks) or age is None or age >= situation.limits.collect_s


def _decide(situation: Situation, case: Case) -> Decision:
    facts = facts_of(situation, case)
    row = next(row for row in TABLE if row.fits(facts))
    numbers = _numbers(situation, case)
    devices = _asked_alone(situation, case) if row.name == ALONE else _concerned(situation, case, row.kind)
    words = {
        "finding": case.finding,
        "devices": _listed(devices),
        "count": len(case.reports),
        "members": len(situation.devices),
        "quorum_size": situation.limits.quorum,
        "limit": situation.limits.persisted_windows,
        "windows": min((r.persisted_windows for r in case.everybody), default=0),
        "shift": f"{numbers['largest_shift']:.2f}",
        "here": int(numbers["delivered"]),
        "asked_count": int(numbers["asked"]),
    }
    reason = row.reason.format(**words) + _doubt(case)
    references = tuple(sorted({report.reference for report in case.reports}))
    return Decision(row.kind, row.name, situation.cohort, situation.service, devices, reason, numbers, references)


def _asked_alone(situation: Situation, case: Case) -> tuple[str, ...]:
    """Who may be asked without a quorum: a device that invents what it drifts from is not asked at all."""
    return tuple(sorted(r.device for r in case.everybody if r.known and _not_asked(situation, r.device)))


def _not_asked(situation: Situation, device: str) -> bool:
    return situation.asks.get(device, Ask.NONE) is Ask.NONE


def _concerned(situation: Situation, case: Case, kind: Kind) -> tuple[str, ...]:
    """Who is asked; for a regeneration, whose recordings it learns from; else who reported."""
    everybody = {report.device for report in case.everybody}
    if kind in ASKS:
        return tuple(sorted(device for device in everybody if _not_asked(situation, device)))
    if kind is Kind.REGENERATE:
        return tuple(sorted(delivered_of(situation)))
    return tuple(sorted(everybody))


def _numbers(situation: Situation, case: Case) -> dict[str, float]:
    """Everything the decision rests on."""
    asks = [situation.asks.get(device, Ask.NONE) for device in situation.devices]
    return {
        "members": len(situation.devices),
        "reporting": len(case.everybody),
        "supported": len(case.reports),
        "doubtful": len(case.doubtful),
        "quorum": situation.limits.quorum,
        "least_persisted_windows": min((r.persisted_windows for r in case.everybody), default=0),
        "rows": sum(report.rows for report in case.everybody),
        "largest_shift": round(max((report.shift for report in case.everybody), default=0.0), 4),
        "harmful": sum(report.harmful for report in case.everybody),
        "asked": sum(ask is not Ask.NONE for ask in asks),
        "delivered": len(delivered_of(situation)),
        "failed_requests": sum(ask is Ask.FAILED for ask in asks),
        "budget_left": situation.budget_left,
    }


def _doubt(case: Case) -> str:
    if not case.doubtful:
        return ""
    who = _listed(tuple(sorted(report.device for report in case.doubtful)))
    return f". Not counted: {who}, whose drift windows do not show what the event claims"


def _listed(devices: tuple[str, ...], *, most: int = 6) -> str:
    if not devices:
        return "nobody"
    more = len(devices) - most
    return ", ".join(devices[:most]) + (f" and {more} more" if more > 0 else "")
