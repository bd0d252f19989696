"""The one story of the fleet, a sentence per step, in the order the host learned of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from compressor.fleet.database.tables import TIMELINE

MAX_ROWS = 50_000


def add(tx: Connection, what: str, text: str, *, at: float, device: str = "", severity: str = "info") -> int:
    """`what`: presence, event, decision, sample, job, publish, desired, reported, rollout, enrolment or host."""
    values = {"at": at, "what": what, "severity": severity, "device": device, "text": text[:2000]}
    done = tx.execute(insert(TIMELINE).values(values))
    return int(done.inserted_primary_key[0])  # type: ignore[index]


def newest(tx: Connection, *, device: str = "", limit: int = 100) -> list[Row[Any]]:
    """Newest first."""
    query = select(TIMELINE).order_by(TIMELINE.c.id.desc()).limit(limit)
    return list(tx.execute(query.where(TIMELINE.c.device == device) if device else query))


def since(tx: Connection, number: int, *, limit: int = 1000) -> list[Row[Any]]:
    """Oldest first, after the row `number`."""
    return list(tx.execute(select(TIMELINE).where(TIMELINE.c.id > number).order_by(TIMELINE.c.id).limit(limit)))


def last(tx: Connection) -> int:
    return int(tx.execute(select(func.coalesce(func.max(TIMELINE.c.id), 0))).scalar_one())


def prune(tx: Connection) -> int:
    return tx.execute(delete(TIMELINE).where(TIMELINE.c.id <= last(tx) - MAX_ROWS)).rowcount
