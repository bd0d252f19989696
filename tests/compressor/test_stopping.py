"""A stopped or killed `compress` leaves no training and no folder behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from compressor.stopping import SIGNALS, Stopped, stoppable

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0


@contextmanager
def compressing(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A compression with two trainings under way, which would take hours."""
    recipe = (ROOT / "tests/compressor/tiny/recipe.toml").read_text()
    recipe = recipe.replace("processes = 1", "processes = 2").replace("epochs = 16", "epochs = 10_000")
    (folder / "recipe.toml").write_text(recipe.replace("epochs = 24", "epochs = 10_000"))
    task = (ROOT / "tests/compressor/tiny/task.py").read_text()
    (folder / "task.py").write_text(
        task + "import os, sys\nprint('loaded by', os.getpid(), file=sys.stderr, flush=True)\n"
    )
    (folder / "temporary").mkdir()
    command = [sys.executable, "-m", "compressor", "compress", folder / "recipe.toml"]
    with subprocess.Popen(
        [*command, "--out", folder / "out", "--cache", folder / "cache"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(folder / "temporary")},
    ) as process:  # fmt: skip
        try:
            yield process, trainings(process)
        finally:
            process.kill()


def trainings(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two training processes, once both have loaded the task."""
    found: list[psutil.Process] = []
    for line in process.stderr or ():
        number = line.removeprefix("loaded by ").strip()
        if line.startswith("loaded by ") and int(number) != process.pid:
            found.append(psutil.Process(int(number)))
        if len(found) == 2:
            return found
    raise AssertionError("no two trainings began")


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.torch
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_stopped_compression_ends_its_trainings_and_says_so(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with compressing(tmp_path) as (process, children):
        process.send_signal(number)
        told = process.communicate(timeout=PATIENCE_S)[1]
        assert process.returncode == code
        assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
    assert "interrupted" in told
    assert "Traceback" not in told
    assert not list((tmp_path / "temporary").glob("edgewarden-*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.torch
def test_the_trainings_of_a_killed_compression_end_themselves(tmp_path: Path) -> None:
    with compressing(tmp_path) as (process, children):
        process.kill()
        assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]


def test_a_signal_within_is_raised_once_and_things_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped) as caught, stoppable():
        _stopped_twice()
    assert caught.value.exit_code == 143
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _stopped_twice() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
