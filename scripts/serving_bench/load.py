"""The load generator in C: compiled once, asked for one run at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scripts.serving_bench.processes import Failed

SOURCE = Path(__file__).with_name("load.c")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask: a Unix socket, or a TCP port of this machine."""

    unix: Path | None = None
    port: int = 0

    def arguments(self) -> list[str]:
        return ["--unix", str(self.unix)] if self.unix is not None else ["--tcp", str(self.port)]


@dataclass(frozen=True, slots=True)
class Question:
    """One prepared request. `answer_bytes`: length of the whole good answer; 0 = not checked."""

    file: Path
    answer_bytes: int = 0


class Load:
    """Runs the compiled program."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    def compile(cls, folder: Path) -> Load:
        """Raises: Failed: no C compiler, or it refuses."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Failed("no C compiler found. Debian: apt-get install gcc libc6-dev")
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "load"
        if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
            done = subprocess.run(
                [compiler, "-O2", "-o", str(program), str(SOURCE)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise Failed(f"{compiler} cannot compile {SOURCE.name}: {done.stderr[-300:]}")
        return cls(program)

    def ask(
        self, target: Target, question: Question, *, seconds: float, connections: int = 1, extra: Sequence[str] = ()
    ) -> dict[str, Any]:
        """One run's figures. Raises: Failed."""
        with self.begin(target, question, seconds=seconds, connections=connections, extra=extra) as running:
            return running.result(seconds + 60)

    def begin(
        self, target: Target, question: Question, *, seconds: float, connections: int = 1, extra: Sequence[str] = ()
    ) -> Running:
        """Start a run and return at once."""
        command = [
            str(self._program), "ask", *target.arguments(), "--request", str(question.file),
            "--answer-bytes", str(question.answer_bytes), "--connections", str(connections),
            "--seconds", str(seconds), *extra,
        ]  # fmt: skip
        return Running(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    def echo(self, path: Path, request_bytes: int, answer: Path, *, cpu: int) -> subprocess.Popen[bytes]:
        """The other end of the floor; the caller ends it.

        In a session of its own like every server that is measured here: the kernel schedules sessions as groups
        (sched_autogroup), and going from one to another and back takes about 2 us of a round trip.
        """
        return subprocess.Popen(
            [str(self._program), "echo", "--unix", str(path), "--request-bytes", str(request_bytes),
             "--answer", str(answer), "--cpu", str(cpu)], start_new_session=True,
        )  # fmt: skip


class Running:
    """A run on its way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def result(self, within_s: float) -> dict[str, Any]:
        """Raises: Failed: it did not finish, or could not connect."""
        try:
            out, err = self.process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"the load generator did not finish within {within_s:.0f} s") from None
        if self.process.returncode:
            raise Failed(f"the load generator: {err.strip()[-300:]}")
        document: dict[str, Any] = json.loads(out)
        return document

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate()


def http_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """One keep-alive POST."""
    lines = {"Host": "localhost", **headers, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0))
