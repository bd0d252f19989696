from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select

from agent.contract.errors import DiskFull, StateLocked, StateUnreadable
from agent.outbox import Outbox, Priority
from agent.store import Store
from compressor.fleet.database import Database, devices, messages, plans, timeline
from compressor.fleet.database.tables import BOOT, MESSAGE
from compressor.fleet.inbox import EventSeen, Key, TelemetrySeen

NOW = 1_764_000_000.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path)
    yield database
    database.close()


def event(seq: int, *, device: str = "w1", boot: str = "b1", text: str = "something") -> EventSeen:
    key = Key(device, boot, seq)
    return EventSeen(key, NOW, "warning", "drift", "wrist", text, ("ax",), {"rows": 1.0}, {"a": [1]})


def telemetry(seq: int, *, rows: int = 64) -> TelemetrySeen:
    body = {"first": 1, "last": 64, "clip": 4.0, "fraction_bits": 10, "sums": [rows], "squares": [rows * 2],
            "classes": [], "counters": {}}  # fmt: skip
    window = {"service": "wrist", "view": "channels", "reference": "cd" * 32, "rows": rows, "body": body}
    return TelemetrySeen(Key("w1", "b1", seq), NOW, (window,), (), {"health": {}})


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Database(tmp_path)
    with first.writing() as tx:
        messages.admit(tx, [event(1), telemetry(2)], now_s=NOW)
    first.close()
    second = Database(tmp_path)
    with second.reading() as tx:
        assert [(row.device, row.seq, row.channels, row.details) for row in messages.events(tx)] == [
            ("w1", 1, ["ax"], {"a": [1]})
        ]
        assert messages.windows(tx, "w1", "wrist", limit=5)[0].body["sums"] == [64]
    second.close()


def test_a_repeated_message_counts_once_in_one_batch_and_in_the_next(database: Database) -> None:
    with database.writing() as tx:
        assert len(messages.admit(tx, [event(1), event(1, text="again"), event(3)], now_s=NOW)) == 2
    with database.writing() as tx:
        assert messages.admit(tx, [event(1), event(3), event(2)], now_s=NOW) == [Key("w1", "b1", 2)]
        assert sorted(row.seq for row in messages.events(tx)) == [1, 2, 3]


def test_the_watermark_never_passes_a_gap(database: Database) -> None:
    with database.writing() as tx:
        messages.admit(tx, [event(seq) for seq in (1, 2, 5)], now_s=NOW)
        assert (messages.watermarks(tx, "w1"), messages.missing(tx, "w1")) == ({"b1": 2}, 2)
        messages.admit(tx, [event(3)], now_s=NOW)
        assert messages.watermarks(tx, "w1") == {"b1": 3}
        messages.admit(tx, [event(4)], now_s=NOW)
        assert (messages.watermarks(tx, "w1"), messages.missing(tx, "w1")) == ({"b1": 5}, 0)


def test_what_was_refused_or_given_up_by_its_device_is_waited_for_no_longer(database: Database) -> None:
    with database.writing() as tx:
        messages.admit(tx, [event(seq) for seq in (1, 4, 5, 9)], now_s=NOW)
        messages.settle(tx, [Key("w1", "b1", 2), Key("w1", "b1", 2), Key("w2", "b1", 1)], now_s=NOW)
        assert (messages.watermarks(tx, "w1"), messages.watermarks(tx, "w2")) == ({"b1": 2}, {"b1": 1})
        assert messages.missing(tx, "w1") == 4
        messages.give_up(tx, "w1", {"b1": 4, "b0": 7}, now_s=NOW)
        assert messages.watermarks(tx, "w1") == {"b1": 5, "b0": 6}
        messages.give_up(tx, "w1", {"b1": 2, "b0": 1}, now_s=NOW)  # an old word moves nothing back
        assert messages.watermarks(tx, "w1") == {"b1": 5, "b0": 6}
        assert messages.admit(tx, [event(2), event(6), event(7, boot="b0")], now_s=NOW) == [
            Key("w1", "b1", 6), Key("w1", "b0", 7),
        ]  # fmt: skip
        counted = select(BOOT.c.messages).where(BOOT.c.device == "w1", BOOT.c.boot == "b1")
        assert tx.execute(counted).scalar_one() == 5  # refused ones are none


def test_a_device_that_invents_boots_and_places_occupies_bounded_room(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MAX_BOOTS", 3)
    monkeypatch.setattr(messages, "MAX_AHEAD", 10)
    with database.writing() as tx:
        messages.admit(tx, [event(1, device="w2")], now_s=NOW)
        for boot in range(20):  # its clock runs backwards
            messages.settle(tx, [Key("w1", f"r{boot}", seq) for seq in range(2, 40)], now_s=NOW - boot)
            messages.give_up(tx, "w1", {f"g{boot}": 2**53}, now_s=NOW - boot)
        assert len(messages.watermarks(tx, "w1")) == 3
        assert tx.execute(select(func.count()).select_from(MESSAGE)).scalar_one() <= 3 * 10
        assert messages.watermarks(tx, "w2") == {"b1": 1}
        assert messages.admit(tx, [event(1, boot="new")], now_s=NOW - 99) == [Key("w1", "new", 1)]
        assert messages.watermarks(tx, "w1")["new"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_device_drops_and_a_host_refuses_everything_is_settled_in_the_end(
    database: Database, tmp_path: Path, seed: int
) -> None:
    """The device's own outbox against the host's own tables: nothing kept is lost, nothing settled stays."""
    luck = np.random.default_rng(seed)
    store = Store(tmp_path / "device", outbox_bytes=64 * 1024)
    outbox = Outbox(store, boot="b1", max_bytes=64 * 1024, max_age_s=1000.0)
    outbox.follow_host()
    kept: set[int] = set()
    for _ in range(120):
        seq = outbox.put(Priority.ALARM if luck.random() < 0.5 else Priority.TELEMETRY, "t", bytes, at=0.0)
        if luck.random() < 0.3:
            outbox.refuse(next(row for row in store.rows(1000) if row.seq == seq))  # such as too large for the broker
        else:
            kept.add(seq)
    rounds = 0
    while outbox.statistics()["rows"]:
        rounds += 1
        assert rounds < 120
        rows = outbox.take(int(luck.integers(1, 40)), skip_ids=(), skip_topics=(), now=1.0)
        with database.writing() as tx:
            for row in rows:
                outbox.settle(row)
                if luck.random() < 0.1:
                    messages.settle(tx, [Key("w1", "b1", row.seq)], now_s=NOW)
                    kept.discard(row.seq)
                else:
                    messages.admit(tx, [event(row.seq)], now_s=NOW)
            messages.give_up(tx, "w1", outbox.gaps(), now_s=NOW)
            marks = messages.watermarks(tx, "w1")
        outbox.acknowledge(marks)
    with database.reading() as tx:
        assert {row.seq for row in messages.events(tx, limit=1000)} == kept
    store.close()


def test_boots_and_devices_count_on_their_own(database: Database) -> None:
    with database.writing() as tx:
        messages.admit(tx, [event(1), event(1, boot="b2"), event(1, device="w2")], now_s=NOW)
        assert messages.watermarks(tx, "w1") == {"b1": 1, "b2": 1}
        assert messages.watermarks(tx, "w2") == {"b1": 1}


def test_sequence_numbers_that_leap_occupy_a_bounded_number_of_keys(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MAX_AHEAD", 10)
    with database.writing() as tx:
        messages.admit(tx, [event(seq * 1000) for seq in range(1, 31)], now_s=NOW)
        assert messages.watermarks(tx, "w1") == {"b1": 21_000}  # ten keys are kept above it
        assert messages.missing(tx, "w1") == 9000 - 9


def test_a_device_occupies_a_bounded_number_of_rows(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_EVENTS", 5)
    monkeypatch.setattr(messages, "MAX_BOOTS", 3)
    with database.writing() as tx:
        for boot in range(6):
            messages.admit(tx, [event(1, boot=f"b{boot}"), event(2, boot=f"b{boot}")], now_s=NOW + boot)
        messages.admit(tx, [event(1, device="w2")], now_s=NOW)
        assert messages.prune(tx, "w1") == 7
        assert [row.boot for row in messages.events(tx, device="w1")] == ["b5", "b5", "b4", "b4", "b3"]
        assert messages.watermarks(tx, "w1") == {"b5": 2, "b4": 2, "b3": 2}
        assert len(messages.events(tx, device="w2")) == 1


def test_refusals_are_counted_and_their_table_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_REFUSALS", 2)
    with database.writing() as tx:
        messages.refuse(tx, {("w1", "malformed"): (2, "x"), ("w2", "quota"): (1, "y")}, now_s=NOW)
        messages.refuse(tx, {("w1", "malformed"): (3, "z"), ("w3", "quota"): (1, "q")}, now_s=NOW + 1)
        messages.refuse(tx, {("w4", "quota"): (4, "q")}, now_s=NOW + 2)
        found = {(row.device, row.code): (row.count, row.text) for row in messages.refusals(tx)}
    assert found == {("w1", "malformed"): (5, "z"), ("w2", "quota"): (1, "y"), ("-", "quota"): (5, "q")}


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    def cut_off() -> None:
        with database.writing() as tx:
            messages.admit(tx, [event(1)], now_s=NOW)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cut_off()
    with database.reading() as tx:
        assert messages.events(tx) == []
        assert messages.watermarks(tx, "w1") == {}


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.writing() as tx:
        timeline.add(tx, "host", "one", at=NOW)
        with database.reading() as view:
            assert timeline.newest(view) == []


def test_writers_of_several_threads_queue_up(database: Database) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            with database.writing() as tx:
                timeline.add(tx, "host", f"{number}", at=NOW)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as tx:
        assert timeline.last(tx) == 80


def test_a_second_host_on_one_database_is_told_whose_it_is(tmp_path: Path) -> None:
    first = Database(tmp_path, serving=True)
    with pytest.raises(StateLocked, match=f"process {os.getpid()}") as caught:
        Database(tmp_path, serving=True)
    assert caught.value.exit_code == 7
    beside = Database(tmp_path)  # a command may look while the host serves
    beside.close()
    first.close()
    Database(tmp_path, serving=True).close()


def test_the_lock_of_a_killed_host_is_free(tmp_path: Path) -> None:
    script = (
        "import os,sys,pathlib;from compressor.fleet.database import Database;"
        "Database(pathlib.Path(sys.argv[1]),serving=True);os.kill(os.getpid(),9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    Database(tmp_path, serving=True).close()


def test_rollouts_of_an_older_host_are_none_that_go_back(tmp_path: Path) -> None:
    first = Database(tmp_path)
    fields = {"cohort": "canary", "service": "wrist", "devices": [], "versions": {}, "artifacts": {}, "order": []}
    with first.writing() as tx:
        plans.add_rollout(tx, job=1, state="halted", created_at=NOW, since=NOW, text="", **fields)
    first.close()
    with sqlite3.connect(first.path) as raw:
        raw.executescript("ALTER TABLE rollout DROP COLUMN rollback; UPDATE schema SET version = 1")
    raw.close()
    second = Database(tmp_path)
    with second.writing() as tx:
        plans.add_rollout(tx, job=None, state="draft", created_at=NOW, since=NOW, text="", rollback=True, **fields)
        assert [row.rollback for row in plans.rollouts(tx)] == [False, True]
    second.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    from sqlalchemy import update

    from compressor.fleet.database.tables import SCHEMA

    database = Database(tmp_path)
    with database.writing() as tx:
        tx.execute(update(SCHEMA).values(version=99))
    database.close()
    with pytest.raises(StateUnreadable, match="schema 99"):
        Database(tmp_path)


def test_a_damaged_database_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "fleet.db").write_bytes(b"this is no database, " * 500)
    with pytest.raises(StateUnreadable, match=r"fleet\.db"):
        Database(tmp_path)


def test_a_full_disk_is_named(database: Database) -> None:
    def fill() -> None:
        with database.writing() as tx:
            tx.exec_driver_sql("PRAGMA max_page_count = 60")
            messages.admit(tx, [event(seq, text="x" * 2000) for seq in range(1, 1000)], now_s=NOW)

    with pytest.raises(DiskFull, match="full"):
        fill()
    with database.writing() as tx:
        tx.exec_driver_sql("PRAGMA max_page_count = 1000000")
        messages.admit(tx, [event(1)], now_s=NOW)


def test_sequence_numbers_of_commands_and_documents_only_grow(database: Database) -> None:
    with database.writing() as tx:
        devices.change(tx, "w1", now_s=NOW)
        assert [devices.next_command_seq(tx, "w1") for _ in range(3)] == [1, 2, 3]
        assert [devices.next_desired_version(tx, "w1") for _ in range(2)] == [1, 2]
        devices.change(tx, "w1", now_s=NOW, presence="online")
        found = devices.find(tx, "w1")
    assert found is not None
    assert (found.command_seq, found.presence, found.first_seen_at) == (3, "online", NOW)


def test_an_enrolment_token_works_once_for_its_device_before_it_is_over(database: Database) -> None:
    with database.writing() as tx:
        devices.add_token(tx, "aa", "w1", now_s=NOW, lifetime_s=60)
        devices.add_token(tx, "bb", "w1", now_s=NOW, lifetime_s=60)
        assert not devices.use_token(tx, "aa", "w2", now_s=NOW)
        assert devices.use_token(tx, "aa", "w1", now_s=NOW)
        assert not devices.use_token(tx, "aa", "w1", now_s=NOW)
        assert not devices.use_token(tx, "bb", "w1", now_s=NOW + 61)


def test_a_decision_that_stands_is_counted_not_repeated(database: Database) -> None:
    first = {"cohort": "canary", "service": "wrist", "kind": "note", "row": "answered", "devices": ["w1"],
             "reason": "because", "numbers": {"rows": 3}}  # fmt: skip
    with database.writing() as tx:
        number, new = plans.record(tx, first, now_s=NOW)
        assert new
        assert plans.record(tx, first, now_s=NOW + 1) == (number, False)
        assert plans.record(tx, first, now_s=NOW + 31) == (number, False)
        assert plans.record(tx, first | {"devices": ["w2"]}, now_s=NOW + 1)[1]
        assert plans.record(tx, first, now_s=NOW + 62) == (number, False)
        assert plans.record(tx, first | {"row": "running"}, now_s=NOW + 63)[1]
        assert plans.record(tx, first, now_s=NOW + 64)[1]  # it stands anew
        found = plans.decision(tx, number)
    assert found is not None
    assert (found.repeated, found.last_at, found.numbers) == (2, NOW + 62, {"rows": 3})
