"""`edgewarden-agent infer` over many files: what is answered, written, told and left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.cli import main
from tests.artifacts import record
from tests.models import engine_plan, expected_probability, service_plan, window, worker_plan
from tests.processes import RunningWorker, Sockets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three files of which the second is damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    windows = record(seed=4).windows
    np.save(folder / "a.npy", windows[:70])
    (folder / "b.npy").write_bytes(b"damaged")
    np.save(folder / "c.npy", windows[:2])
    return folder


def test_a_damaged_file_is_told_and_the_others_are_answered(
    artifacts: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["infer", "--artifact", str(artifacts["wrist"]), str(data), "--json", "--concurrency", "3"]) == 8
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line.get("row", line.get("code")) for line in lines] == [*range(70), "invalid_request", 0, 1]
    first, last = told.err.splitlines()
    assert f"cannot read {data / 'b.npy'}" in first
    assert last == "edgewarden-agent: 2 of 3 files were answered, 1 could not be"


@pytest.mark.parametrize("form", ["npz", "csv", "jsonl"])
def test_answers_are_written_beside_each_other(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    (data / "b.npy").unlink()
    out = tmp_path / "out"
    arguments = ["infer", "--artifact", str(artifacts["wrist"]), str(data), "--out", str(out), "--format", form]
    assert main([*arguments, "--concurrency", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"a.{form}", f"c.{form}"]
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        f"{data / 'a.npy'} -> {out / f'a.{form}'}  70 rows", f"{data / 'c.npy'} -> {out / f'c.{form}'}  2 rows",
    ]  # fmt: skip
    assert told.err == ""
    if form == "npz":
        with np.load(out / "a.npz") as archive:
            assert archive["probability"].shape == (70, 7)
    else:
        assert len((out / f"a.{form}").read_text().splitlines()) == 70 + (form == "csv")


@pytest.mark.system
@pytest.mark.parametrize("concurrency", ["1", "4"])
def test_an_agent_is_asked_by_the_name_of_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], concurrency: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", window(rows=3, seed=number))
    np.save(folder / "nan.npy", window() * np.nan)
    plan = worker_plan(service_plan(engine_plan(tmp_path, "wrist")))
    with Sockets(tmp_path) as sockets, RunningWorker(sockets, plan).serve():
        arguments = ["infer", "wrist", str(folder), "--server", sockets.tcp_address, "--json"]
        assert main([*arguments, "--concurrency", concurrency]) == 8
        told = capsys.readouterr()
        assert main(["infer", "ankle", str(folder), "--server", sockets.tcp_address]) == 8
        assert "there is no model 'ankle'" in capsys.readouterr().err
    answered = [line for line in map(json.loads, told.out.splitlines()) if "row" in line]
    for number in range(6):
        rows = [one["outputs"]["probability"] for one in answered if one["file"].endswith(f"{number}.npy")]
        np.testing.assert_allclose(rows, expected_probability(window(rows=3, seed=number)), atol=1e-6)
    assert f"{folder / 'nan.npy'}: input 'window' holds NaN" in told.err
    assert "6 of 7 files were answered, 1 could not be" in told.err


# --- while it runs -------------------------------------------------------------------------------------------
@contextmanager
def serving(folder: Path, what: Callable[[int], str]) -> Iterator[str]:
    """A server of the model `m`; `what(number)` becomes of a request: "answer", "wait" or "hang up"."""
    path = str(folder / "fake.sock")
    metadata = {"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}], "outputs": []}
    output = {"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [0.5]}

    def answer(connection: socket.socket) -> None:
        number = 0
        with connection, connection.makefile("rb") as file:
            while line := file.readline():
                size = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        size = int(header.partition(b":")[2])
                file.read(size)
                document: Any = metadata if line.startswith(b"GET") else {"outputs": [output]}
                if line.startswith(b"POST"):
                    number += 1
                    match what(number):
                        case "wait":
                            continue
                        case "hang up":
                            return
                body = json.dumps(document).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def accept(listener: socket.socket) -> None:
        with listener:
            for _ in range(2):  # one asks what the model takes, one asks the model
                answer(listener.accept()[0])

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4)
    thread = threading.Thread(target=accept, args=(listener,), daemon=True)
    thread.start()
    yield path
    thread.join(60)
    assert not thread.is_alive()


def command(*arguments: str) -> list[str]:
    program = "import sys; from agent.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, *arguments]


def files_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        np.save(folder / f"{number:02}.npy", np.zeros((1, 2), np.float32))
    return folder


def test_an_interruption_leaves_whole_files_and_says_how_far_it_came(tmp_path: Path) -> None:
    waiting = threading.Event()

    def first_three(number: int) -> str:
        if number <= 3:
            return "answer"
        waiting.set()
        return "wait"

    folder, out = files_of(tmp_path / "in", 10), tmp_path / "out"
    with serving(tmp_path, first_three) as server:
        process = subprocess.Popen(
            command("infer", "m", str(folder), "--server", server, "--out", str(out)), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert waiting.wait(60)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "edgewarden-agent: 3 of 10 files were answered, 0 could not be\n"
    assert sorted(path.name for path in out.iterdir()) == ["00.npz", "01.npz", "02.npz"]
    for path in out.iterdir():
        with np.load(path) as archive:
            assert archive["y"].tolist() == [[0.5]]


def test_a_server_that_goes_ends_it(tmp_path: Path) -> None:
    folder = files_of(tmp_path / "in", 10)
    with serving(tmp_path, lambda number: "answer" if number < 3 else "hang up") as server:
        done = subprocess.run(command("infer", "m", str(folder), "--server", server), capture_output=True, text=True)
    assert done.returncode == 8
    assert len(done.stdout.splitlines()) == 2
    assert "2 of 10 files were answered" in done.stderr
    assert "Is the agent running?" in done.stderr


@pytest.mark.slow
def test_a_bar_is_drawn_on_a_terminal_when_it_takes_long_and_never_among_the_answers(tmp_path: Path) -> None:
    def slow(number: int) -> str:
        time.sleep(0.2)
        return "answer"

    folder = files_of(tmp_path / "in", 15)
    ours, theirs = pty.openpty()
    with serving(tmp_path, slow) as server, os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            command("infer", "m", str(folder), "--server", server), stdout=subprocess.PIPE, stderr=theirs, text=True
        )
        os.close(theirs)
        drawn = b""
        try:
            while chunk := terminal.read(4096):
                drawn += chunk
        except OSError:  # the terminal's other end is closed
            pass
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(out.splitlines()) == 15
    assert "█" not in out
    assert "/15 files" in drawn.decode()
    assert drawn.decode().endswith("\r\033[K")
