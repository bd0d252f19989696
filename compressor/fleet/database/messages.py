"""Messages of devices: each counts once, however often it arrives; the watermark never passes what may still come.

A place in a boot's sequence is settled when its message is here, was refused for good, or was given up by the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from compressor.fleet.database.tables import BOOT, EVENT, MESSAGE, REFUSAL, SKETCH, WINDOW
from compressor.fleet.inbox import EventSeen, Key, TelemetrySeen

MAX_BOOTS = 64  # per device; an older boot's watermark is forgotten
MAX_AHEAD = 20_000  # keys kept above a watermark, per boot: beyond, a gap counts as lost
MAX_EVENTS = 5_000  # per device
MAX_WINDOWS = 5_000
MAX_SKETCHES = 5_000
MAX_REFUSALS = 5_000
OTHERS = "-"  # refusals of devices beyond that share one row per code
FIRST_SEQ = 1  # a device counts its messages from here
CHUNK = 500  # keys asked for at once


def admit(tx: Connection, messages: Sequence[EventSeen | TelemetrySeen], *, now_s: float) -> list[Key]:
    """Store what is new and move the watermarks; returns the keys that were new, in the order given."""
    groups: dict[tuple[str, str], dict[int, EventSeen | TelemetrySeen]] = defaultdict(dict)
    for message in messages:
        groups[message.key.device, message.key.boot].setdefault(message.key.seq, message)
    new = []
    for (device, boot), group in groups.items():
        new += _admit_boot(tx, device, boot, group, now_s)
    _store(tx, new, now_s)
    return [message.key for message in new]


def _admit_boot(
    tx: Connection, device: str, boot: str, group: dict[int, EventSeen | TelemetrySeen], now_s: float
) -> list[EventSeen | TelemetrySeen]:
    committed = _begin(tx, device, boot, now_s)
    fresh = _keep(tx, device, boot, committed, {seq: message.kind for seq, message in group.items()}, now_s)
    _advance(tx, device, boot, committed, len(fresh), now_s)
    return [group[seq] for seq in fresh]


def settle(tx: Connection, keys: Iterable[Key], *, now_s: float) -> None:
    """Refused for good, so nobody shall wait for them: the watermark passes their places."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for key in keys:
        groups[key.device, key.boot][key.seq] = "refused"
    for (device, boot), kinds in groups.items():
        committed = _begin(tx, device, boot, now_s)
        _keep(tx, device, boot, committed, kinds, now_s)
        _advance(tx, device, boot, committed, 0, now_s)


def give_up(tx: Connection, device: str, kept_from: Mapping[str, int], *, now_s: float) -> None:
    """The device says, per boot, that nothing below a number will come any more: the watermark passes the gap."""
    for boot, seq in kept_from.items():
        committed = _begin(tx, device, boot, now_s)
        _advance(tx, device, boot, max(committed, seq - 1), 0, now_s)


def _begin(tx: Connection, device: str, boot: str, now_s: float) -> int:
    """The watermark of a boot, which is made when it is new; one that is too old goes for it."""
    known = tx.execute(select(BOOT.c.committed).where(BOOT.c.device == device, BOOT.c.boot == boot)).scalar()
    if known is None:
        start = {"committed": FIRST_SEQ - 1, "highest": 0, "messages": 0, "last_at": now_s}
        tx.execute(insert(BOOT).values(device=device, boot=boot, **start))
        _make_room(tx, device, boot)
    return FIRST_SEQ - 1 if known is None else int(known)


def _keep(
    tx: Connection, device: str, boot: str, committed: int, kinds: Mapping[int, str], now_s: float
) -> list[int]:
    """Note the keys that are new; returns them in order. kinds: sequence number -> kind of message."""
    seen = _seen(tx, device, boot, list(kinds))
    fresh = [seq for seq in sorted(kinds) if seq > committed and seq not in seen]
    if fresh:
        tx.execute(insert(MESSAGE), [
            {"device": device, "boot": boot, "seq": seq, "kind": kinds[seq], "received_at": now_s} for seq in fresh
        ])  # fmt: skip
    return fresh


def _seen(tx: Connection, device: str, boot: str, seqs: list[int]) -> set[int]:
    found: set[int] = set()
    for start in range(0, len(seqs), CHUNK):
        query = select(MESSAGE.c.seq).where(
            MESSAGE.c.device == device, MESSAGE.c.boot == boot, MESSAGE.c.seq.in_(seqs[start : start + CHUNK])
        )
        found |= set(tx.execute(query).scalars())
    return found


def _advance(tx: Connection, device: str, boot: str, committed: int, count: int, now_s: float) -> None:
    """Move the watermark over all messages that follow it without a gap; their keys are no longer needed."""
    here = (MESSAGE.c.device == device) & (MESSAGE.c.boot == boot)
    ahead = list(tx.execute(select(MESSAGE.c.seq).where(here).order_by(MESSAGE.c.seq)).scalars())
    highest = ahead[-1] if ahead else committed
    if len(ahead) > MAX_AHEAD:
        committed = ahead[-MAX_AHEAD] - 1
    for seq in ahead:
        if seq == committed + 1:
            committed = seq
    tx.execute(delete(MESSAGE).where(here, MESSAGE.c.seq <= committed))
    tx.execute(
        update(BOOT)
        .where(BOOT.c.device == device, BOOT.c.boot == boot)
        .values(committed=committed, highest=func.max(BOOT.c.highest, highest), messages=BOOT.c.messages + count,
                last_at=now_s)
    )  # fmt: skip


def _store(tx: Connection, messages: Iterable[EventSeen | TelemetrySeen], now_s: float) -> None:
    rows: dict[Any, list[dict[str, Any]]] = {EVENT: [], WINDOW: [], SKETCH: []}
    for message in messages:
        key = {**asdict(message.key), "received_at": now_s}
        match message:
            case EventSeen():
                rows[EVENT].append({
                    **key, "at": message.at, "severity": message.severity, "kind": message.about,
                    "service": message.service, "text": message.text, "channels": list(message.channels),
                    "numbers": message.numbers, "details": message.details,
                })  # fmt: skip
            case TelemetrySeen():
                rows[WINDOW] += [{**key, **window} for window in message.windows]
                rows[SKETCH] += [{**key, **sketch} for sketch in message.sketches]
    for table, values in rows.items():
        if values:
            tx.execute(insert(table), values)


def watermarks(tx: Connection, device: str) -> dict[str, int]:
    """Per boot: every message up to this sequence number is committed."""
    query = select(BOOT.c.boot, BOOT.c.committed).where(BOOT.c.device == device).order_by(BOOT.c.last_at.desc())
    return {row.boot: int(row.committed) for row in tx.execute(query.limit(MAX_BOOTS))}


def missing(tx: Connection, device: str) -> int:
    """Messages that a later one says exist, and that are not here (yet)."""
    ahead = func.max(BOOT.c.highest - BOOT.c.committed, 0)
    gaps = tx.execute(select(func.coalesce(func.sum(ahead), 0)).where(BOOT.c.device == device)).scalar_one()
    held = tx.execute(select(func.count()).select_from(MESSAGE).where(MESSAGE.c.device == device)).scalar_one()
    return max(0, int(gaps) - int(held))


def refuse(tx: Connection, refusals: dict[tuple[str, str], tuple[int, str]], *, now_s: float) -> None:
    """Count refusals: (device, code) -> (how many, the last one's words)."""
    room = MAX_REFUSALS - int(tx.execute(select(func.count()).select_from(REFUSAL)).scalar_one())
    for (device, code), (count, text) in refusals.items():
        if _count_refusal(tx, device, code, count, text, now_s):
            continue
        if room > 0:
            tx.execute(insert(REFUSAL).values(device=device, code=code, count=count, last_at=now_s, text=text))
            room -= 1
        elif not _count_refusal(tx, OTHERS, code, count, text, now_s):
            tx.execute(insert(REFUSAL).values(device=OTHERS, code=code, count=count, last_at=now_s, text=text))


def _count_refusal(tx: Connection, device: str, code: str, count: int, text: str, now_s: float) -> bool:
    here = (REFUSAL.c.device == device) & (REFUSAL.c.code == code)
    values = {"count": REFUSAL.c.count + count, "last_at": now_s, "text": text}
    return bool(tx.execute(update(REFUSAL).where(here).values(values)).rowcount)


def refusals(tx: Connection, device: str = "") -> list[Row[Any]]:
    query = select(REFUSAL).order_by(REFUSAL.c.last_at.desc()).limit(100)
    return list(tx.execute(query.where(REFUSAL.c.device == device) if device else query))


def events(
    tx: Connection, *, device: str = "", kinds: Sequence[str] = (), since: float = 0.0, limit: int = 100
) -> list[Row[Any]]:
    """The newest events first."""
    query = select(EVENT).where(EVENT.c.received_at >= since).order_by(EVENT.c.id.desc()).limit(limit)
    if device:
        query = query.where(EVENT.c.device == device)
    if kinds:
        query = query.where(EVENT.c.kind.in_(kinds))
    return list(tx.execute(query))


def windows(tx: Connection, device: str, service: str, *, limit: int) -> list[Row[Any]]:
    """The newest drift windows of one device first."""
    query = select(WINDOW).where(WINDOW.c.device == device, WINDOW.c.service == service)
    return list(tx.execute(query.order_by(WINDOW.c.id.desc()).limit(limit)))


def sketches(tx: Connection, device: str, *, limit: int) -> list[Row[Any]]:
    """The newest latency sketches of one device first."""
    return list(tx.execute(select(SKETCH).where(SKETCH.c.device == device).order_by(SKETCH.c.id.desc()).limit(limit)))


def prune(tx: Connection, device: str) -> int:
    """Keep what one device may occupy; returns how many rows went."""
    gone = 0
    for table, most in ((EVENT, MAX_EVENTS), (WINDOW, MAX_WINDOWS), (SKETCH, MAX_SKETCHES)):
        border = tx.execute(
            select(table.c.id).where(table.c.device == device).order_by(table.c.id.desc()).offset(most).limit(1)
        ).scalar()
        if border is not None:
            gone += tx.execute(delete(table).where(table.c.device == device, table.c.id <= border)).rowcount
    return gone


def _make_room(tx: Connection, device: str, boot: str) -> None:
    """Forget the oldest boots beside this one."""
    others = (BOOT.c.device == device) & (BOOT.c.boot != boot)
    old = select(BOOT.c.boot).where(others).order_by(BOOT.c.last_at.desc()).offset(MAX_BOOTS - 1)
    for name in list(tx.execute(old.limit(CHUNK)).scalars()):
        tx.execute(delete(MESSAGE).where(MESSAGE.c.device == device, MESSAGE.c.boot == name))
        tx.execute(delete(BOOT).where(BOOT.c.device == device, BOOT.c.boot == name))
