"""A child's frame: what stays behind when it or its caller goes. What it may do wrong is in test_trust."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from agent.ota import child
from agent.ota.child import Limits
from agent.ota.errors import Crashed, Killed, ResourceLimit

pytestmark = pytest.mark.system
LIMITS = Limits(memory_bytes=2**30, cpu_s=5, wall_s=20.0)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files, for this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A child's module from its code."""

    def write(code: str) -> Path:
        package = tmp_path / "odd"
        package.mkdir(exist_ok=True)
        (package / "toy.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n")
        monkeypatch.setattr(child, "_PACKAGES", package)
        return package

    return write


ANSWERING = "import os\nfrom agent.ota.child import serve\nsys.exit(serve(lambda request: {'answer': %s}))"


def test_a_child_stands_in_a_folder_that_holds_nothing_and_takes_nothing(
    temporary: Path, toy: Callable[[str], Path]
) -> None:
    toy(ANSWERING % "[os.listdir('.'), os.access('.', os.F_OK), os.path.exists('etc/passwd')]")
    assert child.run("toy", {}, LIMITS)["answer"][0] == []
    toy("try: open('file', 'w')\nexcept FileNotFoundError: sys.exit(7)")
    with pytest.raises(Crashed, match="status 7"):
        child.run("toy", {}, LIMITS)


def test_nothing_with_a_name_exists_while_a_child_runs_so_nothing_can_stay_behind(
    temporary: Path, toy: Callable[[str], Path]
) -> None:
    toy(ANSWERING % f"os.listdir({str(temporary)!r})")
    assert child.run("toy", {}, LIMITS) == {"answer": []}


def test_the_end_of_what_a_child_says_on_stderr_is_told(toy: Callable[[str], Path]) -> None:
    toy("sys.stderr.write('x' * 5000 + 'the end'); sys.exit(3)")
    with pytest.raises(Crashed, match=r"status 3: x+the end$"):
        child.run("toy", {}, LIMITS)


@pytest.mark.parametrize("said", [b"", b'{"limits": {"mem'])
def test_a_child_whose_caller_died_before_it_had_spoken_ends_without_a_traceback(
    toy: Callable[[str], Path], said: bytes
) -> None:
    package = toy(ANSWERING % "1")
    ended = subprocess.run([sys.executable, "-P", package / "toy.py"], input=said, capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr == b"no whole request came: the caller is gone\n"


def test_a_child_whose_caller_died_meanwhile_ends_without_a_traceback(toy: Callable[[str], Path]) -> None:
    package = toy(ANSWERING % "'x' * 200_000")
    nobody, answer = os.pipe()
    os.close(nobody)
    body = json.dumps({"limits": asdict(LIMITS)}).encode()
    ended = subprocess.run(
        [sys.executable, "-P", package / "toy.py"], input=body, stdout=answer, stderr=subprocess.PIPE
    )
    os.close(answer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ended_from_outside_is_told_apart_from_one_that_used_up_its_limits(
    toy: Callable[[str], Path], number: int
) -> None:
    toy(f"import os, sys\nsys.stdin.read()\nos.kill(os.getpid(), {int(number)})")
    with pytest.raises(Killed, match=number.name):
        child.run("toy", {}, LIMITS)
    toy(ANSWERING % "[1 for _ in iter(int, 1)]")
    with pytest.raises(ResourceLimit, match="processor time"):
        child.run("toy", {}, Limits(memory_bytes=2**30, cpu_s=1, wall_s=60.0))


def test_a_child_ended_before_it_read_a_long_request_was_killed(toy: Callable[[str], Path]) -> None:
    toy("import os, sys\nsys.stdin.close()\nos.kill(os.getpid(), 9)")
    with pytest.raises(Killed):
        child.run("toy", {"long": "x" * 500_000}, LIMITS)


def test_a_child_that_talks_without_end_is_ended(toy: Callable[[str], Path]) -> None:
    toy("import sys\nsys.stdin.read()\nwhile True: sys.stdout.write('x' * 65536)")
    with pytest.raises(ResourceLimit, match="answered more"):
        child.run("toy", {}, LIMITS)


def test_a_child_is_the_first_to_go_when_memory_is_short(toy: Callable[[str], Path]) -> None:
    toy(ANSWERING % "open('/proc/self/oom_score_adj').read().strip()")
    assert child.run("toy", {}, LIMITS) == {"answer": "1000"}
