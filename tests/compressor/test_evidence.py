from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.drift.reference import load_reference
from agent.engine import load_golden
from compressor.evidence import class_prior, golden_bytes, view_names
from compressor.recipe import open_task, read_recipe
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch


def test_golden_answers_are_rounded_and_readable_by_the_engine(tmp_path: Path) -> None:
    windows = np.ones((2, 4, 1), np.float32)
    data = golden_bytes("x", windows, {"p": np.array([[1 / 3], [2 / 3]], np.float32)}, 1e-3)
    (tmp_path / "golden.npz").write_bytes(data)
    golden = load_golden(tmp_path / "golden.npz")
    assert golden.tolerance == 1e-3
    assert np.allclose(golden.outputs["p"].ravel(), [0.33333, 0.66667], atol=1e-8)
    assert data == golden_bytes("x", windows, {"p": np.array([[1 / 3], [2 / 3]], np.float32)}, 1e-3)


def test_the_prior_is_the_share_of_training_rows(tiny_recipe: Path) -> None:
    task, _ = open_task(read_recipe(tiny_recipe), tiny_recipe)
    assert class_prior(task, task.load({})) == [0.333333] * 3
    assert view_names(task).features[4] == "right.mean"


def test_the_reference_knows_the_tasks_names_and_its_claim_stands_on_the_card(tiny_run: Run) -> None:
    reference = load_reference(tiny_run.artifact() / "reference.npz")
    assert reference.channels == ("left", "right", "flow")
    assert reference.labels == ("slow", "middle", "fast")
    claim = tiny_run.report["device_classes"][0]["claim"]
    assert reference.claim.text == claim["text"]
    assert claim["distinct_rows"] == tiny_run.report["rows"]["select"]
    assert "windows of role select" in claim["text"]
