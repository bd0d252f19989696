"""What changed, by how much, whose fault it looks like: of changes whose answer is known beforehand."""

import json

import numpy as np
import pytest

from agent.contract.messages import DriftExplanation
from agent.drift import Explanation, Reference, RegimeMonitor, StationaryMonitor
from agent.drift.explanation import (
    BINS,
    MAX_DETAIL_BYTES,
    ChangedFeature,
    How,
    Scope,
    Trail,
    bars,
    details,
    histograms,
    lines,
    unit_of,
    words,
)
from agent.drift.reference import dump_reference, load_reference
from compressor.marginals import with_bins
from tests.agent.drift.stationary_streams import NAMES, feed, fit, gaussian, reference_of

CENTRE, SCALE = np.array([10.0, 0.0, -3.0, 0.0]), np.array([2.0, 1.0, 0.5, 1.0])
CHANNELS = {"channels": NAMES, "channel_of": np.arange(4, dtype=np.int16),
            "groups": {"flow": "pump", "heat": "pump", "tilt": "arm", "load": "arm"}}  # fmt: skip


@pytest.fixture(scope="module")
def steady() -> Reference:
    rows = CENTRE + SCALE * gaussian(4000, seed=1)
    reference = reference_of(fit(rows), **CHANNELS)
    return with_bins(reference, rows, np.full(len(rows), -1))


def explained(reference: Reference, change: np.ndarray) -> Explanation:
    """Of the finding that `change`, rows in standard deviations, raises after 400 calm rows."""
    monitor = StationaryMonitor(reference)
    feed(monitor, CENTRE + SCALE * gaussian(400, seed=2))
    found = feed(monitor, CENTRE + SCALE * change)
    assert found
    assert found[0][1].explanation is not None
    standing = monitor.explanation()
    assert standing is not None
    return standing


def test_a_shifted_mean_is_told_in_the_sensors_own_unit_and_blamed_on_its_channel(steady: Reference) -> None:
    told = explained(steady, gaussian(320, seed=3) + np.array([1.0, 0, 0, 0]))
    first = told.features[0]
    assert (first.feature, first.how, told.scope, told.blamed) == ("flow", How.SHIFT, Scope.ONE_SENSOR, "flow")
    assert first.shift == pytest.approx(2.0, abs=0.3)  # one standard deviation is 2 litres
    assert first.shift_sd == pytest.approx(1.0, abs=0.15)
    assert first.spread == pytest.approx(1.0, abs=0.15)
    assert first.share > 0.9
    assert 256 <= told.rows <= 400
    assert told.looked_at == 256
    assert (first.low, first.high) == (pytest.approx(2.0, abs=0.3), pytest.approx(18.0, abs=0.3))


def test_the_histograms_are_of_the_reference_and_of_the_rows_since_the_change(steady: Reference) -> None:
    told = explained(steady, gaussian(320, seed=3) + np.array([1.5, 0, 0, 0]))
    middle = (np.arange(BINS) + 0.5) / BINS * 8 - 4
    first, other = told.features[0], next(one for one in told.features if one.feature == "load")
    assert np.dot(first.reference, middle) == pytest.approx(0.0, abs=0.1)
    assert np.dot(first.now, middle) == pytest.approx(1.5, abs=0.2)
    assert np.dot(other.now, middle) == pytest.approx(0.0, abs=0.2)
    assert sum(first.now) == pytest.approx(1.0)


def test_a_doubled_spread_is_a_spread(steady: Reference) -> None:
    change = gaussian(320, seed=4) * np.array([1, 1, 2.0, 1])
    told = explained(steady, change)
    first = told.features[0]
    assert (first.feature, first.how, told.blamed) == ("tilt", How.SPREAD, "tilt")
    assert first.spread == pytest.approx(change[-256:, 2].std(), rel=0.05)  # about 2


def test_a_channel_that_repeats_its_value_is_called_so(steady: Reference) -> None:
    change = gaussian(160, seed=5)
    change[:, 1] = change[0, 1]
    first = explained(steady, change).features[0]
    assert (first.feature, first.how) == ("heat", How.REPEATED)


def test_both_channels_of_one_sensor_are_one_sensor_and_all_channels_are_the_world(steady: Reference) -> None:
    noise = gaussian(320, seed=6)
    arm = explained(steady, noise + np.array([0, 0, 1.5, 1.5]))
    assert (arm.scope, arm.blamed) == (Scope.ONE_SENSOR, "arm")
    world = explained(steady, noise + 1.5)
    assert (world.scope, world.blamed) == (Scope.WORLD, "")
    assert max(world.channels.values()) < 0.4


def test_an_autoregressive_stream_is_told_of_its_level_not_of_its_residual() -> None:
    x = np.zeros((8000, 4))
    noise = gaussian(8000, seed=7)
    for t in range(1, len(x)):
        x[t] = 0.8 * x[t - 1] + noise[t]
    reference = with_bins(reference_of(fit(x[:6000])), x[:6000], np.full(6000, -1))
    monitor = StationaryMonitor(reference)
    assert feed(monitor, x[6000:] + np.array([10.0, 0, 0, 0]) * (np.arange(2000) >= 400)[:, None])
    told = monitor.explanation()
    assert told is not None
    assert told.relative
    assert told.features[0].shift == pytest.approx(10.0, abs=2.0)


def test_a_regime_stream_is_compared_with_what_is_usual_for_the_class(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    calm, odd = stream.rows(4, seed=5), stream.rows(4, seed=6)
    monitor.follow(calm.features, calm.predicted, np.full(len(calm), np.nan))
    assert monitor.explanation() is None
    column = reference.features.index("gx.mean")
    changed = odd.features.copy()
    changed[:, column] += 12.0
    (_, finding), *_ = monitor.follow(changed, odd.predicted, np.full(len(odd), np.nan))
    told = monitor.explanation()
    assert told is not None
    assert finding.explanation is not None
    assert told.features[0].feature == "gx.mean"
    assert told.features[0].shift == pytest.approx(12.0, abs=2.0)
    assert told.rows == told.looked_at <= len(odd)
    assert told.blamed in {"gx", "gyro"}
    assert sum(one.share for one in told.features) == pytest.approx(1.0)


def test_after_a_restart_a_drift_is_told_by_what_came_since(steady: Reference) -> None:
    before, after = StationaryMonitor(steady), StationaryMonitor(steady)
    drifting = CENTRE + SCALE * (gaussian(320, seed=8) + np.array([0, 1.5, 0, 0]))
    feed(before, drifting[:160])
    assert after.restore(json.loads(json.dumps(before.state())))
    none_yet = after.explanation()
    assert none_yet is not None
    assert (none_yet.looked_at, none_yet.features[0].feature, none_yet.features[0].now) == (0, "heat", ())
    feed(after, drifting[160:])
    told = after.explanation()
    assert told is not None
    assert told.looked_at == 160 < told.rows
    assert told.features[0].shift_sd == pytest.approx(1.5, abs=0.2)


def test_the_reference_carries_its_bins_and_refuses_others(steady: Reference) -> None:
    again = load_reference(dump_reference(steady))
    assert again.bins.tolist() == steady.bins.tolist()
    assert again.bins.sum(axis=1).tolist() == [4000] * 4
    wide = reference_of(fit(gaussian(3000, seed=9, width=32)), width=32)
    assert len(dump_reference(with_bins(wide, gaussian(3000, seed=9, width=32), np.full(3000, -1)))) <= 24 * 1024


def test_histograms_hold_every_value_that_is_one() -> None:
    z = np.array([[-9.0, 0.0], [-4.0, np.nan], [3.99, 0.1], [9.0, -0.1]])
    counts = histograms(z)
    assert (counts[0, 0], counts[0, -1]) == (2, 2)
    assert (counts[1, 7], counts[1, 8], counts[1].sum()) == (1, 2, 3)


def test_a_trail_keeps_the_newest_rows_only() -> None:
    trail = Trail(2, block_rows=16)
    for block in range(20):
        trail.add(np.full((16, 2), block, np.float32))
    assert trail.last(10_000)[:, 0].tolist() == np.repeat(np.arange(4.0, 20.0), 16).tolist()
    assert trail.last(17)[0, 0] == 18.0
    assert trail.last(0).shape == (0, 2)


@pytest.mark.parametrize(
    ("feature", "how", "sizes", "said"),
    [
        ("gx.mean", "shift", (0.8, 2.1, 1.0), "gx mean +0.8 rad/s (+2.1 sd)"),
        ("flow", "shift", (-2.0, -1.0, 1.0), "flow -2 rad/s (-1.0 sd)"),
        ("ax.log_sd", "shift", (0.642, 3.0, 1.0), "sd of ax x1.9 (+3.0 sd)"),
        ("ax.log_spike", "shift", (-9.2, -32.0, 1.0), "largest spike of ax x0.0001 (more than -32.0 sd)"),
        ("flow", "spread", (0.0, 0.0, 1.9), "flow spreads 1.9 times as much"),
        ("flow", "repeated", (0.0, 0.0, 0.0), "flow repeats its value"),
    ],
)
def test_a_change_in_words(feature: str, how: str, sizes: tuple[float, float, float], said: str) -> None:
    shift, shift_sd, spread = sizes
    unit = unit_of(feature, "gx" if "." in feature else "", {"gx": "rad/s", "flow": "rad/s"})
    assert words(feature, how, shift=shift, shift_sd=shift_sd, spread=spread, unit=unit) == said


def test_bars_show_the_largest_full_and_nothing_as_a_dot() -> None:
    assert bars([0, 1, 500, 1000]) == "·▁▅█"
    assert bars([]) == ""


def of_size(features: int, name: str) -> Explanation:
    change = ChangedFeature(
        name, name, 1 / 3, How.REPEATED, -31.234567, -12345.678901, 1.23456789, -98765.4321, 98765.4321,
        (0.0625,) * BINS, (0.0625,) * BINS,
    )  # fmt: skip
    return Explanation(10**9, 256, Scope.ONE_SENSOR, name, True, {f"{name}{n}": 0.1 for n in range(64)},
                       (change,) * features)  # fmt: skip


@pytest.mark.parametrize(("features", "name"), [(1, "x"), (8, "gx.mean"), (128, "y" * 500)])
def test_what_is_sent_is_bounded_and_keeps_the_contract(features: int, name: str) -> None:
    document = details(of_size(features, name), {name: "u" * 99}, changed_at_s=float("nan"), changed_ago_s=12.3456)
    assert len(json.dumps(document)) <= MAX_DETAIL_BYTES
    read = DriftExplanation.model_validate_json(json.dumps(document))
    assert 1 <= len(read.features) <= 8
    assert read.changed_at_s is None
    assert [sum(picture.now) for picture in read.pictures] == [16 * 62] * min(features, 3)


def test_lines_say_who_since_when_and_by_how_much(steady: Reference) -> None:
    told = explained(steady, gaussian(320, seed=3) + np.array([1.0, 0, 0, 0]))
    document = details(told, {"flow": "l"}, changed_at_s=None, changed_ago_s=44.4)
    head, first, *_ = lines(document)
    assert head == f"one sensor (flow), for about {told.rows} rows, 44 s"
    assert first.startswith("flow +")
    assert " l (+" in first
    assert " -> " in first
    assert len(lines(document)) <= 4
