"""The observation ring: order, gaps, generations, and foreign memory."""

import math
import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from agent.contract.errors import MalformedMessage
from agent.observation import (
    LABEL_WIDTH,
    MAX_SLOTS,
    NO_ENGINE,
    RECORD,
    VIEW_WIDTH,
    Observation,
    Outcome,
    RingReader,
    RingWriter,
    create_ring,
)
from agent.tally import Tally


@pytest.fixture
def fd() -> Iterator[int]:
    ring = create_ring(slots=8)
    yield ring
    os.close(ring)


def slot_at(fd: int, slot: int) -> int:
    """Where a slot of an 8-slot ring begins."""
    slot_bytes = int.from_bytes(os.pread(fd, 4, 16), "little")
    return os.fstat(fd).st_size - 8 * 4 - (8 - slot) * slot_bytes  # checksums are at the end


def test_a_record_arrives_as_it_was_written(fd: int) -> None:
    view = np.arange(3, dtype="<f4") + 0.5
    RingWriter(fd).write(
        Observation(
            arrival_ns=-5, data_time_s=12.25, latency_us=800.0, queue_us=3.0, service=1, engine=2, first_engine=0,
            outcome=Outcome.FAILED_OVER, row=4, rows=300, predicted=6, confidence=0.75, entropy=1.5, dead_bits=1,
            stuck_bits=2, range_bits=4, not_finite_bits=8, scale_bits=2**63, view_width=3, view=view.tobytes(),
            source=0xFFFE,
        )
    )  # fmt: skip
    [record] = RingReader(fd).read()
    expected = {
        "sequence": 0, "arrival_ns": -5, "data_time_s": 12.25, "latency_us": 800.0, "queue_us": 3.0, "service": 1,
        "engine": 2, "first_engine": 0, "outcome": 1, "row": 4, "rows": 300, "predicted": 6, "confidence": 0.75,
        "entropy": 1.5, "dead_bits": 1, "stuck_bits": 2, "range_bits": 4, "not_finite_bits": 8,
        "scale_bits": 2**63, "view_width": 3, "source": 0xFFFE,
    }  # fmt: skip
    assert {name: record[name].item() for name in expected} == expected
    assert record["view"].tolist() == [0.5, 1.5, 2.5] + [0.0] * 61


def test_class_confidence_and_entropy_are_made_of_the_raw_label_row(fd: int) -> None:
    writer = RingWriter(fd)
    view = np.array([7.0, 8.0], "<f4")
    for row in ([0.1, 0.7, 0.2], [0.5, 0.5, 0.0], [3.0, -1.0, 3.5], [0.2, 0.2, 0.2]):
        writer.write(
            Observation(1, label=np.array(row, "<f4").tobytes(), view_width=2, view=view.tobytes(), range_bits=5)
        )
    writer.write(Observation(1))
    records = RingReader(fd).read()
    assert records["predicted"].tolist() == [1, 0, 2, 0, -1]
    np.testing.assert_allclose(records["confidence"], [0.7, 0.5, 3.5, 0.2, np.nan], rtol=1e-6)
    expected = [-(0.1 * math.log(0.1) + 0.7 * math.log(0.7) + 0.2 * math.log(0.2)), math.log(2.0)]
    np.testing.assert_allclose(records["entropy"], [*expected, np.nan, np.nan, np.nan], rtol=1e-6)
    assert records["range_bits"].tolist() == [5, 5, 5, 5, 0]
    assert records["view"][:, :3].tolist() == [[7.0, 8.0, 0.0]] * 4 + [[0.0] * 3]


@pytest.mark.parametrize("classes", [1, 3, LABEL_WIDTH])
def test_a_quick_request_is_recorded_and_counted_like_any_other(fd: int, classes: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    label, view = np.full(classes, 1 / classes, "<f4"), np.arange(VIEW_WIDTH, dtype="<f4")
    observe = writer.observer(
        service=1, engine=2, first=0, outcome=Outcome.FAILED_OVER, label_width=classes, view_width=VIEW_WIDTH,
        read=lambda: label.tobytes() + view.tobytes(), data_time_s=12.25, now_ns=lambda: 7_605,
    )  # fmt: skip
    observe(5)
    writer.write(Observation(5, latency_us=7.6, service=1, engine=2, outcome=Outcome.FAILED_OVER, rows=3))
    record, _ = reader.read()
    expected = {
        "sequence": 0, "arrival_ns": 5, "data_time_s": 12.25, "queue_us": 0.0, "service": 1, "engine": 2,
        "first_engine": 0, "outcome": 1, "row": 0, "rows": 1, "predicted": 0, "dead_bits": 0, "view_width": 64,
    }  # fmt: skip
    assert {name: record[name].item() for name in expected} == expected
    assert record["latency_us"] == pytest.approx(7.6)
    assert record["entropy"] == pytest.approx(math.log(classes), abs=1e-6)
    assert record["view"].tolist() == view.tolist()
    tally = Tally(reader.totals()[1], (0, 1, 2, 3, 4, 5, 6, 7, NO_ENGINE))
    assert tally.by_outcome() == [0, 2, 0, 0, 0, 0, 0]
    assert tally.rows == 4
    assert list(tally.answered()) == [2]


def test_skipped_records_are_counted_apart_from_lost_ones(fd: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    for number in range(6):
        writer.write(Observation(arrival_ns=number))
    assert reader.skip(2) == 4
    assert reader.skip(2) == 0
    assert reader.read()["arrival_ns"].tolist() == [4, 5]
    assert reader.statistics() == {"read": 2, "gaps": 0, "skipped": 4, "behind": 0}


def test_what_is_not_given_reads_as_unknown(fd: int) -> None:
    RingWriter(fd).write(Observation(arrival_ns=1))
    [record] = RingReader(fd).read()
    assert math.isnan(record["data_time_s"])
    assert math.isnan(record["confidence"])
    assert (record["engine"], record["predicted"], record["rows"]) == (255, -1, 1)


def test_records_are_read_once_and_in_order(fd: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    for number in range(5):
        writer.write(Observation(arrival_ns=number))
    assert reader.read(limit=3)["arrival_ns"].tolist() == [0, 1, 2]
    assert reader.statistics() == {"read": 3, "gaps": 0, "skipped": 0, "behind": 2}
    assert reader.read()["arrival_ns"].tolist() == [3, 4]
    assert len(reader.read()) == 0
    assert reader.read().dtype == RECORD


def test_overwritten_records_are_a_counted_gap(fd: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    for number in range(20):
        writer.write(Observation(arrival_ns=number))
    assert reader.read()["sequence"].tolist() == list(range(12, 20))
    assert reader.statistics() == {"read": 8, "gaps": 12, "skipped": 0, "behind": 0}


def test_a_new_generation_continues_the_sequence(fd: int) -> None:
    reader = RingReader(fd)
    first = RingWriter(fd)
    first.write(Observation(arrival_ns=1))
    first.close()
    second = RingWriter(fd)
    second.write(Observation(arrival_ns=2))
    assert second.written == 2
    assert reader.read()["sequence"].tolist() == [0, 1]
    assert reader.statistics()["gaps"] == 0


def test_a_write_cut_short_by_a_crash_is_never_read(fd: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    writer.write(Observation(arrival_ns=1))
    memory = mmap.mmap(fd, 0)
    at = slot_at(fd, 1)
    memory[at : at + 50] = b"x" * 50  # half written, never published
    assert reader.read()["arrival_ns"].tolist() == [1]
    RingWriter(fd).write(Observation(arrival_ns=2))
    assert reader.read()["arrival_ns"].tolist() == [2]
    memory.close()


def test_where_stores_are_seen_in_any_order_a_record_that_is_not_whole_is_a_gap(fd: int) -> None:
    writer, reader = RingWriter(fd, ordered=False), RingReader(fd, ordered=False)
    for number in range(3):
        writer.write(Observation(arrival_ns=number))
    memory = mmap.mmap(fd, 0)
    memory[slot_at(fd, 1) + 30] ^= 1
    memory.close()
    assert reader.read()["arrival_ns"].tolist() == [0, 2]
    assert reader.statistics() == {"read": 2, "gaps": 1, "skipped": 0, "behind": 0}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_reader_beside_a_fast_writer_sees_whole_records_and_every_loss(fd: int, *, ordered: bool) -> None:
    total = 20_000
    writer, reader = RingWriter(fd, ordered=ordered), RingReader(fd, ordered=ordered)

    def fill() -> None:
        for number in range(total):
            writer.write(Observation(arrival_ns=number, predicted=number % 7, latency_us=float(number)))

    thread = threading.Thread(target=fill)
    thread.start()
    seen = []
    while thread.is_alive() or reader.statistics()["behind"]:
        seen.append(reader.read())
    thread.join()
    records = np.concatenate(seen)
    assert (np.diff(records["sequence"].astype(np.int64)) > 0).all()
    assert (records["arrival_ns"] == records["sequence"]).all()
    assert (records["latency_us"] == records["sequence"]).all()
    assert len(records) + reader.statistics()["gaps"] == total


def test_the_size_of_a_ring_cannot_change(fd: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 100)


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"EWRING\0\0" + b"\xff" * 56])
def test_foreign_memory_is_refused(content: bytes) -> None:
    other = os.memfd_create("other")
    os.write(other, content)
    with pytest.raises(MalformedMessage, match="ring"):
        RingReader(other)
    os.close(other)


@pytest.mark.parametrize("slots", [0, 1, MAX_SLOTS + 1])
def test_a_ring_has_a_bounded_number_of_slots(slots: int) -> None:
    with pytest.raises(ValueError, match="slots"):
        create_ring(slots)
