"""An agent, its worker or a child of its update killed in the middle of an update: somebody always serves, and the
update still arrives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import pytest

from agent import clock
from agent.client import Client
from agent.contract.artifact import open_artifact
from agent.contract.errors import Corrupt, EdgewardenError
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber
from tests.artifacts import record
from tests.system.conftest import FLEET, Agent, Load, wait_until
from tests.system.updating import Director, fleet, next_version, update_toml, versions

pytestmark = [pytest.mark.system, pytest.mark.slow]

KILLS = 10
UPDATE_S = 2.5  # a whole update with this probation takes about so long
CHILD_S = 0.4  # a trust child or a trial takes about so long
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
    found = []
    for child in psutil.Process(agent.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie's
            if "agent.worker" in child.cmdline():
                found.append(child.pid)
    return found


class Hunter:
    """Ends the next child of an update whose module is `prey`, `delay_s` after it was first seen."""

    def __init__(self, agent: Agent, prey: str, delay_s: float) -> None:
        assert agent.process is not None
        self._parent = psutil.Process(agent.process.pid)
        self._prey, self._delay_s = prey, delay_s
        self._thread = threading.Thread(target=self._hunt, name="hunter")
        self._stop = threading.Event()
        self.killed = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _hunt(self) -> None:
        while not self._stop.is_set():
            for child in self._parent.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if self._prey in child.cmdline():
                        clock.sleep(self._delay_s)
                        self.killed = child.status() != psutil.STATUS_ZOMBIE
                        child.kill()  # by process id and start time: never somebody else
                        return
            clock.sleep(0.002)


def all_slots_are_whole(agent: Agent) -> None:
    """Those that are there: a commit removes what nobody needs any more."""
    for slot in (agent.state / "slots").iterdir():
        if not slot.name.startswith("."):
            try:
                assert open_artifact(slot).digest == slot.name
            except Corrupt:
                assert not slot.exists()


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
            alive = wait_until(lambda: workers(updated), "a worker is there")
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(dice.choice(alive)), signal.SIGKILL)
            report = director.end(version)
            assert report["update_state"] == "committed", (report, updated.log.read_text()[-3000:])
            wait_until(lambda number=number: versions(updated)["wrist"] == number, "the new version serves")
            before = load.answered
            wait_until(lambda before=before: load.answered > before + 20, "requests flow")
            all_slots_are_whole(updated)
    assert load.failed == []


@pytest.mark.timeout(900)
def test_a_child_of_an_update_killed_at_a_random_moment_of_ten_updates_is_asked_again_and_the_update_arrives(
    updated: Agent, director: Director, tmp_path: Path
) -> None:
    """Nothing is condemned for it: not the candidate on trial, not the repository being judged."""
    dice = np.random.default_rng(7)
    ended = 0
    for number in range(2, KILLS + 2):
        prey = ("agent.ota.trial", "agent.ota.trust")[number % 2]
        new = director.publish(next_version(updated.artifacts, tmp_path, number))
        with Hunter(updated, prey, float(dice.random()) * CHILD_S) as hunter:
            version = director.want(new)
            report = director.end(version)
        ended += hunter.killed
        assert report["update_state"] == "committed", (prey, report, updated.log.read_text()[-3000:])
        assert not {"rejected", "quarantined", "failed"} & {*director.states(version)}
        assert versions(updated)["wrist"] == number
        assert answers(updated)
        all_slots_are_whole(updated)
    assert ended >= KILLS // 4  # a child may have answered before its moment came, the sooner the faster the machine
