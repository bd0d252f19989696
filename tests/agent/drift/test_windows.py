import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.errors import ContractError
from agent.drift import FixedPoint, MomentWindow

FIXED = FixedPoint(centre=(0.0, 1.0, -5.0), scale=(1.0, 0.1, 20.0))


def window_of(rows: np.ndarray, predicted: np.ndarray, *, with_products: bool = True) -> MomentWindow:
    return MomentWindow.empty(FIXED, classes=3, with_products=with_products).add(rows, predicted)


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_merging_any_parts_in_any_order_is_the_pooled_window_bit_for_bit(seed: int, cuts: list[int], order) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(0.0, 30.0, (60, 3))
    rows[generator.random((60, 3)) < 0.05] = np.nan
    predicted = generator.integers(-1, 4, 60)
    edges = [0, *sorted(cuts), 60]
    parts = [window_of(rows[a:b], predicted[a:b]) for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    merged = MomentWindow.empty(FIXED, classes=3, with_products=True)
    for part in parts:
        merged = merged.merge(part)
    assert merged == window_of(rows, predicted)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_a_number_becomes_the_nearest_step_within_the_clip(values: list[float]) -> None:
    fixed = FixedPoint((2.0,), (0.5,), clip=4.0, fraction_bits=10)
    for value in values:
        exact = min(max((value - 2.0) / 0.5, -4.0), 4.0) * 1024
        step = int(fixed.quantize(np.array([[value]]))[0, 0])
        assert abs(step - exact) <= 0.5
        assert abs(step) <= 4096


def test_mean_and_sd_come_back_within_a_rounding_step() -> None:
    rows = np.random.default_rng(3).normal((0.2, 1.01, -3.0), (0.5, 0.04, 9.0), (4000, 3))
    window = window_of(rows, np.zeros(4000, dtype=int))
    assert window.mean() == pytest.approx(rows.mean(axis=0), abs=0.5 / 1024 * 20)
    assert window.sd() == pytest.approx(rows.std(axis=0), rel=5e-3)


def test_a_row_that_is_not_finite_is_counted_and_adds_nothing_else() -> None:
    window = window_of(np.array([[np.nan, 1.0, 1.0], [0.0, 1.0, -5.0]]), np.array([0, 2]))
    assert (window.rows, window.sums, window.classes) == (1, (0, 0, 0), (0, 0, 1))
    assert window.counters == {"not_finite": 1}


def test_odd_rows_are_counted_by_name_and_the_names_are_sorted() -> None:
    empty = MomentWindow.empty(FIXED)
    nothing = np.zeros((0, 3)), np.zeros(0, dtype=int)
    merged = empty.add(*nothing, {"stuck:gx": 2}).merge(empty.add(*nothing, {"dead:ax": 1, "stuck:gx": 1}))
    assert list(merged.counters.items()) == [("dead:ax", 1), ("stuck:gx", 3)]


@given(seed=st.integers(0, 2**32 - 1))
def test_products_are_those_of_the_integers_one_pair_after_another(seed: int) -> None:
    rows = np.random.default_rng(seed).normal(0.0, 3.0, (20, 3))
    window = window_of(rows, np.zeros(20, dtype=int))
    steps = [[int(number) for number in row] for row in FIXED.quantize(rows)]
    pairs = ((0, 1), (0, 2), (1, 2))
    assert window.products == tuple(sum(row[i] * row[j] for row in steps) for i, j in pairs)
    assert window_of(rows, np.zeros(20, dtype=int), with_products=False).products == ()


def test_the_correlation_comes_back() -> None:
    generator = np.random.default_rng(3)
    rows = generator.multivariate_normal((0.0, 1.0, -5.0), [[1, 0.06, 0], [0.06, 0.01, 0], [0, 0, 400]], 5000)
    window = window_of(rows, np.zeros(5000, dtype=int))
    assert window.correlation() == pytest.approx(np.corrcoef(rows.T), abs=0.02)
    assert np.isnan(MomentWindow.empty(FIXED, with_products=True).correlation()).all()


def test_a_window_with_products_and_one_without_refuse_to_merge() -> None:
    with pytest.raises(ContractError):
        MomentWindow.empty(FIXED).merge(MomentWindow.empty(FIXED, with_products=True))


def test_an_empty_window_knows_no_mean() -> None:
    assert np.isnan(MomentWindow.empty(FIXED).mean()).all()


def test_windows_of_different_references_refuse_to_merge() -> None:
    other = FixedPoint((0.0, 1.0, -5.0), (1.0, 0.1, 21.0))
    with pytest.raises(ContractError):
        MomentWindow.empty(FIXED).merge(MomentWindow.empty(other))


@pytest.mark.parametrize(
    "wrong",
    [
        {"centre": (0.0,), "scale": (0.0,)},
        {"centre": (0.0, 1.0), "scale": (1.0,)},
        {"centre": (), "scale": ()},
        {"centre": (0.0,), "scale": (1.0,), "fraction_bits": 21},
        {"centre": (0.0,), "scale": (1.0,), "clip": 0.0},
    ],
)
def test_a_fixed_point_that_cannot_work_is_refused(wrong: dict) -> None:
    with pytest.raises(ContractError):
        FixedPoint(**wrong)
