"""The only place that asks what time it is. Everything below the composition roots takes time as an argument."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def wall_s() -> float:
    """Seconds since 1970, UTC, as the system believes."""
    return time.time()


def monotonic_s() -> float:
    return time.monotonic()


monotonic_ns = time.monotonic_ns  # no function around it: asked several times in every request


def cpu_s() -> float:
    """CPU seconds this process has used."""
    return time.process_time()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def iso(wall: float) -> str:
    """`2026-01-31T12:00:00.250Z` for a wall time in seconds."""
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(wall: float) -> datetime:
    """A wall time in seconds as a whole second with its zone, for libraries that want a datetime."""
    return datetime.fromtimestamp(int(wall), UTC)
