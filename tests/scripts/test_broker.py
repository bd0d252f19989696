"""The private broker keeps strangers and neighbours out."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import leave

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    running = Broker(tmp_path_factory.mktemp("mqtt") / "broker", "demo", ("one", "two"))
    running.prepare()
    running.start()
    yield running
    running.stop()


class Person:
    """A client that notes what the broker says to it."""

    def __init__(self, broker, user=None, password=None):
        self.answered, self.received, self.published = threading.Event(), threading.Event(), threading.Event()
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        if user:
            self.client.username_pw_set(user, password or broker.users[user])
        self.client.on_connect = self._connected
        self.client.on_publish = self._published
        self.subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.on_message = lambda *_: self.received.set()
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        assert self.answered.wait(60)

    def _connected(self, _client, _data, _flags, reason, _properties):
        self.refused = reason.is_failure
        self.answered.set()

    def _published(self, _client, _data, _mid, reason, _properties):
        self.code = str(reason)
        self.published.set()

    def publish(self, topic):
        self.published.clear()
        self.client.publish(topic, b"x", qos=1)
        assert self.published.wait(60)
        return self.code

    def leave(self):
        leave(self.client)


@pytest.mark.parametrize(("user", "password"), [(None, None), ("one", "guessed"), ("nobody", "x")])
def test_nobody_enters_without_a_right_password(broker, user, password):
    stranger = Person(broker, user, password)
    stranger.leave()
    assert stranger.refused


def test_a_device_publishes_under_its_own_prefix_only(broker):
    one = Person(broker, "one")
    own, other = one.publish("ew/1/demo/one/tm"), one.publish("ew/1/demo/two/tm")
    one.leave()
    assert own in ("Success", "No matching subscribers")
    assert other == "Not authorized"


def test_a_device_cannot_listen_to_its_neighbour_but_the_operator_can(broker):
    one, operator = Person(broker, "one"), Person(broker, OPERATOR)
    for person in (one, operator):
        person.client.subscribe("ew/1/demo/two/#", qos=1)
        assert person.subscribed.wait(60)
    two = Person(broker, "two")
    two.publish("ew/1/demo/two/tm")
    assert operator.received.wait(60)
    assert not one.received.is_set()
    for person in (one, operator, two):
        person.leave()


def test_it_listens_on_loopback_only(broker):
    sockets = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in sockets if line.split()[3] == "0A"]
    ours = [address for address in listening if int(address.split(":")[1], 16) == broker.port]
    assert ours == [f"{int.from_bytes(socket.inet_aton('127.0.0.1'), 'little'):08X}:{broker.port:04X}"]


def test_its_folder_and_secrets_are_private(broker):
    assert broker.folder.stat().st_mode & 0o777 == 0o700
    for name in ("passwords", "acl", "one.password"):
        assert (broker.folder / name).stat().st_mode & 0o077 == 0
