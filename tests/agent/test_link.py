import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from agent import link as link_module
from agent import session as session_module
from agent.contract.errors import ConfigError, LinkError
from agent.journal import Journal, text_style
from agent.link import Link
from agent.outbox import Outbox, Priority
from agent.session import Broker, Will, make_tls, probe
from agent.store import Store
from tests.agent.mqtt_double import BrokerDouble, Published

WILL = Will("ew/1/f/d/status", b'{"state":"offline"}')


class Device:
    """A link with its outbox, as the agent puts them together."""

    def __init__(self, folder: Path, port: int) -> None:
        self.store = Store(folder, outbox_bytes=1 << 20)
        self.outbox = Outbox(self.store, boot="b", max_bytes=1 << 20, max_age_s=1e6)
        self.log = io.StringIO()
        broker = Broker("127.0.0.1", port, client_id="d", username="d", password="secret")
        self.link = Link(broker, self.outbox, Journal(self.log, style=text_style), will=WILL)
        self.task: asyncio.Task[None] | None = None
        self.farewell_s = 0.2

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.link.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.stop(within_s=self.farewell_s)
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.store.close()

    def put(
        self, count: int = 1, *, topic: str = "tm", size: int = 0, priority: Priority = Priority.TELEMETRY
    ) -> None:
        for _ in range(count):
            self.outbox.put(priority, topic, lambda seq: f"{seq}".encode().ljust(size), at=1e9)
        self.link.pump()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.01)


def run(story: Coroutine[Any, Any, None] | Awaitable[None]) -> None:
    async def bounded() -> None:
        await story

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def _quick_and_timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "wall_s", lambda: 1e9)
    monkeypatch.setattr(link_module, "FIRST_PAUSE_S", 0.05)


def test_everything_put_arrives_once_and_leaves_the_outbox(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble() as broker, Device(tmp_path, broker.port) as device:
            device.put(200)
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert [int(message.body) for message in broker.published] == list(range(1, 201))
            assert broker.unanswered_peak <= session_module.WINDOW
            assert device.link.statistics()["state"] == "connected"

    run(story())


def test_retained_documents_come_first_and_again_after_a_loss(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble() as broker, Device(tmp_path, broker.port) as device:
            device.link.announce("status", b"1")
            await until(lambda: broker.published)
            broker.hang_up()
            await until(lambda: broker.connects == 2 and len(broker.published) == 2)
            assert {(message.topic, message.body, message.retain) for message in broker.published} == {
                ("status", b"1", True)
            }
            device.link.announce("status", b"1")  # nothing new: nothing sent
            device.link.announce("status", b"2")
            await until(lambda: broker.published[-1].body == b"2")
            assert len(broker.published) == 3
            assert device.link.statistics()["losses"] == 1

    run(story())


def test_a_broker_that_comes_late_gets_all(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble() as early:
            port = early.port
        async with Device(tmp_path, port) as device:
            device.put(3)
            await until(lambda: device.link.statistics()["state"] == "waiting")
            assert "cannot reach the broker" in device.link.statistics()["error"]
            async with BrokerDouble(port=port):
                await until(lambda: device.outbox.statistics()["rows"] == 0)

    run(story())


def test_unacknowledged_messages_are_sent_again_after_a_loss(tmp_path: Path) -> None:
    async def story() -> None:
        silent = True
        async with (
            BrokerDouble(answer=lambda _: None if silent else 0) as broker,
            Device(tmp_path, broker.port) as device,
        ):
            device.put(5)
            await until(lambda: len(broker.published) == 5)
            silent = False
            broker.hang_up()
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert {int(message.body) for message in broker.published} == set(range(1, 6))

    run(story())


def test_what_is_on_its_way_is_known_until_it_is_answered(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(answer=lambda _: None) as broker, Device(tmp_path, broker.port) as device:
            assert device.link.on_their_way() == set()
            device.put(2)
            await until(lambda: len(broker.published) == 2)
            assert device.link.on_their_way() == {row.id for row in device.store.rows(10)}

    run(story())


def test_not_authorized_is_an_error_not_a_delivery(tmp_path: Path) -> None:
    def answer(message: Published) -> int:
        return 0x87 if message.topic == "forbidden" else 0

    async def story() -> None:
        async with BrokerDouble(answer=answer) as broker, Device(tmp_path, broker.port) as device:
            device.put(1, topic="forbidden")
            device.put(3, topic="allowed")
            await until(lambda: device.outbox.statistics()["rows"] == 1)
            statistics = device.link.statistics()
            assert statistics["denied_topics"] == ["forbidden"]
            assert statistics["refusals"] == {"0x87": 1}
            assert "does not let this device publish to forbidden" in statistics["error"]
            assert "link.denied" in device.log.getvalue()

    run(story())


FORBIDDEN = frozenset({"ev/a", "ev/b", "ev/c"})


@pytest.mark.parametrize("says_why", [True, False], ids=["told", "silent"])
def test_a_broker_that_hangs_up_over_forbidden_topics_gets_all_others(tmp_path: Path, *, says_why: bool) -> None:
    async def story() -> None:
        async with (
            BrokerDouble(forbids=FORBIDDEN, says_why=says_why) as broker,
            Device(tmp_path, broker.port) as device,
        ):
            for topic in FORBIDDEN:
                device.put(10, topic=topic, priority=Priority.ALARM)  # more important than all others
            device.link.announce("status", b"1")
            device.put(30)
            await until(lambda: device.outbox.statistics()["rows"] == 30)
            assert sorted(int(one.body) for one in broker.published if one.topic == "tm") == list(range(31, 61))
            statistics = device.link.statistics()
            assert set(statistics["denied_topics"]) == FORBIDDEN  # and no innocent one
            # each topic costs its own connection, or as many as a silent refusal takes, and one more to begin with
            each = 1 if says_why else link_module.LOSSES_TO_DENY
            assert broker.hang_ups <= 1 + each * len(FORBIDDEN)
            await until(lambda: device.link.statistics()["state"] == "connected")
            assert "publish" in device.link.statistics()["error"]  # still said on the connection that works

    run(story())


def test_losses_that_follow_no_pattern_forbid_no_topic(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(answer=lambda _: None) as broker, Device(tmp_path, broker.port) as device:
            device.put(5)
            for number in range(1, link_module.LOSSES_TO_DENY):
                await until(lambda number=number: broker.connects == number and broker.published)
                broker.published.clear()
                broker.hang_up()
            await until(lambda: broker.published)
            assert device.link.statistics()["in_flight"] == 1  # careful after a loss
            broker.answer = lambda _: 0
            broker.hang_up()
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert device.link.statistics()["denied_topics"] == []

    run(story())


def test_a_message_larger_than_the_broker_takes_is_dropped_and_counted(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(maximum_packet_bytes=1000) as broker, Device(tmp_path, broker.port) as device:
            device.put(1, size=2000)
            device.put(1, size=100)
            device.link.announce("birth", b"x" * 2000)
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert [len(message.body) for message in broker.published] == [100]
            assert device.link.statistics()["too_large"] == 2
            assert device.outbox.statistics()["refused"] == 1

    run(story())


def test_a_payload_the_broker_never_takes_is_dropped(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(answer=lambda _: 0x99) as broker, Device(tmp_path, broker.port) as device:
            device.put(2)
            await until(lambda: device.outbox.statistics()["refused"] == 2)
            assert device.link.statistics()["refusals"] == {"0x99": 2}
            assert broker.connects == 1

    run(story())


def test_a_busy_broker_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "BUSY_BROKER_S", 0.05)
    answers = iter([0x97, 0x97])

    async def story() -> None:
        async with BrokerDouble(answer=lambda _: next(answers, 0)) as broker, Device(tmp_path, broker.port) as device:
            device.put(1)
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert len(broker.published) == 3
            assert device.outbox.statistics()["settled"] == 1

    run(story())


def test_what_nobody_subscribes_to_is_kept_and_sent_when_somebody_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FIRST_UNHEARD_S", 0.05)

    async def story() -> None:
        async with BrokerDouble(answer=lambda _: 0x10) as broker, Device(tmp_path, broker.port) as device:
            device.put(30)
            await until(lambda: device.link.statistics()["unheard"])
            await until(lambda: len(broker.published) >= 22)  # a window, then one at a time
            await until(lambda: device.outbox.statistics()["rows"] == 30)
            broker.answer = lambda _: 0
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert not device.link.statistics()["unheard"]

    run(story())


def only(*topics: str) -> Callable[[Published], int]:
    """A broker at which somebody subscribes to these topics and to no other."""
    return lambda message: 0 if message.topic in topics else 0x10


def test_a_topic_nobody_wants_holds_up_no_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(answer=only("tm")) as broker, Device(tmp_path, broker.port) as device:
            device.put(30, topic="ev/error/sensor", priority=Priority.ALARM)  # more than a window, and more important
            device.put(30)
            await until(lambda: sum(message.topic == "tm" for message in broker.published) == 30)
            await until(lambda: device.outbox.statistics()["rows"] == 30)
            assert device.link.statistics()["unheard"] == ["ev/error/sensor"]

    run(story())


def test_telemetry_that_the_listener_does_not_want_is_let_go_and_alarms_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FIRST_UNHEARD_S", 0.05)
    monkeypatch.setattr(link_module, "LONGEST_UNHEARD_S", 0.1)

    async def story() -> None:
        async with BrokerDouble(answer=only("ev")) as broker, Device(tmp_path, broker.port) as device:
            device.put(30)
            device.put(1, topic="ev/other", priority=Priority.ALARM)
            await until(lambda: len(device.link.statistics()["unheard"]) == 2)
            assert device.outbox.statistics()["unwanted"] == 0  # nobody may listen at all
            device.put(1, topic="ev", priority=Priority.ALARM)
            await until(lambda: device.outbox.statistics()["rows"] == 1)
            assert device.outbox.statistics()["unwanted"] == 30
            assert [row.topic for row in device.store.rows(10)] == ["ev/other"]

    run(story())


def test_a_listener_that_leaves_and_comes_back_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FIRST_UNHEARD_S", 0.05)

    async def story() -> None:
        async with BrokerDouble() as broker, Device(tmp_path, broker.port) as device:
            device.put(1, topic="ev", priority=Priority.ALARM)
            await until(lambda: broker.published)
            broker.answer = only()
            device.put(5)
            await until(lambda: len(broker.published) >= 7)  # the window, and one that asked again
            broker.answer = only("ev", "tm")
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert device.outbox.statistics()["unwanted"] == 0

    run(story())


def test_one_topic_heard_again_lets_all_others_be_tried_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(answer=only()) as broker, Device(tmp_path, broker.port) as device:
            device.put(1, topic="a")
            device.put(1, topic="b")
            await until(lambda: device.link.statistics()["unheard"] == ["a", "b"])
            device.link._unheard["b"] = replace(device.link._unheard["b"], next_s=1e12)  # asked about for long
            broker.answer = only("a", "b")
            await until(lambda: device.outbox.statistics()["rows"] == 0)

    run(story())


def test_a_session_without_pubacks_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "STUCK_S", 0.3)

    async def story() -> None:
        async with BrokerDouble() as broker, Device(tmp_path, broker.port) as device:
            broker.answer = lambda _: None if broker.connects == 1 else 0
            device.put(1)
            await until(lambda: device.outbox.statistics()["rows"] == 0)
            assert device.link.statistics()["stuck"] == 1
            assert broker.connects == 2

    run(story())


@pytest.mark.parametrize(
    "garbage", [b"\x20\x02\x00\x00" + b"\xff" * 40, b"\x20\x00", b"\xf0\x00", b"HTTP/1.1 400\r\n\r\n"]
)
def test_nonsense_from_the_broker_ends_the_session_and_nothing_else(
    tmp_path: Path, garbage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "CONNACK_TIMEOUT_S", 0.3)

    async def story() -> None:
        async with BrokerDouble(garbage=garbage) as broker, Device(tmp_path, broker.port) as device:
            device.put(1)
            await until(lambda: broker.connects >= 2)
            broker.garbage = b""
            await until(lambda: device.outbox.statistics()["rows"] == 0)

    run(story())


def test_a_refusal_is_said_with_its_reason_and_without_the_password(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(connack_reason=0x86) as broker, Device(tmp_path, broker.port) as device:
            await until(lambda: device.link.statistics()["state"] == "refused")
            assert "Bad user name or password" in device.link.statistics()["error"]
            assert "secret" not in device.log.getvalue() + str(device.link.statistics()) + repr(device.link._broker)

    run(story())


def test_stopping_says_goodbye_so_that_no_will_is_sent(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble() as broker:
            async with Device(tmp_path, broker.port) as device:
                await until(lambda: device.link.statistics()["state"] == "connected")
                device.farewell_s = 20.0
                device.link.announce("status", b"offline")
                device.put(30)
            await until(lambda: broker.goodbyes == 1)
            assert {message.topic for message in broker.published} == {"status", "tm"}
            assert len(broker.published) == 31

    run(story())


def test_stopping_while_nobody_answers_is_quick(tmp_path: Path) -> None:
    async def story() -> None:
        async with BrokerDouble(garbage=b" ") as broker, Device(tmp_path, broker.port) as device:
            await until(lambda: broker.connects == 1)
            assert device.link.statistics()["state"] == "connecting"

    run(story())


def test_a_probe_tells_whether_the_broker_would_have_us() -> None:
    async def story() -> None:
        async with BrokerDouble() as broker:
            await probe(Broker("127.0.0.1", broker.port, client_id="x"))
            broker.connack_reason = 0x87
            with pytest.raises(LinkError, match=r"refused.*Not authorized"):
                await probe(Broker("127.0.0.1", broker.port, client_id="x"))
        with pytest.raises(LinkError, match="cannot reach the broker"):
            await probe(Broker("127.0.0.1", broker.port, client_id="x"))

    run(story())


@pytest.mark.parametrize(("reason", "words"), [(0x87, "not authorized"), (0x99, "reason 153"), (0x10, ""), (0, "")])
def test_a_probe_tells_a_forbidden_topic_from_a_refused_user(reason: int, words: str) -> None:
    async def story() -> None:
        async with BrokerDouble(answer=lambda _message: reason) as broker:
            address = Broker("127.0.0.1", broker.port, client_id="x")
            if not words:
                await probe(address, "ew/1/f/d/doctor")
                assert [message.topic for message in broker.published] == ["ew/1/f/d/doctor"]
                return
            with pytest.raises(LinkError, match=f"accepts this device and refuses .*{words}") as told:
                await probe(address, "ew/1/f/d/doctor")
            assert "readwrite ew/1/f/d/#" in told.value.hint

    run(story())


def test_unusable_tls_files_are_refused_before_anything_starts(tmp_path: Path) -> None:
    assert make_tls(ca="", certificate="", key="") is None
    assert make_tls(ca="system", certificate="", key="") is not None
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        with pytest.raises(ConfigError, match="cannot use the TLS files"):
            make_tls(ca=str(path), certificate="", key="")
