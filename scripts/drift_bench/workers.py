"""Peers and ourselves as processes that answer JSON lines (peers/worker.py), each in its environment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scripts.lib.environments import Failed, prepare
from scripts.lib.machine import ROOT

HERE = Path(__file__).with_name("peers")
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass(frozen=True, slots=True)
class Peer:
    """An environment below build/ and the module that runs in it."""

    name: str
    module: str
    packages: tuple[str, ...]


RIVER = Peer("river", "scripts.drift_bench.peers.river_peer", ("river", "numpy"))
# ADWIN as it was until river rewrote it in Rust: what others measured before is this one
OLD_RIVER = Peer("river-0.23", "scripts.drift_bench.peers.river_peer", ("river", "numpy"))
FROUROS = Peer("frouros", "scripts.drift_bench.peers.frouros_peer", ("frouros", "numpy"))
ALIBI = Peer("alibi", "scripts.drift_bench.peers.alibi_peer", ("alibi-detect", "torch", "numpy"))
PEERS = (RIVER, FROUROS, ALIBI)
DATA = Peer("data", "", ("nannyml", "river", "scikit-learn"))


class Worker:
    """A process that is asked one thing at a time. As a context it is ended at the end."""

    def __init__(self, python: Path, module: str, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._file = log.open("ab")
        self._process = subprocess.Popen(
            [str(python), "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file, cwd=ROOT,
            env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
        self._buffer = b""

    def ask(self, within_s: float, **question: Any) -> dict[str, Any]:
        """Raises: Failed: it ended, said it cannot, or its time was over (it is ended then)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"the process ended: {self._tail()}") from None
        answer: dict[str, Any] = json.loads(self._line(within_s))
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _line(self, within_s: float) -> bytes:
        assert self._process.stdout is not None
        end_s = time.monotonic() + within_s
        while b"\n" not in self._buffer:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                self.end()
                raise Failed(f"no answer within {within_s:.0f} s")
            piece = os.read(self._process.stdout.fileno(), 65_536)
            if not piece:
                raise Failed(f"the process ended: {self._tail()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _tail(self) -> str:
        return " ".join(self._log.read_text(errors="replace").split())[-300:]

    def end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def open_peer(peer: Peer, build: Path) -> tuple[Worker, dict[str, str]]:
    """The peer's process and the versions of what counts. Raises: Failed: its environment cannot be made."""
    environment = build / "environments" / peer.name
    versions = prepare(environment, HERE / f"{peer.name}.txt", peer.packages)
    return Worker(environment / "bin/python", peer.module, build / "logs" / f"{peer.name}.log"), versions


def open_ours(build: Path) -> Worker:
    return Worker(Path(sys.executable), "scripts.drift_bench.ours_worker", build / "logs/ours.log")
