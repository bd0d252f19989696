from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.contract.artifact import open_artifact
from agent.contract.errors import EngineFailed
from agent.engine import OnnxEngine
from compressor.examples.faulty import build_faulty, main
from compressor.verify import verify_artifact
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_it_proves_itself_and_then_fails_on_every_moving_window(tiny_run: Run, tmp_path: Path) -> None:
    folder = build_faulty(tiny_run.artifact(), tmp_path)
    assert folder.name == "tiny-faulty"
    assert any("golden" in check for check in verify_artifact(folder)["checks"])
    engine = OnnxEngine.load(open_artifact(folder).path("model"))
    engine.warm()
    moving = np.random.default_rng(0).standard_normal((3, 32, 3)).astype(np.float32)
    for row in range(3):
        with pytest.raises(EngineFailed):
            engine.run({"wave": moving[row : row + 1]})


def test_it_looks_like_its_sibling_in_all_but_name(tiny_run: Run, tmp_path: Path) -> None:
    sound, faulty = (
        open_artifact(f).manifest for f in (tiny_run.artifact(), build_faulty(tiny_run.artifact(), tmp_path))
    )
    for field in ("service", "inputs", "outputs", "views", "labels", "kind"):
        assert getattr(sound, field) == getattr(faulty, field)


def test_the_same_source_gives_the_same_bytes(tiny_run: Run, tmp_path: Path) -> None:
    one, two = (build_faulty(tiny_run.artifact(), tmp_path / name) for name in ("a", "b"))
    assert open_artifact(one).digest == open_artifact(two).digest


def test_a_folder_that_is_no_artifact_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 4
    assert "cannot read" in capsys.readouterr().err
