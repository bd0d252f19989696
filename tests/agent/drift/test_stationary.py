"""What the stationary monitor promises: quiet while nothing changes, each kind of change found, named, taken back."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.drift import DriftMonitor, Reference, StationaryMonitor, drift_monitor, dump_reference, load_reference
from agent.drift.edetector import BATCH_ROWS
from tests.agent.drift.stationary_streams import NAMES, autoregressive, feed, fit, gaussian, reference_of


@pytest.fixture(scope="module")
def calm() -> Reference:
    return load_reference(dump_reference(reference_of(fit(gaussian(4000, seed=1)))))


def changed(kind: str, x: np.ndarray) -> np.ndarray:
    y = x.copy()
    match kind:
        case "mean":
            y[:, 1] += 0.7
        case "mean_down":
            y[:, 1] -= 0.7
        case "spread":
            y[:, 1] *= 1.6
        case "calm":
            y[:, 1] *= 0.4
        case "all":
            y += 0.4
        case "relation":
            y[:, 1] = 0.8 * y[:, 0] + 0.6 * y[:, 1]
        case "stuck":
            y[:, 1] = y[0, 1]
        case "missing":
            y[::3, 1] = np.nan
        case "range":
            y[::7, 1] = 9.0
    return y


@pytest.mark.parametrize("seed", range(4))
def test_an_unchanged_stream_keeps_the_claim(calm: Reference, seed: int) -> None:
    """The claim allows an alarm in 10,000 rows; 40,000 rows of four streams may have ten. None is usual."""
    assert len(feed(StationaryMonitor(calm), gaussian(10_000, seed=50 + seed))) <= 2


@pytest.mark.parametrize(
    ("kind", "within"),
    [
        ("mean", 250), ("mean_down", 250), ("spread", 200), ("calm", 200), ("all", 200), ("relation", 250),
        ("stuck", 32), ("missing", 100), ("range", 100),
    ],
)  # fmt: skip
def test_every_kind_of_change_is_found_and_the_feature_named(calm: Reference, kind: str, within: int) -> None:
    monitor = StationaryMonitor(calm)
    assert feed(monitor, gaussian(800, seed=7)) == []
    x = changed(kind, gaussian(1000, seed=8))
    row, finding = feed(monitor, x)[0]
    assert finding.raised
    assert row < within
    assert (kind == "all") or "heat" in finding.channels
    assert finding.numbers["evidence"] >= 1.0
    assert 0 < finding.numbers["rows_since_change"] <= row + 100
    assert monitor.named() == finding.channels
    if kind.startswith("mean"):
        assert finding.numbers["size_sd"] == pytest.approx(0.7 if kind == "mean" else -0.7, abs=0.35)
        assert monitor.single_channel() == "heat"
        assert "heat moved by" in finding.text
    json.dumps(finding.numbers)


def test_a_channel_is_named_in_place_of_its_features(calm: Reference) -> None:
    grouped = replace(
        calm, channels=("left", "right"), groups={"left": "g", "right": "g"},
        channel_of=np.array([0, 1, 1, -1], dtype=np.int16),
    )  # fmt: skip
    ((_, finding),) = feed(StationaryMonitor(grouped), changed("mean", gaussian(400, seed=8)))
    assert finding.channels == ("right",)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 900), max_size=8))
def test_cutting_the_rows_into_other_batches_changes_nothing(calm: Reference, cuts: list[int]) -> None:
    x = gaussian(900, seed=3)
    x[300:600] = changed("mean", x[300:600])
    x[50, 2] = np.nan
    whole, cut = StationaryMonitor(calm), StationaryMonitor(calm)
    expected = feed(whole, x)
    found = [
        (row + first, finding)
        for first, last in itertools.pairwise([0, *sorted(cuts), 900])
        for row, finding in feed(cut, x[first:last])
    ]
    assert expected[0][1].raised
    assert found == expected
    assert cut.state() == whole.state()


@settings(max_examples=20, deadline=None)
@given(at=st.integers(0, 900))
def test_a_restart_in_between_changes_nothing_not_a_bit(calm: Reference, at: int) -> None:
    x = gaussian(900, seed=3)
    x[300:600] = changed("mean", x[300:600])
    whole, before, after = (StationaryMonitor(calm) for _ in range(3))
    expected = feed(whole, x)
    first = feed(before, x[:at])
    assert after.restore(json.loads(json.dumps(before.state())))
    assert first + [(row + at, finding) for row, finding in feed(after, x[at:])] == expected
    assert after.state() == whole.state()


def test_state_of_another_reference_is_not_taken(calm: Reference) -> None:
    monitor = StationaryMonitor(calm)
    assert not monitor.restore({**monitor.state(), "reference": "0" * 64})
    assert not monitor.restore({})


@pytest.mark.parametrize("kind", ["mean", "spread", "all", "relation", "stuck", "missing", "range"])
def test_a_finding_stands_while_the_change_lasts_and_ends_after_it(calm: Reference, kind: str) -> None:
    monitor = StationaryMonitor(calm)
    found = feed(monitor, changed(kind, gaussian(3000, seed=8)))
    assert [finding.raised for _, finding in found] == [True]
    assert monitor.raised
    assert monitor.raised_rows == 3000 // BATCH_ROWS * BATCH_ROWS - found[0][0] - 1
    ((row, finding), *_) = feed(monitor, gaussian(3000, seed=9))
    assert not finding.raised
    assert row > 2 * BATCH_ROWS or kind in {"stuck", "missing", "range"}
    assert (monitor.raised, monitor.raised_rows, monitor.named(), monitor.blame()) == (False, 0, (), {})


def test_missing_rows_are_no_evidence_of_a_shift(calm: Reference) -> None:
    """The reference misses nothing, so missing rows are found as such; nothing else may speak."""
    x = gaussian(2000, seed=12)
    x[500:504] = np.nan
    x[900, 1] = np.inf
    monitor = StationaryMonitor(calm)
    for _, finding in feed(monitor, x):
        assert finding.numbers.get("family:counter", 1.0) > 0.9
    often = gaussian(4000, seed=1)
    often[np.random.default_rng(2).random(often.shape) < 0.05] = np.nan
    same = gaussian(8000, seed=13)
    same[np.random.default_rng(3).random(same.shape) < 0.05] = np.nan
    assert feed(StationaryMonitor(reference_of(fit(often))), same) == []


@pytest.mark.parametrize("wild", [1e308, -1e308, 1e31, np.inf, -np.inf, np.nan])
def test_a_number_that_is_none_is_missing_and_breaks_nothing(calm: Reference, wild: float) -> None:
    monitor, x = StationaryMonitor(calm), gaussian(320, seed=2)
    x[100, 1] = wild
    assert feed(monitor, x) == []
    assert monitor.statistics()["missing"] == 1.0


def test_one_wild_row_is_not_drift(calm: Reference) -> None:
    x = gaussian(320, seed=2)
    x[100, 1] = 1e20
    assert feed(StationaryMonitor(calm), x) == []


def test_dependence_is_taken_out_before_it_is_judged() -> None:
    reference = reference_of(fit(autoregressive(5000, seed=1)))
    assert feed(StationaryMonitor(reference), autoregressive(12_000, seed=2)) == []
    moved = autoregressive(6000, seed=3)
    moved[:, 2] += 2.0
    assert feed(StationaryMonitor(reference), moved)[0][1].raised


def test_the_classes_that_are_predicted_are_watched() -> None:
    generator = np.random.default_rng(4)
    model = fit(gaussian(3000, seed=1), predicted=generator.choice(3, 3000, p=[0.6, 0.3, 0.1]), labels=3)
    reference = load_reference(dump_reference(reference_of(model)))
    x = gaussian(6000, seed=5)
    assert feed(StationaryMonitor(reference), x, generator.choice(3, 6000, p=[0.6, 0.3, 0.1])) == []
    ((row, finding), *_) = feed(StationaryMonitor(reference), x, generator.choice(3, 6000, p=[0.3, 0.3, 0.4]))
    assert row < 400
    assert finding.numbers["family:bins"] > 0.9


def test_the_reference_says_which_monitor_it_is_for(calm: Reference) -> None:
    monitor = drift_monitor(calm)
    assert isinstance(monitor, StationaryMonitor)
    protocol: DriftMonitor = monitor
    assert protocol.suspicion() == {}
    with pytest.raises(ValueError, match="no stationary model"):
        StationaryMonitor(replace(calm, stationary=None))
    assert set(monitor.statistics()) >= {"rows", "missing", "alarms", "raised", "raised_rows", "evidence"}


def test_reset_forgets_the_alarm_without_a_finding(calm: Reference) -> None:
    monitor = StationaryMonitor(calm)
    feed(monitor, changed("mean", gaussian(500, seed=8)))
    monitor.reset()
    assert (monitor.raised, monitor.evidence(), monitor.suspicion(), monitor.statistics()["alarms"]) == (
        False,
        0,
        {},
        1,
    )


def test_columns_choose_what_is_looked_at() -> None:
    reference = reference_of(fit(gaussian(2000, seed=1), columns=np.array([3, 0])))
    x = gaussian(2000, seed=2)
    x[:, 1] += 50.0
    monitor = StationaryMonitor(reference)
    assert feed(monitor, x) == []
    x[:, 3] += 0.8
    assert feed(monitor, x)[0][1].channels == (NAMES[3],)


def test_a_tolerance_of_one_feature_is_for_that_feature_only() -> None:
    reference = reference_of(fit(gaussian(4000, seed=1), tolerance_sd=np.array([0.0, 0.5, 0.0, 0.0])))
    assert load_reference(dump_reference(reference)).stationary.tolerance_sd.tolist() == [0.0, 0.5, 0.0, 0.0]
    x = gaussian(4000, seed=2)
    x[:, 1] += 0.4
    assert feed(StationaryMonitor(reference), x) == []
    x[:, 1], x[:, 2] = x[:, 1] - 0.4, x[:, 2] + 0.4
    assert feed(StationaryMonitor(reference), x)[0][1].channels == ("tilt",)
