"""What the interoperability tests share: the pinned programs and models of scripts/lib/interop.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEECH = Path("/usr/share/pocketsphinx/test/data")


@pytest.fixture(scope="session")
def interop() -> Path:
    """The folder with what was unpacked from the package index; fetched now when `scripts/test` has not."""
    fetch = "set -euo pipefail; . scripts/lib/setup.sh; . scripts/lib/interop.sh; ew_setup_interop"
    done = subprocess.run(
        ["bash", "-c", fetch],
        cwd=ROOT,
        env={**os.environ, "EDGEWARDEN_VENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ROOT / "build/interop"
