"""The wire to the broker, seen from the host: the only door to paho on this side.

Promises: stays connected for ever, with growing pauses; a new client per connection, so that an acknowledgement
can only ever reach the session its message came with, and nothing old is resent after something newer; the
broker is asked to hold back what exceeds the window; retained documents are renewed after every reconnect.
Leaves to others: what a message means and when it is safe (`ingest`).

Threads: one of ours (`broker`) keeps a connection, one of paho's reads it.
"""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.contract.errors import ConfigError, LinkError
from agent.contract.messages import MAX_MESSAGE_BYTES

WINDOW = 200  # messages on their way to us that are not acknowledged; the broker holds back the rest
MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + 4096
CONNACK_TIMEOUT_S = 10.0
PUBACK_TIMEOUT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where and as whom to connect. `tls` None = plain TCP."""

    host: str
    port: int
    client_id: str
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    keepalive_s: int = 30
    session_s: int = 7 * 86_400


def make_tls(ca: str, certificate: str, key: str) -> ssl.SSLContext | None:
    """TLS from files; None when no CA is given. Raises: ConfigError."""
    if not ca:
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca == "system" else ca)
        if certificate:
            context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use the TLS files of [link]: {error}", hint="They must be PEM files.") from None
    return context


def read_password(file: str) -> str:
    """Raises: ConfigError."""
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read link.password_file {file}: {error}") from None


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message; `acknowledge` lets the broker forget it."""

    topic: str
    payload: bytes
    acknowledge: Callable[[], None]


class Broker:
    """One lasting session with a broker."""

    def __init__(
        self,
        address: BrokerAddress,
        filters: Sequence[str],
        *,
        on_message: Callable[[Arrived], None],
        say: Callable[[str, str, str], None],
    ) -> None:
        """on_message: called on paho's thread, which reads nothing meanwhile; say(severity, event id, sentence)."""
        self._address, self._filters = address, tuple(filters)
        self._on_arrived, self._say = on_message, say
        self._stopping = threading.Event()
        self._connected = threading.Event()
        self._ended = threading.Event()  # of the present connection
        self._thread = threading.Thread(target=self._stay_connected, name="broker", daemon=True)
        self._lock = threading.Lock()  # over what is retained and who sends it
        self._retained: dict[str, bytes] = {}
        self._client: Client | None = None
        self._counters: Counter[str] = Counter()
        self._error = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait_connected(self, timeout_s: float) -> bool:
        return self._connected.wait(timeout_s)

    def statistics(self) -> dict[str, Any]:
        names = ("connects", "losses", "published", "publish_refused")
        return {"connected": self._connected.is_set(), "error": self._error,
                **{name: self._counters[name] for name in names}}  # fmt: skip

    def retain(self, topic: str, body: bytes) -> None:
        """Keep `body` retained at the broker, now and after every reconnect. Empty = nothing is retained."""
        with self._lock:
            self._retained[topic] = body
            if self._client is not None and self._connected.is_set():
                self._counters["published"] += 1
                self._client.publish(topic, body, qos=1, retain=True)

    def command(self, topic: str, body: bytes, *, answer_to: str, expiry_s: float) -> None:
        """Send something once, and see it taken.

        Raises:
            LinkError: there is no broker, or it did not take it: the caller decides when to try again.
        """
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.MessageExpiryInterval = max(1, int(expiry_s))
        properties.ResponseTopic = answer_to
        with self._lock:
            if self._client is None or not self._connected.is_set():
                raise LinkError(f"cannot send to {topic}: no broker at the moment")
            sent = self._client.publish(topic, body, qos=1, properties=properties)
        self._counters["published"] += 1
        try:
            sent.wait_for_publish(PUBACK_TIMEOUT_S)
        except (RuntimeError, ValueError) as error:
            raise LinkError(f"cannot send to {topic}: {error}") from None
        if not sent.is_published():
            raise LinkError(f"the broker did not take what was sent to {topic}")

    # --- our thread -------------------------------------------------------------------------------------------
    def _stay_connected(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            if self._one_connection():
                pause_s = FIRST_PAUSE_S
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _one_connection(self) -> bool:
        """Connect and stay until it ends; False when it never began."""
        self._ended.clear()
        client = self._make_client()
        try:
            client.connect(
                self._address.host, self._address.port, self._address.keepalive_s, clean_start=False,
                properties=_connect_properties(self._address.session_s),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            self._note(f"cannot reach the broker {self._address.host}:{self._address.port}: {error}")
            return False
        client.loop_start()
        began = self._began()
        while began and not self._ended.wait(1.0):
            if not _is_alive(client):
                self._note("the broker sent something that is not MQTT")
                break
        self._close(client)
        return began

    def _began(self) -> bool:
        """Wait for the broker's yes."""
        waited_s = 0.0
        while not self._connected.wait(0.1):
            waited_s += 0.1
            if self._ended.is_set() or waited_s >= CONNACK_TIMEOUT_S:
                self._note(self._error or "the broker does not answer CONNECT")
                return False
        return True

    def _close(self, client: Client) -> None:
        with self._lock:
            self._connected.clear()
            self._client = None
        client.disconnect()
        client.loop_stop()
        client.reinitialise()  # paho leaves the sockets that wake its thread to the garbage collector

    def _note(self, text: str) -> None:
        if text != self._error:
            self._say("warning", "link", text)
        self._error = text

    # --- paho's thread ----------------------------------------------------------------------------------------
    def _make_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2, client_id=self._address.client_id, protocol=MQTTv5, manual_ack=True,
            reconnect_on_failure=False,
        )  # fmt: skip
        if self._address.username:
            client.username_pw_set(self._address.username, self._address.password)
        if self._address.tls is not None:
            client.tls_set_context(self._address.tls)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(WINDOW)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _on_connect(
        self, client: Client, _data: Any, flags: ConnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._error = f"the broker refused: {reason}"
            self._say("error", "link", self._error)
            self._ended.set()
            return
        kept = "kept our session" if flags.session_present else "knew no session of ours"
        self._say("notice", "link", f"connected to {self._address.host}:{self._address.port}, which {kept}")
        options = SubscribeOptions(qos=1, noLocal=True)
        client.subscribe([(topic, options) for topic in self._filters])

    def _on_subscribe(
        self, client: Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        """Only now is nothing missed: what devices say from here on reaches us."""
        if any(reason.is_failure for reason in reasons):
            self._error = f"the broker does not let us listen: {', '.join(map(str, reasons))}"
            self._say("error", "link", self._error)
            self._ended.set()
            return
        with self._lock:
            for topic, body in self._retained.items():
                client.publish(topic, body, qos=1, retain=True)
            self._client, self._error = client, ""
            self._counters["connects"] += 1
            self._connected.set()

    def _on_disconnect(
        self, client: Client, _data: Any, _flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if client is self._client and not self._stopping.is_set():
            self._counters["losses"] += 1
            self._note(f"the connection to the broker is lost: {reason}")
        self._ended.set()

    def _on_message(self, client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""  # refused and counted like every other foreign topic
        mid, qos = message.mid, message.qos
        self._on_arrived(Arrived(topic, bytes(message.payload), lambda: _acknowledge(client, mid, qos)))

    def _on_publish(
        self, _client: Client, _data: Any, _mid: int, reason: ReasonCode, _properties: Properties
    ) -> None:
        if reason.is_failure:
            self._counters["publish_refused"] += 1
            self._note(f"the broker does not take what we publish: {reason}")


def _acknowledge(client: Client, mid: int, qos: int) -> None:
    if qos:
        client.ack(mid, qos)


def _is_alive(client: Client) -> bool:
    """Paho's thread still runs; there is no public way to see that a malformed packet ended it."""
    thread = client._thread  # noqa: SLF001
    return thread is not None and thread.is_alive()


def _connect_properties(session_s: int) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = session_s
    properties.ReceiveMaximum = WINDOW
    properties.MaximumPacketSize = MAX_PACKET_BYTES
    return properties
