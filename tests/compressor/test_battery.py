"""The standard faults on any view: what is found, who is named, what is promised."""

from __future__ import annotations

import numpy as np
import pytest

from agent.drift import GuardStatistics, Reference
from compressor.battery import Line, measure_battery, promise
from compressor.calibration import calibrate
from compressor.reference import build_reference, feature_view_names
from tests.compressor.test_calibration import FEATURES, GUARD, NAMES, decided, gaussian, regimes, stream


def related(rows: int, seed: int) -> np.ndarray:
    x = gaussian(rows, seed)
    return 0.8 * x[:, :1] + 0.6 * x


@pytest.fixture(scope="module")
def stationary() -> tuple[Reference, dict[str, Line]]:
    reference = decided(stream(related(2000, 1)), stream(related(1200, 2))).reference
    lines = measure_battery(reference, stream(related(1500, 3)), runs=4)
    return reference, {line.fault: line for line in lines}


def test_what_is_larger_is_found_sooner_and_nothing_is_not_found(
    stationary: tuple[Reference, dict[str, Line]],
) -> None:
    _, lines = stationary
    assert (lines["no change"].found_share, lines["gap of 50 rows"].found_share) == (0.0, 0.0)
    large, middle = lines["shift 1 sd, one feature"], lines["shift 0.5 sd, one feature"]
    assert (large.found_share, large.named_share) == (1.0, 1.0)
    assert large.median_delay_rows < middle.median_delay_rows
    for name in ("stuck, one feature", "missing in half of the rows, one feature", "relation lost, one feature"):
        assert lines[name].found_share == 1.0, name
    assert lines["stuck, one feature"].median_delay_rows <= 48


def test_the_promise_is_of_the_smallest_shift_that_is_found(stationary: tuple[Reference, dict[str, Line]]) -> None:
    _, lines = stationary
    text = promise(tuple(lines.values()))
    size = next(s for s in ("0.25", "0.5", "1") if lines[f"shift {s} sd, one feature"].found_share >= 0.95)
    assert text.startswith(f"a shift of one feature by {size} sd is found within 1000 rows in 100% of 4 runs")
    blind = tuple(Line(line.fault, 4, 1000, None, 0.0, None) for line in lines.values())
    assert promise(blind) == "no shift of one feature up to 1 sd is promised within 1000 rows"


def test_regimes_are_tried_with_the_same_faults() -> None:
    reference = build_reference(regimes(240, 1), NAMES, guard=GUARD, held_out=regimes(240, 2))
    lines = {line.fault: line for line in measure_battery(reference, regimes(400, 3), runs=2)}
    assert lines["no change"].found_share == 0.0
    assert lines["shift 1 sd, one feature"].found_share == 1.0  # of all rows: far from every regime
    assert "missing in half of the rows, one feature" not in lines


def test_a_view_that_is_watched_only_promises_nothing() -> None:
    x = gaussian(1500, 7) * np.exp(np.arange(1500) / 200)[:, None]
    made = calibrate(
        stream(x[:900]), stream(x[900:]), feature_view_names(FEATURES, ("any",)),
        guard=GuardStatistics({}, {}, {}), regimes=lambda: pytest.fail("one recording"),
    )  # fmt: skip
    assert measure_battery(made.reference, stream(x), runs=2) == ()
    assert promise(()) == "no change is promised to be found: the view is watched only"
