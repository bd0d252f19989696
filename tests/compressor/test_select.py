from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compressor.candidate import Candidate, Gate, Latency, Variant
from compressor.errors import GateFailed
from compressor.recipe import DeviceClassTable, ModelTable, SelectTable
from compressor.select import choose, choose_lineup, chosen, figure, pareto_front

RULES = SelectTable(tie=0.003, min_speedup=1.05)


def candidate(
    name: str,
    accuracy: float,
    us: float,
    size: int,
    *,
    precision: str = "float32",
    model: str = "",
    passed: bool = True,
) -> Candidate:
    table = ModelTable(name=model or name, role="student", family="plain", width=1, epochs=1)
    variant = Variant(name, table, precision, b"x" * size, 1, np.zeros((1, 1), np.float32))
    gates = (Gate("accuracy", 0.0 if passed else 1.0, 0.5),)
    return Candidate(variant, {"varied": accuracy, "stream": accuracy}, 1.0, Latency(us, us, us, 0.0), gates)


def device(*, us: float = 100, size: int = 1000, prefer: str = "accuracy") -> DeviceClassTable:
    return DeviceClassTable.model_validate(
        {"name": "d", "latency_us": us, "size_bytes": size, "latency_p95_us": 1000, "prefer": prefer}
    )


def pick(candidates: list[Candidate], where: DeviceClassTable) -> str:
    return chosen(choose(candidates, where, RULES, kind="model")).candidate


def test_the_most_accurate_within_the_budget_wins() -> None:
    pool = [candidate("big", 0.99, 500, 900), candidate("mid", 0.97, 50, 900), candidate("small", 0.93, 10, 90)]
    assert pick(pool, device()) == "mid"


def test_among_equals_the_smaller_wins() -> None:
    pool = [candidate("large", 0.970, 50, 900), candidate("compact", 0.968, 60, 300)]
    assert pick(pool, device()) == "compact"


def test_a_class_that_prefers_size_takes_the_smallest_that_passes() -> None:
    pool = [candidate("a", 0.99, 50, 900), candidate("b", 0.93, 10, 90), candidate("c", 0.5, 1, 9, passed=False)]
    assert pick(pool, device(prefer="size")) == "b"


def test_a_file_slower_than_its_float_parent_never_ships() -> None:
    pool = [
        candidate("m", 0.95, 20.0, 900, model="m"),
        candidate("m-int8", 0.99, 20.1, 300, model="m", precision="int8"),
    ]
    verdicts = choose(pool, device(prefer="size"), RULES, kind="model")
    assert chosen(verdicts).candidate == "m"
    assert verdicts[1].reason == (
        "smaller, but slower than its float parent by less than 1 %: not shipped (20.1 against 20.0 us of CPU)"
    )


C12 = [
    candidate("c12", 0.95, 38.8, 900, model="c12"),
    candidate("c12-int8", 0.95, 39.9, 400, model="c12", precision="int8"),
]


@pytest.mark.parametrize("prefer", ["size", "accuracy"])
def test_the_only_one_left_says_who_was_left_aside(prefer: str) -> None:
    verdicts = choose(C12, device(prefer=prefer), RULES, kind="model")
    left = (
        "the only candidate within the budget of 'd', c12-int8 left aside (not clearly faster than its float parent)"
    )
    assert verdicts[0].plain_reason.startswith(f"{left}: accuracy 0.950")
    assert "slower than its float parent by 3 %: not shipped (39.9 against 38.8 us of CPU)" in verdicts[1].reason


def test_the_smallest_of_several_says_who_was_left_aside() -> None:
    verdicts = choose([*C12, candidate("big", 0.9, 10, 950)], device(prefer="size"), RULES, kind="model")
    assert "the smallest of 2 candidates within the budget of 'd', c12-int8 left aside" in verdicts[0].reason


def test_one_that_fails_a_gate_anyway_is_not_called_left_aside() -> None:
    pool = [C12[0], candidate("c12-int8", 0.95, 39.9, 400, model="c12", precision="int8", passed=False)]
    verdicts = choose(pool, device(), RULES, kind="model")
    assert "left aside" not in verdicts[0].reason
    assert verdicts[1].reason == "accuracy 1 is above 0.5"


def test_a_little_faster_is_told_apart_from_slower() -> None:
    pool = [C12[0], candidate("c12-int8", 0.95, 38.0, 1000, model="c12", precision="int8")]
    reason = choose(pool, device(), RULES, kind="model")[1].reason
    assert reason == "not faster than its float parent by 5 %: not shipped (38.0 against 38.8 us of CPU)"


def test_when_only_the_speed_against_the_parent_is_in_the_way_it_is_named() -> None:
    with pytest.raises(GateFailed, match="closest was 'c12-int8'") as caught:
        choose(C12, device(size=500), SelectTable(min_speedup=1.0), kind="model")
    assert (caught.value.gate, caught.value.measured, caught.value.limit) == ("speed", 39.9, 38.8)


def test_reasons_round_as_tables_do() -> None:
    (only,) = choose([candidate("m", 0.99349, 10, 90)], device(), RULES, kind="model")
    assert "accuracy 0.994" in only.reason  # a report has 0.9935, of which people are shown 0.994


def test_a_file_clearly_faster_than_its_parent_may_ship() -> None:
    pool = [
        candidate("m", 0.95, 20.0, 900, model="m"),
        candidate("m-int8", 0.95, 15.0, 300, model="m", precision="int8"),
    ]
    assert pick(pool, device()) == "m-int8"


def test_every_candidate_gets_a_reason_and_the_manifest_one_holds_no_times() -> None:
    pool = [candidate("big", 0.99, 500, 5000), candidate("mid", 0.97, 50.5, 900), candidate("small", 0.93, 10, 90)]
    verdicts = {verdict.candidate: verdict for verdict in choose(pool, device(), RULES, kind="model")}
    assert all(verdict.reason for verdict in verdicts.values())
    assert "latency 500" in verdicts["big"].reason
    assert "size" in verdicts["big"].reason
    assert "less accurate than 'mid' by 0.040" in verdicts["small"].reason
    assert " us" in verdicts["mid"].reason
    assert " us" not in verdicts["mid"].plain_reason


def test_nothing_that_fits_is_a_failed_gate_with_figures() -> None:
    with pytest.raises(GateFailed, match="closest was 'near'") as caught:
        choose([candidate("far", 0.9, 500, 5000), candidate("near", 0.9, 150, 90)], device(), RULES, kind="model")
    assert (caught.value.gate, caught.value.measured, caught.value.limit) == ("latency", 150, 100)


def test_of_equally_many_failed_gates_the_nearer_is_named() -> None:
    pool = [candidate("far", 0.9, 50, 10_000), candidate("nearly", 0.9, 50, 1_010)]
    with pytest.raises(GateFailed, match="closest was 'nearly'"):
        choose(pool, device(), RULES, kind="model")


def test_the_front_holds_what_nobody_beats() -> None:
    pool = [
        candidate("exact", 0.99, 90, 900), candidate("beaten", 0.95, 95, 950),
        candidate("fast", 0.95, 20, 400), candidate("tiny", 0.90, 20, 100),
    ]  # fmt: skip
    assert pareto_front(pool) == ("exact", "fast", "tiny")


def as_fallback(one: Candidate) -> Candidate:
    table = one.variant.model.model_copy(update={"role": "fallback"})
    return replace(one, variant=replace(one.variant, model=table))


def test_a_fallback_whose_successors_fail_stays_as_it_was() -> None:
    pool = [candidate("net", 0.99, 10, 90), as_fallback(candidate("accel", 0.9, 10, 90, passed=False))]
    former = as_fallback(candidate("accel-kept", 0.8, 10, 90, model="accel"))
    lineup = choose_lineup(pool, device(), RULES, service="wrist", kept=[former])
    assert lineup.fallbacks == {"wrist-accel": former}
    refused, stays = lineup.fallback_verdicts
    assert (refused.chosen, stays.chosen) == (False, True)
    assert "accuracy 1 is above 0.5" in refused.reason
    assert "kept" in stays.reason


def test_a_fallback_kept_because_its_successor_is_slower_says_so() -> None:
    pool = [candidate("net", 0.99, 10, 90), *(as_fallback(one) for one in C12)]
    former = as_fallback(candidate("c12-kept", 0.8, 10, 90, model="c12"))
    lineup = choose_lineup(pool, device(size=500), RULES, service="wrist", kept=[former])
    assert [bool(verdict.reason) for verdict in lineup.fallback_verdicts] == [True, True, True]
    assert "slower than its float parent" in lineup.fallback_verdicts[1].reason


def test_a_fallback_whose_successor_passes_is_replaced() -> None:
    better = as_fallback(candidate("accel", 0.9, 10, 90))
    former = as_fallback(candidate("accel-kept", 0.95, 10, 90, model="accel"))
    pool = [candidate("net", 0.99, 10, 90), better]
    assert choose_lineup(pool, device(), RULES, service="wrist", kept=[former]).fallbacks == {"wrist-accel": better}


def test_a_fallback_without_former_is_refused_like_a_model() -> None:
    pool = [candidate("net", 0.99, 10, 90), as_fallback(candidate("accel", 0.9, 10, 90, passed=False))]
    with pytest.raises(GateFailed, match="every fallback"):
        choose_lineup(pool, device(), RULES, service="wrist")


def test_large_figures_are_told_whole_and_small_ones_short() -> None:
    assert [figure(value) for value in (1_334_064, 1000, 247.57, 0.036735, 0)] == [
        "1,334,064", "1,000", "247.6", "0.03673", "0",
    ]  # fmt: skip
    pool = [candidate("big", 0.99, 10, 1_334_064), candidate("ok", 0.9, 10, 90)]
    verdicts = choose(pool, device(size=300_000), RULES, kind="model")
    assert verdicts[0].reason == "size 1,334,064 bytes is above 300,000"
