"""Budgets are judged with hysteresis, and the stated false-alarm figure is the binomial's."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from agent.decisions.budget import LatencyBudget, Limit


def edges(budget: LatencyBudget, over: list[bool]) -> list[int]:
    return [number for number, one in enumerate(over, start=1) if budget.update(one)]


def test_the_stated_false_alarm_probability_is_the_binomial_tail() -> None:
    n, k = LatencyBudget.WINDOW, LatencyBudget.RAISE_OVER
    tail = sum(comb(n, i) * 0.05**i * 0.95 ** (n - i) for i in range(k, n + 1))
    assert tail == pytest.approx(9e-8, rel=0.05)


def test_requests_exactly_at_the_budget_raise_nothing_in_half_a_million() -> None:
    over = (np.random.default_rng(3).random(500_000) < 0.05).tolist()
    assert edges(LatencyBudget(1000.0), over) == []


def test_a_model_that_is_always_too_slow_is_found_after_thirty_requests() -> None:
    assert edges(LatencyBudget(1000.0), [True] * 500) == [LatencyBudget.RAISE_OVER]


def test_it_clears_only_after_a_whole_window_within_the_budget() -> None:
    budget = LatencyBudget(1000.0)
    edges(budget, [True] * 50)
    assert edges(budget, [False] * 1000) == [LatencyBudget.WINDOW - (LatencyBudget.CLEAR_OVER)]
    assert not budget.raised


def test_one_slow_request_in_ten_neither_raises_nor_clears() -> None:
    budget = LatencyBudget(1000.0)
    assert edges(budget, ([True] + [False] * 9) * 200) == []
    edges(budget, [True] * 50)
    assert edges(budget, ([True] + [False] * 9) * 200) == []


def test_the_numbers_say_how_many_of_how_many() -> None:
    budget = LatencyBudget(1000.0)
    edges(budget, [True, False, False, False])
    assert budget.numbers() == {"budget_us": 1000.0, "over": 1.0, "of_last": 4.0, "share_over": 0.25}
    budget.reset()
    assert budget.numbers()["share_over"] == 0.0


def readings(limit: Limit, *values: float | None) -> list[bool]:
    return [limit.update(value) for value in values]


def test_a_limit_raises_after_three_samples_and_clears_after_ten_clearly_below() -> None:
    limit = Limit(80.0)
    assert readings(limit, 81.0, 79.0, 81.0, 81.0, 81.0) == [False, False, False, False, True]
    assert readings(limit, *[79.0] * 100) == [False] * 100
    assert readings(limit, *[75.0] * 10) == [False] * 9 + [True]


def test_an_unknown_reading_changes_nothing() -> None:
    limit = Limit(80.0)
    assert readings(limit, 81.0, 81.0, None, 81.0) == [False, False, False, True]


def test_a_limit_of_zero_is_no_limit() -> None:
    assert readings(Limit(0.0), 1e9, 1e9, 1e9) == [False] * 3
