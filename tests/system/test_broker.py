"""Against a real mosquitto: nothing is lost while it is away, and what it says back is taken seriously."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from agent.client import Client
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber, leave
from tests.artifacts import gyro_off, record
from tests.system.conftest import DEVICE, FLEET, Agent, wait_until

pytestmark = pytest.mark.system


@pytest.fixture
def subscriber(broker: Broker) -> Iterator[Subscriber]:
    subscriber = Subscriber(broker.port, OPERATOR, broker.users[OPERATOR], FLEET)
    subscriber.start()
    yield subscriber
    subscriber.stop()


def highest(subscriber: Subscriber) -> int:
    with subscriber.lock:
        numbers = [item.document["seq"] for item in subscriber.seen if "seq" in item.document]
    return max(numbers, default=0)


def test_presence_birth_reported_telemetry_and_events_arrive(
    agent: Agent, broker: Broker, subscriber: Subscriber
) -> None:
    agent.write(agent.link_to(broker))
    agent.start()
    with Client(agent.address) as client:
        windows = record(seed=9).windows
        for window in [*windows[:20], *gyro_off(windows[20:40])]:
            client.infer("wrist", {"window": window[None]})
    wait_until(
        lambda: (subscriber.latest("tm") or {}).get("counters", {}).get("wrist.requests") is not None, "telemetry"
    )
    wait_until(lambda: any(event["kind"] == "fallback" for event in subscriber.events()), "the fallback event")
    assert wait_until(lambda: subscriber.latest("status"), "presence")["state"] == "online"
    birth = wait_until(lambda: subscriber.latest("birth"), "the birth")
    assert set(birth["artifacts"]) == {"wrist", "wrist-accel", "wrist-floor"}
    wait_until(
        lambda: (found := subscriber.latest("reported")) and found["services"]["wrist"]["active"] == "wrist-accel",
        "the switch is reported",
    )
    sensors = wait_until(lambda: [one for one in subscriber.events() if one["kind"] == "sensor"], "the sensor event")
    sensor = sensors[0]
    assert sensor["channels"][0] in ("gx", "gy", "gz")
    assert agent.stop() == 0
    wait_until(lambda: (subscriber.latest("status") or {}).get("state") == "offline", "the farewell")
    assert (subscriber.latest("status") or {})["reason"] == "stopped"
    wait_until(lambda: subscriber.missing(DEVICE) == 0, "every number has arrived")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_broker_that_is_away_for_a_while_loses_nothing(
    agent: Agent, broker: Broker, subscriber: Subscriber, how: str
) -> None:
    agent.write(agent.link_to(broker, interval_s=0.5))
    agent.start()
    wait_until(lambda: highest(subscriber) >= 3, "messages flow")
    getattr(broker, how)()
    wait_until(lambda: agent.status()["link"]["state"] == "waiting", "the loss is noticed")
    with Client(agent.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist"
    wait_until(lambda: agent.status()["outbox"]["rows"] >= 4, "messages wait")
    broker.start()
    wait_until(lambda: agent.status()["link"]["state"] == "connected", "the link is back")
    wait_until(lambda: agent.status()["outbox"]["rows"] == 0, "the outbox is empty")
    wait_until(lambda: highest(subscriber) >= 8, "what waited has arrived")
    wait_until(lambda: subscriber.missing(DEVICE) == 0, "every number has arrived")
    wait_until(lambda: (subscriber.latest("status") or {}).get("state") == "online", "it is online again")


def test_messages_survive_the_agent_while_the_broker_is_away(
    agent: Agent, broker: Broker, subscriber: Subscriber
) -> None:
    agent.write(agent.link_to(broker))
    broker.stop()
    agent.start()
    boot = agent.status()["agent"]["boot"]
    wait_until(lambda: agent.status()["outbox"]["rows"] >= 4, "messages wait")
    assert agent.process is not None
    agent.process.kill()
    agent.process.wait()
    broker.start()
    agent.start()

    def numbers_of_the_first_boot() -> set[int]:
        with subscriber.lock:
            return {
                item.document["seq"]
                for item in subscriber.seen
                if item.document.get("boot") == boot and "seq" in item.document
            }

    wait_until(lambda: len(numbers_of_the_first_boot()) >= 4, "what waited arrives")
    wait_until(lambda: subscriber.missing(DEVICE) == 0, "without gaps")


def test_wrong_credentials_are_shown_and_never_block_serving(agent: Agent, broker: Broker) -> None:
    wrong = agent.folder / "wrong"
    wrong.write_text("not the password")
    agent.write(agent.link_to(broker).replace(str(broker.password_file(DEVICE)), str(wrong)))
    agent.start()
    wait_until(lambda: agent.status()["link"]["state"] == "refused", "the refusal is noticed")
    assert "refused 'bench-1'" in agent.status()["link"]["error"]
    with Client(agent.address) as client:
        assert client.ready("wrist")
    doctor = agent.command("doctor")
    assert doctor.returncode == 5
    assert "not the password" not in doctor.stdout + agent.log.read_text() + json.dumps(agent.status())


def test_a_topic_the_broker_forbids_is_an_error_in_the_status(
    agent: Agent, broker: Broker, subscriber: Subscriber
) -> None:
    acl = broker.folder / "acl"
    acl.write_text(acl.read_text().replace(f"ew/1/{FLEET}/{DEVICE}/#", f"ew/1/{FLEET}/{DEVICE}/tm"))
    broker.stop()
    broker.start()
    agent.write(agent.link_to(broker))
    agent.start()
    wait_until(lambda: agent.status()["link"]["denied_topics"], "the refusal is noticed")
    wait_until(lambda: agent.status()["link"]["published"] >= 2, "allowed messages flow all the same")
    assert agent.status()["link"]["refusals"]["0x87"] >= 1
    assert agent.status()["outbox"]["rows"] >= 1  # kept, not counted as delivered
    doctor = agent.command("doctor")
    assert doctor.returncode == 5
    assert f"refuses what it publishes to ew/1/{FLEET}/{DEVICE}/doctor: publishing is not authorized" in doctor.stdout


def test_what_nobody_subscribes_to_is_kept_until_somebody_does(agent: Agent, broker: Broker) -> None:
    agent.write(agent.link_to(broker))
    agent.start()
    wait_until(lambda: agent.status()["link"]["unheard"], "the agent knows that nobody listens")
    listener = Subscriber(broker.port, OPERATOR, broker.users[OPERATOR], FLEET)
    listener.start()
    try:
        wait_until(lambda: agent.status()["outbox"]["rows"] == 0, "the outbox is empty")
        wait_until(lambda: highest(listener) >= 3, "what waited arrives")
        wait_until(lambda: listener.missing(DEVICE) == 0, "without gaps")
    finally:
        listener.stop()


class Partial:
    """Subscribes to some topics only, with a session that ends with it; counts what comes by its last words."""

    def __init__(self, broker: Broker, words: str) -> None:
        self.seen: list[str] = []
        subscribed = threading.Event()
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="partial", protocol=mqtt.MQTTv5)
        self.client.username_pw_set(OPERATOR, broker.users[OPERATOR])
        self.client.on_message = lambda _client, _data, message: self.seen.append(message.topic.split("/", 4)[-1])
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.connect("127.0.0.1", broker.port)
        self.client.subscribe(f"ew/1/{FLEET}/+/{words}", qos=1)
        self.client.loop_start()
        assert subscribed.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        leave(self.client)


def break_gyro(agent: Agent) -> None:
    with Client(agent.address) as client:
        for window in gyro_off(record(seed=9).windows[20:40]):
            client.infer("wrist", {"window": window[None]})


def test_a_listener_of_telemetry_alone_gets_it_and_alarms_are_kept(agent: Agent, broker: Broker) -> None:
    agent.write(agent.link_to(broker, interval_s=0.5))
    with Partial(broker, "tm") as listener:
        agent.start()
        break_gyro(agent)
        wait_until(lambda: any("/sensor" in topic for topic in agent.status()["link"]["unheard"]), "nobody hears it")
        before = len(listener.seen)
        wait_until(lambda: len(listener.seen) >= before + 10, "telemetry goes on")  # held up, two would come
        assert agent.status()["outbox"]["rows"] >= 1
    assert set(listener.seen) == {"tm"}


def test_a_listener_of_events_alone_gets_alarms_at_once_and_telemetry_does_not_pile_up(
    agent: Agent, broker: Broker
) -> None:
    agent.write(agent.link_to(broker, interval_s=0.5))
    with Partial(broker, "ev/#") as listener:
        agent.start()
        wait_until(
            lambda: any(topic.endswith("/tm") for topic in agent.status()["link"]["unheard"]), "telemetry is unheard"
        )
        break_gyro(agent)
        # what is asked about like a topic nobody wants would come after 30 s
        wait_until(lambda: any("/sensor" in topic for topic in listener.seen), "the alarm arrives", within_s=25)
        wait_until(lambda: agent.status()["outbox"]["unwanted"] >= 1, "telemetry is let go")
    assert not any(topic == "tm" for topic in listener.seen)


def test_the_last_will_is_armed_and_a_short_loss_stays_unheard(
    agent: Agent, broker: Broker, subscriber: Subscriber, short: Path
) -> None:
    agent.write(agent.link_to(broker))
    agent.start()
    wait_until(lambda: (subscriber.latest("status") or {}).get("state") == "online", "online")
    assert agent.process is not None
    agent.process.kill()
    agent.process.wait()
    agent.start()
    wait_until(lambda: agent.status()["link"]["state"] == "connected", "the next one is connected")
    with subscriber.lock:
        states = [item.document["state"] for item in subscriber.seen if item.topic.endswith("/status")]
    assert "offline" not in states
