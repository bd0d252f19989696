"""The bound on memory: real allocations in this process, and real models."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from agent.contract.errors import Corrupt, EngineFailed, TooLarge
from agent.contract.plan import RuntimePlan
from agent.engine import bounded, memory, prepare
from tests.models import hungry, save

MB = 2**20


def fill(megabytes: int) -> None:
    np.ones(megabytes * MB, np.uint8).sum()


def test_what_fits_is_measured_and_the_limit_is_gone_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded("small", 300 * MB) as meter:
        fill(100)
    assert 90 * MB < meter.peak_bytes < 130 * MB
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_what_does_not_fit_is_refused_where_it_is_asked_for() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(TooLarge, match=r"'big' needs more than the 105 MB of memory it may take") as caught, \
            bounded("big", 100 * MB):  # fmt: skip
        fill(400)
    assert "serving.memory_mb" in caught.value.hint
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    fill(400)


def test_what_the_device_does_not_have_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 50 * MB)
    for limit in (0, 1000 * MB):
        with pytest.raises(TooLarge, match="can get on this device now"), bounded("big", limit):
            fill(400)


def test_other_failures_stay_what_they_are() -> None:
    for error in (Corrupt("it is no model"), EngineFailed("a run failed"), ZeroDivisionError()):
        with pytest.raises(type(error)), bounded("any", 100 * MB):
            raise error


def test_a_limit_that_was_there_is_never_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = memory._number(Path("/proc/self/status"), "VmData")
    assert used is not None
    lower = used + 200 * MB
    resource.setrlimit(resource.RLIMIT_DATA, (lower, hard))
    try:
        with bounded("any", 10_000 * MB):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == lower
        assert resource.getrlimit(resource.RLIMIT_DATA) == (lower, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_a_few_hundred_bytes_that_need_hundreds_of_megabytes_are_refused(tmp_path: Path) -> None:
    digest = save(hungry(300), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1000

    def load() -> None:
        prepare(tmp_path / "m.onnx", sha256=digest, name="m", runtime=RuntimePlan(), check=lambda _: None)

    with pytest.raises(TooLarge, match="'m' needs more than the 100 MB"), bounded("m", 100_000_000):
        load()
    with bounded("m", 1_000_000_000) as meter:
        load()
    assert 290 * MB < meter.peak_bytes < 900 * MB
