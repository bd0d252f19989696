"""An independent MQTT subscriber: sees what any third party would see, and counts what is missing."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from scripts.story.acts import Acts

PATIENCE_S = 60.0  # with a broker on the same machine


def leave(client: mqtt.Client) -> None:
    """Say goodbye and close everything: paho leaves the sockets that wake its thread to the garbage collector."""
    client.disconnect()
    client.loop_stop()
    client.reinitialise()


@dataclass(frozen=True)
class Seen:
    topic: str
    document: dict[str, Any]
    retained: bool


@dataclass
class Subscriber:
    """Listens to a whole fleet with a session that the broker keeps while this client is away."""

    port: int
    user: str
    password: str
    fleet: str
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    acts: Acts = field(default_factory=Acts)  # what is published here is an operator's doing

    def start(self) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"story-{self.user}", protocol=mqtt.MQTTv5)
        self.client.username_pw_set(self.user, self.password)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.on_message = self._on_message
        self.client.reconnect_delay_set(1, 2)
        keep = Properties(PacketTypes.CONNECT)
        keep.SessionExpiryInterval = 3600
        self.ready = threading.Event()
        # clean the first time only: a clean reconnect would throw away what the broker kept for us
        self.client.connect("127.0.0.1", self.port, clean_start=mqtt.MQTT_CLEAN_START_FIRST_ONLY, properties=keep)
        self.client.loop_start()
        if not self.ready.wait(PATIENCE_S):
            leave(self.client)
            raise RuntimeError(f"the story's own subscriber could not subscribe within {PATIENCE_S:.0f} s")

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe(f"ew/1/{self.fleet}/#", qos=1)

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        payload = bytes(message.payload)
        if not payload:
            return
        with self.lock:
            self.seen.append(Seen(message.topic, json.loads(payload), message.retain))

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """Documents of `ev/...` topics from position `since` of `seen` on, each once, in order of sequence."""
        with self.lock:
            found = {
                (item.document["boot"], item.document["seq"]): item.document
                for item in self.seen[since:]
                if "/ev/" in item.topic
            }
        return [found[key] for key in sorted(found, key=lambda key: found[key]["at"])]

    def position(self) -> int:
        with self.lock:
            return len(self.seen)

    def latest(self, word: str) -> dict[str, Any] | None:
        """The newest document on the topic that ends with `word`."""
        with self.lock:
            for item in reversed(self.seen):
                if item.topic.endswith("/" + word):
                    return item.document
        return None

    def heard(self) -> list[Seen]:
        with self.lock:
            return list(self.seen)

    def documents(self, device: str, word: str) -> list[dict[str, Any]]:
        """Everything `device` said on the topic that ends with `word`, in order of arrival."""
        with self.lock:
            return [item.document for item in self.seen if item.topic.endswith(f"/{device}/{word}")]

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Say something as the operator. Raises: RuntimeError when the broker does not take it in time."""
        self.acts.note(f"published {topic}")
        sent = self.client.publish(topic, payload, qos=1, retain=retain)
        sent.wait_for_publish(PATIENCE_S)
        if not sent.is_published():
            raise RuntimeError(f"the broker did not take what was published to {topic} within {PATIENCE_S:.0f} s")

    def missing(self, device: str, *, sent: int = 0) -> int:
        """Sequence numbers of `device` that never arrived: per boot from 1 to the highest seen, in the newest boot to
        `sent` if that is more.
        """
        numbers: dict[str, set[int]] = defaultdict(set)
        started: dict[str, float] = {}
        with self.lock:
            for item in self.seen:
                if item.document.get("device") == device and "seq" in item.document:
                    numbers[item.document["boot"]].add(item.document["seq"])
                    started.setdefault(item.document["boot"], item.document["at"])
        newest = max(numbers, key=lambda boot: started[boot], default="")
        return sum(max(*found, sent if boot == newest else 0) - len(found) for boot, found in numbers.items())

    def stop(self) -> None:
        leave(self.client)
