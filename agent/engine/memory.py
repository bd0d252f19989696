"""How much memory an engine may take while it is loaded and proven, and what it took.

A file of a few hundred bytes can ask for any amount. The bound is the kernel's (RLIMIT_DATA of this process, lowered
for the while): what does not fit fails where it is asked for, instead of ending whoever the kernel picks. Memory that
is mapped from files, and never written, is not counted.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.contract.errors import EdgewardenError, TooLarge
from agent.memory import available_bytes

SLACK_BYTES = 16 * 1024 * 1024  # stacks of threads, and what the interpreter itself takes meanwhile
SIGNS = ("bad_alloc", "Failed to allocate memory", "Cannot allocate memory", "MemoryError", "out of memory")
_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(slots=True)
class Meter:
    """`peak_bytes`: resident memory at its highest, beyond what was resident before; set at the end."""

    peak_bytes: int = 0


@contextlib.contextmanager
def bounded(name: str, limit_bytes: int = 0) -> Iterator[Meter]:
    """Whatever is loaded and run inside may take `limit_bytes` (0 = no limit), and never more than is available.

    Lowers a limit of the whole process meanwhile: for a time when nothing else needs memory.

    Raises:
        TooLarge: it took or wanted more; in words, with whose limit it was.
    """
    meter = Meter()
    free = available_bytes()
    allowed = min((one for one in (limit_bytes or None, free) if one is not None), default=None)
    whose = "may take" if allowed == limit_bytes else "can get on this device now"
    before = _number(_STATUS, "VmRSS") or 0
    with contextlib.suppress(OSError):
        _CLEAR_PEAK.write_text("5")
    earlier_peak = _number(_STATUS, "VmHWM") or before
    try:
        with _limited(allowed):
            yield meter
    except (EdgewardenError, MemoryError) as error:
        if allowed is None or not (isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)):
            raise
        raise _too_large(name, f"more than the {_megabytes(allowed)} of memory it {whose}") from None
    # where the peak cannot be reset, an earlier one hides a lower one of ours: less is counted, never too much
    meter.peak_bytes = max(0, (_number(_STATUS, "VmHWM") or before) - max(before, earlier_peak))
    if allowed is not None and meter.peak_bytes > allowed:
        took = f"{_megabytes(meter.peak_bytes)} of memory, {_megabytes(allowed)} is what it {whose}"
        raise _too_large(name, took)


@contextlib.contextmanager
def _limited(allowed: int | None) -> Iterator[None]:
    used = _number(_STATUS, "VmData")
    if allowed is None or used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + allowed + SLACK_BYTES
    lowest = min([wanted, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _too_large(name: str, text: str) -> TooLarge:
    return TooLarge(
        f"engine '{name}' needs {text}",
        hint="Raise serving.memory_mb if this device can bear it, or use a smaller model.",
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _number(file: Path, name: str) -> int | None:
    """One line of a /proc file in kB, as bytes."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
