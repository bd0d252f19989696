"""The drift bench: its arithmetic against second sources, its streams, and that no promised figure is forgotten."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scripts.drift_bench import cells, delays, plots
from scripts.drift_bench.bounds import at_most, kept, lower_mean, run_length, upper_mean
from scripts.drift_bench.cells import Cell, Outcome
from scripts.drift_bench.oracle import Oracle
from scripts.drift_bench.parts import PARTS, QUICK
from scripts.drift_bench.real import switches_after
from scripts.drift_bench.results import GOALS, KEYS, empty, lines
from scripts.drift_bench.simple import StabilityIndex
from scripts.drift_bench.streams import CASES, KINDS, Rows, Source, stuck
from scripts.drift_bench.trials import Length, delay, false_alarms, summary, tune
from scripts.drift_bench.workers import HERE, PEERS
from scripts.drift_bench.wrist import Found, shares

PROMISED = (
    "claim.share_kept", "claim.ar_worst_ratio", "delay.over_oracle", "delay.correlation_rows", "delay.variance_rows",
    "delay.stuck_rows", "cost.ours_us", "cost.adwin_over_ours", "cost.alibi_over_ours", "wrist.null_rows",
    "wrist.null_orders", "wrist.null_alarms", "wrist.harmful_found_share", "wrist.named_share",
    "wrist.guard_switch_share", "wrist.swap_switch_share", "wrist.mount_switch_share", "wrist.switch_helped_share",
    "wrist.harmless_switch_share", "wrist.switched_back_share", "wrist.new_wearer_event_share",
    "wrist.new_wearer_switch_share", "employment.switches", "reference_bytes", "merge.bit_equal",
)  # fmt: skip


def test_the_document_has_every_promised_key_and_every_goal_one_of_them() -> None:
    keys = {f"{section}.{key}".strip(".") for section, names in KEYS.items() for key in names}
    assert keys == set(PROMISED)
    assert {f"{goal.section}.{goal.key}".strip(".") for goal in GOALS} <= keys
    document = empty()
    assert document["reference_bytes"] is None
    assert document["claim"] == {"share_kept": None, "ar_worst_ratio": None}
    json.dumps(document)


def test_a_key_at_the_top_of_the_document_is_judged_like_the_others() -> None:
    document = empty()
    document["reference_bytes"], document["merge"]["bit_equal"] = 24_577, True
    verdicts = {line[:30].strip(): line.rsplit(" ", 1)[1] for line in lines(document)}
    assert verdicts["reference.npz, 32 features, by"] == "MISSED"
    assert verdicts["merged windows equal pooled on"] == "met"


def test_a_quick_run_is_made_of_parts() -> None:
    assert set(QUICK) <= set(PARTS)


# --- bounds: tables of Garwood (1936) -----------------------------------------------------------------------
@pytest.mark.parametrize(("count", "lower", "upper"), [(0, 0.0, 2.996), (1, 0.0513, 4.744), (10, 5.425, 16.962)])
def test_the_bounds_are_the_published_ones(count: int, lower: float, upper: float) -> None:
    assert lower_mean(count) == pytest.approx(lower, abs=1e-3)
    assert upper_mean(count) == pytest.approx(upper, abs=1e-3)


def test_a_poisson_share_is_summed_from_its_terms() -> None:
    by_hand = sum(math.exp(-3.0) * 3.0**k / math.factorial(k) for k in range(5))
    assert at_most(4, 3.0) == pytest.approx(by_hand)


def test_a_claim_is_kept_until_the_alarms_contradict_it() -> None:
    assert kept(15, 100_000, 10_000)
    assert not kept(16, 100_000, 10_000)
    assert kept(0, 100, 10_000)


def test_a_run_length_without_an_alarm_is_a_bound() -> None:
    assert run_length(4, 1_000) == (250.0, False)
    length, bound = run_length(0, 3_000)
    assert bound
    assert length == pytest.approx(1_001.4, abs=0.5)


def test_claims_are_summed_over_references_and_the_worst_dependent_cell_is_told() -> None:
    gauss, ar, season = Cell("gauss", 8, 500, 2), Cell("ar0.9", 8, 500, 1), Cell("season", 8, 500, 1)
    found = cells.summary(
        [
            Outcome(gauss, 0, Length(100_000, 0)),
            Outcome(gauss, 1, Length(100_000, 30)),
            Outcome(ar, 0, Length(100_000, 20)),
            Outcome(season, 0, Length(100_000, 0)),
            Outcome(season, 1, Length(0, 0), "refused"),
        ]
    )
    assert found["claim"] == {"share_kept": 0.5, "ar_worst_ratio": 0.5}
    assert found["details"]["cells"][season.name]["ratio_text"].startswith("> ")
    assert found["details"]["cells"][season.name]["refused"] == ["refused"]


# --- oracle: against simulation and Siegmund's approximation ------------------------------------------------
def test_the_oracles_run_length_and_delay_are_those_of_a_simulated_cusum() -> None:
    oracle = Oracle.tuned(1.0, 200.0)
    generator = np.random.default_rng(1)

    def alarm_rows(shift: float, runs: int, most: int) -> np.ndarray:
        value, at = np.zeros(runs), np.full(runs, most)
        for row in range(1, most + 1):
            value = np.maximum(0.0, value + generator.normal(shift, 1.0, runs) - 0.5)
            at = np.where((value >= oracle.threshold) & (at == most), row, at)
        return at

    assert alarm_rows(0.0, 2_000, 2_500).mean() == pytest.approx(200.0, rel=0.08)
    assert oracle.delay() == pytest.approx(np.median(alarm_rows(1.0, 2_000, 60)), abs=1.5)


def test_not_to_be_told_the_feature_costs_rows() -> None:
    told, untold = Oracle.tuned(1.0, 1_000.0), Oracle.tuned(1.0, 1_000.0, places=64)
    assert untold.run_length() == pytest.approx(64 * told.run_length(), rel=0.01)
    assert 1.3 < untold.delay() / told.delay() < 2.5


def test_the_ratio_to_the_oracle_is_the_median_over_both_shifts() -> None:
    found = {"one_0.25": {"median": 300.0}, "one_0.5": {"median": 100.0}}
    against = {"one_0.25": {"oracle": 200.0}, "one_0.5": {"oracle": 100.0}}
    assert delays.over(found, against) == 1.25
    assert delays.over({**found, "one_0.5": {"median": None}}, against) is None


# --- streams ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_unit_spread_in_its_own_units_and_the_same_seed_makes_it_again(kind: str) -> None:
    source = Source(kind, 4, 3)
    rows = source.take(6_000)
    again = Source(kind, 4, 3).take(6_000)
    np.testing.assert_array_equal(rows.features, again.features)
    assert (np.diff(rows.times_s) > 0).all()
    spread = np.nanstd((rows.features - source.centre) / source.scale, axis=0)
    assert spread[~source.categorical] == pytest.approx(1.0, abs=0.35)
    assert not np.array_equal(source.fork(1).take(50).features, source.fork(2).take(50).features, equal_nan=True)


def test_neighbours_in_time_depend_on_each_other_as_the_name_says() -> None:
    x = Source("ar0.9", 2, 1).take(20_000).features[:, 0]
    assert np.corrcoef(x[:-1], x[1:])[0, 1] == pytest.approx(0.9, abs=0.02)


def test_a_change_of_correlation_leaves_every_feature_as_it_was() -> None:
    source = Source("gauss", 8, 1)
    z = np.random.default_rng(0).standard_normal((20_000, 8))
    changed = CASES["correlation"].make(8, np.random.default_rng(0))(z, np.random.default_rng(0))
    assert source.d == 8
    assert np.corrcoef(changed[:, 0], changed[:, 1])[0, 1] == pytest.approx(0.5, abs=0.03)
    assert changed.mean(axis=0) == pytest.approx(0.0, abs=0.03)
    assert changed.std(axis=0) == pytest.approx(1.0, abs=0.03)


def test_what_is_stuck_stays_stuck_in_the_next_piece() -> None:
    source, change = Source("gauss", 2, 1), stuck(1)
    first, second = source.take(10, change), source.take(10, change)
    assert len(np.unique(np.concatenate([first.features, second.features])[:, 1])) == 1


# --- trials -------------------------------------------------------------------------------------------------
class Every:
    """Alarms every `period` rows since the last reset."""

    def __init__(self, period: int) -> None:
        self.period, self.seen = period, 0

    def first_alarm(self, rows: Rows) -> int | None:
        left = self.period - self.seen
        self.seen = min(self.period, self.seen + len(rows))
        return left if left <= len(rows) else None

    def reset(self) -> None:
        self.seen = 0


def test_alarms_are_counted_over_pieces_and_resets() -> None:
    assert false_alarms(Every(100), Source("gauss", 2, 0), 1_000) == Length(1_000, 10)
    assert false_alarms(Every(7), Source("gauss", 2, 0), 1_000) == Length(1_000, 142)
    assert not false_alarms(Every(7), Source("gauss", 2, 0), 1_000, until=lambda: True).finished


def test_a_delay_is_counted_from_the_change() -> None:
    found = delay(Every(300), Source("gauss", 2, 0), CASES["one_1"], np.random.default_rng(0))
    assert found == 300 - 256


def test_tuning_ends_at_the_run_length_wanted_or_says_why_not() -> None:
    tuned = tune(lambda knob: Length(100_000, round(100_000 / knob)), 100_000.0, 10.0, 1_000.0)
    assert tuned.why == ""
    assert 1_000 / 1.4 <= tuned.length.rows / tuned.length.alarms <= 1_400
    assert "longest run length is about 50" in tune(lambda _: Length(1_000, 20), 100.0, 10.0, 1_000.0).why
    never = tune(lambda knob: Length(100_000, 100_000 if knob < 50 else 1), 100.0, 10.0, 1_000.0)
    assert "no setting" in never.why


def test_a_median_of_runs_that_found_nothing_is_none() -> None:
    assert summary({"a": [10.0, 20.0, math.inf]})["a"] == {"runs": 3, "median": 20.0, "p90": None}
    assert summary({"a": [math.inf, 20.0, math.inf]})["a"]["median"] is None
    assert summary({"a": []})["a"]["runs"] == 0


def test_the_stability_index_knows_a_shift_from_a_window_like_the_reference() -> None:
    source = Source("gauss", 3, 0)
    index = StabilityIndex(source.take(5_000), 500, 0.2)
    assert index.first_alarm(source.take(1_000)) is None
    assert index.first_alarm(source.take(1_000, CASES["one_1"].make(3, np.random.default_rng(0)))) == 500


# --- what the figures are made of ---------------------------------------------------------------------------
def test_faults_found_late_or_never_and_named_wrongly_count_against_the_shares() -> None:
    found = [Found("a", 0.2, (5.0, 61.0), (True, False)), Found("b", 0.1, (60.0, math.inf), (True,))]
    assert shares(found) == {"harmful_found_share": 0.5, "named_share": 0.6667}
    assert shares([]) == {"harmful_found_share": None, "named_share": None}


def test_plain_drift_never_switches_however_often_it_is_told() -> None:
    assert switches_after(5) == 0


def test_every_peer_has_its_pinned_packages() -> None:
    for peer in PEERS:
        pinned = dict(
            line.split("==") for line in (HERE / f"{peer.name}.txt").read_text().splitlines() if "==" in line
        )
        assert set(peer.packages) <= set(pinned)


def test_pictures_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    document = empty()
    gauss = Cell("gauss", 8, 500, 1)
    document["details"]["claim"] = cells.summary([Outcome(gauss, 0, Length(100_000, 3))])["details"]
    (path,) = plots.draw(document, tmp_path)
    assert path.stat().st_size > 1_000
