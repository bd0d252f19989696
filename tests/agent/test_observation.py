"""The observation ring: order, gaps, generations, and foreign memory."""

import math
import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from agent.contract.errors import MalformedMessage
from agent.observation import MAX_SLOTS, RECORD, Observation, Outcome, RingReader, RingWriter, create_ring


@pytest.fixture
def fd() -> Iterator[int]:
    ring = create_ring(slots=8)
    yield ring
    os.close(ring)


def test_a_record_arrives_as_it_was_written(fd: int) -> None:
    view = np.arange(3, dtype="<f4") + 0.5
    RingWriter(fd).write(
        Observation(
            arrival_ns=-5, data_time_s=12.25, latency_us=800.0, queue_us=3.0, service=1, engine=2, first_engine=0,
            outcome=Outcome.FAILED_OVER, row=4, rows=300, predicted=6, confidence=0.75, entropy=1.5, dead_bits=1,
            stuck_bits=2, range_bits=4, not_finite_bits=8, scale_bits=2**63, view_width=3, view=view.tobytes(),
        )
    )  # fmt: skip
    [record] = RingReader(fd).read()
    expected = {
        "sequence": 0, "arrival_ns": -5, "data_time_s": 12.25, "latency_us": 800.0, "queue_us": 3.0, "service": 1,
        "engine": 2, "first_engine": 0, "outcome": 1, "row": 4, "rows": 300, "predicted": 6, "confidence": 0.75,
        "entropy": 1.5, "dead_bits": 1, "stuck_bits": 2, "range_bits": 4, "not_finite_bits": 8,
        "scale_bits": 2**63, "view_width": 3,
    }  # fmt: skip
    assert {name: record[name].item() for name in expected} == expected
    assert record["view"].tolist() == [0.5, 1.5, 2.5] + [0.0] * 61


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
    assert reader.statistics() == {"read": 3, "gaps": 0, "behind": 2}
    assert reader.read()["arrival_ns"].tolist() == [3, 4]
    assert len(reader.read()) == 0
    assert reader.read().dtype == RECORD


def test_overwritten_records_are_a_counted_gap(fd: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    for number in range(20):
        writer.write(Observation(arrival_ns=number))
    assert reader.read()["sequence"].tolist() == list(range(12, 20))
    assert reader.statistics() == {"read": 8, "gaps": 12, "behind": 0}


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
    memory[64 + 352 : 64 + 352 + 100] = b"x" * 100  # slot 1 half written, never published
    assert reader.read()["arrival_ns"].tolist() == [1]
    RingWriter(fd).write(Observation(arrival_ns=2))
    assert reader.read()["arrival_ns"].tolist() == [2]
    memory.close()


def test_a_damaged_record_is_a_gap_and_not_a_record(fd: int) -> None:
    writer, reader = RingWriter(fd), RingReader(fd)
    for number in range(3):
        writer.write(Observation(arrival_ns=number))
    memory = mmap.mmap(fd, 0)
    memory[64 + 352 + 50] ^= 1
    memory.close()
    assert reader.read()["arrival_ns"].tolist() == [0, 2]
    assert reader.statistics() == {"read": 2, "gaps": 1, "behind": 0}


def test_a_reader_beside_a_fast_writer_sees_whole_records_and_every_loss(fd: int) -> None:
    total = 20_000
    writer, reader = RingWriter(fd), RingReader(fd)

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
