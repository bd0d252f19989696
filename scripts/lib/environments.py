"""Environments of peers: each with its pinned packages below build/, made once, never part of the product."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class Failed(Exception):
    """A part of a bench could not be measured; its text says why."""


def prepare(environment: Path, pinned: Path, packages: Sequence[str], *, dependencies: bool = True) -> dict[str, str]:
    """Make `environment` with what `pinned` lists, unless it holds just that; returns the versions of `packages`.

    dependencies: False = nothing but what is listed, for packages of which only files are wanted.

    Raises: Failed: pip refuses.
    """
    text, stamp = pinned.read_text(), environment / "pinned.txt"
    if not stamp.exists() or stamp.read_text() != text:
        _run([sys.executable, "-m", "venv", "--clear", str(environment)])
        pip = [str(environment / "bin/pip"), "install", "-q", "--disable-pip-version-check"]
        _run([*pip, *([] if dependencies else ["--no-deps"]), "-r", str(pinned)])
        stamp.write_text(text)
    listed = dict(line.strip().split("==") for line in text.splitlines() if "==" in line)
    return {name: listed[name] for name in packages}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[:4])}: {(done.stderr or done.stdout).strip()[-300:]}")
