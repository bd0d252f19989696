"""Updates of a running agent, with real processes, a real broker and a real signed repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.client import Client
from scripts.story.broker import OPERATOR, Broker
from scripts.story.subscriber import Subscriber
from tests.artifacts import record
from tests.system.conftest import FLEET, Agent, Load, wait_until
from tests.system.updating import Director, fleet, next_version, update_toml

pytestmark = pytest.mark.system


@pytest.fixture
def subscriber(broker: Broker) -> Iterator[Subscriber]:
    subscriber = Subscriber(broker.port, OPERATOR, broker.users[OPERATOR], FLEET)
    subscriber.start()
    yield subscriber
    subscriber.stop()


@pytest.fixture
def director(short: Path, subscriber: Subscriber) -> Iterator[Director]:
    with fleet(short, subscriber) as director:
        yield director


@pytest.fixture
def updated(agent: Agent, broker: Broker, director: Director) -> Agent:
    """An agent that obeys the director; not started yet."""
    agent.write(agent.link_to(broker) + update_toml(agent.folder, director.server.url))
    return agent


def test_a_whole_update_loses_no_request(updated: Agent, director: Director, tmp_path: Path) -> None:
    updated.start()
    new = director.publish(next_version(updated.artifacts, tmp_path, 2))
    with Load(updated.address, record(seed=9).windows[:1]) as load:
        wait_until(lambda: load.answered > 100, "requests flow")
        version = director.want(new)
        report = director.end(version)
        before = load.answered
        wait_until(lambda: load.answered > before + 100, "requests flow on")
    assert load.failed == []
    assert report["update_state"] == "committed", report
    assert director.states(version) == [
        "planned", "fetching", "verified", "staged", "selftest", "probation", "committed"
    ]  # fmt: skip
    assert report["moved_bytes"] > 1000
    assert report["services"]["wrist"]["versions"] == {"wrist": 2, "wrist-accel": 2, "wrist-floor": 1}
    assert report["services"]["wrist"]["digests"]["wrist"] == new["wrist"]
    with Client(updated.address) as client:
        assert client.infer("wrist", {"window": record(seed=9).windows[:1]}).served_by == "wrist"
    status = updated.status()["update"]
    assert (status["state"], status["from"], status["to"]) == (
        "committed", {"wrist": "wrist v1"}, {"wrist": "wrist v2"}
    )  # fmt: skip
    assert "wrist v1 -> wrist v2" in updated.command("status").stdout
    assert updated.stop() == 0
    assert "critical" not in updated.log.read_text()
