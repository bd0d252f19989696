"""The engine that is chosen is the one the card says is best under this very fault."""

from __future__ import annotations

import pytest

from agent.contract.errors import Corrupt
from agent.decisions.choice import Fault, choose, choose_cheaper, choose_other, estimate, find_row, read_card
from agent.decisions.events import AlarmKind
from tests.agent.decisions.wrist import ACCEL, DOCUMENT, ENGINES, GYRO, card, row


def fault(kind: str, *channels: str) -> Fault:
    return Fault(AlarmKind(kind), frozenset(channels))


def chosen(*faults: Fault, current: str = "wrist", margin: float = 0.03, among: tuple[str, ...] = ENGINES) -> str:
    return choose(card(), faults, among, current, margin=margin).engine


def test_a_fault_goes_to_the_engine_that_is_best_under_it() -> None:
    assert chosen(fault("dead", *GYRO)) == "wrist-accel"
    assert chosen(fault("scale", *GYRO)) == "wrist-accel"


def test_a_fault_that_hurts_the_fallback_more_changes_nothing() -> None:
    assert chosen(fault("dead", "ax")) == "wrist"
    assert chosen(fault("stuck", "ax")) == "wrist"
    assert chosen(fault("scale", *ACCEL)) == "wrist"


def test_without_an_exact_row_the_smallest_superset_of_the_same_kind_counts() -> None:
    found = find_row(card(), fault("dead", "gy"))
    assert found is not None
    assert found.name == "gyro_off"
    found = find_row(card(), fault("dead", "gy", "ax"))
    assert found is not None
    assert found.name == "all_off"
    assert find_row(card(), fault("stuck", "gx")) is None


def test_an_exact_row_comes_before_a_larger_one() -> None:
    assert estimate(card(), "wrist", [fault("dead", "gx")]).accuracy == 0.84


def test_without_any_row_an_engine_that_does_not_read_the_channels_keeps_its_clean_accuracy() -> None:
    assert estimate(card(), "wrist-accel", [fault("stuck", "gx")]).accuracy == 0.92
    assert estimate(card(), "wrist", [fault("stuck", "gx")]).accuracy is None
    assert chosen(fault("stuck", "gx")) == "wrist-accel"


def test_without_any_row_and_with_every_engine_touched_it_stays() -> None:
    assert chosen(fault("not_finite", "ax", "gx")) == "wrist"


def test_a_constant_answer_never_wins_over_an_unknown_accuracy() -> None:
    assert estimate(card(), "wrist-floor", [fault("stuck", "gx")]).accuracy is None
    document = {**DOCUMENT, "faults": [row("odd", "stuck", ("gx",), 0.5, 0.5, 0.2)]}
    del document["faults"][0]["accuracy"]["wrist"], document["faults"][0]["accuracy"]["wrist-accel"]
    unread = card(document, reads={})
    assert choose(unread, [fault("stuck", "gx")], ENGINES, "wrist", margin=0.03).engine == "wrist"


def test_the_floor_is_chosen_only_where_its_row_says_it_is_better() -> None:
    assert chosen(fault("dead", *ACCEL, *GYRO)) == "wrist-floor"
    assert chosen(fault("dead", *ACCEL, *GYRO), margin=0.05) == "wrist"


def test_several_faults_count_with_the_lowest_estimate() -> None:
    both = [fault("dead", *GYRO), fault("scale", *ACCEL)]
    assert estimate(card(), "wrist-accel", both).accuracy == 0.18
    assert chosen(*both) == "wrist"


@pytest.mark.parametrize(("margin", "engine"), [(0.05, "wrist-accel"), (0.06, "wrist-accel"), (0.07, "wrist")])
def test_a_gain_below_the_margin_is_not_worth_a_switch(margin: float, engine: str) -> None:
    assert chosen(fault("dead", "gx"), margin=margin) == engine  # .90 against .84


def test_only_candidates_are_chosen() -> None:
    assert chosen(fault("dead", *GYRO), among=("wrist", "wrist-floor")) == "wrist"


def test_a_group_name_stands_for_its_channels() -> None:
    found = find_row(card(), fault("dead", "gyro"))
    assert found is not None
    assert found.name == "gyro_off"


def test_a_fault_that_names_no_channel_is_read_as_the_largest_row() -> None:
    found = find_row(card(), fault("dead"))
    assert found is not None
    assert found.name == "all_off"


def test_the_reason_is_a_sentence_with_both_accuracies() -> None:
    choice = choose(card(), [fault("dead", *GYRO)], ENGINES, "wrist", margin=0.03)
    assert choice.reason == "gx gy gz dead: wrist-accel 0.90, wrist 0.55 (row 'gyro_off' of the card)"
    assert choice.numbers == {"accuracy_from": 0.55, "accuracy_to": 0.90, "margin": 0.03}


def test_pressure_goes_to_a_cheaper_engine_but_never_to_the_floor() -> None:
    assert choose_cheaper(card(), (), ENGINES, "wrist", "too slow").engine == "wrist-accel"
    assert choose_cheaper(card(), (), ENGINES, "wrist-accel", "too slow").engine == "wrist-accel"
    dearer = card(costs={"wrist": 10.0, "wrist-accel": 20.0})
    assert choose_cheaper(dearer, (), ENGINES, "wrist", "too slow").engine == "wrist"
    assert choose_cheaper(dearer, (), ENGINES, "wrist-accel", "too slow").engine == "wrist"


def test_a_failing_engine_gives_way_to_the_best_of_the_rest_and_to_the_floor_last() -> None:
    assert choose_other(card(), (), ENGINES, "wrist", "failed").engine == "wrist-accel"
    assert choose_other(card(), [fault("dead", *ACCEL, *GYRO)], ENGINES, "wrist", "failed").engine == "wrist-accel"
    assert choose_other(card(), (), ("wrist-floor",), "wrist", "failed").engine == "wrist-floor"
    assert choose_other(card(), (), ("wrist",), "wrist", "failed").engine == "wrist"


def test_rows_of_faults_the_device_cannot_diagnose_are_left_out() -> None:
    assert "rot30" not in {one.name for one in card().rows}


def test_an_artifact_without_a_card_still_has_an_order() -> None:
    bare = read_card({}, engines=ENGINES)
    assert choose(bare, [fault("dead", "gx")], ENGINES, "wrist", margin=0.03).engine == "wrist"
    assert choose_other(bare, (), ENGINES, "wrist", "failed").engine == "wrist-accel"


@pytest.mark.parametrize(
    "document",
    [
        {"accuracy": {"wrist": "good"}},
        {"faults": [{"kind": "dead"}]},
        {"faults": [{"name": "x", "kind": "dead", "channels": 3, "accuracy": {}}]},
        {"accuracy": 7},
    ],
)
def test_a_malformed_card_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(Corrupt):
        read_card(document, engines=ENGINES)
