"""Runs the compression pipeline beside the host: one at a time, in a process group of its own, bounded in time.

The pipeline's stage cache makes a second run cheap, so a cut-off run is simply started again. Should the host be
killed, its pipeline runs on: the mark tells the next host whom to end. Its words go to `pipeline.log` in the build's
folder. Leaves to others: when to run, what to do with what was built (`steward`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent import clock
from agent.contract.artifact import MANIFEST
from agent.contract.errors import StorageError
from compressor.fleet.means import Built, Failed

LOG = "pipeline.log"
LOG_TAIL_BYTES = 2000
NICE = 10  # ingest and page go first
STOP_S = 10.0


class SubprocessTrainer:
    """`edgewarden-compressor compress` as a child. Owned by one thread."""

    def __init__(
        self,
        recipe: Path,
        cache: Path,
        *,
        device_class: str = "",
        settings: Sequence[str] = (),
        timeout_s: float,
        program: Sequence[str] = (sys.executable, "-m", "compressor"),
        mark: Path | None = None,
    ) -> None:
        """device_class "" = the only one the recipe builds for; settings: KEY=VALUE for the recipe.

        mark: file that says which pipeline runs, for the host after us.
        """
        self._recipe, self._cache = recipe, cache
        self._device_class, self._settings = device_class, tuple(settings)
        self._timeout_s, self._program = timeout_s, tuple(program)
        self._mark = mark
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._until_s = 0.0

    def start(self, folder: Path, recordings: Path, *, version: int, parents: Mapping[str, str]) -> None:
        """Begin to build. parents: name -> manifest digest it succeeds. Raises: StorageError."""
        self.stop()
        arguments = [
            *self._program, "compress", str(self._recipe), "--out", str(folder / "out"), "--cache", str(self._cache),
            "--enrolment", str(recordings), "--set", f"package.version={version}",
        ]  # fmt: skip
        if self._device_class:
            arguments += ["--device-class", self._device_class]
        for name, digest in sorted(parents.items()):
            arguments += ["--parent", f"{name}={digest}"]
        for setting in self._settings:
            arguments += ["--set", setting]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("wb") as log:
                self._process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise StorageError(f"cannot start the pipeline in {folder}: {error}") from error
        self._write_mark(self._process.pid)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICE)
        self._folder = folder
        self._until_s = clock.monotonic_s() + self._timeout_s

    def poll(self) -> Built | Failed | None:
        """What came of it; None = still running, or nothing was started."""
        if self._process is None:
            return None
        code = self._process.poll()
        if code is None:
            if clock.monotonic_s() < self._until_s:
                return None
            self.stop()
            return Failed(f"the pipeline did not end within {self._timeout_s:.0f} s")
        self._process = None
        if code != 0:
            return Failed(f"the pipeline ended with exit code {code}: {self._last_words()}")
        return self._collect()

    def stop(self) -> None:
        """End it with everything it started; without one of our own, what a former host left running."""
        process, self._process = self._process, None
        if process is None:
            self._end_former()
            return
        for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
                return

    def _write_mark(self, pid: int) -> None:
        if self._mark is not None:
            with contextlib.suppress(OSError):  # without it only a killed host's pipeline runs to its end
                self._mark.write_text(f"{pid} {_born(pid)}")

    def _end_former(self) -> None:
        """At once: its host was killed, so nobody waits for it. Only the very process of the mark is meant."""
        try:
            pid, born = self._mark.read_text().split() if self._mark is not None else ("0", "")
        except (OSError, ValueError):
            return
        if pid.isdecimal() and int(pid) > 1 and born == _born(int(pid)) != "-":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(pid), signal.SIGKILL)

    def _collect(self) -> Built | Failed:
        out = self._folder / "out"
        built = {path.parent.parent.name for path in out.glob(f"*/*/{MANIFEST}")}
        wanted = self._device_class or (next(iter(built)) if len(built) == 1 else "")
        if wanted not in built:
            hint = "set regeneration.device_class" if not self._device_class else "it was not built"
            return Failed(f"device classes built: {', '.join(sorted(built)) or 'none'}; {hint}")
        return Built(tuple(sorted(path.parent for path in out.glob(f"{wanted}/*/{MANIFEST}"))))

    def _last_words(self) -> str:
        try:
            with (self._folder / LOG).open("rb") as log:
                log.seek(max(0, (self._folder / LOG).stat().st_size - LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            return "its log cannot be read"
        said = [line.strip() for line in lines if line.strip()]
        return (said[-1] if said else "it said nothing")[:500]


def _born(pid: int) -> str:
    """When a process began, in ticks since the boot: with its id, nobody else's. "-" = there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "-"
