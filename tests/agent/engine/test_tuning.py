"""How many threads: the table."""

from __future__ import annotations

import pytest

from agent.engine.tuning import Times, best, candidates, times


@pytest.mark.parametrize(
    ("p50_us", "cores", "expected"),
    [
        (6.0, 8, ()),  # waking others costs more than the run
        (1000.0, 8, ()),
        (1001.0, 8, (7,)),
        (50_000.0, 4, (3,)),
        (50_000.0, 2, ()),  # one of two cores is left to the rest
        (50_000.0, 1, ()),
    ],
)
def test_more_threads_are_tried_for_slow_models_where_there_are_cores(
    p50_us: float, cores: int, expected: tuple[int, ...]
) -> None:
    assert candidates(Times(p50_us, 2 * p50_us), cores) == expected


@pytest.mark.parametrize(
    ("p95_us", "expected"),
    [
        ({1: 5000.0}, 1),
        ({1: 5000.0, 3: 2000.0}, 3),
        ({1: 5000.0, 3: 4600.0}, 1),  # hardly faster is not worth two more cores
        ({1: 5000.0, 3: 9000.0}, 1),
        ({3: 2000.0, 1: 5000.0}, 3),
    ],
)
def test_threads_must_pay(p95_us: dict[int, float], expected: int) -> None:
    assert best({threads: Times(p95 / 2, p95) for threads, p95 in p95_us.items()}) == expected


def test_times_are_median_and_95th_percentile() -> None:
    assert times([5.0]) == Times(5.0, 5.0)
    assert times([float(n) for n in range(100, 0, -1)]) == Times(50.0, 95.0)
