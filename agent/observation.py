"""What one request leaves behind, and the shared-memory ring that carries it to the agent process.

One writer (the worker), one reader (the agent process), no locks and no waiting: a full ring overwrites its oldest
records, and the reader counts what it missed. A new worker generation continues the sequence of the one before.
What the records mean for health and drift is the monitor's business.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import MalformedMessage

VIEW_WIDTH = 64
MAX_ROWS = 64  # rows of one batch that leave a record each; further ones are only counted in `rows`
NO_ENGINE = 255
NO_CLASS = -1
DEFAULT_SLOTS = 4096


class Outcome(IntEnum):
    OK = 0
    FAILED_OVER = 1  # answered, but not by the engine tried first
    FLOOR = 2  # the declared constant answered
    REFUSED_BY_GUARD = 3
    OVERLOADED = 4
    DEADLINE = 5
    ERROR = 6  # no engine could answer, or only a floor that is configured to refuse


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
        ("row", "<u2"),  # a request counts once: at row 0
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
    ]
)
_FIXED = struct.Struct("<QqdffBBBBHHhffQQQQQH")  # RECORD without its view: one pack call instead of 20 numpy stores
_VIEW_BYTES = 4 * VIEW_WIDTH
_SLOT: np.dtype[Any] = np.dtype([("record", RECORD), ("checksum", "<u4")], align=False)
_SLOT_BYTES = (_SLOT.itemsize + 7) // 8 * 8

_HEADER = struct.Struct("<8sIIII")  # magic, version, slots, slot bytes, record bytes
_HEADER_BYTES = 64
_SEQUENCE_AT = 32
_MAGIC = b"EWRING\0\0"
_VERSION = 1
MAX_SLOTS = 1 << 20


class Observation(NamedTuple):
    """One record to write, in RECORD's order without its sequence. `view`: float32 bytes, at most VIEW_WIDTH."""

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


def create_ring(slots: int = DEFAULT_SLOTS) -> int:
    """File descriptor of a new, empty ring in anonymous memory; its size is sealed, so no reader can meet SIGBUS."""
    if not 2 <= slots <= MAX_SLOTS:
        raise ValueError(f"a ring has 2 to {MAX_SLOTS} slots, not {slots}")
    fd = os.memfd_create("edgewarden-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _HEADER_BYTES + slots * _SLOT_BYTES)
    os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, slots, _SLOT_BYTES, RECORD.itemsize), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class _Ring:
    """The mapping both sides share."""

    def __init__(self, fd: int) -> None:
        self.slots = _check_header(fd)
        self._memory = mmap.mmap(fd, _HEADER_BYTES + self.slots * _SLOT_BYTES)
        self._bytes = memoryview(self._memory)
        # a native 8-byte store or load: never seen half written
        self._sequence = self._bytes[_SEQUENCE_AT : _SEQUENCE_AT + 8].cast("Q")

    def close(self) -> None:
        self._sequence.release()
        self._bytes.release()
        self._memory.close()


class RingWriter(_Ring):
    """Appends records; never waits. Owned by one thread of one worker."""

    def __init__(self, fd: int) -> None:
        """Map the ring behind `fd` and continue its sequence.

        Raises:
            MalformedMessage: `fd` holds no ring of this version.
        """
        super().__init__(fd)
        self._next = self._sequence[0]

    @property
    def written(self) -> int:
        """Records ever written, by all generations."""
        return int(self._next)

    def write(self, observation: Observation) -> None:
        """Append one record."""
        # Content, checksum, then the sequence that publishes it. The checksum makes the reader independent of the
        # order in which another core sees these stores (ARM).
        at = _HEADER_BYTES + (self._next % self.slots) * _SLOT_BYTES
        record = _FIXED.pack(self._next, *observation[:-1]) + observation.view.ljust(_VIEW_BYTES, b"\0")
        self._bytes[at : at + _SLOT.itemsize] = record + zlib.crc32(record).to_bytes(4, "little")
        self._next += 1
        self._sequence[0] = self._next


class RingReader(_Ring):
    """Takes records in order; counts those overwritten before it came. Owned by one thread of the agent process."""

    def __init__(self, fd: int) -> None:
        """Map the ring behind `fd`; reading starts with the oldest record still there.

        Raises:
            MalformedMessage: `fd` holds no ring of this version.
        """
        super().__init__(fd)
        self._next = 0
        self._read = 0
        self._gaps = 0

    def read(self, limit: int = DEFAULT_SLOTS) -> NDArray[np.void]:
        """Up to `limit` new records, oldest first: a copy of dtype RECORD, empty when nothing is new."""
        written = self._sequence[0]
        self._skip_to(written - self.slots)
        count = min(written - self._next, limit)
        if count <= 0:
            return np.empty(0, RECORD)
        raw = [bytes(self._slot(sequence)) for sequence in range(self._next, self._next + count)]
        intact = [slot for number, slot in enumerate(raw, self._next) if _is_intact(slot, number)]
        self._next += count
        self._gaps += count - len(intact)
        self._read += len(intact)
        return np.frombuffer(b"".join(intact), _SLOT)["record"].copy()

    def statistics(self) -> dict[str, int]:
        """`read`, `gaps` (records lost by overwriting) and `behind` (waiting to be read)."""
        return {"read": self._read, "gaps": self._gaps, "behind": max(0, int(self._sequence[0]) - self._next)}

    def _skip_to(self, oldest: int) -> None:
        if oldest > self._next:
            self._gaps += oldest - self._next
            self._next = oldest

    def _slot(self, sequence: int) -> memoryview:
        at = _HEADER_BYTES + (sequence % self.slots) * _SLOT_BYTES
        return self._bytes[at : at + _SLOT.itemsize]


def _is_intact(slot: bytes, sequence: int) -> bool:
    content, checksum = slot[:-4], slot[-4:]
    return int.from_bytes(content[:8], "little") == sequence and zlib.crc32(content).to_bytes(4, "little") == checksum


def _check_header(fd: int) -> int:
    raw = os.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size:
        raise MalformedMessage(f"descriptor {fd} is too small to hold an observation ring")
    magic, version, slots, slot_bytes, record_bytes = _HEADER.unpack(raw)
    if (magic, version, slot_bytes, record_bytes) != (_MAGIC, _VERSION, _SLOT_BYTES, RECORD.itemsize):
        raise MalformedMessage(f"descriptor {fd} holds no observation ring of version {_VERSION}")
    if not 2 <= slots <= MAX_SLOTS or os.fstat(fd).st_size != _HEADER_BYTES + slots * _SLOT_BYTES:
        raise MalformedMessage(f"the observation ring behind descriptor {fd} has a wrong size")
    return int(slots)
