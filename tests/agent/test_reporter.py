import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from agent.contract.messages import MAX_MESSAGE_BYTES, Event, Telemetry
from agent.contract.topics import Topics
from agent.decisions.events import Publish
from agent.journal import Journal, text_style
from agent.link import Link
from agent.outbox import Outbox
from agent.reporter import Reporter, add_up
from agent.sensors.device import describe
from agent.session import Broker, Will
from agent.store import Store

TOPICS = Topics("f", "d")


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path, outbox_bytes=1 << 20)
    yield store
    store.close()


@pytest.fixture
def outbox(store: Store) -> Outbox:
    return Outbox(store, boot="b", max_bytes=1 << 20, max_age_s=1e6)


@pytest.fixture
def reporter(outbox: Outbox) -> Reporter:
    link = Link(
        Broker("127.0.0.1", 1, "d"), outbox, Journal(io.StringIO(), style=text_style), will=Will(TOPICS.status, b"{}")
    )
    return Reporter(TOPICS, outbox, link)


def queued(outbox: Outbox):
    return outbox.take(10, skip_ids=(), skip_topics=(), now=0.0)


def test_an_event_is_queued_as_an_alarm_with_its_number(reporter: Reporter, outbox: Outbox) -> None:
    said = Publish(
        "warning", "sensor", "gx is dead", "wrist", ("gx",), {"rows": 3.0, "unknown": math.nan}, {"alarm": "dead"}
    )
    reporter.event(said, decision_time_s=12.5)
    (row,) = queued(outbox)
    assert (row.priority, row.topic) == ("A", "ew/1/f/d/ev/warning/sensor")
    event = Event.decode(row.body)
    assert (event.seq, event.channels, event.numbers) == (1, ["gx"], {"rows": 3.0})
    assert event.details == {"alarm": "dead", "decision_time_s": 12.5}


def test_plain_information_may_be_dropped_before_alarms(reporter: Reporter, outbox: Outbox) -> None:
    reporter.event(Publish("info", "worker", "worker 1 serves"), decision_time_s=0.0)
    assert queued(outbox)[0].priority == "B"


def test_a_telemetry_window_adds_up_the_services(reporter: Reporter, outbox: Outbox) -> None:
    part = {"counters": {"requests": 3}, "latency": [], "drift": []}
    fields = add_up([("a", part), ("b", part)]) | {"gauges": {"x": None, "y": math.inf}, "health": {"a": "healthy"}}
    reporter.telemetry(from_s=1.0, to_s=2.0, fields=fields)
    (row,) = queued(outbox)
    window = Telemetry.decode(row.body)
    assert window.counters == {"a.requests": 3, "b.requests": 3}
    assert (window.from_s, window.to_s, window.gauges, window.power) == (1.0, 2.0, {"x": None}, None)


def window(service: str, features: int) -> dict[str, object]:
    return {
        "service": service, "view": "v", "reference": "", "first": 0, "last": 1, "rows": 1, "clip": 4.0,
        "fraction_bits": 10, "sums": [1000] * features, "squares": [1000] * features,
    }  # fmt: skip


def test_windows_that_do_not_fit_into_one_message_become_several(reporter: Reporter, outbox: Outbox) -> None:
    drift = [window(f"s{number}", 3000) for number in range(20)]  # 40 kB each
    fields = {"counters": {"a": 1}, "latency": [], "drift": [*drift, window("huge", 40_000)]}
    reporter.telemetry(from_s=1.0, to_s=2.0, fields=fields)
    rows = queued(outbox)
    assert max(len(row.body) for row in rows) <= MAX_MESSAGE_BYTES
    seen = [Telemetry.decode(row.body) for row in rows]
    assert [one.service for message in seen for one in message.drift] == [f"s{number}" for number in range(20)]
    assert [message.counters for message in seen] == [*[{}] * (len(seen) - 1), {"a": 1}]
    assert {(message.from_s, message.to_s) for message in seen} == {(1.0, 2.0)}
    assert reporter.statistics()["parts_left_out"] == 1


def test_a_message_holds_no_more_windows_than_a_host_takes(reporter: Reporter, outbox: Outbox) -> None:
    reporter.telemetry(
        from_s=1.0, to_s=2.0, fields={"counters": {}, "drift": [window(f"s{number}", 1) for number in range(100)]}
    )
    assert [len(Telemetry.decode(row.body).drift) for row in queued(outbox)] == [64, 36]


def test_presence_birth_and_reported_are_announced_not_queued(reporter: Reporter, outbox: Outbox) -> None:
    reporter.presence("online", "started")
    reporter.birth(describe(), runtime="1.0", artifacts={"wrist": "ab"})
    reporter.reported({"wrist": {"active": "wrist", "since_s": math.nan}})
    assert queued(outbox) == []
    documents = {topic.rsplit("/", 1)[1]: json.loads(body) for topic, body in reporter._link._documents.items()}
    assert documents["status"]["state"] == "online"
    assert documents["birth"]["artifacts"] == {"wrist": "ab"}
    assert documents["reported"]["services"] == {"wrist": {"active": "wrist"}}


def test_empty_places_are_told_with_the_presence_once(reporter: Reporter) -> None:
    def status() -> dict[str, Any]:
        return json.loads(reporter._link._documents[TOPICS.status])

    reporter.gaps({"b1": 4})  # nobody is present yet
    reporter.presence("online", "started")
    assert status()["kept_from"] == {}
    reporter.gaps({"b1": 4})
    first = status()
    assert (first["state"], first["reason"], first["kept_from"]) == ("online", "started", {"b1": 4})
    reporter.gaps({"b1": 4})
    reporter.gaps({})
    assert status() == first
    reporter.gaps({"b1": 9})
    assert status()["kept_from"] == {"b1": 9}


def test_presence_is_said_again_when_somebody_new_listens(reporter: Reporter) -> None:
    reporter.presence_again()  # nobody is present yet
    reporter.presence("online", "started")
    before = json.loads(reporter._link._unannounced.pop(TOPICS.status))
    reporter.presence_again()
    after = json.loads(reporter._link._unannounced[TOPICS.status])
    assert after.pop("at") > before.pop("at")
    assert after == before


def test_without_a_link_nothing_is_queued(outbox: Outbox) -> None:
    reporter = Reporter(TOPICS, outbox, None)
    reporter.event(Publish("error", "worker", "lost"), decision_time_s=0.0)
    reporter.presence("online", "started")
    assert queued(outbox) == []
