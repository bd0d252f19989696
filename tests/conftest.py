"""What every part of the tests may use."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: wrist, wrist-accel, wrist-floor, wrist-faulty (see tests/artifacts.py)."""
    from tests.artifacts import build_artifacts

    return build_artifacts(tmp_path_factory.mktemp("artifacts"))
