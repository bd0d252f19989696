"""A short-lived child for work on bytes from outside: one JSON request in, one bounded JSON answer out.

The child sets its own limits before it touches anything foreign, runs in an empty folder with a bare environment,
and ends by an alarm even when nobody is left to end it. Whatever it does wrong becomes one of our errors; being
killed from outside is none of its wrongs (`Killed`). When memory is short it is the first to go, before who serves.
Its folder and what it says on stderr have no names, so nothing of them stays behind, whoever is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from agent.contract.errors import EdgewardenError
from agent.ota.errors import Crashed, Killed, ResourceLimit, from_code
from agent.ota.files import storage_error

MAX_REQUEST_BYTES = 1024 * 1024
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_ERROR_BYTES = 2000
GRACE_S = 5  # of processor time and of the clock, between the limit that tells why and the one that only ends
OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})  # never our own
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use. `memory_bytes` counts addresses, as the kernel does; `wall_s` ends it in any case."""

    memory_bytes: int
    cpu_s: int
    wall_s: float
    open_files: int = 64
    file_bytes: int = 64 * 1024 * 1024


def run(module: str, request: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Run `python -m module` on a request and return its answer.

    Raises:
        ResourceLimit: it needed more than its limits.
        Crashed: it died or answered nonsense.
        Killed: somebody ended it, or the kernel did for want of memory; that says nothing about its request.
        DiskFull, StorageError: it could not be started.
        EdgewardenError: what the child reported.
    """
    body = json.dumps({**request, "limits": asdict(limits)}).encode()
    if len(body) > MAX_REQUEST_BYTES:
        raise Crashed(f"a request of {len(body)} bytes is too large for {module}")
    try:
        with _nowhere() as folder, tempfile.TemporaryFile() as log:
            ended = _talk(module, body, limits, folder, log)
    except OSError as error:
        raise storage_error(error, Path(tempfile.gettempdir())) from None
    return _outcome(module, ended)


@contextlib.contextmanager
def _nowhere() -> Iterator[str]:
    """An empty folder that exists as long as somebody is in it: a model's relative file names lead nowhere."""
    named = tempfile.mkdtemp(prefix="edgewarden-")
    try:
        folder = os.open(named, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        Path(named).rmdir()
    try:
        yield f"/proc/self/fd/{folder}"  # self: the child, which enters it before it closes what it inherited
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class _Ended:
    answer: bytes
    status: int
    timed_out: bool
    errors: str


def _talk(module: str, body: bytes, limits: Limits, folder: str, log: IO[bytes]) -> _Ended:
    late = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        cwd=folder, env=_environment(), start_new_session=True,
    ) as process:  # fmt: skip

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limits.wall_s, end)
        timer.name = "ew-child-limit"
        timer.start()
        try:
            answer = _exchange(process, body)
            process.wait()
        finally:
            timer.cancel()
            timer.join()
            process.kill()
    return _Ended(answer, process.returncode, late.is_set(), _tail(log))


def _exchange(process: subprocess.Popen[bytes], body: bytes) -> bytes:
    """Say the request, hear at most MAX_ANSWER_BYTES."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the child has no pipes")
    with contextlib.suppress(BrokenPipeError):  # it died early: its status tells
        process.stdin.write(body)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    answer = process.stdout.read(MAX_ANSWER_BYTES + 1)
    if len(answer) > MAX_ANSWER_BYTES:
        process.kill()
    return answer


def _outcome(module: str, ended: _Ended) -> dict[str, Any]:
    what = module.rpartition(".")[2]
    if ended.timed_out or ended.status == -signal.SIGALRM:
        raise ResourceLimit(f"the {what} child needed more time than it may have")
    if len(ended.answer) > MAX_ANSWER_BYTES:  # that ended it
        raise ResourceLimit(f"the {what} child answered more than it may")
    if ended.status == -signal.SIGXCPU:
        raise ResourceLimit(f"the {what} child used up its processor time")
    if -ended.status in OUTSIDE:
        raise Killed(f"the {what} child was ended by {signal.Signals(-ended.status).name} before it could answer")
    if ended.status != 0:
        if "MemoryError" in ended.errors or "bad_alloc" in ended.errors:
            raise ResourceLimit(f"the {what} child needed more memory than it may have")
        raise Crashed(f"the {what} child ended with status {ended.status}: {ended.errors[-300:].strip()}")
    try:
        answer = json.loads(ended.answer)
        error = answer.get("error")
        if error is None:
            return dict(answer)
        code, text, hint = str(error["code"]), str(error["text"]), str(error["hint"])
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise Crashed(f"the {what} child answered nonsense") from None
    raise from_code(code, text, hint)


def _tail(log: IO[bytes]) -> str:
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), MAX_ERROR_BYTES, max(0, size - MAX_ERROR_BYTES)).decode("utf-8", "replace")


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "PYTHONPATH": str(_PACKAGES), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}


# --- the child's side --------------------------------------------------------------------------------------
def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Main of a child: read the request, take on its limits, answer it or report the error. Returns the status.

    Raises:
        SystemExit: no whole request came.
    """
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is not our answer
    try:
        request = json.loads(sys.stdin.buffer.read(MAX_REQUEST_BYTES))
    except ValueError:
        raise SystemExit("no whole request came: the caller is gone") from None
    _apply(Limits(**request.pop("limits")))
    try:
        result = answer(request)
    except EdgewardenError as error:
        result = {"error": {"code": error.code, "text": str(error), "hint": error.hint}}
    with contextlib.suppress(BrokenPipeError), os.fdopen(channel, "wb") as stream:  # the caller may be gone
        stream.write(json.dumps(result).encode())
    return 0


def _apply(limits: Limits) -> None:
    for what, soft, hard in (
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + GRACE_S),  # the hard one kills without a why
        (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, most = resource.getrlimit(what)
        allowed = [one if most == resource.RLIM_INFINITY else min(one, most) for one in (soft, hard)]
        resource.setrlimit(what, (allowed[0], allowed[1]))
    signal.alarm(int(limits.wall_s) + GRACE_S)  # nobody may be left to end us
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
