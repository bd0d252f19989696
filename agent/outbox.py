"""Store-and-forward: what the device has to tell waits here, on disk, until a broker has taken it.

Promises: sequence numbers without gaps per boot; a message leaves only when it was taken (`settle`; once a host is
followed, only when that host has it: `acknowledge`), is too old, can never be taken (`refuse`) or has to make room;
what makes room is the oldest of the least important class; everything dropped is counted, and a host that waits for
it can be told (`gaps`). On a full disk a bounded number of messages waits in memory.
Leaves to others: sending (`agent.link`) and bytes on disk (`agent.store`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

from agent.contract.errors import StorageError
from agent.store import Row, Store

HELD_MESSAGES = 256
GONE_MESSAGES = 1000  # finished on a disk too full to forget them; sending pauses beyond
TAKEN_MESSAGES = 1000  # sent and not acknowledged; beyond, sending waits for the host
GAPS_TOLD = 16  # boots at once; the others' turn comes
ROW_OVERHEAD_BYTES = 128  # what table and indexes take beside the payload, generously


class Priority(StrEnum):
    """Classes in order of importance; the letters order the rows."""

    ALARM = "A"  # alarms, installs, decisions
    TELEMETRY = "B"
    SAMPLE = "C"


class _Mark(NamedTuple):
    boot: str
    seq: int
    at: float


class Outbox:
    """The queue between the agent and its broker. Owned by the agent process's main thread."""

    def __init__(self, store: Store, *, boot: str, max_bytes: int, max_age_s: float) -> None:
        """Raises: StateUnreadable."""
        self.boot = boot
        self.max_age_s = max_age_s
        self._store = store
        self._max_bytes = max_bytes
        self._next_seq = 1
        self._held: dict[int, Row] = {}  # not on disk; ids below zero
        self.follows_host = False
        self._taken: dict[int, _Mark] = {}  # the broker has them, the host has not committed them yet
        self._committed: dict[str, int] = {}  # what the host said last
        self._moved = True  # since gaps were looked for
        self._gone: set[int] = set()  # finished, but the full disk could not forget them yet
        self._count, self._bytes, self._oldest_at = store.outbox_totals()
        self._counters = dict.fromkeys(("put", "settled", "expired", "refused", "unwanted", "storage_errors"), 0)
        self._dropped = {priority.value: 0 for priority in Priority}

    def put(self, priority: Priority, topic: str, build: Callable[[int], bytes], *, at: float) -> int:
        """Queue one message and return its sequence number. `build` gets the number and makes the payload.

        An alarm is durable when this returns, unless the disk is full: then it waits in memory.
        """
        seq = self._next_seq
        body = build(seq)
        self._next_seq += 1
        self._counters["put"] += 1
        size = len(body) + len(topic) + ROW_OVERHEAD_BYTES
        row = Row(0, priority.value, self.boot, seq, topic, body, size, at)
        if self._make_room(row):
            self._keep(row)
        else:
            self._drop(priority)
        return seq

    def take(self, limit: int, *, skip_ids: Collection[int], skip_topics: Collection[str], now: float) -> list[Row]:
        """The next messages to send, most important first. They stay until settled.

        `skip_ids`: already on their way. `skip_topics`: refused by the broker for the time being.
        """
        self.tidy(now, skip_ids=skip_ids)
        if len(self._gone) > GONE_MESSAGES or len(self._taken) > TAKEN_MESSAGES:
            return []
        held = [row for row in self._held.values() if row.id not in skip_ids and row.topic not in skip_topics]
        try:
            stored = self._store.rows(limit, skip_ids={*skip_ids, *self._gone, *self._taken}, skip_topics=skip_topics)
        except StorageError:
            self._counters["storage_errors"] += 1
            stored = []
        return sorted([*stored, *held], key=lambda row: row.priority)[:limit]

    def settle(self, row: Row) -> None:
        """The broker has taken it. While a host is followed a stored message stays until that host has it."""
        self._counters["settled"] += 1
        if self.follows_host and row.id > 0:
            self._taken[row.id] = _Mark(row.boot, row.seq, row.at)
        else:
            self._finish(row)

    def follow_host(self) -> None:
        """From now on only `acknowledge` removes what the broker took."""
        self.follows_host = self._moved = True

    def acknowledge(self, committed: Mapping[str, int]) -> None:
        """A host waits, per boot, for no message up to this number. What was not sent yet stays."""
        self._moved |= committed != self._committed
        self._committed = dict(committed)
        done = {id_ for id_, mark in self._taken.items() if mark.seq <= committed.get(mark.boot, 0)}
        if done:
            self._forget(done)

    def gaps(self) -> dict[str, int]:
        """Boot -> the lowest number that may still come, of boots where the followed host waits for a lower one.

        Empty when nothing changed since it was asked last.
        """
        if not (self.follows_host and self._moved):
            return {}
        try:
            lowest = self._store.lowest_seqs()
        except StorageError:
            self._counters["storage_errors"] += 1
            return {}
        self._moved = False
        held = min((row.seq for row in self._held.values()), default=self._next_seq)  # all of this boot
        lowest[self.boot] = min(held, lowest.get(self.boot, held))
        behind = [(boot, seq) for boot, seq in lowest.items() if self._committed.get(boot, 0) < seq - 1]
        return dict(behind[:GAPS_TOLD])

    def send_again(self) -> None:
        """A new connection: what the host has not acknowledged is sent once more; it knows what it has."""
        self._taken.clear()

    def unsent(self) -> int:
        """Messages that no broker has taken yet."""
        return max(self._count + len(self._held) - len(self._gone) - len(self._taken), 0)

    def refuse(self, row: Row) -> None:
        """No broker will ever take it."""
        self._counters["refused"] += 1
        self._finish(row)

    def pass_over(self, row: Row) -> None:
        """Somebody listens, but not to its topic: forget what waits for that topic, counted.

        An alarm is kept all the same, and everything while only a host may remove what it has.
        """
        if row.priority == Priority.ALARM or self.follows_host:
            return
        if row.id in self._held:
            del self._held[row.id]
            self._counters["unwanted"] += 1
            return
        try:
            count, size_bytes = self._store.delete_rows_of(row.topic)
        except StorageError:
            self._counters["storage_errors"] += 1
            return
        self._count -= count
        self._bytes -= size_bytes
        self._counters["unwanted"] += count

    def tidy(self, now: float, *, skip_ids: Collection[int]) -> None:
        """Drop what is too old; bring to the disk what waited for room on it, but what is on its way (`skip_ids`)."""
        if self._gone:
            self._forget(self._gone)
        for row in [row for row in self._held.values() if row.id not in skip_ids]:
            if not self._stored(row):
                break
            del self._held[row.id]
        if self._oldest_at is not None and now - self._oldest_at > self.max_age_s:
            self._expire(now)

    def statistics(self) -> dict[str, float]:
        """Flat numbers. `held`: messages that wait in memory because the disk is full; `taken`: sent, the host has
        not committed them yet.
        """
        return {
            "rows": self._count + len(self._held) - len(self._gone),
            "bytes": self._bytes,
            "max_bytes": self._max_bytes,
            "held": len(self._held),
            "taken": len(self._taken),
            "next_seq": self._next_seq,
            **self._counters,
            "dropped": sum(self._dropped.values()),
            **{f"dropped_{name.lower()}": count for name, count in self._dropped.items()},
        }

    # --- inside ---------------------------------------------------------------------------------------------
    def _drop(self, priority: str) -> None:
        self._dropped[priority] += 1
        self._moved = True

    def _keep(self, row: Row) -> None:
        if self._stored(row):
            return
        held_id = min(self._held, default=0) - 1
        self._held[held_id] = replace(row, id=held_id)
        if len(self._held) > HELD_MESSAGES:
            least = max(self._held.values(), key=lambda held: (held.priority, held.id))
            del self._held[least.id]
            self._drop(least.priority)

    def _stored(self, row: Row) -> bool:
        try:
            self._store.add_row(row, durable=row.priority == Priority.ALARM)
        except StorageError:
            self._counters["storage_errors"] += 1
            return False
        self._count += 1
        self._bytes += row.size_bytes
        self._oldest_at = row.at if self._oldest_at is None else min(self._oldest_at, row.at)
        return True

    def _make_room(self, row: Row) -> bool:
        """Drop what is less or equally important and older, least important first. False: `row` must go."""
        if row.size_bytes > self._max_bytes:
            return False  # no room would do
        while self._bytes + row.size_bytes > self._max_bytes:
            try:
                victims = self._store.least_important(16, down_to=row.priority)
            except StorageError:
                self._counters["storage_errors"] += 1
                return False
            surplus = self._bytes + row.size_bytes - self._max_bytes
            chosen = set()
            for victim_id, size_bytes, priority in victims:
                if surplus <= 0:
                    break
                chosen.add(victim_id)
                surplus -= size_bytes
                self._dropped[priority] += victim_id not in self._gone
            if not chosen or not self._forget(chosen):
                return False
        return True

    def _finish(self, row: Row) -> None:
        if self._held.pop(row.id, None) is None:
            self._forget({row.id})

    def _forget(self, ids: set[int]) -> bool:
        try:
            count, size_bytes = self._store.delete_rows(ids)
        except StorageError:
            self._counters["storage_errors"] += 1
            self._gone |= ids
            return False
        self._gone = self._gone - ids
        self._taken = {id_: mark for id_, mark in self._taken.items() if id_ not in ids}
        self._moved = True
        self._count -= count
        self._bytes -= size_bytes
        return True

    def _expire(self, now: float) -> None:
        border = now - self.max_age_s
        try:
            self._counters["expired"] += self._store.delete_rows_before(border)
            self._taken = {id_: mark for id_, mark in self._taken.items() if mark.at >= border}
            self._moved = True
            self._count, self._bytes, self._oldest_at = self._store.outbox_totals()
        except StorageError:
            self._counters["storage_errors"] += 1
