"""Windows over streams of raw samples: what overlaps is kept, what is missing is handled by policy, all is bounded.

Window k of a stream covers its samples k*hop to k*hop+length-1, however the samples are cut into requests.
Taking samples and keeping them are two steps: a request that was refused for lack of room leaves its stream as it
was, and may be sent again. Pure: no clock, no threads. Whether a number in a sample makes sense is the guard's
business; who may use which stream when is the frontend's.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

import numpy as np

from agent.contract.errors import MalformedMessage, Overloaded, UnsupportedVersion
from agent.contract.plan import GapPolicy, TensorPlan, WindowPlan
from agent.contract.tensors import DATATYPES, Array

MAX_KEPT_BYTES = 64 * 1024 * 1024  # memory of all streams of a service; one always fits
MAX_TAKEN_BYTES = 16 * 1024 * 1024  # windows that the samples of one request can complete...
MAX_TAKEN_WINDOWS = 1024  # ...and how many
MAX_NUMBER = 2**53  # a JSON number up to here is exact
CLOCK_DRIFT = 0.01  # a sensor's rate may be off by so much before its timestamps mean missing samples
_MAGIC = b"EWSTREAM"
_VERSION = 1


class Reset(StrEnum):
    """Why windows began anew."""

    STARTED = "started"  # the stream's first samples
    RESTARTED = "restarted"  # the sender counts from an earlier sample, or from 0, again
    GAP = "gap"  # more is missing than may be filled
    CLOCK = "clock"  # the timestamps went back further than late samples explain
    MOVED = "moved"  # its state did not come along to this worker
    EVICTED = "evicted"  # others were used more recently


@dataclass(frozen=True, slots=True)
class Form:
    """A window plan, compiled: `shape` and `dtype` of one sample, limits in samples."""

    plan: WindowPlan
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    max_gap: int
    max_samples: int
    max_streams: int
    signature: bytes

    @property
    def sample_bytes(self) -> int:
        return int(self.dtype.itemsize * math.prod(self.shape))


def compile_form(plan: WindowPlan, tensor: TensorPlan) -> Form:
    """The form of streams whose windows are rows of `tensor`, (rows, length, ...)."""
    dtype, shape = DATATYPES[tensor.datatype], tensor.shape[2:]
    window_bytes = max(1, plan.length * dtype.itemsize * math.prod(shape))
    windows = min(max(MAX_TAKEN_BYTES // window_bytes, 1), MAX_TAKEN_WINDOWS)
    max_samples = max(windows * plan.hop, plan.length)
    meaning = (plan.length, plan.hop, float(plan.rate_hz), tensor.datatype, shape)
    return Form(
        plan=plan,
        dtype=dtype,
        shape=shape,
        max_gap=min(int(plan.max_gap_s * plan.rate_hz), max_samples),
        max_samples=max_samples,
        max_streams=min(plan.max_streams, max(MAX_KEPT_BYTES // (2 * window_bytes), 1)),
        signature=hashlib.sha256(repr(meaning).encode()).digest(),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """How far a stream has come.

    `sequence`: index of the sender's next sample. `samples`: taken so far, made-up ones included. `filled`: samples
    kept for the next window; `skip`: samples to leave out before it begins (a hop longer than a window).
    `next_time_s`: when the next sample is due, NaN = unknown. `last_count`: samples of the newest request.
    """

    sequence: int = 0
    samples: int = 0
    windows: int = 0
    filled: int = 0
    skip: int = 0
    last_count: int = 0
    gaps: int = 0
    made_up: int = 0
    dropped: int = 0
    resets: int = 0
    next_time_s: float = math.nan


_COUNTS = tuple(one.name for one in fields(Place) if one.name != "next_time_s")
_HEAD = struct.Struct(f"<8sH32s{len(_COUNTS)}Qd")


@dataclass(frozen=True, slots=True)
class Taken:
    """What samples came to: the completed `windows`, a read-only view (windows, length, ...), and what was done.

    Each window is one piece of memory; the view holds until the stream takes again or keeps. `first_window`: index of
    the first one in the stream. `made_up`: samples put in the place of missing ones. `dropped`: samples that had come
    before.
    """

    windows: Array
    first_window: int
    place: Place
    made_up: int = 0
    dropped: int = 0
    reset: Reset | None = None
    first_end_s: float = math.nan
    hop_s: float = 0.0
    rest: Array | None = None  # becomes what the stream keeps...
    rest_at: int = -1  # ...where it lies in the stream's memory; -1: elsewhere
    last: Array | None = None

    def time_s(self, window: int) -> float:
        """Data time of the last sample of a window, counted within this request; NaN = unknown."""
        return self.first_end_s + window * self.hop_s


@dataclass(frozen=True, slots=True)
class _Turn:
    """How the samples of a request lie to those before: at most one of the three is set."""

    reset: Reset | None = None
    made_up: int = 0
    dropped: int = 0


class Stream:
    """One stream: a fixed piece of memory and a place. Owned by one thread; `note` is its owner's to use."""

    __slots__ = ("_form", "_last", "_memory", "_start", "_why", "note", "place")

    def __init__(self, form: Form, why: Reset = Reset.STARTED) -> None:
        self._form = form
        # twice a window: kept samples are moved to the front once a window, not at each request
        self._memory: Array = np.empty((2 * form.plan.length, *form.shape), form.dtype)
        self._last: Array = np.empty(form.shape, form.dtype)
        self._start = 0
        self._why: Reset | None = why  # None once it has samples
        self.place = Place()
        self.note: Any = None

    @property
    def begun(self) -> bool:
        return self._why is None

    def take(self, samples: Array, *, sequence: int | None = None, time_s: float = math.nan) -> Taken:
        """Join samples (samples, ...) to those kept. Changes nothing that counts before `keep`.

        `sequence`: index of the first one in the sender's own counting; `time_s`: its time. At most the form's
        `max_samples`.
        """
        if not len(samples):
            return Taken(self._memory[:0], self.place.windows, self.place)
        turn = self._judge(len(samples), sequence, time_s)
        base, base_time_s = self._before(turn, sequence, time_s)
        if turn.dropped == len(samples):
            return Taken(self._memory[:0], base.windows, base, dropped=turn.dropped)
        plan = self._form.plan
        arrived = turn.made_up + len(samples) - turn.dropped
        skipped = min(base.skip, arrived)
        total = base.filled + arrived - skipped
        count = 0 if total < plan.length else (total - plan.length) // plan.hop + 1
        joint, at = self._join(base.filled, total, self._pieces(turn, samples, skipped))
        used = count * plan.hop
        place = Place(  # by position: replace() would cost as much as all the rest of this
            (base.sequence if sequence is None else sequence) + len(samples), base.samples + arrived,
            base.windows + count, max(0, total - used), base.skip - skipped + max(0, used - total), len(samples),
            base.gaps, base.made_up, base.dropped, base.resets, base_time_s + len(samples) / plan.rate_hz,
        )  # fmt: skip
        # where in the request the first window ends: made-up samples lie before it, dropped ones at its begin
        first_end = plan.length - 1 - base.filled + skipped - turn.made_up + turn.dropped
        return Taken(
            _cut(joint, count, plan.length, plan.hop),
            base.windows,
            place,
            turn.made_up,
            turn.dropped,
            turn.reset,
            base_time_s + first_end / plan.rate_hz,
            plan.hop / plan.rate_hz,
            joint[min(used, total) :],
            -1 if at < 0 else at + min(used, total),
            samples[-1],
        )

    def keep(self, taken: Taken) -> None:
        """Make what was taken last the stream's state."""
        self.place = taken.place
        if taken.rest is None or taken.last is None:
            return
        if taken.rest_at < 0:
            self._memory[: len(taken.rest)] = taken.rest
        self._start = max(taken.rest_at, 0)
        self._last[...] = taken.last
        self._why = None

    # --- what comes next to what ---------------------------------------------------------------------------
    def _judge(self, count: int, sequence: int | None, time_s: float) -> _Turn:
        place, form = self.place, self._form
        if self._why is not None:
            unknown = self._why is Reset.STARTED and sequence  # its sender is further than anybody here knows
            return _Turn(Reset.MOVED if unknown else self._why)
        if sequence == 0 and place.sequence:
            return _Turn(Reset.RESTARTED)
        ahead, back = 0 if sequence is None else sequence - place.sequence, Reset.RESTARTED
        if ahead == 0:
            ahead, back = self._by_time(time_s), Reset.CLOCK
            ahead = max(ahead, 0) if sequence is not None else ahead  # the sender's count is the better witness
        if ahead > 0:
            unfilled = form.plan.gap_policy is GapPolicy.RESET or ahead > form.max_gap
            return _Turn(Reset.GAP) if unfilled else _Turn(made_up=ahead)
        if -ahead > count + max(form.max_gap, form.plan.length):
            return _Turn(back)  # nobody is that late; dropping all until it has caught up would take for ever
        return _Turn(dropped=min(-ahead, count))

    def _by_time(self, time_s: float) -> int:
        """Samples missing (above 0) or late (below 0) by their timestamp, within what a clock may be off."""
        off = (time_s - self.place.next_time_s) * self._form.plan.rate_hz
        if abs(off) > 0.5 + CLOCK_DRIFT * self.place.last_count:  # never with NaN
            return round(min(max(off, -MAX_NUMBER), MAX_NUMBER))
        return 0

    def _before(self, turn: _Turn, sequence: int | None, time_s: float) -> tuple[Place, float]:
        """The place the samples are joined to, and the time of the request's first sample."""
        place = self.place
        match turn.reset:
            case None if not (turn.made_up or turn.dropped):
                base = place
            case None:
                base = replace(
                    place,
                    gaps=place.gaps + (turn.made_up > 0),
                    made_up=place.made_up + turn.made_up,
                    dropped=place.dropped + turn.dropped,
                )
            case Reset.GAP | Reset.CLOCK:
                gap = turn.reset is Reset.GAP
                base = replace(place, filled=0, skip=0, gaps=place.gaps + gap, resets=place.resets + 1)
            case _:
                base = Place(sequence=sequence or 0)
        if not math.isnan(time_s) or turn.reset not in (None, Reset.GAP):
            return base, time_s
        ahead = 0 if sequence is None else sequence - place.sequence
        return base, place.next_time_s + ahead / self._form.plan.rate_hz

    # --- memory ----------------------------------------------------------------------------------------------
    def _pieces(self, turn: _Turn, samples: Array, skipped: int) -> tuple[Array, ...]:
        """The samples to append: made-up ones and new ones, without those that lie between two windows."""
        fresh = samples[turn.dropped :]
        if not turn.made_up:
            return (fresh[skipped:],)
        made_up = self._make_up(turn.made_up, fresh[0])
        return made_up[skipped:], fresh[max(0, skipped - turn.made_up) :]

    def _make_up(self, count: int, following: Array) -> Array:
        """Samples for a gap, (count, ...)."""
        if self._form.plan.gap_policy is not GapPolicy.INTERPOLATE or self._form.dtype.kind == "b":
            return np.broadcast_to(self._last, (count, *self._form.shape))
        begin, end = self._last.astype(np.float64), following.astype(np.float64)
        share = (np.arange(1, count + 1) / (count + 1)).reshape(-1, *[1] * begin.ndim)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are the guard's business
            line = begin * (1 - share) + end * share
            return (np.rint(line) if self._form.dtype.kind in "iu" else line).astype(self._form.dtype)

    def _join(self, filled: int, total: int, pieces: tuple[Array, ...]) -> tuple[Array, int]:
        """Kept samples (the last `filled` of them: all or none) and pieces as one array of `total` ones; its place.

        In this stream's own memory where they fit behind what it keeps, which stays untouched until `keep`.
        """
        kept = self.place.filled
        end = kept - filled + total  # of what is written, counted from the first kept sample
        if end > len(self._memory):
            joint: Array = np.empty((total, *self._form.shape), self._form.dtype)
            joint[:filled] = self._memory[self._start : self._start + filled]
            begin = -1
        else:
            if self._start + end > len(self._memory):
                self._memory[:kept] = self._memory[self._start : self._start + kept]
                self._start = 0
            begin = self._start + kept - filled
            joint = self._memory[begin : self._start + end]
        at = filled
        for piece in pieces:
            joint[at : at + len(piece)] = piece
            at += len(piece)
        return joint, begin

    # --- moving ----------------------------------------------------------------------------------------------
    def dump(self) -> bytes:
        """All that a stream of the same form elsewhere needs to go on."""
        place = self.place
        counts = (getattr(place, name) for name in _COUNTS)
        head = _HEAD.pack(_MAGIC, _VERSION, self._form.signature, *counts, place.next_time_s)
        kept = self._memory[self._start : self._start + place.filled]
        raw = head + self._last.tobytes() + kept.tobytes()
        return raw + zlib.crc32(raw).to_bytes(4, "little")

    @classmethod
    def load(cls, form: Form, raw: bytes) -> Stream:
        """A stream from what `dump` gave.

        Raises:
            UnsupportedVersion: written by another version.
            MalformedMessage: damaged, or of a stream with other windows.
        """
        if len(raw) < _HEAD.size + 4 or not raw.startswith(_MAGIC):
            raise MalformedMessage(f"{len(raw)} bytes hold no stream")
        _, version, signature, *counts, next_time_s = _HEAD.unpack_from(raw)
        if version != _VERSION:
            raise UnsupportedVersion(f"a stream of version {version} cannot be read, only {_VERSION}")
        if zlib.crc32(raw[:-4]).to_bytes(4, "little") != raw[-4:]:
            raise MalformedMessage("a stream's bytes are damaged")
        if signature != form.signature:
            raise MalformedMessage("a stream's windows are not those of this service")
        place = Place(**dict(zip(_COUNTS, counts, strict=True)), next_time_s=next_time_s)
        _check_place(form, place, len(raw) - _HEAD.size - 4)
        stream = cls(form)
        items = np.frombuffer(
            raw, form.dtype, offset=_HEAD.size, count=(len(raw) - _HEAD.size - 4) // form.dtype.itemsize
        )
        samples = items.reshape(1 + place.filled, *form.shape)
        stream._last[...] = samples[0]
        stream._memory[: place.filled] = samples[1:]
        stream._why = None
        stream.place = place
        return stream


def _cut(joint: Array, count: int, length: int, hop: int) -> Array:
    """Windows over an array of samples as a read-only view, (count, length, ...)."""
    if count == 0:
        return joint[:0]
    if count == 1:  # as below, at a tenth of the cost
        only = joint[None, :length]
        only.flags.writeable = False
        return only
    shape, step = (count, length, *joint.shape[1:]), joint.strides[0]
    strides = (hop * step, step, *joint.strides[1:])
    return np.lib.stride_tricks.as_strided(joint, shape, strides, writeable=False)


def _check_place(form: Form, place: Place, size: int) -> None:
    """Raises: MalformedMessage: numbers that no stream of this form can have, or another size than they mean."""
    length, hop = form.plan.length, form.plan.hop
    sound = (
        all(getattr(place, name) < MAX_NUMBER for name in _COUNTS)
        and place.filled < length
        and place.skip <= max(0, hop - length)
        and not (place.filled and place.skip)
        and place.last_count <= form.max_samples
        and place.filled <= place.samples
        and not math.isinf(place.next_time_s)
    )
    if not sound or size != (1 + place.filled) * form.sample_bytes:
        raise MalformedMessage("a stream's numbers contradict each other")


@dataclass(slots=True)
class _Totals:
    begun: int = 0
    evicted: int = 0
    adopted: int = 0
    windows: int = 0
    made_up: int = 0
    dropped: int = 0
    resets: int = 0


@dataclass(slots=True)
class Streams:
    """The streams of one service by name, the one unused longest first. Bounded: the first gives way."""

    form: Form
    _live: OrderedDict[str, Stream] = field(default_factory=OrderedDict)
    _gone: OrderedDict[str, Reset] = field(default_factory=OrderedDict)  # what their next answer must say
    _totals: _Totals = field(default_factory=_Totals)

    def __len__(self) -> int:
        return len(self._live)

    def names(self) -> tuple[str, ...]:
        """Streams that have samples, the one unused longest first."""
        return tuple(name for name, stream in self._live.items() if stream.begun)

    def find(self, name: str) -> Stream | None:
        """The stream of this name, if it is there; looking is not using."""
        return self._live.get(name)

    def open(self, name: str, busy: Collection[str] = ()) -> Stream:
        """The stream of this name, begun when it is not there; streams in `busy` never give way to it.

        Raises:
            Overloaded: all streams are busy.
        """
        stream = self._live.get(name)
        if stream is None:
            self._make_room(busy)
            stream = self._live[name] = Stream(self.form, self._gone.pop(name, Reset.STARTED))
        self._live.move_to_end(name)
        return stream

    def keep(self, stream: Stream, taken: Taken) -> None:
        """Make what was taken last the state of a stream, and count it."""
        totals = self._totals
        totals.begun += not stream.begun
        totals.windows += len(taken.windows)
        totals.made_up += taken.made_up
        totals.dropped += taken.dropped
        totals.resets += taken.reset is not None and stream.begun
        stream.keep(taken)

    def end(self, name: str) -> Stream | None:
        """Forget a stream; returns what it was."""
        self._gone.pop(name, None)
        return self._live.pop(name, None)

    def lose(self, name: str, why: Reset = Reset.MOVED) -> None:
        """Forget a stream whose sender goes on: the next answer says why it begins anew."""
        self._live.pop(name, None)
        self._gone[name] = why
        self._gone.move_to_end(name)
        if len(self._gone) > self.form.max_streams:
            self._gone.popitem(last=False)

    def export(self, name: str) -> bytes:
        """The state of a stream, for `adopt` elsewhere. Raises: KeyError: no stream of this name has samples."""
        stream = self._live[name]
        if not stream.begun:
            raise KeyError(name)
        return stream.dump()

    def adopt(self, name: str, raw: bytes, busy: Collection[str] = ()) -> bool:
        """Go on with a stream from elsewhere; False when a stream of this name lives here: it is newer.

        Raises:
            UnsupportedVersion, MalformedMessage: it cannot be taken over.
            Overloaded: all streams are busy.
        """
        stream = Stream.load(self.form, raw)
        present = self._live.get(name)
        if present is not None and present.begun:
            return False
        if present is None:
            self._make_room(busy)
        self._gone.pop(name, None)
        self._live[name] = stream
        self._totals.adopted += 1
        return True

    def statistics(self) -> dict[str, int]:
        """Streams kept now, and totals since the worker began."""
        totals = self._totals
        return {
            "streams": len(self._live),
            "streams_begun": totals.begun,
            "streams_evicted": totals.evicted,
            "streams_adopted": totals.adopted,
            "stream_windows": totals.windows,
            "stream_samples_made_up": totals.made_up,
            "stream_samples_dropped": totals.dropped,
            "stream_resets": totals.resets,
        }

    def _make_room(self, busy: Collection[str]) -> None:
        while len(self._live) >= self.form.max_streams:
            oldest = next((name for name in self._live if name not in busy), None)
            if oldest is None:
                raise Overloaded(f"all {len(self._live)} streams are busy", hint="Ask again later.")
            self._totals.evicted += self._live[oldest].begun
            self.lose(oldest, Reset.EVICTED)
