"""Keeps the device connected to its broker: presence, retained documents, and the outbox on its way.

Promises: a message counts as delivered only when its PUBACK says success; at most a window of them is on its way;
one that no broker takes (too large, malformed) is dropped and counted; a topic the broker forbids is set aside
for a while, and said so, also if the broker ends the connection over it; what the broker would throw away because
nobody subscribes to its topic is kept and tried again (unless configured otherwise) and holds up no other topic; a
session that stops answering is replaced.
Reconnects for ever, with growing, jittered pauses. A broker that is down never holds up anything else.
Leaves to others: what is sent (`agent.outbox`), its meaning (`agent.contract.messages`), the wire (`agent.session`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agent.clock import monotonic_s, wall_s
from agent.contract.errors import LinkError
from agent.journal import Journal
from agent.outbox import Outbox
from agent.session import WINDOW, Broker, Flight, Inbound, Refused, Session, Will
from agent.store import Row

FIRST_PAUSE_S, LONGEST_PAUSE_S, REFUSED_PAUSE_S = 0.5, 60.0, 15.0
DENIED_TOPIC_S = 60.0
LOSSES_TO_DENY = 3  # so often in a row the connection ended with one topic's message as the only one on its way
BUSY_BROKER_S = 5.0

FIRST_UNHEARD_S, LONGEST_UNHEARD_S = 1.0, 30.0

MAX_ANSWERS = 16

NO_SUBSCRIBER = 0x10  # a success for MQTT, but the broker has thrown the message away
NOT_AUTHORIZED = 0x87
PACKET_TOO_LARGE = 0x95
NEVER_TAKEN = frozenset({0x90, PACKET_TOO_LARGE, 0x99})  # topic name invalid, ..., payload format invalid


@dataclass(frozen=True, slots=True)
class _Silence:
    """A topic nobody subscribes to: one message asks at `next_s` whether somebody does by now. Monotonic seconds."""

    asked_s: float
    pause_s: float
    next_s: float


class Link:
    """Keeps a session open, announces retained documents and drains the outbox through it."""

    def __init__(
        self,
        broker: Broker,
        outbox: Outbox,
        journal: Journal,
        *,
        will: Will,
        keep_unheard: bool = True,
        jitter: random.Random | None = None,
    ) -> None:
        self._broker = broker
        self._outbox = outbox
        self._journal = journal
        self._will = will
        self._jitter = jitter or random.Random()  # noqa: S311 - spreads reconnects, hides nothing
        self._session: Session | None = None
        self._stopping = asyncio.Event()
        self._documents: dict[str, bytes] = {}
        self._unannounced: dict[str, bytes] = {}
        self._answers: deque[tuple[str, bytes, bytes]] = deque(maxlen=MAX_ANSWERS)
        self._filters: tuple[str, ...] = ()
        self._on_inbound: Callable[[Inbound], None] | None = None
        self._denied: dict[str, float] = {}  # topic -> monotonic time of the next try
        self._denials, self._denial = 0, ""
        self._suspects: Counter[str] = Counter()  # topic -> connections that ended over it, unanswered
        self._careful = 0  # so many answers to wait for before more than one message is on its way again
        self._busy_until_s = 0.0
        self._keep_unheard = keep_unheard
        self._unheard: dict[str, _Silence] = {}
        self._heard_s = -math.inf  # when a subscriber last got a message, monotonic
        self._state, self._since, self._error = "connecting", wall_s(), ""
        self._counters = dict.fromkeys(("connects", "losses", "published", "received", "too_large", "stuck"), 0)
        self._refusals: Counter[str] = Counter()

    async def run(self) -> None:
        """Stay connected until `stop`. Never raises for what the network does."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            least_s = 0.0
            denials = self._denials
            try:
                connected_s = await self._one_session()
                # what was denied is not tried again soon: a broker that hangs up over each topic is known quickly
                if self._denials > denials or connected_s > min(LONGEST_PAUSE_S, 4 * pause_s):
                    pause_s = FIRST_PAUSE_S
            except LinkError as error:
                least_s = REFUSED_PAUSE_S if isinstance(error, Refused) else 0.0
                self._note_failure(error)
            await self._pause(max(least_s, pause_s) * self._jitter.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def stop(self, *, within_s: float = 2.0) -> None:
        """Send what can still be sent, say goodbye and end `run`."""
        session = self._session
        if session is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    while not session.closed.is_set() and self._has_work(session):
                        self.pump()
                        await asyncio.sleep(0.02)
            session.leave()
        self._stopping.set()

    def listen(self, filters: Sequence[str], on_inbound: Callable[[Inbound], None]) -> None:
        """Subscribe with every connection from the next on; `on_inbound` hears what comes."""
        self._filters, self._on_inbound = tuple(filters), on_inbound

    def answer(self, topic: str, body: bytes, correlation: bytes) -> None:
        """Send once, when there is a connection; of many that wait the oldest are forgotten."""
        self._answers.append((topic, body, correlation))
        self.pump()

    def announce(self, topic: str, body: bytes) -> None:
        """Keep `body` as the retained document of `topic`, now and after every reconnect."""
        if self._documents.get(topic) != body:
            self._documents[topic] = self._unannounced[topic] = body
            self.pump()

    def pump(self) -> None:
        """Send what waits, as far as the window allows. Cheap; call it after every `Outbox.put`."""
        session = self._session
        if session is None or session.closed.is_set():
            return
        now_s = monotonic_s()
        self._denied = {topic: until_s for topic, until_s in self._denied.items() if until_s > now_s}
        self._send_documents(session)
        self._send_answers(session)
        if now_s >= self._busy_until_s:
            self._send_rows(session, now_s)

    def on_their_way(self) -> set[int]:
        """Ids of the outbox rows that were sent and not answered yet."""
        return {row.id for row in _rows_away(self._session)} if self._session is not None else set()

    def statistics(self) -> dict[str, Any]:
        """state: connecting | connected | waiting | refused | stopped; with reasons and counts."""
        flights = len(self._session.flights) if self._session is not None else 0
        return {
            "state": self._state,
            "since": self._since,
            "broker": f"{self._broker.host}:{self._broker.port}",
            "tls": self._broker.tls is not None,
            "error": self._error or (self._denial if self._denied else ""),
            "in_flight": flights,
            "denied_topics": sorted(self._denied),
            "unheard": sorted(self._unheard),
            "refusals": dict(self._refusals),
            **self._counters,
        }

    # --- inside ---------------------------------------------------------------------------------------------
    async def _one_session(self) -> float:
        """Connect, serve until the end; returns how long it lasted, seconds. Raises: LinkError."""
        session = Session(
            self._broker, self._will, on_taken=self._taken, filters=self._filters, on_inbound=self._arrived,
            on_refused=self._not_subscribed,
        )  # fmt: skip
        await session.open()
        started_s = monotonic_s()
        self._session = session
        self._counters["connects"] += 1
        self._enter("connected", "")
        self._journal.notice(
            "link.connected", "connected to the broker", broker=f"{self._broker.host}:{self._broker.port}"
        )
        self._unannounced = dict(self._documents)
        self._ask_again()
        self._outbox.send_again()
        try:
            while not session.closed.is_set():
                session.tend()
                self.pump()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(session.closed.wait(), 1.0)
        finally:
            session.close("stopped")
            self._session = None
        self._note_end(session)
        return monotonic_s() - started_s

    def _room(self, session: Session) -> int:
        """How many messages may be sent now. One at a time after a loss with unanswered ones: a broker that hangs up
        over a message while others are still arriving resets the connection, and its reason is never read.
        """
        return (1 if self._careful else session.window) - len(session.flights)

    def _send_documents(self, session: Session) -> None:
        for topic, body in list(self._unannounced.items()):
            if topic in self._denied or self._room(session) <= 0:
                continue
            del self._unannounced[topic]
            if session.fits(topic, body):
                session.publish(topic, body, row=None, retain=True)
            else:
                self._drop_too_large(topic, body)

    def _send_answers(self, session: Session) -> None:
        while self._answers and self._room(session) > 0:
            topic, body, correlation = self._answers.popleft()
            if session.fits(topic, body):
                session.publish(topic, body, row=None, retain=False, correlation=correlation)

    def _arrived(self, inbound: Inbound) -> None:
        self._counters["received"] += 1
        if self._on_inbound is not None:
            self._on_inbound(inbound)

    def _not_subscribed(self) -> None:
        self._error = "the broker does not let this device hear its director"
        self._journal.error("link.denied", self._error, topic=", ".join(self._filters))

    def _send_rows(self, session: Session, now_s: float) -> None:
        """Fill the window; of a topic nobody subscribes to only one message at a time asks again."""
        rows_away = _rows_away(session)
        ids = {row.id for row in rows_away}
        asking = {row.topic for row in rows_away}
        skipped = {*self._denied} | {
            topic for topic, silence in self._unheard.items() if topic in asking or now_s < silence.next_s
        }
        while (room := self._room(session)) > 0:
            rows = self._outbox.take(room, skip_ids=ids, skip_topics=skipped, now=wall_s())
            if not rows:
                return
            for row in rows:
                if row.topic in skipped:
                    continue
                self._send_row(session, row)
                ids.add(row.id)
                skipped |= {row.topic} & self._unheard.keys()

    def _send_row(self, session: Session, row: Row) -> None:
        if session.fits(row.topic, row.body):
            left_s = int(self._outbox.max_age_s - (wall_s() - row.at))
            session.publish(row.topic, row.body, row=row, retain=False, expiry_s=min(max(left_s, 1), 0xFFFFFFFF))
        else:
            self._outbox.refuse(row)
            self._drop_too_large(row.topic, row.body)

    def _drop_too_large(self, topic: str, body: bytes) -> None:
        self._counters["too_large"] += 1
        self._journal.warning(
            "link.too_large", "the broker takes no packet this large: dropped", topic=topic, size_bytes=len(body)
        )

    def _taken(self, flight: Flight, reason: int) -> None:
        """A PUBACK came."""
        self._careful = max(self._careful - 1, 0)
        self._suspects.pop(flight.topic, None)
        if reason == NO_SUBSCRIBER and flight.row is not None and self._keep_unheard:
            self._not_heard(flight.row)
        elif reason < 0x80:
            self._counters["published"] += 1
            if flight.row is not None:
                self._heard(flight.row)
                self._outbox.settle(flight.row)
        else:
            self._not_taken(flight, reason)
        asyncio.get_running_loop().call_soon(self.pump)  # not from inside the session's callback

    def _heard(self, row: Row) -> None:
        self._heard_s = monotonic_s()
        if self._unheard.pop(row.topic, None) is not None:  # somebody came: perhaps for the other topics as well
            self._ask_again()

    def _not_heard(self, row: Row) -> None:
        now_s = monotonic_s()
        known = self._unheard.get(row.topic)
        if known is None:
            self._unheard[row.topic] = _Silence(now_s, FIRST_UNHEARD_S, now_s + FIRST_UNHEARD_S)
        elif now_s >= known.next_s:  # else one of a window that was on its way together
            if self._heard_s > known.asked_s:  # since this topic was last asked about: who listens does not want it
                self._outbox.pass_over(row)
            pause_s = min(2 * known.pause_s, LONGEST_UNHEARD_S)
            self._unheard[row.topic] = _Silence(now_s, pause_s, now_s + pause_s)

    def _ask_again(self) -> None:
        """Ask soon about every topic that nobody subscribed to."""
        self._unheard = {
            topic: _Silence(silence.asked_s, FIRST_UNHEARD_S, min(silence.next_s, monotonic_s()))
            for topic, silence in self._unheard.items()
        }

    def _not_taken(self, flight: Flight, reason: int) -> None:
        self._refusals[f"0x{reason:02x}"] += 1
        if reason in NEVER_TAKEN:
            if flight.row is not None:
                self._outbox.refuse(flight.row)
            self._counters["too_large"] += reason == PACKET_TOO_LARGE
            return
        if flight.row is None and self._documents.get(flight.topic) == flight.body:
            self._unannounced[flight.topic] = flight.body
        if reason == NOT_AUTHORIZED:
            self._deny(flight.topic, f"the broker does not let this device publish to {flight.topic}")
        else:
            self._busy_until_s = monotonic_s() + BUSY_BROKER_S
            self._error = f"the broker took no message (reason 0x{reason:02x})"

    def _deny(self, topic: str, why: str) -> None:
        self._denied[topic] = monotonic_s() + DENIED_TOPIC_S
        self._denials += 1
        self._careful = WINDOW  # it may hang up now
        self._error = self._denial = why
        self._journal.error("link.denied", why, topic=topic)

    def _suspect(self, flights: Sequence[Flight]) -> None:
        """A connection ended with these unanswered; always the same topic: the broker forbids it silently."""
        self._careful = WINDOW if flights else self._careful
        if len(flights) != 1:
            return
        topic = flights[0].topic
        self._suspects[topic] += 1
        if self._suspects[topic] >= LOSSES_TO_DENY:
            del self._suspects[topic]
            self._deny(topic, f"the connection ends whenever this device publishes to {topic}")

    def _note_failure(self, error: LinkError) -> None:
        self._enter("refused" if isinstance(error, Refused) else "waiting", error.sentence())
        self._journal.warning("link.unreachable", error.sentence(), code=error.code)

    def _note_end(self, session: Session) -> None:
        if session.reason == "left":
            self._enter("stopped", "")
            return
        self._counters["losses"] += 1
        self._counters["stuck"] += session.reason.startswith("no PUBACK")
        self._enter("waiting", f"connection lost: {session.reason}")
        self._journal.warning("link.lost", f"the connection to the broker is lost: {session.reason}")
        self._suspect(list(session.flights.values()))

    def _enter(self, state: str, error: str) -> None:
        if state != self._state:
            self._state, self._since = state, wall_s()
        self._error = error

    def _has_work(self, session: Session) -> bool:
        return bool(self._unannounced or self._answers or session.flights or self._outbox.unsent())

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


def _rows_away(session: Session) -> list[Row]:
    return [flight.row for flight in session.flights.values() if flight.row is not None]
