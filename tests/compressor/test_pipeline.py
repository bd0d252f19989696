from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compressor.cli import main
from compressor.pipeline import plan, total_work
from compressor.recipe import read_recipe
from tests.compressor.conftest import Run

pytestmark = pytest.mark.torch

NAMES = ("tiny", "tiny-one", "tiny-floor")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of every artifact, by its place."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*/*")) if path.is_file()
    }


def test_one_run_writes_active_fallback_and_floor(tiny_run: Run) -> None:
    assert sorted(path.name for path in (tiny_run.out / "bench").iterdir()) == sorted(NAMES)


@pytest.mark.slow
def test_another_run_in_another_folder_writes_the_same_bytes(tiny_run: Run, tmp_path: Path) -> None:
    place = tmp_path / "quite" / "elsewhere"
    place.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "compressor",
        "compress",
        str(tiny_run.recipe),
        "--out",
        "out",
        "--cache",
        "cache",
    ]
    subprocess.run([*command, "--set", "train.processes=2"], cwd=place, check=True, capture_output=True)
    first, second = contents(tiny_run.out), contents(place / "out")
    assert [name for name in first if first[name] != second.get(name)] == []
    assert first.keys() == second.keys()


def test_a_second_run_takes_everything_from_the_cache_and_writes_the_same_bytes(
    tiny_run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    assert main(["compress", str(tiny_run.recipe), "--out", str(out), "--cache", str(tiny_run.cache), "--json"]) == 0
    assert contents(out) == contents(tiny_run.out)


def test_a_changed_setting_reuses_what_it_does_not_touch(tiny_run: Run, tmp_path: Path) -> None:
    before = {path.name for path in tiny_run.cache.glob("*/*")}
    out = tmp_path / "other"
    arguments = ["--out", str(out), "--cache", str(tiny_run.cache), "--set", "package.version=7"]
    assert main(["compress", str(tiny_run.recipe), *arguments]) == 0
    assert {path.name for path in tiny_run.cache.glob("*/*")} == before


def test_the_plan_names_every_model_and_device_class(tiny_recipe: Path) -> None:
    recipe = read_recipe(tiny_recipe)
    text = " ".join(line for _, line in plan(recipe))
    assert all(name in text for name in ("teacher", "small", "one", "bench"))
    assert total_work(recipe) > 0
