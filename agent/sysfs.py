"""Reading one value from a file of `/sys` or `/proc`: a number, a line, or None when it cannot be had."""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 16 * 1024  # a sysfs file is one page at most; the first processor of /proc/cpuinfo is about 3 kB


def read_text(path: Path) -> str | None:
    """The file's text without surrounding space; None when it is absent, unreadable or its driver fails."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace").strip()
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """The file's whole number, decimal; None when there is none."""
    text = read_text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def folders(parent: Path, pattern: str) -> list[Path]:
    """Entries of `parent` that match, in a stable order; links are followed, as sysfs is made of them."""
    return sorted(parent.glob(pattern)) if parent.is_dir() else []
