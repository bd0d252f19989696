import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drift import GuardCounters
from agent.drift.counters import HISTORY_ROWS
from agent.drift.thinning import Allowance, Repetition

KINDS = ("dead", "stuck", "scale", "not_finite", "out_of_range")


def findings(rows, news):
    counters = GuardCounters(("a", "b"), {"a": "one", "b": "two"})
    return [
        (number, finding)
        for number, row in enumerate(rows)
        if news[number]
        for finding in counters.update(**dict(zip(KINDS, row, strict=True)))
    ]


@given(
    runs=st.lists(st.tuples(st.tuples(*[st.integers(0, 3)] * 5), st.integers(1, 30)), max_size=8),
    cuts=st.lists(st.integers(0, 200), max_size=4),
)
def test_leaving_out_repetitions_changes_no_finding_and_no_moment(
    runs: list[tuple[tuple[int, ...], int]], cuts: list[int]
) -> None:
    rows = [bits for bits, count in runs for _ in range(count)]
    repetition = Repetition(HISTORY_ROWS, 5)
    parts = np.split(np.array(rows, np.uint64).reshape(-1, 5), sorted(min(cut, len(rows)) for cut in cuts))
    news = np.concatenate([repetition.news(part) for part in parts])
    assert findings(rows, news) == findings(rows, [True] * len(rows))


def test_of_many_equal_rows_only_as_many_as_matter_are_new() -> None:
    repetition = Repetition(8, 1)
    ones = np.ones((1000, 1), np.uint64)
    assert not repetition.news(np.zeros((5, 1), np.uint64)).any()
    assert [int(repetition.news(ones).sum()) for _ in range(3)] == [8, 0, 0]
    repetition.forget()
    assert repetition.news(ones).sum() == 8


def test_an_allowance_is_paid_by_time_and_never_saved_beyond_its_bound() -> None:
    allowance = Allowance(100.0, 50)
    assert allowance.newest(80, np.array([0])) == slice(30, None)
    assert allowance.newest(80, np.array([0])) == slice(80, None)
    assert allowance.newest(80, np.array([100_000_000])) == slice(70, None)
    assert allowance.newest(80, np.array([10**12])) == slice(30, None)


@pytest.mark.parametrize(("count", "step"), [(10, 1), (50, 1), (51, 2), (500, 10)])
def test_thinning_takes_every_kth_row(count: int, step: int) -> None:
    assert Allowance(100.0, 50).thin(count, np.array([0])) == slice(None, None, step)
    spent = Allowance(100.0, 1)
    spent.thin(1, np.array([0]))
    assert spent.thin(9, np.array([0])) == slice(0)
