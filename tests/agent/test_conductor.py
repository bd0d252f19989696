import numpy as np

from agent.conductor import DecisionClock
from agent.observation import RECORD


def records(*times_s: float):
    made = np.zeros(len(times_s), RECORD)
    made["data_time_s"] = times_s
    return made


def test_the_clock_of_the_data_moves_with_it_and_never_back() -> None:
    clock = DecisionClock("data", 5.0)
    assert clock.now_s() == 5.0
    seen = [(part["data_time_s"].tolist(), clock.now_s()) for part in clock.slices(records(10.1, 10.9, 11.2, 3.0))]
    assert seen == [([10.1, 10.9], 10.9), ([11.2], 11.2), ([3.0], 11.2)]


def test_records_without_a_time_do_not_move_it() -> None:
    clock = DecisionClock("data", 5.0)
    assert [len(part) for part in clock.slices(records(np.nan, np.nan))] == [2]
    assert clock.now_s() == 5.0
    assert [len(part) for part in clock.slices(records())] == [0]


def test_the_wall_clock_takes_batches_as_they_come() -> None:
    clock = DecisionClock("wall", 0.0)
    assert [len(part) for part in clock.slices(records(1.0, 2.0, 3.0))] == [3]
    assert clock.now_s() > 1e9
