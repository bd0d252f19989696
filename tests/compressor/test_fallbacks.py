from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agent.contract.artifact import open_artifact
from compressor.cli import main as compressor
from compressor.fallbacks import BUILT_ON, FOLDER, RECIPE, differences, keep_weights, machine_class, main, rebuild
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_the_shipped_models_verify() -> None:
    for name in ("wrist-accel", "wrist-gyro", "wrist-norm", "wrist-floor"):
        assert compressor(["artifact", "verify", str(FOLDER / name)]) == 0


@pytest.mark.parametrize(
    ("name", "reads", "faults", "least"),
    [
        ("wrist-accel", ["ax", "ay", "az"], ("gyro_off", "gyro_dead_x", "gyro_in_degrees"), 0.9),
        ("wrist-gyro", ["gx", "gy", "gz"], ("accel_in_ms2", "stuck_ax"), 0.85),
        ("wrist-norm", [], ("swap_xy", "worn_180", "rotated_45"), 0.85),
    ],
)
def test_a_shipped_fallback_does_not_notice_the_faults_it_is_there_for(
    name: str, reads: list[str], faults: tuple[str, ...], least: float
) -> None:
    artifact = open_artifact(FOLDER / name)
    card = artifact.card()
    rows = {fault["name"]: fault["accuracy"][name] for fault in card["faults"]}
    assert artifact.manifest.reads == reads
    assert [rows[fault] for fault in faults] == [card["accuracy"][name]] * len(faults)
    assert card["accuracy"][name] >= least


@pytest.mark.slow
def test_the_shipped_models_are_rebuilt_from_their_weights(tmp_path: Path) -> None:
    rebuild(RECIPE, FOLDER, tmp_path)
    different = differences(FOLDER, tmp_path)
    assert "wrist-accel/model.onnx" not in different
    if json.loads((FOLDER / BUILT_ON).read_text()) == machine_class():
        assert different == [], "run scripts/make-fallback-models and commit what it writes"


def test_a_rebuild_repeats_byte_for_byte_and_check_notices_a_change(tiny_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    keep_weights(tiny_run.recipe, folder, tiny_run.cache)
    arguments = ["--recipe", str(tiny_run.recipe), "--folder", str(folder)]
    assert main(arguments) == 0
    assert {path.name for path in folder.iterdir()} == {"tiny-one", "tiny-floor", "tiny-one.weights.npz", BUILT_ON}
    assert main([*arguments, "--check"]) == 0
    (folder / "tiny-one" / "card.json").write_text("{}")
    assert main([*arguments, "--check"]) == 1


def test_missing_weights_are_told(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(tiny_run.recipe), "--folder", str(tmp_path)]) == 10
    assert "weights" in capsys.readouterr().err


def test_differences_are_by_name(tmp_path: Path) -> None:
    for side, text in (("a", "1"), ("b", "2")):
        (tmp_path / side / "x").mkdir(parents=True)
        (tmp_path / side / "x" / "file").write_text(text)
    assert differences(tmp_path / "a", tmp_path / "b") == ["x/file"]
    shutil.copy(tmp_path / "a" / "x" / "file", tmp_path / "b" / "x" / "file")
    assert differences(tmp_path / "a", tmp_path / "b") == []
