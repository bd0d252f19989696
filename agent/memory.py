"""Memory that is free for another process: what the system has, and what the control groups we live in leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent.sysfs import read_number, read_text

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")
_V2_HIGH = ("memory.high", "memory.current", "inactive_file")


def available_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least that MemAvailable and the limit of each group above us allow; None = nobody says.

    File pages that a group has not used for a while count as free: the kernel takes them back first.
    """
    known = [left for left in (_system(proc), *_groups(proc, cgroups)) if left is not None]
    return max(0, min(known)) if known else None


def _system(proc: Path) -> int | None:
    kib = _field(read_text(proc / "meminfo"), "MemAvailable:")
    return None if kib is None else 1024 * kib


def _groups(proc: Path, cgroups: Path) -> Iterator[int | None]:
    for line in (read_text(proc / "self" / "cgroup") or "").splitlines():
        _, controllers, place = [*line.split(":", 2), "-", ""][:3]
        if controllers == "":
            for folder in _upwards(cgroups, place):
                yield _left(folder, *_V2)
                yield _left(folder, *_V2_HIGH)
        elif "memory" in controllers.split(","):
            for folder in _upwards(cgroups / "memory", place):
                yield _left(folder, *_V1)


def _upwards(root: Path, place: str) -> list[Path]:
    """The group and all above it; a container may see only the root of its own."""
    group = root / place.lstrip("/")
    return [root, *(folder for folder in (group, *group.parents) if root in folder.parents and ".." not in place)]


def _left(group: Path, limit: str, usage: str, unused: str) -> int | None:
    most, used = read_number(group / limit), read_number(group / usage)  # "max" is no number: no limit
    if most is None or used is None:
        return None
    return most - used + (_field(read_text(group / "memory.stat"), unused) or 0)


def _field(text: str | None, name: str) -> int | None:
    for line in (text or "").splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None
