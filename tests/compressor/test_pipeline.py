from __future__ import annotations

import json
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
    command = [sys.executable, "-m", "compressor", "compress", str(tiny_run.recipe), "--out", "out", "--cache", "c"]
    # times are replayed: on a busy machine two measurements of nets this small may rank them differently
    again = ["--set", "train.processes=2", "--replay", str(tiny_run.out / "measurements.json")]
    subprocess.run([*command, *again], cwd=place, check=True, capture_output=True)
    first, second = contents(tiny_run.out), contents(place / "out")
    assert [name for name in first if first[name] != second.get(name)] == []
    assert first.keys() == second.keys()


def test_replayed_times_decide_instead_of_new_ones(tiny_run: Run, tmp_path: Path) -> None:
    document = json.loads((tiny_run.out / "measurements.json").read_text())
    for name, figures in document["models"].items():
        figures["cpu_p20_us"] = 10.0 if name.endswith("int8") else 1000.0
    document["machine"]["processor"] = "another"
    (tmp_path / "earlier.json").write_text(json.dumps(document))
    arguments = ["--cache", str(tiny_run.cache), "--replay", str(tmp_path / "earlier.json"), "--out", str(tmp_path)]
    assert main(["compress", str(tiny_run.recipe), *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device_classes"][0]["chosen"].endswith("int8")
    assert report["machine"]["processor"] == "another"
    assert report["latency_replayed"]


def test_times_of_other_models_are_not_replayed(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tiny_run.out / "measurements.json").read_text()
    digest = json.loads(text)["models"]["small"]["sha256"]
    for content in (text.replace(digest, "0" * 64), "{}", "no json"):
        (tmp_path / "earlier.json").write_text(content)
        arguments = ["--cache", str(tiny_run.cache), "--replay", str(tmp_path / "earlier.json")]
        assert main(["compress", str(tiny_run.recipe), *arguments, "--out", str(tmp_path / "out")]) == 10
        assert "replay" in capsys.readouterr().err


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
