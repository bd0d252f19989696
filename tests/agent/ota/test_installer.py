"""An update from a signed wish to slots on disk: what is fetched, what is refused with which code, what is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.contract.artifact import Output
from agent.contract.repository import FamilyPolicy
from agent.decisions.updates import Choice, Fetch, Selection, SelfTest, StepDone, StepFailed, Target, Verify
from agent.ota import child, trial, trust
from agent.ota.installer import Installer
from tests.agent.ota.server import Fault, Server, serving
from tests.agent.ota.world import DAY_S, DEVICE, FAMILY, NOW_S, World, make_artifact, target


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    with serving(world.repository.folder) as server:
        yield server


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The children's answers without the children; tests marked `system` start them."""
    mains = {"agent.ota.trust": trust.main, "agent.ota.trial": trial.main}
    if "system" not in request.keywords:
        monkeypatch.setattr(child, "run", lambda module, question, _limits: mains[module](dict(question)))


def installed(world: World, **fields: Any) -> tuple[Selection, dict[str, Path]]:
    """Version 1 from the factory: the selection, and where it lies."""
    place = world.folder / "factory"
    digest = make_artifact(place, version=1, **fields)
    return {FAMILY: Choice({"wrist": digest}, ("wrist",))}, {digest: place}


def fetch(installer: Installer, wish: Target, selection: Selection, *, wall_s: float = NOW_S) -> str:
    """The code, "" = done."""
    return code(installer.execute(Fetch(1, wish), installed=selection, wall_s=wall_s))


def code(event: StepDone | StepFailed) -> str:
    return event.code if isinstance(event, StepFailed) else ""


def left(installer: Installer) -> set[str]:
    """Blobs and slots on disk."""
    state = installer.site.folder
    return {path.name for part in ("blobs", "slots", "partial") for path in (state / part).iterdir()}


def test_an_update_is_fetched_verified_tested_and_only_missing_bytes_move(world: World, server: Server) -> None:
    selection, factory = installed(world)
    digest = world.publish(version=2)
    installer = world.installer(factory=factory)
    wish = target(digest, url=server.url)
    done = installer.execute(Fetch(7, wish), installed=selection, wall_s=NOW_S)
    assert isinstance(done, StepDone)
    assert done.moved_bytes == server.sent("/wrist/")
    again = installer.execute(Fetch(8, wish), installed=selection, wall_s=NOW_S)
    assert again == StepDone(8, 0)
    assert installer.execute(Verify(9, wish), installed=selection, wall_s=NOW_S) == StepDone(9)
    assert installer.execute(SelfTest(10, wish), installed=selection, wall_s=NOW_S) == StepDone(10)
    assert [tried.digest for tried in installer.trials] == [digest]
    assert installer.artifact(digest).manifest.version == 2


def test_blobs_that_two_versions_share_are_moved_once(world: World, server: Server) -> None:
    first, second = world.publish(version=2, scale=2.0), world.publish(version=3, scale=2.0)
    installer = world.installer()
    assert fetch(installer, target(first, url=server.url), {}) == ""
    before = installer.downloads.moved_bytes
    assert fetch(installer, target(second, version=2, url=server.url), {}) == ""
    assert installer.downloads.moved_bytes - before < 3000  # the manifest alone


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"approve": False}, "not_approved"),
        ({"version": 1, "scale": 5.0}, "downgrade"),
        ({"version": 2, "name": "wrist-accel"}, "incompatible"),
        ({"version": 2, "device_class": "phone"}, "incompatible"),
    ],
)
def test_what_is_not_acceptable_is_refused_before_a_blob_is_fetched(
    world: World, server: Server, fields: dict[str, Any], expected: str
) -> None:
    selection, factory = installed(world)
    digest = world.publish(**{"version": 2, **fields})
    installer = world.installer(factory=factory, device_class="gateway")
    assert fetch(installer, target(digest, url=server.url), selection) == expected
    assert server.sent("/wrist/blobs/") == 0


def test_what_nobody_signed_is_untrusted(world: World, server: Server) -> None:
    installer = world.installer()
    assert fetch(installer, target("9" * 64, url=server.url), {}) == "untrusted"
    assert left(installer) == set()


def test_a_family_without_policy_is_untrusted(world: World, server: Server) -> None:
    wish = Target(1, {"door": Choice({"door": "9" * 64}, ("door",))}, server.url)
    assert fetch(world.installer(), wish, {}) == "untrusted"


def test_auto_reaches_the_canary_and_nobody_else(tmp_path: Path) -> None:
    world = World(tmp_path / "auto", FamilyPolicy("auto", (DEVICE,)))
    digest = world.publish(version=2, approve=False)
    with serving(world.repository.folder) as server:
        wish = target(digest, url=server.url)
        assert fetch(world.installer(DEVICE), wish, {}) == ""
        assert fetch(world.installer("gateway-2"), wish, {}) == "not_approved"


def test_going_back_needs_a_signed_rollback_and_stops_at_the_minimum(world: World, server: Server) -> None:
    old, new = world.publish(version=2), world.publish(version=3)
    installer = world.installer()
    wish = target(new, url=server.url)
    assert fetch(installer, wish, {}) == ""
    installer.verify(wish, installed={})
    assert fetch(installer, target(old, version=2, url=server.url), wish.services) == "downgrade"
    assert fetch(installer, target(old, version=3, url=server.url, rollback=True), wish.services) == ""
    world.repository.set_policy(FAMILY, FamilyPolicy("approve", (), {"wrist": 3}), now_s=NOW_S)
    assert fetch(installer, target(old, version=4, url=server.url, rollback=True), wish.services) == "below_minimum"


def test_going_back_to_the_factorys_artifact_needs_no_download_but_the_same_signature(
    world: World, server: Server
) -> None:
    selection, factory = installed(world)
    new = world.publish(version=2)
    installer = world.installer(factory=factory)
    wish = target(new, url=server.url)
    assert fetch(installer, wish, selection) == ""
    installer.verify(wish, installed=selection)
    assert fetch(installer, target(*factory, version=2, url=server.url), wish.services) == "downgrade"
    before = installer.downloads.moved_bytes
    back = target(*factory, version=3, url=server.url, rollback=True)
    assert fetch(installer, back, wish.services) == ""
    installer.verify(back, installed=wish.services)
    assert installer.self_test(back, installed=wish.services) == ()
    assert installer.downloads.moved_bytes == before


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("/blobs/", status=404), "unavailable"),
        (Fault("/blobs/", status=500), "unavailable"),
        (Fault("/blobs/", body=b"x"), "corrupt"),
        (Fault("/blobs/", endless=True), "too_large"),
        (Fault("/manifests/", body=b"{}"), "corrupt"),
        (Fault("/manifests/", extra=b"x"), "too_large"),
        (Fault("timestamp", status=500), "unavailable"),
    ],
)
def test_trouble_on_the_way_has_a_code_and_the_next_try_succeeds(
    world: World, server: Server, fault: Fault, expected: str
) -> None:
    digest = world.publish(version=2)
    installer = world.installer()
    installer.downloads._pause_s = 0.0
    server.faults = [fault]
    assert fetch(installer, target(digest, url=server.url), {}) == expected
    assert not any((installer.site.folder / "partial").iterdir())
    server.faults = []
    assert fetch(installer, target(digest, url=server.url), {}) == ""


def test_expired_metadata_and_an_unknown_clock_block_installing(world: World, server: Server) -> None:
    digest = world.publish(version=2)
    installer = world.installer()
    wish = target(digest, url=server.url)
    assert fetch(installer, wish, {}, wall_s=NOW_S + 2 * DAY_S) == "metadata_stale"
    assert fetch(installer, wish, {}, wall_s=0.0) == "clock_unknown"
    assert left(installer) == set()
    assert fetch(installer, wish, {}) == ""


def test_an_update_larger_than_allowed_here_is_refused(world: World, server: Server) -> None:
    digest = world.publish(version=2)
    assert fetch(world.installer(max_artifact_bytes=1000), target(digest, url=server.url), {}) == "too_large"


def test_other_tensors_than_clients_know_are_incompatible(world: World, server: Server) -> None:
    selection, factory = installed(world, outputs=[Output(name="probability", datatype="FP32", shape=[-1, 7])])
    digest = world.publish(version=2)
    installer = world.installer(factory=factory)
    wish = target(digest, url=server.url)
    assert fetch(installer, wish, selection) == ""
    assert code(installer.execute(Verify(2, wish), installed=selection, wall_s=NOW_S)) == "incompatible"


def test_a_blob_damaged_on_disk_is_noticed_fetched_again_and_healed(world: World, server: Server) -> None:
    digest = world.publish(version=2)
    installer = world.installer()
    wish = target(digest, url=server.url)
    assert fetch(installer, wish, {}) == ""
    for blob in (installer.site.folder / "blobs").iterdir():
        if blob.name != digest:
            blob.chmod(0o644)
            blob.write_bytes(b"\x00" * blob.stat().st_size)
    assert code(installer.execute(Verify(2, wish), installed={}, wall_s=NOW_S)) == "corrupt"
    assert fetch(installer, wish, {}) == ""
    assert installer.execute(Verify(3, wish), installed={}, wall_s=NOW_S) == StepDone(3)


def test_a_wrong_golden_names_the_digest_to_blame(world: World, server: Server) -> None:
    good, bad = world.publish(version=2), world.publish(version=3, name="wrist-accel", wrong=0.1)
    installer = world.installer()
    wish = target(good, bad, url=server.url)
    assert fetch(installer, wish, {}) == ""
    installer.verify(wish, installed={})
    failed = installer.execute(SelfTest(3, wish), installed={}, wall_s=NOW_S)
    assert isinstance(failed, StepFailed)
    assert (failed.code, failed.digests) == ("golden_mismatch", (bad,))


def test_a_cancelled_fetch_ends_and_keeps_its_bytes(world: World, server: Server) -> None:
    digest = world.publish(version=2)
    installer = world.installer()
    wish = target(digest, url=server.url)
    ended = installer.execute(
        Fetch(1, wish), installed={}, wall_s=NOW_S, cancelled=lambda: installer.downloads.moved_bytes > 0
    )
    assert code(ended) == "unavailable"


def test_statistics_are_flat_numbers(world: World) -> None:
    assert all(isinstance(value, int | float) for value in world.installer().statistics().values())


@pytest.mark.system
def test_the_same_with_real_children(world: World, server: Server) -> None:
    selection, factory = installed(world)
    digest = world.publish(version=2)
    installer = world.installer(factory=factory)
    wish = target(digest, url=server.url)
    for command in (Fetch(1, wish), Verify(2, wish), SelfTest(3, wish)):
        assert code(installer.execute(command, installed=selection, wall_s=NOW_S)) == ""
    assert installer.trials[0].golden_rows == 4


@pytest.mark.system
def test_the_agents_process_loads_neither_tuf_nor_the_runtime() -> None:
    code_ = "import sys, agent.ota.installer; print(sorted({'tuf', 'onnxruntime', 'torch'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code_], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
