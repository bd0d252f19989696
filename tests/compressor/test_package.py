from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.contract.artifact import MANIFEST, Budget, Choice, canonical, open_artifact
from agent.contract.errors import StorageError
from agent.engine import check_golden, load_golden
from compressor.package import Content, Origin, build_artifact, write_artifact
from compressor.recipe import read_recipe
from compressor.stages.naming import VIEW_OUTPUT
from compressor.task import load_task
from tests.compressor.conftest import TINY, Run
from tests.models import classifier

pytestmark = pytest.mark.torch


def test_the_manifest_says_what_a_device_needs(tiny_run: Run) -> None:
    manifest = open_artifact(tiny_run.artifact()).manifest
    assert (manifest.name, manifest.service, manifest.kind) == ("tiny", "tiny", "onnx")
    assert manifest.fallbacks == ["tiny-one", "tiny-floor"]
    assert [channel.name for channel in manifest.inputs[0].channels] == ["left", "right", "flow"]
    assert manifest.inputs[0].shape == [-1, 32, 3]
    view = manifest.views[0]
    assert (view.output, len(view.features), view.features[0]) == (VIEW_OUTPUT, 12, "left.mean")
    assert VIEW_OUTPUT not in [output.name for output in manifest.outputs]
    assert manifest.budgets[0].device_class == "bench"
    assert manifest.choice is not None
    assert manifest.choice.reason
    assert set(manifest.blobs) == {"model", "reference", "golden", "card"}


def test_a_fallback_says_what_it_reads_but_sees_all_channels(tiny_run: Run) -> None:
    manifest = open_artifact(tiny_run.artifact("tiny-one")).manifest
    assert manifest.reads == ["left", "right"]
    assert manifest.inputs[0].shape == [-1, 32, 3]
    assert len(manifest.views[0].features) == 12
    assert manifest.fallbacks == ["tiny-floor"]


def test_the_floor_is_the_class_prior_and_has_no_model(tiny_run: Run) -> None:
    manifest = open_artifact(tiny_run.artifact("tiny-floor")).manifest
    assert manifest.kind == "floor"
    assert set(manifest.blobs) == {"card"}
    assert manifest.floor_outputs == {"probability": [0.333333] * 3}
    assert manifest.views == []


def test_the_card_tables_every_engine_under_every_fault(tiny_run: Run) -> None:
    card = open_artifact(tiny_run.artifact()).card()
    assert {fault["name"] for fault in card["faults"]} >= {
        "flow_off",
        "louder",
        "dead:left",
        "stuck:flow",
        "scale:two",
    }
    for fault in card["faults"]:
        assert set(fault["accuracy"]) == {"tiny", "tiny-one", "tiny-floor"}
        assert all(0 <= value <= 1 for value in fault["accuracy"].values())
    assert card["accuracy"]["role"] == "stream"
    assert card["claim"]["replayed_rows"] > 0
    assert {line["fault"] for line in card["detectability"]} == {"flow_off", "louder"}
    assert (card["device_class"], card["seeds"], card["owner"]) == ("bench", [3], "tests")


def test_a_fallback_does_not_notice_what_it_does_not_read(tiny_run: Run) -> None:
    card = open_artifact(tiny_run.artifact()).card()
    flow_off = next(fault for fault in card["faults"] if fault["name"] == "flow_off")
    assert flow_off["accuracy"]["tiny-one"] == card["accuracy"]["tiny-one"]


def test_no_measured_time_is_in_an_artifact(tiny_run: Run) -> None:
    for name in ("tiny", "tiny-one", "tiny-floor"):
        for file in (MANIFEST, "card.json"):
            text = (tiny_run.artifact(name) / file).read_text()
            assert " us " not in text
            assert "cpu_p20" not in text
            assert canonical(json.loads(text)) == text.encode()


def test_golden_inputs_are_answered_by_the_shipped_file(tiny_run: Run) -> None:
    from agent.engine import OnnxEngine

    artifact = open_artifact(tiny_run.artifact())
    golden = load_golden(artifact.path("golden"))
    assert golden.inputs["wave"].shape == (4, 32, 3)
    assert check_golden(OnnxEngine.load(artifact.path("model")), golden).passed


def test_an_artifact_that_cannot_be_written_leaves_the_former_and_nothing_half_done(tmp_path: Path) -> None:
    write_artifact(tmp_path / "wrist", {"card.json": b"first"})
    with pytest.raises(StorageError):
        write_artifact(tmp_path / "wrist", {"card.json": b"second", "card.json/below": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["wrist"]
    assert (tmp_path / "wrist" / "card.json").read_bytes() == b"first"


@pytest.mark.parametrize(("trouble", "expected"), [("", None), ("nan", ["If"]), ("slow", ["If", "Loop"])])
def test_operators_with_graphs_inside_are_named_for_the_device(trouble: str, expected: list[str] | None) -> None:
    content = Content(
        name="tiny",
        task=load_task("task.py", TINY.parent)[0],
        package=read_recipe(TINY).package,
        origin=Origin("", "", "", {}, 1),
        budget=Budget(device_class="bench", latency_p95_us=1.0, memory_bytes=1, size_bytes=1),
        fallbacks=(),
        card={},
        choice=Choice(variant="one", device_class="bench", reason="the only one"),
        precision="float32",
        model=classifier(trouble=trouble).SerializeToString(),
    )
    runtime = json.loads(build_artifact(content)[MANIFEST])["runtime"]
    assert runtime.get("control_flow") == expected  # absent where there is none: manifests stay as they were
