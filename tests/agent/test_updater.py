"""The updater with a real store, a real installer and a real signed repository; only the worker is told about."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.chores import Chores
from agent.clock import wall_s
from agent.config import AgentConfig
from agent.contract.artifact import open_artifact
from agent.contract.desired import Desired
from agent.contract.errors import DiskFull
from agent.contract.repository import FamilyPolicy
from agent.decisions.events import Publish
from agent.decisions.lifecycle import Limits
from agent.decisions.updates import CandidateFailed, Choice, State, Update
from agent.equipment import Depot
from agent.journal import Journal, text_style
from agent.orders import Refusal
from agent.ota.errors import BelowMinimum
from agent.ota.installer import Installer
from agent.ota.installer import Site as Place
from agent.store import Store
from agent.updater import UPDATE, Hooks, Updater
from tests.agent.ota.server import serving
from tests.agent.ota.world import DEVICE, FAMILY, LIMITS, World, make_artifact

LIFE = Limits(probation_s=0.0, backoff_s=0.0)


class FullDisk(Store):
    full = False

    def put_value(self, name: str, value: Any, *, durable: bool = False) -> None:
        if self.full:
            raise DiskFull("no room")
        super().put_value(name, value, durable=durable)


class Site:
    """A device with one model from the factory, and what its updater asks of the process around it."""

    def __init__(self, world: World, *, limits: Limits = LIFE) -> None:
        self.world = world
        self.factory = world.folder / "factory"
        if not self.factory.exists():
            make_artifact(self.factory, version=1)
        config = AgentConfig.model_validate({"service": [{"name": FAMILY, "artifact": self.factory}]})
        state = world.folder / "state"
        self.store = FullDisk(state, outbox_bytes=1 << 20)
        self.installer = Installer(
            Place(DEVICE, state, world.root, factory={open_artifact(self.factory).digest: self.factory},
                  trial_limits=LIMITS)
        )  # fmt: skip
        self.depot = Depot(config, self.installer.slots)
        self.said: list[Publish] = []
        self.reports: list[dict[str, Any]] = []
        self.changes: list[int] = []
        self.refuse_version = 0
        self.statuses: dict[str, dict[str, Any]] = {FAMILY: {"benched": {}, "alarms": []}}
        self.log = io.StringIO()
        journal = Journal(self.log, style=text_style)
        hooks = Hooks(self._change, self._report, self.said.append, lambda: self.statuses)
        chores = Chores("ew-test", on_fault=self._fault)
        self.updater = Updater(self.store, journal, chores, self.installer, self.depot, limits=limits, hooks=hooks)

    def _change(self, _selection: Any, blueprints: Any, told: Callable[[str, str], None]) -> None:
        self.changes.append(blueprints[0].plan.engines[0].version)
        refused = self.changes[-1] == self.refuse_version
        told("golden_mismatch" if refused else "", "as the test wants")

    def _report(self) -> None:
        self.reports.append(self.updater.reported())

    def _fault(self, error: Exception) -> None:
        raise error

    def begin(self) -> None:
        selection, _, problems = self.depot.settle(self.installer.slots.pointer())
        self.updater.begin(selection, problem=next(iter(problems), ""))

    async def until(self, *states: State) -> None:
        async with asyncio.timeout(60):
            while self.updater.lifecycle.update.state not in states:
                self.updater.tick()
                await asyncio.sleep(0.01)

    @property
    def states(self) -> list[str]:
        return list(dict.fromkeys(report["update_state"] for report in self.reports))


def wish(digest: str, url: str, version: int = 1, **fields: Any) -> Desired:
    services = {FAMILY: {"artifacts": {"wrist": digest}, "order": ["wrist"]}}
    return Desired(device=DEVICE, version=version, issued_at=0.0, services=services, repository=url, **fields)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "world")
    world.repository.refresh_online(now_s=wall_s())
    return world


def published(world: World, **fields: Any) -> str:
    return world.publish(now_s=wall_s(), **fields)


def play(story: Callable[[], Any]) -> None:
    asyncio.run(story())


pytestmark = pytest.mark.system


def test_every_step_is_stored_before_it_is_told_and_told_once(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world)

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.COMMITTED)

    play(story)
    assert site.states == ["planned", "fetching", "verified", "staged", "selftest", "probation", "committed"]
    assert site.changes == [2]
    assert site.store.value(UPDATE)["state"] == "committed"
    assert site.installer.slots.pointer().current == {FAMILY: Choice({"wrist": digest}, ("wrist",))}
    status = site.updater.status()
    assert (status["from"], status["to"]) == ({FAMILY: "wrist v1"}, {FAMILY: "wrist v2"})
    assert status["trials"][0]["golden_rows"] == 4
    assert [event.details["state"] for event in site.said][-1] == "committed"
    assert site.said[-1].severity == "notice"
    site.store.close()


def test_the_same_document_signed_anew_after_a_key_rotation_moves_nothing(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world)

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.COMMITTED)
            moved = site.updater.lifecycle.update
            site.updater.desired(wish(digest, server.url), "its successor")
            await site.until(State.COMMITTED)
        after = site.updater.lifecycle.update
        assert (after.installed, after.previous) == (moved.installed, moved.previous)
        assert after.seen["its successor"] == 1

    play(story)
    assert site.changes == [2]
    assert site.reports[-1]["update_state"] == "committed"
    site.store.close()


def test_a_full_disk_holds_up_the_update_until_its_state_can_be_stored(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world)

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.store.full = True
            site.updater.desired(wish(digest, server.url), "director")
            site.updater.tick()
            await asyncio.sleep(0.05)
            assert server.asked == []
            assert site.updater.status()["unsaved"] is True
            site.store.full = False
            await site.until(State.COMMITTED)

    play(story)
    assert site.changes == [2]
    site.store.close()


def test_a_worker_that_cannot_start_the_candidate_takes_it_back(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world)
    site.refuse_version = 2

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.ROLLED_BACK)

    play(story)
    assert site.states[-3:] == ["probation", "rolling_back", "rolled_back"]
    assert site.changes == [2, 1]
    assert site.reports[-1]["code"] == "golden_mismatch"
    assert site.installer.slots.pointer().current is None
    assert digest in site.updater.lifecycle.update.quarantined
    site.store.close()


class Disk:
    """Ways in which the pointer of a device cannot be written."""

    def __init__(self, state: Path) -> None:
        self._pointers = [state / "current.json", state / "current.copy.json"]
        self._temporary = state / ".current.json.tmp"

    def refuse(self) -> None:
        self._temporary.mkdir()

    def accept(self) -> None:
        self._temporary.rmdir()

    def fill_once(self) -> None:
        self._temporary.symlink_to("/dev/full")

    def damage(self) -> None:
        for pointer in self._pointers:
            pointer.write_bytes(b"damaged")


async def spoil(site: Site, digest: str, url: str, trouble: Callable[[], None]) -> None:
    """A candidate that fails on probation, after `trouble` befell the disk; over when it is rolled back."""
    site.begin()
    site.updater.desired(wish(digest, url), "director")
    async with asyncio.timeout(60):
        while not site.updater.lifecycle.update.swapped:
            site.updater.tick()
            await asyncio.sleep(0.01)
    trouble()
    site.statuses[FAMILY] = {"benched": {"wrist": "failed 3 of 20"}, "alarms": []}
    await site.until(State.ROLLED_BACK)


@pytest.mark.parametrize("trouble", ["refuse", "fill_once", "damage"])
def test_a_pointer_that_cannot_be_written_does_not_hold_up_the_way_back(world: World, trouble: str) -> None:
    digest = published(world, version=2)
    site = Site(world, limits=replace(LIFE, probation_s=1000.0))
    disk = Disk(world.folder / "state")

    async def story() -> None:
        with serving(world.repository.folder) as server:
            await spoil(site, digest, server.url, getattr(disk, trouble))
        assert site.changes == [2, 1]
        assert site.reports[-1]["code"] == "engine_failed"
        if trouble == "refuse":
            assert site.updater.status()["unpointed"] is True
            disk.accept()
        async with asyncio.timeout(60):
            while site.updater.status()["unpointed"] and trouble != "damage":
                site.updater.tick()
                await asyncio.sleep(0.01)

    play(story)
    assert ("no room" if trouble == "fill_once" else "current.json") in site.log.getvalue()
    assert site.log.getvalue().count("update.pointer") == 1
    if trouble != "damage":  # that one waits for a person
        assert site.installer.slots.pointer().current is None
    site.store.close()


def test_a_candidate_that_was_taken_back_is_not_served_again_because_its_pointer_stayed(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world, limits=replace(LIFE, probation_s=1000.0))
    disk = Disk(world.folder / "state")

    async def story() -> None:
        with serving(world.repository.folder) as server:
            await spoil(site, digest, server.url, disk.refuse)

    play(story)
    site.store.close()
    disk.accept()
    again = Site(world)
    assert again.installer.slots.pointer().current == {FAMILY: Choice({"wrist": digest}, ("wrist",))}

    async def next_start() -> None:
        again.begin()
        async with asyncio.timeout(60):
            while again.updater.status()["unpointed"] or again.updater.lifecycle.update.state is State.ROLLING_BACK:
                again.updater.tick()
                await asyncio.sleep(0.01)

    play(next_start)
    assert again.changes == [1]
    assert again.updater.lifecycle.update.state is State.ROLLED_BACK
    assert again.updater.lifecycle.update.installed == again.depot.factory_selection
    assert again.installer.slots.pointer().current is None
    again.store.close()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"benched": {"wrist": "failed 3 of 20"}, "alarms": []}, "engine_failed"),
        ({"benched": {}, "alarms": [{"kind": "latency", "engine": "wrist"}]}, "latency"),
    ],
)
def test_a_candidate_in_trouble_on_probation_is_taken_back(world: World, status: dict[str, Any], code: str) -> None:
    digest = published(world, version=2)
    site = Site(world, limits=replace(LIFE, probation_s=1000.0))

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.PROBATION)
            async with asyncio.timeout(60):
                while not site.updater.lifecycle.update.swapped:  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.01)
            site.statuses[FAMILY] = status
            await site.until(State.ROLLED_BACK)

    play(story)
    assert site.reports[-1]["code"] == code
    site.store.close()


def test_one_lost_worker_on_probation_is_an_accident_and_the_second_is_not(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world, limits=replace(LIFE, probation_s=1000.0))

    async def story() -> None:
        site.begin()
        site.updater.worker_lost("before any update")
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.PROBATION)
            await asyncio.sleep(0)
            site.updater.worker_lost("killed")
            assert site.updater.lifecycle.update.state is State.PROBATION
            site.updater.worker_lost("killed")
            await site.until(State.ROLLED_BACK)

    play(story)
    assert site.reports[-1]["code"] == "crashed"
    site.store.close()


def test_a_service_this_device_does_not_have_is_refused_before_anything_is_asked(world: World) -> None:
    site = Site(world)

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            ankle = {"ankle": {"artifacts": {"wrist": "a" * 64}, "order": ["wrist"]}}
            document = {**wish("a" * 64, server.url).model_dump(), "services": ankle}
            site.updater.desired(Desired.model_validate(document), "director")
            await site.until(State.REJECTED)
            assert server.asked == []

    play(story)
    assert site.reports[-1]["code"] == "incompatible"
    site.store.close()


def test_a_refused_document_is_told_until_the_next_step(world: World) -> None:
    site = Site(world)

    async def story() -> None:
        site.begin()
        site.updater.refused(Refusal("desired", "untrusted", "nobody knows who signed", 9))
        assert site.reports[-1]["code"] == "untrusted"
        assert site.reports[-1]["refused"] == {"what": "desired", "code": "untrusted", "claimed": 9}
        assert site.reports[-1]["update_state"] == "idle"
        assert "version 9" in site.said[-1].text
        site.updater.desired(wish("0" * 64, "http://127.0.0.1:1", 3), "director")
        assert site.reports[-1]["code"] == ""
        site.updater.desired(wish("0" * 64, "http://127.0.0.1:1", 2), "director")
        assert site.reports[-1]["code"] == "replayed"

    play(story)
    site.store.close()


def test_an_update_that_cannot_be_read_starts_anew_from_what_serves(world: World) -> None:
    site = Site(world)
    site.store.put_value(UPDATE, {"of": "another program"})

    async def story() -> None:
        site.begin()

    play(story)
    assert site.updater.lifecycle.update == Update(installed=site.depot.factory_selection)
    site.store.close()


def test_without_a_previous_selection_there_is_no_way_back(world: World) -> None:
    site = Site(world)

    async def story() -> None:
        site.begin()
        assert site.updater.roll_back("please") is False

    play(story)
    site.store.close()


def test_a_director_cannot_order_the_way_back_below_a_minimum_that_was_signed(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world)

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.COMMITTED)
            world.repository.set_policy(FAMILY, FamilyPolicy("approve", (), {"wrist": 2}), now_s=wall_s())
            site.installer.directors(server.url, wall_s=wall_s(), families=[FAMILY])
        with pytest.raises(BelowMinimum, match="minimum 2"):
            site.updater.roll_back_as_ordered("ordered")
        assert site.updater.lifecycle.update.state is State.COMMITTED
        assert site.updater.roll_back("an operator is here") is True
        await site.until(State.ROLLED_BACK)

    play(story)
    assert site.installer.authority.marks().minimums == {FAMILY: {"wrist": 2}}
    assert site.changes == [2, 1]
    site.store.close()


@pytest.mark.parametrize("minimum", [1, 2])
def test_a_director_cannot_order_a_candidate_away_to_what_lies_below_a_minimum(world: World, minimum: int) -> None:
    """On probation the way back leads to what is installed: the factory's version 1."""
    digest = published(world, version=2)
    site = Site(world, limits=replace(LIFE, probation_s=1000.0))
    world.repository.set_policy(FAMILY, FamilyPolicy("auto", (DEVICE,), {"wrist": minimum}), now_s=wall_s())

    async def story() -> None:
        site.begin()
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.PROBATION)
        if minimum == 2:
            with pytest.raises(BelowMinimum, match="minimum 2"):
                site.updater.roll_back_as_ordered("ordered")
            assert site.updater.lifecycle.update.state is State.PROBATION
            site.updater.handle(CandidateFailed("engine_failed", "it failed"))  # nobody's order: serving goes first
        else:
            assert site.updater.roll_back_as_ordered("ordered") is True
        await site.until(State.ROLLED_BACK)

    play(story)
    assert site.changes[-1] == 1
    site.store.close()


def test_a_director_may_order_the_way_back_to_what_no_minimum_forbids(world: World) -> None:
    digest = published(world, version=2)
    site = Site(world)

    async def story() -> None:
        site.begin()
        assert site.updater.roll_back_as_ordered("too early") is False
        with serving(world.repository.folder) as server:
            site.updater.desired(wish(digest, server.url), "director")
            await site.until(State.COMMITTED)
            assert site.updater.roll_back_as_ordered("ordered") is True
            await site.until(State.ROLLED_BACK)

    play(story)
    assert site.changes == [2, 1]
    site.store.close()
