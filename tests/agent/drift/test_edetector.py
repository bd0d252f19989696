"""The bets against a slow second writing of their definitions, and the algebra that makes them fair."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drift.edetector import (
    AXIS_BETS,
    BATCH_ROWS,
    CLIP,
    MEAN_BETS,
    PAIR_BETS,
    SQUARE_CLIP,
    VARIANCE_BETS,
    Batch,
    EDetector,
    Leading,
    counter_bets,
    quadratic_bet,
)
from agent.drift.models import StationaryModel
from tests.agent.drift.stationary_streams import fit, gaussian

W = 4


@pytest.fixture(scope="module")
def model() -> StationaryModel:
    mixing = np.eye(W) + 0.4 * np.eye(W, k=1)
    classes = np.random.default_rng(2).choice(3, 3000, p=[0.5, 0.3, 0.2])
    return fit(gaussian(3000, seed=1) @ mixing, predicted=classes, labels=3)


def batches(count: int, *, seed: int, shift: float = 0.0) -> list[Batch]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        z = np.clip(generator.normal(shift, 1.1, (BATCH_ROWS, W)), -CLIP, CLIP).astype(np.float32)
        counts = (generator.random((3, W)) < 0.1) * generator.integers(1, 3, (3, W)) * 1.0
        made.append(Batch(z, counts, generator.integers(-1, 4, (BATCH_ROWS, 1))))
    return made


class Slow:
    """Row by row, bet by bet, in Python's own numbers; families by name, each a list of exponents of one block."""

    def __init__(self, model: StationaryModel) -> None:
        self.model = model
        self.seen = [0.0] * 4

    def exponents(self, batch: Batch, fast: EDetector) -> dict[str, list[float]]:
        """`fast` lends what was learnt from earlier blocks: directions, pair, axis."""
        m, rows = self.model, batch.z.astype(float)
        found: dict[str, list[float]] = {}
        squares = [[min(value**2, SQUARE_CLIP) for value in row] for row in rows.tolist()]
        u = [
            [(q - float(m.variance_centre[j])) / float(m.variance_scale[j]) for j, q in enumerate(row)]
            for row in squares
        ]
        found["mean"] = [
            sum(bet * row[j] - float(m.mean_charge[at, j]) for row in rows.tolist())
            for at, bet in enumerate(MEAN_BETS) for j in range(W)
        ]  # fmt: skip
        found["variance"] = [
            sum(bet * row[j] - float(m.variance_charge[at, j]) for row in u)
            for at, bet in enumerate(VARIANCE_BETS) for j in range(W)
        ]  # fmt: skip
        spread = [max(-CLIP, min(CLIP, (sum(row) - m.dense_centre) / m.dense_scale)) for row in u]
        found["spread"] = [
            sum(bet * one - float(m.dense_charge[at]) for one in spread) for at, bet in enumerate(VARIANCE_BETS)
        ]
        found["counter"] = []
        for number in range(3):
            for level in (0, 1):
                for j in range(W):
                    p, happened = float(m.rates[number, j]), float(batch.counts[number, j])
                    p1 = [max(0.5, (1 + p) / 2), math.sqrt(p * max(0.5, (1 + p) / 2))][level]
                    rest = BATCH_ROWS - happened
                    found["counter"].append(happened * math.log(p1 / p) + rest * math.log((1 - p1) / (1 - p)))
        white = rows @ m.whitening.astype(float)
        direction, lengths = fast._directions()
        found["level"] = []
        for at, length in enumerate(lengths):
            w = np.zeros(W) if direction is None else direction[at].astype(float)
            x = [float(row @ w) - length * m.radius for row in white]
            found["level"].append(self.quadratic(x, m.inflation * length**2))
        i, j, sign = fast._oddest_pair()
        mean, square = (float(one[i, j]) for one in (fast._pair_mean, fast._pair_square))
        away = [
            sign * (max(-CLIP, min(CLIP, row[i] * row[j])) - mean) - m.pair_band * math.sqrt(square)
            for row in white.tolist()
        ]
        found["pair"] = [self.quadratic([bet * one for one in away], bet * bet * square) for bet in PAIR_BETS]
        most = m.inflation + m.radius**2
        found["axis"] = [
            sum(math.log(1 + bet * (float(row @ fast._axis) ** 2 / most - 1)) for row in white) for bet in AXIS_BETS
        ]
        total = sum(self.seen)
        guess = [(self.seen[v] + 16 * float(m.bin_share[0, v])) / (total + 16) for v in range(4)]
        codes = batch.codes[:, 0].tolist()
        found["bins"] = [sum(math.log(guess[v] / float(m.bin_bound[0, v])) for v in codes if v >= 0)]
        keep = 1 - 2 / (256 / BATCH_ROWS + 1)
        self.seen = [keep * seen + codes.count(v) for v, seen in enumerate(self.seen)]
        return found

    @staticmethod
    def quadratic(x: list[float], variance: float) -> float:
        return math.log(math.prod((1 + one + one * one / 3) / (1 + variance / 3) for one in x))


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_every_bet_is_the_one_defined_and_adds_up_as_shiryaev_and_roberts_say(
    model: StationaryModel, shift: float
) -> None:
    fast, slow = EDetector(model), Slow(model)
    wealth: dict[str, list[float]] = {}
    for batch in batches(12, seed=3, shift=shift):
        expected = slow.exponents(batch, fast)
        evidence = fast.update(batch)
        for family, exponents in expected.items():
            before = wealth.get(family, [0.0] * len(exponents))
            wealth[family] = [(r + 1) * math.exp(e) for r, e in zip(before, exponents, strict=True)]
            got = fast.wealth[fast.family == family]
            capped = np.minimum(wealth[family], fast._ceiling)
            assert got == pytest.approx(capped, rel=2e-3, abs=1e-6), family
            wealth[family] = capped.tolist()
        average = sum(float(fast._weight[fast.family == family] @ wealth[family]) for family in wealth)
        assert evidence == pytest.approx(average / (model.claim_rows / BATCH_ROWS), rel=2e-3)


def test_the_weights_of_the_average_sum_to_one(model: StationaryModel) -> None:
    assert float(EDetector(model)._weight.sum()) == pytest.approx(1.0, abs=1e-6)


LAWS = st.lists(st.tuples(st.floats(-8, 8), st.floats(0.05, 1)), min_size=2, max_size=6)


@given(law=LAWS)
def test_the_quadratic_bet_is_fair_for_any_law_with_mean_at_most_zero(law: list[tuple[float, float]]) -> None:
    total = sum(chance for _, chance in law)
    values = np.array([value for value, _ in law])
    chances = np.array([chance / total for _, chance in law])
    values -= max(float(chances @ values), 0.0)  # a mean of at most 0
    mean = float(chances @ values)
    if mean < -3:
        return
    variance = float(chances @ (values - mean) ** 2)
    expected = sum(p * math.exp(quadratic_bet(np.array([x]), variance)) for x, p in zip(values, chances, strict=True))
    assert expected <= 1 + 1e-9


@given(x=st.floats(-50, 50))
def test_the_quadratic_bet_is_above_delyons(x: float) -> None:
    assert math.log(1 + x + x * x / 3) >= x - x * x / 6 - 1e-9


@given(rate=st.floats(1e-5, 0.95), share=st.floats(0, 1))
def test_a_counters_bet_is_fair_for_every_rate_up_to_the_bound(rate: float, share: float) -> None:
    true = rate * share
    for likely in counter_bets(np.array([rate])):
        p1 = float(likely[0])
        assert rate < p1 < 1
        assert true * p1 / rate + (1 - true) * (1 - p1) / (1 - rate) <= 1 + 1e-9


def test_the_charges_are_fair_on_rows_the_reference_has_never_seen(model: StationaryModel) -> None:
    """On two million fresh values of the same law each linear bet of one row has a mean of at most about 1."""
    mixing = np.eye(W) + 0.4 * np.eye(W, k=1)
    x = gaussian(500_000, seed=9) @ mixing
    z = np.clip((x - model.centre) / model.scale, -CLIP, CLIP) - model.offset
    u = (np.minimum(z * z, SQUARE_CLIP) - model.variance_centre) / model.variance_scale
    for bets, charge, s in ((MEAN_BETS, model.mean_charge, z), (VARIANCE_BETS, model.variance_charge, u)):
        for bet, per_row in zip(bets, charge, strict=True):
            assert (np.exp(bet * s - per_row).mean(axis=0) <= 1.004).all()


def test_a_bet_on_the_return_is_fair_while_the_change_is_there_and_grows_after_it(model: StationaryModel) -> None:
    detector = EDetector(model)
    nothing = np.zeros(0, dtype=np.float32)
    away = Leading("mean", 1, -1, 1.0, 0.8, 4.0, nothing)

    def product(shift: float, seed: int) -> float:
        (batch,) = batches(1, seed=seed)
        z = np.random.default_rng(seed).normal(shift, 1.0, (BATCH_ROWS, W)).clip(-CLIP, CLIP).astype(np.float32)
        return detector.return_bet(away, batch._replace(z=z))

    still = [math.exp(product(0.4, seed)) for seed in range(3000)]
    back = [product(0.0, seed) for seed in range(300)]
    assert np.mean(still) <= 1.0 + 4 * np.std(still) / math.sqrt(len(still))
    assert np.mean(back) > 0.3
