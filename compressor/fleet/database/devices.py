"""Devices: who is enrolled, what they last said of themselves, what is desired of them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from compressor.fleet.database.tables import DEVICE, TOKEN

MAX_TOKENS = 1000


def known(tx: Connection) -> set[str]:
    """Ids of enrolled devices."""
    return set(tx.execute(select(DEVICE.c.id).where(DEVICE.c.enrolled_at.is_not(None))).scalars())


def find(tx: Connection, device: str) -> Row[Any] | None:
    return tx.execute(select(DEVICE).where(DEVICE.c.id == device)).first()


def listed(tx: Connection, *, limit: int = 1000) -> list[Row[Any]]:
    return list(tx.execute(select(DEVICE).order_by(DEVICE.c.id).limit(limit)))


def count(tx: Connection) -> int:
    return int(tx.execute(select(func.count()).select_from(DEVICE)).scalar_one())


def change(tx: Connection, device: str, *, now_s: float, **values: Any) -> None:
    """Set columns of a device; it is made when it is new."""
    if find(tx, device) is None:
        tx.execute(insert(DEVICE).values(id=device, desired_version=0, command_seq=0, first_seen_at=now_s))
    if values:
        tx.execute(update(DEVICE).where(DEVICE.c.id == device).values(values))


def next_command_seq(tx: Connection, device: str) -> int:
    """Strictly increasing per device, for ever."""
    return _count_up(tx, device, DEVICE.c.command_seq)


def next_desired_version(tx: Connection, device: str) -> int:
    return _count_up(tx, device, DEVICE.c.desired_version)


def _count_up(tx: Connection, device: str, column: Any) -> int:
    tx.execute(update(DEVICE).where(DEVICE.c.id == device).values({column.name: column + 1}))
    return int(tx.execute(select(column).where(DEVICE.c.id == device)).scalar_one())


# --- enrolment -------------------------------------------------------------------------------------------------
def add_token(tx: Connection, digest: str, device: str, *, now_s: float, lifetime_s: float) -> None:
    tx.execute(TOKEN.delete().where(TOKEN.c.expires_at < now_s))
    tx.execute(insert(TOKEN).values(sha256=digest, device=device, created_at=now_s, expires_at=now_s + lifetime_s))


def use_token(tx: Connection, digest: str, device: str, *, now_s: float) -> bool:
    """True once: the token exists, is for this device, is not over and was not used before."""
    valid = (
        (TOKEN.c.sha256 == digest) & (TOKEN.c.device == device) & TOKEN.c.used_at.is_(None)
        & (TOKEN.c.expires_at >= now_s)
    )  # fmt: skip
    return bool(tx.execute(update(TOKEN).where(valid).values(used_at=now_s)).rowcount)


def is_repeated(tx: Connection, digest: str, device: str, public_key: str, *, now_s: float) -> bool:
    """Whether this is once more what enrolled the device as it is now: the answer was lost on its way.

    The same token, not over, for the same device with the same key; a device without a key cannot say who it is.
    """
    first = (TOKEN.c.sha256 == digest) & (TOKEN.c.device == device) & (TOKEN.c.expires_at >= now_s)
    same = (DEVICE.c.id == TOKEN.c.device) & (DEVICE.c.enrolled_at == TOKEN.c.used_at)
    keyed = DEVICE.c.public_key == public_key
    return bool(public_key) and tx.execute(select(TOKEN.c.used_at).where(first, same, keyed)).first() is not None
