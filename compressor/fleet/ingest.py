"""Keeps what a fleet says, and lets devices know how far it is kept.

Promises: a message is acknowledged to the broker only after its transaction committed, so nothing that a broker
has taken is lost by a crash or a full disk of ours; a message that comes twice counts once; what is not believed
is refused, counted and acknowledged, so that it does not come for ever; everything that waits is bounded. After each
commit the device learns, by the retained `ack`, up to where it need keep nothing: everything up to there is here, was
refused, or was given up by the device itself.
Leaves to others: what a message means (`inbox`), what follows (`planner`).

The wire itself is `broker`. One thread (`ingest`) commits; `retain` and `command` may be called from any.
"""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from agent.clock import wall_s
from agent.contract.errors import StorageError
from agent.contract.topics import VERSION, Topics
from compressor.fleet.broker import WINDOW, Arrived, Broker, BrokerAddress
from compressor.fleet.database import Connection, Database, devices, messages, timeline
from compressor.fleet.inbox import (
    BirthSeen,
    EventSeen,
    Refused,
    ReplySeen,
    ReportedSeen,
    Roster,
    Seen,
    StatusSeen,
    TelemetrySeen,
    read,
)

BATCH = 200  # committed together at most: one fsync for all of them
BATCH_WAIT_S = 0.05  # how long a first message may wait for company
ROOM_WAIT_S = 0.2
RETRY_S = 1.0  # after a failed commit
MAX_REPLIES = 1000
NOTED = ("drift", "sensor", "fallback", "update")  # kinds of events that belong to the story
HEARD = ("status", "birth", "reported", "tm", "ev/+/+", "res/+")


class Ingest:
    """Subscribes to one fleet and keeps what it says."""

    def __init__(
        self,
        address: BrokerAddress,
        database: Database,
        roster: Roster,
        *,
        on_change: Callable[[], None],
        say: Callable[[str, str, str], None],
        clock: Callable[[], float] = wall_s,
    ) -> None:
        """on_change: something new is committed; say(severity, event id, sentence)."""
        self._database, self._roster = database, roster
        self._on_change, self._say, self._clock = on_change, say, clock
        self._arrived: queue.Queue[Arrived] = queue.Queue(maxsize=4 * WINDOW)
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._run, name="ingest", daemon=True)
        self._replies: queue.Queue[ReplySeen] = queue.Queue(maxsize=MAX_REPLIES)
        self._counters: Counter[str] = Counter()
        base = f"{roster.prefix}/{VERSION}/{roster.fleet}/+"
        self.broker = Broker(address, [f"{base}/{tail}" for tail in HEARD], on_message=self._on_message, say=say)

    def start(self) -> None:
        """Begin to listen; an unreachable broker is tried again for ever."""
        self._worker.start()
        self.broker.start()

    def stop(self) -> None:
        """Say goodbye. What was not committed is not acknowledged: it comes again at the next start."""
        self._stopping.set()
        if self._worker.is_alive():
            self._worker.join()
        self.broker.stop()

    def statistics(self) -> dict[str, Any]:
        names = ("received", "committed", "repeated", "refused", "waits", "commit_failures")
        counters = {name: self._counters[name] for name in names}
        return {"waiting": self._arrived.qsize(), **counters, **self.broker.statistics()}

    def replies(self) -> list[ReplySeen]:
        """Answers to commands since the last call."""
        found = []
        while not self._replies.empty():
            found.append(self._replies.get_nowait())
        return found

    def topics(self, device: str) -> Topics:
        return Topics(fleet=self._roster.fleet, device=device, prefix=self._roster.prefix)

    def _on_message(self, arrived: Arrived) -> None:
        """Waits for room: mosquitto 2.0.11 sends far more than our window once acknowledgements flow.

        While we wait nothing is read from the socket, so the broker holds the rest. Should that take so long that it
        gives us up, everything unacknowledged comes again.
        """
        self._counters["received"] += 1
        while not self._stopping.is_set():
            try:
                self._arrived.put(arrived, timeout=ROOM_WAIT_S)
            except queue.Full:
                self._counters["waits"] += 1
            else:
                return

    # --- the committing thread --------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._stopping.is_set():
            batch = self._batch()
            while batch and not self._stopping.is_set() and not self._commit(batch):
                self._stopping.wait(RETRY_S)

    def _batch(self) -> list[Arrived]:
        """What arrived within a moment of the first message."""
        batch: list[Arrived] = []
        try:
            batch.append(self._arrived.get(timeout=0.2))
            batch.append(self._arrived.get(timeout=BATCH_WAIT_S))
            while len(batch) < BATCH:
                batch.append(self._arrived.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _commit(self, batch: Sequence[Arrived]) -> bool:
        now_s = self._clock()
        answers = [read(item.topic, item.payload, self._roster, now_s=now_s) for item in batch]
        try:
            touched = self._store(answers, now_s)
        except StorageError as error:
            self._counters["commit_failures"] += 1
            self._say("error", "ingest.commit", error.sentence())
            return False
        for item in batch:
            item.acknowledge()
        for device, marks in touched.items():
            body = json.dumps({"v": 1, "committed": marks}, sort_keys=True).encode()
            self.broker.retain(self.topics(device).acknowledged, body)
        self._on_change()
        return True

    def _store(self, answers: Sequence[Seen | Refused], now_s: float) -> dict[str, dict[str, int]]:
        """One transaction for the whole batch; returns the watermarks that may have moved."""
        seen = [answer for answer in answers if not isinstance(answer, Refused)]
        queued = [item for item in seen if isinstance(item, EventSeen | TelemetrySeen)]
        refused = [answer.key for answer in answers if isinstance(answer, Refused) and answer.key is not None]
        with self._database.writing() as tx:
            new = set(messages.admit(tx, queued, now_s=now_s))
            messages.settle(tx, refused, now_s=now_s)
            for item in seen:
                if not isinstance(item, EventSeen | TelemetrySeen) or item.key in new:
                    note(tx, item, now_s=now_s)
            messages.refuse(tx, _counted(answers), now_s=now_s)
            moved = {key.device for key in (*refused, *(item.key for item in queued))}
            moved |= {item.device for item in seen if isinstance(item, StatusSeen) and item.kept_from}
            touched = {device: messages.watermarks(tx, device) for device in moved}
        self._counters["committed"] += len(new)
        self._counters["repeated"] += len(queued) - len(new)
        self._counters["refused"] += len(answers) - len(seen)
        for item in seen:
            if isinstance(item, ReplySeen) and not self._replies.full():
                self._replies.put_nowait(item)
        return touched


def _counted(answers: Sequence[Seen | Refused]) -> dict[tuple[str, str], tuple[int, str]]:
    refusals: dict[tuple[str, str], tuple[int, str]] = {}
    for answer in answers:
        if isinstance(answer, Refused):
            count, _ = refusals.get((answer.device, answer.code), (0, ""))
            refusals[answer.device, answer.code] = (count + 1, answer.text)
    return refusals


# --- what a message changes ------------------------------------------------------------------------------------
def note(tx: Connection, item: Seen, *, now_s: float) -> None:
    """Bring the device's row up to date and tell the timeline what a person would want to know."""
    match item:
        case StatusSeen():
            _note_status(tx, item, now_s)
        case BirthSeen():
            values = {"birth": item.document, "boot": item.boot, "last_seen_at": now_s}
            devices.change(tx, item.device, now_s=now_s, **values)
        case ReportedSeen():
            _note_reported(tx, item, now_s)
        case TelemetrySeen():
            values = {"vitals": item.vitals, "vitals_at": now_s, "last_seen_at": now_s}
            devices.change(tx, item.key.device, now_s=now_s, **values)
        case EventSeen():
            devices.change(tx, item.key.device, now_s=now_s, last_seen_at=now_s)
            if item.about in NOTED or item.severity in ("error", "critical"):
                where = f"{item.service}: " if item.service else ""
                timeline.add(
                    tx, "event", f"{where}{item.text}", at=now_s, device=item.key.device, severity=item.severity
                )
        case ReplySeen():
            devices.change(tx, item.device, now_s=now_s, last_seen_at=now_s)


def _note_status(tx: Connection, item: StatusSeen, now_s: float) -> None:
    messages.give_up(tx, item.device, item.kept_from, now_s=now_s)
    before = devices.find(tx, item.device)
    values = {"presence": item.state, "presence_reason": item.reason, "boot": item.boot, "last_seen_at": now_s}
    devices.change(tx, item.device, now_s=now_s, **values)
    if before is None or before.presence != item.state:
        because = f" ({item.reason})" if item.reason else ""
        severity = "warning" if item.state == "offline" else "info"
        timeline.add(tx, "presence", f"{item.state}{because}", at=now_s, device=item.device, severity=severity)


def _note_reported(tx: Connection, item: ReportedSeen, now_s: float) -> None:
    before = devices.find(tx, item.device)
    values = {"reported": item.document, "reported_at": now_s, "last_seen_at": now_s}
    devices.change(tx, item.device, now_s=now_s, **values)
    old = (before.reported if before is not None else None) or {}
    fields = ("desired_version", "update_state", "code")
    if [item.document.get(name) for name in fields] == [old.get(name) for name in fields]:
        return
    version, state, code = (item.document.get(name) for name in fields)
    if version or state != "idle":
        moved = f", {item.document['moved_bytes']:,} bytes moved" if item.document.get("moved_bytes") else ""
        text = f"desired {version}: {state}{f' ({code})' if code else ''}{moved}"
        severity = "warning" if code or state in _GRAVE else "info"
        timeline.add(tx, "reported", text, at=now_s, device=item.device, severity=severity)


_GRAVE = ("rejected", "failed", "rolling_back", "rolled_back", "quarantined")
