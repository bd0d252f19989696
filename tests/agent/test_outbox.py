from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.errors import DiskFull
from agent.outbox import HELD_MESSAGES, ROW_OVERHEAD_BYTES, Outbox, Priority
from agent.store import Row, Store

MAX_BYTES = 64 * 1024


class FullDisk(Store):
    """A store whose disk can be filled and freed."""

    full = False

    def add_row(self, row: Row, *, durable: bool = False) -> int:
        self._refuse_when_full()
        return super().add_row(row, durable=durable)

    def delete_rows(self, ids: object) -> tuple[int, int]:
        self._refuse_when_full()
        return super().delete_rows(ids)  # type: ignore[arg-type]

    def _refuse_when_full(self) -> None:
        if self.full:
            raise DiskFull("no room")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FullDisk]:
    store = FullDisk(tmp_path, outbox_bytes=MAX_BYTES)
    yield store
    store.close()


def make(store: Store, *, boot: str = "b1", max_age_s: float = 100.0) -> Outbox:
    return Outbox(store, boot=boot, max_bytes=MAX_BYTES, max_age_s=max_age_s)


def put(outbox: Outbox, priority: Priority = Priority.TELEMETRY, *, size: int = 10, at: float = 0.0) -> int:
    return outbox.put(priority, "topic", lambda seq: f"{seq}".encode().ljust(size), at=at)


def take(outbox: Outbox, limit: int = 1000, *, now: float = 0.0, skip: frozenset[int] = frozenset()) -> list[Row]:
    return outbox.take(limit, skip_ids=skip, skip_topics=(), now=now)


def test_sequence_numbers_have_no_gaps_and_stand_in_the_payload(store: FullDisk) -> None:
    outbox = make(store)
    assert [put(outbox) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert [int(row.body) for row in take(outbox)] == [1, 2, 3, 4, 5]


def test_a_message_stays_until_it_is_settled(store: FullDisk) -> None:
    outbox = make(store)
    put(outbox)
    (row,) = take(outbox)
    assert take(outbox) == [row]
    assert take(outbox, skip=frozenset({row.id})) == []
    outbox.settle(row)
    outbox.settle(row)  # a second PUBACK of a redelivery changes nothing
    assert take(outbox) == []
    assert outbox.statistics()["rows"] == 0
    assert outbox.statistics()["bytes"] == 0


def test_what_an_earlier_boot_left_is_sent_first_in_its_own_numbers(store: FullDisk) -> None:
    put(make(store, boot="b1"))
    outbox = make(store, boot="b2")
    assert put(outbox) == 1
    assert [(row.boot, row.seq) for row in take(outbox)] == [("b1", 1), ("b2", 1)]


def test_alarms_overtake_telemetry_and_samples(store: FullDisk) -> None:
    outbox = make(store)
    for priority in (Priority.SAMPLE, Priority.TELEMETRY, Priority.ALARM):
        put(outbox, priority)
    assert [row.priority for row in take(outbox)] == ["A", "B", "C"]


def test_the_oldest_of_the_least_important_class_makes_room(store: FullDisk) -> None:
    outbox = make(store)
    size = 8000
    for priority in (Priority.ALARM, Priority.TELEMETRY, Priority.TELEMETRY, Priority.SAMPLE, Priority.SAMPLE):
        put(outbox, priority, size=size)
    while outbox.statistics()["dropped"] == 0:
        put(outbox, Priority.ALARM, size=size)
    assert outbox.statistics()["dropped_c"] == 1
    kept = [row.seq for row in take(outbox) if row.priority == "C"]
    assert kept == [5]
    for _ in range(20):
        put(outbox, Priority.ALARM, size=size)
    assert {row.priority for row in take(outbox)} == {"A"}
    assert outbox.statistics()["dropped_b"] == 2
    put(outbox, Priority.SAMPLE, size=size)  # never at the cost of an alarm
    assert {row.priority for row in take(outbox)} == {"A"}
    assert outbox.statistics()["bytes"] <= MAX_BYTES


def test_a_message_larger_than_the_outbox_costs_no_other(store: FullDisk) -> None:
    outbox = make(store)
    for _ in range(100):
        put(outbox, Priority.ALARM, size=200)
    put(outbox, Priority.ALARM, size=MAX_BYTES + 1)
    assert outbox.statistics()["rows"] == 100
    assert outbox.statistics()["dropped_a"] == 1


def test_too_old_messages_are_dropped_and_counted(store: FullDisk) -> None:
    outbox = make(store, max_age_s=100.0)
    put(outbox, at=0.0)
    put(outbox, at=90.0)
    assert [row.seq for row in take(outbox, now=120.0)] == [2]
    assert outbox.statistics()["expired"] == 1


def test_on_a_full_disk_messages_wait_in_memory_and_reach_the_disk_later(store: FullDisk) -> None:
    outbox = make(store)
    put(outbox)
    store.full = True
    put(outbox, Priority.ALARM)
    assert outbox.statistics()["held"] == 1
    alarm, telemetry = take(outbox)
    assert (alarm.priority, telemetry.priority) == ("A", "B")
    outbox.settle(telemetry)  # cannot be deleted now: must not be sent again
    assert take(outbox) == [alarm]
    assert outbox.statistics()["rows"] == 1
    store.full = False
    (stored,) = take(outbox)
    assert stored.seq == alarm.seq
    assert outbox.statistics()["held"] == 0
    assert [row.seq for row in store.rows(10)] == [2]


def test_a_message_on_its_way_is_not_stored_a_second_time(store: FullDisk) -> None:
    outbox = make(store)
    store.full = True
    put(outbox)
    (held,) = take(outbox)
    store.full = False
    assert take(outbox, skip=frozenset({held.id})) == []
    outbox.tidy(0.0, skip_ids={held.id})
    assert store.outbox_totals()[0] == 0
    outbox.settle(held)
    assert take(outbox) == []
    assert store.outbox_totals()[0] == 0


def test_memory_is_bounded_and_keeps_the_most_important(store: FullDisk) -> None:
    outbox = make(store)
    store.full = True
    put(outbox, Priority.ALARM)
    for _ in range(HELD_MESSAGES + 50):
        put(outbox)
    assert outbox.statistics()["held"] == HELD_MESSAGES
    assert outbox.statistics()["dropped_b"] == 51
    assert take(outbox)[0].priority == "A"


@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["put", "settle", "refuse", "restart"]),
            st.sampled_from(list(Priority)),
            st.integers(1, 9000),
        ),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_every_message_is_waiting_or_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, Priority, int]]
) -> None:
    store = Store(tmp_path_factory.mktemp("outbox"), outbox_bytes=MAX_BYTES)
    outbox, accounted, boots = make(store), 0, 0
    for move, priority, size in moves:
        if move == "put":
            put(outbox, priority, size=size)
        elif move == "restart":
            totals = outbox.statistics()
            accounted += int(totals["put"] - totals["settled"] - totals["refused"] - totals["dropped"])
            boots += 1
            before = outbox.statistics()["rows"]
            outbox = make(store, boot=f"b{boots}")
            assert outbox.statistics()["rows"] == before
        elif waiting := take(outbox, 1):
            (outbox.settle if move == "settle" else outbox.refuse)(waiting[0])
    totals = outbox.statistics()
    assert totals["rows"] == accounted + totals["put"] - totals["settled"] - totals["refused"] - totals["dropped"]
    assert totals["rows"] == len(take(outbox))
    assert totals["bytes"] == sum(row.size_bytes for row in take(outbox)) <= MAX_BYTES
    assert ROW_OVERHEAD_BYTES > 0
    store.close()


def test_once_a_host_is_followed_a_message_stays_until_that_host_has_it(store: FullDisk) -> None:
    outbox = make(store)
    outbox.follow_host()
    for _ in range(4):
        put(outbox)
    rows = take(outbox)
    for row in rows[:3]:
        outbox.settle(row)
    assert [row.seq for row in take(outbox)] == [4]  # the broker has the others
    assert outbox.unsent() == 1
    outbox.acknowledge({"b1": 2, "another": 99})
    assert outbox.statistics()["rows"] == 2
    outbox.acknowledge({"b1": 99})  # what was not sent yet is not forgotten, whoever says so
    assert [row.seq for row in take(outbox)] == [4]
    assert outbox.statistics()["taken"] == 0


def test_what_the_host_has_not_acknowledged_is_sent_again_with_the_next_connection(store: FullDisk) -> None:
    outbox = make(store)
    outbox.follow_host()
    put(outbox)
    outbox.settle(take(outbox)[0])
    assert take(outbox) == []
    outbox.send_again()
    assert [row.seq for row in take(outbox)] == [1]


def test_a_full_disk_does_not_lose_an_acknowledgement(store: FullDisk) -> None:
    outbox = make(store)
    outbox.follow_host()
    put(outbox)
    outbox.settle(take(outbox)[0])
    store.full = True
    outbox.acknowledge({"b1": 1})
    store.full = False
    outbox.send_again()
    assert take(outbox) == []
    assert outbox.statistics()["rows"] == 0


def test_the_host_is_told_of_places_that_stay_empty_and_only_of_those(store: FullDisk) -> None:
    outbox = make(store)
    for _ in range(3):
        put(outbox)
        outbox.settle(take(outbox)[0])  # before there was a host: gone with the PUBACK
    assert outbox.gaps() == {}
    outbox.follow_host()
    assert outbox.gaps() == {"b1": 4}
    assert outbox.gaps() == {}  # nothing changed since
    outbox.acknowledge({"b1": 3})
    assert outbox.gaps() == {}
    for _ in range(5):
        put(outbox)
    rows = {row.seq: row for row in take(outbox)}
    for seq in (5, 7):
        outbox.refuse(rows[seq])
    assert outbox.gaps() == {}  # 4 is still to come
    for seq in (4, 6, 8):
        outbox.settle(rows[seq])
    outbox.acknowledge({"b1": 4})
    assert outbox.gaps() == {"b1": 6}
    outbox.acknowledge({"b1": 6})
    assert outbox.gaps() == {"b1": 8}
    outbox.acknowledge({"b1": 8})
    assert (outbox.gaps(), outbox.statistics()["rows"]) == ({}, 0)


def test_of_many_boots_with_empty_places_each_has_its_turn(store: FullDisk) -> None:
    for boot in range(40):
        former = make(store, boot=f"f{boot:02}")
        put(former)
        put(former)
        former.refuse(next(row for row in take(former) if (row.boot, row.seq) == (former.boot, 1)))
    outbox = make(store, boot="b1")
    outbox.follow_host()
    told: dict[str, int] = {}
    while found := outbox.gaps():
        assert len(found) <= 16
        told |= found
        outbox.acknowledge({boot: seq - 1 for boot, seq in told.items()})
    assert told == {f"f{boot:02}": 2 for boot in range(40)}


def test_what_was_dropped_or_expired_no_longer_counts_as_sent_and_waited_for(store: FullDisk) -> None:
    outbox = make(store, max_age_s=100.0)
    outbox.follow_host()
    for at in (0.0, 90.0):
        put(outbox, at=at)
    for row in take(outbox):
        outbox.settle(row)
    outbox.tidy(150.0, skip_ids=())
    assert (outbox.statistics()["taken"], outbox.gaps()) == (1, {"b1": 2})
    while not outbox.statistics()["dropped"]:
        put(outbox, size=8000, at=150.0)
    assert (outbox.statistics()["taken"], outbox.gaps()) == (0, {"b1": 4})  # 2 alone made too little room


def test_messages_that_wait_in_memory_may_still_come(store: FullDisk) -> None:
    outbox = make(store)
    outbox.follow_host()
    store.full = True
    put(outbox)
    assert outbox.gaps() == {}
    outbox.acknowledge({"b1": 0})
    for _ in range(HELD_MESSAGES):
        put(outbox)
    assert outbox.gaps() == {"b1": 2}  # the oldest had to make room in memory
