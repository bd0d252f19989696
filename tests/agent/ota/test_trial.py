"""A candidate on trial, in a real child: right and wrong answers, wrong tensors, hogs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from agent.contract.artifact import Budget, Input, Runtime, open_artifact
from agent.contract.errors import ArtifactError, Corrupt, EdgewardenError, EngineFailed, Incompatible
from agent.contract.plan import RuntimePlan
from agent.engine import prepare
from agent.ota import child
from agent.ota.child import Limits
from agent.ota.errors import GoldenMismatch, ResourceLimit
from tests import models
from tests.agent.ota.world import make_artifact

pytestmark = pytest.mark.system
LIMITS = Limits(memory_bytes=768 * 1024 * 1024, cpu_s=3, wall_s=20.0)
WINDOW = helper.make_tensor_value_info("window", TensorProto.FLOAT, [None, models.LENGTH, models.CHANNELS])
PROBABILITY = helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, models.CLASSES])


def tried(folder: Path, *, limit_s: float = 5.0, runtime: dict[str, Any] | None = None) -> dict[str, Any]:
    request = {"folder": str(folder), "limit_s": limit_s, "runtime": runtime or {}}
    return child.run("agent.ota.trial", request, LIMITS)


def test_a_good_candidate_passes_and_is_measured(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    answer = tried(tmp_path / "a")
    assert answer["ok"]
    assert answer["golden_rows"] == 4
    assert 0.0 < answer["p50_us"] < 1e5
    assert 10**7 < answer["peak_rss_bytes"] < 10**9


def test_a_floor_passes_without_a_model(tmp_path: Path) -> None:
    document = {"kind": "floor", "floor_outputs": {"probability": [0.25] * models.CLASSES}}
    make_artifact(tmp_path / "floor", name="wrist-floor", golden=False, **document)
    assert tried(tmp_path / "floor")["ok"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"wrong": 0.01}, GoldenMismatch),
        ({"golden": False}, GoldenMismatch),
        ({"inputs": [Input(name="window", datatype="FP32", shape=[-1, 9, models.CHANNELS])]}, Incompatible),
        ({"inputs": [Input(name="frame", datatype="FP32", shape=[-1, models.LENGTH, 3])]}, Incompatible),
        ({"inputs": [Input(name="window", datatype="INT8", shape=[-1, models.LENGTH, 3])]}, Incompatible),
        ({"proto": models.classifier(view=False)}, Incompatible),
        ({"proto": models.classifier(trouble="raise"), "shift": 200.0}, EngineFailed),
        ({"proto": models.classifier(trouble="nan"), "shift": 200.0}, GoldenMismatch),
    ],
)
def test_a_candidate_that_is_not_what_it_says_is_refused(
    tmp_path: Path, fields: dict[str, Any], error: type[EdgewardenError]
) -> None:
    make_artifact(tmp_path / "a", **fields)
    with pytest.raises(error):
        tried(tmp_path / "a")


def test_a_loop_without_end_is_ended(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", proto=models.classifier(trouble="slow"), shift=200.0)
    with pytest.raises(ResourceLimit):
        tried(tmp_path / "a", limit_s=0.5)


def _with_ballast(node: onnx.NodeProto, shape: list[int], then: list[onnx.NodeProto]) -> onnx.ModelProto:
    """A model that makes a huge constant, works on it and returns nothing of it but one number."""
    nodes = [
        node,
        *then,
        helper.make_node("ReduceMax", ["end"], ["most"], keepdims=0),
        helper.make_node("ReduceMean", ["window"], ["few"], axes=[1], keepdims=0),
        helper.make_node("Add", ["few", "most"], ["ew_view_channels"]),
        helper.make_node("Concat", ["ew_view_channels", "one"], ["probability"], axis=1),
        helper.make_node("Slice", ["window", "zero", "unit", "axis"], ["first"]),
        helper.make_node("ReduceMax", ["first"], ["one"], axes=[2], keepdims=0),
    ]
    nodes = [*nodes[:-3], nodes[-2], nodes[-1], nodes[-3]]
    view = helper.make_tensor_value_info("ew_view_channels", TensorProto.FLOAT, [None, models.CHANNELS])
    weights = [
        helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape),
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("unit", TensorProto.INT64, [1], [1]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    return models.model(nodes, [WINDOW], [PROBABILITY, view], weights)


def test_a_memory_hog_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    node = helper.make_node("ConstantOfShape", ["shape"], ["huge"], value=value)
    proto = _with_ballast(node, [2**30], [helper.make_node("Abs", ["huge"], ["end"])])
    assert len(proto.SerializeToString()) < 2000
    make_artifact(tmp_path / "a", proto=proto)
    with pytest.raises(ResourceLimit):
        tried(tmp_path / "a")


@pytest.mark.parametrize(
    ("memory_bytes", "budgets", "whose"),
    [
        (60_000_000, [], "configured"),
        (0, [Budget(device_class="gateway", memory_bytes=60_000_000)], "promised"),
        (60_000_000, [Budget(device_class="gateway", memory_bytes=900_000_000)], "configured before promised"),
    ],
)
def test_a_candidate_may_take_what_is_configured_else_what_it_promises(
    tmp_path: Path, memory_bytes: int, budgets: list[Budget], whose: str
) -> None:
    assert whose
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    node = helper.make_node("ConstantOfShape", ["shape"], ["huge"], value=value)
    proto = _with_ballast(node, [40_000_000], [helper.make_node("Abs", ["huge"], ["end"])])
    make_artifact(tmp_path / "a", proto=proto, budgets=budgets)
    with pytest.raises(ResourceLimit, match="more than the 60 MB of memory it may take"):
        tried(tmp_path / "a", runtime={"memory_bytes": memory_bytes})


def test_what_a_trial_finds_out_is_kept_for_the_worker(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    artifact = open_artifact(tmp_path / "a")
    runtime = RuntimePlan(threads=0, cache_folder=str(tmp_path / "models"))
    answer = tried(tmp_path / "a", runtime=asdict(runtime))
    assert 0 <= answer["memory_bytes"] < 300e6
    engine = prepare(
        artifact.path("model"), sha256=artifact.manifest.blobs["model"].sha256, name="a", runtime=runtime,
        check=lambda _: None,
    )  # fmt: skip
    assert engine.cached


@pytest.mark.parametrize(("manifest", "configured"), [([], []), (["If"], []), ([], ["If"]), (["If"], ["If", "Loop"])])
def test_control_flow_is_named_by_the_manifest_or_by_the_configuration(
    tmp_path: Path, manifest: list[str], configured: list[str]
) -> None:
    runtime = Runtime(opset=17, minimum="1.20", precision="float32", control_flow=manifest)
    make_artifact(tmp_path / "a", proto=models.classifier(scale=1.01, trouble="nan"), runtime=runtime)
    if manifest or configured:
        assert tried(tmp_path / "a", runtime={"control_flow": configured})["ok"]
    else:
        with pytest.raises(Incompatible, match="control-flow operator 'If'"):
            tried(tmp_path / "a")


def test_a_processor_hog_that_cannot_be_stopped_is_killed(tmp_path: Path) -> None:
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1e-9])
    node = helper.make_node("ConstantOfShape", ["shape"], ["m0"], value=value)
    chain = [helper.make_node("MatMul", [f"m{n}", f"m{n}"], [f"m{n + 1}"]) for n in range(40)]
    proto = _with_ballast(node, [3000, 3000], [*chain, helper.make_node("Abs", ["m40"], ["end"])])
    make_artifact(tmp_path / "a", proto=proto)
    with pytest.raises(ResourceLimit):
        tried(tmp_path / "a")


def test_a_folder_that_was_touched_is_corrupt(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(Corrupt):
        tried(tmp_path / "a")


def test_bytes_that_are_no_model_are_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", proto=onnx.ModelProto())
    with pytest.raises(ArtifactError):
        tried(tmp_path / "a")
