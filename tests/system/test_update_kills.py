"""An agent or its worker killed in the middle of an update: somebody always serves, and the update still arrives."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent import clock
from agent.client import Client
from agent.contract.artifact import open_artifact
from agent.contract.errors import EdgewardenError
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber
from tests.artifacts import record
from tests.system.conftest import FLEET, Agent, Load, wait_until
from tests.system.updating import Director, fleet, next_version, update_toml, versions

pytestmark = [pytest.mark.system, pytest.mark.slow]

KILLS = 10
UPDATE_S = 2.5  # a whole update with this probation takes about so long
WINDOW = record(seed=9).windows[:1]


@pytest.fixture
def director(short: Path, broker: Broker) -> Iterator[Director]:
    subscriber = Subscriber(broker.port, OPERATOR, broker.users[OPERATOR], FLEET)
    subscriber.start()
    with fleet(short, subscriber) as director:
        yield director
    subscriber.stop()


@pytest.fixture
def updated(agent: Agent, broker: Broker, director: Director) -> Agent:
    agent.write(agent.link_to(broker) + update_toml(agent.folder, director.server.url))
    agent.start()
    return agent


def answers(agent: Agent) -> bool:
    with contextlib.suppress(EdgewardenError), Client(agent.address) as client:
        return client.infer("wrist", {"window": WINDOW}).served_by == "wrist"
    return False


def workers(agent: Agent) -> list[int]:
    """Process ids of its workers: the one that serves, and the one that may be on its way."""
    assert agent.process is not None
    children = psutil.Process(agent.process.pid).children()
    return [child.pid for child in children if "agent.worker" in child.cmdline()]


def all_slots_are_whole(agent: Agent) -> None:
    for slot in (agent.state / "slots").iterdir():
        if not slot.name.startswith("."):
            assert open_artifact(slot).digest == slot.name


@pytest.mark.timeout(400)
def test_an_agent_killed_at_random_moments_of_ten_updates_always_comes_back_and_arrives(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    dice = np.random.default_rng(5)
    for number in range(2, KILLS + 2):
        new = director.publish(next_version(updated.artifacts, tmp_path, number))
        version = director.want(new)
        clock.sleep(float(dice.random()) * UPDATE_S)
        assert updated.process is not None
        updated.process.kill()
        updated.process.wait()
        all_slots_are_whole(updated)
        updated.start()
        assert versions(updated)["wrist"] in (number - 1, number)
        assert answers(updated)
        report = director.end(version)
        assert report["update_state"] == "committed", (report, updated.log.read_text()[-3000:])
        assert versions(updated)["wrist"] == number
        assert answers(updated)


@pytest.mark.timeout(400)
def test_a_worker_killed_at_random_moments_of_ten_updates_costs_neither_a_request_nor_the_update(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    dice = np.random.default_rng(6)
    with Load(updated.address, WINDOW, clients=2) as load:
        for number in range(2, KILLS + 2):
            new = director.publish(next_version(updated.artifacts, tmp_path, number))
            version = director.want(new)
            clock.sleep(float(dice.random()) * UPDATE_S)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(dice.choice(workers(updated))), signal.SIGKILL)
            report = director.end(version)
            assert report["update_state"] == "committed", (report, updated.log.read_text()[-3000:])
            wait_until(lambda number=number: versions(updated)["wrist"] == number, "the new version serves")
            before = load.answered
            wait_until(lambda before=before: load.answered > before + 20, "requests flow")
            all_slots_are_whole(updated)
    assert load.failed == []
