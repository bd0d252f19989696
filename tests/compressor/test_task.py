from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.contract.artifact import Channel
from compressor.errors import RecipeError
from compressor.examples.wrist.task import TASK
from compressor.task import load_task, systematic_faults

CHANNELS = [
    Channel(name=name, unit="V", group=group, minimum=-1, maximum=1)
    for name, group in (("a", "one"), ("b", "one"), ("c", "two"))
]


def test_every_diagnosis_a_device_can_make_has_a_row() -> None:
    names = [fault.name for fault in systematic_faults(CHANNELS, {"two": 10.0})]
    assert sorted(names) == sorted(
        ["dead:a", "dead:b", "dead:c", "stuck:a", "stuck:b", "stuck:c", "dead:one", "dead:two", "scale:two"]
    )


def test_a_group_fault_touches_its_channels_only() -> None:
    fault = next(f for f in systematic_faults(CHANNELS, {"two": 10.0}) if f.name == "dead:one")
    windows = np.ones((2, 4, 3), np.float32)
    assert fault.channels == ("a", "b")
    assert fault.apply(windows)[0, 0].tolist() == [0, 0, 1]


def test_a_fault_breaks_the_same_way_for_the_same_seed() -> None:
    fault = next(f for f in systematic_faults(CHANNELS, {}) if f.name == "stuck:a")
    windows = np.random.default_rng(0).standard_normal((20, 8, 3)).astype(np.float32)
    assert np.array_equal(fault.apply(windows, 1), fault.apply(windows, 1))
    assert not np.array_equal(fault.apply(windows, 1), fault.apply(windows, 2))


@pytest.mark.parametrize(
    ("source", "text"),
    [("import no_such_module", "ModuleNotFoundError"), ("def (", "SyntaxError"), ("TASK = 3", "no attribute TASK")],
)
def test_a_task_module_that_cannot_be_used_is_told(tmp_path: Path, source: str, text: str) -> None:
    (tmp_path / "task.py").write_text(source)
    with pytest.raises(RecipeError, match=text):
        load_task("task.py", tmp_path)


def test_a_missing_task_module_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_task("task.py", tmp_path)
    with pytest.raises(RecipeError, match="cannot be imported"):
        load_task("no.such.task", tmp_path)


def test_a_task_is_found_by_dotted_name_too() -> None:
    task, digest = load_task("compressor.examples.wrist.task", Path())
    assert (task.service, len(digest)) == ("wrist", 64)


# --- series made of channels ----------------------------------------------------------------------------------
def test_a_task_names_the_series_its_models_may_read() -> None:
    assert TASK.series[6:] == ("norm(accel)", "norm(gyro)", "dot(accel,gyro)")
    assert TASK.positions(["norm(gyro)", "ax"]) == (7, 0)
    assert TASK.positions([]) == (0, 1, 2, 3, 4, 5)


def test_a_model_reads_the_channels_its_series_are_made_of() -> None:
    assert TASK.channels_behind(["norm(accel)"]) == ("ax", "ay", "az")
    assert TASK.channels_behind(["gx", "norm(accel)"]) == ("ax", "ay", "az", "gx")
    assert TASK.channels_behind(["norm(accel)", "dot(accel,gyro)"]) == ()  # all


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norms": ("magnet",)}, "has no group 'magnet'"),
        ({"products": (("accel", "light"),)}, "have not as many channels"),
    ],
)
def test_series_of_groups_that_do_not_fit_are_told(changes: dict[str, object], text: str) -> None:
    lux = Channel(name="lux", unit="lx", group="light", minimum=0, maximum=9)
    with pytest.raises(RecipeError, match=text):
        _ = replace(TASK, channels=(*TASK.channels, lux), **changes).combinations  # type: ignore[arg-type]
