"""Streams through a real worker process: the numbers are those of `infer`, however the samples are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.blueprint import draw_up
from agent.client import Client
from agent.config import AgentConfig
from agent.contract.plan import WorkerPlan
from tests.artifacts import HOP, LENGTH, RATE_HZ, record
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def sockets(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sockets]:
    service = {"name": "wrist", "artifact": artifacts["wrist"], "floor": str(artifacts["wrist-floor"])}
    (blueprint,) = draw_up(AgentConfig.model_validate({"service": [service]}))
    plan = WorkerPlan(generation=1, services=(replace(blueprint.plan, deadline_ms=60_000.0),))
    with Sockets(tmp_path_factory.mktemp("streams")) as opened, RunningWorker(opened, plan).serve():
        yield opened


def test_any_cut_of_the_samples_gives_what_infer_gives_bit_for_bit(sockets: Sockets) -> None:
    samples = record(seed=5, recordings=1, rows=40).windows.reshape(-1, 6)
    generator = np.random.default_rng(11)
    with Client(sockets.unix_address) as client:
        expected = [
            client.infer("wrist", {"window": samples[None, at : at + LENGTH]}).outputs["probability"]
            for at in range(0, len(samples) - LENGTH + 1, HOP)
        ]
        for most in (10, 300, len(samples) + 1):
            stream, rows = client.stream("wrist", f"s{most}"), []
            while (at := stream.sequence) < len(samples):
                answer = stream.send(samples[at : at + int(generator.integers(1, most))], time_s=at / RATE_HZ)
                rows.append(answer.outputs["probability"])
            assert np.concatenate(rows).tobytes() == np.concatenate(expected).tobytes()
