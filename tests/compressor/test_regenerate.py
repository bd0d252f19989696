"""A second run of the tiny task: newcomers whose waves are slower than anything known."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.artifact import Artifact, open_artifact
from agent.drift.reference import load_reference
from agent.engine import load_golden
from compressor.candidate import Candidate
from compressor.cli import main
from compressor.enrolment import read_enrolment
from compressor.recipe import RegenerateTable, open_task, read_recipe
from compressor.regenerate import SWAPPED, new_accuracy, second_gates
from compressor.task import Role
from tests.compressor.conftest import Run
from tests.compressor.test_select import candidate

pytestmark = pytest.mark.torch

LENGTH, HOP, NAMES = 32, 16, ("tiny", "tiny-one", "tiny-floor")
LABELS = ("slow", "middle", "fast")


def upload(
    folder: Path, device: str, *, pace: float = 0.5, seed: int = 0, shift: int = 0, offset: float = 1.5
) -> None:
    """What a device would send: six recordings of 320 samples. `shift`: lies about the labels."""
    generator = np.random.default_rng(seed)
    windows, labels, recordings = [], [], []
    for recording in range(6):
        label = recording % 3
        time = np.arange(320)[:, None]
        phase = generator.uniform(0, 6, (1, 3))
        samples = np.sin(pace * (0.3 + 0.35 * label) * time + phase) + offset
        samples = (samples + 0.1 * generator.standard_normal((320, 3))).astype(np.float32)
        for start in range(0, 320 - LENGTH + 1, HOP):
            windows.append(samples[start : start + LENGTH])
            labels.append((label + shift) % 3)
            recordings.append(recording)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / f"{device}.npz", windows=np.stack(windows), labels=np.array(labels, np.int8),
        recordings=np.array(recordings, np.int8),
    )  # fmt: skip


def standing(accuracy: dict[str, float]) -> Candidate:
    return replace(candidate("any", 1.0, 10, 10), accuracy=accuracy)


@dataclass(frozen=True)
class Second:
    folder: Path
    arguments: list[str]
    report: dict[str, Any]

    def artifact(self, name: str = "tiny") -> Artifact:
        return open_artifact(self.folder / "out" / "bench" / name)


def arguments(run: Run, folder: Path, *more: str) -> list[str]:
    return [
        "compress", str(run.recipe), "--out", str(folder / "out"), "--cache", str(run.cache),
        "--enrolment", str(folder / "recordings"), "--set", "package.version=2",
        "--set", 'quantise.precisions=["float32"]', *more,  # a second export would double the time
    ]  # fmt: skip


@pytest.fixture(scope="module")
def second(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Second:
    folder = tmp_path_factory.mktemp("second")
    for seed, device in enumerate(("watch-1", "watch-2")):
        upload(folder / "recordings", device, seed=seed)
    given = arguments(tiny_run, folder, "--parent", str(tiny_run.artifact()), "--parent", f"tiny-floor={'ab' * 32}")
    assert main(given) == 0
    return Second(folder, given, json.loads((folder / "out" / "report.json").read_text()))


# --- the gates -----------------------------------------------------------------------------------------------
def test_the_gate_of_newcomers_weighs_both_halves_by_their_rows(second: Second, tiny_run: Run) -> None:
    task, _ = open_task(read_recipe(tiny_run.recipe), tiny_run.recipe)
    halves = read_enrolment(second.folder / "recordings", task, task.load({}))
    sizes = len(halves.straight.reference), len(halves.swapped.reference)
    one = standing({"enrol_reference": 1.0, SWAPPED: 0.0, "select": 1.0})
    assert new_accuracy(one, halves) == pytest.approx(sizes[0] / sum(sizes))


@pytest.mark.parametrize(
    ("select", "new", "refused"),
    [(0.99, 0.8, []), (0.97, 0.8, ["forgetting"]), (0.99, 0.5, ["new"]), (0.9, 0.5, ["new", "forgetting"])],
)
def test_a_successor_must_not_lose_newcomers_nor_forget(
    second: Second, tiny_run: Run, select: float, new: float, refused: list[str]
) -> None:
    task, _ = open_task(read_recipe(tiny_run.recipe), tiny_run.recipe)
    halves = read_enrolment(second.folder / "recordings", task, task.load({}))
    first = standing({"select": 1.0, "enrol_reference": 0.6, SWAPPED: 0.6})
    after = standing({"select": select, "enrol_reference": new, SWAPPED: new})
    gates = second_gates(RegenerateTable(forgetting=0.02), first, after, halves)
    assert [gate.name for gate in gates if not gate.passed] == refused


# --- a whole run ---------------------------------------------------------------------------------------------
def test_newcomers_gain_and_known_sources_stay(second: Second) -> None:
    (device,) = second.report["regeneration"]["device_classes"]
    for engine in device["engines"]:
        assert engine["after"]["new"] >= engine["before"]["new"]
        assert engine["after"]["select"] >= engine["before"]["select"] - 0.02
    active = device["engines"][0]
    assert (active["name"], active["kept"]) == ("tiny", False)
    assert active["after"]["new"] > active["before"]["new"] + 0.2


def test_every_artifact_bears_the_new_version_its_parent_and_where_it_comes_from(
    second: Second, tiny_run: Run
) -> None:
    parents = {"tiny": open_artifact(tiny_run.artifact()).digest, "tiny-one": None, "tiny-floor": "ab" * 32}
    for name in NAMES:
        manifest = second.artifact(name).manifest
        assert (manifest.version, manifest.parent) == (2, parents[name])
        told = manifest.provenance["enrolment"]
        assert told["sha256"] == second.report["regeneration"]["enrolment_sha256"]
        assert [one["rows"] for one in told["recordings"]] == [114, 114]
        assert "watch-1" not in manifest.encode().decode()  # who it was stays on the host
    assert "enrolment" not in open_artifact(tiny_run.artifact()).manifest.provenance


def test_the_card_tells_old_and_new_roles(second: Second) -> None:
    card = second.artifact().card()
    assert card["accuracy"]["role"] == "stream"
    assert card["accuracy_new"]["role"] == "enrol_reference"
    assert card["accuracy_new"]["tiny"] > card["accuracy_new"]["before"]["tiny"]


def test_the_reference_knows_the_newcomers_and_the_golden_inputs_do_not(second: Second, tiny_run: Run) -> None:
    both = (open_artifact(tiny_run.artifact()), second.artifact())
    old, new = (load_reference(artifact.path("reference")) for artifact in both)
    assert new.rows == old.rows + second.report["rows"]["enrol_reference"]
    golden = [load_golden(artifact.path("golden")) for artifact in both]
    assert np.array_equal(golden[0].inputs["wave"], golden[1].inputs["wave"])


def test_the_teacher_is_neither_trained_nor_offered_again(second: Second) -> None:
    assert {c["model"] for c in second.report["candidates"]} == {"small", "one"}
    assert second.report["teacher"]["name"] == "teacher"


def test_the_page_shows_before_and_after(second: Second) -> None:
    page = (second.folder / "out" / "report.html").read_text()
    assert "Before and after" in page
    assert "watch-2 (114 windows)" in page


def test_a_second_run_of_it_trains_nothing_and_writes_the_same_bytes(second: Second, tiny_run: Run) -> None:
    before = {name: second.artifact(name).digest for name in NAMES}
    kept = {path.name for path in tiny_run.cache.glob("*/*")}
    assert main(second.arguments) == 0
    assert {name: second.artifact(name).digest for name in NAMES} == before
    assert {path.name for path in tiny_run.cache.glob("*/*")} == kept


# --- refusals ------------------------------------------------------------------------------------------------
def test_lies_that_cost_old_accuracy_are_refused_and_nothing_ships(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(tmp_path / "recordings", "liar", pace=1.0, offset=0.1, shift=1)
    more = (
        "regenerate.repeat=20",
        "gates.accuracy_drop=1",
        "gates.fallback_drop=1",
        'quantise.precisions=["float32"]',
    )
    assert main(arguments(tiny_run, tmp_path, *(part for text in more for part in ("--set", text)))) == 11
    assert "gate 'forgetting' refused every model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_poisoned_recording_is_exit_code_nine_and_named(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(tmp_path / "recordings", "good")
    upload(tmp_path / "recordings", "bad", offset=np.nan)
    assert main(arguments(tiny_run, tmp_path)) == 9
    assert "bad.npz is refused" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--device-class", "benhc"], 2, "It has bench"),
        (["--parent", "tiny=12"], 2, "NAME=DIGEST"),
        (["--parent", "/nowhere"], 4, "cannot read"),
        (["--set", "regenerate.forgeting=1"], 2, "forgetting"),
    ],
)
def test_a_wrong_order_is_told_before_anything_is_trained(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: str
) -> None:
    upload(tmp_path / "recordings", "watch")
    assert main(arguments(tiny_run, tmp_path, *more)) == code
    assert words in capsys.readouterr().err


def test_explain_tells_what_a_second_run_does(second: Second, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*second.arguments, "--explain"]) == 0
    told = capsys.readouterr()
    assert "teach" in told.err
    assert "tiny taught: newcomers" in told.out


def test_the_roles_of_a_report_name_no_row_of_the_last_test(second: Second) -> None:
    assert Role.NEW_TEST not in second.report["rows"]
