"""Inputs that repeat and data at another rate: who is told of, when, and what is no fault."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drift import Finding, SenderCounters
from agent.drift.senders import FORGOTTEN_ROWS, MAX_SENDERS, REPEATS, SPAN

HOP_S = 1.28


def views(count: int, seed: int = 0) -> list[bytes]:
    return [row.tobytes() for row in np.random.default_rng(seed).normal(size=(count, 24)).astype("<f4")]


def fed(counters: SenderCounters, rows: list[dict[str, object]], source: int = 0) -> list[tuple[int, str, bool]]:
    return [
        (number, finding.kind, finding.raised)
        for number, row in enumerate(rows, start=1)
        for finding in counters.update(**{"source": source, **row})  # type: ignore[arg-type]
    ]


def timed(times_s: "np.ndarray | list[float]", **more: object) -> list[dict[str, object]]:
    return [{"time_s": float(time_s), **more} for time_s in times_s]


# --- repeated ----------------------------------------------------------------------------------------------
def test_a_frozen_buffer_is_told_of_once_and_its_end_once() -> None:
    rows = views(20)
    story = [*rows, *[rows[-1]] * 30, *views(20, seed=1)]
    assert fed(SenderCounters(0.0), [{"view": view} for view in story]) == [
        (20 + REPEATS, "repeated", True), (50 + REPEATS, "repeated", False)
    ]  # fmt: skip


def test_windows_that_come_twice_or_are_sent_again_are_no_fault() -> None:
    twice = [{"view": view} for view in views(200) for _ in range(2)]
    assert fed(SenderCounters(0.0), twice) == []


def test_frozen_senders_in_turn_are_found_and_counted() -> None:
    counters = SenderCounters(0.0)
    assert [kind for _, kind, _ in fed(counters, [{"view": view} for view in views(5) * 10])] == ["repeated"]
    assert counters.repeated == 45


def test_a_frozen_stream_is_found_beside_one_that_moves() -> None:
    counters, (frozen,) = SenderCounters(0.0), views(1, seed=9)
    found: list[Finding] = []
    for view in views(REPEATS + 1):
        found += [*counters.update(1, view=view), *counters.update(2, view=frozen)]
    assert [(one.kind, one.channels, one.raised) for one in found] == [("repeated", (), True)]
    assert counters.statistics() == {"repeated": 1, "rate": 0}


def test_rows_without_a_view_change_nothing() -> None:
    (view,) = views(1)
    story = [{"view": view}, {}] * (REPEATS + 1)
    assert fed(SenderCounters(0.0), story) == [(2 * REPEATS + 1, "repeated", True)]


# --- rate --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.25, 4.0])
def test_another_rate_is_found_within_two_spans_and_its_end_too(ratio: float) -> None:
    wrong = np.arange(2 * SPAN + 1) * HOP_S * ratio
    right = wrong[-1] + np.arange(1, 60) * HOP_S
    counters = SenderCounters(HOP_S)
    (began,) = fed(counters, timed(wrong))
    assert began == (2 * SPAN + 1, "rate", True)
    ((row, kind, raised),) = fed(counters, timed(right))
    assert (kind, raised) == ("rate", False)
    assert row <= SPAN + 8


def test_the_finding_says_how_far_it_is_off() -> None:
    counters = SenderCounters(HOP_S)
    findings = [one for time_s in np.arange(40) * 0.64 for one in counters.update(3, time_s=float(time_s))]
    assert [one.numbers["ratio"] for one in findings] == [pytest.approx(0.5)]
    assert findings[0].text == "windows follow each other every 0.64 s of the data's time, not every 1.28 s"


@given(st.integers(0, 2**32 - 1), st.lists(st.floats(-5000, 100_000), max_size=3))
def test_jitter_drift_of_a_crystal_pauses_and_restarts_are_no_other_rate(seed: int, jumps_s: list[float]) -> None:
    generator = np.random.default_rng(seed)
    times_s = 1e9 + np.arange(121) * HOP_S * 1.005 + generator.uniform(-0.5, 0.5, 121) * HOP_S
    for at, jump_s in zip((10, 50, 90), jumps_s, strict=False):
        times_s[at:] += jump_s
    assert fed(SenderCounters(HOP_S), timed(times_s)) == []


def test_two_streams_whose_windows_alternate_are_two_senders() -> None:
    counters = SenderCounters(HOP_S)
    found = [
        finding
        for step in range(200)
        for source in (1, 2)
        for finding in counters.update(source, time_s=(step + source / 2) * HOP_S)
    ]
    assert found == []


def test_a_stream_that_has_to_be_patched_all_the_time_comes_at_another_rate() -> None:
    times_s = np.arange(100) * HOP_S
    rows = [*timed(times_s[:30], patched=True), *timed(times_s[30:])]
    assert fed(SenderCounters(HOP_S), rows) == [(8, "rate", True), (38, "rate", False)]
    now_and_then = [row | {"patched": number % 4 == 0} for number, row in enumerate(timed(times_s))]
    assert fed(SenderCounters(HOP_S), now_and_then) == []


def test_without_a_hop_no_rate_is_judged() -> None:
    assert fed(SenderCounters(0.0), timed(np.arange(100) * 3.0, patched=True)) == []


# --- bounds and restarts -----------------------------------------------------------------------------------
def test_who_leaves_takes_the_finding_along() -> None:
    counters = SenderCounters(HOP_S)
    assert fed(counters, timed(np.arange(40) * 9.0), source=7) == [(33, "rate", True)]
    good = timed(np.arange(FORGOTTEN_ROWS + 50) * HOP_S)
    assert [(kind, raised) for _, kind, raised in fed(counters, good, source=8)] == [("rate", False)]
    for source in range(5 * MAX_SENDERS):
        counters.update(source, time_s=0.0)
    assert counters.statistics() == {"repeated": 0, "rate": 0}


def test_a_restart_keeps_what_is_raised_and_clears_it_in_time() -> None:
    counters, (frozen,) = SenderCounters(HOP_S), views(1)
    fed(counters, timed(np.arange(40) * 9.0, view=frozen), source=7)
    state = json.loads(json.dumps(counters.state()))
    again = SenderCounters(HOP_S)
    again.restore(state)
    assert again.statistics() == counters.statistics() == {"repeated": 1, "rate": 1}
    rows = [row | {"view": view} for row, view in zip(timed(np.arange(60) * HOP_S), views(60, seed=3), strict=True)]
    assert [(kind, raised) for _, kind, raised in fed(again, rows, source=7)] == [
        ("repeated", False),
        ("rate", False),
    ]


def test_a_time_that_is_no_number_is_nothing() -> None:
    assert fed(SenderCounters(HOP_S), timed([math.nan] * 100)) == []
