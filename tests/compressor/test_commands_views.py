"""`views add` as a person types it: what is written, what is printed, how it ends."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from agent.contract.artifact import View
from compressor.cli import main
from tests.compressor.test_surgery import mlp, told


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(mlp(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_view_is_added_and_the_manifests_entry_printed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("watched.onnx")
    assert main(["views", "add", str(model), "--view", "identity", "--input", "x", "--out", str(out), "--json"]) == 0
    view = View.model_validate_json(capsys.readouterr().out)
    assert (view.kind, view.output, view.features[:2]) == ("identity", "ew_view_identity", ["x.0", "x.1"])
    x = np.ones((2, 12), np.float32)
    assert told(onnx.load(out), view.output, x).tolist() == x.tolist()
    again = out.read_bytes()
    assert main(["views", "add", str(model), "--view", "identity", "--input", "x", "--out", str(out)]) == 0
    assert "outputs the same to the bit" in capsys.readouterr().out
    assert out.read_bytes() == again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--view", "identity", "--input", "y"], "no input 'y'"),
        (["--view", "hidden", "--tensor", "nothing"], "makes no tensor 'nothing'"),
        (["--view", "channels"], "needs windows"),
    ],
)
def test_what_cannot_be_done_ends_with_4_and_writes_nothing(
    model: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.with_name("watched.onnx")
    assert main(["views", "add", str(model), *options, "--out", str(out)]) == 4
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_file_that_is_no_model_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.write_text(json.dumps({"no": "model"}))
    assert main(["views", "add", str(model), "--view", "identity", "--out", str(model.with_name("o"))]) == 4
    assert "is no ONNX file" in capsys.readouterr().err
    assert main(["views", "add", "nowhere.onnx", "--view", "identity", "--out", "o"]) == 4
    assert "cannot read nowhere.onnx" in capsys.readouterr().err
