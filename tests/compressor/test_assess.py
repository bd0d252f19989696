from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.assess import golden_rows
from compressor.recipe import open_task, read_recipe
from compressor.task import Role
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_golden_rows_show_every_label_and_come_from_the_calibrate_role(tiny_recipe: Path) -> None:
    task, _ = open_task(read_recipe(tiny_recipe), tiny_recipe)
    data = task.load({})
    rows = data.role(Role.CALIBRATE)
    chosen = golden_rows(data, 5)
    places = [next(i for i in range(len(rows)) if np.array_equal(rows.windows[i], window)) for window in chosen]
    assert len(set(places)) == 5
    assert set(rows.labels[places].tolist()) == {0, 1, 2}


def test_every_candidate_was_held_against_torch_and_the_standards_interpreter(tiny_run: Run) -> None:
    for candidate in tiny_run.report["candidates"]:
        gates = {gate["name"]: gate for gate in candidate["gates"]}
        assert gates["parity"]["measured"] >= gates["parity"]["limit"]
        if candidate["precision"] == "float32":
            assert gates["parity_error"]["measured"] < 1e-5


def test_the_view_costs_something_and_less_than_everything(tiny_run: Run) -> None:
    for candidate in tiny_run.report["candidates"]:
        assert candidate["latency_view_us"] < candidate["latency_cpu_p20_us"]
