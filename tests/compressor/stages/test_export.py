from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from agent.drift.views import Combination, channel_features, window_features
from agent.engine import OnnxEngine
from compressor.assess import interpret, without_view
from compressor.families import PlainConv1d
from compressor.lowering import fold
from compressor.stages.export import Served, export, legacy
from compressor.stages.naming import OPSET, PROBABILITY, VIEW_OUTPUT

pytestmark = pytest.mark.torch
WINDOWS = np.random.default_rng(3).normal(1, 2, (5, 128, 6)).astype(np.float32)

BUILD = """
import sys, torch
from pathlib import Path
from compressor.families import PlainConv1d
from compressor.lowering import fold
from compressor.stages.export import Served, export
torch.manual_seed(1)
served = Served(fold(PlainConv1d(2, 4, 3)), reads=[0, 2], mean=torch.arange(6.0), sd=torch.arange(1.0, 7.0))
Path(sys.argv[1]).write_bytes(export(served, input_name="window", shape=(128, 6)))
"""


def served(reads: list[int]) -> Served:
    torch.manual_seed(1)
    network = fold(PlainConv1d(len(reads), 4, 3))
    return Served(network, reads=reads, mean=torch.arange(6.0), sd=torch.arange(1.0, 7.0))


@pytest.fixture(scope="module")
def model() -> bytes:
    return export(served([0, 2]), input_name="window", shape=(128, 6))


def run(model: bytes, folder: Path, windows: np.ndarray) -> dict[str, np.ndarray]:
    (folder / "m.onnx").write_bytes(model)
    return OnnxEngine.load(folder / "m.onnx").run({"window": windows})


def test_the_engine_answers_as_torch_does(model: bytes, tmp_path: Path) -> None:
    with torch.no_grad():
        probability, view = served([0, 2])(torch.from_numpy(WINDOWS))
    told = run(model, tmp_path, WINDOWS)
    assert np.abs(told[PROBABILITY] - probability.numpy()).max() < 1e-5
    assert np.abs(told[VIEW_OUTPUT] - view.numpy()).max() < 1e-5
    assert np.abs(interpret(model, "window", WINDOWS) - told[PROBABILITY]).max() < 1e-5


def test_preprocessing_is_inside_and_the_view_sees_every_channel(model: bytes, tmp_path: Path) -> None:
    told = run(model, tmp_path, WINDOWS)
    assert np.abs(told[VIEW_OUTPUT] - channel_features(WINDOWS)).max() <= 1e-4
    changed = WINDOWS.copy()
    changed[:, :, 1] += 100  # a channel the network does not read
    assert np.array_equal(run(model, tmp_path, changed)[PROBABILITY], told[PROBABILITY])


def test_a_network_of_lengths_does_not_notice_a_turn_and_the_view_does(tmp_path: Path) -> None:
    combinations = (Combination("norm", (0, 1, 2)), Combination("dot", (0, 1, 2), (3, 4, 5)))
    torch.manual_seed(1)
    network = Served(
        fold(PlainConv1d(2, 4, 3)), reads=[6, 7], mean=torch.zeros(8), sd=torch.ones(8), combinations=combinations
    )
    model = export(network, input_name="window", shape=(128, 6))
    told = run(model, tmp_path, WINDOWS)
    assert np.abs(told[VIEW_OUTPUT] - window_features(WINDOWS, combinations)).max() <= 1e-4
    turned = WINDOWS[:, :, [1, 2, 0, 4, 5, 3]]
    after = run(model, tmp_path, turned)
    assert np.allclose(after[PROBABILITY], told[PROBABILITY], atol=1e-5)
    assert np.abs(after[VIEW_OUTPUT] - told[VIEW_OUTPUT]).max() > 0.1


def test_one_row_and_many_rows_are_answered_alike(model: bytes, tmp_path: Path) -> None:
    alone = run(model, tmp_path, WINDOWS[:1])[PROBABILITY]
    assert np.allclose(alone, run(model, tmp_path, WINDOWS)[PROBABILITY][:1], atol=1e-6)


def test_nothing_of_the_host_is_in_the_file(model: bytes) -> None:
    for trace in (str(Path.cwd()), str(Path.home()), sys.prefix, ".py", "site-packages", 'File "', "Traceback"):
        assert trace.encode() not in model, trace
    proto = onnx.load_from_string(model)
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == OPSET


def test_another_process_in_another_folder_writes_the_same_bytes(model: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "somewhere" / "else"
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", BUILD, "out.onnx"], cwd=folder, check=True, capture_output=True)
    assert (folder / "out.onnx").read_bytes() == model


def test_the_older_exporter_gives_the_same_answers(model: bytes, tmp_path: Path) -> None:
    other = legacy(served([0, 2]), input_name="window", shape=(128, 6))
    one, two = run(model, tmp_path, WINDOWS), run(other, tmp_path, WINDOWS)
    for name in (PROBABILITY, VIEW_OUTPUT):
        assert np.abs(one[name] - two[name]).max() < 1e-5


class Undecided(torch.nn.Module):
    """Branches on data, which the newer exporter refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean(2)
        return pooled * 2 if bool(x.abs().sum() > 0) else pooled


def test_what_the_newer_exporter_refuses_goes_to_the_older_one(tmp_path: Path) -> None:
    both = Served(Undecided(), reads=[0, 1], mean=torch.zeros(6), sd=torch.ones(6))
    told = run(export(both, input_name="window", shape=(128, 6)), tmp_path, WINDOWS)
    with torch.no_grad():
        assert np.abs(told[PROBABILITY] - both(torch.from_numpy(WINDOWS))[0].numpy()).max() < 1e-5


def test_the_view_can_be_left_out_with_all_its_nodes(model: bytes, tmp_path: Path) -> None:
    bare = without_view(model)
    assert b"TopK" not in bare
    assert np.array_equal(run(bare, tmp_path, WINDOWS)[PROBABILITY], run(model, tmp_path, WINDOWS)[PROBABILITY])
