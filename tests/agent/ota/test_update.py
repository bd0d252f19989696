"""A whole update, killed again and again: the pointer is always the old or the new one, and its bytes are whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agent.decisions.updates import Choice
from agent.ota.slots import Slots
from tests.agent.ota.server import Server, serving
from tests.agent.ota.world import FAMILY, World, make_artifact

pytestmark = pytest.mark.system


def start(world: World, server: Server, factory: Path, digest: str) -> subprocess.Popen[str]:
    words = [str(world.folder / "state"), str(world.root), server.url, str(factory), digest]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.agent.ota.agent_double", *words], stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Its reports, one a line."""
    out, _ = process.communicate(timeout=60)
    return out.splitlines()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def factory(world: World) -> Path:
    make_artifact(world.folder / "factory", version=1)
    return world.folder / "factory"


def test_an_update_goes_through_every_state(world: World, factory: Path) -> None:
    digest = world.publish(version=2)
    with serving(world.repository.folder) as server:
        states = [line.split()[0] for line in finish(start(world, server, factory, digest))]
    assert states == [
        "planned", "fetching", "verified", "staged", "selftest", "probation", "committed", "committed"
    ]  # fmt: skip
    assert Slots(world.folder / "state").pointer().current == {FAMILY: Choice({"wrist": digest}, ("wrist",))}


def test_a_model_that_answers_wrongly_never_serves(world: World, factory: Path) -> None:
    digest = world.publish(version=2, wrong=0.5)
    with serving(world.repository.folder) as server:
        lines = finish(start(world, server, factory, digest))
    assert lines[-1] == "quarantined"
    assert "golden_mismatch" in lines[-2]
    assert Slots(world.folder / "state").pointer().current is None


def test_a_model_signed_by_strangers_never_serves(world: World, factory: Path, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    digest = other.publish(version=3)
    with serving(other.repository.folder) as server:
        lines = finish(start(world, server, factory, digest))
    assert lines[-1] == "rejected"
    assert "untrusted" in lines[-2]
    assert not any((world.folder / "state" / "blobs").iterdir())


def test_kills_at_random_moments_end_in_the_new_selection_and_never_in_none(world: World, factory: Path) -> None:
    digest = world.publish(version=2)
    new = {FAMILY: Choice({"wrist": digest}, ("wrist",))}
    dice = np.random.default_rng(11)
    state = world.folder / "state"
    with serving(world.repository.folder) as server:
        for _ in range(10):
            process = start(world, server, factory, digest)
            time.sleep(0.3 + float(dice.random()) * 0.9)
            process.kill()
            lines = finish(process)
            slots = Slots(state)
            current = slots.pointer().current
            assert current in (None, new)
            if current == new:
                assert slots.open(digest).digest == digest
            if lines and lines[-1] == "committed":
                shutil.rmtree(state)
        assert finish(start(world, server, factory, digest))[-1] == "committed"
    slots = Slots(state)
    assert slots.pointer().current == new
    assert not any((slots.folder / "partial").iterdir())
