"""Against a real mosquitto: nothing is acknowledged before it is committed, nothing counts twice."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.contract.errors import DiskFull, LinkError
from compressor.fleet.broker import BrokerAddress
from compressor.fleet.database import Database, devices, messages, timeline
from compressor.fleet.inbox import Roster
from compressor.fleet.ingest import Ingest
from scripts.story.broker import OPERATOR, Broker
from tests.compressor.fleet.doubles import DEVICES, FLEET, Device, wait_until

pytestmark = pytest.mark.system


class Host:
    def __init__(self, broker: Broker, folder: Path, *, client_id: str) -> None:
        self.database = Database(folder)
        self.said: list[tuple[str, str, str]] = []
        self.changes = threading.Event()
        address = BrokerAddress(
            "127.0.0.1", broker.port, client_id, username=OPERATOR, password=broker.users[OPERATOR], session_s=60
        )
        roster = Roster(fleet=FLEET, prefix="ew", known=lambda device: device in DEVICES)
        self.ingest = Ingest(
            address, self.database, roster, on_change=self.changes.set,
            say=lambda severity, event, text: self.said.append((severity, event, text)),
        )  # fmt: skip

    def start(self) -> None:
        self.ingest.start()
        assert self.ingest.broker.wait_connected(60)

    def close(self) -> None:
        self.ingest.stop()
        self.database.close()

    def seqs(self, device: str, boot: str = "b1") -> list[int]:
        with self.database.reading() as tx:
            found = messages.events(tx, device=device, limit=10_000)
        return sorted(row.seq for row in found if row.boot == boot)


@pytest.fixture
def host(broker: Broker, folder: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(broker, folder, client_id=f"host-{request.node.name}"[:60])
    host.start()
    yield host
    host.close()


Maker = Callable[[str], Device]


def marks(payload: bytes) -> dict[str, int]:
    found: dict[str, int] = json.loads(payload)["committed"]
    return found


def test_messages_are_kept_and_the_device_learns_up_to_where(host: Host, device: Maker) -> None:
    w1 = device("w1")
    for seq in (1, 2, 3):
        w1.event(seq)
    wait_until(lambda: host.seqs("w1") == [1, 2, 3])
    wait_until(lambda: marks(w1.next("ack")).get("b1") == 3)


def test_presence_birth_reported_and_vitals_make_the_device_list(host: Host, device: Maker) -> None:
    w2 = device("w2")
    w2.send("status", {"device": "w2", "boot": "b9", "state": "online", "reason": "started", "at": 1.0})
    w2.send("birth", {"device": "w2", "boot": "b9", "at": 1.0, "agent": "0.1.0", "runtime": "1", "machine": "x",
                      "system": "Linux", "artifacts": {"wrist": "ab" * 32}})  # fmt: skip
    w2.send("reported", {"device": "w2", "boot": "b9", "at": 1.0, "desired_version": 4, "update_state": "selftest"})

    def row() -> Any:
        with host.database.reading() as tx:
            found = devices.find(tx, "w2")
        return found if found is not None and found.reported else None

    found = wait_until(row)
    assert (found.presence, found.boot, found.birth["artifacts"]) == ("online", "b9", {"wrist": "ab" * 32})
    with host.database.reading() as tx:
        texts = [entry.text for entry in timeline.newest(tx, device="w2")]
    assert texts == ["desired 4: selftest", "online (started)"]


def test_hostile_messages_are_counted_acknowledged_and_harm_nobody(host: Host, device: Maker) -> None:
    w1, w2 = device("w1"), device("w2")
    w1.send("tm", b"\x00\xff not json")
    w1.send("ev/warning/drift", {"device": "w2", "boot": "b", "seq": 1, "at": 1.0, "severity": "info",
                                 "kind": "drift",
                                 "text": "I am somebody else"})  # fmt: skip
    w1.send("tm", {"v": 9, "device": "w1", "boot": "b", "seq": 1, "at": 1.0, "from_s": 0, "to_s": 1, "counters": {}})
    w2.event(1)
    wait_until(lambda: host.seqs("w2") == [1])

    def refused() -> dict[str, int]:
        with host.database.reading() as tx:
            return {row.code: row.count for row in messages.refusals(tx, "w1")}

    wait_until(lambda: refused() == {"malformed": 1, "foreign_device": 1, "unsupported_version": 1})
    assert host.ingest.statistics()["refused"] == 3


def test_what_is_refused_or_was_dropped_holds_up_no_watermark(host: Host, device: Maker) -> None:
    w1 = device("w1")
    w1.event(1, boot="b7")
    w1.event(2, boot="b7", severity="not a severity")
    w1.event(3, boot="b7", numbers={"x": "not a number"})
    w1.send("tm", {"v": 9, "device": "w1", "boot": "b7", "seq": 4})
    w1.event(5, boot="b7")
    w1.event(9, boot="b7")
    wait_until(lambda: marks(w1.next("ack")).get("b7") == 5)
    w1.send("status", {"device": "w1", "boot": "b7", "state": "online", "at": 1.0, "kept_from": {"b7": 9, "b6": 41}})
    wait_until(lambda: {"b7": 9, "b6": 40}.items() <= marks(w1.next("ack")).items())
    assert host.seqs("w1", "b7") == [1, 5, 9]


def test_a_device_that_repeats_itself_is_counted_once(host: Host, device: Maker) -> None:
    w3 = device("w3")
    for seq in (1, 1, 2, 1, 2):
        w3.event(seq)
    wait_until(lambda: host.ingest.statistics()["repeated"] == 3)
    assert host.seqs("w3") == [1, 2]


def test_nothing_is_acknowledged_while_the_disk_is_full_and_nothing_is_lost(
    host: Host, device: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    full.set()
    writing = host.database.writing

    @contextmanager
    def sometimes() -> Iterator[Any]:
        if full.is_set():
            raise DiskFull("cannot write: the disk is full")
        with writing() as tx:
            yield tx

    monkeypatch.setattr(host.database, "writing", sometimes)
    monkeypatch.setattr("compressor.fleet.ingest.RETRY_S", 0.02)
    w1 = device("w1")
    w1.event(1, boot="full")
    w1.event(2, boot="full")
    wait_until(lambda: host.ingest.statistics()["commit_failures"] >= 2)
    assert host.seqs("w1", "full") == []
    full.clear()
    wait_until(lambda: host.seqs("w1", "full") == [1, 2])


def test_what_was_sent_while_the_host_was_away_arrives_when_it_is_back(
    broker: Broker, device: Maker, folder: Path
) -> None:
    first = Host(broker, folder, client_id="host-away")
    first.start()
    w1 = device("w1")
    w1.event(1, boot="away")
    wait_until(lambda: first.seqs("w1", "away") == [1])
    first.close()
    for seq in (2, 3, 4):
        w1.event(seq, boot="away")
    second = Host(broker, folder, client_id="host-away")
    second.start()
    wait_until(lambda: second.seqs("w1", "away") == [1, 2, 3, 4])
    second.close()


def test_a_host_that_dies_before_its_commit_gets_the_messages_again(
    broker: Broker, device: Maker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Host(broker, folder, client_id="host-dies")
    monkeypatch.setattr(first.ingest, "_commit", lambda _batch: False)  # killed between arrival and commit
    first.start()
    w1 = device("w1")
    w1.event(1, boot="dies")
    wait_until(lambda: first.ingest.statistics()["received"] >= 1)
    first.close()
    second = Host(broker, folder, client_id="host-dies")
    second.start()
    wait_until(lambda: second.seqs("w1", "dies") == [1])
    second.close()


def test_commands_and_retained_documents_reach_the_device(host: Host, device: Maker) -> None:
    w3 = device("w3")
    broker, topics = host.ingest.broker, host.ingest.topics("w3")
    broker.retain(topics.desired, b'{"signed": 1}')
    assert w3.next("desired") == b'{"signed": 1}'
    broker.command(topics.command("sample"), b"{}", answer_to=topics.response("sample"), expiry_s=60)
    assert w3.next("cmd/sample") == b"{}"
    w3.send("res/sample", {"device": "w3", "id": "s1", "ok": False, "code": "not_allowed"})
    (reply,) = wait_until(host.ingest.replies)
    assert (reply.device, reply.op, reply.id, reply.code) == ("w3", "sample", "s1", "not_allowed")


def test_a_broker_restart_is_survived_and_retained_documents_are_renewed(folder: Path, tmp_path: Path) -> None:
    private = Broker(tmp_path / "own", FLEET, DEVICES)
    private.prepare()
    private.start()
    host = Host(private, folder, client_id="host-restart")
    host.start()
    host.ingest.broker.retain("ew/1/demo/w1/desired", b"one")
    with pytest.raises(LinkError):
        _while_away(private, host)
    (private.folder / "mosquitto.db").unlink(missing_ok=True)  # it forgot everything
    private.start()
    wait_until(lambda: host.ingest.statistics()["connects"] == 2)
    w1 = Device(private.port, "w1", private.users["w1"])
    assert w1.next("desired") == b"two"
    w1.event(1)
    wait_until(lambda: host.seqs("w1") == [1])
    w1.close()
    host.close()
    private.stop()


def _while_away(private: Broker, host: Host) -> None:
    private.kill()
    wait_until(lambda: not host.ingest.statistics()["connected"])
    host.ingest.broker.retain("ew/1/demo/w1/desired", b"two")
    host.ingest.broker.command("ew/1/demo/w1/cmd/x", b"{}", answer_to="ew/1/demo/w1/res/x", expiry_s=1)


def test_a_wrong_password_is_said_and_tried_again(broker: Broker, folder: Path) -> None:
    host = Host(broker, folder, client_id="host-wrong")
    host.ingest = Ingest(
        BrokerAddress("127.0.0.1", broker.port, "host-wrong", username=OPERATOR, password="no"),
        host.database,
        Roster(fleet=FLEET, prefix="ew", known=lambda _device: True),
        on_change=lambda: None,
        say=lambda *words: host.said.append(words),
    )
    host.ingest.start()
    wait_until(lambda: "authori" in host.ingest.statistics()["error"].lower())
    host.close()


def test_a_broker_that_speaks_nonsense_ends_the_session_and_nothing_else(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_nonsense, args=(server,), daemon=True)
        thread.start()
        database = Database(folder)
        ingest = Ingest(
            BrokerAddress("127.0.0.1", server.getsockname()[1], "host-nonsense"), database,
            Roster(fleet=FLEET, prefix="ew", known=lambda _device: True),
            on_change=lambda: None, say=lambda *_words: None,
        )  # fmt: skip
        ingest.start()
        wait_until(lambda: ingest.statistics()["error"])
        ingest.stop()
        database.close()


def _nonsense(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(1000)
            connection.sendall(b"\x20\xff\xff\xff\xff\xff garbage")
