"""The unmodified perf_analyzer, a public load generator written in C++, against a real worker over TCP."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.client import Client
from tests.models import engine_plan, floor_plan, service_plan, worker_plan
from tests.processes import RunningWorker, Sockets

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="perf_analyzer is built for x86-64 alone"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sockets, RunningWorker]]:
    folder = tmp_path_factory.mktemp("perf")
    plan = worker_plan(service_plan(engine_plan(folder, "wrist", version=3), floor_plan()))
    with Sockets(folder) as sockets, RunningWorker(sockets, plan).serve() as worker:
        yield sockets, worker


def analyse(interop: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    [program] = interop.glob("tritonclient/*.data/data/bin/perf_analyzer")
    libraries = interop / "nvidia_cuda_runtime_cu12/nvidia/cuda_runtime/lib"
    return subprocess.run(
        [str(program), *arguments], env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def measured(interop: Path, sockets: Sockets, table: Path, *arguments: str) -> list[dict[str, str]]:
    """Runs of a fixed number of requests; a row for every concurrency. Speed is not what is tested here."""
    done = analyse(
        interop, "-m", "wrist", "-u", sockets.tcp_address, "--measurement-mode", "count_windows",
        "--measurement-request-count", "50", "--stability-percentage", "999", "--max-trials", "10",
        "-f", str(table), *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", ["binary", "json"])
def test_it_runs_unmodified_with_one_and_with_four_connections(
    interop: Path, stage: tuple[Sockets, RunningWorker], tmp_path: Path, form: str
) -> None:
    sockets, worker = stage
    with Client(sockets.unix_address) as client:
        before = client.statistics("wrist")["model_stats"][0]
        rows = measured(
            interop, sockets, tmp_path / "t.csv", "--concurrency-range", "1:4:3", "--input-tensor-format", form,
            "--output-tensor-format", form,
        )  # fmt: skip
        after = client.statistics("wrist")["model_stats"][0]
    assert sorted(row["Concurrency"] for row in rows) == ["1", "4"]
    assert all(float(row["Inferences/Second"]) > 0 for row in rows)
    assert after["execution_count"] - before["execution_count"] >= 2 * 50
    assert after["inference_stats"]["fail"]["count"] == before["inference_stats"]["fail"]["count"]
    assert worker.statistics()["malformed"] == 0


def test_what_the_server_refuses_is_what_it_reports(interop: Path, stage: tuple[Sockets, RunningWorker]) -> None:
    done = analyse(interop, "-m", "ankle", "-u", stage[0].tcp_address)
    assert done.returncode != 0
    assert "there is no model 'ankle'" in done.stdout + done.stderr
