"""One MQTT 5 connection, from CONNECT to its end: the only door to paho.

Promises: nothing blocks the event loop; what comes back about a message is told with its reason code; a broker
that answers nothing, or nonsense, ends the session and nothing else.
Leaves to others: what to send and when to try again (`agent.link`).

A new paho client is made per connection and driven by the agent's own event loop: there is no thread of paho's
whose death could go unnoticed. QoS 1 only, no topic aliases (they do not survive a resend).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTMessageInfo, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.clock import monotonic_s
from agent.contract.errors import ConfigError, LinkError
from agent.store import Row

WINDOW = 20
WILL_DELAY_S = 30
SESSION_EXPIRY_S = 300  # longer than the will's delay, else a lost session sends the will at once
MAX_INBOUND_BYTES = 1024 * 1024
MAX_CORRELATION_BYTES = 128
PACKET_OVERHEAD_BYTES = 64  # fixed header, lengths and our properties
CONNECT_TIMEOUT_S = 5.0
CONNACK_TIMEOUT_S = 10.0
STUCK_S = 20.0
FAILURE, NOT_AUTHORIZED = 0x80, 0x87  # MQTT reason codes: the first that is a no, and an ACL's
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, struct.error)
"""What paho raises on bytes no broker may send."""


@dataclass(frozen=True, slots=True)
class Broker:
    """Where and as whom to connect. `tls` None = plain TCP."""

    host: str
    port: int
    client_id: str
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    keepalive_s: int = 30


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says in our name when the connection is lost for WILL_DELAY_S."""

    topic: str
    body: bytes


def make_tls(*, ca: str, certificate: str, key: str) -> ssl.SSLContext | None:
    """TLS settings from files; None when no CA is given.

    Raises:
        ConfigError: a file is missing or not what it should be.
    """
    if not ca:
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca == "system" else ca)
        if certificate:
            context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        named = " ".join(name for name in (ca, certificate, key) if name)
        raise ConfigError(
            f"cannot use the TLS files {named}: {error}", hint="They must be readable PEM files."
        ) from None
    return context


@dataclass(frozen=True, slots=True)
class Inbound:
    """What the broker brought. `correlation`: what an answer has to carry, b"" = nothing."""

    topic: str
    payload: bytes
    correlation: bytes = b""


@dataclass(slots=True)
class Flight:
    """One message on its way; `row` None = a retained document."""

    topic: str
    row: Row | None
    body: bytes
    sent_s: float


class Session:
    """One connection from CONNECT to its end, on the running event loop."""

    def __init__(
        self,
        broker: Broker,
        will: Will | None,
        *,
        on_taken: Callable[[Flight, int], None],
        filters: Sequence[str] = (),
        on_inbound: Callable[[Inbound], None] | None = None,
        on_refused: Callable[[], None] | None = None,
    ) -> None:
        """`filters`: what is subscribed to; `on_inbound` hears it, `on_refused` that the broker forbids it."""
        self._broker = broker
        self._on_taken = on_taken
        self._filters = tuple(filters)
        self._on_inbound = on_inbound
        self._on_refused = on_refused
        self._loop = asyncio.get_running_loop()
        self._attached: socket.socket | None = None
        self._connack: asyncio.Future[None] = self._loop.create_future()
        self.closed = asyncio.Event()
        self.reason = ""
        self.flights: dict[int, Flight] = {}
        self.window = WINDOW
        self.maximum_packet_bytes = 0  # 0 = the broker sets no limit
        self._client = self._make_client(will)

    async def open(self) -> None:
        """Connect and wait for the broker's yes.

        Raises:
            LinkError: unreachable, TLS failed, or refused (then `retryable` stays true, with the reason).
        """
        try:
            await _in_thread(self._connect)
        except asyncio.CancelledError:
            self.close("cancelled")
            raise
        except (OSError, ValueError) as error:
            raise LinkError(
                f"cannot reach the broker {self._broker.host}:{self._broker.port}: {_why(error)}",
                hint="Check link.host, link.port and the network; messages wait in the outbox.",
            ) from None
        self._attach()
        try:
            async with asyncio.timeout(CONNACK_TIMEOUT_S):
                await self._connack
        except TimeoutError:
            self.close("no CONNACK")
            raise LinkError(f"the broker {self._broker.host}:{self._broker.port} does not answer CONNECT") from None
        except (LinkError, asyncio.CancelledError):
            self.close("not connected")
            raise

    def publish(
        self, topic: str, body: bytes, *, row: Row | None, retain: bool, expiry_s: int = 0, correlation: bytes = b""
    ) -> None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.PayloadFormatIndicator = 1
        properties.ContentType = "application/json"
        if expiry_s:
            properties.MessageExpiryInterval = expiry_s
        if correlation:
            properties.CorrelationData = correlation
        with self._guarded():
            sent: MQTTMessageInfo = self._client.publish(topic, body, qos=1, retain=retain, properties=properties)
            if sent.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                self.flights[sent.mid] = Flight(topic, row, body, monotonic_s())

    def fits(self, topic: str, body: bytes) -> bool:
        limit = self.maximum_packet_bytes
        return not limit or len(topic) + len(body) + PACKET_OVERHEAD_BYTES <= limit

    def tend(self) -> None:
        """Call about once a second: keep-alive, and the watch over PUBACKs that do not come."""
        with self._guarded():
            self._client.loop_misc()
        oldest = min((flight.sent_s for flight in self.flights.values()), default=None)
        if oldest is not None and monotonic_s() - oldest > STUCK_S:
            self.close(f"no PUBACK for {STUCK_S:.0f} s")

    def leave(self) -> None:
        """Say goodbye (the broker then forgets the will) and close."""
        if not self.closed.is_set():
            with self._guarded():
                self._client.disconnect()
                self._client.loop_write()
        self.close("left")

    def close(self, reason: str) -> None:
        """End the connection without a word; the will stays armed."""
        if self.closed.is_set():
            return
        self.reason = self.reason or reason
        sock = self._attached or self._client.socket()  # connected and not yet attached: the wait was cancelled
        self._detach()
        if isinstance(sock, socket.socket):
            sock.close()
        self.closed.set()
        if not self._connack.done():
            self._connack.set_exception(LinkError(f"the broker closed the connection: {self.reason}"))

    # --- paho's side ----------------------------------------------------------------------------------------
    def _make_client(self, will: Will | None) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, client_id=self._broker.client_id, protocol=MQTTv5)
        client.max_inflight_messages_set(WINDOW)
        client.max_queued_messages_set(2 * WINDOW)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password or None)
        if self._broker.tls is not None:
            client.tls_set_context(self._broker.tls)
        if will is not None:
            properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
            properties.WillDelayInterval = WILL_DELAY_S
            client.will_set(will.topic, will.body, qos=1, retain=True, properties=properties)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_publish = self._published
        client.on_message = self._arrived
        client.on_subscribe = self._subscribed
        client.on_socket_register_write = lambda *_: self._watch_writes()
        client.on_socket_unregister_write = lambda *_: self._unwatch_writes()
        client.on_socket_close = lambda *_: self._detach()
        return client

    def _connect(self) -> None:
        """Name look-up, TCP and TLS: may block, so it runs in a thread; nothing else uses the client then."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.MaximumPacketSize = MAX_INBOUND_BYTES
        properties.ReceiveMaximum = WINDOW
        broker = self._broker
        self._client.connect(
            broker.host, broker.port, keepalive=broker.keepalive_s, clean_start=False, properties=properties
        )
        sock = self._client.socket()
        if self.closed.is_set() and isinstance(sock, socket.socket):  # nobody waits for us any more
            sock.close()

    def _connected(
        self, _client: Client, _data: Any, _flags: ConnectFlags, reason: ReasonCode, granted: Properties | None
    ) -> None:
        if reason.is_failure:
            self.reason = str(reason)
            if not self._connack.done():
                self._connack.set_exception(Refused(self._broker, reason))
            return
        self.maximum_packet_bytes = getattr(granted, "MaximumPacketSize", 0)
        self.window = min(WINDOW, getattr(granted, "ReceiveMaximum", WINDOW))
        if self._filters:
            options = SubscribeOptions(qos=1)
            self._client.subscribe([(one, options) for one in self._filters])
        if not self._connack.done():
            self._connack.set_result(None)

    def _disconnected(self, _client: Client, _data: Any, _flags: Any, reason: ReasonCode, _granted: Any) -> None:
        self._loop.call_soon(self.close, str(reason))  # not from inside paho, which still holds its locks

    def _subscribed(self, _client: Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons) and self._on_refused is not None:
            self._loop.call_soon(self._on_refused)

    def _arrived(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        if self._on_inbound is None or len(message.payload) > MAX_INBOUND_BYTES:
            return
        correlation = getattr(message.properties, "CorrelationData", b"")[:MAX_CORRELATION_BYTES]
        inbound = Inbound(message.topic, bytes(message.payload), correlation)
        self._loop.call_soon(self._on_inbound, inbound)  # not from inside paho, which still holds its locks

    def _published(self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        flight = self.flights.pop(mid, None)
        if flight is not None:  # told at once: between two steps it would look like a message not yet sent
            self._on_taken(flight, reason.value)

    # --- the event loop's side ------------------------------------------------------------------------------
    def _attach(self) -> None:
        sock = self._client.socket()
        if self.closed.is_set() or not isinstance(sock, socket.socket):
            self.close("closed while connecting")
            return
        self._attached = sock
        self._loop.add_reader(sock, self._readable)
        if self._client.want_write():
            self._watch_writes()

    def _detach(self) -> None:
        if self._attached is not None:
            self._loop.remove_reader(self._attached)
            self._loop.remove_writer(self._attached)
            self._attached = None

    def _watch_writes(self) -> None:
        if self._attached is not None:
            self._loop.add_writer(self._attached, self._writable)

    def _unwatch_writes(self) -> None:
        if self._attached is not None:
            self._loop.remove_writer(self._attached)

    def _readable(self) -> None:
        with self._guarded():
            self._client.loop_read()
            # decrypted bytes wait inside the TLS object where the event loop does not see them
            while isinstance(self._attached, ssl.SSLSocket) and self._attached.pending():
                self._client.loop_read()

    def _writable(self) -> None:
        with self._guarded():
            self._client.loop_write()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close(_why(error))
        except MALFORMED as error:
            self.close(f"the broker sent what MQTT does not allow ({type(error).__name__})")


class Refused(LinkError):
    """The broker answered CONNECT with no."""

    code = "link_refused"

    def __init__(self, broker: Broker, reason: ReasonCode) -> None:
        super().__init__(
            f"the broker {broker.host}:{broker.port} refused '{broker.username or 'an anonymous device'}': {reason}",
            hint="Check link.username, the password and the broker's list of devices.",
        )
        self.reason = reason.value


async def probe(broker: Broker, topic: str = "") -> None:
    """Connect, publish one empty document to `topic` if there is one, and leave again.

    Raises:
        LinkError: unreachable, or refused: the user or the topic, the message says which.
    """
    taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    session = Session(broker, None, on_taken=lambda _flight, reason: taken.set_result(reason))
    await session.open()
    try:
        if topic:
            session.publish(topic, b"{}", row=None, retain=False, expiry_s=1)
            await _accepted(session, taken, topic)
    finally:
        session.leave()


async def _accepted(session: Session, taken: asyncio.Future[int], topic: str) -> None:
    closed = asyncio.ensure_future(session.closed.wait())
    either: set[asyncio.Future[Any]] = {taken, closed}
    try:
        await asyncio.wait(either, timeout=CONNACK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        closed.cancel()
    if taken.done() and taken.result() < FAILURE:
        return
    if taken.done():
        what = "publishing is not authorized" if taken.result() == NOT_AUTHORIZED else f"reason {taken.result()}"
    else:
        what = f"it closed the connection ({session.reason})" if session.closed.is_set() else "no PUBACK"
    raise LinkError(
        f"the broker accepts this device and refuses what it publishes to {topic}: {what}",
        hint=f"Its ACL must allow this user `readwrite {topic.rpartition('/')[0]}/#`.",
    )


async def _in_thread(work: Callable[[], None]) -> None:
    """Run blocking work in a daemon thread: a name look-up that hangs must not hold up the agent's exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def run() -> None:
        failure: BaseException | None = None
        try:
            work()
        except (OSError, ValueError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            loop.call_soon_threadsafe(settle, failure)

    threading.Thread(target=run, name="ew-connect", daemon=True).start()
    await done


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
