"""Exact counts beside the ring: by engine and outcome, in the buckets of a latency sketch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from agent.observation import NO_ENGINE, Observation, Observe, Outcome, RingReader, RingWriter, create_ring
from agent.sketch import BUCKETS, LogSketch
from agent.tally import ANSWERED, Layout, Tally, add_latencies

ENGINES = (0, 1, NO_ENGINE)


@dataclass
class Ring:
    writer: RingWriter
    reader: RingReader
    fd: int

    def write(self, elapsed_ns: int = 5_000, **fields: int) -> None:
        self.writer.write(Observation(arrival_ns=1, latency_us=elapsed_ns / 1e3, **fields))

    def observer(self, service: int) -> Observe:
        return self.writer.observer(
            service=service, engine=0, first=0, outcome=Outcome.OK, label_width=0, view_width=0, read=bytes,
            data_time_s=0.0, now_ns=lambda: 5_001,
        )  # fmt: skip

    def tally(self, service: int = 0, *, ended: bool = False) -> Tally | None:
        news = self.reader.take(ended=ended)
        return None if news is None else Tally(news[service], ENGINES)


@pytest.fixture(params=[64, 4096])
def ring(request: pytest.FixtureRequest) -> Iterator[Ring]:
    fd = create_ring(slots=request.param, layout=Layout(services=2, engines=2))
    writer, reader = RingWriter(fd), RingReader(fd)
    yield Ring(writer, reader, fd)
    writer.close()
    reader.close()
    os.close(fd)


def test_every_request_is_counted_however_few_records_are_left(ring: Ring) -> None:
    observe = ring.observer(service=1)
    for _ in range(9_001):
        observe(1)
    ring.write(service=1, outcome=Outcome.ERROR, rows=7)
    for row in range(3):
        ring.write(service=1, engine=1, outcome=Outcome.FAILED_OVER, rows=3, row=row)
    ring.write(service=7)
    counted = ring.tally(1)
    assert counted is not None
    assert counted.by_outcome() == [9_001, 1, 0, 0, 0, 0, 1]
    assert counted.rows == 9_001 + 3 + 7
    assert {engine: cell[:BUCKETS].sum() for engine, cell in counted.answered().items()} == {0: 9_001, 1: 1}
    assert ring.tally(1) is None  # taken


def test_latencies_fall_into_the_buckets_of_the_sketch(ring: Ring) -> None:
    latencies_us = np.exp(np.random.default_rng(1).uniform(-2, 22, 4000))
    for outcome in ANSWERED:
        for value_us in latencies_us:
            ring.write(round(value_us * 1e3), engine=1, outcome=outcome)
    counted = ring.tally()
    assert counted is not None
    [(engine, cell)] = counted.answered().items()
    made, expected = LogSketch(), LogSketch()
    add_latencies(made, cell)
    for _ in ANSWERED:
        expected.add_many(np.rint(latencies_us * 1e3) / 1e3)
    assert engine == 1
    assert made.buckets == expected.buckets
    assert made.count == expected.count
    assert made.total_us == pytest.approx(expected.total_us, rel=1e-4)
    assert made.minimum_us <= expected.minimum_us
    assert expected.maximum_us <= made.maximum_us <= 1.041 * expected.maximum_us
    assert LogSketch.from_fields(made.fields()).buckets == made.buckets


@pytest.mark.parametrize(("elapsed_ns", "bucket"), [(-5, 0), (0, 0), (999, 0), (2**62, BUCKETS - 1)])
def test_what_no_bucket_is_made_for_is_counted_at_the_edge(ring: Ring, elapsed_ns: int, bucket: int) -> None:
    ring.write(elapsed_ns, engine=0)
    counted = ring.tally()
    assert counted is not None
    assert np.flatnonzero(counted.numbers[0, Outcome.OK, :BUCKETS]).tolist() == [bucket]


def test_an_engine_without_a_place_counts_as_none(ring: Ring) -> None:
    ring.write(engine=77)
    counted = ring.tally()
    assert counted is not None
    assert (sum(counted.by_outcome()), counted.answered()) == (1, {})


def test_a_reader_beside_a_fast_writer_counts_every_request_once(ring: Ring) -> None:
    total = 30_000
    observe = ring.observer(service=0)
    thread = threading.Thread(target=lambda: [observe(1) for _ in range(total)])
    thread.start()
    counted = 0
    while thread.is_alive():
        tally = ring.tally()
        counted += 0 if tally is None else sum(tally.by_outcome())
        assert counted <= total
    thread.join()
    tally = ring.tally()
    counted += 0 if tally is None else sum(tally.by_outcome())
    assert counted == total


def test_a_worker_that_dies_while_it_counts_stops_nobody(ring: Ring) -> None:
    ring.write(engine=0)
    os.pwrite(ring.fd, (1).to_bytes(8, "little"), 56)  # what it sets while it counts
    assert ring.tally() is None
    counted = ring.tally(ended=True)
    assert counted is not None
    assert counted.by_outcome()[Outcome.OK] == 1


def test_a_new_generation_on_the_same_ring_counts_on(ring: Ring) -> None:
    ring.write(engine=0)
    second = RingWriter(ring.fd)
    second.write(Observation(arrival_ns=1, engine=0))
    counted = ring.tally()
    assert counted is not None
    assert sum(counted.by_outcome()) == 2
    second.close()
