"""Windows over streams: against one big array, with gaps, with hostile bytes. No I/O, no time."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.errors import ContractError, MalformedMessage, Overloaded, UnsupportedVersion
from agent.contract.plan import GapPolicy, TensorPlan, WindowPlan
from agent.streams import MAX_KEPT_BYTES, MAX_TAKEN_WINDOWS, Form, Reset, Stream, Streams, Taken, compile_form

RATE_HZ = 10.0
Array = np.ndarray[Any, np.dtype[Any]]


def form(
    length: int = 4, hop: int = 2, *, datatype: str = "FP32", shape: tuple[int, ...] = (2,), **changes: Any
) -> Form:
    plan = replace(WindowPlan("x", length, hop, RATE_HZ), **changes)
    return compile_form(plan, TensorPlan("x", datatype, (-1, length, *shape)))


def signal(count: int, first: int = 0, shape: tuple[int, ...] = (2,)) -> Array:
    """Samples that say their own index, in every channel another way."""
    numbers = np.arange(first, first + count, dtype=np.float32)
    return (numbers.reshape(-1, *[1] * len(shape)) + np.linspace(0, 0.5, math.prod(shape)).reshape(shape)).astype(
        np.float32
    )


def cut_all(samples: Array, length: int, hop: int) -> list[bytes]:
    """The reference: windows of one big array, in the plainest way."""
    windows = []
    begin = 0
    while begin + length <= len(samples):
        windows.append(samples[begin : begin + length].tobytes())
        begin += hop
    return windows


def feed(stream: Stream, samples: Array, **where: Any) -> tuple[list[bytes], Taken]:
    """Take and keep; the windows as bytes."""
    taken = stream.take(samples, **where)
    assert all(window.flags.c_contiguous for window in taken.windows)
    windows = [window.tobytes() for window in taken.windows]
    stream.keep(taken)
    return windows, taken


def bounded(stream: Stream, form: Form) -> bool:
    return stream._memory.nbytes == 2 * form.plan.length * form.sample_bytes


# --- chunking ------------------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 9),
    hop=st.integers(1, 12),
    shape=st.sampled_from([(), (1,), (3,), (2, 2)]),
    chunks=st.lists(st.integers(0, 30), max_size=25),
)
def test_any_chunking_gives_the_windows_of_one_big_array(
    length: int, hop: int, shape: tuple[int, ...], chunks: list[int]
) -> None:
    of = form(length, hop, shape=shape)
    stream, whole = Stream(of), signal(sum(chunks), shape=shape)
    windows: list[bytes] = []
    at = 0
    for count in chunks:
        ended, taken = feed(stream, whole[at : at + count], sequence=at, time_s=5.0 + at / RATE_HZ)
        for index in range(len(ended)):
            last = (taken.first_window + index) * hop + length - 1
            assert taken.time_s(index) == pytest.approx(5.0 + last / RATE_HZ)
        assert taken.first_window == len(windows)
        windows += ended
        at += count
        assert bounded(stream, of)
    assert windows == cut_all(whole, length, hop)
    assert (stream.place.samples, stream.place.windows, stream.place.sequence) == (
        len(whole),
        len(windows),
        len(whole),
    )


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 9),
    hop=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(1, 25), st.sampled_from(["keep", "refuse", "move", "again"])), max_size=25),
)
def test_samples_that_are_not_kept_may_come_again_and_moving_changes_nothing(
    length: int, hop: int, steps: list[tuple[int, str]]
) -> None:
    of = form(length, hop)
    stream, whole = Stream(of), signal(sum(count for count, _ in steps))
    windows: list[bytes] = []
    at = 0
    for count, step in steps:
        piece = whole[at : at + count]
        if step == "refuse":
            stream.take(piece, sequence=at)
        if step == "move" and stream.begun:
            stream = Stream.load(of, stream.dump())
        windows += feed(stream, piece, sequence=at)[0]
        if step == "again" and at:
            repeated, taken = feed(stream, piece, sequence=at)
            assert (repeated, taken.dropped) == ([], count)
        at += count
    assert windows == cut_all(whole, length, hop)


def test_overlap_is_kept_in_place_and_windows_are_not_copied() -> None:
    stream = Stream(form(8, 4))
    for first in range(0, 400, 4):
        taken = stream.take(signal(4, first), sequence=first)
        if len(taken.windows):
            assert np.shares_memory(taken.windows[0], stream._memory)
        stream.keep(taken)


def test_windows_cannot_be_written_through() -> None:
    for count in (4, 9):
        taken = Stream(form()).take(signal(count))
        with pytest.raises(ValueError, match="read-only"):
            taken.windows[0, 0] = 1.0


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 9),
    hop=st.integers(1, 12),
    chunks=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), max_size=20),
)
def test_gaps_between_any_chunks_are_filled_as_in_one_big_array(
    length: int, hop: int, chunks: list[tuple[int, int]]
) -> None:
    stream = Stream(form(length, hop))
    windows: list[bytes] = []
    whole: list[Array] = []
    at = 0
    for missing, count in chunks:
        missing = missing if whole else 0
        if missing:
            whole.append(np.repeat(whole[-1][-1:], missing, axis=0))
        at += missing
        whole.append(signal(count, at))
        windows += feed(stream, whole[-1], sequence=at)[0]
        at += count
    assert windows == cut_all(np.concatenate([signal(0), *whole]), length, hop)


# --- gaps ----------------------------------------------------------------------------------------------------
def joined(policy: GapPolicy, missing: int, *, by: str, max_gap_s: float = 0.5) -> tuple[list[bytes], Taken, Stream]:
    """Three samples, `missing` ones, five samples; windows of 4, hop 4."""
    stream = Stream(form(4, 4, gap_policy=policy, max_gap_s=max_gap_s))
    here = {"sequence": {"sequence": 0}, "time": {"time_s": 100.0}}[by]
    there = {"sequence": {"sequence": 3 + missing}, "time": {"time_s": 100.0 + (3 + missing) / RATE_HZ}}[by]
    feed(stream, signal(3), **here)
    windows, taken = feed(stream, signal(5, 3 + missing), **there)
    return windows, taken, stream


@pytest.mark.parametrize("by", ["sequence", "time"])
def test_a_short_gap_is_filled_by_policy(by: str) -> None:
    held, taken, stream = joined(GapPolicy.HOLD, 2, by=by)
    whole = np.concatenate([signal(3), signal(1, 2), signal(1, 2), signal(5, 5)])
    assert held == cut_all(whole, 4, 4)
    assert (taken.made_up, taken.reset, stream.place.gaps, stream.place.made_up) == (2, None, 1, 2)
    assert (stream.place.samples, stream.place.sequence) == (10, 10 if by == "sequence" else 8)
    drawn, taken, _ = joined(GapPolicy.INTERPOLATE, 2, by=by)
    assert [np.frombuffer(one, np.float32) for one in drawn] == [
        pytest.approx(np.frombuffer(one, np.float32)) for one in cut_all(signal(10), 4, 4)
    ]
    assert taken.made_up == 2


@pytest.mark.parametrize("by", ["sequence", "time"])
@pytest.mark.parametrize(
    ("policy", "missing"), [(GapPolicy.RESET, 1), (GapPolicy.HOLD, 6), (GapPolicy.INTERPOLATE, 6)]
)
def test_a_gap_that_may_not_be_filled_begins_windows_anew(by: str, policy: GapPolicy, missing: int) -> None:
    windows, taken, stream = joined(policy, missing, by=by)
    assert windows == cut_all(signal(5, 3 + missing), 4, 4)
    assert (taken.reset, taken.made_up, stream.place.gaps, stream.place.resets) == (Reset.GAP, 0, 1, 1)
    if by == "time":
        assert taken.time_s(0) == pytest.approx(100.0 + (3 + missing + 3) / RATE_HZ)


def test_a_gap_can_complete_windows_of_its_own() -> None:
    stream = Stream(form(4, 4, max_gap_s=2.0))
    feed(stream, signal(3), sequence=0, time_s=0.0)
    windows, taken = feed(stream, signal(2, 15), sequence=15)
    whole = np.concatenate([signal(3), np.repeat(signal(1, 2), 12, axis=0), signal(2, 15)])
    assert windows == cut_all(whole, 4, 4)
    assert [taken.time_s(index) for index in range(4)] == pytest.approx([0.3, 0.7, 1.1, 1.5])


def test_a_gap_between_windows_that_do_not_touch() -> None:
    stream = Stream(form(3, 7, max_gap_s=2.0))
    feed(stream, signal(4), sequence=0)  # one window, and one of four samples that are left out
    windows, _ = feed(stream, signal(6, 9), sequence=9)
    whole = np.concatenate([signal(4), np.repeat(signal(1, 3), 5, axis=0), signal(6, 9)])
    assert windows == cut_all(whole, 3, 7)[1:]


def test_windows_begin_anew_right_after_a_gap_whatever_was_to_be_left_out() -> None:
    stream = Stream(form(3, 9, max_gap_s=0.1))
    feed(stream, signal(4), sequence=0)
    windows, taken = feed(stream, signal(5, 20), sequence=20)
    assert (windows, taken.reset) == (cut_all(signal(5, 20), 3, 9), Reset.GAP)


@pytest.mark.parametrize(
    ("datatype", "before", "after", "middle"),
    [("INT16", 10, 13, [11, 12]), ("BOOL", True, False, [True, True]), ("FP16", 0.0, 3.0, [1.0, 2.0])],
)
def test_samples_are_made_up_in_their_own_type(datatype: str, before: Any, after: Any, middle: list[Any]) -> None:
    of = form(4, 4, datatype=datatype, shape=(), gap_policy=GapPolicy.INTERPOLATE)
    stream = Stream(of)
    feed(stream, np.array([before], of.dtype), sequence=0)
    taken = stream.take(np.array([after], of.dtype), sequence=3)
    assert taken.windows[0].tolist() == [before, *middle, after]


def test_not_a_number_is_left_to_the_guard() -> None:
    stream = Stream(form(4, 4, gap_policy=GapPolicy.INTERPOLATE))
    feed(stream, np.full((1, 2), np.nan, np.float32), sequence=0)
    taken = stream.take(np.full((1, 2), np.inf, np.float32), sequence=3)
    assert not np.isfinite(taken.windows).any()


# --- late, double, backwards ---------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["sequence", "time"])
def test_what_came_before_is_dropped_and_told(by: str) -> None:
    stream, whole = Stream(form(4, 2)), signal(12)

    def at(first: int) -> dict[str, Any]:
        return {"sequence": first} if by == "sequence" else {"time_s": first / RATE_HZ}

    windows = feed(stream, whole[:6], **at(0))[0]
    ended, taken = feed(stream, whole[1:5], **at(1))
    assert (ended, taken.dropped, taken.reset) == ([], 4, None)
    ended, taken = feed(stream, whole[4:12], **at(4))
    assert taken.dropped == 2
    if by == "time":
        assert [taken.time_s(index) for index in range(3)] == pytest.approx([0.7, 0.9, 1.1])
    assert windows + ended == cut_all(whole, 4, 2)
    assert stream.place.dropped == 6


@pytest.mark.parametrize(
    ("where", "reset"),
    [({"sequence": 0}, Reset.RESTARTED), ({"sequence": 60}, Reset.RESTARTED), ({"time_s": 2.0}, Reset.CLOCK)],
)
def test_a_sender_that_goes_far_back_is_followed(where: dict[str, Any], reset: Reset) -> None:
    stream = Stream(form(4, 4))
    feed(stream, signal(99), sequence=1, time_s=0.1)
    windows, taken = feed(stream, signal(5), **where)
    assert (windows, taken.reset) == (cut_all(signal(5), 4, 4), reset)
    assert stream.place.sequence == (105 if reset is Reset.CLOCK else where["sequence"] + 5)


def test_the_senders_count_is_a_better_witness_than_a_clock_set_back() -> None:
    stream, whole = Stream(form(4, 4)), signal(8)
    feed(stream, whole[:4], sequence=0, time_s=1000.0)
    windows, taken = feed(stream, whole[4:], sequence=4, time_s=1.0)
    assert (windows, taken.reset, taken.dropped) == (cut_all(whole, 4, 4)[1:], None, 0)
    assert taken.time_s(0) == pytest.approx(1.3)


def test_a_clock_that_says_more_passed_than_was_counted_is_a_gap() -> None:
    stream = Stream(form(4, 4))
    feed(stream, signal(4), sequence=0, time_s=0.0)
    assert stream.take(signal(4), sequence=4, time_s=0.7).made_up == 3
    assert stream.take(signal(4), sequence=4, time_s=9.0).reset is Reset.GAP


@pytest.mark.parametrize("off", [0.4, -0.4, 1.9, -1.9])
def test_a_rate_that_is_a_little_off_is_no_gap(off: float) -> None:
    stream = Stream(form(4, 4))
    count = 150 if abs(off) > 1 else 10  # a hundredth of so many samples, and half a sample
    feed(stream, signal(count), time_s=0.0)
    taken = stream.take(signal(10), time_s=(count + off) / RATE_HZ)
    assert (taken.made_up, taken.dropped, taken.reset) == (0, 0, None)


@pytest.mark.parametrize("time_s", [1e308, -1e308, 1e15])
def test_absurd_times_do_no_harm(time_s: float) -> None:
    stream = Stream(form())
    feed(stream, signal(6), time_s=time_s)
    for other in (-time_s, 0.0, time_s):
        feed(stream, signal(6), time_s=other)
    assert bounded(stream, stream._form)


def test_nothing_is_no_sample() -> None:
    stream = Stream(form())
    windows, taken = feed(stream, signal(0), sequence=7)
    assert (windows, taken.reset, stream.begun) == ([], None, False)


@pytest.mark.parametrize(
    ("why", "sequence", "told"),
    [
        (Reset.STARTED, None, Reset.STARTED),
        (Reset.STARTED, 0, Reset.STARTED),
        (Reset.STARTED, 50, Reset.MOVED),
        (Reset.EVICTED, 50, Reset.EVICTED),
    ],
)
def test_a_stream_says_why_it_begins(why: Reset, sequence: int | None, told: Reset) -> None:
    stream = Stream(form(), why)
    taken = stream.take(signal(3), sequence=sequence)
    assert (taken.reset, taken.place.sequence) == (told, (sequence or 0) + 3)
    stream.keep(taken)
    assert stream.take(signal(3), sequence=stream.place.sequence).reset is None


# --- moving --------------------------------------------------------------------------------------------------
def test_hostile_bytes_are_refused() -> None:
    of = form(8, 4)
    stream = Stream(of)
    feed(stream, signal(13), sequence=0, time_s=1.0)
    good = stream.dump()
    assert Stream.load(of, good).dump() == good
    for size in range(len(good)):
        with pytest.raises(ContractError):
            Stream.load(of, good[:size])
    for place in range(len(good)):
        with pytest.raises(ContractError):
            Stream.load(of, good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
    with pytest.raises(MalformedMessage):
        Stream.load(of, good + b"\0")


def sealed(raw: bytes) -> bytes:
    return raw[:-4] + zlib.crc32(raw[:-4]).to_bytes(4, "little")


def test_bytes_that_were_sealed_anew_are_still_checked() -> None:
    of = form(8, 4)
    stream = Stream(of)
    feed(stream, signal(13), sequence=0, time_s=1.0)
    good = stream.dump()
    with pytest.raises(UnsupportedVersion, match="version 2"):
        Stream.load(of, sealed(good[:8] + b"\2\0" + good[10:]))
    with pytest.raises(MalformedMessage, match="not those of this service"):
        Stream.load(form(8, 2), good)
    for name, value in (("filled", 8), ("filled", 2**60), ("skip", 1), ("samples", 2**63), ("last_count", 2**40),
                        ("next_time_s", math.inf)):  # fmt: skip
        forged = Stream(of)
        forged.place = replace(stream.place, **{name: value})
        with pytest.raises(MalformedMessage, match="contradict"):
            Stream.load(of, forged.dump())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ContractError):
        Stream.load(form(), raw)
    with pytest.raises(ContractError):
        Stream.load(form(), sealed(Stream(form()).dump()[:42] + raw + b"\0" * 4))


# --- many streams --------------------------------------------------------------------------------------------
def fill(streams: Streams, name: str, first: int = 0, count: int = 3) -> Taken:
    stream = streams.open(name)
    taken = stream.take(signal(count, first), sequence=first)
    streams.keep(stream, taken)
    return taken


def test_a_thousand_streams_are_as_many_states_as_allowed() -> None:
    streams = Streams(form(max_streams=64))
    for number in range(1000):
        assert fill(streams, f"s{number}").reset is Reset.STARTED
        assert len(streams) <= 64
        assert len(streams._gone) <= 64
    assert streams.names() == tuple(f"s{number}" for number in range(936, 1000))
    numbers = streams.statistics()
    assert (numbers["streams"], numbers["streams_begun"], numbers["streams_evicted"]) == (64, 1000, 936)


def test_the_stream_unused_longest_gives_way_and_is_told() -> None:
    streams = Streams(form(max_streams=2))
    fill(streams, "a")
    fill(streams, "b")
    fill(streams, "a", 3)
    fill(streams, "c")
    assert streams.names() == ("a", "c")
    assert streams.find("b") is None
    assert fill(streams, "b", 3).reset is Reset.EVICTED
    assert fill(streams, "b", 6).reset is None


def test_a_busy_stream_never_gives_way() -> None:
    streams = Streams(form(max_streams=2))
    fill(streams, "a")
    fill(streams, "b")
    streams.open("c", busy={"a"})
    assert streams.find("a") is not None
    with pytest.raises(Overloaded, match="all 2 streams are busy"):
        streams.open("d", busy={"a", "c"})


def test_large_windows_allow_fewer_streams_and_shorter_requests() -> None:
    large = form(1_000_000, 1_000_000, max_streams=4096)
    assert large.max_streams * 2 * large.plan.length * large.sample_bytes <= MAX_KEPT_BYTES
    assert large.max_samples == 2_000_000
    assert form(10**8, 1).max_streams == 1
    assert form(10**8, 1).max_samples == 10**8
    assert form(4, 2).max_samples == MAX_TAKEN_WINDOWS * 2
    assert form(4, 2, max_gap_s=1e9).max_gap == form(4, 2).max_samples


def test_an_ended_stream_begins_like_a_new_one() -> None:
    streams = Streams(form())
    fill(streams, "a")
    assert streams.end("a") is not None
    assert streams.end("a") is None
    assert fill(streams, "a").reset is Reset.STARTED


def test_streams_move_in_the_middle_of_a_window() -> None:
    old, new = Streams(form(4, 2)), Streams(form(4, 2))
    fill(old, "a")
    old.open("empty")
    assert old.names() == ("a",)
    for name in ("empty", "unknown"):
        with pytest.raises(KeyError):
            old.export(name)
    assert new.adopt("a", old.export("a"))
    taken = fill(new, "a", 3)
    assert (taken.reset, len(taken.windows), new.statistics()["streams_adopted"]) == (None, 2, 1)
    assert not new.adopt("a", old.export("a"))  # what lives here is newer
    new.lose("a")
    assert fill(new, "a", 6).reset is Reset.MOVED


def test_adopting_keeps_the_bound() -> None:
    old, new = Streams(form()), Streams(form(max_streams=2))
    for number in range(5):
        fill(old, f"s{number}")
        assert new.adopt(f"s{number}", old.export(f"s{number}"))
    assert new.names() == ("s3", "s4")
