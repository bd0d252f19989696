"""What every part of the tests may use."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long one example takes says how busy the machine is, nothing about what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A shell that starts the tests in the background lets them ignore Ctrl-C, `nohup` the end of the terminal, and what
# they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def _leaks_are_found_where_they_are_made() -> Iterator[None]:
    """What a test leaves open is an error (see filterwarnings), but only the collector notices what lies in a cycle.

    Left to itself it runs in any test, mostly in those that allocate much. Collecting at the end of each module keeps
    the error strict and says it of the module (by its last test) that leaked.
    """
    yield
    gc.collect()


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: wrist, wrist-accel, wrist-floor, wrist-faulty (see tests/artifacts.py)."""
    from tests.artifacts import build_artifacts

    return build_artifacts(tmp_path_factory.mktemp("artifacts"))
