"""An ONNX file with added views, served by a real worker: the monitor gets the rows it follows, clients never do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from agent.blueprint import Blueprint, draw_up
from agent.client import Client
from agent.config import AgentConfig
from agent.contract.artifact import FILES, MANIFEST, Blob, Input, Manifest, Output, Runtime, View, sha256
from agent.contract.plan import WorkerPlan
from agent.drift import Claim, GuardStatistics, Reference, dump_reference
from agent.drift.views import output_features
from agent.monitor import Monitor
from compressor.surgery import Wanted, add_view
from tests.compressor.test_surgery import mlp
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system

LABELS = ("a", "b", "c")
OUTPUTS = View(name="outputs", kind="outputs", source="agent", features=["confidence", "entropy", *LABELS])


def served(folder: Path, followed: str) -> Blueprint:
    """The MLP with a hidden and an identity view, in that order, and a reference about `followed`."""
    hidden = add_view(mlp(hidden=20), Wanted("hidden", "layer"))
    both = add_view(hidden.model, Wanted("identity", "x"))
    views = [hidden.view, both.view, OUTPUTS]
    (about,) = [view for view in views if view.name == followed]
    width = len(about.features)
    reference = Reference(
        features=tuple(about.features), channels=(), groups={}, labels=LABELS, rows=1000,
        channel_of=np.full(width, -1, np.int16), centre=np.zeros(width, np.float32), scale=np.ones(width, np.float32),
        class_share=np.full(3, 1 / 3, np.float32), guard=GuardStatistics({}, {}, {}),
        claim=Claim(0, 0, 0, 0, 0, 0.95, ""),
    )  # fmt: skip
    blobs = {"model": both.model.SerializeToString(), "reference": dump_reference(reference)}
    manifest = Manifest(
        name="mlp", version=1, service="mlp", task="t", inputs=[Input(name="x", datatype="FP32", shape=[-1, 12])],
        outputs=[Output(name="p", datatype="FP32", shape=[-1, 3])], labels=list(LABELS), label_output="p",
        views=views,
        runtime=Runtime(opset=17, minimum=onnxruntime.__version__, precision="float32"),
        blobs={role: Blob(file=FILES[role], size=len(raw), sha256=sha256(raw)) for role, raw in blobs.items()},
    )  # fmt: skip
    folder.mkdir()
    for role, raw in blobs.items():
        (folder / FILES[role]).write_bytes(raw)
    (folder / MANIFEST).write_bytes(manifest.encode())
    (made,) = draw_up(AgentConfig.model_validate({"service": [{"name": "mlp", "artifact": folder}]}))
    assert made.problems == ()
    return made


@pytest.mark.parametrize("followed", ["identity", "hidden", "outputs"])
def test_the_monitor_follows_any_view_of_an_adopted_model(tmp_path: Path, followed: str) -> None:
    made = served(tmp_path / "mlp", followed)
    x = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32) * 0.1
    plan = WorkerPlan(generation=1, services=(made.plan,))
    with Sockets(tmp_path) as sockets, RunningWorker(sockets, plan).serve(), Client(sockets.unix_address) as client:
        answers = [client.infer("mlp", {"x": row[None]}).outputs for row in x]
        records = sockets.ring.read(1000)
    assert {name for answer in answers for name in answer} == {"p"}
    p = np.concatenate([answer["p"] for answer in answers]).astype(np.float64)
    weights = onnx.numpy_helper.to_array(mlp(hidden=20).graph.initializer[0]).astype(np.float64)
    expected = {
        "identity": x,
        "hidden": np.maximum(x @ weights, 0.0),
        "outputs": output_features(p.argmax(axis=1), p.max(axis=1), -(p * np.log(p)).sum(axis=1), 3),
    }[followed]
    watched = Monitor(made.monitor, made.reference)
    watched.observe(records)
    (window,) = watched.take_window()["drift"]
    assert (window["view"], window["rows"]) == (followed, 40)
    np.testing.assert_allclose(np.array(window["sums"]) / 1024, expected.clip(-4, 4).sum(axis=0), atol=40 / 1024)
    assert sum(watched.statistics()["classes"]) == 40
