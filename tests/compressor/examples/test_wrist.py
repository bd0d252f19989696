from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.artifact import open_artifact
from agent.engine import OnnxEngine
from compressor.cli import main
from compressor.errors import DataError, RecipeError
from compressor.evaluate import ask
from compressor.examples.wrist import task as wrist
from compressor.task import Role

QUICK = Path(__file__).parents[3] / "compressor" / "examples" / "wrist" / "recipe.quick.toml"
FOLDS = [(1, 2, 3), (4, 5, 6), (8, 9, 10), (2, 5, 9)]


@pytest.mark.parametrize("new", FOLDS)
def test_no_sample_is_in_two_roles_and_new_wearers_are_in_none_of_the_old(new: tuple[int, ...]) -> None:
    data = wrist.load({"new_wearers": list(new)})
    used: dict[int, list[tuple[int, int, Role]]] = {}
    for role, rows in data.rows.items():
        assert set(rows.sources.tolist()) == (set(new) if role in wrist.NEW else set(range(1, 11)) - set(new))
        for recording in np.unique(rows.recordings):
            starts = rows.starts[rows.recordings == recording]
            used.setdefault(int(recording), []).append((int(starts[0]), int(starts[-1]) + 128, role))
    assert len(used) == 140
    for spans in used.values():
        for (_, end, _), (start, _, _) in pairwise(sorted(spans)):
            assert end <= start


def test_the_default_fold_has_the_documented_number_of_rows() -> None:
    rows = wrist.load({}).rows
    assert {role: len(rows[role]) for role in (Role.TRAIN, Role.SELECT, Role.STREAM)} == {
        Role.TRAIN: 1525, Role.SELECT: 255, Role.STREAM: 792,
    }  # fmt: skip


def test_rows_are_float32_windows_with_matching_labels() -> None:
    rows = wrist.stream()
    assert rows.windows.shape == (792, 128, 6)
    assert rows.windows.dtype == np.float32
    assert np.isfinite(rows.windows).all()
    assert set(rows.labels.tolist()) == set(range(7))


def test_the_stream_runs_recording_by_recording_in_time() -> None:
    rows = wrist.stream()
    changes = np.flatnonzero(np.diff(rows.recordings) != 0)
    assert len(changes) + 1 == len(np.unique(rows.recordings)) == 98
    assert (np.diff(rows.starts)[np.diff(rows.recordings) == 0] == 64).all()
    assert (np.diff(rows.sources) >= 0).all()


@pytest.mark.parametrize("value", [[11], [1, 1], [], "1,2", [1, 2, 3, 4, 5, 6, 7, 8]])
def test_an_impossible_choice_of_wearers_is_refused(value: object) -> None:
    with pytest.raises(RecipeError, match=r"new_wearers = .* is not a list of one to seven distinct wearers"):
        wrist.load({"new_wearers": value})


def test_the_lines_for_scripts_in_the_readme_run() -> None:
    text = (Path(wrist.__file__).parent / "README.md").read_text().partition("## For scripts")[2]
    lines = [line.removeprefix("    ") for line in text.splitlines() if line.startswith("    ")]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)  # noqa: S102
    assert "gyro_off" in names["names"]
    assert names["broken"].shape == names["rows"].windows.shape


def test_a_file_with_another_digest_is_never_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "watch_dataset.npy"
    np.save(trap, np.array({"X": object}, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not the expected data set") as caught:
        wrist.read_recordings(trap)
    assert "pip install --no-deps seglearn==1.2.5" in caught.value.sentence()


def test_a_missing_file_tells_the_command() -> None:
    with pytest.raises(DataError, match="cannot read") as caught:
        wrist.read_recordings(Path("/nowhere/watch_dataset.npy"))
    assert wrist.INSTALL in caught.value.hint


def test_the_installed_file_is_the_documented_one() -> None:
    assert hashlib.sha256(wrist.dataset_path().read_bytes()).hexdigest() == wrist.SHA256


def test_faults_touch_the_channels_they_name_and_no_other() -> None:
    windows = wrist.stream().windows[:40]
    for fault in wrist.TASK.all_faults():
        changed = np.abs(wrist.apply_fault(fault.name, windows) - windows).max(axis=(0, 1)) > 0
        touched = {name for name, is_changed in zip(wrist.NAMES, changed, strict=True) if is_changed}
        assert touched == set(fault.channels), fault.name


def test_known_faults_do_what_they_say() -> None:
    windows = wrist.stream().windows[:10]
    assert not wrist.apply_fault("gyro_off", windows)[:, :, 3:].any()
    assert np.allclose(wrist.apply_fault("accel_in_ms2", windows)[:, :, :3], windows[:, :, :3] * 9.80665, rtol=1e-5)
    assert np.array_equal(wrist.apply_fault("swap_xy", windows)[:, :, 4], windows[:, :, 3])
    assert np.abs(wrist.apply_fault("accel_saturated", windows)[:, :, :3]).max() == 1.0


def test_an_unknown_fault_is_told() -> None:
    with pytest.raises(RecipeError, match="no fault 'gyro_of'"):
        wrist.apply_fault("gyro_of", wrist.stream().windows[:1])


@pytest.mark.torch
def test_augmentation_keeps_the_window_recognisable() -> None:
    import torch

    windows = torch.from_numpy(wrist.stream().windows[:50])
    varied = wrist.augment(windows, torch.Generator().manual_seed(0))
    assert varied.shape == windows.shape
    assert torch.equal(varied, wrist.augment(windows, torch.Generator().manual_seed(0)))
    assert float((varied.mean(1) - windows.mean(1)).abs().mean()) < 0.3


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)
def test_the_quick_recipe_keeps_its_promises(tmp_path: Path) -> None:
    """The run of the quickstart, cold: accurate enough, within budgets, byte for byte repeatable."""
    reports = []
    measured: list[str] = []
    for name in ("one", "two"):
        out = tmp_path / name / "out"
        places = ["--out", str(out), "--cache", str(tmp_path / name / "cache")]
        assert main(["compress", str(QUICK), *places, *measured]) == 0
        measured = ["--replay", str(out / "measurements.json")]  # a rebuild trains anew but never measures
        reports.append(json.loads((out / "report.json").read_text()))
    report = reports[0]
    assert report["teacher"]["accuracy"] >= 0.9
    gateway, tiny = report["device_classes"]
    assert gateway["accuracy"]["wrist"] >= 0.9
    assert gateway["accuracy"]["wrist-accel"] >= 0.85
    off = next(fault for fault in gateway["faults"] if fault["name"] == "gyro_off")
    assert off["harmful"]
    assert off["accuracy"]["wrist-accel"] >= off["accuracy"]["wrist"] + 0.1
    assert gateway["claim"]["alarms"] == 0
    sizes = {device["name"]: device["budget"]["size_bytes"] for device in report["device_classes"]}
    chosen = {d["name"]: next(v for v in d["variants"] if v["chosen"]) for d in (gateway, tiny)}
    assert all(chosen[name]["size_bytes"] <= sizes[name] for name in sizes)
    assert [d["artifacts"] for d in reports[0]["device_classes"]] == [
        d["artifacts"] for d in reports[1]["device_classes"]
    ]


def _enrolment(folder: Path, wearers: tuple[int, ...]) -> None:
    """What the watches of new wearers upload: the first 30 % of each of their recordings."""
    folder.mkdir()
    for wearer in wearers:
        windows, labels, recordings = [], [], []
        for number, (samples, label, who) in enumerate(wrist._recordings()):
            if who == wearer:
                end = int(0.3 * len(samples))
                cut = [samples[at : at + 128] for at in range(0, end - 127, 64)]
                windows += cut
                labels += [label] * len(cut)
                recordings += [number % 128] * len(cut)
        np.savez(
            folder / f"watch-{wearer}.npz", windows=np.stack(windows), labels=np.array(labels, np.int8),
            recordings=np.array(recordings, np.int16),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)
def test_new_wearers_are_learnt_and_the_enrolled_ones_not_forgotten(tmp_path: Path) -> None:
    """Little training, so that it is about the way and not about the figures."""
    _enrolment(tmp_path / "recordings", (1, 2, 3))
    recipe = tmp_path / "recipe.toml"
    text = QUICK.read_text().replace('"task.py"', '"compressor.examples.wrist.task"')
    recipe.write_text(re.sub(r"epochs = \d+", "epochs = 6", text))
    arguments = [
        "compress", str(recipe), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--enrolment",
        str(tmp_path / "recordings"), "--device-class", "gateway", "--set", "package.version=2",
        "--set", "gates.accuracy_drop=0.1", "--set", "gates.fallback_drop=0.4", "--set", "regenerate.epochs_share=1",
    ]  # fmt: skip
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (device,) = report["regeneration"]["device_classes"]
    active = device["engines"][0]
    assert active["after"]["new"] > active["before"]["new"] + 0.05
    assert active["after"]["stream"] > active["before"]["stream"] - 0.05
    artifact = open_artifact(tmp_path / "out" / "gateway" / "wrist")
    made = OnnxEngine.load(artifact.path("model"))
    new = wrist.load({}).role(Role.NEW_TEST)
    after = ask(made, "window", new.windows).accuracy(new.labels)
    assert after > 0.8
