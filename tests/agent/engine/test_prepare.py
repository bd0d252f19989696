"""From file to engine on a device: the kept graph gives the same bits, and never a reason not to serve."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.contract.errors import Corrupt, Incompatible
from agent.contract.plan import RuntimePlan
from agent.engine import CPU, OnnxEngine, prepare, runtime_version, usable_providers
from agent.engine.prepare import cpu_features, physical_cores
from agent.modelcache import Entry, Key, ModelCache
from tests.models import classifier, model, save, window


def convolutional() -> onnx.ModelProto:
    """Convolutions, normalisation and a dense layer: what optimising for a CPU changes most."""
    generator = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.normal(scale=0.1, size=shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "scale", "bias", "mean", "var"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["g"], transB=1),
        helper.make_node("Softmax", ["g"], ["y"], axis=1),
    ]
    weights = [
        weight("w1", 16, 3, 3, 3), weight("scale", 16), weight("bias", 16), weight("mean", 16),
        numpy_helper.from_array(np.abs(generator.normal(size=16)).astype(np.float32) + 0.5, "var"),
        weight("w2", 32, 16, 3, 3), weight("w3", 10, 32), weight("b3", 10),
    ]  # fmt: skip
    return model(
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3, 28, 28])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 10])],
        weights,
    )


class Device:
    """A model file and a cache folder."""

    def __init__(self, folder: Path, proto: onnx.ModelProto) -> None:
        self.path = folder / "model.onnx"
        self.digest = save(proto, self.path)
        self.cache = folder / "state" / "models"

    def load(self, **changes: object) -> OnnxEngine:
        fields = {"threads": 0, "cache_folder": str(self.cache)} | changes
        runtime = RuntimePlan(**fields)  # type: ignore[arg-type]
        return prepare(self.path, sha256=self.digest, name="m", runtime=runtime, check=lambda _: None)

    def plant(self, graph: bytes) -> None:
        """Keep other bytes than the runtime's under a sound record."""
        place = self.cache.parent / "planted"
        place.write_bytes(graph)
        key = Key(self.digest, runtime_version(), cpu_features(), (), 0, spin=False, cores=physical_cores())
        assert ModelCache(self.cache).keep(key, Entry(1, 1.0, 1.0, place)) is not None

    @property
    def files(self) -> list[str]:
        return sorted(path.suffix for path in self.cache.iterdir())


def test_the_kept_graph_gives_the_same_bits_and_times(tmp_path: Path) -> None:
    device = Device(tmp_path, convolutional())
    first, again = device.load(), device.load()
    assert (first.cached, again.cached) == (False, True)
    assert device.files == [".json", ".onnx"]
    assert (again.threads, again.times) == (first.threads, first.times)
    assert (again.inputs, again.outputs) == (first.inputs, first.outputs)
    plain = OnnxEngine.load(device.path)
    for rows in (1, 7):
        x = np.random.default_rng(rows).normal(size=(rows, 3, 28, 28)).astype(np.float32)
        answers = [engine.run({"x": x})["y"].tobytes() for engine in (plain, first, again)]
        assert answers[0] == answers[1] == answers[2]


def test_the_kept_graph_is_what_is_loaded(tmp_path: Path) -> None:
    device = Device(tmp_path, classifier())
    first = device.load().run({"window": window()})["probability"]
    device.plant(classifier(scale=3.0).SerializeToString())
    engine = device.load()
    assert engine.cached
    assert np.abs(engine.run({"window": window()})["probability"] - first).max() > 0.01


@pytest.mark.parametrize("harm", ["flip", "truncate", "foreign", "record"])
def test_a_damaged_or_foreign_file_is_ignored_and_made_again(tmp_path: Path, harm: str) -> None:
    device = Device(tmp_path, classifier())
    expected = device.load().run({"window": window()})["probability"].tobytes()
    graph, record = next(device.cache.glob("*.onnx")), next(device.cache.glob("*.json"))
    good = graph.read_bytes()
    match harm:
        case "flip":
            graph.write_bytes(good[:100] + bytes([good[100] ^ 64]) + good[101:])
        case "truncate":
            graph.write_bytes(good[: len(good) // 2])
        case "foreign":
            save(classifier(scale=9.0), graph)
        case "record":
            record.write_text("{}")
    engine = device.load()
    assert not engine.cached
    assert engine.run({"window": window()})["probability"].tobytes() == expected
    assert device.load().cached
    assert graph.read_bytes() == good


def test_a_kept_graph_that_the_runtime_does_not_take_is_made_again(tmp_path: Path) -> None:
    device = Device(tmp_path, classifier())
    device.load()
    device.plant(b"no model")
    assert not device.load().cached
    assert device.load().cached


def test_the_model_itself_is_still_verified(tmp_path: Path) -> None:
    device = Device(tmp_path, classifier())
    device.load()
    save(classifier(scale=2.0), device.path)
    with pytest.raises(Corrupt, match="promised digest"):
        device.load()


def test_without_room_or_folder_it_is_served_all_the_same(tmp_path: Path) -> None:
    device = Device(tmp_path, classifier())
    (tmp_path / "state").write_text("no folder")
    assert not device.load().cached
    assert not device.load(cache_folder="").cached


def test_configured_threads_are_not_measured_and_kept_apart(tmp_path: Path) -> None:
    device = Device(tmp_path, classifier())
    assert device.load(threads=0).threads == 1  # far too quick for more
    assert device.load(threads=2).threads == 2
    assert device.load(threads=2).cached
    assert device.files == [".json", ".json", ".onnx", ".onnx"]


def test_threads_measured_with_more_cores_are_not_taken_over_where_there_are_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path, classifier())
    module = importlib.import_module("agent.engine.prepare")  # the package has a function of this name
    monkeypatch.setattr(module, "physical_cores", lambda: 4)
    device.load()
    assert device.load().cached
    monkeypatch.setattr(module, "physical_cores", lambda: 1)
    assert not device.load().cached
    assert device.load().cached
    assert not device.load(threads=2).cached
    monkeypatch.setattr(module, "physical_cores", lambda: 4)
    assert device.load(threads=2).cached  # nothing of it was measured


def test_a_provider_that_is_not_here_is_told_and_the_cpu_serves(tmp_path: Path) -> None:
    device = Device(tmp_path, classifier())
    for engine in (device.load(providers=("CUDA",)), device.load(providers=("CUDAExecutionProvider", "CPU"))):
        assert engine.provider == CPU
        assert "CUDAExecutionProvider was asked for, this runtime has CPUExecutionProvider" in engine.note
        assert engine.run({"window": window()})["probability"].shape == (1, 4)
    assert device.load(providers=("CPU",)).note == ""
    assert device.load().note == ""


def test_what_computes_on_somebody_elses_machine_is_no_provider(tmp_path: Path) -> None:
    assert usable_providers() == (CPU,)
    engine = Device(tmp_path, classifier()).load(providers=("Azure",))
    assert "AzureExecutionProvider was asked for" in engine.note


@pytest.mark.parametrize("allowed", [(), ("Loop",), ("If",)])
def test_control_flow_needs_to_be_named(tmp_path: Path, allowed: tuple[str, ...]) -> None:
    device = Device(tmp_path, classifier(trouble="slow"))
    missing = "Loop" if "If" in allowed else "If"  # the loop is inside a branch
    with pytest.raises(Incompatible, match=f"control-flow operator '{missing}'") as caught:
        device.load(control_flow=allowed)
    assert "runtime.control_flow" in caught.value.hint
    assert device.load(control_flow=("If", "Loop")).run({"window": window()})


def test_any_operator_with_a_graph_inside_is_control_flow(tmp_path: Path) -> None:
    proto = classifier(trouble="nan")
    next(node for node in proto.graph.node if node.op_type == "If").op_type = "Whatever"
    with pytest.raises(Incompatible, match="'Whatever'"):
        Device(tmp_path, proto).load(control_flow=("If",))


def test_cores_that_share_their_parts_count_once(tmp_path: Path) -> None:

    mine = sorted(os.sched_getaffinity(0))
    assert physical_cores(tmp_path) == len(mine)  # nothing known: each is one
    for cpu in mine:
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text("0-99\n")
    assert physical_cores(tmp_path) == 1
