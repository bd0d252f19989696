"""From what the database holds to what the planner is asked: one situation per cohort and service. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from compressor.config import HostConfig
from compressor.fleet.catalogue import Catalogue
from compressor.fleet.database import Connection, Row, messages, plans
from compressor.fleet.evidence import ALARMS, Standing, largest_shift, standing
from compressor.fleet.planner import Ask, Attempt, Limits, Outcome, Report, Situation
from compressor.fleet.rollout import State

DAY_S = 86_400.0
EVIDENCE_S = 7 * DAY_S  # a report nobody renewed or cleared for so long no longer stands
MAX_EVENTS = 500  # alarms of one device that are looked at
MAX_DRIFTS = 8  # drift events of one member that say whether it drifts now: half a millisecond each member
MAX_WINDOWS = 64  # drift windows of one device that are looked at
ENOUGH_ROWS = 256
MAX_ASKS_PER_DAY = 3  # requests of one device, whatever they are about
TRIES = 2  # requests of one device about one reference before it counts as failed
HELD = "automatic_regeneration_held"


def situations(tx: Connection, config: HostConfig, catalogue: Catalogue, *, now_s: float) -> list[Situation]:
    """Every cohort and service that something is reported of."""
    found = []
    for cohort, members in config.fleet.cohorts.items():
        reports = [entry for device in members for entry in _standing_of(tx, device, now_s)]
        for service in sorted({entry.service for entry in reports}):
            mine = [entry for entry in reports if entry.service == service]
            found.append(_situation(tx, config, catalogue, cohort, service, mine, now_s))
    return found


def _standing_of(tx: Connection, device: str, now_s: float) -> list[Standing]:
    newest = messages.events(tx, device=device, kinds=ALARMS, since=now_s - EVIDENCE_S, limit=MAX_EVENTS)
    return standing(reversed(newest))


def drifting(tx: Connection, members: Iterable[str], service: str, *, now_s: float) -> tuple[str, ...]:
    """Members whose drift of this service stands, by their newest reports."""
    found = []
    for device in members:
        newest = messages.events(tx, device=device, kinds=("drift",), since=now_s - EVIDENCE_S, limit=MAX_DRIFTS)
        if any(entry.service == service and entry.drifting for entry in standing(reversed(newest))):
            found.append(device)
    return tuple(found)


def _situation(
    tx: Connection, config: HostConfig, catalogue: Catalogue, cohort: str, service: str,
    standings: Iterable[Standing], now_s: float,
) -> Situation:  # fmt: skip
    fleet, regeneration = config.fleet, config.regeneration
    reports = tuple(_report(tx, entry, catalogue, now_s) for entry in standings)
    references = {report.reference for report in reports}
    everything = plans.samples(tx, service=service)
    samples = [row for row in everything if row.reference in references]
    asked_at = [row.asked_at for row in samples]
    mine = bool(regeneration.recipe) and (cohort, service) == (regeneration.cohort, regeneration.service)
    return Situation(
        cohort=cohort,
        service=service,
        devices=tuple(sorted(fleet.cohorts[cohort])),
        reports=reports,
        asks=asks_of(samples, asked_enough(everything, now_s=now_s)),
        attempts=attempts_of(plans.jobs(tx), plans.rollouts(tx), cohort, service),
        budget_left=max(0, regeneration.budget_per_day - plans.jobs_since(tx, service, now_s - DAY_S)),
        limits=Limits(
            quorum=fleet.quorum, persisted_windows=fleet.persisted_windows, least_shift=fleet.least_shift,
            patience_s=fleet.patience_s, collect_s=fleet.collect_s,
        ),
        last_ask_age_s=now_s - max(asked_at) if asked_at else None,
        held=not mine or plans.setting(tx, HELD) is True,
    )  # fmt: skip


def _report(tx: Connection, entry: Standing, catalogue: Catalogue, now_s: float) -> Report:
    newest = messages.windows(tx, entry.device, entry.service, limit=MAX_WINDOWS)
    shift = largest_shift(newest, reference=entry.reference, enough_rows=ENOUGH_ROWS)
    names = catalogue.features(shift.reference) if shift is not None else ()
    reference = entry.reference or (shift.reference if shift is not None else "")
    return Report(
        device=entry.device,
        guards=entry.guards,
        drifting=entry.drifting,
        channels=entry.channels,
        single_channel=entry.single_channel,
        persisted_windows=entry.persisted_windows,
        harmful=entry.harmful,
        reference=reference,
        rows=shift.rows if shift is not None else 0,
        shift=shift.size if shift is not None else 0.0,
        feature=names[shift.feature] if shift is not None and shift.feature < len(names) else "",
        age_s=max(0.0, now_s - entry.heard),
        known=catalogue.has_reference(reference),
    )


def asked_enough(samples: Iterable[Row[Any]], *, now_s: float) -> frozenset[str]:
    """Devices that were asked as often as a day allows, about whatever."""
    counts = Counter(row.device for row in samples if row.asked_at > now_s - DAY_S)
    return frozenset(device for device, count in counts.items() if count >= MAX_ASKS_PER_DAY)


def asks_of(samples: Iterable[Row[Any]], enough: frozenset[str] = frozenset()) -> dict[str, Ask]:
    """Device -> where its recordings stand. samples: newest first. One failed try is repeated, a refusal is not.

    enough: devices that are not asked again now.
    """
    states: dict[str, list[str]] = {}
    for row in samples:
        states.setdefault(row.device, []).append(row.state)
    found = {device: _ask(tries) for device, tries in states.items()}
    return found | {device: Ask.FAILED for device in enough if found.get(device, Ask.NONE) is Ask.NONE}


def _ask(tries: list[str]) -> Ask:
    if "accepted" in tries:
        return Ask.DELIVERED
    if "asked" in tries:
        return Ask.OPEN
    return Ask.FAILED if "refused" in tries or len(tries) >= TRIES else Ask.NONE


def attempts_of(
    jobs: Iterable[Row[Any]], rollouts: Iterable[Row[Any]], cohort: str, service: str
) -> tuple[Attempt, ...]:
    """Regenerations of this cohort and service, with what became of them."""
    newest = {row.job: row.state for row in rollouts}
    return tuple(
        Attempt(frozenset(row.devices), frozenset(row.references) - {""}, _outcome(row, newest.get(row.id)))
        for row in jobs
        if (row.cohort, row.service) == (cohort, service)
    )


def _outcome(job: Row[Any], rollout: str | None) -> Outcome:
    """rollout: state of the newest rollout of this job's artifacts; None = there is none."""
    if job.state in plans.OPEN_JOBS or rollout in plans.OPEN_ROLLOUTS:
        return Outcome.RUNNING
    if job.state == "failed":
        return Outcome.FAILED
    return Outcome.HALTED if rollout == State.HALTED else Outcome.DONE
