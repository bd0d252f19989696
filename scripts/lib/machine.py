"""Where a bench ran, and where its document is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/bench"


def machine(packages: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """Commit, processor, versions of Python and of `packages`, load average now."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or "unknown", "machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(),
        "system": platform.platform(), "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "load_average": load_average(), "quick": quick,
    }  # fmt: skip


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def keep(document: dict[str, Any], folder: Path, out: Path | None) -> None:
    """Below `folder` by commit and machine, and as `out`. Written, then renamed: an interrupted run leaves a whole
    file.
    """
    about = document["machine"]
    kind = "quick" if about["quick"] else "full"
    kept = folder / f"{about['commit']}-{platform.node()}-{kind}.json"
    for path in (kept, *([out] if out else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)


def previous(text: str, folder: Path) -> dict[str, Any]:
    """An earlier document: a file, or `last` for the newest below `folder`.

    Raises: ValueError: there is none, or it cannot be read.
    """
    path = Path(text)
    if text == "last":
        kept = sorted(folder.glob("*.json"), key=lambda one: one.stat().st_mtime)
        if not kept:
            raise ValueError("there is no earlier result below build/bench/results")
        path = kept[-1]
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return document


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return "unknown"
