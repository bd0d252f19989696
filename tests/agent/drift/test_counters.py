import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drift import Finding, GuardCounters

CHANNELS = ("ax", "ay", "gx", "gy")
GROUPS = {"ax": "accel", "ay": "accel", "gx": "gyro", "gy": "gyro"}
GX, GY, AX = 0b0100, 0b1000, 0b0001
GYRO, ACCEL = 0b1100, 0b0011


def counters() -> GuardCounters:
    return GuardCounters(CHANNELS, GROUPS)


def edges(of: GuardCounters, rows: list[dict[str, int]]) -> list[tuple[int, str, bool, tuple[str, ...]]]:
    return [
        (number, finding.kind, finding.raised, finding.channels)
        for number, bits in enumerate(rows, start=1)
        for finding in of.update(**bits)
    ]


def test_a_channel_is_dead_after_three_windows_in_a_row() -> None:
    assert edges(counters(), [{"dead": GX}] * 4) == [(3, "dead", True, ("gx",))]


def test_two_dead_windows_and_a_good_one_are_nothing() -> None:
    assert edges(counters(), [{"dead": GX}, {"dead": GX}, {}] * 10) == []


def test_a_channel_that_moves_again_is_cleared_after_eight_windows() -> None:
    rows = [{"dead": GX}] * 3 + [{}] * 9
    assert edges(counters(), rows) == [(3, "dead", True, ("gx",)), (11, "dead", False, ("gx",))]


def test_a_relapse_before_that_keeps_it_raised() -> None:
    rows = [{"stuck": AX}] * 3 + [{}] * 7 + [{"stuck": AX}] + [{}] * 7
    assert edges(counters(), rows) == [(3, "stuck", True, ("ax",))]


def test_a_group_that_dies_together_is_one_finding() -> None:
    assert edges(counters(), [{"dead": GYRO}] * 3) == [(3, "dead", True, ("gx", "gy"))]


def test_a_second_channel_extends_the_finding_and_the_last_one_ends_it() -> None:
    rows = [{"dead": GX}] * 3 + [{"dead": GYRO}] * 3 + [{"dead": GY}] * 8 + [{}] * 8
    assert edges(counters(), rows) == [
        (3, "dead", True, ("gx",)),
        (6, "dead", True, ("gx", "gy")),
        (14, "dead", True, ("gy",)),
        (22, "dead", False, ("gy",)),
    ]


@pytest.mark.parametrize(
    ("kind", "argument", "needed"),
    [("scale", "scale", 6), ("range", "out_of_range", 3), ("not_finite", "not_finite", 3)],
)
def test_loose_kinds_count_within_the_last_eight_windows(kind: str, argument: str, needed: int) -> None:
    spread = [{argument: ACCEL} if row < needed else {} for row in range(8)][::-1]
    assert edges(counters(), spread) == [(8, kind, True, ("ax", "ay"))]
    one_short = [{argument: ACCEL} if row < needed - 1 else {} for row in range(8)] * 3
    assert edges(counters(), one_short) == []


def test_a_dead_channel_does_not_also_blame_its_groups_scale() -> None:
    assert edges(counters(), [{"dead": GX, "scale": GYRO}] * 10) == [(3, "dead", True, ("gx",))]


def test_another_groups_scale_is_still_blamed() -> None:
    kinds = {kind for _, kind, _, _ in edges(counters(), [{"dead": GX, "scale": GYRO | ACCEL}] * 10)}
    assert kinds == {"dead", "scale"}


def test_numbers_that_are_not_finite_explain_everything_else() -> None:
    rows = [{"not_finite": GX, "dead": GX, "stuck": GX, "scale": GYRO}] * 10
    assert edges(counters(), rows) == [(3, "not_finite", True, ("gx",))]


def test_a_finding_reads_without_its_numbers() -> None:
    ours = counters()
    found = [finding for _ in range(3) for finding in ours.update(dead=GX)]
    numbers = {"rows": 3.0, "rows_since_change": 3.0}
    assert found == [Finding("dead", raised=True, channels=("gx",), numbers=numbers, text="gx no longer moves")]
    both = counters()
    texts = [finding.text for _ in range(3) for finding in both.update(dead=GX | 1)]
    assert texts == ["ax, gx no longer move"]


BITS = st.fixed_dictionaries(
    {name: st.integers(0, 15) for name in ("dead", "stuck", "scale", "not_finite", "out_of_range")}
)


@given(st.lists(BITS, max_size=60), st.integers(0, 60))
def test_a_restart_in_between_changes_nothing(rows: list[dict[str, int]], cut: int) -> None:
    whole = edges(counters(), rows)
    first, second = counters(), counters()
    before = edges(first, rows[:cut])
    assert second.restore(json.loads(json.dumps(first.state())))
    after = [(number + len(rows[:cut]), *rest) for number, *rest in edges(second, rows[cut:])]
    assert before + after == whole


@given(st.lists(BITS, max_size=60))
def test_each_kind_is_cleared_only_after_it_was_raised(rows: list[dict[str, int]]) -> None:
    raised: set[str] = set()
    for _, kind, begins, channels in edges(counters(), rows):
        assert channels
        assert begins or kind in raised
        raised = raised | {kind} if begins else raised - {kind}


def test_state_of_other_channels_is_not_taken() -> None:
    assert not counters().restore(GuardCounters(("ax",), {"ax": "accel"}).state())


def test_reset_forgets_without_saying_so() -> None:
    ours = counters()
    edges(ours, [{"dead": GX}] * 3)
    ours.reset()
    assert ours.statistics()["dead"] == ()
    assert edges(ours, [{}] * 9) == []
