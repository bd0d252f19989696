import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drift import Finding, Reference, RegimeMonitor, dump_reference, load_reference
from agent.drift.regimes import REARM_ROWS, ClassResidual, RegimeDistance


def feed(monitor: RegimeMonitor, features: np.ndarray, predicted: np.ndarray) -> list[tuple[int, Finding]]:
    found = monitor.follow(features, predicted, np.full(len(features), np.nan))
    return [(number + 1, finding) for number, finding in found]


def broken_gx(features: np.ndarray) -> np.ndarray:
    """The third channel no longer moves: its mean is 0 and its logarithms lie on the floor."""
    dead = features.copy()
    dead[:, 8:12] = (0.0, -9.2, -9.2, -9.2)
    return dead


def test_known_regimes_keep_quiet_for_ten_thousand_rows(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(625, seed=11)
    assert len(rows) == 10_000
    assert feed(monitor, rows.features, rows.predicted) == []
    assert monitor.evidence() < 1.0


def test_a_dying_channel_is_found_and_named_first(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=12)
    assert feed(monitor, rows.features[:100], rows.predicted[:100]) == []
    ((delay, finding),) = feed(monitor, broken_gx(rows.features[100:200]), rows.predicted[100:200])
    assert delay <= 30
    assert (finding.kind, finding.raised, finding.channels[0]) == ("drift", True, "gx")
    assert finding.numbers["rows_since_change"] == pytest.approx(delay, abs=3)
    assert "gx" in finding.text


def test_a_change_of_relations_alone_is_found_by_the_total(stream, reference: Reference) -> None:
    """Each channel still looks like some known recording, but of different ones: a mixture no regime has."""
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=13)
    mixed = rows.features.copy()
    mixed[:, 4:8] = np.roll(rows.features, 60, axis=0)[:, 4:8]
    assert [finding.raised for _, finding in feed(monitor, mixed, rows.predicted)] == [True]


def test_one_wild_row_is_not_drift(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=14)
    wild = rows.features.copy()
    wild[50] += 1e6
    assert feed(monitor, wild, rows.predicted) == []


def test_it_stays_raised_until_the_stream_has_been_back_for_a_while(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(40, seed=15)
    features = np.concatenate([broken_gx(rows.features[:300]), rows.features[300:]])
    (raised_at, raised), (cleared_at, cleared) = feed(monitor, features, rows.predicted)
    assert raised.raised
    assert not cleared.raised
    assert raised_at < 300 < 300 + REARM_ROWS <= cleared_at
    assert cleared.channels == raised.channels
    assert not monitor.raised


def test_an_excursion_is_blamed_on_the_channel_that_carries_it(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=12)
    ((at, _),) = feed(monitor, broken_gx(rows.features[:120]), rows.predicted[:120])
    assert monitor.raised_rows == 120 - at
    assert monitor.single_channel() == "gx"
    assert max(monitor.blame(), key=monitor.blame().__getitem__) == "gx"


def test_an_excursion_of_every_channel_is_nobodys_fault(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=12)
    spread = np.sqrt(np.diag(reference.regimes.covariance))
    feed(monitor, rows.features + 4 * spread, rows.predicted)
    assert monitor.raised_rows > 64
    assert monitor.single_channel() == ""


def test_blame_ends_with_the_finding(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(40, seed=15)
    feed(monitor, np.concatenate([broken_gx(rows.features[:300]), rows.features[300:]]), rows.predicted)
    assert (monitor.raised_rows, monitor.single_channel()) == (0, "")


def test_a_row_that_is_not_finite_is_skipped_and_counted(reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    row = np.full(len(reference.features), np.nan)
    assert feed(monitor, row[None], np.zeros(1, int)) == []
    assert (monitor.statistics()["skipped"], monitor.statistics()["rows"]) == (1.0, 0.0)


@pytest.mark.parametrize("predicted", [-1, 99])
def test_a_row_without_a_class_is_judged_by_the_nearest_one(stream, reference: Reference, predicted: int) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=16)
    ((_, finding),) = feed(monitor, broken_gx(rows.features), np.full(len(rows), predicted))
    assert finding.channels[0] == "gx"


@given(cut=st.integers(0, 160))
def test_a_restart_in_between_changes_nothing(stream, reference: Reference, cut: int) -> None:
    rows = stream.rows(10, seed=17)
    features = np.concatenate([rows.features[:60], broken_gx(rows.features[60:100]), rows.features[100:]])
    whole, first, second = (RegimeMonitor(reference) for _ in range(3))
    expected = feed(whole, features, rows.predicted)
    before = feed(first, features[:cut], rows.predicted[:cut])
    assert second.restore(json.loads(json.dumps(first.state())))
    after = feed(second, features[cut:], rows.predicted[cut:])
    assert before + [(number + cut, finding) for number, finding in after] == expected
    assert second.state() == whole.state()


@given(cuts=st.lists(st.integers(0, 160), max_size=5))
def test_cutting_the_rows_into_other_batches_changes_nothing(stream, reference: Reference, cuts: list[int]) -> None:
    rows = stream.rows(10, seed=17)
    features = np.concatenate([rows.features[:60], broken_gx(rows.features[60:100]), rows.features[100:]])
    whole, cut = RegimeMonitor(reference), RegimeMonitor(reference)
    expected = feed(whole, features, rows.predicted)
    found = [
        (number + first, finding)
        for first, last in itertools.pairwise([0, *sorted(cuts), 160])
        for number, finding in feed(cut, features[first:last], rows.predicted[first:last])
    ]
    assert found == expected
    assert cut.state() == whole.state()


def test_a_model_of_some_columns_names_only_the_channels_they_belong_to(stream, reference: Reference) -> None:
    """As a witness's: the third channel's features belong to none of the channels, the second's are not looked at."""
    columns = np.array([0, 1, 2, 3, 8, 9, 10, 11])
    own = reference.regimes
    model = replace(
        own,
        columns=columns.astype(np.int16),
        regime_means=own.regime_means[:, columns],
        covariance=own.covariance[np.ix_(columns, columns)],
        class_means=own.class_means[:, columns],
        class_covariance=own.class_covariance[np.ix_(columns, columns)],
        naming_scale=own.naming_scale[:1],
        allowance=own.allowance[:2],
    )
    channel_of = np.array([0] * 4 + [1] * 4 + [-1] * 4, dtype=np.int16)
    monitor = RegimeMonitor(replace(reference, channel_of=channel_of), model)
    rows = stream.rows(20, seed=12)
    moved = rows.features.copy()
    moved[:, 4:8] += 1e3
    assert feed(monitor, moved, rows.predicted) == []
    assert [name for name in monitor.statistics() if name.startswith("evidence:")] == [
        "evidence:total",
        "evidence:ax",
    ]
    ((_, finding),) = feed(monitor, broken_gx(rows.features), rows.predicted)
    assert set(finding.channels) <= {"ax"}
    assert monitor.raised


def test_a_model_of_no_channel_raises_and_names_none(stream, reference: Reference) -> None:
    model = replace(reference.regimes, naming_scale=np.zeros(0), allowance=reference.regimes.allowance[:1])
    nowhere = replace(reference, channels=(), groups={}, channel_of=np.full(12, -1, dtype=np.int16), regimes=model)
    monitor = RegimeMonitor(load_reference(dump_reference(nowhere)))
    rows = stream.rows(20, seed=12)
    ((_, finding),) = feed(monitor, broken_gx(rows.features), rows.predicted)
    assert (finding.raised, finding.channels, monitor.single_channel(), monitor.raised) == (True, (), "", True)


def test_state_of_another_reference_is_not_taken(reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    assert not monitor.restore({**monitor.state(), "reference": "0" * 64})
    assert not monitor.restore({})


def test_reset_forgets_the_alarm_without_a_finding(stream, reference: Reference) -> None:
    monitor = RegimeMonitor(reference)
    rows = stream.rows(20, seed=18)
    feed(monitor, broken_gx(rows.features), rows.predicted)
    monitor.reset()
    assert not monitor.raised
    assert monitor.evidence() == 0.0
    assert monitor.suspicion() == {}
    assert monitor.statistics()["alarms"] == 1.0


def test_scores_are_distances_solved_by_hand() -> None:
    generator = np.random.default_rng(4)
    channel_of = np.array([0, 0, 1, 1, 1, 2])
    root = generator.normal(size=(6, 6))
    covariance = root @ root.T + np.eye(6)
    means, rows = generator.normal(0, 3, (5, 6)), generator.normal(0, 3, (20, 6))
    scores = RegimeDistance(means, covariance, channel_of, cap=50.0).scores(rows)
    for row, got in zip(rows, scores, strict=True):
        squares = [(row - mean) @ np.linalg.solve(covariance, row - mean) for mean in means]
        nearest = means[int(np.argmin(squares))]
        assert got[0] == pytest.approx(np.sqrt(min(squares) / 6))
        for channel in range(3):
            of = np.flatnonzero(channel_of == channel)
            away = (row - nearest)[of]
            expected = away @ np.linalg.solve(covariance[np.ix_(of, of)], away) / len(of)
            assert got[1 + channel] == pytest.approx(np.sqrt(expected))


def test_no_row_scores_more_than_the_cap() -> None:
    distance = RegimeDistance(np.zeros((1, 2)), np.eye(2), np.array([0, 1]), cap=8.0)
    assert distance.scores(np.array([[1e9, 0.0]]))[0].tolist() == [8.0, 8.0, 0.0]


def test_the_residual_is_measured_from_the_predicted_class() -> None:
    residual = ClassResidual(np.array([[0.0, 0.0], [3.0, 0.0]]), np.eye(2), np.array([0, 1]))
    rows = np.array([[3.0, 2.0], [3.0, 2.0], [2.5, 0.0]])
    assert residual.squares(rows, np.array([0, 1, -1])).tolist() == [[9.0, 4.0], [0.0, 4.0], [0.25, 0.0]]
