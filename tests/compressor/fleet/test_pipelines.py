"""The pipeline as a child: real processes, a stand-in program."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from agent.contract.errors import StorageError
from compressor.fleet.means import Built, Failed
from compressor.fleet.pipelines import SubprocessTrainer
from tests.compressor.fleet.doubles import wait_until

BUILD = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
for name in ("wrist", "wrist-floor"):
    folder = out / "gateway" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(" ".join(sys.argv))
"""
HANG = """
import os, pathlib, subprocess, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
out.mkdir(parents=True)
(out / "pids.tmp").write_text(f"{os.getpid()} {child.pid}")
(out / "pids.tmp").rename(out / "pids")
time.sleep(600)
"""


def trainer(script: str, tmp_path: Path, *, timeout_s: float = 60.0, device_class: str = "") -> SubprocessTrainer:
    return SubprocessTrainer(
        tmp_path / "recipe.toml", tmp_path / "cache", timeout_s=timeout_s, device_class=device_class,
        settings=("new_wearers=4,5,6",), program=(sys.executable, "-c", script),
        mark=tmp_path / "pipeline.pid",
    )  # fmt: skip


def test_what_was_built_is_found_and_the_pipeline_was_asked_rightly(tmp_path: Path) -> None:
    running = trainer(BUILD, tmp_path)
    assert running.poll() is None
    running.start(
        tmp_path / "b1", tmp_path / "rec", version=7, parents={"wrist-floor": "cd" * 32, "wrist": "ab" * 32}
    )
    built = wait_until(running.poll)
    assert built == Built(tuple(tmp_path / "b1" / "out" / "gateway" / name for name in ("wrist", "wrist-floor")))
    asked = (built.artifacts[0] / "manifest.json").read_text().split()[1:]
    assert asked == [
        "compress", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "b1" / "out"), "--cache",
        str(tmp_path / "cache"), "--enrolment", str(tmp_path / "rec"), "--set", "package.version=7",
        "--parent", f"wrist={'ab' * 32}", "--parent", f"wrist-floor={'cd' * 32}", "--set",
        "new_wearers=4,5,6",
    ]  # fmt: skip
    assert running.poll() is None


def test_only_the_wanted_class_is_asked_for(tmp_path: Path) -> None:
    running = trainer(BUILD, tmp_path, device_class="gateway")
    running.start(tmp_path / "b", tmp_path / "rec", version=2, parents={})
    built = wait_until(running.poll)
    assert isinstance(built, Built)
    assert "--device-class gateway" in (built.artifacts[0] / "manifest.json").read_text()


def test_a_failure_is_told_with_its_last_words(tmp_path: Path) -> None:
    running = trainer("import sys; print('gate refused c48', file=sys.stderr); sys.exit(11)", tmp_path)
    running.start(tmp_path / "b", tmp_path, version=1, parents={})
    assert wait_until(running.poll) == Failed("the pipeline ended with exit code 11: gate refused c48")


@pytest.mark.parametrize(
    ("script", "device_class", "words"),
    [
        ("", "", "device classes built: none"),
        (BUILD, "tiny", "device classes built: gateway; it was not built"),
        (BUILD + BUILD.replace("gateway", "tiny"), "", "gateway, tiny; set regeneration.device_class"),
    ],
)
def test_a_build_without_the_wanted_class_is_a_failure(
    tmp_path: Path, script: str, device_class: str, words: str
) -> None:
    running = trainer(script, tmp_path, device_class=device_class)
    running.start(tmp_path / "b", tmp_path, version=1, parents={})
    outcome = wait_until(running.poll)
    assert isinstance(outcome, Failed)
    assert words in outcome.text


def test_stopping_ends_it_with_everything_it_started(tmp_path: Path) -> None:
    running = trainer(HANG, tmp_path)
    running.start(tmp_path / "b", tmp_path, version=1, parents={})
    pids = wait_until(lambda: _pids(tmp_path))
    assert os.getpriority(os.PRIO_PROCESS, pids[0]) == 10
    running.stop()
    assert running.poll() is None
    wait_until(lambda: not any(_is_running(pid) for pid in pids))


def test_the_pipeline_of_a_killed_host_is_ended_by_the_next_one_and_nobody_else_is(tmp_path: Path) -> None:
    former = trainer(HANG, tmp_path)
    former.start(tmp_path / "b", tmp_path, version=1, parents={})
    pids = wait_until(lambda: _pids(tmp_path))
    mark = tmp_path / "pipeline.pid"
    said = mark.read_text()
    mark.write_text(f"{pids[0]} 1")  # the number, but another process
    trainer(HANG, tmp_path).stop()
    assert former.poll() is None
    for nonsense in ("", "0 -", "-1 -", f"{os.getpid()}", "x y z", "1 1"):
        mark.write_text(nonsense)
        trainer(HANG, tmp_path).stop()
    mark.write_text(said)
    trainer(HANG, tmp_path).stop()
    assert wait_until(former.poll) == Failed("the pipeline ended with exit code -9: it said nothing")
    wait_until(lambda: not any(_is_running(pid) for pid in pids))


def test_a_pipeline_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    running = trainer(HANG, tmp_path, timeout_s=0.0)
    running.start(tmp_path / "b", tmp_path, version=1, parents={})
    outcome = running.poll()
    assert isinstance(outcome, Failed)
    assert "did not end within 0 s" in outcome.text


def test_a_program_that_cannot_start_is_an_error_of_ours(tmp_path: Path) -> None:
    broken = SubprocessTrainer(tmp_path, tmp_path, timeout_s=1, program=(str(tmp_path / "missing"),))
    with pytest.raises(StorageError, match="cannot start the pipeline"):
        broken.start(tmp_path / "b", tmp_path, version=1, parents={})


def _pids(tmp_path: Path) -> list[int]:
    path = tmp_path / "b" / "out" / "pids"
    return [int(part) for part in path.read_text().split()] if path.exists() else []


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
