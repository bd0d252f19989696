from __future__ import annotations

from pathlib import Path

import pytest

from agent.contract.artifact import open_artifact
from agent.contract.errors import Incompatible
from agent.engine import OnnxEngine, check_golden, load_golden
from compressor.examples.broken import build_broken, main
from compressor.verify import verify_artifact
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_every_digest_is_right_and_the_self_test_fails(tiny_run: Run, tmp_path: Path) -> None:
    folder = build_broken(tiny_run.artifact(), tmp_path, 3)
    artifact = open_artifact(folder)  # verifies sizes and digests
    assert (folder.name, artifact.manifest.version) == ("tiny", 3)
    result = check_golden(OnnxEngine.load(artifact.path("model")), load_golden(artifact.path("golden")))
    assert not result.passed
    with pytest.raises(Incompatible):
        verify_artifact(folder)


def test_it_differs_from_its_source_in_version_parent_and_golden_answers_alone(tiny_run: Run, tmp_path: Path) -> None:
    sound = open_artifact(tiny_run.artifact())
    broken = open_artifact(build_broken(tiny_run.artifact(), tmp_path, 2))
    assert broken.manifest.parent == sound.digest
    same = {"version", "parent", "blobs"}
    assert sound.manifest.model_dump(exclude=same) == broken.manifest.model_dump(exclude=same)
    for role in ("model", "reference", "card"):
        assert sound.manifest.blobs[role] == broken.manifest.blobs[role]
    assert sound.manifest.blobs["golden"] != broken.manifest.blobs["golden"]


def test_the_same_source_gives_the_same_bytes(tiny_run: Run, tmp_path: Path) -> None:
    one, two = (build_broken(tiny_run.artifact(), tmp_path / name, 2) for name in ("a", "b"))
    assert open_artifact(one).digest == open_artifact(two).digest


def test_a_floor_has_no_self_test_to_fail(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="no golden"):
        build_broken(tiny_run.artifact("tiny-floor"), tmp_path, 2)


def test_a_folder_that_is_no_artifact_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out"), "--version", "2"]) == 4
    assert "cannot read" in capsys.readouterr().err
