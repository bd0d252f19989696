"""Documentation that fails the build: generated pages are current, commands in the README exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from compressor.verify import verify_artifact
from scripts.render_docs import REFERENCE, pages
from tests.models import model

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_generated_page_is_what_the_code_says(name):
    assert (REFERENCE / name).read_text() == pages()[name], "run scripts/render-docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_and_link_a_page_names_exists(page):
    text = page.read_text()
    for script in re.findall(r"(?<![\w/])scripts/[\w-]+", text):
        assert (ROOT / script).exists(), script
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_configuration_key_has_a_meaning():
    assert "None |" not in pages()["agent-config.md"]


def test_choices_and_bounds_of_a_key_are_listed():
    page = pages()["agent-config.md"]
    for row in (
        '| `not_finite` | `"refuse"`, `"impute"`, `"clip"`, `"pass"` | none |',
        '| `delete_after` | `"puback"`, `"host"` | `"puback"` |',
        "| `keepalive_s` | integer, ≥ 5, ≤ 3_600 | `30` |",
    ):
        assert row in page


def test_errors_of_updates_and_of_the_compressor_are_listed_with_their_exit_codes():
    page = pages()["errors.md"]
    for row in (
        "GoldenMismatch | `golden_mismatch` | 4",
        "DataError | `data` | 9",
        "GateFailed | `gate_failed` | 11",
    ):
        assert row in page


def test_the_task_guide_makes_an_artifact_of_an_onnx_file(tmp_path):
    declared = onnx.helper.make_tensor_value_info
    x, p = (declared(name, onnx.TensorProto.FLOAT, ["rows", size]) for name, size in (("x", 4), ("p", 3)))
    weights = onnx.helper.make_tensor("weights", onnx.TensorProto.FLOAT, [4, 3], [0.5] * 12)
    product = onnx.helper.make_node("MatMul", ["x", "weights"], ["p"])
    onnx.save(model([product], [x], [p], [weights]), tmp_path / "model.onnx")
    section = (ROOT / "docs/task-guide.md").read_text().partition("## Only an ONNX file")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code
    subprocess.run([sys.executable, "-c", code.group(1)], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert verify_artifact(tmp_path / "iris")["name"] == "iris"
