"""Processes under measurement: started in a group of their own, ended by it, and what they use, from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from scripts.lib.environments import Failed

__all__ = ["Failed", "Group", "cpu_s", "pss_mb", "rss_mb", "tree"]

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Group:
    """One command and everything it starts. As a context it is ended at the end: SIGTERM, then SIGKILL."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def pids(self) -> list[int]:
        """It and its descendants, also those in sessions of their own."""
        return tree(self.pid)

    def wait_until(self, true: Callable[[], bool], what: str, *, within_s: float = 60.0) -> None:
        """Raises: Failed: it ended, or the condition did not come."""
        end_s = time.monotonic() + within_s
        while not true():
            if not self.alive():
                raise Failed(f"{what}: the process ended with {self.process.returncode}: {self.tail()}")
            if time.monotonic() > end_s:
                raise Failed(f"{what}: not within {within_s:.0f} s: {self.tail()}")
            time.sleep(0.005)

    def tail(self) -> str:
        return " ".join(self.log.read_text(errors="replace").split())[-400:]

    def end(self) -> None:
        pids = self.pids()
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def tree(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return [one for one in found if Path(f"/proc/{one}").exists()]


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time used so far by processes and their threads; 10 ms resolution."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def rss_mb(pid: int) -> float:
    """Resident memory; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6
    return 0.0


def pss_mb(pid: int) -> float:
    """Resident memory with shared pages divided among those that share them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0
