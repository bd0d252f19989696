"""What the host decided and what became of it: decisions, samples, jobs, rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Table, delete, func, insert, select, update

from compressor.fleet.database.tables import DECISION, JOB, ROLLOUT, SAMPLE, SETTING

MAX_DECISIONS = 10_000
RECORD_AGAIN_S = 30.0  # a decision that stands is written down no more often
OPEN_JOBS = ("queued", "running", "built")
OPEN_ROLLOUTS = ("draft", "running", "soaking")


def _change(tx: Connection, table: Table, key: Any, values: dict[str, Any]) -> None:
    tx.execute(update(table).where(table.c.id == key).values(values))


# --- decisions -------------------------------------------------------------------------------------------------
def record(tx: Connection, decision: dict[str, Any], *, now_s: float) -> tuple[int, bool]:
    """Write a decision down, or count it again when the same one still stands. Returns its id and if it is new.

    Standing: the newest decision about these devices, by this cohort and service, has the same row.
    """
    same = (DECISION.c.cohort == decision["cohort"]) & (DECISION.c.service == decision["service"])
    query = select(DECISION).where(same).order_by(DECISION.c.id.desc()).limit(50)
    last = next((row for row in tx.execute(query) if set(row.devices) & set(decision["devices"])), None)
    if last is not None and (last.row, last.devices) == (decision["row"], decision["devices"]):
        if now_s - last.last_at < RECORD_AGAIN_S:
            return int(last.id), False
        repeated = {"last_at": now_s, "repeated": last.repeated + 1}
        _change(tx, DECISION, last.id, repeated)
        return int(last.id), False
    done = tx.execute(insert(DECISION).values({**decision, "at": now_s, "last_at": now_s, "repeated": 0}))
    return int(done.inserted_primary_key[0]), True  # type: ignore[index]


def decisions(tx: Connection, *, limit: int = 100) -> list[Row[Any]]:
    return list(tx.execute(select(DECISION).order_by(DECISION.c.id.desc()).limit(limit)))


def decision(tx: Connection, number: int) -> Row[Any] | None:
    return tx.execute(select(DECISION).where(DECISION.c.id == number)).first()


def prune_decisions(tx: Connection) -> int:
    border = tx.execute(select(DECISION.c.id).order_by(DECISION.c.id.desc()).offset(MAX_DECISIONS).limit(1)).scalar()
    return tx.execute(delete(DECISION).where(DECISION.c.id <= border)).rowcount if border else 0


# --- samples ---------------------------------------------------------------------------------------------------
def add_sample(tx: Connection, **values: Any) -> None:
    tx.execute(insert(SAMPLE).values(state="asked", attempts=0, **values))


def sample(tx: Connection, name: str) -> Row[Any] | None:
    return tx.execute(select(SAMPLE).where(SAMPLE.c.id == name)).first()


def change_sample(tx: Connection, name: str, **values: Any) -> None:
    _change(tx, SAMPLE, name, values)


def remove_sample(tx: Connection, name: str) -> None:
    tx.execute(delete(SAMPLE).where(SAMPLE.c.id == name))


def samples(tx: Connection, *, service: str = "", device: str = "", states: Sequence[str] = ()) -> list[Row[Any]]:
    """Newest first."""
    query = select(SAMPLE).order_by(SAMPLE.c.asked_at.desc(), SAMPLE.c.id).limit(1000)
    if service:
        query = query.where(SAMPLE.c.service == service)
    if device:
        query = query.where(SAMPLE.c.device == device)
    if states:
        query = query.where(SAMPLE.c.state.in_(states))
    return list(tx.execute(query))


# --- jobs ------------------------------------------------------------------------------------------------------
def add_job(tx: Connection, **values: Any) -> int:
    done = tx.execute(insert(JOB).values(state="queued", attempts=0, **values))
    return int(done.inserted_primary_key[0])  # type: ignore[index]


def change_job(tx: Connection, number: int, **values: Any) -> None:
    _change(tx, JOB, number, values)


def jobs(tx: Connection, *, states: Sequence[str] = (), limit: int = 100) -> list[Row[Any]]:
    """Oldest first of the newest `limit`."""
    query = select(JOB).order_by(JOB.c.id.desc()).limit(limit)
    return list(tx.execute(query.where(JOB.c.state.in_(states)) if states else query))[::-1]


def jobs_since(tx: Connection, service: str, since: float) -> int:
    query = select(func.count()).select_from(JOB).where(JOB.c.service == service, JOB.c.created_at > since)
    return int(tx.execute(query).scalar_one())


# --- rollouts --------------------------------------------------------------------------------------------------
def add_rollout(tx: Connection, **values: Any) -> int:
    done = tx.execute(insert(ROLLOUT).values(halt_asked=False, **values))
    return int(done.inserted_primary_key[0])  # type: ignore[index]


def change_rollout(tx: Connection, number: int, **values: Any) -> bool:
    """False when there is no such rollout."""
    return bool(tx.execute(update(ROLLOUT).where(ROLLOUT.c.id == number).values(values)).rowcount)


def rollouts(tx: Connection, *, states: Sequence[str] = (), limit: int = 100) -> list[Row[Any]]:
    """Oldest first of the newest `limit`."""
    query = select(ROLLOUT).order_by(ROLLOUT.c.id.desc()).limit(limit)
    return list(tx.execute(query.where(ROLLOUT.c.state.in_(states)) if states else query))[::-1]


# --- settings an operator may change while the host runs ---------------------------------------------------------
def setting(tx: Connection, name: str) -> Any:
    return tx.execute(select(SETTING.c.value).where(SETTING.c.name == name)).scalar()


def put_setting(tx: Connection, name: str, value: Any) -> None:
    if not tx.execute(update(SETTING).where(SETTING.c.name == name).values(value=value)).rowcount:
        tx.execute(insert(SETTING).values(name=name, value=value))
