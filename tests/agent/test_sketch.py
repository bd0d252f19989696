"""The sketch keeps its stated error against exact quantiles, and its merge is exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import MalformedMessage
from agent.contract.messages import LatencySketch
from agent.sketch import HIGHEST_US, LogSketch

LATENCIES = st.lists(st.floats(1.0, 1e9), min_size=1, max_size=200)
QUANTILES = st.floats(0.0, 1.0)


def sketch_of(values: list[float], relative_error: float = 0.02) -> LogSketch:
    sketch = LogSketch(relative_error)
    for value in values:
        sketch.add(value)
    return sketch


@given(LATENCIES, QUANTILES, st.sampled_from([0.005, 0.02, 0.1]))
def test_every_quantile_is_within_the_stated_relative_error(values: list[float], q: float, error: float) -> None:
    exact = sorted(values)[int(np.floor(q * (len(values) - 1)))]
    answer = sketch_of(values, error).quantile(q)
    assert answer is not None
    assert abs(answer - exact) <= error * exact * (1 + 1e-9)


@given(LATENCIES, LATENCIES, LATENCIES)
def test_merging_in_any_order_equals_the_sketch_of_all_values(a: list[float], b: list[float], c: list[float]) -> None:
    forwards, backwards = LogSketch(), LogSketch()
    for part in (a, b, c):
        forwards.merge(sketch_of(part))
    for part in (c, b, a):
        backwards.merge(sketch_of(part))
    assert forwards.fields() == backwards.fields() == sketch_of(a + b + c).fields()


@given(LATENCIES)
def test_the_message_form_round_trips_through_json_and_the_contract(values: list[float]) -> None:
    sketch = sketch_of(values)
    message = LatencySketch(service="wrist", engine="wrist", **sketch.fields())
    document = json.loads(message.model_dump_json())
    assert LogSketch.from_fields(document).fields() == sketch.fields()


def test_an_array_is_counted_like_its_values_one_by_one() -> None:
    values = np.random.default_rng(1).lognormal(6.0, 1.0, size=(50, 40))
    at_once = LogSketch()
    at_once.add_many(values)
    assert at_once.fields() == sketch_of(values.ravel().tolist()).fields()


def test_a_repeated_value_counts_as_often_as_said() -> None:
    sketch = LogSketch()
    sketch.add(100.0, count=3)
    sketch.add(5.0, count=0)
    assert (sketch.count, sketch.total_us, sketch.mean_us()) == (3, 300, 100.0)


def test_an_empty_sketch_knows_no_quantile() -> None:
    assert LogSketch().quantile(0.5) is None
    assert LogSketch().mean_us() is None
    LogSketch().add_many(np.empty(0))


def test_the_number_of_buckets_is_bounded_from_nanoseconds_to_years() -> None:
    sketch = LogSketch()
    sketch.add_many(np.logspace(-6, 15, 20_000))
    assert len(sketch.buckets) <= 560
    assert sketch.maximum_us == HIGHEST_US


def test_a_copy_does_not_follow_its_original() -> None:
    sketch = sketch_of([10.0])
    twin = sketch.copy()
    sketch.add(20.0)
    assert (twin.count, sketch.count) == (1, 2)


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_latency_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="cannot count"):
        LogSketch().add(value)
    with pytest.raises(ValueError, match="cannot count"):
        LogSketch().add_many(np.array([1.0, value]))


def test_sketches_of_different_errors_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot merge"):
        LogSketch(0.01).merge(LogSketch(0.02))


def test_a_relative_error_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="relative_error"):
        LogSketch(1.0)
    with pytest.raises(ValueError, match="quantile"):
        LogSketch().quantile(1.5)


@pytest.mark.parametrize(
    "damage",
    [
        {"count": 5},
        {"buckets": {"1": -1}},
        {"buckets": {"99999": 1}},
        {"buckets": {"x": 1}},
        {"relative_error": 2},
        {"buckets": 7},
    ],
)
def test_a_damaged_message_is_refused(damage: dict[str, object]) -> None:
    fields = {**sketch_of([10.0]).fields(), **damage}
    with pytest.raises(MalformedMessage):
        LogSketch.from_fields(fields)
