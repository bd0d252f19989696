"""Streams through a real worker process: the numbers are those of `infer`, however the samples are cut."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.blueprint import Blueprint, draw_up
from agent.client import Client
from agent.config import AgentConfig
from agent.contract.plan import WorkerPlan
from agent.decisions.events import AlarmKind, AlarmRaised
from agent.monitor import Monitor
from tests.artifacts import HOP, LENGTH, RATE_HZ, record
from tests.processes import RunningWorker, Sockets

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def blueprint(artifacts: dict[str, Path]) -> Blueprint:
    service = {"name": "wrist", "artifact": artifacts["wrist"], "floor": str(artifacts["wrist-floor"])}
    return draw_up(AgentConfig.model_validate({"service": [service]}))[0]


@pytest.fixture(scope="module")
def sockets(blueprint: Blueprint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sockets]:
    plan = WorkerPlan(generation=1, services=(replace(blueprint.plan, deadline_ms=60_000.0),))
    with Sockets(tmp_path_factory.mktemp("streams")) as opened, RunningWorker(opened, plan).serve():
        yield opened


def _post(address: str, stream: str, samples: np.ndarray, parameters: dict[str, float]) -> None:
    """Samples of a sender that does not count them."""
    tensor = {"name": "window", "shape": samples.shape, "datatype": "FP32", "data": samples.ravel().tolist()}
    connection = http.client.HTTPConnection(address)
    with closing(connection):
        body = json.dumps({"parameters": parameters, "inputs": [tensor]})
        connection.request("POST", f"/v2/models/wrist/streams/{stream}", body)
        answer = connection.getresponse()
        assert (answer.status, answer.read()[:1]) == (200, b"{")


@pytest.mark.parametrize("counted", ["counted", "by-time"])
@pytest.mark.parametrize(("ratio", "hops"), [(1.0, 1), (1.0, 3), (2.0, 3), (0.5, 1), (0.5, 3)])
def test_a_sensor_at_another_rate_is_seen_by_the_monitor(
    sockets: Sockets, blueprint: Blueprint, ratio: float, hops: int, counted: str
) -> None:
    samples = record(seed=6, recordings=1, rows=140).windows.reshape(-1, 6)
    name, step = f"rate-{ratio}-{hops}-{counted}", hops * HOP
    sockets.ring.read(10_000)
    with Client(sockets.unix_address) as client:
        stream = client.stream("wrist", name)
        for at in range(0, len(samples), step):
            parameters = {"ew_time_s": 1e9 + at / RATE_HZ * ratio}
            if counted == "counted":
                stream.send(samples[at : at + step], time_s=parameters["ew_time_s"])
            else:
                _post(sockets.tcp_address, name, samples[at : at + step], parameters)
    events = Monitor(blueprint.monitor).observe(sockets.ring.read(10_000))
    kinds = [event.kind for event in events if isinstance(event, AlarmRaised)]
    assert kinds == ([] if ratio == 1.0 else [AlarmKind.RATE])


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
