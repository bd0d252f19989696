from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.story.broker import Broker
from tests.compressor.fleet.doubles import DEVICES, FLEET, Device
from tests.compressor.fleet.world import World


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("broker"), FLEET, DEVICES)
    broker.prepare()
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def device(broker: Broker) -> Iterator[Callable[[str], Device]]:
    made = []

    def make(name: str) -> Device:
        made.append(Device(broker.port, name, broker.users[name]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "host"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.database.close()
