import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.errors import DiskFull, StateLocked, StateUnreadable
from agent.store import DATABASE, MIGRATIONS, RESERVE, WAL_LIMIT_BYTES, Row, Store

OUTBOX_BYTES = 1024 * 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state", outbox_bytes=OUTBOX_BYTES)
    yield store
    store.close()


def row(seq: int, priority: str = "B", size: int = 100, topic: str = "t") -> Row:
    return Row(0, priority, "boot", seq, topic, b"x" * size, size, 1000.0 + seq)


def test_values_and_rows_survive_a_restart(tmp_path: Path) -> None:
    first = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    first.put_value("supervisor", {"b": [1, 2], "a": None}, durable=True)
    first.add_row(row(1))
    first.close()
    second = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    assert second.value("supervisor") == {"b": [1, 2], "a": None}
    assert second.value("unknown") is None
    assert [found.seq for found in second.rows(10)] == [1]
    second.close()


def test_rows_come_most_important_first_then_oldest(store: Store) -> None:
    for seq, priority in enumerate("CBABA", start=1):
        store.add_row(row(seq, priority))
    assert [found.seq for found in store.rows(10)] == [3, 5, 2, 4, 1]
    assert [found[2] for found in store.least_important(10, down_to="B")] == ["C", "B", "B"]


def test_rows_on_their_way_or_of_refused_topics_are_skipped(store: Store) -> None:
    ids = [store.add_row(row(seq, topic=topic)) for seq, topic in enumerate("ttu", start=1)]
    assert [found.seq for found in store.rows(10, skip_ids={ids[0]}, skip_topics={"u"})] == [2]


def test_deleting_tells_what_was_really_there(store: Store) -> None:
    ids = [store.add_row(row(seq, size=50)) for seq in (1, 2, 3)]
    assert store.delete_rows({ids[0], 999}) == (1, 50)
    assert store.outbox_totals() == (2, 100, 1002.0)
    assert store.delete_rows_before(1002.5) == 1


def test_a_second_agent_on_the_folder_is_told_whose_it_is(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StateLocked, match=f"process {os.getpid()}") as caught:
        Store(tmp_path / "state", outbox_bytes=OUTBOX_BYTES)
    assert caught.value.exit_code == 7


def test_a_killed_agent_leaves_no_lock_and_loses_no_returned_write(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from agent.store import Row, Store\n"
        f"store = Store(Path({str(tmp_path)!r}), outbox_bytes={OUTBOX_BYTES})\n"
        "for seq in range(1, 10**6):\n"
        "    store.add_row(Row(0, 'B', 'boot', seq, 't', b'x', 1, 0.0)); print(seq, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(200):
            returned = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
    store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    assert store.outbox_totals()[0] >= returned
    assert store.set_aside == ""
    store.close()


def rights(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}


def test_everything_in_a_folder_that_others_may_enter_is_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
        store.put_value("supervisor", {"secret": 1}, durable=True)
        assert f"{DATABASE}-wal" in rights(tmp_path)
        assert set(rights(tmp_path).values()) == {0o600}
        store.close()
        (tmp_path / f"{DATABASE}-wal").touch(0o644)  # an older release left it
        store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
        assert set(rights(tmp_path).values()) == {0o600}
        store.close()
    finally:
        os.umask(before)


def test_a_damaged_database_is_set_aside_and_a_new_one_started(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"this is no database at all" * 1000)
    store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    assert store.set_aside.endswith("agent.damaged")
    assert store.outbox_totals() == (0, 0, None)
    store.close()


@pytest.mark.parametrize("offset", [4096 + 10, 2 * 4096 + 100, 3 * 4096 + 7])
def test_flipped_bytes_are_found_before_use(tmp_path: Path, offset: int) -> None:
    store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    for seq in range(200):
        store.add_row(row(seq))
    store.close()
    with (tmp_path / DATABASE).open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    for found in store.rows(1000):  # set aside, or not touched by the damage
        assert found.body == b"x" * 100
    store.close()


def test_messages_of_an_older_agent_are_kept_and_found_by_their_place(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1;")
        for boot, seq in (("b9", 7), ("b1", 4), ("b1", 3), ("b5", 1)):
            database.execute("INSERT INTO outbox VALUES (NULL, 'A', ?, ?, 't', '', 1, 0)", (boot, seq))
    database.close()
    store = Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    assert store.lowest_seqs() == {"b1": 3, "b5": 1, "b9": 7}
    store.delete_rows([row.id for row in store.rows(9)])
    assert store.lowest_seqs() == {}
    store.close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    Store(tmp_path, outbox_bytes=OUTBOX_BYTES).close()
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StateUnreadable, match="newer agent"):
        Store(tmp_path, outbox_bytes=OUTBOX_BYTES)
    assert not (tmp_path / "agent.damaged").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnreadable, match="cannot use the state folder"):
        Store(tmp_path / "file" / "state", outbox_bytes=OUTBOX_BYTES)


def fill(store: Store) -> None:
    for seq in range(100_000):
        store.add_row(row(seq, size=50_000))


def test_the_file_stays_below_its_bound_and_gives_up_its_reserve(tmp_path: Path) -> None:
    store = Store(tmp_path, outbox_bytes=64 * 1024)
    bound = store.statistics()["bound_bytes"]
    with pytest.raises(DiskFull):
        fill(store)
    sizes = sum(file.stat().st_size for file in tmp_path.iterdir() if file.name != "agent.db-shm")
    assert sizes <= bound
    assert (tmp_path / f"{DATABASE}-wal").stat().st_size <= 2 * WAL_LIMIT_BYTES
    assert not (tmp_path / RESERVE).exists()
    assert store.delete_rows(range(1, 500))[0] > 0  # it can free itself
    store.add_row(row(1, size=50_000))
    assert store.keep_reserve()
    store.close()
