"""Updates fsync a lot, three milliseconds each: their tests run in memory where the machine offers that."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edgewarden-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)
