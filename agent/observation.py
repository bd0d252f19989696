"""What one request leaves behind, and the shared-memory ring that carries it to the agent process.

One writer (the worker), one reader (the agent process), no locks and no waiting: a full ring overwrites its oldest
records, and the reader counts what it missed. A new worker generation continues the sequence of the one before.
The writer copies raw numbers only (the row of the label output, the views); predicted class, confidence and entropy
are computed here for the reader, for all its records at once. What they mean for health and drift is the monitor's
business. Counts that must not suffer from a gap are kept beside the records (`agent.tally`).
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import platform
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import MalformedMessage
from agent.tally import NO_ENGINE, Layout, Outcome

__all__ = [
    "DEFAULT_SLOTS", "LABEL_WIDTH", "MAX_ROWS", "MAX_SLOTS", "NO_CLASS", "NO_ENGINE", "PATCHED", "RECORD",
    "VIEW_WIDTH", "Layout", "Observation", "Observe", "Outcome", "RingReader", "RingWriter", "create_ring",
    "label_statistics", "source_of",
]  # fmt: skip

VIEW_WIDTH = 64
LABEL_WIDTH = 32  # a label row that is wider, or no float32, is put into three numbers by the writer
MAX_ROWS = 64  # rows of one batch that leave a record each; further ones are only counted in `rows`
NO_CLASS = -1
LARGEST_CLASS = 0x7FFF
DEFAULT_SLOTS = 2048  # 0.97 MB: written at full speed, twice as many would not stay in a core's cache
DEFAULT_LAYOUT = Layout(services=8, engines=8)

RECORD: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u8"),
        ("arrival_ns", "<i8"),  # monotonic
        ("data_time_s", "<f8"),  # NaN = not given
        ("latency_us", "<f4"),  # the whole request's, the same in each of its rows
        ("queue_us", "<f4"),
        ("service", "u1"),
        ("engine", "u1"),  # index in the service's plan of the engine that answered
        ("first_engine", "u1"),  # index of the engine tried first
        ("outcome", "u1"),
        ("row", "<u2"),  # below MAX_ROWS; a request counts once: at row 0
        ("rows", "<u2"),
        ("predicted", "<i2"),
        ("confidence", "<f4"),
        ("entropy", "<f4"),  # nats; NaN when the label output is no distribution
        ("dead_bits", "<u8"),  # bit i = channel i of the guard's list
        ("stuck_bits", "<u8"),
        ("range_bits", "<u8"),
        ("not_finite_bits", "<u8"),
        ("scale_bits", "<u8"),
        ("view_width", "<u2"),
        ("view", "<f4", (VIEW_WIDTH,)),  # zeros beyond view_width
        ("source", "<u2"),  # see `source_of`; 0 = nobody knows whose it is
    ]
)
"""What a reader gets. In the ring a record is _FIXED, then label, view and _AFTER as far as there are any."""

_FIXED = struct.Struct("<QqdQQ")  # sequence, arrival, data time, elapsed ns, and what _KIND holds
_KIND = struct.Struct("<BBBBBBBB")  # service, engine, first engine, outcome, row, label width, view width, after
_AFTER = struct.Struct("<fHHQQQQQ")  # queue_us, rows, source, the five guard bits: only where they say something
_JUDGED_LABEL = 0x80  # the label is (class, confidence, entropy)
_HEAD: np.dtype[Any] = np.dtype(
    [
        ("sequence", "<u8"), ("arrival_ns", "<i8"), ("data_time_s", "<f8"), ("elapsed_ns", "<u8"),
        ("service", "u1"), ("engine", "u1"), ("first_engine", "u1"), ("outcome", "u1"),
        ("row", "u1"), ("label_width", "u1"), ("view_width", "u1"), ("after", "u1"),
    ]
)  # fmt: skip
_HEAD_OFFSETS = {name: field[1] for name, field in (_HEAD.fields or {}).items()}
_COPIED = tuple(name for name in _HEAD.names or () if name in (RECORD.names or ()))
_AFTERWORDS: np.dtype[Any] = np.dtype(
    [
        ("queue_us", "<f4"), ("rows", "<u2"), ("source", "<u2"), ("dead_bits", "<u8"), ("stuck_bits", "<u8"),
        ("range_bits", "<u8"), ("not_finite_bits", "<u8"), ("scale_bits", "<u8"),
    ]
)  # fmt: skip
_ROWS_AT = 4  # in _AFTER
_SLOT_BYTES = _FIXED.size + 4 * (LABEL_WIDTH + VIEW_WIDTH) + _AFTER.size

_HEADER = struct.Struct("<8sIIIII")  # magic, version, slots, slot bytes, services, engines of the tally
_HEADER_BYTES = 64
_SEQUENCE_AT, _COUNTED_AT, _COUNTING_AT = 40, 48, 56
_MAGIC = b"EWRING\0\0"
_VERSION = 2
MAX_SLOTS = 1 << 20
_MOST_PLACES = 256
ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
"""Whether other cores see stores in their order (Intel SDM volume 3, 8.2.2; AMD64 volume 2, 7.2). Where they do, what
is published was written, and what is overwritten while it is read shows in the sequence. Elsewhere (ARM) a checksum
has to tell: it takes 0.35 us of a request, half of all that a record takes."""
_LOW = 0xFFFFFFFF
_MARGIN = 4
COUNT_EVERY = 1024  # records; so many take 0.05 ms to count, each by itself 0.25 us


class Observation(NamedTuple):
    """One record to write, in RECORD's order without its sequence. `view`: float32 bytes, at most VIEW_WIDTH.

    `label`: float32 bytes of the label output's row, at most LABEL_WIDTH; the reader makes `predicted`, `confidence`
    and `entropy` of it. Without it these are taken as they are.
    """

    arrival_ns: int
    data_time_s: float = math.nan
    latency_us: float = 0.0
    queue_us: float = 0.0
    service: int = 0
    engine: int = NO_ENGINE
    first_engine: int = NO_ENGINE
    outcome: int = Outcome.OK
    row: int = 0
    rows: int = 1
    predicted: int = NO_CLASS
    confidence: float = math.nan
    entropy: float = math.nan
    dead_bits: int = 0
    stuck_bits: int = 0
    range_bits: int = 0
    not_finite_bits: int = 0
    scale_bits: int = 0
    view_width: int = 0
    view: bytes = b""
    label: bytes = b""
    source: int = 0


PATCHED = 0x8000
"""Bit of a source: samples of this row were made up or dropped because of their time."""


def source_of(name: str) -> int:
    """Number of a stream or client, 1 to 0x7FFF; two names share one once in 30,000."""
    return zlib.crc32(name.encode()) % (PATCHED - 1) + 1


Observe = Callable[[int], None]
"""Appends the record of one quick request that came at this time (monotonic, ns) and has its answer now."""


def create_ring(slots: int = DEFAULT_SLOTS, *, layout: Layout = DEFAULT_LAYOUT) -> int:
    """File descriptor of a new, empty ring in anonymous memory; its size is sealed, so no reader can meet SIGBUS.

    `layout`: whose requests are counted beside the records.
    """
    if not 2 <= slots <= MAX_SLOTS:
        raise ValueError(f"a ring has 2 to {MAX_SLOTS} slots, not {slots}")
    fd = os.memfd_create("edgewarden-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _size_bytes(slots, layout))
    os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, slots, _SLOT_BYTES, layout.services, layout.engines), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def _size_bytes(slots: int, layout: Layout) -> int:
    return _HEADER_BYTES + layout.size_bytes + slots * (_SLOT_BYTES + 4)


class _Ring:
    """The mapping both sides share: header, tally, slots, and a mark of each slot."""

    def __init__(self, fd: int, *, ordered: bool = ORDERED) -> None:
        self._ordered = ordered
        self.slots, self.layout = _check_header(fd)
        self._memory = mmap.mmap(fd, _size_bytes(self.slots, self.layout))
        self._bytes = memoryview(self._memory)
        # native 8-byte stores and loads: never seen half written
        self._sequence = self._bytes[_SEQUENCE_AT : _SEQUENCE_AT + 8].cast("Q")
        self._counted = self._bytes[_COUNTED_AT : _COUNTED_AT + 8].cast("Q")  # records below are in the tally
        self._counting = self._bytes[_COUNTING_AT : _COUNTING_AT + 8].cast("Q")  # 1 while that is being changed
        self._first = _HEADER_BYTES + self.layout.size_bytes
        self._sums_at = self._first + self.slots * _SLOT_BYTES
        self._sums = self._bytes[self._sums_at :].cast("I")
        tally: NDArray[np.int64] = np.frombuffer(self._memory, "<i8", self.layout.size_bytes // 8, _HEADER_BYTES)
        self._tally = tally.reshape(self.layout.shape)
        # of all slots: counting looks at nothing else, and whole records would be 470 bytes each to copy
        self._elapsed = self._column("elapsed_ns")
        self._kinds = self._column("service")  # and the seven bytes behind it

    def close(self) -> None:
        """Let go of the memory; nothing else may be called any more."""
        del self._tally, self._elapsed, self._kinds
        for view in (self._sums, self._counting, self._counted, self._sequence, self._bytes):
            view.release()
        self._memory.close()

    def totals(self) -> NDArray[np.int64]:
        """All requests ever counted, in the shape of the layout: the tally, and the records that wait for it."""
        numbers = self._tally.copy()
        self._add_records(numbers, self._counted[0], self._sequence[0])
        return numbers

    def _add_records(self, numbers: NDArray[np.int64], first: int, end: int) -> None:
        """Count the requests of the records from `first` to before `end` into `numbers`."""
        if end <= first:
            return
        slots = np.arange(first, end) % self.slots
        kinds, elapsed_ns = self._kinds[slots], self._elapsed[slots]
        if (kinds == kinds[0]).all():  # as good as always
            self._add(numbers, slots, int(kinds[0]), elapsed_ns)
            return
        for kind in np.unique(kinds).tolist():
            ours = np.flatnonzero(kinds == kind)
            self._add(numbers, slots[ours], kind, elapsed_ns[ours])

    def _add(
        self, numbers: NDArray[np.int64], slots: NDArray[np.intp], kind: int, elapsed_ns: NDArray[np.uint64]
    ) -> None:
        service, engine, _, outcome, row, _, _, after = kind.to_bytes(8, "little")
        if row == 0:  # a request counts once
            more_rows = int((np.maximum(self._rows(kind)[slots], 1) - 1).sum(dtype=np.int64)) if after else 0
            self.layout.add(numbers, (service, engine, outcome), elapsed_ns, more_rows)

    def _column(self, name: str) -> NDArray[np.uint64]:
        """8 bytes of every slot, from a field of _HEAD on."""
        offset = self._first + _HEAD_OFFSETS[name]
        return np.ndarray(self.slots, "<u8", self._memory, offset=offset, strides=(_SLOT_BYTES,))

    def _rows(self, kind: int) -> NDArray[np.uint16]:
        """`rows` of every slot, as records of this kind say it: see _AFTER."""
        label_width, view_width = kind >> 40 & 0xFF, kind >> 48 & 0xFF
        behind = _FIXED.size + 4 * ((3 if label_width == _JUDGED_LABEL else label_width) + view_width)
        at = self._first + min(behind, _SLOT_BYTES - _AFTER.size) + _ROWS_AT
        return np.ndarray(self.slots, "<u2", self._memory, offset=at, strides=(_SLOT_BYTES,))

    def _copy(self, first: int, count: int) -> NDArray[np.uint8]:
        """(count, bytes of a slot)"""
        raw = b"".join(self._bytes[begin:end] for begin, end in self._runs(first, count))
        return np.frombuffer(raw, np.uint8).reshape(count, _SLOT_BYTES)

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """The memory of `count` slots in one piece, or in two where the ring ends in between."""
        at = first % self.slots
        before_end = min(count, self.slots - at)
        for begin, length in ((at, before_end), (0, count - before_end)):
            yield self._first + begin * _SLOT_BYTES, self._first + (begin + length) * _SLOT_BYTES


class RingWriter(_Ring):
    """Appends records and counts requests; never waits. Owned by one thread of one worker."""

    def __init__(self, fd: int, *, ordered: bool = ORDERED) -> None:
        """Map the ring behind `fd` and continue its sequence. `ordered`: see ORDERED; the same for both sides.

        Raises:
            MalformedMessage: `fd` holds no ring of this version.
        """
        super().__init__(fd, ordered=ordered)
        self._count_every = min(COUNT_EVERY, self.slots // 2)
        self._counting[0] = 0

    @property
    def written(self) -> int:
        """Records ever written, by all generations."""
        return int(self._sequence[0])

    def observer(
        self,
        *,
        service: int,
        engine: int,
        first: int,
        outcome: int,
        label_width: int,
        view_width: int,
        read: Callable[[], bytes],
        data_time_s: float,
        now_ns: Callable[[], int],
    ) -> Observe:
        """What appends the records of single rows that waited for nobody and whose guard found nothing.

        `read`: the row of the label output and the views, float32. One call is all that monitoring adds to a quick
        request: 0.7 us, a ninth of a bare run (`scripts/bench request`), because whatever stays the same is packed
        beforehand.
        """
        (kind,) = struct.unpack("<Q", _KIND.pack(service, engine, first, outcome, 0, label_width, view_width, 0))
        width = 4 * (label_width + view_width)
        pack_into, checked_bytes = struct.Struct(f"{_FIXED.format}{width}s").pack_into, _FIXED.size + 4 * label_width
        memory, sums, sequence, slots, begin = self._bytes, self._sums, self._sequence, self.slots, self._first
        every, count, checksum, ordered = self._count_every, self._count, _checksum, self._ordered

        def observe(arrival_ns: int) -> None:
            number = sequence[0]
            slot = number % slots
            at = begin + slot * _SLOT_BYTES
            pack_into(memory, at, number, arrival_ns, data_time_s, now_ns() - arrival_ns, kind, read())
            # content, mark, then the sequence that publishes it
            sums[slot] = number & _LOW if ordered else checksum(memory[at : at + checked_bytes])
            sequence[0] = number = number + 1
            if not number % every:
                count(number)

        return observe

    def write(self, observation: Observation) -> None:
        """Append one record of whatever kind."""
        one = observation
        label, width = one.label, len(one.label) // 4
        if not label and (one.predicted != NO_CLASS or not math.isnan(one.confidence)):
            label, width = struct.pack("<fff", one.predicted, one.confidence, one.entropy), _JUDGED_LABEL
        bits = (one.dead_bits, one.stuck_bits, one.range_bits, one.not_finite_bits, one.scale_bits)
        after = b""
        if one.rows != 1 or one.queue_us or one.source or any(bits):
            after = _AFTER.pack(one.queue_us, one.rows, one.source, *bits)
        kind = _KIND.pack(
            one.service, one.engine, one.first_engine, one.outcome, one.row, width, one.view_width, bool(after)
        )
        number = self._sequence[0]
        fixed = _FIXED.pack(
            number, one.arrival_ns, one.data_time_s, max(0, round(one.latency_us * 1e3)),
            int.from_bytes(kind, "little"),
        )  # fmt: skip
        record = b"".join((fixed, label, one.view, after))
        at = self._first + number % self.slots * _SLOT_BYTES
        self._bytes[at : at + len(record)] = record
        checksum = _checksum(record if after else fixed + label)
        self._sums[number % self.slots] = number & _LOW if self._ordered else checksum
        self._sequence[0] = number + 1
        if not (number + 1) % self._count_every:
            self._count(number + 1)

    def _count(self, end: int) -> None:
        """Take the records before `end` into the tally, long before their slots are used again."""
        self._counting[0] = 1
        self._add_records(self._tally, self._counted[0], end)
        self._counted[0] = end
        self._counting[0] = 0


# Of head and label, and of views only where guard bits follow them: it is there for the order in which another core
# sees stores, and views are written between label and checksum. A third of what crc32 takes.
_checksum = zlib.adler32


class RingReader(_Ring):
    """Takes records in order; counts those overwritten before it came. Owned by one thread of the agent process."""

    def __init__(self, fd: int, *, ordered: bool = ORDERED) -> None:
        """Map the ring behind `fd`; reading starts with the oldest record still there. `ordered`: as the writer's.

        Raises:
            MalformedMessage: `fd` holds no ring of this version.
        """
        super().__init__(fd, ordered=ordered)
        self._next = 0
        self._read = 0
        self._gaps = 0
        self._skipped = 0
        self._taken = np.zeros(self.layout.shape, np.int64)
        self._taken_at = -1

    def read(self, limit: int = DEFAULT_SLOTS) -> NDArray[np.void]:
        """Up to `limit` new records, oldest first: a copy of dtype RECORD, empty when nothing is new."""
        written = self._sequence[0]
        self._skip_to(written - self.slots)
        count = min(written - self._next, limit)
        if count <= 0:
            return np.empty(0, RECORD)
        slots = self._copy(self._next, count)
        heads = _heads(slots)
        intact = self._intact(slots, heads)
        now = self._sequence[0]
        if now != written:  # what may have been overwritten meanwhile; a few more, as another core may see it later
            intact = intact[intact >= now - self.slots + _MARGIN - self._next]
        self._next += count
        self._gaps += count - len(intact)
        self._read += len(intact)
        return _records(slots[intact], heads[intact])

    def skip(self, most: int) -> int:
        """Leave out the oldest records, so that at most `most` wait; returns how many."""
        count = max(0, int(self._sequence[0]) - self._next - most)
        self._next += count
        self._skipped += count
        return count

    def take(self, *, ended: bool = False) -> NDArray[np.int64] | None:
        """What was counted since the last call, in the shape of the layout; None when that is nothing, or when the
        writer is counting just now and the next call will tell. `ended`: there is no writer any more.
        """
        counted, written = self._counted[0], self._sequence[0]
        if written == self._taken_at or (self._counting[0] and not ended):
            return None
        totals = self.totals()
        if (self._counted[0] != counted or self._counting[0]) and not ended:
            return None
        # `totals` may have seen a few records more than `written`: they are found again, not counted again
        self._taken_at = written
        news: NDArray[np.int64] = np.maximum(totals - self._taken, 0)
        self._taken += news
        return news

    def statistics(self) -> dict[str, int]:
        """`read`, `gaps` (records lost by overwriting), `skipped` (by `skip`) and `behind` (waiting to be read)."""
        behind = max(0, int(self._sequence[0]) - self._next)
        return {"read": self._read, "gaps": self._gaps, "skipped": self._skipped, "behind": behind}

    def _skip_to(self, oldest: int) -> None:
        if oldest > self._next:
            self._gaps += oldest - self._next
            self._next = oldest

    def _intact(self, slots: NDArray[np.uint8], heads: NDArray[Any]) -> NDArray[np.intp]:
        """Which slots hold the record they should, whole."""
        expected = np.arange(self._next, self._next + len(slots), dtype=np.uint64)
        marks = np.frombuffer(self._sums, "<u4")[expected % self.slots]
        if self._ordered:
            return np.flatnonzero((heads["sequence"] == expected) & (marks == expected & _LOW))
        after = heads["after"] != 0
        sizes = _FIXED.size + 4 * _label_numbers(heads)
        sizes[after] += 4 * heads["view_width"][after] + _AFTER.size
        sound = (heads["sequence"] == expected) & (sizes <= _SLOT_BYTES)
        memory = memoryview(slots.tobytes())
        kept = [
            at
            for at, size, mark in zip(*(column[sound].tolist() for column in (np.arange(len(slots)), sizes, marks)),
                                      strict=True)
            if _checksum(memory[at * _SLOT_BYTES : at * _SLOT_BYTES + size]) == mark
        ]  # fmt: skip
        return np.array(kept, np.intp)


def _heads(slots: NDArray[np.uint8]) -> NDArray[Any]:
    heads: NDArray[Any] = slots[:, : _HEAD.itemsize].copy().view(_HEAD)[:, 0]
    return heads


def _label_numbers(heads: NDArray[Any]) -> NDArray[np.int64]:
    widths = heads["label_width"].astype(np.int64)
    return np.where(widths == _JUDGED_LABEL, 3, widths)


def _records(slots: NDArray[np.uint8], heads: NDArray[Any]) -> NDArray[np.void]:
    """Records of intact slots. All records of one shape, mostly all there are, are read at once."""
    records = np.zeros(len(slots), RECORD)
    for name in _COPIED:
        records[name] = heads[name]
    records["latency_us"] = heads["elapsed_ns"] / 1e3
    records["predicted"], records["confidence"], records["entropy"] = NO_CLASS, np.nan, np.nan
    records["rows"] = 1
    widths = heads["label_width"].astype(np.int64) << 8 | heads["view_width"]
    for shape in np.unique(widths).tolist():
        rows = np.flatnonzero(widths == shape)
        label_width, view_width = shape >> 8, shape & 0xFF
        label_end = _FIXED.size + 4 * (3 if label_width == _JUDGED_LABEL else label_width)
        label = _floats(slots, rows, _FIXED.size, label_end)
        if label_width:
            predicted, confidence, entropy = label.T if label_width == _JUDGED_LABEL else label_statistics(label)
            records["predicted"][rows] = predicted
            records["confidence"][rows], records["entropy"][rows] = confidence, entropy
        records["view"][rows, :view_width] = _floats(slots, rows, label_end, label_end + 4 * view_width)
    after = np.flatnonzero(heads["after"])
    if len(after):
        words = _afterwords(slots[after], heads[after])
        for name in (
            "queue_us",
            "rows",
            "source",
            "dead_bits",
            "stuck_bits",
            "range_bits",
            "not_finite_bits",
            "scale_bits",
        ):
            records[name][after] = words[name]
    return records


def _afterwords(slots: NDArray[np.uint8], heads: NDArray[Any]) -> NDArray[Any]:
    """What follows label and view, of records that all have it."""
    begins = np.minimum(
        _FIXED.size + 4 * (_label_numbers(heads) + heads["view_width"]), _SLOT_BYTES - _AFTERWORDS.itemsize
    )
    columns = begins[:, None] + np.arange(_AFTERWORDS.itemsize)
    words: NDArray[Any] = np.take_along_axis(slots, columns, axis=1).view(_AFTERWORDS)[:, 0]
    return words


def _floats(slots: NDArray[np.uint8], rows: NDArray[np.intp], begin: int, end: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(slots[rows, begin:end]).view("<f4")


def label_statistics(labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Predicted class, its share, and the entropy in nats of each row; NaN entropy where it is no distribution.

    labels: (rows, classes), at least one class.
    """
    shares = labels.astype(np.float64)
    predicted = np.minimum(shares.argmax(axis=1), LARGEST_CLASS)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(axis=1)
        distribution = (shares.min(axis=1) >= 0) & (np.abs(shares.sum(axis=1) - 1.0) <= 1e-3)
    return predicted, shares.max(axis=1), np.where(distribution, entropy, np.nan)


def _check_header(fd: int) -> tuple[int, Layout]:
    raw = os.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size:
        raise MalformedMessage(f"descriptor {fd} is too small to hold an observation ring")
    magic, version, slots, slot_bytes, services, engines = _HEADER.unpack(raw)
    if (magic, version, slot_bytes) != (_MAGIC, _VERSION, _SLOT_BYTES):
        raise MalformedMessage(f"descriptor {fd} holds no observation ring of version {_VERSION}")
    layout = Layout(services, engines)
    whole = 2 <= slots <= MAX_SLOTS and 0 < services <= _MOST_PLACES and 0 < engines <= _MOST_PLACES
    if not whole or os.fstat(fd).st_size != _size_bytes(slots, layout):
        raise MalformedMessage(f"the observation ring behind descriptor {fd} has a wrong size")
    return int(slots), layout
